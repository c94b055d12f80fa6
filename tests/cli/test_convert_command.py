"""`rlora convert`: adapters of other code from the command line."""

import json
import os

import pytest
import torch
from peft import LoraConfig, get_peft_model
from testing_utils import perturb
from transformers import AutoModelForCausalLM


PREFIX = "base_model.model.model.layers.0.mlp.up_proj"


@pytest.fixture
def source(tmp_path, model_folders):
    """One layer of three heads, as the authors' code saves it."""
    folder = tmp_path / "source"
    folder.mkdir()
    fields = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 32,
        "lora_nums": 3,
        "target_modules": ["layers.0.mlp.up_proj"],
    }
    fields |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": str(model_folders["llama"])}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    heads = {f"{PREFIX}.lora_B{head}.weight": torch.randn(48, 4) for head in range(3)}
    route = {f"{PREFIX}.lora_route.weight": torch.randn(3, 32)}
    torch.save({f"{PREFIX}.lora_A.weight": torch.randn(4, 32), **heads, **route}, folder / "adapter_model.bin")
    return folder


def test_hydralora(rlora, source, tmp_path):
    result = rlora("convert", source, tmp_path / "out", "--from", "hydralora", "--task", "a", "--task", "b")
    assert result.exit_code == 0, result.stderr
    lines = {" ".join(line.split()) for line in result.stdout.splitlines()}
    assert f"Written to {tmp_path / 'out'}" in lines
    assert {"Converted from HydraLoRA", "Layers 1", "Heads 3 heads of rank 4, router softmax", "Tasks a, b"} <= lines
    assert "Scaling 8 = lora_alpha / r" in lines and "Initial delta" not in result.stdout
    # The other commands take it.
    assert rlora("card", tmp_path / "out", "--write").exit_code == 0
    shown = (tmp_path / "out" / "README.md").read_text()
    assert "converted_from" in shown and "hydralora" in shown
    export = rlora("export", tmp_path / "out", tmp_path / "lora", "--weights", "0.2,0.3,0.5", "--json")
    assert json.loads(export.stdout)["rank"] == 4


def test_rlora(rlora, source, tmp_path):
    words = ("convert", source, tmp_path / "out", "--from", "r-lora")
    result = rlora(*words)
    assert result.exit_code == 1 and not (tmp_path / "out").exists()
    assert "Pass `--use-rslora` if it was trained with `--rank_stablization True`" in result.stderr
    assert "else `--no-use-rslora` (lora_alpha / r)" in result.stderr
    result = rlora(*words, "--use-rslora")
    assert result.exit_code == 1 and "Pass `--initial-values`, the adapter as the code saves it" in result.stderr
    result = rlora(*words, "--use-rslora", "--ignore-offset", "--base", "user/base", "--json")
    shown = json.loads(result.stdout)
    assert (shown["scaling"], shown["use_rslora"], shown["offset"]) == (16.0, True, "ignored")
    assert (shown["base_model"], shown["source_format"]) == ("user/base", "r-lora")
    assert result.stderr == "" and "No initial delta is subtracted" in shown["warnings"][0]


def test_rlora_with_initial_values(rlora, source, tmp_path):
    initial = torch.load(source / "adapter_model.bin", weights_only=True)
    torch.save({name: tensor / 2 for name, tensor in initial.items()}, tmp_path / "initial.bin")
    words = ("--from", "r-lora", "--no-use-rslora", "--initial-values", tmp_path / "initial.bin")
    result = rlora("convert", source, tmp_path / "out", *words)
    assert result.exit_code == 0, result.stderr
    assert "that of the initial values, subtracted" in result.stdout and "lora_alpha / r\n" in result.stdout
    assert result.stderr == ""


def test_plain_lora_and_back(rlora, tmp_path, model_folders):
    base = AutoModelForCausalLM.from_pretrained(model_folders["llama"])
    model = get_peft_model(base, LoraConfig(target_modules=["up_proj"], task_type="CAUSAL_LM"))
    perturb(model)
    model.save_pretrained(tmp_path / "lora")
    result = rlora("convert", tmp_path / "lora", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "1 head of rank 8, router uniform" in result.stdout
    export = rlora("export", tmp_path / "out", tmp_path / "back", "--json")
    assert json.loads(export.stdout)["exact"] is True
    result = rlora("convert", tmp_path / "out", tmp_path / "again")
    assert result.exit_code == 1 and "An R-LoRA adapter needs no conversion" in result.stderr


def test_errors(rlora, source, tmp_path):
    result = rlora("convert", source, tmp_path / "out")
    assert result.exit_code == 1
    assert "Pass `--from hydralora` or `--from r-lora`." in result.stderr
    assert rlora("convert", source, tmp_path / "out", "--from", "mole").exit_code == 2
    result = rlora("convert", source, source, "--from", "hydralora")
    assert result.exit_code == 1 and "`OUTPUT` " in result.stderr and "is not an empty folder" in result.stderr
    result = rlora("convert", source, tmp_path / "out", "--from", "hydralora", "--use-rslora")
    assert "`--use-rslora` contradicts the source" in result.stderr


class Runs:
    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_code_in_a_pickle_is_not_run(rlora, source, tmp_path):
    bomb = Runs()
    bomb.path = tmp_path / "ran"
    torch.save({f"{PREFIX}.lora_A.weight": bomb, f"{PREFIX}.lora_route.weight": bomb}, source / "adapter_model.bin")
    result = rlora("convert", source, tmp_path / "out", "--from", "hydralora")
    assert result.exit_code == 1 and "Nothing was executed" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
