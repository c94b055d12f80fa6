"""`rlora estimate`: the parts for one strategy, a table of all, JSON."""

import json

import pytest

from rlora_trl import RLoraConfig
from rlora_trl.estimate import CUDA_CONTEXT, STRATEGIES, estimate_memory


SMALL = ("--per_device_train_batch_size", 2, "--max-length", 32)


def test_json_is_the_estimate(rlora, model_folders):
    words = (
        "--strategy",
        "zero2",
        "--num_gpus",
        2,
        "--r",
        2,
        "--num_heads",
        4,
        "--target_modules",
        "up_proj,down_proj",
    )
    more = ("--dtype", "float32", "--no-gradient-checkpointing", "--json")
    result = rlora("estimate", model_folders["llama"], *words, *SMALL, *more)
    assert result.exit_code == 0, result.stderr
    expected = estimate_memory(
        model_folders["llama"],
        RLoraConfig(r=2, num_heads=4, target_modules=["up_proj", "down_proj"], task_type="CAUSAL_LM"),
        strategy="zero2",
        num_gpus=2,
        dtype="float32",
        per_device_train_batch_size=2,
        max_length=32,
        gradient_checkpointing=False,
    )
    assert json.loads(result.stdout) == {**expected.to_dict(), "cuda_context": CUDA_CONTEXT, "fits": None}


def test_facts_of_one_strategy(rlora, model_folders):
    # A file is enough, and other rows of the folder are not read.
    result = rlora(
        "estimate", f"{model_folders['llama64']}/config.json", "--strategy", "single", "--load_in_4bit", *SMALL
    )
    assert result.exit_code == 0, result.stderr
    lines = dict(line.split("  ", 1) for line in result.stdout.splitlines())
    assert lines["Strategy"].strip() == "single, 1 GPU" and "Fits" not in lines and "Host" not in lines
    for name in ("Base weights", "Adapter", "Gradients", "Optimizer", "Activations", "Loss", "Buffers", "Total"):
        assert lines[name].strip().partition(" ")[2].startswith("GiB")


@pytest.mark.parametrize(("gpus", "names"), [(1, ["single", "zero3-offload"]), (4, list(STRATEGIES[1:]))])
def test_a_table_of_strategies(rlora, model_folders, gpus, names):
    for memory, fits in ((80, "yes"), (0.5, "no"), (0.51, "barely")):
        words = ("--num-gpus", gpus, "--gpu-memory", memory, "--double-quant", "--load-in-8bit")
        result = rlora("estimate", model_folders["llama"], *words, *SMALL)
        assert result.exit_code == 0, result.stderr
        heading, *rows, note = result.stdout.splitlines()
        assert heading.split()[-3:] == ["total", "host", "fits"] and "GiB on each GPU" in note
        assert [row.split()[0] for row in rows] == names and {row.split()[-1] for row in rows} == {fits}


def test_errors(rlora, model_folders, tmp_path):
    result = rlora("estimate", model_folders["llama"], "--strategy", "single", "--num-gpus", 2)
    assert result.exit_code == 1 and "`--strategy single` is for one GPU, got `--num-gpus 2`" in result.stderr
    result = rlora("estimate", model_folders["llama"], "--strategy", "zero4")
    assert result.exit_code == 2
    result = rlora("estimate", tmp_path)
    assert result.exit_code == 1 and result.stdout == ""


def test_a_path_without_a_model(rlora):
    result = rlora("estimate", "./nothing")
    assert result.exit_code == 1 and "There is no model in ./nothing. Give the folder or" in result.stderr
