"""Launchers of the kernels in `triton_joint.py`, with the arguments and results of their twins in `joint_space.py`.

Where a row of Z does not fit into a tile, PyTorch's matrix products run between the rank-space kernels instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton

from . import triton_joint as kernels
from . import triton_ops
from .fused import mm_wide, padded
from .joint_space import Member, write_delta
from .rank_space import Layout, p_columns, split_heads, z_columns
from .triton_ops import Variant, aligned, check_device, mask_numbers, padding


# Widest rows of P, Z and dB that a program holds.
_WIDEST = 64
# Sizes that `tl.dot` needs at least.
_TILE = 16
# Elements of dB per program of `join_gradient_kernel`.
_BLOCK_B = 1024
_BLOCK_JOIN = 16


class _Blocks(NamedTuple):
    """Tile sizes for a number of tokens: few tokens get small tiles, so that all multiprocessors have work."""

    project: int
    split: int  # blocks of 64 tokens per share


def _blocks(tokens: int, d_out: int) -> _Blocks:
    project = 16 if tokens <= 4096 else 32 if tokens <= 8192 else 64
    wanted = 320 // triton.cdiv(d_out, _strip(d_out))  # shares, for about two programs per multiprocessor
    share = triton.next_power_of_2(triton.cdiv(triton.cdiv(tokens, 64), max(wanted, 1)))
    return _Blocks(project, min(share, 64))


def _strip(d_out: int) -> int:
    """Columns of dy per program of `split_gradient_kernel`."""
    return 256 if d_out >= 4096 else 128


def stats_rows(tokens: int) -> int:
    """See `rank_space.stats_rows`: one for each program of `project_kernel`."""
    return triton.cdiv(tokens, _blocks(tokens, 1).project)


def _dot(columns: int) -> int:
    return max(triton.next_power_of_2(columns), _TILE)


def _fits(layout: Layout, k: int, z: int) -> bool:
    return max(_dot(k), _dot(z), _dot(layout.num_heads * layout.r)) <= _WIDEST


def _heads(layout: Layout) -> tuple[int, int, int, int]:
    r, n = layout.r, layout.num_heads
    return r, triton.next_power_of_2(r), n, triton.next_power_of_2(n)


def _kinds(layout: Layout) -> tuple[bool, bool, bool, int]:
    return layout.routed, layout.anchored, layout.shared, layout.top_k if layout.top_k < layout.num_heads else 0


@lru_cache(maxsize=1024)
def _project_variant(
    d_in: int,
    d_out: int,
    place: tuple[int, int],
    k: int,
    z: int,
    layout: Layout,
    flags: tuple[bool, ...],
    block: int,
    *dtypes: torch.dtype,
) -> Variant:
    widths = (k, _dot(k), z, padding(z, z_columns(layout)), _dot(z))
    columns = (256 if block <= 16 else 128) // (2 if dtypes[0].itemsize > 2 else 1)
    constants = (d_in, d_out, *place, *widths, *_heads(layout), *_kinds(layout), *flags, block, columns, 128)
    return Variant(kernels.project_kernel, constants)


def project(
    x: torch.Tensor,
    downs: torch.Tensor,
    members: Sequence[Member],
    layout: Layout,
    outputs: Sequence[torch.Tensor] | None = None,
    *,
    dropout: float = 0.0,
    token_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """See `joint_space.project`."""
    tokens, rows, count, z = x.shape[0], downs.shape[0], len(members), members[0].up.shape[1]
    P = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    expands = outputs is not None and _fits(layout, rows // count, z)
    Zs = []
    for index, member in enumerate(members):
        if outputs is not None and expands and member.up.shape[0] >= z:
            out, expand = outputs[index], True
        else:
            out, expand = torch.empty(tokens, z, dtype=x.dtype, device=x.device), False
        if tokens:
            _launch_project(x, downs, P, out, member, (index, count), layout, dropout, token_mask, expand)
        if outputs is None:
            Zs.append(out)
        elif not expand:
            write_delta(out, member, outputs[index])
    return P, Zs


def _launch_project(
    x: torch.Tensor,
    downs: torch.Tensor,
    P: torch.Tensor,
    out: torch.Tensor,
    member: Member,
    place: tuple[int, int],
    layout: Layout,
    dropout: float,
    token_mask: torch.Tensor | None,
    wide: bool,
) -> None:
    up, seed, bias, table, tasks, partials, _ = member
    (tokens, d_in), (d_out, z), k = x.shape, up.shape, P.shape[1] // place[1]
    # P stands in for missing tensors, which the kernel does not touch.
    mask = P if token_mask is None or partials is None else token_mask
    bias = P if bias is None or not wide else bias
    optional = (P if table is None else table, P if tasks is None else tasks)
    check_device(P, token_mask=mask, table=optional[0], tasks=optional[1])

    block = _blocks(tokens, 1).project
    dropped = seed is not None and dropout > 0.0
    flags = (dropped, partials is not None, mask is not P, table is not None, tasks is not None, wide, bias is not P)
    dtypes = (x.dtype, bias.dtype, optional[0].dtype, optional[1].dtype, mask.dtype)
    variant = _project_variant(d_in, d_out, place, k, z, layout, flags, block, *dtypes)
    tensors = (
        *(x, downs[place[0] * k :] if place[0] else downs, up, bias, *optional),
        *(P, out, P if partials is None else partials, mask),
    )
    last = 0 if table is None else table.shape[0] - 1
    numbers = (tokens, last, *mask_numbers(dropout, seed))
    variant.launch(-(-tokens // block), tensors, numbers, aligned(x, bias, *optional, mask))


@lru_cache(maxsize=1024)
def _split_variant(
    d_out: int, place: tuple[int, int], k: int, z: int, layout: Layout, dropped: bool, share: int, dtype: torch.dtype
) -> Variant:
    r, _, n, n2 = _heads(layout)
    routed, _, shared, top_k = _kinds(layout)
    widths = (k, z, z_columns(layout), _dot(z), r, n, n2, _dot(n * r))
    block = 64 // (2 if dtype.itemsize > 2 else 1)
    blocks = share * (64 // block)
    constants = (d_out, *place, *widths, routed, shared, top_k, dropped, blocks, block, _strip(d_out))
    return Variant(kernels.split_gradient_kernel, constants)


@lru_cache(maxsize=1024)
def _join_variant(
    d_out: int, place: tuple[int, int], k: int, layout: Layout, flags: tuple[bool, ...], *dtypes: torch.dtype
) -> Variant:
    strips, zu = triton.cdiv(d_out, _strip(d_out)), z_columns(layout)
    widths = (k, padding(k, p_columns(layout)), zu, triton.next_power_of_2(zu), *_heads(layout))
    constants = (d_out, strips, *place, *widths, *_kinds(layout), *flags, _BLOCK_JOIN, _BLOCK_B)
    return Variant(kernels.join_gradient_kernel, constants)


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
    """See `joint_space.project_backward`."""
    count, k, z = len(members), P.shape[1] // len(members), members[0].up.shape[1]
    if P.shape[0] == 0 or not _fits(layout, k, z):
        return _by_products(dys, P, members, layout, scaling, dropout, token_mask, dtypes)

    dP = torch.empty_like(P)
    dBs = []
    for place, (dy, member, dtype) in enumerate(zip(dys, members, dtypes, strict=True)):
        dB = _launch_backward(dy, P, dP, member, (place, count), layout, scaling, dropout, token_mask, dtype)
        dBs.append(None if dtype is None else dB)
    return dP, dBs


def _launch_backward(
    dy: torch.Tensor,
    P: torch.Tensor,
    dP: torch.Tensor,
    member: Member,
    place: tuple[int, int],
    layout: Layout,
    scaling: float,
    dropout: float,
    token_mask: torch.Tensor | None,
    dtype: torch.dtype | None,
) -> torch.Tensor:
    """Fill the columns of one member in dP; returns its dB."""
    up, seed, coeffs = member.up, member.seed, member.coeffs
    (tokens, d_out), k, (num_heads, r) = dy.shape, P.shape[1] // place[1], layout[:2]
    share = _blocks(tokens, d_out).split
    strips, shares = triton.cdiv(d_out, _strip(d_out)), triton.cdiv(tokens, 64 * share)
    dz = torch.empty(strips, tokens, z_columns(layout), dtype=torch.float32, device=P.device)
    db = torch.empty(shares, d_out, num_heads * r, dtype=torch.float32, device=P.device)
    dB = torch.empty(num_heads, d_out, r, dtype=dtype or torch.float32, device=P.device)
    dropped = seed is not None and dropout > 0.0
    masks = (*mask_numbers(dropout, seed), float(scaling))

    # The parts of dZ and dB.
    variant = _split_variant(d_out, place, k, up.shape[1], layout, dropped, share, dy.dtype)
    variant.launch(strips * shares, (dy, up, P, dz, db), (tokens, *masks), aligned(dy))

    # Their sums, and dP. P stands in for missing tensors, which the kernel does not touch.
    mask = P if token_mask is None or coeffs is None else token_mask
    flags = (dropped, coeffs is not None, mask is not P)
    variant = _join_variant(d_out, place, k, layout, flags, P.dtype, dB.dtype, mask.dtype)
    programs = triton.cdiv(tokens, _BLOCK_JOIN) + triton.cdiv(dB.numel(), _BLOCK_B)
    tensors = (P, dz, db, dP, dB, P if coeffs is None else coeffs, mask)
    variant.launch(programs, tensors, (tokens, shares, *masks), aligned(mask))
    return dB


def _by_products(
    dys: Sequence[torch.Tensor],
    P: torch.Tensor,
    members: Sequence[Member],
    layout: Layout,
    scaling: float,
    dropout: float,
    token_mask: torch.Tensor | None,
    dtypes: Sequence[torch.dtype | None],
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """`project_backward` with two reads of each dy."""
    dPs, dBs = [], []
    width = padded(layout.num_heads * layout.r, P.device)
    for dy, of_member, member, dtype in zip(dys, P.chunk(len(members), 1), members, dtypes, strict=True):
        heads, dP = triton_ops.mix_backward(
            *(of_member.contiguous(), torch.mm(dy, member.up), layout),
            scaling=scaling,
            heads_width=width,
            dropout=dropout,
            seed=member.seed,
            coeffs=member.coeffs,
            token_mask=token_mask,
        )
        dPs.append(dP)
        dBs.append(None if dtype is None else split_heads(mm_wide(dy.T, heads), layout).to(dtype))
    return dPs[0] if len(dPs) == 1 else torch.cat(dPs, 1), dBs
