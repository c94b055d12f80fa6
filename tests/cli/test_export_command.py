"""`rlora export`: a plain LoRA adapter from the command line."""

import json

import rlora_cli.export


def test_export(rlora, make_adapter, rows_folder, tmp_path):
    folder = make_adapter()
    result = rlora("export", folder, tmp_path / "given", "--weights", "0.2,0.3,0.5", "--json")
    shown = json.loads(result.stdout)
    assert (shown["rank"], shown["kl"]) == (8, None)
    assert (tmp_path / "given" / "adapter_model.safetensors").is_file()
    result = rlora("export", folder, tmp_path / "measured", "--task", "same", "--data", rows_folder)
    assert result.exit_code == 0, result.stderr
    assert "plain LoRA of rank 8" in result.stdout and "nats per token" in result.stdout
    result = rlora("export", folder, tmp_path / "merged", "--weights", "0.2,0.3,0.5", "--merge")
    assert "merged model" in result.stdout and (tmp_path / "merged" / "model.safetensors").is_file()


def test_export_errors(rlora, make_adapter, tmp_path, monkeypatch):
    folder = make_adapter()
    assert rlora("export", folder, tmp_path / "x", "--weights", "a,b").exit_code == 2
    assert rlora("export", folder, tmp_path / "x", "--weights", "1,0,0", "--task", "same").exit_code == 2
    result = rlora("export", folder, tmp_path / "x", "--weights", "1,0")
    assert result.exit_code == 1
    assert "Error: `--weights 1,0` must be 3 numbers, one for each head" in result.stderr
    result = rlora("export", folder, tmp_path / "x", "--weights", "0.2,0.3,0.4")
    assert "got 3 with the sum 0.9." in result.stderr
    result = rlora("export", folder, tmp_path / "x", "--task", "colours")
    assert "There is no task 'colours'; the adapter has 'same', 'colour', 'first'. Did you mean 'colour'?" in (
        result.stderr
    )
    monkeypatch.setattr(rlora_cli.export, "load_adapter", None)  # the model is not needed to refuse
    result = rlora("export", folder, tmp_path / "x", "--task", "same")
    assert result.exit_code == 1 and result.stderr.strip().endswith(
        "Add `--data` to measure them, or set them with `--weights`."
    )
    assert not (tmp_path / "x").exists()
