"""A step whose loss or gradients are not finite: what `nan_policy` makes of it, on one process and on two."""

import math

import pytest
import torch
from safetensors.torch import load_file


pytestmark = pytest.mark.slow

STRATEGIES = ("single", "ddp", "zero2", "zero3", "fsdp2")
# Two micro-batches a step, and an optimizer that moves weights without a gradient by its momentum.
ARGUMENTS = {"gradient_accumulation_steps": 2, "save_strategy": "no", "optim": "adamw_torch", "weight_decay": 0.1}


def fault(what, value, step, strategy, **rest):
    """On the second rank alone where there are two."""
    return {"what": what, "value": value, "step": step, "rank": 0 if strategy == "single" else 1, **rest}


def run(server, model, folder, strategy, policy, faults, steps, scale=None, **arguments):
    """What each rank told of a run."""
    arguments = {**ARGUMENTS, "nan_policy": policy, "max_steps": steps, **arguments}
    given = {"model": model, "strategy": strategy, "arguments": arguments, "faults": faults, "save": True}
    if scale is not None:
        given["scale"] = scale
    processes = 1 if strategy == "single" else 2
    ranks = server.run("train_ranks", folder, given, processes=processes)
    return [ranks] if processes == 1 else ranks


def assert_finite(path):
    for name, tensor in load_file(path / "out" / "adapter_model.safetensors").items():
        assert bool(torch.isfinite(tensor).all()), name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_skip_changes_nothing(server, model_folders, tmp_path, strategy):
    faults = [fault("loss", "nan", 3, strategy), fault("gradient", "inf", 5, strategy, **{"pass": 2})]
    if strategy == "fsdp2":
        # What only one rank has of the gradients.
        faults[1] = fault("element", "nan", 5, strategy, **{"pass": 2})
    ranks = run(server, model_folders["llama"], tmp_path, strategy, "skip", faults, 6)
    for told in ranks:
        assert told["error"] is None and told["save_error"] is None
        weights = told["weights"]
        assert weights["3"] == weights["2"] and weights["5"] == weights["4"]
        assert len(set(weights.values())) == 5, "the other steps change them"
        assert all(told["finite"].values())
        assert weights == ranks[0]["weights"]
        logs = {entry["step"]: entry for entry in told["logs"] if "loss" in entry}
        assert [logs[step].get("skipped_steps") for step in range(1, 7)] == [None, None, 1, 1, 2, 2]
        # Nor is what is told of later steps.
        for name, value in logs[6].items():
            assert math.isfinite(value), name
    assert_finite(tmp_path)


@pytest.mark.parametrize(("what", "strategy"), [("loss", "single"), *(("gradient", name) for name in STRATEGIES)])
def test_stop_before_weights_change(server, model_folders, tmp_path, strategy, what):
    faults = [fault(what, "nan" if what == "loss" else "inf", 2, strategy)]
    for told in run(server, model_folders["llama"], tmp_path, strategy, "stop", faults, 3):
        kind, _, text = told["error"]
        assert kind == "FloatingPointError" and "step 2" in text and "nan_policy" in text, text
        assert list(told["weights"]) == ["0", "1"] and told["at_end"] == told["weights"]["1"] != told["weights"]["0"]
        assert told["save_error"] is None
    assert_finite(tmp_path)


@pytest.mark.parametrize("strategy", ["single", "zero2", "fsdp2"])
def test_ignored_weights_are_not_saved(server, model_folders, tmp_path, strategy):
    """Left to itself a run spoils its weights, and the adapter that was saved before stays; DeepSpeed never does."""
    faults = [fault("loss", "nan", 3, strategy)]
    saves = {"save_strategy": "steps", "save_steps": 2}
    ranks = run(server, model_folders["llama"], tmp_path, strategy, "ignore", faults, 4, **saves)
    for told in ranks:
        if strategy.startswith("zero"):
            assert told["error"] is None and told["save_error"] is None and told["finite"]["4"]
            assert told["weights"]["3"] == told["weights"]["2"]
            continue
        assert told["finite"] == {"0": True, "1": True, "2": True, "3": False, "4": False}
    first = ranks[0]
    if not strategy.startswith("zero"):
        kind, _, text = first["error"]
        assert kind == "RuntimeError" and "holds NaN or infinity" in text, text
        assert not (tmp_path / "out" / "checkpoint-4").exists()
        assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} >= {"checkpoint-2"}


def test_skipping_ends(server, model_folders, tmp_path):
    """A run of which no step is left does not go on as if it trained."""
    faults = [fault("loss", "nan", step, "single") for step in range(2, 20)]
    (told,) = run(server, model_folders["llama"], tmp_path, "single", "skip", faults, 20)
    kind, _, text = told["error"]
    assert kind == "FloatingPointError" and "in a row" in text, text
    assert told["at_end"] == told["weights"]["1"] and len(told["weights"]) == 2 + 10
    assert_finite(tmp_path)


def test_gradient_scaler_is_left_alone(server, model_folders, tmp_path):
    """With a scaler (fp16) gradients that are not finite are a matter of course: it leaves the step out itself."""
    faults = [fault("gradient", "inf", 2, "single")]
    rest = {"scale": 8.0, "max_grad_norm": 0.0}
    (told,) = run(server, model_folders["llama"], tmp_path, "single", "stop", faults, 3, **rest)
    assert told["error"] is None and told["scale"] == 4.0
    assert told["weights"]["2"] == told["weights"]["1"] != told["weights"]["3"]
    assert_finite(tmp_path)
