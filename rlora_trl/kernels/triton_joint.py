"""Triton kernels for layers whose own product is computed together with the delta; names as in `triton_kernels.py`.

The layers of a group get the same input. Member j of M has columns j K to (j + 1) K of P and dP `[T, M K]`. KP and ZP
cover the padding of rows of P and Z, K2 and ZD whole rows, and ZU is Z without padding.
`joint_ops.py` launches them; README.md has the derivation.
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


@triton.jit
def _store_logits(
    p_row,
    row_mask,
    table_ptr,
    tasks_ptr,
    rows,
    last,
    H: tl.constexpr,
    N: tl.constexpr,
    N2: tl.constexpr,
    TASKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Store rows of a table as the logits in P: the row of each token's task (a negative one is the last), or one."""
    heads = tl.arange(0, N2)
    task = tl.zeros([BLOCK_T], dtype=tl.int64)
    if TASKS:
        task = tl.load(tasks_ptr + rows, mask=row_mask, other=0).to(tl.int64)
        task = tl.where(task < 0, last, task)
    routed = row_mask[:, None] & (heads < N)[None, :]
    logits = tl.load(table_ptr + task[:, None] * N + heads[None, :], mask=routed, other=0.0)
    tl.store(p_row[:, None] + H + heads[None, :], logits.to(p_row.dtype.element_ty), mask=routed)


@triton.jit
def _expand(
    z_row,
    up_ptr,
    bias_ptr,
    row_mask,
    D_OUT: tl.constexpr,
    Z: tl.constexpr,
    ZD: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Replace rows of the output, which begin with Z, by `Z up^T` plus the bias."""
    zs = tl.arange(0, ZD)
    z = tl.load(z_row[:, None] + zs[None, :], mask=row_mask[:, None] & (zs < Z)[None, :], other=0.0)
    tl.debug_barrier()
    for start in range(0, D_OUT, BLOCK_O):
        columns = start + tl.arange(0, BLOCK_O)
        inside = columns < D_OUT
        of_up = (zs < Z)[:, None] & inside[None, :]  # [ZD, BLOCK_O]
        up = tl.load(up_ptr + columns[None, :] * Z + zs[:, None], mask=of_up, other=0.0)
        y = _dot(z, up, tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32))
        if BIAS:
            y += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        stored = row_mask[:, None] & inside[None, :]
        tl.store(z_row[:, None] + columns[None, :], y.to(z_row.dtype.element_ty), mask=stored)


@triton.jit
def _project_member(
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
    last,
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
    """`project_kernel` for one member and one block of tokens."""
    block = tl.program_id(0) // MEMBERS
    rows = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_mask = rows < tokens
    first, second = _keys(low, high, p_ptr, False)
    H: tl.constexpr = R if SHARED else N * R

    # P, in global memory: the rest of the program reads columns of it.
    p = _project(x_ptr, down_ptr + MEMBER * K * D_IN, rows, row_mask, D_IN, K, K2, BLOCK_T, BLOCK_D)
    p_row = p_ptr + rows * (MEMBERS * K) + MEMBER * K
    ks = tl.arange(0, K2)
    stored = (ks < K) & ((ks < H) | (ks >= H + N)) if LOGITS else ks < K
    tl.store(p_row[:, None] + ks[None, :], p.to(p_ptr.dtype.element_ty), mask=row_mask[:, None] & stored[None, :])
    if LOGITS:
        _store_logits(p_row, row_mask, table_ptr, tasks_ptr, rows, last, H, N, N2, TASKS, BLOCK_T)
    tl.debug_barrier()

    # Z; where y follows, in the first columns of its rows.
    OUT: tl.constexpr = D_OUT if EXPAND else Z
    out_row = out_ptr + rows * OUT
    blocks = (tokens + BLOCK_T - 1) // BLOCK_T
    _mix_rows(
        p_row,
        out_row,
        partials_ptr + (MEMBER * blocks + block) * (3 + 3 * N),
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
    if EXPAND:
        tl.debug_barrier()
        _expand(out_row, up_ptr, bias_ptr, row_mask, D_OUT, Z, ZD, BIAS, BLOCK_T, BLOCK_O)


# One program per block of BLOCK_T tokens and member.
#
#     P = x down^T        Z = mix(P)        out = Z, or with EXPAND  y = Z up^T (+ bias)
#
# Loads x [T, d_in], downs [M K, d_in], with LOGITS rows of tables instead of the router's logits, and if needed
# up [d_out, Z], bias [d_out] and the token mask [T]. Stores P, and Z [T, Z] or y [T, d_out], and with STATS
# partials [M, T / BLOCK_T, 3 + 3 N].
@triton.jit(
    do_not_specialize=[
        "tokens",
        "last",
        "low0",
        "high0",
        "low1",
        "high1",
        "low2",
        "high2",
        "threshold",
        "keep_scale",
    ]
)
def project_kernel(
    x_ptr,
    down_ptr,
    tasks_ptr,
    p_ptr,
    partials_ptr,
    mask_ptr,
    up0_ptr,
    bias0_ptr,
    table0_ptr,
    out0_ptr,
    up1_ptr,
    bias1_ptr,
    table1_ptr,
    out1_ptr,
    up2_ptr,
    bias2_ptr,
    table2_ptr,
    out2_ptr,
    tokens,
    last,
    low0,
    high0,
    low1,
    high1,
    low2,
    high2,
    threshold,
    keep_scale,
    D_IN: tl.constexpr,
    D_OUT0: tl.constexpr,
    D_OUT1: tl.constexpr,
    D_OUT2: tl.constexpr,
    MEMBERS: tl.constexpr,
    BIAS0: tl.constexpr,
    BIAS1: tl.constexpr,
    BIAS2: tl.constexpr,
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
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    member = tl.program_id(0) % MEMBERS
    # Written out for each member, as pointers that a program chooses between would lose their alignment.
    if member == 0:
        _project_member(
            x_ptr,
            down_ptr,
            up0_ptr,
            bias0_ptr,
            table0_ptr,
            tasks_ptr,
            p_ptr,
            out0_ptr,
            partials_ptr,
            mask_ptr,
            tokens,
            last,
            low0,
            high0,
            threshold,
            keep_scale,
            D_IN,
            D_OUT0,
            0,
            MEMBERS,
            K,
            K2,
            Z,
            ZP,
            ZD,
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
            LOGITS,
            TASKS,
            EXPAND,
            BIAS0,
            BLOCK_T,
            BLOCK_D,
            BLOCK_O,
        )
    if MEMBERS > 1:
        if member == 1:
            _project_member(
                x_ptr,
                down_ptr,
                up1_ptr,
                bias1_ptr,
                table1_ptr,
                tasks_ptr,
                p_ptr,
                out1_ptr,
                partials_ptr,
                mask_ptr,
                tokens,
                last,
                low1,
                high1,
                threshold,
                keep_scale,
                D_IN,
                D_OUT1,
                1,
                MEMBERS,
                K,
                K2,
                Z,
                ZP,
                ZD,
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
                LOGITS,
                TASKS,
                EXPAND,
                BIAS1,
                BLOCK_T,
                BLOCK_D,
                BLOCK_O,
            )
    if MEMBERS > 2:
        if member == 2:
            _project_member(
                x_ptr,
                down_ptr,
                up2_ptr,
                bias2_ptr,
                table2_ptr,
                tasks_ptr,
                p_ptr,
                out2_ptr,
                partials_ptr,
                mask_ptr,
                tokens,
                last,
                low2,
                high2,
                threshold,
                keep_scale,
                D_IN,
                D_OUT2,
                2,
                MEMBERS,
                K,
                K2,
                Z,
                ZP,
                ZD,
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
                LOGITS,
                TASKS,
                EXPAND,
                BIAS2,
                BLOCK_T,
                BLOCK_D,
                BLOCK_O,
            )


@triton.jit
def _parts_start(tokens, WIDTH: tl.constexpr):
    """Where the parts of dB begin in the buffer, after those of dZ `[strips, T, ZU]`: see `_Plan.parts_start`."""
    return (tokens.to(tl.int64) * WIDTH + 15) // 16 * 16


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


@triton.jit
def _split_member(
    program,
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
    """`split_gradient_kernel` for one member, one of its strips and one share of the tokens."""
    STRIPS: tl.constexpr = (D_OUT + BLOCK_D - 1) // BLOCK_D
    strip = program % STRIPS
    part = (program // STRIPS).to(tl.int64)
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
        of_dy = row_mask[:, None] & inside[None, :]
        dy = tl.load(dy_ptr + rows[:, None] * D_OUT + columns[None, :], mask=of_dy, other=0.0)
        dz = _dot(dy, up, tl.zeros([BLOCK_T, ZD], dtype=tl.float32))
        dz_row = dz_ptr + (strip * tokens + rows) * ZU
        tl.store(dz_row[:, None] + zs[None, :], dz, mask=row_mask[:, None] & (zs < ZU)[None, :])

        heads = _head_factors(
            p_ptr + rows * (MEMBERS * K) + MEMBER * K,
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


# One program per member, strip of BLOCK_D columns of its dy, and share of BLOCKS BLOCK_T tokens. It reads dy once:
#
#     dZ = dy up        dB = dy^T heads,  with the factor `heads` computed here from P
#
# Loads dy [T, d_out] and up [d_out, Z] of all members, and P. Stores in one buffer the part of dZ from each strip,
# [strips, T, ZU], and the part of dB from each share, [shares, d_out, N R], one member after another in both.
@triton.jit(
    do_not_specialize=[
        "tokens",
        "shares",
        "low0",
        "high0",
        "low1",
        "high1",
        "low2",
        "high2",
        "threshold",
        "keep_scale",
        "scaling",
    ]
)
def split_gradient_kernel(
    p_ptr,
    parts_ptr,
    dy0_ptr,
    up0_ptr,
    dy1_ptr,
    up1_ptr,
    dy2_ptr,
    up2_ptr,
    tokens,
    shares,
    low0,
    high0,
    low1,
    high1,
    low2,
    high2,
    threshold,
    keep_scale,
    scaling,
    D_OUT0: tl.constexpr,
    D_OUT1: tl.constexpr,
    D_OUT2: tl.constexpr,
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
    program = tl.program_id(0)
    STRIPS0: tl.constexpr = (D_OUT0 + BLOCK_D - 1) // BLOCK_D
    STRIPS1: tl.constexpr = STRIPS0 + (D_OUT1 + BLOCK_D - 1) // BLOCK_D
    STRIPS: tl.constexpr = STRIPS1 + (D_OUT2 + BLOCK_D - 1) // BLOCK_D
    end0 = STRIPS0 * shares
    end1 = STRIPS1 * shares
    dz_ptr = parts_ptr
    db_ptr = parts_ptr + _parts_start(tokens, STRIPS * ZU)
    # Written out for each member, as in `project_kernel`.
    if program < end0:
        _split_member(
            program,
            dy0_ptr,
            up0_ptr,
            p_ptr,
            dz_ptr,
            db_ptr,
            tokens,
            low0,
            high0,
            threshold,
            keep_scale,
            scaling,
            D_OUT0,
            0,
            MEMBERS,
            K,
            Z,
            ZU,
            ZD,
            R,
            N,
            N2,
            G2,
            ROUTED,
            SHARED,
            TOP_K,
            DROPOUT,
            BLOCKS,
            BLOCK_T,
            BLOCK_D,
        )
    if MEMBERS > 1:
        if (program >= end0) & (program < end1):
            _split_member(
                program - end0,
                dy1_ptr,
                up1_ptr,
                p_ptr,
                dz_ptr + tokens.to(tl.int64) * (STRIPS0 * ZU),
                db_ptr + shares.to(tl.int64) * (D_OUT0 * N * R),
                tokens,
                low1,
                high1,
                threshold,
                keep_scale,
                scaling,
                D_OUT1,
                1,
                MEMBERS,
                K,
                Z,
                ZU,
                ZD,
                R,
                N,
                N2,
                G2,
                ROUTED,
                SHARED,
                TOP_K,
                DROPOUT,
                BLOCKS,
                BLOCK_T,
                BLOCK_D,
            )
    if MEMBERS > 2:
        if program >= end1:
            _split_member(
                program - end1,
                dy2_ptr,
                up2_ptr,
                p_ptr,
                dz_ptr + tokens.to(tl.int64) * (STRIPS1 * ZU),
                db_ptr + shares.to(tl.int64) * ((D_OUT0 + D_OUT1) * N * R),
                tokens,
                low2,
                high2,
                threshold,
                keep_scale,
                scaling,
                D_OUT2,
                2,
                MEMBERS,
                K,
                Z,
                ZU,
                ZD,
                R,
                N,
                N2,
                G2,
                ROUTED,
                SHARED,
                TOP_K,
                DROPOUT,
                BLOCKS,
                BLOCK_T,
                BLOCK_D,
            )


@triton.jit
def _join_rows(
    block,
    p_ptr,
    dz_ptr,
    dp_ptr,
    coeffs_ptr,
    mask_ptr,
    tokens,
    low,
    high,
    threshold,
    keep_scale,
    scaling,
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
):
    """dP of one member for a block of tokens, from the parts of dZ."""
    rows = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_mask = rows < tokens
    first, second = _keys(low, high, p_ptr, False)

    # The sum of the strips, in place of the first.
    zs = tl.arange(0, ZD)
    inside = row_mask[:, None] & (zs < ZU)[None, :]
    dz_row = dz_ptr + rows * ZU
    part = dz_row[:, None] + zs[None, :]
    dz = tl.zeros([BLOCK_T, ZD], dtype=tl.float32)
    for strip in range(STRIPS):
        dz += tl.load(part + strip * tokens.to(tl.int64) * ZU, mask=inside, other=0.0)
    tl.store(part, dz, mask=inside)
    tl.debug_barrier()

    _mix_backward_rows(
        p_ptr + rows * (MEMBERS * K) + MEMBER * K,
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


@triton.jit
def _join_heads(
    block,
    parts_ptr,
    db_ptr,
    shares,
    D_OUT: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """A block of dB `[N, d_out, R]` of one member, from the parts `[shares, d_out, N R]`."""
    SIZE: tl.constexpr = N * D_OUT * R
    index = block.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    used = index < SIZE
    source = (index // R) % D_OUT * (N * R) + index // (D_OUT * R) * R + index % R
    total = tl.zeros([BLOCK_B], dtype=tl.float32)
    share = 0
    while share < shares:  # `range` of a number that is not a constant fails in the interpreter
        total += tl.load(parts_ptr + source, mask=used, other=0.0)
        source += SIZE
        share += 1
    tl.store(db_ptr + index, total.to(db_ptr.dtype.element_ty), mask=used)


@triton.jit
def _input_gradient_rows(
    block,
    dp_ptr,
    down_ptr,
    dx_ptr,
    tokens,
    D_IN: tl.constexpr,
    MK: tl.constexpr,
    MK2: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """`dP downs` for a block of tokens."""
    rows = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_mask = rows < tokens
    ks = tl.arange(0, MK2)
    used = ks < MK
    dp = tl.load(dp_ptr + rows[:, None] * MK + ks[None, :], mask=row_mask[:, None] & used[None, :], other=0.0)
    for start in range(0, D_IN, BLOCK_X):
        columns = start + tl.arange(0, BLOCK_X)
        inside = columns < D_IN
        of_down = used[:, None] & inside[None, :]  # [MK2, BLOCK_X]
        down = tl.load(down_ptr + ks[:, None] * D_IN + columns[None, :], mask=of_down, other=0.0)
        dx = _dot(dp, down, tl.zeros([BLOCK_T, BLOCK_X], dtype=tl.float32))
        stored = row_mask[:, None] & inside[None, :]
        tl.store(dx_ptr + rows[:, None] * D_IN + columns[None, :], dx.to(dx_ptr.dtype.element_ty), mask=stored)


# For one member after another, one program per block of BLOCK_T tokens; then one per block of BLOCK_B elements of dB.
# With DX, one program per block of tokens does those of all members.
#
# Loads the parts of dZ and dB that `split_gradient_kernel` stores, and P. Stores dP (see `_mix_backward_rows`),
# dB [N, d_out, R] of each member, and with DX dx = dP downs [T, d_in].
@triton.jit(
    do_not_specialize=[
        "tokens",
        "shares",
        "low0",
        "high0",
        "low1",
        "high1",
        "low2",
        "high2",
        "threshold",
        "keep_scale",
        "scaling",
    ]
)
def join_gradient_kernel(
    p_ptr,
    parts_ptr,
    dp_ptr,
    down_ptr,
    dx_ptr,
    mask_ptr,
    coeffs0_ptr,
    db0_ptr,
    coeffs1_ptr,
    db1_ptr,
    coeffs2_ptr,
    db2_ptr,
    tokens,
    shares,
    low0,
    high0,
    low1,
    high1,
    low2,
    high2,
    threshold,
    keep_scale,
    scaling,
    D_IN: tl.constexpr,
    D_OUT0: tl.constexpr,
    D_OUT1: tl.constexpr,
    D_OUT2: tl.constexpr,
    STRIPS0: tl.constexpr,
    STRIPS1: tl.constexpr,
    STRIPS2: tl.constexpr,
    MEMBERS: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    MK2: tl.constexpr,
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
    DX: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    program = tl.program_id(0)
    blocks = (tokens + BLOCK_T - 1) // BLOCK_T
    before1 = tokens.to(tl.int64) * (STRIPS0 * ZU)
    before2 = tokens.to(tl.int64) * ((STRIPS0 + STRIPS1) * ZU)
    dz_ptr = parts_ptr
    db_ptr = parts_ptr + _parts_start(tokens, (STRIPS0 + STRIPS1 + STRIPS2) * ZU)
    # The programs of the next member.
    begin1 = 0 if DX else blocks
    begin2 = 0 if DX else 2 * blocks
    rows_end = blocks if DX else MEMBERS * blocks
    # Written out for each member, as in `project_kernel`.
    if program < blocks:
        _join_rows(
            program,
            p_ptr,
            dz_ptr,
            dp_ptr,
            coeffs0_ptr,
            mask_ptr,
            tokens,
            low0,
            high0,
            threshold,
            keep_scale,
            scaling,
            STRIPS0,
            0,
            MEMBERS,
            K,
            KP,
            ZU,
            ZD,
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
            BLOCK_T,
        )
    if MEMBERS > 1:
        if (program >= begin1) & (program < begin1 + blocks):
            _join_rows(
                program - begin1,
                p_ptr,
                dz_ptr + before1,
                dp_ptr,
                coeffs1_ptr,
                mask_ptr,
                tokens,
                low1,
                high1,
                threshold,
                keep_scale,
                scaling,
                STRIPS1,
                1,
                MEMBERS,
                K,
                KP,
                ZU,
                ZD,
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
                BLOCK_T,
            )
    if MEMBERS > 2:
        if (program >= begin2) & (program < begin2 + blocks):
            _join_rows(
                program - begin2,
                p_ptr,
                dz_ptr + before2,
                dp_ptr,
                coeffs2_ptr,
                mask_ptr,
                tokens,
                low2,
                high2,
                threshold,
                keep_scale,
                scaling,
                STRIPS2,
                2,
                MEMBERS,
                K,
                KP,
                ZU,
                ZD,
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
                BLOCK_T,
            )

    if DX:
        if program < blocks:
            tl.debug_barrier()
            _input_gradient_rows(program, dp_ptr, down_ptr, dx_ptr, tokens, D_IN, MEMBERS * K, MK2, BLOCK_T, BLOCK_X)

    # dB of each member.
    PROGRAMS0: tl.constexpr = (N * D_OUT0 * R + BLOCK_B - 1) // BLOCK_B
    PROGRAMS1: tl.constexpr = PROGRAMS0 + (N * D_OUT1 * R + BLOCK_B - 1) // BLOCK_B
    left = program - rows_end
    if (left >= 0) & (left < PROGRAMS0):
        _join_heads(left, db_ptr, db0_ptr, shares, D_OUT0, R, N, BLOCK_B)
    if MEMBERS > 1:
        if (left >= PROGRAMS0) & (left < PROGRAMS1):
            parts1 = db_ptr + shares.to(tl.int64) * (D_OUT0 * N * R)
            _join_heads(left - PROGRAMS0, parts1, db1_ptr, shares, D_OUT1, R, N, BLOCK_B)
    if MEMBERS > 2:
        if left >= PROGRAMS1:
            parts2 = db_ptr + shares.to(tl.int64) * ((D_OUT0 + D_OUT1) * N * R)
            _join_heads(left - PROGRAMS1, parts2, db2_ptr, shares, D_OUT2, R, N, BLOCK_B)
