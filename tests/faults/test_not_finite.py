"""How `nan_policy` handles a step whose loss or gradients are not finite, on one process and on two."""

import math

import pytest
import torch
from runs import run
from safetensors.torch import load_file


pytestmark = pytest.mark.slow

STRATEGIES = ("single", "ddp", "zero2", "zero3", "fsdp2")
# Two micro-batches a step, and an optimizer that moves weights without a gradient by its momentum.
ARGUMENTS = {"gradient_accumulation_steps": 2, "save_strategy": "no", "optim": "adamw_torch", "weight_decay": 0.1}


def fault(what, value, step, strategy, **rest):
    """On the second rank alone where there are two."""
    return {"what": what, "value": value, "step": step, "rank": 0 if strategy == "single" else 1, **rest}


def train(server, model, folder, strategy, policy, faults, steps, scale=None, **arguments):
    """The outcome of a run on each rank."""
    arguments = {**ARGUMENTS, "nan_policy": policy, "max_steps": steps, **arguments}
    settings = {"model": model, "strategy": strategy, "arguments": arguments, "faults": faults, "save": True}
    if scale is not None:
        settings["scale"] = scale
    return run(server, "train_ranks", folder, settings, ranks=1 if strategy == "single" else 2)


def assert_finite(path):
    for name, tensor in load_file(path / "out" / "adapter_model.safetensors").items():
        assert bool(torch.isfinite(tensor).all()), name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_skip_changes_nothing(server, model_folders, tmp_path, strategy):
    faults = [fault("loss", "nan", 3, strategy), fault("gradient", "inf", 5, strategy, **{"pass": 2})]
    if strategy == "fsdp2":
        # What only one rank has of the gradients.
        faults[1] = fault("element", "nan", 5, strategy, **{"pass": 2})
    ranks = train(server, model_folders["llama"], tmp_path, strategy, "skip", faults, 6)
    for outcome in ranks:
        assert outcome["error"] is None and outcome["save_error"] is None
        weights = outcome["weights"]
        assert weights["3"] == weights["2"] and weights["5"] == weights["4"]
        assert len(set(weights.values())) == 5, "the other steps change them"
        assert all(outcome["finite"].values())
        assert weights == ranks[0]["weights"]
        logs = {entry["step"]: entry for entry in outcome["logs"] if "loss" in entry}
        assert [logs[step].get("skipped_steps") for step in range(1, 7)] == [None, None, 1, 1, 2, 2]
        # Nor are the logs of later steps.
        for name, value in logs[6].items():
            assert math.isfinite(value), name
    assert_finite(tmp_path)


@pytest.mark.parametrize(("what", "strategy"), [("loss", "single"), *(("gradient", name) for name in STRATEGIES)])
def test_stop_before_weights_change(server, model_folders, tmp_path, strategy, what):
    faults = [fault(what, "nan" if what == "loss" else "inf", 2, strategy)]
    for outcome in train(server, model_folders["llama"], tmp_path, strategy, "stop", faults, 3):
        kind, _, text = outcome["error"]
        assert kind == "FloatingPointError" and "step 2" in text and "nan_policy" in text, text
        assert (
            list(outcome["weights"]) == ["0", "1"]
            and outcome["at_end"] == outcome["weights"]["1"] != outcome["weights"]["0"]
        )
        assert outcome["save_error"] is None
    assert_finite(tmp_path)


@pytest.mark.parametrize("strategy", ["single", "zero2", "fsdp2"])
def test_ignored_weights_are_not_saved(server, model_folders, tmp_path, strategy):
    """With `"ignore"` a run spoils its weights, and the adapter saved before stays; DeepSpeed skips the step."""
    faults = [fault("loss", "nan", 3, strategy)]
    saves = {"save_strategy": "steps", "save_steps": 2}
    ranks = train(server, model_folders["llama"], tmp_path, strategy, "ignore", faults, 4, **saves)
    for outcome in ranks:
        if strategy.startswith("zero"):
            assert outcome["error"] is None and outcome["save_error"] is None and outcome["finite"]["4"]
            assert outcome["weights"]["3"] == outcome["weights"]["2"]
            continue
        assert outcome["finite"] == {"0": True, "1": True, "2": True, "3": False, "4": False}
    first = ranks[0]
    if not strategy.startswith("zero"):
        kind, _, text = first["error"]
        assert kind == "RuntimeError" and "holds NaN or infinity" in text, text
        assert not (tmp_path / "out" / "checkpoint-4").exists()
        assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} >= {"checkpoint-2"}


def test_skipping_ends(server, model_folders, tmp_path):
    """A run that skips every step ends with an error."""
    faults = [fault("loss", "nan", step, "single") for step in range(2, 20)]
    (outcome,) = train(server, model_folders["llama"], tmp_path, "single", "skip", faults, 20)
    kind, _, text = outcome["error"]
    assert kind == "FloatingPointError" and "in a row" in text, text
    assert outcome["at_end"] == outcome["weights"]["1"] and len(outcome["weights"]) == 2 + 10
    assert_finite(tmp_path)


def test_gradient_scaler_is_left_alone(server, model_folders, tmp_path):
    """With a scaler (fp16) gradients that are not finite are usual: the scaler skips the step."""
    faults = [fault("gradient", "inf", 2, "single")]
    rest = {"scale": 8.0, "max_grad_norm": 0.0}
    (outcome,) = train(server, model_folders["llama"], tmp_path, "single", "stop", faults, 3, **rest)
    assert outcome["error"] is None and outcome["scale"] == 4.0
    assert outcome["weights"]["2"] == outcome["weights"]["1"] != outcome["weights"]["3"]
    assert_finite(tmp_path)
