"""What task routers need for all layers at once, as short steps wait for the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


# Elements of float32 to which a table is padded: kernels start at multiples of 16 bytes.
_ALIGNED = 4


class TaskTable(NamedTuple):
    """
    The logits that a task router `[K, N]` gives to tasks.

    Args:
        logits (`torch.Tensor` of shape `[K + 1, N]`): Its rows, and last the logits of the mean head weights.
        of_mean (`torch.Tensor` of shape `[L, K N, N]`), place (`int`): The derivatives of the last rows of many tables
            for their routers, and which are this one's.
        router (`torch.Tensor`), version (`int`): The source, and its version at that time.
    """

    logits: torch.Tensor
    of_mean: torch.Tensor
    place: int
    router: torch.Tensor
    version: int

    def holds_for(self, router: torch.Tensor) -> bool:
        """Whether this is the table of a router, unchanged."""
        return self.router is router and self.version == router._version


@torch.no_grad()
def task_tables(routers: Sequence[torch.Tensor]) -> list[TaskTable]:
    """
    The tables of task routers of one shape, dtype and device.

    Args:
        routers (`Sequence[torch.Tensor]` of shapes `[K, N]`): Parameters of the layers.

    Returns:
        `list[TaskTable]`: One for each, in float32 or wider. Gradients are up to the caller.
    """
    stack = torch.stack([router.detach() for router in routers])
    stack = stack.to(torch.promote_types(stack.dtype, torch.float32))  # [L, K, N]
    layers, tasks, heads = stack.shape
    p = stack.softmax(-1)
    mean = p.mean(1)  # [L, N]

    width = (tasks + 1) * heads
    padded = stack.new_empty(layers, width + -width % _ALIGNED)
    padded[:, : tasks * heads] = stack.flatten(1)
    padded[:, tasks * heads : width] = mean.log()
    logits = padded[:, :width].unflatten(1, (tasks + 1, heads))

    # d log(mean_k p_k)_i / d router_kj = p_kj (delta_ij - p_ki) / (K mean_i)
    eye = torch.eye(heads, dtype=p.dtype, device=p.device)
    of_mean = p.unsqueeze(-1) * (eye - p.unsqueeze(-2)) / (tasks * mean).view(layers, 1, 1, heads)
    of_mean = of_mean.flatten(1, 2)
    parts = enumerate(zip(logits.unbind(), routers, strict=True))
    return [TaskTable(rows, of_mean, place, router, router._version) for place, (rows, router) in parts]


def derivatives_of(tables: Sequence[TaskTable]) -> torch.Tensor:
    """The derivatives `[M, K N, N]` of the last rows of some tables: a view if they follow each other."""
    first = tables[0]
    if all(table.of_mean is first.of_mean and table.place == first.place + i for i, table in enumerate(tables)):
        return first.of_mean[first.place : first.place + len(tables)]
    return torch.stack([table.of_mean[table.place] for table in tables])
