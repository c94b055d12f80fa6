"""Triton kernels for layers whose own product is computed together with the delta; names as in `triton_kernels.py`.

The layers of a group get the same input. Member j of M has columns j K to (j + 1) K of P and dP `[T, M K]`. KP and ZP
cover the padding of rows of P and Z, K2 and ZD whole rows, and ZU is Z without padding.
`triton_ops.py` launches them; README.md has the derivation.
"""

import os

import triton
import triton.language as tl

from .triton_kernels import (
    _keep,
    _keys,
    _load_logits,
    _mix_backward_rows,
    _mix_rows,
    _softmax,
    _top_k_logits,
)


# The interpreter multiplies the bit patterns of bfloat16.
_WIDEN = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _dot(a, b, total):
    """`total + a @ b`, without rounding float32 to fewer bits."""
    if _WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _project(
    x_ptr,
    down_ptr,
    rows,
    row_mask,
    D_IN: tl.constexpr,
    K: tl.constexpr,
    K2: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`x down^T` of the tokens `rows`, `[BLOCK_T, K2]`."""
    ks = tl.arange(0, K2)
    total = tl.zeros([BLOCK_T, K2], dtype=tl.float32)
    for start in range(0, D_IN, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = columns < D_IN
        x = tl.load(
            x_ptr + rows[:, None] * D_IN + columns[None, :], mask=row_mask[:, None] & inside[None, :], other=0.0
        )
        down = tl.load(
            down_ptr + ks[None, :] * D_IN + columns[:, None], mask=(ks < K)[None, :] & inside[:, None], other=0.0
        )
        total = _dot(x, down, total)
    return total


# One program per block of BLOCK_T tokens, for member MEMBER of a group.
#
#     P = x down^T        Z = mix(P)        out = Z, or with EXPAND  y = Z up^T (+ bias)
#
# Loads x [T, d_in], down [K, d_in], with LOGITS rows of a table [tasks + 1, N] instead of the router's logits (the row
# for each token if TASKS, else the first; a negative one is the last), and if needed up [d_out, Z], bias [d_out] and
# the token mask [T]. Stores P, and Z [T, Z] or y [T, d_out], and with STATS a row of partials.
@triton.jit(do_not_specialize=["tokens", "tasks", "low", "high", "threshold", "keep_scale"])
def project_kernel(
    x_ptr,
    down_ptr,
    up_ptr,
    bias_ptr,
    table_ptr,
    tasks_ptr,
    p_ptr,
    out_ptr,
    partials_ptr,
    mask_ptr,
    tokens,
    tasks,
    low,
    high,
    threshold,
    keep_scale,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    MEMBER: tl.constexpr,
    MEMBERS: tl.constexpr,
    K: tl.constexpr,
    K2: tl.constexpr,
    Z: tl.constexpr,
    ZP: tl.constexpr,
    ZD: tl.constexpr,
    R: tl.constexpr,
    R2: tl.constexpr,
    N: tl.constexpr,
    N2: tl.constexpr,
    ROUTED: tl.constexpr,
    ANCHORED: tl.constexpr,
    SHARED: tl.constexpr,
    TOP_K: tl.constexpr,
    DROPOUT: tl.constexpr,
    STATS: tl.constexpr,
    MASKED: tl.constexpr,
    LOGITS: tl.constexpr,
    TASKS: tl.constexpr,
    EXPAND: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_mask = rows < tokens
    first, second = _keys(low, high, p_ptr, False)
    H: tl.constexpr = R if SHARED else N * R

    # P, in global memory: the rest of the program reads columns of it.
    p = _project(x_ptr, down_ptr, rows, row_mask, D_IN, K, K2, BLOCK_T, BLOCK_D)
    p_row = p_ptr + rows * (MEMBERS * K) + MEMBER * K
    ks = tl.arange(0, K2)
    stored = (ks < K) & ((ks < H) | (ks >= H + N)) if LOGITS else ks < K
    tl.store(p_row[:, None] + ks[None, :], p.to(p_ptr.dtype.element_ty), mask=row_mask[:, None] & stored[None, :])
    if LOGITS:
        heads = tl.arange(0, N2)
        task = tl.zeros([BLOCK_T], dtype=tl.int64)
        if TASKS:
            task = tl.load(tasks_ptr + rows, mask=row_mask, other=0).to(tl.int64)
            task = tl.where(task < 0, tasks, task)
        routed = row_mask[:, None] & (heads < N)[None, :]
        logits = tl.load(table_ptr + task[:, None] * N + heads[None, :], mask=routed, other=0.0)
        tl.store(p_row[:, None] + H + heads[None, :], logits.to(p_ptr.dtype.element_ty), mask=routed)
    tl.debug_barrier()

    # Z; where y follows, in the first columns of its rows.
    OUT: tl.constexpr = D_OUT if EXPAND else Z
    out_row = out_ptr + rows * OUT
    target = partials_ptr + tl.program_id(0) * (3 + 3 * N)
    _mix_rows(
        p_row,
        out_row,
        target,
        mask_ptr,
        rows,
        row_mask,
        first,
        second,
        threshold,
        keep_scale,
        Z,
        ZP,
        R,
        R2,
        N,
        N2,
        ROUTED,
        ANCHORED,
        SHARED,
        TOP_K,
        DROPOUT,
        STATS,
        MASKED,
        BLOCK_T,
    )

    # y = Z up^T
    if EXPAND:
        tl.debug_barrier()
        zs = tl.arange(0, ZD)
        z = tl.load(out_row[:, None] + zs[None, :], mask=row_mask[:, None] & (zs < Z)[None, :], other=0.0)
        tl.debug_barrier()
        for start in range(0, D_OUT, BLOCK_O):
            columns = start + tl.arange(0, BLOCK_O)
            inside = columns < D_OUT
            up = tl.load(
                up_ptr + columns[None, :] * Z + zs[:, None], mask=(zs < Z)[:, None] & inside[None, :], other=0.0
            )  # [ZD, BLOCK_O]
            y = _dot(z, up, tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32))
            if BIAS:
                y += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
            tl.store(
                out_row[:, None] + columns[None, :],
                y.to(out_ptr.dtype.element_ty),
                mask=row_mask[:, None] & inside[None, :],
            )


@triton.jit
def _head_factors(
    p_row,
    rows,
    row_mask,
    first,
    second,
    threshold,
    keep_scale,
    scaling,
    R: tl.constexpr,
    N: tl.constexpr,
    N2: tl.constexpr,
    G2: tl.constexpr,
    ROUTED: tl.constexpr,
    SHARED: tl.constexpr,
    TOP_K: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """`scaling w_i (m_i . h) / (1 - p)` of all heads side by side, `[BLOCK_T, G2]`; zeros beyond N R."""
    columns = tl.arange(0, G2)
    used = columns < N * R
    head = columns // R
    H: tl.constexpr = R if SHARED else N * R
    inside = row_mask[:, None] & used[None, :]
    of_h = columns % R if SHARED else columns
    factor = tl.load(p_row[:, None] + of_h[None, :], mask=inside, other=0.0).to(tl.float32) * scaling

    # The weight of the head of each column.
    if ROUTED:
        logits = _load_logits(p_row, row_mask, tl.arange(0, N2), H, N)
        if TOP_K > 0:
            logits = _top_k_logits(logits, tl.arange(0, N2), N, TOP_K)
        weights, _ = _softmax(logits)
        spread = tl.zeros_like(factor)
        for i in tl.static_range(N):
            wi = tl.sum(tl.where((tl.arange(0, N2) == i)[None, :], weights, 0.0), axis=1)
            spread += tl.where((head == i)[None, :], wi[:, None], 0.0)
        factor *= spread
    else:
        factor *= 1.0 / N
    if DROPOUT:
        keep = _keep(rows, 0, columns, first, second, threshold, 1, N * R)  # index (t N + i) R + k = t N R + column
        factor = tl.where(keep, factor * keep_scale, 0.0)
    return tl.where(used[None, :], factor, 0.0)


# One program per strip of BLOCK_D columns of dy and per share of BLOCKS BLOCK_T tokens. It reads dy once:
#
#     dZ = dy up        dB = dy^T heads,  with the factor `heads` computed here from P
#
# Loads dy [T, d_out], up [d_out, Z] and P. Stores the part of dZ from each strip, [strips, T, Z], and the part of dB
# from each share, [shares, d_out, N R].
@triton.jit(do_not_specialize=["tokens", "low", "high", "threshold", "keep_scale", "scaling"])
def split_gradient_kernel(
    dy_ptr,
    up_ptr,
    p_ptr,
    dz_ptr,
    db_ptr,
    tokens,
    low,
    high,
    threshold,
    keep_scale,
    scaling,
    D_OUT: tl.constexpr,
    MEMBER: tl.constexpr,
    MEMBERS: tl.constexpr,
    K: tl.constexpr,
    Z: tl.constexpr,
    ZU: tl.constexpr,
    ZD: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    N2: tl.constexpr,
    G2: tl.constexpr,
    ROUTED: tl.constexpr,
    SHARED: tl.constexpr,
    TOP_K: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    STRIPS: tl.constexpr = (D_OUT + BLOCK_D - 1) // BLOCK_D
    strip = tl.program_id(0) % STRIPS
    part = (tl.program_id(0) // STRIPS).to(tl.int64)
    first, second = _keys(low, high, p_ptr, False)
    columns = strip * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D_OUT
    zs = tl.arange(0, ZD)
    gs = tl.arange(0, G2)
    up = tl.load(up_ptr + columns[:, None] * Z + zs[None, :], mask=inside[:, None] & (zs < Z)[None, :], other=0.0)
    db = tl.zeros([BLOCK_D, G2], dtype=tl.float32)

    # A number of blocks that the compiler knows lets it load the next block during the products of this one.
    for block in range(BLOCKS):
        rows = (part * BLOCKS + block) * BLOCK_T + tl.arange(0, BLOCK_T)
        row_mask = rows < tokens
        dy = tl.load(
            dy_ptr + rows[:, None] * D_OUT + columns[None, :], mask=row_mask[:, None] & inside[None, :], other=0.0
        )
        dz = _dot(dy, up, tl.zeros([BLOCK_T, ZD], dtype=tl.float32))
        dz_row = dz_ptr + (strip * tokens + rows) * ZU
        tl.store(dz_row[:, None] + zs[None, :], dz, mask=row_mask[:, None] & (zs < ZU)[None, :])

        p_row = p_ptr + rows * (MEMBERS * K) + MEMBER * K
        heads = _head_factors(
            p_row,
            rows,
            row_mask,
            first,
            second,
            threshold,
            keep_scale,
            scaling,
            R,
            N,
            N2,
            G2,
            ROUTED,
            SHARED,
            TOP_K,
            DROPOUT,
        )
        db = _dot(tl.trans(dy), heads.to(dy.dtype), db)

    target = db_ptr + (part * D_OUT + columns) * (N * R)
    tl.store(target[:, None] + gs[None, :], db, mask=inside[:, None] & (gs < N * R)[None, :])


# The first programs: one per block of BLOCK_T tokens. The others: one per block of BLOCK_B elements of dB.
#
# Loads the parts of dZ and dB that `split_gradient_kernel` stores, and P; dZ becomes its own sum in its first part.
# Stores dP (see `_mix_backward_rows`) and dB [N, d_out, R].
@triton.jit(do_not_specialize=["tokens", "shares", "low", "high", "threshold", "keep_scale", "scaling"])
def join_gradient_kernel(
    p_ptr,
    dz_ptr,
    db_parts_ptr,
    dp_ptr,
    db_ptr,
    coeffs_ptr,
    mask_ptr,
    tokens,
    shares,
    low,
    high,
    threshold,
    keep_scale,
    scaling,
    D_OUT: tl.constexpr,
    STRIPS: tl.constexpr,
    MEMBER: tl.constexpr,
    MEMBERS: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    ZU: tl.constexpr,
    ZD: tl.constexpr,
    R: tl.constexpr,
    R2: tl.constexpr,
    N: tl.constexpr,
    N2: tl.constexpr,
    ROUTED: tl.constexpr,
    ANCHORED: tl.constexpr,
    SHARED: tl.constexpr,
    TOP_K: tl.constexpr,
    DROPOUT: tl.constexpr,
    BALANCED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    blocks = (tokens + BLOCK_T - 1) // BLOCK_T
    if tl.program_id(0) < blocks:
        rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        row_mask = rows < tokens
        first, second = _keys(low, high, p_ptr, False)

        # The sum of the strips.
        zs = tl.arange(0, ZD)
        inside = row_mask[:, None] & (zs < ZU)[None, :]
        dz_row = dz_ptr + rows * ZU
        part = dz_row[:, None] + zs[None, :]
        dz = tl.zeros([BLOCK_T, ZD], dtype=tl.float32)
        for strip in range(STRIPS):
            dz += tl.load(part + strip * tokens.to(tl.int64) * ZU, mask=inside, other=0.0)
        tl.store(part, dz, mask=inside)
        tl.debug_barrier()

        p_row = p_ptr + rows * (MEMBERS * K) + MEMBER * K
        _mix_backward_rows(
            p_row,
            dz_row,
            dz_row,
            dp_ptr + rows * (MEMBERS * K) + MEMBER * K,
            coeffs_ptr,
            mask_ptr,
            rows,
            row_mask,
            first,
            second,
            threshold,
            keep_scale,
            scaling,
            K,
            KP,
            N * R,
            1,
            R,
            R2,
            N,
            N2,
            ROUTED,
            ANCHORED,
            SHARED,
            TOP_K,
            DROPOUT,
            BALANCED,
            MASKED,
            False,
            BLOCK_T,
        )
    else:
        # dB from the shares of the tokens, with the heads one after another.
        SIZE: tl.constexpr = N * D_OUT * R
        index = (tl.program_id(0) - blocks).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
        used = index < SIZE
        head = index // (D_OUT * R)
        source = (index // R) % D_OUT * (N * R) + head * R + index % R
        total = tl.zeros([BLOCK_B], dtype=tl.float32)
        share = 0
        while share < shares:
            total += tl.load(db_parts_ptr + source, mask=used, other=0.0)
            source += SIZE
            share += 1
        tl.store(db_ptr + index, total.to(db_ptr.dtype.element_ty), mask=used)
