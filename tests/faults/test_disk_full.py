"""A save that finds no space says so, and what was saved before is as it was."""

import errno

import pytest
from losses import losses_in


pytestmark = pytest.mark.slow

ARGUMENTS = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
# Of what a checkpoint needs: from none to nearly enough, so that the adapter, the optimizer and others fail in turn.
PARTS = {"disk": [0.0, 0.3, 0.55, 0.7, 0.9], "limit": [0.0, 0.5, 0.9]}


@pytest.mark.parametrize("how", ["disk", "limit"])
def test_no_space_left(server, model_folders, tmp_path, how):
    given = {"model": model_folders["llama"], "arguments": ARGUMENTS}
    parts = PARTS[how]
    told = server.run("run_out_of_space", tmp_path / "full", {**given, "how": how, "parts": parts})
    if "impossible" in told:
        pytest.skip(f"no disk of its own: {told['impossible']}")
    assert len(told["checkpoints"]) == len(told["models"]) == len(parts)
    for part, error in zip(parts, told["checkpoints"], strict=True):
        assert error is not None, f"a checkpoint was saved with {part} of the space"
    for kind, number, text in [*told["checkpoints"], *filter(None, told["models"])]:
        assert kind == "OSError" and number == errno.ENOSPC, text
        assert "no space left" in text and "save_total_limit" in text, text
    # Not every file of a checkpoint belongs to the adapter.
    assert told["models"][0] is not None

    whole = server.run("train", tmp_path / "whole", {**given, "arguments": {**ARGUMENTS, "max_steps": 6}})
    assert whole == {}
    expected = dict(losses_in(tmp_path / "whole"))
    found = losses_in(tmp_path / "full")
    assert {step for step, _ in found} == set(range(1, 7)) and len(found) == 2 + 2 * len(parts) + 4
    for step, loss in found:
        assert loss == pytest.approx(expected[step], rel=1e-6), step
