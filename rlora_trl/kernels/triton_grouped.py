"""Triton kernels of products grouped by expert, with one narrow side: that of the rank space.

`grouped.py` has the same products in plain torch. Rows are sorted by expert. A program finds its expert from the ends
of the groups in memory, so that the host need not wait for them. Names in all kernels: rows S, experts E, the narrow
side M (columns of P or Z), the wide side D (features of the layer). `E2` and `M2` are powers of two that cover E and
M. Arithmetic is in float32.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from .triton_joint import _dot
from .triton_ops import Variant, aligned


# Rows, and features, per program and per step of a loop. Products with a narrow side wait for memory, not for tensor
# cores.
_BLOCK_S, _BLOCK_D = 64, 128
# Beyond this width of the narrow side, tiles of features are halved, so that a program's tiles stay in registers.
_WIDE = 128


@triton.jit
def _rows_of_program(ends_ptr, tile, E: tl.constexpr, E2: tl.constexpr, BLOCK_S: tl.constexpr):
    """Expert, first row and end of the group of a tile of rows; the expert is E beyond the last tile."""
    experts = tl.arange(0, E2)
    ends = tl.load(ends_ptr + experts, mask=experts < E, other=0)
    starts = tl.load(ends_ptr + experts - 1, mask=(experts > 0) & (experts < E), other=0)
    tiles = tl.where(experts < E, (ends - starts + BLOCK_S - 1) // BLOCK_S, 0)
    upto = tl.cumsum(tiles, axis=0)

    # Experts whose tiles all come before.
    expert = tl.sum(tl.where((upto <= tile) & (experts < E), 1, 0), axis=0)
    first = tl.sum(tl.where(experts == expert, upto - tiles, 0), axis=0)
    start = tl.sum(tl.where(experts == expert, starts, 0), axis=0)
    end = tl.sum(tl.where(experts == expert, ends, 0), axis=0)
    return expert, start + (tile - first) * BLOCK_S, end


# narrow [S, M] = wide [S, D] weight_e^T, with weight_e [M, D] in any strides.
@triton.jit
def narrow_kernel(
    wide_ptr,
    weight_ptr,
    ends_ptr,
    narrow_ptr,
    M: tl.constexpr,
    M2: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    E2: tl.constexpr,
    STRIDE_E: tl.constexpr,
    STRIDE_M: tl.constexpr,
    STRIDE_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    expert, row, end = _rows_of_program(ends_ptr, tl.program_id(0), E, E2, BLOCK_S)
    if expert < E:
        rows = (row + tl.arange(0, BLOCK_S)).to(tl.int64)
        row_mask = (rows < end)[:, None]
        m = tl.arange(0, M2)
        weight = weight_ptr + expert.to(tl.int64) * STRIDE_E
        total = tl.zeros((BLOCK_S, M2), tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            x = tl.load(wide_ptr + rows[:, None] * D + d[None, :], mask=row_mask & (d < D)[None, :], other=0.0)
            inside = (d < D)[:, None] & (m < M)[None, :]
            w = tl.load(weight + m[None, :] * STRIDE_M + d[:, None] * STRIDE_D, mask=inside, other=0.0)
            total = _dot(x, w, total)
        target = narrow_ptr + rows[:, None] * M + m[None, :]
        tl.store(target, total.to(narrow_ptr.dtype.element_ty), mask=row_mask & (m < M)[None, :])


# wide [S, D] += narrow [S, M] weight_e, with weight_e [M, D] in any strides.
@triton.jit
def widen_kernel(
    narrow_ptr,
    weight_ptr,
    ends_ptr,
    wide_ptr,
    M: tl.constexpr,
    M2: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    E2: tl.constexpr,
    STRIDE_E: tl.constexpr,
    STRIDE_M: tl.constexpr,
    STRIDE_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = (D + BLOCK_D - 1) // BLOCK_D
    expert, row, end = _rows_of_program(ends_ptr, tl.program_id(0) // blocks, E, E2, BLOCK_S)
    if expert < E:
        rows = (row + tl.arange(0, BLOCK_S)).to(tl.int64)
        row_mask = (rows < end)[:, None]
        m = tl.arange(0, M2)
        d = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
        z = tl.load(narrow_ptr + rows[:, None] * M + m[None, :], mask=row_mask & (m < M)[None, :], other=0.0)
        weight = weight_ptr + expert.to(tl.int64) * STRIDE_E
        inside = (m < M)[:, None] & (d < D)[None, :]
        w = tl.load(weight + m[:, None] * STRIDE_M + d[None, :] * STRIDE_D, mask=inside, other=0.0)
        target = wide_ptr + rows[:, None] * D + d[None, :]
        present = row_mask & (d < D)[None, :]
        y = tl.load(target, mask=present, other=0.0).to(tl.float32)
        y = _dot(z, w, y)
        tl.store(target, y.to(wide_ptr.dtype.element_ty), mask=present)


@triton.jit
def _add_outer(
    total,
    narrow_ptr,
    wide_ptr,
    row,
    end,
    m,
    d,
    M: tl.constexpr,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """`total` [M2, BLOCK_D] plus the outer products of a tile of rows."""
    rows = (row + tl.arange(0, BLOCK_S)).to(tl.int64)
    present = rows < end
    inside = present[None, :] & (m < M)[:, None]
    a = tl.load(narrow_ptr + rows[None, :] * M + m[:, None], mask=inside, other=0.0)
    x = tl.load(wide_ptr + rows[:, None] * D + d[None, :], mask=present[:, None] & (d < D)[None, :], other=0.0)
    return _dot(a, x, total)


# weight_e [M, D] = narrow^T wide over the rows of each expert, stored in any strides.
@triton.jit
def outer_kernel(
    narrow_ptr,
    wide_ptr,
    ends_ptr,
    weight_ptr,
    M: tl.constexpr,
    M2: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    E2: tl.constexpr,
    STRIDE_E: tl.constexpr,
    STRIDE_M: tl.constexpr,
    STRIDE_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COUNTED: tl.constexpr,
):
    blocks = (D + BLOCK_D - 1) // BLOCK_D
    expert = tl.program_id(0) // blocks
    end = tl.load(ends_ptr + expert)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    m = tl.arange(0, M2)
    d = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((M2, BLOCK_D), tl.float32)
    if COUNTED:
        # The compiler overlaps the loads of a loop that counts.
        for row in range(start, end, BLOCK_S):
            total = _add_outer(total, narrow_ptr, wide_ptr, row, end, m, d, M, D, BLOCK_S)
    else:
        row = start
        while row < end:
            total = _add_outer(total, narrow_ptr, wide_ptr, row, end, m, d, M, D, BLOCK_S)
            row += BLOCK_S
    target = weight_ptr + expert.to(tl.int64) * STRIDE_E + m[:, None] * STRIDE_M + d[None, :] * STRIDE_D
    tl.store(target, total.to(weight_ptr.dtype.element_ty), mask=(m < M)[:, None] & (d < D)[None, :])


# Triton's interpreter (3.6) can't count to a number in memory with NumPy 2.4 (no upstream issue as of 3.6).
_COUNTED = isinstance(outer_kernel, triton.runtime.JITFunction)


@lru_cache(maxsize=256)
def _variant(
    name: str, narrow: int, wide: int, experts: int, strides: tuple[int, ...], *dtypes: torch.dtype
) -> tuple[int, Variant]:
    """The kernel for these sizes and dtypes, and its tiles of features."""
    m2 = max(16, triton.next_power_of_2(narrow))
    block_d = _BLOCK_D if m2 <= _WIDE else _BLOCK_D // 2
    e2 = triton.next_power_of_2(experts)
    loop = (_COUNTED,) if name == "outer" else ()
    constants = (narrow, m2, wide, experts, e2, *strides, _BLOCK_S, block_d, *loop)
    kernel = {"narrow": narrow_kernel, "widen": widen_kernel, "outer": outer_kernel}[name]
    return triton.cdiv(wide, block_d), Variant(kernel, constants)


def _launch(
    name: str,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    sizes: tuple[int, int, int, int],
    strides: tuple[int, ...],
) -> None:
    """Launch a kernel on its tensors, with the sizes S, M, D and E and the strides of its weight `[E, M, D]`."""
    rows, narrow, wide, experts = sizes
    blocks, variant = _variant(name, narrow, wide, experts, strides, *(tensor.dtype for tensor in tensors))
    # The last tile of each group may be partly empty.
    tiles = rows // _BLOCK_S + experts
    programs = {"narrow": tiles, "widen": tiles * blocks, "outer": experts * blocks}[name]
    variant.launch(programs, tensors, (), aligned(*tensors))


def _int32(ends: torch.Tensor) -> torch.Tensor:
    return ends.to(torch.int32).contiguous()


def narrow(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """
    `x weight_e^T`.

    Args:
        x (`torch.Tensor` of shape `[S, D]`): Rows, sorted by expert.
        weight (`torch.Tensor` of shape `[E, M, D]`): In any strides, in the dtype of `x`.
        ends (`torch.Tensor` of shape `[E]`): Ends of the rows of each expert; the last is S.

    Returns:
        `torch.Tensor` of shape `[S, M]`.
    """
    experts, m, d = weight.shape
    out = torch.empty(x.shape[0], m, dtype=x.dtype, device=x.device)
    _launch("narrow", (x.contiguous(), weight, _int32(ends), out), (x.shape[0], m, d, experts), weight.stride())
    return out


def add_wide(out: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> None:
    """
    `out += z weight_e^T`, in place.

    Args:
        out (`torch.Tensor` of shape `[S, D]`): Contiguous.
        z (`torch.Tensor` of shape `[S, M]`): Rows, sorted by expert.
        weight (`torch.Tensor` of shape `[E, D, M]`): In any strides, in the dtype of `z`.
        ends (`torch.Tensor` of shape `[E]`): As in [`narrow`].
    """
    experts, d, m = weight.shape
    strides = (weight.stride(0), weight.stride(2), weight.stride(1))
    _launch("widen", (z.contiguous(), weight, _int32(ends), out), (z.shape[0], m, d, experts), strides)


def outer(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor, experts: int) -> torch.Tensor:
    """
    `a^T b` over the rows of each expert.

    Args:
        a (`torch.Tensor` of shape `[S, M]`), b (`torch.Tensor` of shape `[S, D]`): Rows, sorted by expert. Either may
            be the narrow side.
        ends (`torch.Tensor` of shape `[E]`): As in [`narrow`].
        experts (`int`): E.

    Returns:
        `torch.Tensor` of shape `[E, M, D]`: In float32.
    """
    out = torch.empty(experts, a.shape[1], b.shape[1], dtype=torch.float32, device=a.device)
    strides = out.stride()
    if a.shape[1] > b.shape[1]:
        a, b, strides = b, a, (strides[0], strides[2], strides[1])
    sizes = (a.shape[0], a.shape[1], b.shape[1], experts)
    _launch("outer", (a.contiguous(), b.contiguous(), _int32(ends), out), sizes, strides)
    return out
