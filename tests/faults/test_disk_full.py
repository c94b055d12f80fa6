"""A save on a full disk raises a clear error, and earlier saves are unchanged."""

import errno

import pytest
from runs import losses_in, run


pytestmark = pytest.mark.slow

ARGUMENTS = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
# Of what a checkpoint needs: from none to nearly enough, so that the adapter, the optimizer and others fail in turn.
PARTS = {"disk": [0.0, 0.3, 0.55, 0.7, 0.9], "limit": [0.0, 0.5, 0.9]}


@pytest.mark.parametrize("how", ["disk", "limit"])
def test_no_space_left(server, model_folders, tmp_path, how):
    settings = {"model": model_folders["llama"], "arguments": ARGUMENTS}
    parts = PARTS[how]
    (outcome,) = run(server, "run_out_of_space", tmp_path / "full", {**settings, "how": how, "parts": parts})
    if "impossible" in outcome:
        pytest.skip(f"no separate disk: {outcome['impossible']}")
    assert len(outcome["checkpoints"]) == len(outcome["models"]) == len(parts)
    for part, error in zip(parts, outcome["checkpoints"], strict=True):
        assert error is not None, f"a checkpoint was saved with {part} of the space"
    for kind, number, text in [*outcome["checkpoints"], *filter(None, outcome["models"])]:
        assert kind == "OSError" and number == errno.ENOSPC, text
        assert "no space left" in text and "save_total_limit" in text, text
    # Not every file of a checkpoint belongs to the adapter.
    assert outcome["models"][0] is not None

    # The losses are those of a run that had space.
    run(server, "train", tmp_path / "whole", {**settings, "arguments": {**ARGUMENTS, "max_steps": 6}})
    expected = dict(losses_in(tmp_path / "whole"))
    losses = losses_in(tmp_path / "full")
    assert {step for step, _ in losses} == set(range(1, 7)) and len(losses) == 2 + 2 * len(parts) + 4
    for step, loss in losses:
        assert loss == pytest.approx(expected[step], rel=1e-6), step
