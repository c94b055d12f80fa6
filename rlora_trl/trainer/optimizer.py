"""Separate learning rates for routers and heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..tuner import MultiHeadAdapter


def set_learning_rates(
    optimizer: torch.optim.Optimizer,
    adapters: Sequence[MultiHeadAdapter],
    *,
    learning_rate: float,
    router: float | None,
    heads_ratio: float | None,
) -> None:
    """
    Move routers and heads B of a new optimizer into parameter groups with their own learning rates.

    Call it before a scheduler reads the groups. Weight decay does not change.

    Args:
        optimizer (`torch.optim.Optimizer`): Has all trained parameters.
        adapters (`Sequence[MultiHeadAdapter]`): The adapters in training.
        learning_rate (`float`): Learning rate of all other parameters.
        router (`float`, *optional*): Learning rate of routers.
        heads_ratio (`float`, *optional*): Learning rate of heads as a multiple of `learning_rate` (LoRA+, arXiv
            2402.12354).

    Raises:
        ValueError: If the optimizer has no parameter groups that can be split.
    """
    # The parameters with their own rates.
    rates: dict[torch.Tensor, float] = {}
    for adapter in adapters:
        if router is not None and adapter.router is not None and adapter.router.requires_grad:
            rates[adapter.router] = router
        if heads_ratio is not None and adapter.B.requires_grad:
            rates[adapter.B] = learning_rate * heads_ratio
    present = {p for group in optimizer.param_groups for p in group["params"] if p in rates}
    if len(present) != len(rates):
        raise ValueError(
            f"`router_learning_rate` and `loraplus_lr_ratio` need an optimizer with parameter groups, and "
            f"{type(optimizer).__name__} has {len(present)} of {len(rates)} parameters in them. Choose another "
            "`optim`."
        )

    # New groups, with the other options of the old ones.
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if p in rates]
        group["params"] = [p for p in group["params"] if p not in rates]
        options = {name: value for name, value in group.items() if name != "params"}
        for rate in sorted({rates[p] for p in moved}):
            members = [p for p in moved if rates[p] == rate]
            optimizer.add_param_group({**options, "params": members, "lr": rate})

    # The learning rate of the first group is logged: `learning_rate`, unless that group is empty.
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
