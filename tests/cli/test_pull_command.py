"""`rlora pull` of a folder. `tests/hub` runs it against a server."""

import json


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
