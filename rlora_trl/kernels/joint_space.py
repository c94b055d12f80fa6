"""What a group of layers computes besides its base products, in plain torch: twins of the launchers in `joint_ops.py`.

The layers of a group get the same input x `[T, d_in]` and have the same layout. Member j of M has rows j K to
(j + 1) K of `downs` `[M K, d_in]`, and those columns of P and dP `[T, M K]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import rank_space
from .rank_space import Layout


class Member(NamedTuple):
    """
    One layer of a group.

    Args:
        up (`torch.Tensor` of shape `[d_out, Z]`): See `rank_space.concat`.
        seed (`int`, *optional*): Seed of its masks.
        bias (`torch.Tensor` of shape `[d_out]`, *optional*): Bias of the layer.
        table (`torch.Tensor` of shape `[rows, N]`, *optional*): Logits in place of the router's, a row for each task.
        coeffs (`torch.Tensor` of shape `[N + 2]`, *optional*): See `rank_space.mix_backward`.
    """

    up: torch.Tensor
    seed: int | None = None
    bias: torch.Tensor | None = None
    table: torch.Tensor | None = None
    coeffs: torch.Tensor | None = None


def project(
    x: torch.Tensor,
    downs: torch.Tensor,
    members: Sequence[Member],
    layout: Layout,
    outputs: Sequence[torch.Tensor] | None = None,
    *,
    dropout: float = 0.0,
    tasks: torch.Tensor | None = None,
    partials: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """
    P, and Z of all members or what they add to the outputs of their layers.

    Args:
        x (`torch.Tensor` of shape `[T, d_in]`): Tokens.
        downs (`torch.Tensor` of shape `[M K, d_in]`): See `rank_space.concat`.
        members (`Sequence[Member]`): The layers.
        layout ([`Layout`]): The columns of P and Z of each.
        outputs (`Sequence[torch.Tensor]` of shapes `[T, d_out]`, *optional*): Receive [`write_delta`] of each member.
        tasks (`torch.Tensor` of shape `[T]`, *optional*): The row of each token in the tables; -1 is the last
            one. Without it the first row holds for all tokens.
        partials (`torch.Tensor` of shape `[M, stats_rows(T), 3 + 3 N]`, *optional*): Receives the partial sums of
            `rank_space.routing_stats` of each member.
        dropout (`float`), token_mask (`torch.Tensor`): As in `rank_space.mix`.

    Returns:
        `tuple[torch.Tensor, list[torch.Tensor]]`: P `[T, M K]`, and Z `[T, Z]` of each member without `outputs`.
    """
    P, Zs = x @ downs.T, []
    count = len(members)
    sums = [None] * count if partials is None else partials.unbind()
    for of_member, down, member, sums_of_member in zip(
        P.chunk(count, 1), downs.chunk(count, 0), members, sums, strict=True
    ):
        if rank_space.has_initial_A(down, layout):
            rank_space.repeat_h(of_member, layout)
        if member.table is not None:
            rank_space.logits_of(of_member, layout).copy_(_logits(member.table, tasks))
        Z = rank_space.mix(
            *(of_member, member.up.shape[1], layout),
            dropout=dropout,
            seed=member.seed,
            partials=sums_of_member,
            token_mask=token_mask,
        )
        Zs.append(Z)
    if outputs is None:
        return P, Zs
    for Z, member, output in zip(Zs, members, outputs, strict=True):
        write_delta(Z, member, output)
    return P, []


def write_delta(Z: torch.Tensor, member: Member, output: torch.Tensor) -> None:
    """Write `Z up^T`, plus the bias of the layer, to `output` `[T, d_out]`."""
    if member.bias is None:
        torch.mm(Z, member.up.T, out=output)
    else:
        torch.addmm(member.bias, Z, member.up.T, out=output)


def project_backward(
    dys: Sequence[torch.Tensor],
    P: torch.Tensor,
    members: Sequence[Member],
    layout: Layout,
    *,
    scaling: float = 1.0,
    dropout: float = 0.0,
    token_mask: torch.Tensor | None = None,
    dtypes: Sequence[torch.dtype | None],
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """
    The gradients of P and of all heads.

    Args:
        dys (`Sequence[torch.Tensor]` of shapes `[T, d_out]`): Gradients of the outputs.
        P (`torch.Tensor` of shape `[T, M K]`): Projections.
        members (`Sequence[Member]`), layout ([`Layout`]), scaling (`float`), dropout (`float`), token_mask
            (`torch.Tensor`): As in [`project`] and `rank_space.mix_backward`.
        dtypes (`Sequence[torch.dtype | None]`): Of the gradients of B; `None` for one that is not needed.

    Returns:
        `tuple[torch.Tensor, list[torch.Tensor | None]]`: dP `[T, M K]`, and dB `[N, d_out, r]` of each member.
    """
    dPs, dBs = [], []
    for dy, of_member, member, dtype in zip(dys, P.chunk(len(members), 1), members, dtypes, strict=True):
        heads, dP = rank_space.mix_backward(
            *(of_member, dy @ member.up, layout),
            scaling=scaling,
            dropout=dropout,
            seed=member.seed,
            coeffs=member.coeffs,
            token_mask=token_mask,
        )
        dPs.append(dP)
        dBs.append(None if dtype is None else rank_space.split_heads(_wide(dy.T, heads), layout).to(dtype))
    return torch.cat(dPs, 1), dBs


def _logits(table: torch.Tensor, tasks: torch.Tensor | None) -> torch.Tensor:
    if tasks is None:
        return table[:1]
    return table[torch.where(tasks < 0, len(table) - 1, tasks)]  # [T, N]


def _wide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` in float32, or float64 for float64."""
    product = a @ b
    return product.to(torch.promote_types(product.dtype, torch.float32))


def stats_rows(tokens: int) -> int:
    """Rows of partial sums in [`project`]."""
    return 1
