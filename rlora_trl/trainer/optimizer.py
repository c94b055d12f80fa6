"""Separate learning rates for routers and heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.logging import get_logger

from ..tuner import MultiHeadAdapter
from .config import RLoraSFTConfig


logger = get_logger(__name__)

# Learning rate of task routers that are given none. AdamW moves a number by about its learning rate a step: at that of
# A and B, logits that start at zero would stay there for hundreds of steps, and head weights at 1/N.
TASK_ROUTER_RATE = 0.05


def task_router_rate(args: RLoraSFTConfig, adapters: Sequence[MultiHeadAdapter]) -> float | None:
    """
    The learning rate of task routers that the configuration does not give; `None` if it does, or none is trained.

    Args:
        args ([`RLoraSFTConfig`]): The configuration.
        adapters (`Sequence[MultiHeadAdapter]`): The adapters in training.
    """
    routed = any(adapter.router_kind == "task" and _is_trained(adapter.router) for adapter in adapters)
    if args.router_learning_rate is not None or not routed:
        return None
    return max(TASK_ROUTER_RATE, args.learning_rate)


def _is_trained(parameter: torch.nn.Parameter | None) -> bool:
    return parameter is not None and parameter.requires_grad


def set_learning_rates(
    optimizer: torch.optim.Optimizer, adapters: Sequence[MultiHeadAdapter], args: RLoraSFTConfig
) -> float | None:
    """
    Move routers and heads B of a new optimizer into parameter groups with their own learning rates.

    Call it before a scheduler reads the groups. Weight decay does not change.

    Args:
        optimizer (`torch.optim.Optimizer`): Has all trained parameters.
        adapters (`Sequence[MultiHeadAdapter]`): The adapters in training.
        args ([`RLoraSFTConfig`]): Has the rates: `router_learning_rate`, or without it that of task routers
            ([`task_router_rate`]); and `loraplus_lr_ratio` (LoRA+, arXiv 2402.12354).

    Returns:
        `float`, *optional*: The rate of task routers, if the configuration does not give it and they have it.

    Raises:
        ValueError: If the configuration sets one of these, and the optimizer has no parameter groups that can be
            split.
    """
    # The parameters with their own rates.
    rates: dict[torch.Tensor, float] = {}
    of_tasks = task_router_rate(args, adapters)
    for adapter in adapters:
        rate = of_tasks if of_tasks is not None and adapter.router_kind == "task" else args.router_learning_rate
        if rate is not None and adapter.router is not None and _is_trained(adapter.router):
            rates[adapter.router] = rate
        if args.loraplus_lr_ratio is not None and adapter.B.requires_grad:
            rates[adapter.B] = args.learning_rate * args.loraplus_lr_ratio

    if not rates:  # a checkpoint of such a run has the groups that the optimizer made
        return None
    present = {p for group in optimizer.param_groups for p in group["params"] if p in rates}
    if len(present) != len(rates):
        _refuse_or_warn(args, f"{type(optimizer).__name__} has {len(present)} of {len(rates)} parameters in them")
        return None
    _split_groups(optimizer, rates)
    return of_tasks


def check_deepspeed_optimizer(
    config: dict[str, Any], args: RLoraSFTConfig, adapters: Sequence[MultiHeadAdapter]
) -> None:
    """
    Refuse learning rates of parameter groups for an optimizer of the engine, which has one group.

    Args:
        config (`dict`): The DeepSpeed configuration.
        args ([`RLoraSFTConfig`]): Configuration of the run.
        adapters (`Sequence[MultiHeadAdapter]`): The adapters in training.

    Raises:
        ValueError: If both are there.
    """
    if "optimizer" in config and (_asks_for_rates(args) or task_router_rate(args, adapters) is not None):
        _refuse_or_warn(args, "the DeepSpeed configuration has an `optimizer`, which has one group")


def _asks_for_rates(args: RLoraSFTConfig) -> bool:
    return args.router_learning_rate is not None or args.loraplus_lr_ratio is not None


def _refuse_or_warn(args: RLoraSFTConfig, found: str) -> None:
    """What was asked for must be done; a default that can't be is told of."""
    if _asks_for_rates(args):
        raise ValueError(
            f"`router_learning_rate` and `loraplus_lr_ratio` need an optimizer with parameter groups, and {found}. "
            "Set `optim` to one that has them, and remove that of a DeepSpeed configuration."
        )
    logger.warning(
        f"Routers by task train at `learning_rate`, {args.learning_rate:g}, instead of {TASK_ROUTER_RATE:g}: a rate "
        f"of their own needs an optimizer with parameter groups, and {found}. Head weights may stay nearly equal for "
        "all tasks. Set `optim` to one that has them, and remove that of a DeepSpeed configuration."
    )


def _split_groups(optimizer: torch.optim.Optimizer, rates: dict[torch.Tensor, float]) -> None:
    """New groups, with the other options of the old ones."""
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if p in rates]
        group["params"] = [p for p in group["params"] if p not in rates]
        options = {name: value for name, value in group.items() if name != "params"}
        for rate in sorted({rates[p] for p in moved}):
            members = [p for p in moved if rates[p] == rate]
            optimizer.add_param_group({**options, "params": members, "lr": rate})

    # The learning rate of the first group is logged: `learning_rate`, unless that group is empty.
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
