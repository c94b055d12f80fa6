"""Triton kernels for what happens in rank space, and for laying the small weights side by side.

Imported only where Triton is. Each launcher has the arguments and results of its torch twin in `rank_space.py`.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from .dropout import mask_parameters


# Tokens of one program. The tiles are a few registers wide, so that this only sets how many programs there are.
_BLOCK_T = 64
# Elements of one program that copies weights: of a row of A, and of a head.
_BLOCK_D = 1024
_BLOCK_W = 256


@triton.jit
def _mix32(v):
    v = v ^ (v >> 16)
    v = v * 0x7FEB352D
    v = v ^ (v >> 15)
    v = v * 0x846CA68B
    return v ^ (v >> 16)


@triton.jit
def _keep(rows, head, columns, first, second, threshold, N: tl.constexpr, R: tl.constexpr):
    """Whether the element of each token, in one head, is kept: the bits of `dropout.keep_mask`."""
    token = rows.to(tl.uint32)
    index = (token[:, None] * N + head) * R + columns[None, :].to(tl.uint32)
    bits = _mix32(_mix32(index + first.to(tl.uint32, bitcast=True)) ^ second.to(tl.uint32, bitcast=True))
    return bits >= threshold.to(tl.uint32, bitcast=True)


@triton.jit
def _weights(p_row, row_mask, R: tl.constexpr, N: tl.constexpr, N2: tl.constexpr, ROUTED: tl.constexpr):
    """The weights of the heads [BLOCK_T, N2] in float32, zero beyond N."""
    heads = tl.arange(0, N2)
    if ROUTED:
        inside = row_mask[:, None] & (heads < N)[None, :]
        logits = tl.load(p_row[:, None] + R + heads[None, :], mask=inside, other=0.0).to(tl.float32)
        logits = tl.where((heads < N)[None, :], logits, -float("inf"))
        e = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        w = e / tl.sum(e, axis=1)[:, None]
    else:
        w = tl.where((heads < N)[None, :], 1.0 / N, 0.0) + tl.zeros_like(row_mask[:, None].to(tl.float32))
    return w


@triton.jit(do_not_specialize=["tokens", "first", "second", "threshold", "keep_scale"])
def _mix_kernel(
    p_ptr,
    z_ptr,
    tokens,
    first,
    second,
    threshold,
    keep_scale,
    K: tl.constexpr,
    Z: tl.constexpr,
    Z2: tl.constexpr,
    R: tl.constexpr,
    R2: tl.constexpr,
    N: tl.constexpr,
    N2: tl.constexpr,
    ROUTED: tl.constexpr,
    ANCHORED: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_mask = rows < tokens
    columns = tl.arange(0, R2)
    inside = row_mask[:, None] & (columns < R)[None, :]
    p_row = p_ptr + rows * K
    z_row = z_ptr + rows * Z
    h = tl.load(p_row[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    w = _weights(p_row, row_mask, R, N, N2, ROUTED)
    heads = tl.arange(0, N2)
    if ANCHORED:
        anchor_start: tl.constexpr = R + N if ROUTED else R
        h0 = tl.load(p_row[:, None] + anchor_start + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    for i in tl.static_range(N):
        wi = tl.sum(tl.where((heads == i)[None, :], w, 0.0), axis=1)
        z = wi[:, None] * h
        if DROPOUT:
            z = tl.where(_keep(rows, i, columns, first, second, threshold, N, R), z * keep_scale, 0.0)
        if ANCHORED:
            z -= h0 * (1.0 / N)
        tl.store(z_row[:, None] + i * R + columns[None, :], z.to(z_ptr.dtype.element_ty), mask=inside)
    used: tl.constexpr = (N + 1) * R if ANCHORED else N * R
    if ANCHORED:
        tl.store(z_row[:, None] + N * R + columns[None, :], h0.to(z_ptr.dtype.element_ty), mask=inside)
    if Z > used:
        pad = used + tl.arange(0, Z2)
        zero = tl.zeros([BLOCK_T, Z2], dtype=z_ptr.dtype.element_ty)
        tl.store(z_row[:, None] + pad[None, :], zero, mask=row_mask[:, None] & (pad < Z)[None, :])


@triton.jit(do_not_specialize=["tokens", "first", "second", "threshold", "keep_scale"])
def _mix_backward_kernel(
    p_ptr,
    dz_ptr,
    z_ptr,
    dp_ptr,
    tokens,
    first,
    second,
    threshold,
    keep_scale,
    K: tl.constexpr,
    K2: tl.constexpr,
    Z: tl.constexpr,
    Z2: tl.constexpr,
    R: tl.constexpr,
    R2: tl.constexpr,
    N: tl.constexpr,
    N2: tl.constexpr,
    ROUTED: tl.constexpr,
    ANCHORED: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_mask = rows < tokens
    columns = tl.arange(0, R2)
    inside = row_mask[:, None] & (columns < R)[None, :]
    p_row = p_ptr + rows * K
    z_row = z_ptr + rows * Z
    dz_row = dz_ptr + rows * Z
    dp_row = dp_ptr + rows * K
    h = tl.load(p_row[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    w = _weights(p_row, row_mask, R, N, N2, ROUTED)
    heads = tl.arange(0, N2)
    anchor_start: tl.constexpr = R + N if ROUTED else R
    if ANCHORED:
        h0 = tl.load(p_row[:, None] + anchor_start + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        dh0 = tl.load(dz_row[:, None] + N * R + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(z_row[:, None] + N * R + columns[None, :], h0.to(z_ptr.dtype.element_ty), mask=inside)
    dh = tl.zeros([BLOCK_T, R2], dtype=tl.float32)
    dw = tl.zeros([BLOCK_T, N2], dtype=tl.float32)
    for i in tl.static_range(N):
        wi = tl.sum(tl.where((heads == i)[None, :], w, 0.0), axis=1)
        dz = tl.load(dz_row[:, None] + i * R + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        z = wi[:, None] * h
        dm = dz
        if DROPOUT:
            keep = _keep(rows, i, columns, first, second, threshold, N, R)
            z = tl.where(keep, z * keep_scale, 0.0)
            dm = tl.where(keep, dz * keep_scale, 0.0)
        dh += wi[:, None] * dm
        dw += tl.where((heads == i)[None, :], tl.sum(dm * h, axis=1)[:, None], 0.0)
        if ANCHORED:
            z -= h0 * (1.0 / N)
            dh0 -= dz * (1.0 / N)
        tl.store(z_row[:, None] + i * R + columns[None, :], z.to(z_ptr.dtype.element_ty), mask=inside)
    used_z: tl.constexpr = (N + 1) * R if ANCHORED else N * R
    if Z > used_z:
        pad = used_z + tl.arange(0, Z2)
        zero = tl.zeros([BLOCK_T, Z2], dtype=z_ptr.dtype.element_ty)
        tl.store(z_row[:, None] + pad[None, :], zero, mask=row_mask[:, None] & (pad < Z)[None, :])

    tl.store(dp_row[:, None] + columns[None, :], dh.to(dp_ptr.dtype.element_ty), mask=inside)
    if ROUTED:
        dlogits = w * (dw - tl.sum(w * dw, axis=1)[:, None])
        routed = row_mask[:, None] & (heads < N)[None, :]
        tl.store(dp_row[:, None] + R + heads[None, :], dlogits.to(dp_ptr.dtype.element_ty), mask=routed)
    if ANCHORED:
        tl.store(dp_row[:, None] + anchor_start + columns[None, :], dh0.to(dp_ptr.dtype.element_ty), mask=inside)
    used_p: tl.constexpr = anchor_start + R if ANCHORED else anchor_start
    if K > used_p:
        pad_p = used_p + tl.arange(0, K2)
        zero_p = tl.zeros([BLOCK_T, K2], dtype=dp_ptr.dtype.element_ty)
        tl.store(dp_row[:, None] + pad_p[None, :], zero_p, mask=row_mask[:, None] & (pad_p < K)[None, :])


# Compiled kernels by what they depend on. Launched through them, a kernel costs the host a third of what Triton's own
# look-up takes, which counts where steps are short: a layer launches four.
_COMPILED: dict[tuple, Any] = {}


def _launch(
    kernel: Any,
    programs: int,
    tensors: tuple[torch.Tensor, ...],
    numbers: tuple,
    constants: tuple,
    aligned: bool = True,
) -> None:
    """
    Launch a kernel whose parameters are tensors, then numbers that it is not specialised on, then constants.

    Args:
        kernel: The jitted function.
        programs (`int`): Size of its grid, which has one dimension.
        tensors (`tuple[torch.Tensor, ...]`), numbers (`tuple`), constants (`tuple`): Its arguments in order.
        aligned (`bool`): Whether all tensors are known to start at multiples of 16 bytes, which Triton specialises on.
    """
    device = tensors[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _launch(kernel, programs, tensors, numbers, constants, aligned)
    grid = (programs, 1, 1)
    key = (kernel, device.index, constants, tuple([tensor.dtype for tensor in tensors]))
    compiled = _COMPILED.get(key) if aligned else None
    if compiled is not None:
        compiled[grid](*tensors, *numbers, *constants)
        return None
    compiled = kernel[grid](*tensors, *numbers, *constants)
    if aligned and compiled is not None:  # the interpreter compiles nothing
        _COMPILED[key] = compiled
    return None


@lru_cache(maxsize=1024)
def _mix_constants(k: int, z: int, num_heads: int, r: int, routed: bool, anchored: bool, dropout: bool) -> tuple:
    """The constants of `_mix_kernel` in order: K, Z, Z2, R, R2, N, N2, ROUTED, ANCHORED, DROPOUT, BLOCK_T."""
    z2 = triton.next_power_of_2(max(z - (num_heads + anchored) * r, 1))
    heads2, r2 = triton.next_power_of_2(num_heads), triton.next_power_of_2(r)
    return (k, z, z2, r, r2, num_heads, heads2, routed, anchored, dropout, _BLOCK_T)


@lru_cache(maxsize=1024)
def _mix_backward_constants(
    k: int, z: int, num_heads: int, r: int, routed: bool, anchored: bool, dropout: bool
) -> tuple:
    """The constants of `_mix_backward_kernel` in order: those of `_mix_kernel` with K2 after K."""
    forward = _mix_constants(k, z, num_heads, r, routed, anchored, dropout)
    k2 = triton.next_power_of_2(max(k - (r + num_heads * routed + r * anchored), 1))
    return (forward[0], k2, *forward[1:])


def _mask_numbers(dropout: float, seed: int | None) -> tuple[int, int, int, float]:
    """Keys and threshold of the masks as signed 32-bit integers, which Triton passes as one type; and the scale."""
    if seed is None or dropout <= 0.0:
        return 0, 0, 0, 1.0
    first, second, threshold = mask_parameters(seed, dropout)
    return (
        first - 2**32 if first >= 2**31 else first,
        second - 2**32 if second >= 2**31 else second,
        threshold - 2**32 if threshold >= 2**31 else threshold,
        1.0 / (1.0 - dropout),
    )


def mix(
    P: torch.Tensor,
    z_width: int,
    num_heads: int,
    r: int,
    *,
    routed: bool,
    anchored: bool,
    dropout: float,
    seed: int | None,
) -> torch.Tensor:
    """See `rank_space.mix`."""
    tokens, k = P.shape
    Z = torch.empty(tokens, z_width, dtype=P.dtype, device=P.device)
    if tokens > 0:
        numbers = (tokens, *_mask_numbers(dropout, seed))
        constants = _mix_constants(k, z_width, num_heads, r, routed, anchored, seed is not None and dropout > 0.0)
        _launch(_mix_kernel, -(-tokens // _BLOCK_T), (P, Z), numbers, constants)
    return Z


def mix_backward(
    P: torch.Tensor,
    dZ: torch.Tensor,
    num_heads: int,
    r: int,
    *,
    routed: bool,
    anchored: bool,
    dropout: float,
    seed: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `rank_space.mix_backward`."""
    tokens, k = P.shape
    Z, dP = torch.empty_like(dZ), torch.empty_like(P)
    if tokens > 0:
        numbers = (tokens, *_mask_numbers(dropout, seed))
        masked = seed is not None and dropout > 0.0
        constants = _mix_backward_constants(k, dZ.shape[1], num_heads, r, routed, anchored, masked)
        _launch(_mix_backward_kernel, -(-tokens // _BLOCK_T), (P, dZ, Z, dP), numbers, constants)
    return Z, dP


@triton.jit
def _project_mix_kernel(
    x_ptr,
    down_ptr,
    z_ptr,
    D_IN: tl.constexpr,
    Z: tl.constexpr,
    Z2: tl.constexpr,
    R: tl.constexpr,
    R2: tl.constexpr,
    N: tl.constexpr,
    N2: tl.constexpr,
    ROUTED: tl.constexpr,
    ANCHORED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # One token: its projections, kept in registers, and its mixture.
    token = tl.program_id(0).to(tl.int64)
    ranks = tl.arange(0, R2)
    heads = tl.arange(0, N2)
    anchor_start: tl.constexpr = R + N if ROUTED else R
    h = tl.zeros([R2], dtype=tl.float32)
    h0 = tl.zeros([R2], dtype=tl.float32)
    logits = tl.zeros([N2], dtype=tl.float32)
    for start in range(0, D_IN, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = columns < D_IN
        x = tl.load(x_ptr + token * D_IN + columns, mask=inside, other=0.0).to(tl.float32)
        of_rank = (ranks < R)[:, None] & inside[None, :]
        a = tl.load(down_ptr + ranks[:, None] * D_IN + columns[None, :], mask=of_rank, other=0.0).to(tl.float32)
        h += tl.sum(a * x[None, :], axis=1)
        if ROUTED:
            of_head = (heads < N)[:, None] & inside[None, :]
            row = (R + heads)[:, None] * D_IN
            router = tl.load(down_ptr + row + columns[None, :], mask=of_head, other=0.0).to(tl.float32)
            logits += tl.sum(router * x[None, :], axis=1)
        if ANCHORED:
            row0 = (anchor_start + ranks)[:, None] * D_IN
            a0 = tl.load(down_ptr + row0 + columns[None, :], mask=of_rank, other=0.0).to(tl.float32)
            h0 += tl.sum(a0 * x[None, :], axis=1)
    z_row = z_ptr + token * Z
    logits = tl.where(heads < N, logits, -float("inf"))
    e = tl.exp(logits - tl.max(logits, axis=0))
    w = e / tl.sum(e, axis=0)
    for i in tl.static_range(N):
        z = tl.sum(tl.where(heads == i, w, 0.0), axis=0) * h - h0 * (1.0 / N)
        tl.store(z_row + i * R + ranks, z.to(z_ptr.dtype.element_ty), mask=ranks < R)
    used: tl.constexpr = (N + 1) * R if ANCHORED else N * R
    if ANCHORED:
        tl.store(z_row + N * R + ranks, h0.to(z_ptr.dtype.element_ty), mask=ranks < R)
    if Z > used:
        pad = used + tl.arange(0, Z2)
        tl.store(z_row + pad, tl.zeros([Z2], dtype=z_ptr.dtype.element_ty), mask=pad < Z)


@lru_cache(maxsize=1024)
def _project_mix_constants(d_in: int, z: int, num_heads: int, r: int, routed: bool, anchored: bool) -> tuple:
    """The constants of `_project_mix_kernel` in order."""
    _, _, z2, _, r2, _, heads2, *_ = _mix_constants(0, z, num_heads, r, routed, anchored, False)
    # A tile of weights has r or N rows; this keeps it in registers.
    block = max(256, min(1024, 8192 // max(r2, heads2)))
    return (d_in, z, z2, r, r2, num_heads, heads2, routed, anchored, block)


def project_mix(
    x: torch.Tensor, down: torch.Tensor, z_width: int, num_heads: int, r: int, *, routed: bool, anchored: bool
) -> torch.Tensor:
    """See `rank_space.project_mix`."""
    x = x.contiguous()
    Z = torch.empty(x.shape[0], z_width, dtype=x.dtype, device=x.device)
    if x.shape[0] > 0:
        constants = _project_mix_constants(x.shape[1], z_width, num_heads, r, routed, anchored)
        aligned = x.data_ptr() % 16 == 0
        _launch(_project_mix_kernel, x.shape[0], (x, down, Z), (), constants, aligned)
    return Z


@triton.jit(do_not_specialize=["scaling"])
def _pack_kernel(
    a_ptr,
    b_ptr,
    router_ptr,
    anchor_a_ptr,
    anchor_b_ptr,
    down_ptr,
    up_ptr,
    scaling,
    D_IN: tl.constexpr,
    ELEMENTS: tl.constexpr,
    DOWN_PROGRAMS: tl.constexpr,
    DOWN_BLOCKS: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    Z: tl.constexpr,
    Z2: tl.constexpr,
    ROUTED: tl.constexpr,
    ANCHORED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    program = tl.program_id(0)
    router_end: tl.constexpr = R + N if ROUTED else R
    if program < DOWN_PROGRAMS:
        # One block of one row of [A; R; A0], or of the padding below them.
        row = program // DOWN_BLOCKS
        columns = (program % DOWN_BLOCKS) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = columns < D_IN
        value = tl.load(a_ptr + row * D_IN + columns, mask=inside & (row < R), other=0.0).to(tl.float32)
        if ROUTED:
            of_router = inside & (row >= R) & (row < router_end)
            value += tl.load(router_ptr + (row - R) * D_IN + columns, mask=of_router, other=0.0).to(tl.float32)
        if ANCHORED:
            of_anchor = inside & (row >= router_end) & (row < router_end + R)
            anchor = tl.load(anchor_a_ptr + (row - router_end) * D_IN + columns, mask=of_anchor, other=0.0)
            value += anchor.to(tl.float32)
        tl.store(down_ptr + row.to(tl.int64) * D_IN + columns, value.to(down_ptr.dtype.element_ty), mask=inside)
    else:
        # A block of the elements of one head, [d_out, r] in row-major order, as B and the anchor have them.
        index = (program - DOWN_PROGRAMS) * BLOCK_W + tl.arange(0, BLOCK_W)
        mask = index < ELEMENTS
        up_row = up_ptr + (index // R).to(tl.int64) * Z
        total = tl.zeros([BLOCK_W], dtype=tl.float32)
        for i in tl.static_range(N):
            head = tl.load(b_ptr + i * ELEMENTS + index, mask=mask, other=0.0).to(tl.float32)
            total += head
            tl.store(up_row + i * R + index % R, (head * scaling).to(up_ptr.dtype.element_ty), mask=mask)
        used: tl.constexpr = (N + 1) * R if ANCHORED else N * R
        if ANCHORED:
            shift = total / N - tl.load(anchor_b_ptr + index, mask=mask, other=0.0).to(tl.float32)
            tl.store(up_row + N * R + index % R, (shift * scaling).to(up_ptr.dtype.element_ty), mask=mask)
        if Z > used:
            pad = used + tl.arange(0, Z2)
            zero = tl.zeros([BLOCK_W, Z2], dtype=up_ptr.dtype.element_ty)
            first_of_row = mask & (index % R == 0)
            tl.store(up_row[:, None] + pad[None, :], zero, mask=first_of_row[:, None] & (pad < Z)[None, :])


@lru_cache(maxsize=1024)
def _pack_constants(
    d_in: int, d_out: int, rows: int, columns: int, num_heads: int, r: int, routed: bool, anchored: bool
) -> tuple[int, tuple]:
    """The grid of `_pack_kernel` and its constants in order."""
    blocks = triton.cdiv(d_in, _BLOCK_D)
    z2 = triton.next_power_of_2(max(columns - (num_heads + anchored) * r, 1))
    sizes = (d_in, d_out * r, rows * blocks, blocks, r, num_heads, columns, z2)
    return rows * blocks + triton.cdiv(d_out * r, _BLOCK_W), (*sizes, routed, anchored, _BLOCK_D, _BLOCK_W)


def pack(
    A: torch.Tensor,
    B: torch.Tensor,
    router: torch.Tensor | None,
    anchor_A: torch.Tensor | None,
    anchor_B: torch.Tensor | None,
    *,
    scaling: float,
    dtype: torch.dtype,
    down_rows: int,
    up_columns: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `rank_space.pack`."""
    num_heads, d_out, r = B.shape
    d_in = A.shape[1]
    down = torch.empty(down_rows, d_in, dtype=dtype, device=A.device)
    up = torch.empty(d_out, up_columns, dtype=dtype, device=A.device)
    programs, constants = _pack_constants(
        d_in, d_out, down_rows, up_columns, num_heads, r, router is not None, anchor_A is not None
    )
    # Where a parameter is missing its place is taken by one that is there, and not read.
    places = [A, B, A if router is None else router, A if anchor_A is None else anchor_A]
    places.append(B if anchor_B is None else anchor_B)
    given = [tensor if tensor.is_contiguous() else tensor.contiguous() for tensor in places]
    # Parameters may be views into one buffer, as DeepSpeed and FSDP make them.
    aligned = all(tensor.data_ptr() % 16 == 0 for tensor in given)
    _launch(_pack_kernel, programs, (*given, down, up), (float(scaling),), constants, aligned)
    return down, up


@triton.jit(do_not_specialize=["scaling"])
def _unpack_up_kernel(
    dup_ptr,
    db_ptr,
    scaling,
    ELEMENTS: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    Z: tl.constexpr,
    ANCHORED: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    mask = index < ELEMENTS
    source = dup_ptr + (index // R).to(tl.int64) * Z + index % R
    shift = tl.zeros([BLOCK_W], dtype=tl.float32)
    if ANCHORED:
        shift = tl.load(source + N * R, mask=mask, other=0.0).to(tl.float32) / N
    for i in tl.static_range(N):
        value = tl.load(source + i * R, mask=mask, other=0.0).to(tl.float32) + shift
        tl.store(db_ptr + i * ELEMENTS + index, (value * scaling).to(db_ptr.dtype.element_ty), mask=mask)


def unpack_up(
    dUp: torch.Tensor, num_heads: int, r: int, *, scaling: float, anchored: bool, dtype: torch.dtype
) -> torch.Tensor:
    """See `rank_space.unpack_up`."""
    d_out = dUp.shape[0]
    dB = torch.empty(num_heads, d_out, r, dtype=dtype, device=dUp.device)
    constants = (d_out * r, r, num_heads, dUp.shape[1], anchored, _BLOCK_W)
    _launch(_unpack_up_kernel, -(-d_out * r // _BLOCK_W), (dUp, dB), (float(scaling),), constants)
    return dB
