"""What happens in a step whose gradients are not finite."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import nn
from torch.nn.utils import get_total_norm


logger = get_logger(__name__)

NAN_POLICIES = ("stop", "skip", "ignore")
# More skipped steps in a row than this are no bad batch, but a run that has diverged.
MAX_SKIPPED_IN_A_ROW = 10


class NanGuard:
    """
    Looks at the gradients of each step before the optimizer does.

    All ranks decide alike: gradients are averaged over ranks before, or their norm is summed over them.

    Args:
        policy (`str`): `"stop"`: raise an error before any weight changes; `"skip"`: leave out the step; `"ignore"`.
        model (`torch.nn.Module`): What trains.

    Attributes:
        skipped (`int`): Steps left out so far.
    """

    def __init__(self, policy: str, model: nn.Module) -> None:
        self.policy = policy
        self.model = model
        self.skipped = 0
        self._in_a_row = 0

    def restart(self) -> None:
        """Forget the steps that were left out."""
        self.skipped = self._in_a_row = 0

    def look(self, step: int, *, skipped_by_engine: bool | None = None) -> bool:
        """
        Act on the gradients of a step, once they are complete.

        Args:
            step (`int`): Its number, for messages.
            skipped_by_engine (`bool`, *optional*): Whether DeepSpeed, which steps by itself, has left it out because
                its gradients were not finite.

        Returns:
            `bool`: Whether the step is left out.

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
        where = f" of {', '.join(names[:3])}{' and others' if len(names) > 3 else ''}" if names else ""
        if self.policy == "stop":
            raise FloatingPointError(
                f"The gradients{where} are not finite in step {step}; no weight has changed in it. The newest "
                "checkpoint is finite. Look for rows without labels or with extreme values, lower the learning rate "
                "or `lora_alpha`, or set `nan_policy='skip'` to leave such steps out."
            )
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row > MAX_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"The gradients{where} were not finite in {self._in_a_row} steps in a row, up to step {step}: the run "
                "has diverged. Resume from an earlier checkpoint with a lower learning rate."
            )
        logger.warning(f"Step {step} is left out: its gradients{where} are not finite (nan_policy='skip').")
        # Optimizers leave parameters without a gradient as they are: neither momentum nor weight decay moves them.
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
    """What this process has of a tensor (FSDP2)."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def check_deepspeed_settings(config: dict[str, Any], policy: str) -> None:
    """
    Refuse settings with which DeepSpeed would write NaN into the weights.

    DeepSpeed leaves steps out whose gradients are not finite; the trainer can't, as its engine steps by itself.

    Args:
        config (`dict`): The DeepSpeed configuration.
        policy (`str`): The `nan_policy`.

    Raises:
        ValueError: If the policy can't be kept.
    """
    if policy == "ignore":
        return
    zero = config.get("zero_optimization") or {}
    bf16 = config.get("bf16") or {}
    if not zero.get("stage") and not any((config.get(name) or {}).get("enabled") for name in ("bf16", "fp16")):
        raise ValueError(
            "DeepSpeed without ZeRO, in float32, does not notice gradients that are not finite, and "
            f"`nan_policy={policy!r}` can't be kept. Set `zero_optimization.stage`, or `nan_policy='ignore'`."
        )
    for section, settings, name in (
        ("bf16", bf16, "check_grad_overflow"),
        ("zero_optimization", zero, "compute_grad_norm"),
    ):
        if settings.get(name, True) is False:
            raise ValueError(
                f"`{section}.{name}` is false in the DeepSpeed configuration, with which it does not notice gradients "
                f"that are not finite, and `nan_policy={policy!r}` can't be kept. Remove it, or set "
                "`nan_policy='ignore'`."
            )
