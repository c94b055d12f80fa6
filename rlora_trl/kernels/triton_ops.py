"""Triton kernels for what happens in rank space, and for laying the small weights side by side.

Imported only where Triton is. Each launcher has the arguments and results of its torch twin in `rank_space.py`.
"""

import torch
import triton
import triton.language as tl

from .dropout import mask_parameters


# Tokens of one program. The tiles are a few registers wide, so that this only sets how many programs there are.
_BLOCK_T = 64
# Elements of one program that copies weights.
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


@triton.jit(do_not_specialize=["tokens", "first", "second", "threshold"])
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


@triton.jit(do_not_specialize=["tokens", "first", "second", "threshold"])
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


def _constants(P: torch.Tensor, z_width: int, num_heads: int, r: int, routed: bool, anchored: bool) -> dict:
    used_z = (num_heads + anchored) * r
    return {
        "K": P.shape[1],
        "Z": z_width,
        "Z2": triton.next_power_of_2(max(z_width - used_z, 1)),
        "R": r,
        "R2": triton.next_power_of_2(r),
        "N": num_heads,
        "N2": triton.next_power_of_2(num_heads),
        "ROUTED": routed,
        "ANCHORED": anchored,
        "BLOCK_T": _BLOCK_T,
    }


def _signed(value: int) -> int:
    """The 32 bits of `value` as a signed integer, so that Triton always passes the same type."""
    return value - 2**32 if value >= 2**31 else value


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
    Z = torch.empty(P.shape[0], z_width, dtype=P.dtype, device=P.device)
    if P.shape[0] == 0:
        return Z
    masked = seed is not None and dropout > 0.0
    first, second, threshold = mask_parameters(seed, dropout) if seed is not None else (0, 0, 0)
    with torch.cuda.device(P.device) if P.is_cuda else _no_device():
        _mix_kernel[(triton.cdiv(P.shape[0], _BLOCK_T),)](
            P,
            Z,
            P.shape[0],
            _signed(first),
            _signed(second),
            _signed(threshold),
            1.0 / (1.0 - dropout),
            **_constants(P, z_width, num_heads, r, routed, anchored),
            DROPOUT=masked,
        )
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
    Z, dP = torch.empty_like(dZ), torch.empty_like(P)
    if P.shape[0] == 0:
        return Z, dP
    masked = seed is not None and dropout > 0.0
    first, second, threshold = mask_parameters(seed, dropout) if seed is not None else (0, 0, 0)
    constants = _constants(P, dZ.shape[1], num_heads, r, routed, anchored)
    used_p = r + num_heads * routed + r * anchored
    with torch.cuda.device(P.device) if P.is_cuda else _no_device():
        _mix_backward_kernel[(triton.cdiv(P.shape[0], _BLOCK_T),)](
            P,
            dZ,
            Z,
            dP,
            P.shape[0],
            _signed(first),
            _signed(second),
            _signed(threshold),
            1.0 / (1.0 - dropout),
            **constants,
            K2=triton.next_power_of_2(max(P.shape[1] - used_p, 1)),
            DROPOUT=masked,
        )
    return Z, dP


class _no_device:
    """Triton's interpreter runs on the CPU, which has no current device to set."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exception: object) -> None:
        return None


@triton.jit
def _pack_down_kernel(
    a_ptr,
    router_ptr,
    anchor_ptr,
    out_ptr,
    d_in,
    R: tl.constexpr,
    N: tl.constexpr,
    ROUTED: tl.constexpr,
    ANCHORED: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    mask = columns < d_in
    router_end: tl.constexpr = R + N if ROUTED else R
    value = tl.load(a_ptr + row * d_in + columns, mask=mask & (row < R), other=0.0).to(tl.float32)
    if ROUTED:
        value += tl.load(
            router_ptr + (row - R) * d_in + columns, mask=mask & (row >= R) & (row < router_end), other=0.0
        ).to(tl.float32)
    if ANCHORED:
        value += tl.load(
            anchor_ptr + (row - router_end) * d_in + columns,
            mask=mask & (row >= router_end) & (row < router_end + R),
            other=0.0,
        ).to(tl.float32)
    tl.store(out_ptr + row.to(tl.int64) * d_in + columns, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _pack_up_kernel(
    b_ptr,
    anchor_ptr,
    out_ptr,
    elements,
    scaling,
    R: tl.constexpr,
    N: tl.constexpr,
    Z: tl.constexpr,
    Z2: tl.constexpr,
    ANCHORED: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    # Elements of one head, [d_out, r] in row-major order, as B and the anchor have them.
    index = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    mask = index < elements
    row = (index // R).to(tl.int64)
    out = out_ptr + row * Z + index % R
    total = tl.zeros([BLOCK_W], dtype=tl.float32)
    for i in tl.static_range(N):
        value = tl.load(b_ptr + i * elements + index, mask=mask, other=0.0).to(tl.float32)
        total += value
        tl.store(out + i * R, (value * scaling).to(out_ptr.dtype.element_ty), mask=mask)
    used: tl.constexpr = (N + 1) * R if ANCHORED else N * R
    if ANCHORED:
        shift = total / N - tl.load(anchor_ptr + index, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + N * R, (shift * scaling).to(out_ptr.dtype.element_ty), mask=mask)
    if Z > used:
        pad = used + tl.arange(0, Z2)
        zero = tl.zeros([BLOCK_W, Z2], dtype=out_ptr.dtype.element_ty)
        first_of_row = mask & (index % R == 0)
        tl.store(
            (out_ptr + row * Z)[:, None] + pad[None, :], zero, mask=first_of_row[:, None] & (pad < Z)[None, :]
        )


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
    anchored = anchor_A is not None
    used = (num_heads + anchored) * r
    with torch.cuda.device(A.device) if A.is_cuda else _no_device():
        _pack_down_kernel[(down_rows, triton.cdiv(d_in, 1024))](
            A,
            A if router is None else router,
            A if anchor_A is None else anchor_A,
            down,
            d_in,
            R=r,
            N=num_heads,
            ROUTED=router is not None,
            ANCHORED=anchored,
            BLOCK_W=1024,
        )
        _pack_up_kernel[(triton.cdiv(d_out * r, _BLOCK_W),)](
            B,
            B if anchor_B is None else anchor_B,
            up,
            d_out * r,
            scaling,
            R=r,
            N=num_heads,
            Z=up_columns,
            Z2=triton.next_power_of_2(max(up_columns - used, 1)),
            ANCHORED=anchored,
            BLOCK_W=_BLOCK_W,
        )
    return down, up


@triton.jit
def _unpack_up_kernel(
    dup_ptr,
    db_ptr,
    elements,
    scaling,
    R: tl.constexpr,
    N: tl.constexpr,
    Z: tl.constexpr,
    ANCHORED: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    mask = index < elements
    source = dup_ptr + (index // R).to(tl.int64) * Z + index % R
    shift = tl.zeros([BLOCK_W], dtype=tl.float32)
    if ANCHORED:
        shift = tl.load(source + N * R, mask=mask, other=0.0).to(tl.float32) / N
    for i in tl.static_range(N):
        value = tl.load(source + i * R, mask=mask, other=0.0).to(tl.float32) + shift
        tl.store(db_ptr + i * elements + index, (value * scaling).to(db_ptr.dtype.element_ty), mask=mask)


def unpack_up(dUp: torch.Tensor, B: torch.Tensor, *, scaling: float, anchored: bool) -> torch.Tensor:
    """See `rank_space.unpack_up`."""
    num_heads, d_out, r = B.shape
    dB = torch.empty_like(B, memory_format=torch.contiguous_format)
    with torch.cuda.device(B.device) if B.is_cuda else _no_device():
        _unpack_up_kernel[(triton.cdiv(d_out * r, _BLOCK_W),)](
            dUp,
            dB,
            d_out * r,
            scaling,
            R=r,
            N=num_heads,
            Z=dUp.shape[1],
            ANCHORED=anchored,
            BLOCK_W=_BLOCK_W,
        )
    return dB
