"""The logits of task routers for all layers at once, as short steps wait for the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable


class _TaskTables(torch.autograd.Function):
    """
    For each router `[K, N]` its rows, and last the logits of the mean head weights over tasks, `[K + 1, N]`.

    Nothing is saved for backward that autograd would free: with reentrant checkpointing, and with several backward
    passes after one forward pass, the gradients of some layers arrive at a time.
    """

    @staticmethod
    def forward(ctx: Any, *routers: torch.Tensor) -> tuple[torch.Tensor, ...]:
        stack = torch.stack(routers)
        stack = stack.to(torch.promote_types(stack.dtype, torch.float32))  # [L, K, N]
        ctx.stack, ctx.dtype = stack, routers[0].dtype
        ctx.set_materialize_grads(False)
        mean = stack.softmax(-1).mean(1, keepdim=True).log()  # [L, 1, N]
        return torch.cat([stack, mean], 1).unbind()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        present = [place for place, grad in enumerate(grads) if grad is not None]
        if not present:
            return grads
        stack = ctx.stack if len(present) == len(grads) else ctx.stack[present]
        of_tables = torch.stack([grad.to(stack.dtype) for grad in grads if grad is not None])  # [l, K + 1, N]

        # Through the logarithm and the mean of the softmax.
        p = stack.softmax(-1)
        of_p = of_tables[:, -1:] / (p.mean(1, keepdim=True) * p.shape[1])  # [l, 1, N]
        of_routers = of_tables[:, :-1] + p * (of_p - (p * of_p).sum(-1, keepdim=True))

        result: list[torch.Tensor | None] = [None] * len(grads)
        for place, grad in zip(present, of_routers.to(ctx.dtype).unbind(), strict=True):
            result[place] = grad
        return tuple(result)


def task_tables(routers: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """
    Logits of the heads for each of the K tasks of task routers, and last those of the mean over tasks.

    Args:
        routers (`Sequence[torch.Tensor]` of shapes `[K, N]`): Parameters of the layers.

    Returns:
        `tuple[torch.Tensor, ...]`: One for each router, `[K + 1, N]`, in float32 or wider.
    """
    tables: tuple[torch.Tensor, ...] = _TaskTables.apply(*routers)
    return tables
