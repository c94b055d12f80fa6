"""Launchers of the kernels in `triton_joint.py`, with the arguments and results of their twins in `joint_space.py`.

Where a row of Z does not fit into a tile, PyTorch's matrix products run between the rank-space kernels instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch

from . import triton_joint as kernels
from . import triton_ops
from .fused import mm_wide, padded
from .joint_space import Member, write_delta
from .rank_space import Layout, p_columns, split_heads, z_columns
from .triton_ops import Variant, aligned, check_device, dropout_numbers, padding, signed


# Layers of a group at most, for which the kernels have parameters: q, k and v.
MOST_MEMBERS = 3
# Widest rows of P, Z and dB that a program holds.
_WIDEST = 64
# Sizes that `tl.dot` needs at least.
_TILE = 16
# Tokens per block of `split_gradient_kernel` and `join_gradient_kernel`, and elements of dB per program of the latter.
_BLOCK_SPLIT = 64
_BLOCK_JOIN = 16
_BLOCK_B = 1024
# Programs that keep all multiprocessors of a GPU busy, and blocks of tokens that one of them reads at most.
_PROGRAMS = 264
_MOST_BLOCKS = 64


def _power(value: int) -> int:
    """The next power of two. (Triton's own function takes ten times as long.)"""
    return 1 << (value - 1).bit_length() if value > 1 else 1


def _ceil(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _project_block(tokens: int) -> int:
    """Tokens per program of `project_kernel`: few tokens get small blocks, so that all multiprocessors have work."""
    return 16 if tokens <= 4096 else 32 if tokens <= 8192 else 64


def stats_rows(tokens: int) -> int:
    """See `joint_space.stats_rows`: one for each block of `project_kernel`."""
    return _ceil(tokens, _project_block(tokens))


class _Plan:
    """Sizes of a group of layers, and the kernels that were made for it."""

    def __init__(self, d_in: int, d_outs: tuple[int, ...], k: int, z: int, layout: Layout, dtype: torch.dtype) -> None:
        routed, anchored, shared, top_k = layout.routed, layout.anchored, layout.shared, layout.top_k
        num_heads, r = layout.num_heads, layout.r
        self.d_in, self.d_outs, self.members, self.layout = d_in, d_outs, len(d_outs), layout
        self.k, self.z, self.dtype, self.wide = k, z, dtype, dtype.itemsize > 2
        self.heads = (r, _power(r), num_heads, _power(num_heads))
        self.kinds = (routed, anchored, shared, top_k if top_k < num_heads else 0)
        self.padded_outs = (*d_outs, 0, 0)[:MOST_MEMBERS]

        # Tiles that hold rows of P, Z and dB.
        self.k2, self.zd, self.g2 = (max(_power(n), _TILE) for n in (k, z, num_heads * r))
        self.fits = max(self.k2, self.zd, self.g2) <= _WIDEST
        self.expands = self.fits and min(d_outs) >= z
        self.zu = z_columns(layout)

        # Columns of dy per program.
        narrow = max(self.zd, self.g2) <= 32
        self.strip = 256 if min(d_outs) >= 4096 and narrow else 128
        self.strips = [_ceil(d_out, self.strip) for d_out in d_outs]
        self.elements = [_ceil(num_heads * d_out * r, _BLOCK_B) for d_out in d_outs]
        self.variants: dict[tuple, Variant] = {}

    def variant(self, key: tuple, make: Callable[..., Variant]) -> Variant:
        """The kernel for a key, made on its first use."""
        found = self.variants.get(key)
        if found is None:
            found = self.variants[key] = make(self, *key)
        return found

    def share(self, tokens: int) -> int:
        """Blocks of tokens that one program of `split_gradient_kernel` reads."""
        wanted = _ceil(_ceil(tokens, _BLOCK_SPLIT), max(_PROGRAMS // sum(self.strips), 1))
        return min(_power(wanted), _MOST_BLOCKS)


_plan = lru_cache(maxsize=1024)(_Plan)


def _plan_of(d_in: int, members: Sequence[Member], k: int, layout: Layout, dtype: torch.dtype) -> _Plan:
    return _plan(d_in, tuple([member.up.shape[0] for member in members]), k, members[0].up.shape[1], layout, dtype)


def _mask_numbers(dropout: float, members: Sequence[Member]) -> list[Any]:
    """Two halves of the seed of each member, then threshold and scale."""
    if dropout <= 0.0:
        return [0, 0, 0, 0, 0, 0, 0, 1.0]
    numbers: list[Any] = []
    for member in members:
        seed = member.seed or 0
        numbers += (signed(seed), signed(seed >> 32))
    numbers += [0, 0] * (MOST_MEMBERS - len(members))
    numbers += dropout_numbers(dropout)
    return numbers


def _project_variant(plan: _Plan, name: str, block: int, biases: tuple, flags: tuple, *dtypes: torch.dtype) -> Variant:
    widths = (plan.k, plan.k2, plan.z, padding(plan.z, plan.zu), plan.zd)
    columns = (256 if block <= 16 else 128) // (2 if plan.wide else 1)
    sizes = (plan.d_in, *plan.padded_outs, plan.members, *biases)
    return Variant(kernels.project_kernel, (*sizes, *widths, *plan.heads, *plan.kinds, *flags, block, columns, 128))


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
    """See `joint_space.project`."""
    (tokens, d_in), rows, count = x.shape, downs.shape[0], len(members)
    plan = _plan_of(d_in, members, rows // count, layout, x.dtype)
    P = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    expand = outputs is not None and plan.expands
    if outputs is not None and expand:
        written = outputs
    else:
        written = [torch.empty(tokens, plan.z, dtype=x.dtype, device=x.device) for _ in members]
    if tokens:
        _launch_project(plan, x, downs, P, members, written, dropout, tasks, partials, token_mask, expand)

    if outputs is None:
        return P, list(written)
    if not expand:
        for Z, member, output in zip(written, members, outputs, strict=True):
            write_delta(Z, member, output)
    return P, []


def _launch_project(
    plan: _Plan,
    x: torch.Tensor,
    downs: torch.Tensor,
    P: torch.Tensor,
    members: Sequence[Member],
    written: Sequence[torch.Tensor],
    dropout: float,
    tasks: torch.Tensor | None,
    partials: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    expand: bool,
) -> None:
    # P stands in for missing tensors, which the kernel does not touch.
    tokens, table = x.shape[0], members[0].table
    mask = token_mask if token_mask is not None and partials is not None else P
    rows = tasks if tasks is not None and table is not None else P
    pointers: list[torch.Tensor] = []
    given, biases = [x, mask, rows], [False] * MOST_MEMBERS
    for place, (member, out) in enumerate(zip(members, written, strict=True)):
        up, _, bias, logits, _ = member
        if bias is not None and expand:
            biases[place] = True
            given.append(bias)
        if logits is not None:
            given.append(logits)
        pointers += (up, P if bias is None else bias, P if logits is None else logits, out)
    pointers += [P] * (4 * (MOST_MEMBERS - len(members)))
    if mask is not P or table is not None:
        check_device(P, token_mask=mask, tasks=rows, table=table)

    block = _project_block(tokens)
    flags = (dropout > 0.0, partials is not None, mask is not P, table is not None, rows is not P, expand)
    dtypes = [tensor.dtype for tensor in given]
    variant = plan.variant(("project", block, tuple(biases), flags, *dtypes), _project_variant)
    tensors = (x, downs, rows, P, P if partials is None else partials, mask, *pointers)
    numbers = (tokens, 0 if table is None else table.shape[0] - 1, *_mask_numbers(dropout, members))
    variant.launch(_ceil(tokens, block) * plan.members, tensors, numbers, aligned(*given))


def _split_variant(plan: _Plan, name: str, share: int, dropped: bool) -> Variant:
    r, _, num_heads, n2 = plan.heads
    routed, _, shared, top_k = plan.kinds
    widths = (plan.k, plan.z, plan.zu, plan.zd, r, num_heads, n2, plan.g2)
    block = _BLOCK_SPLIT // (2 if plan.wide else 1)
    blocks = (share * (_BLOCK_SPLIT // block), block, plan.strip)
    constants = (*plan.padded_outs, plan.members, *widths, routed, shared, top_k, dropped, *blocks)
    return Variant(kernels.split_gradient_kernel, constants, num_warps=4 if max(plan.zd, plan.g2) <= 32 else 8)


def _join_variant(plan: _Plan, name: str, flags: tuple[bool, ...], *dtypes: torch.dtype) -> Variant:
    strips = (*plan.strips, 0, 0)[:MOST_MEMBERS]
    widths = (plan.k, padding(plan.k, p_columns(plan.layout)), plan.zu, _power(plan.zu))
    sizes = (*plan.padded_outs, *strips, plan.members, *widths, *plan.heads)
    return Variant(kernels.join_gradient_kernel, (*sizes, *plan.kinds, *flags, _BLOCK_JOIN, _BLOCK_B))


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
    tokens, columns = P.shape
    count, device = len(members), P.device
    plan = _plan_of(0, members, columns // count, layout, P.dtype)
    if tokens == 0 or not plan.fits:
        return _by_products(dys, P, members, layout, scaling, dropout, token_mask, dtypes)

    num_heads, r = layout.num_heads, layout.r
    share = plan.share(tokens)
    shares, strips = _ceil(tokens, _BLOCK_SPLIT * share), sum(plan.strips)
    dz = torch.empty(strips * tokens * plan.zu, dtype=torch.float32, device=device)
    parts = torch.empty(shares * sum(plan.d_outs) * num_heads * r, dtype=torch.float32, device=device)
    dP = torch.empty_like(P)
    dBs = [
        torch.empty(num_heads, d_out, r, dtype=dtype or torch.float32, device=device)
        for d_out, dtype in zip(plan.d_outs, dtypes, strict=True)
    ]
    masks = (*_mask_numbers(dropout, members), float(scaling))

    # The parts of dZ and dB.
    pointers: list[torch.Tensor] = []
    for dy, member in zip(dys, members, strict=True):
        pointers += (dy, member.up)
    pointers += [P, P] * (MOST_MEMBERS - count)
    variant = plan.variant(("split", share, dropout > 0.0), _split_variant)
    variant.launch(strips * shares, (P, dz, parts, *pointers), (tokens, shares, *masks), aligned(*dys))

    # Their sums, and dP. P stands in for missing tensors, which the kernel does not touch.
    balanced = members[0].coeffs is not None
    mask = token_mask if token_mask is not None and balanced else P
    pointers = []
    for member, dB in zip(members, dBs, strict=True):
        pointers += (P if member.coeffs is None else member.coeffs, dB)
    pointers += [P, P] * (MOST_MEMBERS - count)
    flags = (dropout > 0.0, balanced, mask is not P)
    variant = plan.variant(("join", flags, mask.dtype, *[dB.dtype for dB in dBs]), _join_variant)
    programs = _ceil(tokens, _BLOCK_JOIN) * count + sum(plan.elements)
    variant.launch(programs, (P, dz, parts, dP, mask, *pointers), (tokens, shares, *masks), aligned(mask))
    return dP, [None if dtype is None else dB for dB, dtype in zip(dBs, dtypes, strict=True)]


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
