"""What a group of layers computes besides its base products, in plain torch: twins of the launchers in `joint_ops.py`.

The layers of a group get the same input x `[T, d_in]` and have the same layout. Member j of M has rows j K to
(j + 1) K of `downs` `[M K, d_in]`, and those columns of P and dP `[T, M K]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import rank_space
from .rank_space import Layout


class GroupSizes:
    """
    Sizes and settings of a group of layers with the same input.

    Args:
        d_in (`int`), d_outs (`Sequence[int]`): Sizes of the layers.
        k (`int`), z (`int`): Columns of P and Z of each, with padding.
        layout ([`Layout`]): The columns of P and Z of each.
        scaling (`float`): Factor of the deltas.
        dtype (`torch.dtype`): Of the products.

    Attributes:
        plan (`Any`): For a back end to keep what it derives from these.
    """

    __slots__ = ("count", "d_in", "d_outs", "dtype", "k", "layout", "plan", "scaling", "z")

    def __init__(
        self, d_in: int, d_outs: Sequence[int], k: int, z: int, layout: Layout, scaling: float, dtype: torch.dtype
    ) -> None:
        self.d_in, self.d_outs, self.k, self.z = d_in, tuple(d_outs), k, z
        self.layout, self.scaling, self.dtype = layout, scaling, dtype
        self.count = len(self.d_outs)
        self.plan: Any = None


class CallSettings:
    """
    What changes with each call of a group, besides its tensors.

    Args:
        dropout (`float`, *optional*, defaults to `0.0`): Probability that an element is dropped.
        seeds (`Sequence[int]`, *optional*): Seed of the masks of each member.
        tables (`Sequence[torch.Tensor]` of shapes `[rows, N]`, *optional*): Logits in place of the routers'.
        tasks (`torch.Tensor` of shape `[T]`, *optional*): The row of each token in the tables; -1 is the last one.
            Without it the first row holds for all tokens.
        one_hot (`torch.Tensor` of shape `[T, rows]`, *optional*): The same in the dtype of the products, for the
            gradients of the tables. Without it all tokens have the task `row`.
        row (`int`, *optional*, defaults to `-1`): That task; -1 for the mean over tasks.
        of_mean (`torch.Tensor` of shape `[M, K N, N]`, *optional*): The derivatives of the last row of each table, the
            mean over tasks, for the router `[K, N]`.
        token_mask (`torch.Tensor` of shape `[T]`, *optional*): Non-zero for the tokens that count in statistics.

    Attributes:
        mask_numbers (`Any`): For a back end to keep what it derives from the dropout and the seeds.
    """

    __slots__ = ("dropout", "mask_numbers", "of_mean", "one_hot", "row", "seeds", "tables", "tasks", "token_mask")

    def __init__(
        self,
        dropout: float = 0.0,
        seeds: Sequence[int] = (),
        tables: Sequence[torch.Tensor] = (),
        tasks: torch.Tensor | None = None,
        one_hot: torch.Tensor | None = None,
        row: int = -1,
        of_mean: torch.Tensor | None = None,
        token_mask: torch.Tensor | None = None,
    ) -> None:
        self.dropout, self.seeds = (dropout, seeds) if seeds else (0.0, ())
        self.tables, self.tasks, self.token_mask = tables, tasks, token_mask
        self.one_hot, self.row, self.of_mean = one_hot, row, of_mean
        self.mask_numbers: Any = None


def project(
    group: GroupSizes,
    x: torch.Tensor,
    downs: torch.Tensor,
    ups: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    outputs: Sequence[torch.Tensor] | None,
    settings: CallSettings,
    partials: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """
    P, and Z of all members or what they add to the outputs of their layers.

    Args:
        group ([`GroupSizes`]): The sizes.
        x (`torch.Tensor` of shape `[T, d_in]`): Tokens.
        downs (`torch.Tensor` of shape `[M K, d_in]`), ups (`Sequence[torch.Tensor]` of shapes `[d_out, Z]`):
            See `rank_space.concat`.
        biases (`Sequence[torch.Tensor | None]` of shapes `[d_out]`): Of the layers.
        outputs (`Sequence[torch.Tensor]` of shapes `[T, d_out]`, *optional*): Receive [`write_delta`] of each member.
        settings ([`CallSettings`]): Masks and logits.
        partials (`torch.Tensor` of shape `[M, stats_rows(T), 3 + 3 N]`, *optional*): Receives the partial sums of
            `rank_space.routing_stats` of each member.

    Returns:
        `tuple[torch.Tensor, Sequence[torch.Tensor]]`: P `[T, M K]`, and Z `[T, Z]` of each member without `outputs`.
    """
    layout, P, Zs = group.layout, x @ downs.T, []
    for place, (of_member, down) in enumerate(zip(P.chunk(group.count, 1), downs.chunk(group.count), strict=True)):
        if rank_space.has_initial_A(down, layout):
            rank_space.repeat_h(of_member, layout)
        if settings.tables:
            rank_space.logits_of(of_member, layout).copy_(select_logits(settings.tables[place], settings.tasks))
        Z = rank_space.mix(
            *(of_member, group.z, layout),
            dropout=settings.dropout,
            seed=settings.seeds[place] if settings.seeds else None,
            partials=None if partials is None else partials[place],
            token_mask=settings.token_mask,
        )
        Zs.append(Z)
    if outputs is None:
        return P, Zs
    for Z, up, bias, output in zip(Zs, ups, biases, outputs, strict=True):
        write_delta(Z, up, bias, output)
    return P, ()


def write_delta(Z: torch.Tensor, up: torch.Tensor, bias: torch.Tensor | None, output: torch.Tensor) -> None:
    """Write `Z up^T`, plus the bias of the layer, to `output` `[T, d_out]`."""
    if bias is None:
        torch.mm(Z, up.T, out=output)
    else:
        torch.addmm(bias, Z, up.T, out=output)


def project_backward(
    group: GroupSizes,
    dys: Sequence[torch.Tensor],
    P: torch.Tensor,
    ups: Sequence[torch.Tensor],
    settings: CallSettings,
    coeffs: Sequence[torch.Tensor | None] | None,
    dtypes: Sequence[torch.dtype | None],
    downs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Sequence[torch.Tensor | None], torch.Tensor | None]:
    """
    The gradients of P and of all heads, and what they add to that of x.

    Args:
        group ([`GroupSizes`]), ups (`Sequence[torch.Tensor]`), settings ([`CallSettings`]): As in [`project`].
        dys (`Sequence[torch.Tensor]` of shapes `[T, d_out]`): Gradients of the outputs.
        P (`torch.Tensor` of shape `[T, M K]`): Projections.
        coeffs (`Sequence[torch.Tensor | None]` of shapes `[N + 2]`, *optional*): See `rank_space.mix_backward`.
        dtypes (`Sequence[torch.dtype | None]`): Of the gradients of B; `None` for one that is not needed.
        downs (`torch.Tensor` of shape `[M K, d_in]`, *optional*): As in [`project`], if x needs a gradient.

    Returns:
        `tuple`: dP `[T, M K]`, dB `[N, d_out, r]` of each member, and `dP downs` `[T, d_in]` with `downs`.
    """
    layout, dPs, dBs = group.layout, [], []
    for place, (dy, of_member) in enumerate(zip(dys, P.chunk(group.count, 1), strict=True)):
        heads, dP = rank_space.mix_backward(
            *(of_member, dy @ ups[place], layout),
            scaling=group.scaling,
            dropout=settings.dropout,
            seed=settings.seeds[place] if settings.seeds else None,
            coeffs=None if coeffs is None else coeffs[place],
            token_mask=settings.token_mask,
        )
        dPs.append(dP)
        dtype = dtypes[place]
        dBs.append(None if dtype is None else rank_space.split_heads(_wide(dy.T, heads), layout).to(dtype))
    dP = torch.cat(dPs, 1)
    return dP, dBs, None if downs is None else torch.mm(dP, downs)


def stats_rows(tokens: int) -> int:
    """Rows of partial sums in [`project`]."""
    return 1


def select_logits(table: torch.Tensor, tasks: torch.Tensor | None) -> torch.Tensor:
    """The logits `[T, N]` or `[1, N]` from a table of [`CallSettings`]."""
    if tasks is None:
        return table[:1]
    return table[torch.where(tasks < 0, len(table) - 1, tasks)]  # [T, N]


def _wide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` in float32, or float64 for float64."""
    product = a @ b
    return product.to(torch.promote_types(product.dtype, torch.float32))
