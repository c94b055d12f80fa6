"""Launchers of the kernels in `triton_joint.py`, with the arguments and results of their twins in `joint_space.py`.

Where a row of Z does not fit into a tile, PyTorch's matrix products run between the rank-space kernels instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from . import triton_joint as kernels
from . import triton_ops
from .fused import mm_wide, padded
from .joint_space import CallSettings, GroupSizes, select_logits, write_delta
from .rank_space import Layout, logits_of, p_columns, split_heads, z_columns
from .triton_ops import Variant, check_device, dropout_numbers, padding, signed


# Layers of a group at most, for which the kernels have parameters: q, k and v.
MOST_MEMBERS = 3
# Widest rows of P, Z and dB that a program holds; up to the second number it is fast.
_WIDEST, _NARROW = 64, 32
_FEW_TOKENS = 4096
# Rows of all dP of a group that a program holds to compute dx too.
_WIDEST_DX = 128
# Elements of `downs` in 16 bits that a program multiplies dP with at a time.
_TILE_OF_DOWNS = 8192
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
    """What follows from the sizes of a group, and the kernels that were made for it."""

    def __init__(
        self,
        d_in: int,
        d_outs: tuple[int, ...],
        k: int,
        z: int,
        layout: Layout,
        dtype: torch.dtype,
        small_memory: bool = False,
    ) -> None:
        num_heads, r, top_k = layout.num_heads, layout.r, layout.top_k
        self.d_in, self.members, self.layout = d_in, len(d_outs), layout
        self.k, self.z, self.dtype, self.wide = k, z, dtype, dtype.itemsize > 2
        self.heads = (r, _power(r), num_heads, _power(num_heads))
        self.kinds = (layout.routed, layout.anchored, layout.shared, top_k if top_k < num_heads else 0)
        self.padded_outs = (*d_outs, 0, 0)[:MOST_MEMBERS]
        self.missing = MOST_MEMBERS - len(d_outs)

        # Tiles that hold rows of P, and of Z and dB.
        self.k2, self.zd = max(_power(k), _TILE), max(_power(z), _power(num_heads * r), _TILE)
        self.mk2 = max(_power(k * len(d_outs)), _TILE)
        self.fits = max(self.k2, self.zd) <= _WIDEST
        self.narrow = self.zd <= _NARROW
        self.long_outs = min(d_outs) >= z
        self.zu = z_columns(layout)

        # Columns of dy per program; what all strips and shares of the tokens store.
        roomy = self.narrow and not self.wide and not small_memory
        self.strip = 256 if min(d_outs) >= 4096 and roomy else 128
        self.strips = [_ceil(d_out, self.strip) for d_out in d_outs]
        self.all_strips = sum(self.strips)
        self.shapes_of_dB = [(num_heads, d_out, r) for d_out in d_outs]
        self.elements = num_heads * r * sum(d_outs)
        self.join_programs = sum(_ceil(num_heads * d_out * r, _BLOCK_B) for d_out in d_outs)

        self.variants: dict[tuple, Variant] = {}

    def holds_rows(self, tokens: int) -> bool:
        """
        Whether a program holds rows of Z. Wide ones take more time than PyTorch's products, which need more launches:
        that matters if there are few tokens.
        """
        return self.fits and (self.narrow or tokens <= _FEW_TOKENS)

    def parts_start(self, tokens: int) -> int:
        """Where the parts of dB begin in the buffer, after those of dZ; at a multiple of 64 bytes."""
        return _ceil(self.all_strips * tokens * self.zu, _TILE) * _TILE

    def share(self, tokens: int) -> int:
        """Blocks of tokens that one program of `split_gradient_kernel` reads."""
        wanted = _ceil(_ceil(tokens, _BLOCK_SPLIT), max(_PROGRAMS // self.all_strips, 1))
        return min(_power(wanted), _MOST_BLOCKS)


_make_plan = lru_cache(maxsize=1024)(_Plan)


@lru_cache(maxsize=64)
def _has_small_memory(device: torch.device) -> bool:
    """Whether programs of a GPU share less than 96 KiB, as on those before Ampere."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)


def _plan_of(group: GroupSizes, device: torch.device) -> _Plan:
    plan: _Plan = group.plan
    if plan is None:
        sizes = (group.d_in, group.d_outs, group.k, group.z, group.layout, group.dtype)
        plan = group.plan = _make_plan(*sizes, _has_small_memory(device))
    return plan


def _mask_numbers(plan: _Plan, settings: CallSettings) -> tuple[Any, ...]:
    """Two halves of the seed of each member, then threshold and scale."""
    seeds, numbers = settings.seeds, settings.mask_numbers
    if numbers is not None:
        return numbers
    if seeds:
        halves: list[int] = []
        for seed in seeds:
            halves += (signed(seed), signed(seed >> 32))
        numbers = (*halves, *(0, 0) * plan.missing, *dropout_numbers(settings.dropout))
    else:
        numbers = (0, 0, 0, 0, 0, 0, 0, 1.0)
    settings.mask_numbers = numbers
    return numbers


def _project_variant(plan: _Plan, block: int, biases: tuple, flags: tuple) -> Variant:
    widths = (plan.k, plan.k2, plan.z, padding(plan.z, plan.zu), plan.zd)
    columns = (256 if block <= 16 else 128) // (2 if plan.wide else 1) // (2 if plan.k2 > _NARROW else 1)
    sizes = (plan.d_in, *plan.padded_outs, plan.members, *biases)
    return Variant(kernels.project_kernel, (*sizes, *widths, *plan.heads, *plan.kinds, *flags, block, columns, 128))


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
    """See `joint_space.project`."""
    plan, tokens = _plan_of(group, x.device), x.shape[0]
    P: torch.Tensor
    written: Sequence[torch.Tensor]
    expand = outputs is not None and plan.long_outs and plan.holds_rows(tokens)
    if not plan.fits:
        P, written = _project_by_products(group, x, downs, settings, partials)
    else:
        P = x.new_empty((tokens, group.count * group.k))
        written = outputs if outputs is not None and expand else [x.new_empty((tokens, group.z)) for _ in ups]
        if tokens:
            _launch_project(plan, x, downs, ups, biases, P, written, settings, partials, expand)

    if outputs is None:
        return P, written
    if not expand:
        for Z, up, bias, output in zip(written, ups, biases, outputs, strict=True):
            write_delta(Z, up, bias, output)
    return P, ()


def _project_by_products(
    group: GroupSizes,
    x: torch.Tensor,
    downs: torch.Tensor,
    settings: CallSettings,
    partials: torch.Tensor | None,
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """P and Z of all members, by PyTorch's product and the kernel for Z."""
    P, Zs = torch.mm(x, downs.t()), []
    rows = triton_ops.stats_rows(x.shape[0])
    for place, of_member in enumerate(P.chunk(group.count, 1)):
        if settings.tables:
            logits_of(of_member, group.layout).copy_(select_logits(settings.tables[place], settings.tasks))
        if partials is not None:
            partials[place, rows:] = 0.0  # this kernel has larger blocks
        Z = triton_ops.mix(
            *(of_member.contiguous(), group.z, group.layout),
            dropout=settings.dropout,
            seed=settings.seeds[place] if settings.seeds else None,
            partials=None if partials is None else partials[place],
            token_mask=settings.token_mask,
        )
        Zs.append(Z)
    return P, Zs


def _launch_project(
    plan: _Plan,
    x: torch.Tensor,
    downs: torch.Tensor,
    ups: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    P: torch.Tensor,
    written: Sequence[torch.Tensor],
    settings: CallSettings,
    partials: torch.Tensor | None,
    expand: bool,
) -> None:
    # P stands in for missing tensors, which the kernel does not touch.
    tables, tasks, mask = settings.tables, settings.tasks, settings.token_mask
    if mask is None or partials is None:
        mask = P
    if tasks is None or not tables:
        tasks = P
    pointers: list[torch.Tensor] = []
    with_bias = []
    start = x.data_ptr() | mask.data_ptr() | tasks.data_ptr()
    for place, up in enumerate(ups):
        bias = biases[place]
        if bias is None or not expand:
            bias = P
        with_bias.append(bias is not P)
        table = tables[place] if tables else P
        start |= bias.data_ptr() | table.data_ptr()
        pointers += (up, bias, table, written[place])
    if plan.missing:
        pointers += (P,) * (4 * plan.missing)
        with_bias += (False,) * plan.missing
    if mask is not P or tables:
        check_device(P, token_mask=mask, tasks=tasks, table=tables[0] if tables else None)

    block = _project_block(x.shape[0])
    flags = (bool(settings.seeds), partials is not None, mask is not P, bool(tables), tasks is not P, expand)
    key = ("project", block, *with_bias, *flags, mask.dtype, tasks.dtype, tables[0].dtype if tables else None)
    variant = plan.variants.get(key)
    if variant is None:
        variant = plan.variants[key] = _project_variant(plan, block, tuple(with_bias), flags)
    tokens = x.shape[0]
    tensors = (x, downs, tasks, P, P if partials is None else partials, mask, *pointers)
    numbers = (tokens, tables[0].shape[0] - 1 if tables else 0, *_mask_numbers(plan, settings))
    variant.launch(-(-tokens // block) * plan.members, tensors, numbers, not start % 16, P)


def _split_variant(plan: _Plan, share: int, dropped: bool) -> Variant:
    r, _, num_heads, n2 = plan.heads
    routed, _, shared, top_k = plan.kinds
    widths = (plan.k, plan.z, plan.zu, plan.zd, r, num_heads, n2, plan.zd)
    block = _BLOCK_SPLIT // (2 if plan.wide else 1)
    blocks = (share * (_BLOCK_SPLIT // block), block, plan.strip)
    constants = (*plan.padded_outs, plan.members, *widths, routed, shared, top_k, dropped, *blocks)
    # With 4 warps, Triton 3.6 compiles products of two widths with one operand wrongly.
    return Variant(kernels.split_gradient_kernel, constants, num_warps=8)


def _join_variant(plan: _Plan, flags: tuple[bool, ...]) -> Variant:
    strips = (*plan.strips, 0, 0)[:MOST_MEMBERS]
    widths = (plan.k, padding(plan.k, p_columns(plan.layout)), plan.mk2, plan.zu, _power(plan.zu))
    sizes = (plan.d_in, *plan.padded_outs, *strips, plan.members, *widths, *plan.heads)
    blocks = (_BLOCK_JOIN, _BLOCK_B, _TILE_OF_DOWNS // plan.mk2 // (2 if plan.wide else 1))
    return Variant(kernels.join_gradient_kernel, (*sizes, *plan.kinds, *flags, *blocks))


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
    """See `joint_space.project_backward`."""
    plan, tokens = _plan_of(group, P.device), P.shape[0]
    if tokens == 0 or not plan.holds_rows(tokens):
        dP, dBs = _by_products(group, dys, P, ups, settings, coeffs, dtypes)
        return dP, dBs, None if downs is None else torch.mm(dP, downs)

    # One buffer for the parts of dZ and dB.
    share, dropped = plan.share(tokens), bool(settings.seeds)
    shares = -(-tokens // (_BLOCK_SPLIT * share))
    size = plan.parts_start(tokens) + shares * plan.elements
    parts = P.new_empty(size, dtype=torch.float32)
    numbers = (tokens, shares, *_mask_numbers(plan, settings), group.scaling)
    others = (P, P) * plan.missing  # the kernels do not touch them

    pointers: list[torch.Tensor] = []
    start = 0
    for dy, up in zip(dys, ups, strict=True):
        pointers += (dy, up)
        start |= dy.data_ptr()
    key: tuple = ("split", share, dropped)
    variant = plan.variants.get(key)
    if variant is None:
        variant = plan.variants[key] = _split_variant(plan, share, dropped)
    variant.launch(plan.all_strips * shares, (P, parts, *pointers, *others), numbers, not start % 16, P)

    # Their sums, dP, and dx if it takes no longer than PyTorch's product.
    dP = torch.empty_like(P)
    sums: list[torch.Tensor] = []
    for shape, dtype in zip(plan.shapes_of_dB, dtypes, strict=True):
        sums.append(P.new_empty(shape, dtype=dtype or torch.float32))
    adds_dx = downs is not None and plan.mk2 <= _WIDEST_DX and tokens <= _FEW_TOKENS
    dx = P.new_empty((tokens, plan.d_in)) if adds_dx else None
    _launch_join(plan, P, parts, dP, sums, settings, coeffs, numbers, downs, dx)
    if downs is not None and dx is None:
        dx = torch.mm(dP, downs)
    return dP, [None if dtype is None else dB for dB, dtype in zip(sums, dtypes, strict=True)], dx


def _launch_join(
    plan: _Plan,
    P: torch.Tensor,
    parts: torch.Tensor,
    dP: torch.Tensor,
    dBs: Sequence[torch.Tensor],
    settings: CallSettings,
    coeffs: Sequence[torch.Tensor | None] | None,
    numbers: tuple[Any, ...],
    downs: torch.Tensor | None,
    dx: torch.Tensor | None,
) -> None:
    # P stands in for missing tensors, which the kernel does not touch.
    pointers: list[torch.Tensor] = []
    for place, dB in enumerate(dBs):
        of_member = None if coeffs is None else coeffs[place]
        pointers += (P if of_member is None else of_member, dB)
    balanced = coeffs is not None and coeffs[0] is not None
    mask = settings.token_mask
    if mask is None or not balanced:
        mask = P
    of_dx = (P, P) if downs is None or dx is None else (downs, dx)

    flags = (bool(settings.seeds), balanced, mask is not P, dx is not None)
    key = ("join", *flags, mask.dtype, *[dB.dtype for dB in dBs])
    variant = plan.variants.get(key)
    if variant is None:
        variant = plan.variants[key] = _join_variant(plan, flags)
    blocks = -(-P.shape[0] // _BLOCK_JOIN)
    programs = (blocks if dx is not None else blocks * plan.members) + plan.join_programs
    tensors = (P, parts, dP, *of_dx, mask, *pointers, *(P, P) * plan.missing)
    variant.launch(programs, tensors, numbers, not mask.data_ptr() % 16, P)


def _by_products(
    group: GroupSizes,
    dys: Sequence[torch.Tensor],
    P: torch.Tensor,
    ups: Sequence[torch.Tensor],
    settings: CallSettings,
    coeffs: Sequence[torch.Tensor | None] | None,
    dtypes: Sequence[torch.dtype | None],
) -> tuple[torch.Tensor, Sequence[torch.Tensor | None]]:
    """`project_backward` with two reads of each dy."""
    layout, dPs, dBs = group.layout, [], []
    width = padded(layout.num_heads * layout.r, P.device)
    for place, (dy, of_member) in enumerate(zip(dys, P.chunk(group.count, 1), strict=True)):
        heads, dP = triton_ops.mix_backward(
            *(of_member.contiguous(), torch.mm(dy, ups[place]), layout),
            scaling=group.scaling,
            heads_width=width,
            dropout=settings.dropout,
            seed=settings.seeds[place] if settings.seeds else None,
            coeffs=None if coeffs is None else coeffs[place],
            token_mask=settings.token_mask,
        )
        dPs.append(dP)
        dtype = dtypes[place]
        dBs.append(None if dtype is None else split_heads(mm_wide(dy.T, heads), layout).to(dtype))
    return dPs[0] if len(dPs) == 1 else torch.cat(dPs, 1), dBs
