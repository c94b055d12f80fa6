"""`rlora card`: the card of a folder."""

import json
import re

import pytest
from peft import PeftModel
from testing_utils import limited_files
from transformers import AutoModelForCausalLM

from rlora_trl.files.checks import check_adapter
from rlora_trl.files.layout import task_slug
from rlora_trl.files.record import AdapterRecord


def test_card(rlora, make_adapter):
    folder = make_adapter()
    (folder / "README.md").unlink()
    result = rlora("card", folder, "--repo", "user/words")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("---\n") and "user/words" in result.stdout
    assert not (folder / "README.md").exists()
    assert rlora("card", folder, "--write").exit_code == 0
    assert "task:colour" in (folder / "README.md").read_text()
    assert "task:colour" in json.loads(rlora("card", folder, "--json").stdout)["metadata"]["tags"]


@pytest.mark.parametrize("size", [0, 300, 1000])
def test_text_by_hand_survives_a_full_disk(rlora, make_adapter, size):
    folder = make_adapter()
    assert rlora("card", folder, "--write").exit_code == 0
    card = folder / "README.md"
    card.write_text(card.read_text() + "\n## By hand\n\nWords that nobody has elsewhere.\n")
    assert len(card.read_bytes()) > size
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with limited_files(size):
        result = rlora("card", folder, "--write", "--repo", "user/words")
    assert result.exit_code == 1 and "README.md" in result.stderr and "Traceback" not in result.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert rlora("card", folder, "--write", "--repo", "user/words").exit_code == 0
    assert "Words that nobody has elsewhere." in card.read_text() and "user/words" in card.read_text()


def test_card_names_the_exports_that_are_in_the_folder(rlora, make_adapter):
    folder = make_adapter(tasks=["same", "EN fr"])
    measured = {"task": "same", "path": "exports/same", "rank": 8, "accuracy": 0.75}
    elsewhere = {
        "task": "EN fr",
        "path": f"exports/{task_slug('EN fr')}",
    }  # of a repository, whose exports stayed there
    AdapterRecord(exports=[measured, elsewhere]).save(folder)
    # At the place of a task, at one of the user's choice, and a merged model, which PEFT can't load from a subfolder.
    for name, more in (("same", []), ("by_hand", []), ("whole", ["--merge"])):
        words = ["export", folder, folder / "exports" / name, "--weights", "0.2,0.3,0.5", *more]
        assert rlora(*words).exit_code == 0

    shown = json.loads(rlora("card", folder, "--json").stdout)

    assert shown["metadata"]["rlora"]["exports"] == {"same": "exports/same", "exports/by_hand": "exports/by_hand"}
    for subfolder in re.findall(r'subfolder="(.*?)"', shown["text"]):
        base = AutoModelForCausalLM.from_pretrained(check_adapter(folder).config.base_model_name_or_path)
        PeftModel.from_pretrained(base, str(folder), subfolder=subfolder)
    assert "75.0%" in shown["text"] and "EN fr" not in shown["text"].partition("exports/same")[2].partition("##")[0]

    (folder / "exports" / "same").rename(folder / elsewhere["path"])
    assert json.loads(rlora("card", folder, "--json").stdout)["metadata"]["rlora"]["exports"] == {
        "EN fr": elsewhere["path"],
        "exports/by_hand": "exports/by_hand",
    }
