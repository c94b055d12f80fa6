"""Learning rates of their own for routers and heads."""

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
    Move routers and heads B into parameter groups with learning rates of their own.

    For a fresh optimizer, before a scheduler takes note of its groups. Weight decay stays as it was.

    Args:
        optimizer (`torch.optim.Optimizer`): Has all that trains.
        adapters (`Sequence[MultiHeadAdapter]`): The adapters in training.
        learning_rate (`float`): That of all other parameters.
        router (`float`, *optional*): That of routers.
        heads_ratio (`float`, *optional*): That of heads, as a multiple of `learning_rate` (LoRA+, arXiv 2402.12354).

    Raises:
        ValueError: If the optimizer does not keep its parameters in groups that can be split.
    """
    rates: dict[torch.Tensor, float] = {}
    for adapter in adapters:
        if router is not None and adapter.router is not None and adapter.router.requires_grad:
            rates[adapter.router] = router
        if heads_ratio is not None and adapter.B.requires_grad:
            rates[adapter.B] = learning_rate * heads_ratio
    found = {p for group in optimizer.param_groups for p in group["params"] if p in rates}
    if len(found) != len(rates):
        raise ValueError(
            f"`router_learning_rate` and `loraplus_lr_ratio` need an optimizer with parameter groups, and "
            f"{type(optimizer).__name__} has {len(found)} of {len(rates)} parameters in them. Choose another `optim`."
        )
    for group in list(optimizer.param_groups):
        own = [p for p in group["params"] if p in rates]
        group["params"] = [p for p in group["params"] if p not in rates]
        options = {name: value for name, value in group.items() if name != "params"}
        for rate in sorted({rates[p] for p in own}):
            members = [p for p in own if rates[p] == rate]
            optimizer.add_param_group({**options, "params": members, "lr": rate})
    # Of the first group the learning rate is logged: it is kept, and that of all others, if it trains anything at all.
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
