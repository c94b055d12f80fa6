"""The policy for steps with gradients that contain NaN or Inf."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import nn
from torch.nn.utils import get_total_norm

from ..reading import first_few


logger = get_logger(__name__)

NAN_POLICIES = ("stop", "skip", "ignore")
# With more skipped steps in a row, the run has diverged.
MAX_SKIPPED_IN_A_ROW = 10


class NanGuard:
    """
    Checks the gradients of each step before the optimizer uses them.

    All ranks take the same decision: gradients were averaged over ranks, or their norm is summed over ranks.

    Args:
        policy (`str`): `"stop"` raises an error before any weight changes, `"skip"` skips the step, `"ignore"` checks
            nothing.
        model (`torch.nn.Module`): The model in training.

    Attributes:
        skipped (`int`): Number of skipped steps.
    """

    def __init__(self, policy: str, model: nn.Module) -> None:
        self.policy = policy
        self.model = model
        self.skipped = 0
        self._in_a_row = 0

    def restart(self) -> None:
        """Reset the number of skipped steps."""
        self.skipped = self._in_a_row = 0

    def look(self, step: int, *, skipped_by_engine: bool | None = None) -> bool:
        """
        Apply the policy to the gradients of a step, once they are complete.

        Args:
            step (`int`): Number of the step, for messages.
            skipped_by_engine (`bool`, *optional*): With DeepSpeed, whether its engine skipped the step because of
                gradients that are not finite.

        Returns:
            `bool`: Whether the step is skipped.

        Raises:
            FloatingPointError: If gradients are not finite and the policy is to stop, or too many steps were skipped.
        """
        if self.policy == "ignore":
            return False
        bad = not self._is_finite() if skipped_by_engine is None else skipped_by_engine
        if not bad:
            self._in_a_row = 0
            return False

        names = [name for name, grad in self._gradients() if not bool(torch.isfinite(_local(grad)).all())]
        where = f" of {first_few(names)}" if names else ""
        if self.policy == "stop":
            raise FloatingPointError(
                f"The gradients{where} are not finite in step {step}; no weight has changed in it. The newest "
                "checkpoint is finite. Look for rows without labels or with extreme values, lower the learning rate "
                "or `lora_alpha`, or set `nan_policy='skip'` to skip such steps."
            )

        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row > MAX_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"The gradients{where} were not finite in {self._in_a_row} steps in a row, up to step {step}: the run "
                "has diverged. Resume from an earlier checkpoint with a lower learning rate."
            )
        logger.warning(f"Step {step} is skipped: its gradients{where} are not finite (nan_policy='skip').")
        # Optimizers skip parameters without a gradient: neither momentum nor weight decay moves them.
        self.model.zero_grad(set_to_none=True)
        return True

    def _gradients(self) -> Iterable[tuple[str, torch.Tensor]]:
        return ((name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None)

    def _is_finite(self) -> bool:
        gradients = [grad for _, grad in self._gradients()]
        if not gradients:
            return True
        norm = get_total_norm(gradients)
        return bool(torch.isfinite(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds (FSDP2)."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def check_deepspeed_settings(config: dict[str, Any], policy: str) -> None:
    """
    Refuse settings with which DeepSpeed would write NaN into the weights.

    DeepSpeed's engine updates the weights, so the engine must detect gradients that are not finite.

    Args:
        config (`dict`): The DeepSpeed configuration.
        policy (`str`): The `nan_policy`.

    Raises:
        ValueError: If the engine would not apply the policy.
    """
    if policy == "ignore":
        return
    zero = config.get("zero_optimization") or {}
    bf16 = config.get("bf16") or {}
    if not zero.get("stage") and not any((config.get(name) or {}).get("enabled") for name in ("bf16", "fp16")):
        raise ValueError(
            f"`nan_policy={policy!r}` has no effect with DeepSpeed without ZeRO in float32, which does not check "
            "whether gradients are finite. Set `zero_optimization.stage`, or `nan_policy='ignore'`."
        )
    for section, settings, name in (
        ("bf16", bf16, "check_grad_overflow"),
        ("zero_optimization", zero, "compute_grad_norm"),
    ):
        if settings.get(name, True) is False:
            raise ValueError(
                f"`nan_policy={policy!r}` has no effect: `{section}.{name}` is false in the DeepSpeed configuration, "
                "which turns off the check of gradients. Remove it, or set `nan_policy='ignore'`."
            )
