"""`rlora pull` of a folder. `tests/hub` runs it against a server."""

import json
import signal
import sys

import pytest
from processes import RLORA, run
from testing_utils import limited_files

from rlora_trl.files.layout import published_files


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def published(folder):
    return {name: (folder / name).read_bytes() for name in published_files(folder)}


def test_pull_checks_and_copies_a_folder(rlora, make_adapter, tmp_path):
    folder = make_adapter()
    (folder / "notes.txt").write_text("mine")
    shown = json.loads(rlora("pull", folder, "--output", tmp_path / "copy", "--json").stdout)
    assert (shown["r"], shown["num_heads"], shown["layers"]) == (4, 3, 6)
    assert shown["tasks"] == ["same", "colour", "first"]
    assert (tmp_path / "copy" / "adapter_model.safetensors").read_bytes() == (
        folder / "adapter_model.safetensors"
    ).read_bytes()
    assert not (tmp_path / "copy" / "notes.txt").exists()
    result = rlora("pull", folder, "--output", tmp_path / "copy")
    assert result.exit_code == 0 and "has this adapter already" in result.stderr
    assert "from_pretrained" in result.stderr and str(tmp_path / "copy") in result.stdout
    result = rlora("pull", make_adapter("other", r=2), "--output", tmp_path / "copy")
    assert result.exit_code == 1 and "is not empty" in result.stderr
    weights = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights[:-10])
    result = rlora("pull", folder)
    assert result.exit_code == 1 and "Traceback" not in result.stderr


def test_pull_tells_repository_and_commit(rlora, make_adapter, tmp_path):
    (tmp_path / "models--user--some--words" / "snapshots").mkdir(parents=True)
    folder = make_adapter("models--user--some--words/snapshots/" + "a" * 40)
    shown = json.loads(rlora("pull", folder, "--json").stdout)
    assert (shown["repo_id"], shown["commit"]) == ("user/some--words", "a" * 40)
    lines = rlora("pull", folder).stdout.splitlines()
    assert [line.split() for line in lines[:2]] == [["Repository", "user/some--words"], ["Commit", "a" * 40]]


def test_pull_shows_how_to_load(rlora, make_adapter):
    folder = make_adapter()
    assert f"AutoPeftModelForCausalLM.from_pretrained('{folder}')" in rlora("pull", folder).stderr
    other = make_adapter("other", task_type=None)
    assert f" PeftModel.from_pretrained(base, '{other}')" in rlora("pull", other).stderr


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 0.99])
def test_copy_on_a_full_disk_leaves_nothing_and_the_retry_succeeds(rlora, make_adapter, tmp_path, part, existing):
    folder, target = make_adapter(), tmp_path / "new" / "copy"
    if existing:
        target.mkdir(parents=True)
    largest = max(map(len, published(folder).values()))
    with limited_files(int(part * largest)):
        result = rlora("pull", folder, "--output", target)
    assert result.exit_code == 1 and "can't be copied" in result.stderr and "Traceback" not in result.stderr
    assert target.exists() == existing and not contents(tmp_path / "new")
    result = rlora("pull", folder, "--output", target)
    assert result.exit_code == 0, result.stderr
    assert contents(target) == published(folder)


def test_copy_into_the_current_directory(rlora, make_adapter, tmp_path, monkeypatch):
    folder, target = make_adapter(), tmp_path / "here"
    target.mkdir()
    monkeypatch.chdir(target)
    assert rlora("pull", folder, "--output", ".").exit_code == 0
    assert contents(target) == published(folder) and (target / ".").samefile(".")


# Ends the process in the middle of a copy: with half a file, or when some of the files have their names.
INTERRUPTED = """
import os, shutil, signal, sys
from pathlib import Path

copy, replace, calls = shutil.copyfile, Path.replace, []

def end(path, *more):
    calls.append(path)
    if len(calls) == 2:
        if where == "copyfile":
            Path(more[0]).write_bytes(Path(path).read_bytes()[:10])
        os.kill(os.getpid(), number)
    return (copy if where == "copyfile" else replace)(path, *more)

number, where = int(sys.argv.pop(1)), sys.argv.pop(1)
if where == "copyfile":
    shutil.copyfile = end
else:
    Path.replace = end
from rlora_cli import main
main()
"""


@pytest.mark.parametrize("where", ["copyfile", "replace"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_copy_does_not_refuse_the_retry(rlora, make_adapter, tmp_path, number, where):
    folder, target = make_adapter(), tmp_path / "copy"
    words = [str(int(number)), where, "pull", str(folder), "--output", str(target)]
    done = run([sys.executable, "-c", INTERRUPTED, *words])
    assert done.returncode == (130 if number == signal.SIGINT else -number), done.stderr
    if number == signal.SIGINT:
        assert "Interrupted" in done.stderr and "Traceback" not in done.stderr
        assert target.exists() == (where == "replace")
    # Whatever was left is whole, apart from the folder of the copy, which no loader enters.
    left = {name: data for name, data in contents(target).items() if not name.startswith(".rlora-pull-")}
    assert left.items() <= published(folder).items() and len(left) == (where == "replace")

    result = rlora("pull", folder, "--output", target)
    assert result.exit_code == 0, result.stderr
    assert contents(target) == published(folder)


def test_files_of_the_user_are_never_replaced(rlora, make_adapter, tmp_path):
    folder, target = make_adapter(), tmp_path / "copy"
    for name, data in {
        "notes.txt": b"mine",
        "README.md": b"another card",
        "adapter_config.json": b"{}",
        ".rlora-pull": b"mine",
        "exports/mine.txt": b"mine",
    }.items():
        (target / name).parent.mkdir(parents=True)
        (target / name).write_bytes(data)
        result = rlora("pull", folder, "--output", target)
        assert result.exit_code == 1 and "has other files" in result.stderr, name
        assert contents(target) == {name: data}
        (target / name).rename(tmp_path / "aside")
        for path in sorted(target.rglob("*"), reverse=True):
            path.rmdir()
        target.rmdir()


def test_copy_that_was_extended_is_not_changed(rlora, make_adapter, tmp_path):
    """Text in the card, a record with new scores, a file beside them."""
    folder, target = make_adapter(), tmp_path / "copy"
    assert rlora("pull", folder, "--output", target).exit_code == 0
    (target / "README.md").write_text((folder / "README.md").read_text() + "more")
    (target / "notes.txt").write_text("mine")
    before = contents(target)
    result = rlora("pull", folder, "--output", target)
    assert result.exit_code == 0 and "has this adapter already" in result.stderr
    assert contents(target) == before


def test_offline_without_the_adapter_says_what_to_do(tmp_path):
    """In the command's own words."""
    done = run([*RLORA, "pull", "user/words", "--offline"], env={"HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "user/words is not in the cache" in done.stderr and "`--offline`" in done.stderr
    assert "local_files_only" not in done.stderr
