"""What `nan_policy` refuses; tests/faults/test_not_finite.py has what it does."""

import pytest
import torch

from rlora_trl import RLoraSFTConfig
from rlora_trl.trainer.nan_policy import MAX_SKIPPED_IN_A_ROW, NanGuard, check_deepspeed_settings


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True, "check_grad_overflow": False}},
            "bf16.check_gr",
        ),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "zero_optimization.compute_grad_norm"),
        ({"zero_optimization": {"stage": 0}}, "without ZeRO in float32"),
    ],
)
def test_settings_with_which_nan_would_pass(config, message):
    for policy in ("stop", "skip"):
        with pytest.raises(ValueError, match=message):
            check_deepspeed_settings(config, policy)
    check_deepspeed_settings(config, "ignore")


@pytest.mark.parametrize(
    "config",
    [{"zero_optimization": {"stage": 3}}, {"bf16": {"enabled": True}}, {"fp16": {"enabled": True}}],
)
def test_settings_that_are_safe(config):
    check_deepspeed_settings(config, "stop")


def test_the_name_of_a_policy_is_checked(tmp_path):
    with pytest.raises(ValueError, match="`nan_policy` must be one of 'stop', 'skip', 'ignore', got 'halt'"):
        RLoraSFTConfig(str(tmp_path), bf16=False, nan_policy="halt")


def test_a_row_of_skipped_steps_ends_with_a_good_one():
    layer = torch.nn.Linear(2, 1)
    guard = NanGuard("skip", layer)
    for step in range(3 * MAX_SKIPPED_IN_A_ROW):
        good = step % MAX_SKIPPED_IN_A_ROW == 0
        layer(torch.full((1, 2), 1.0 if good else float("nan"))).sum().backward()
        assert guard.look(step) is not good
        assert (layer.weight.grad is not None) == good
        layer.zero_grad()
    assert guard.skipped == 3 * (MAX_SKIPPED_IN_A_ROW - 1)
