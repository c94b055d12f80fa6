"""The report of an export, and its card."""

import json
import re

import pytest
import torch
from exporting import DATA, WEIGHTS, adapted
from huggingface_hub import ModelCard
from peft import LoraConfig

from rlora_trl.analysis import HeadWeights
from rlora_trl.export import export_lora
from rlora_trl.files.card_text import check_card
from rlora_trl.tuner.selection import adapted_layers


def test_card_and_report(model_folders, tmp_path, tokenizer):
    model = adapted(model_folders, scale=2.0)
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = "org/base", "abc"
    report = export_lora(model, tmp_path / "out", task="same", data=DATA, tokenizer=tokenizer)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "peft"
    assert (card.data.base_model, card.data.base_model_relation) == ("org/base", "adapter")
    assert "lora" in card.data.tags
    for text in (
        f"{report.kl:.2g} nats",
        f"{report.accuracy_export:.1%}",
        "vllm serve org/base --enable-lora --lora-modules name=this_folder --max-lora-rank 8",
        "convert_lora_to_gguf.py",
        "`same`",
        "PeftModel.from_pretrained(base",
    ):
        assert text in card.text, text
    saved = LoraConfig.from_pretrained(tmp_path / "out")
    assert (saved.base_model_name_or_path, saved.revision, saved.task_type) == ("org/base", "abc", "CAUSAL_LM")
    values = json.loads(json.dumps(report.to_dict()))
    assert values["rank"] == 8 and values["path"] == str(tmp_path / "out") and values["warnings"] == []
    # Where it will be published, beside its adapter.
    for merge in (False, True):
        place = ("user/x", "exports/same")
        export_lora(model, tmp_path / "out", routing=WEIGHTS, merge=merge, published_as=place)
        text = (tmp_path / "out" / "README.md").read_text()
        assert '"user/x", subfolder="exports/same")' in text and "[user/x](https://huggingface.co/user/x)" in text
        assert not re.search("this.folder|pypi|tmp", text)
        if not merge:
            assert 'hf download user/x --include "exports/same/*" --local-dir adapter\nvllm serve org/base' in text
            assert "--lora-modules same=adapter/exports/same" in text
            assert "--outfile lora.gguf adapter/exports/same" in text
    # A folder is nobody else's business.
    config.base_model_name_or_path = model_folders["llama"]
    export_lora(model, tmp_path / "out", routing=WEIGHTS)
    card = (tmp_path / "out" / "README.md").read_text()
    assert model_folders["llama"] not in card and "not measured" in card


@pytest.mark.parametrize(
    "task", ["`", "a|b", "\u202egnp.exe", "\x1b[2J", "<!-- x -->", "two\nlines\n---\n", "x" * 512, "[a](b)"]
)
def test_names_of_tasks_do_not_break_the_card(model_folders, tmp_path, task):
    names = [task, *(f"task {i}" for i in range(500))]
    model = adapted(model_folders, tasks=names)
    layers = list(adapted_layers(model, "default"))
    weights = torch.full((len(layers), 3), 1 / 3)
    measured = HeadWeights(tuple(layers), dict.fromkeys(names, weights), dict.fromkeys(names, 1))
    export_lora(model, tmp_path / "one", routing=measured, task=task)
    report = export_lora(model, tmp_path / "mean", routing=measured)
    assert "and 491 more" in report.mixture
    for folder in ("one", "mean"):
        check_card(tmp_path / folder / "README.md")
        card = ModelCard.load(tmp_path / folder / "README.md")
        assert all(character.isprintable() or character == "\n" for character in card.content)
        assert len(card.content) < 5000 and card.content.count("<!--") == 1 and card.content.count("\n---\n") == 1
