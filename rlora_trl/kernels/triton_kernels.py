"""Triton kernels for the rank-space functions, and for concatenating the small weights.

The function of the same name in `triton_ops.py` launches each; its twin in `rank_space.py` has the same arguments and
results, and README.md the derivation.

Names in all kernels: T tokens, N heads, rank R, H columns of A x (R if all heads share A, else N R). `R2`, `N2`, `Z2`
and the like are powers of two that cover R, N and the padding of a row. Rows of P and Z:

    P  [T, K] = [A x (H); logits (N, if ROUTED); A0 x (H, if ANCHORED); zeros]
    Z  [T, Z] = [z_1 .. z_N (N R); A0 x (H, if ANCHORED); zeros]

Arithmetic is in float32; loads convert from, and stores to, the dtype of the tensors.
"""

import triton
import triton.language as tl


@triton.jit
def _mix32(v):
    """`dropout._mix32` in 32-bit arithmetic, which wraps."""
    v = v ^ (v >> 16)
    v = v * 0x7FEB352D
    v = v ^ (v >> 15)
    v = v * 0x846CA68B
    return v ^ (v >> 16)


@triton.jit
def _keys(low, high, seed_ptr, SEED_IN_MEMORY: tl.constexpr):
    """The two keys of a mask, as in `dropout.mask_parameters`, from a seed in two halves or in memory."""
    if SEED_IN_MEMORY:
        seed = tl.load(seed_ptr).to(tl.uint64, bitcast=True)
    else:
        upper = high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32
        seed = upper | low.to(tl.uint32, bitcast=True).to(tl.uint64)
    value = seed + 0x9E3779B97F4A7C15
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    value = value ^ (value >> 31)
    return value.to(tl.uint32), (value >> 32).to(tl.uint32)


@triton.jit
def _keep(rows, head, columns, first, second, threshold, N: tl.constexpr, R: tl.constexpr):
    """The mask of one head `[BLOCK_T, R2]`: the bits of `dropout.keep_mask`."""
    token = rows.to(tl.uint32)
    index = (token[:, None] * N + head) * R + columns[None, :].to(tl.uint32)
    bits = _mix32(_mix32(index + first) ^ second)
    return bits >= threshold.to(tl.uint32, bitcast=True)


@triton.jit
def _softmax(logits):
    """
    Probabilities `[BLOCK_T, N2]` and the log-sum-exp `[BLOCK_T]`; logits beyond N are minus infinity.

    The division is rounded correctly, so that equal logits give exactly 1 / N.
    """
    top = tl.max(logits, axis=1)
    e = tl.exp(logits - top[:, None])
    total = tl.sum(e, axis=1)
    return tl.div_rn(e, tl.broadcast_to(total[:, None], e.shape)), top + tl.log(total)


@triton.jit
def _top_k_logits(logits, heads, N: tl.constexpr, TOP_K: tl.constexpr):
    """The logits with all but the TOP_K largest at minus infinity; of equal ones the first stay."""
    larger = tl.zeros_like(logits)
    for j in tl.static_range(N):
        other = tl.max(tl.where((heads == j)[None, :], logits, -float("inf")), axis=1)[:, None]
        before = (other > logits) | ((other == logits) & (j < heads)[None, :])
        larger += tl.where(before, 1.0, 0.0)
    return tl.where(larger < TOP_K, logits, -float("inf"))


@triton.jit
def _load_logits(p_row, row_mask, heads, H: tl.constexpr, N: tl.constexpr):
    """The logits `[BLOCK_T, N2]`, in columns H to H + N of P; minus infinity beyond N."""
    inside = row_mask[:, None] & (heads < N)[None, :]
    logits = tl.load(p_row[:, None] + H + heads[None, :], mask=inside, other=0.0).to(tl.float32)
    return tl.where((heads < N)[None, :], logits, -float("inf"))


@triton.jit
def _head_weights(p_row, row_mask, heads, H: tl.constexpr, N: tl.constexpr, ROUTED: tl.constexpr, TOP_K: tl.constexpr):
    """
    w `[BLOCK_T, N2]`, and what it comes from: logits, their softmax p, and their log-sum-exp `[BLOCK_T]`.

    Without logits w is 1 / N, and the other three are not used.
    """
    if ROUTED:
        logits = _load_logits(p_row, row_mask, heads, H, N)
        p, log_z = _softmax(logits)
        w = p
        if TOP_K > 0:
            w, _ = _softmax(_top_k_logits(logits, heads, N, TOP_K))
        return w, logits, p, log_z
    else:
        w = tl.where((heads < N)[None, :], 1.0 / N, 0.0) + tl.zeros_like(row_mask[:, None].to(tl.float32))
        return w, w, w, tl.zeros_like(row_mask.to(tl.float32))


@triton.jit
def _count_tokens(mask_ptr, rows, row_mask, MASKED: tl.constexpr):
    """One for the tokens that count, zero for the others, `[BLOCK_T]`."""
    if MASKED:
        token = tl.load(mask_ptr + rows, mask=row_mask, other=0)
        return tl.where(token != 0, 1.0, 0.0)
    else:
        return tl.where(row_mask, 1.0, 0.0)


@triton.jit
def _store_stats(target, logits, w, p, log_z, counted, heads, N: tl.constexpr):
    """Store the sums of `rank_space.routing_stats` over the tokens of one program: 3 + 3 N numbers at `target`."""
    in_use = (heads < N)[None, :]
    entropy = log_z - tl.sum(tl.where(in_use, p * logits, 0.0), axis=1)  # [BLOCK_T]
    top = tl.where((logits == tl.max(logits, axis=1)[:, None]) & in_use, 1.0, 0.0)  # [BLOCK_T, N2]
    share = top / tl.sum(top, axis=1)[:, None]

    # Selected rather than multiplied: padding may compute NaN.
    counts = counted > 0.0
    tl.store(target, tl.sum(counted, axis=0))
    tl.store(target + 1, tl.sum(tl.where(counts, log_z * log_z, 0.0), axis=0))
    tl.store(target + 2, tl.sum(tl.where(counts, entropy, 0.0), axis=0))
    tl.store(target + 3 + heads, tl.sum(tl.where(counts[:, None], share, 0.0), axis=0), mask=heads < N)
    tl.store(target + 3 + N + heads, tl.sum(tl.where(counts[:, None], p, 0.0), axis=0), mask=heads < N)
    tl.store(target + 3 + 2 * N + heads, tl.sum(tl.where(counts[:, None], w, 0.0), axis=0), mask=heads < N)


@triton.jit
def _mix_rows(
    p_row,
    z_row,
    target,
    mask_ptr,
    rows,
    row_mask,
    first,
    second,
    threshold,
    keep_scale,
    Z: tl.constexpr,
    Z2: tl.constexpr,
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
    BLOCK_T: tl.constexpr,
):
    """
    Store Z of the tokens `rows` from their P, and with STATS their sums at `target`.

        w = softmax(logits)        z_i = w_i (m_i . h_i) / (1 - p) - h0_i / N
    """
    columns = tl.arange(0, R2)
    heads = tl.arange(0, N2)
    inside = row_mask[:, None] & (columns < R)[None, :]  # [BLOCK_T, R2]
    H: tl.constexpr = R if SHARED else N * R
    anchor_start: tl.constexpr = H + N if ROUTED else H

    # Head weights, and their statistics.
    w, logits, p, log_z = _head_weights(p_row, row_mask, heads, H, N, ROUTED, TOP_K)
    if ROUTED and STATS:
        counted = _count_tokens(mask_ptr, rows, row_mask, MASKED)
        _store_stats(target, logits, w, p, log_z, counted, heads, N)

    # h and h0, once for all heads or once for each.
    if SHARED:
        h = tl.load(p_row[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        if ANCHORED:
            h0 = tl.load(p_row[:, None] + anchor_start + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    for i in tl.static_range(N):
        if not SHARED:
            h = tl.load(p_row[:, None] + i * R + columns[None, :], mask=inside, other=0.0).to(tl.float32)
            if ANCHORED:
                anchor = p_row[:, None] + anchor_start + i * R + columns[None, :]
                h0 = tl.load(anchor, mask=inside, other=0.0).to(tl.float32)
                head_h0 = z_row[:, None] + (N + i) * R + columns[None, :]
                tl.store(head_h0, h0.to(z_row.dtype.element_ty), mask=inside)

        # z_i = w_i (m_i . h) / (1 - p) - h0 / N, as terms that are zero one by one where h = h0 and w_i = 1 / N:
        # a fused multiply-add rounds one product of a difference and not the other.
        wi = tl.sum(tl.where((heads == i)[None, :], w, 0.0), axis=1)[:, None]  # [BLOCK_T, 1]
        kept = h
        if DROPOUT:
            kept = tl.where(_keep(rows, i, columns, first, second, threshold, N, R), h * keep_scale, 0.0)
        if ANCHORED:
            z = wi * (kept - h0) + (wi - 1.0 / N) * h0
        else:
            z = wi * kept
        tl.store(z_row[:, None] + i * R + columns[None, :], z.to(z_row.dtype.element_ty), mask=inside)

    # The shared h0, and the padding.
    used: tl.constexpr = N * R + H if ANCHORED else N * R
    if ANCHORED and SHARED:
        tl.store(z_row[:, None] + N * R + columns[None, :], h0.to(z_row.dtype.element_ty), mask=inside)
    if Z > used:
        pad = used + tl.arange(0, Z2)
        zero = tl.zeros([BLOCK_T, Z2], dtype=z_row.dtype.element_ty)
        tl.store(z_row[:, None] + pad[None, :], zero, mask=row_mask[:, None] & (pad < Z)[None, :])


# One program per block of BLOCK_T tokens; see `_mix_rows`.
#
# Loads a block of P [T, K], and the token mask [T] if MASKED. Stores the block of Z [T, Z], and with STATS a row of
# partials [T / BLOCK_T, 3 + 3 N].
@triton.jit(do_not_specialize=["tokens", "low", "high", "threshold", "keep_scale"])
def mix_kernel(
    p_ptr,
    z_ptr,
    partials_ptr,
    mask_ptr,
    seed_ptr,
    tokens,
    low,
    high,
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
    SHARED: tl.constexpr,
    TOP_K: tl.constexpr,
    DROPOUT: tl.constexpr,
    SEED_IN_MEMORY: tl.constexpr,
    STATS: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    first, second = _keys(low, high, seed_ptr, SEED_IN_MEMORY)
    _mix_rows(
        p_ptr + rows * K,
        z_ptr + rows * Z,
        partials_ptr + tl.program_id(0) * (3 + 3 * N),
        mask_ptr,
        rows,
        rows < tokens,
        first,
        second,
        threshold,
        keep_scale,
        Z,
        Z2,
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


@triton.jit
def _mix_backward_rows(
    p_row,
    dz_row,
    heads_row,
    dp_row,
    coeffs_ptr,
    mask_ptr,
    rows,
    row_mask,
    first,
    second,
    threshold,
    keep_scale,
    scaling,
    K: tl.constexpr,
    K2: tl.constexpr,
    G: tl.constexpr,
    G2: tl.constexpr,
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
    HEADS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """
    Store dP of the tokens `rows` from their P and dZ, and if HEADS the factor of dB. Masks and weights are recomputed.

        dm_i = m_i . dz_i / (1 - p)      dh = sum_i w_i dm_i        dh0 = dZ_last - sum_i dz_i / N
        dw_i = dm_i . h                  dl = w . (dw - sum_j w_j dw_j)
        heads_i = scaling w_i (m_i . h) / (1 - p)                   with dB = dy^T heads

    If BALANCED, the gradient of the balance loss with coefficients (a, e, z) is added:

        dl_j += p_j (a_j - sum_i a_i p_i - e (log p_j + H) + 2 z logsumexp)
    """
    columns = tl.arange(0, R2)
    heads = tl.arange(0, N2)
    inside = row_mask[:, None] & (columns < R)[None, :]  # [BLOCK_T, R2]
    H: tl.constexpr = R if SHARED else N * R
    anchor_start: tl.constexpr = H + N if ROUTED else H

    w, logits, p, log_z = _head_weights(p_row, row_mask, heads, H, N, ROUTED, TOP_K)

    # h and the gradient of h0, once for all heads or once for each.
    if SHARED:
        h = tl.load(p_row[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        dh = tl.zeros([BLOCK_T, R2], dtype=tl.float32)
        if ANCHORED:
            dh0 = tl.load(dz_row[:, None] + N * R + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK_T, N2], dtype=tl.float32)
    for i in tl.static_range(N):
        wi = tl.sum(tl.where((heads == i)[None, :], w, 0.0), axis=1)  # [BLOCK_T]
        dz = tl.load(dz_row[:, None] + i * R + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        if not SHARED:
            h = tl.load(p_row[:, None] + i * R + columns[None, :], mask=inside, other=0.0).to(tl.float32)
            if ANCHORED:
                last = (N + i) * R + columns[None, :]
                dh0 = tl.load(dz_row[:, None] + last, mask=inside, other=0.0).to(tl.float32) - dz * (1.0 / N)
                target = dp_row[:, None] + anchor_start + i * R + columns[None, :]
                tl.store(target, dh0.to(dp_row.dtype.element_ty), mask=inside)

        # z_i before the anchor, and dm_i.
        z = wi[:, None] * h
        dm = dz
        if DROPOUT:
            keep = _keep(rows, i, columns, first, second, threshold, N, R)
            z = tl.where(keep, z * keep_scale, 0.0)
            dm = tl.where(keep, dz * keep_scale, 0.0)

        # dh, dh0, dw and heads_i.
        if SHARED:
            dh += wi[:, None] * dm
            if ANCHORED:
                dh0 -= dz * (1.0 / N)
        else:
            head_dh = (wi[:, None] * dm).to(dp_row.dtype.element_ty)
            tl.store(dp_row[:, None] + i * R + columns[None, :], head_dh, mask=inside)
        dw += tl.where((heads == i)[None, :], tl.sum(dm * h, axis=1)[:, None], 0.0)
        if HEADS:
            head = heads_row[:, None] + i * R + columns[None, :]
            tl.store(head, (z * scaling).to(heads_row.dtype.element_ty), mask=inside)

    # The padding of heads, and the shared dh and dh0.
    if HEADS and G > N * R:
        pad = N * R + tl.arange(0, G2)
        zero = tl.zeros([BLOCK_T, G2], dtype=heads_row.dtype.element_ty)
        tl.store(heads_row[:, None] + pad[None, :], zero, mask=row_mask[:, None] & (pad < G)[None, :])
    if SHARED:
        tl.store(dp_row[:, None] + columns[None, :], dh.to(dp_row.dtype.element_ty), mask=inside)
        if ANCHORED:
            target = dp_row[:, None] + anchor_start + columns[None, :]
            tl.store(target, dh0.to(dp_row.dtype.element_ty), mask=inside)

    # dl = w . (dw - sum_j w_j dw_j), and the gradient of the balance loss.
    if ROUTED:
        dlogits = w * (dw - tl.sum(w * dw, axis=1)[:, None])  # [BLOCK_T, N2]
        if BALANCED:
            in_use = (heads < N)[None, :]
            a = tl.load(coeffs_ptr + heads, mask=heads < N, other=0.0)[None, :]
            log_p = tl.where(in_use, logits - log_z[:, None], 0.0)
            entropy = -tl.sum(p * log_p, axis=1)[:, None]
            inner = a - tl.sum(p * a, axis=1)[:, None] - tl.load(coeffs_ptr + N) * (log_p + entropy)
            inner += 2.0 * tl.load(coeffs_ptr + N + 1) * log_z[:, None]
            counts = _count_tokens(mask_ptr, rows, row_mask, MASKED)[:, None] > 0.0
            dlogits += tl.where(counts, p * inner, 0.0)
        routed = row_mask[:, None] & (heads < N)[None, :]
        tl.store(dp_row[:, None] + H + heads[None, :], dlogits.to(dp_row.dtype.element_ty), mask=routed)

    # The padding of dP.
    used_p: tl.constexpr = anchor_start + H if ANCHORED else anchor_start
    if K > used_p:
        pad_p = used_p + tl.arange(0, K2)
        zero_p = tl.zeros([BLOCK_T, K2], dtype=dp_row.dtype.element_ty)
        tl.store(dp_row[:, None] + pad_p[None, :], zero_p, mask=row_mask[:, None] & (pad_p < K)[None, :])


# One program per block of BLOCK_T tokens; see `_mix_backward_rows`.
#
# Loads blocks of P [T, K] and dZ [T, Z], and the token mask [T] and coefficients [N + 2] if needed. Stores blocks of
# heads [T, G] and dP [T, K].
@triton.jit(do_not_specialize=["tokens", "low", "high", "threshold", "keep_scale", "scaling"])
def mix_backward_kernel(
    p_ptr,
    dz_ptr,
    heads_ptr,
    dp_ptr,
    coeffs_ptr,
    mask_ptr,
    seed_ptr,
    tokens,
    low,
    high,
    threshold,
    keep_scale,
    scaling,
    K: tl.constexpr,
    K2: tl.constexpr,
    Z: tl.constexpr,
    G: tl.constexpr,
    G2: tl.constexpr,
    R: tl.constexpr,
    R2: tl.constexpr,
    N: tl.constexpr,
    N2: tl.constexpr,
    ROUTED: tl.constexpr,
    ANCHORED: tl.constexpr,
    SHARED: tl.constexpr,
    TOP_K: tl.constexpr,
    DROPOUT: tl.constexpr,
    SEED_IN_MEMORY: tl.constexpr,
    BALANCED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    first, second = _keys(low, high, seed_ptr, SEED_IN_MEMORY)
    _mix_backward_rows(
        p_ptr + rows * K,
        dz_ptr + rows * Z,
        heads_ptr + rows * G,
        dp_ptr + rows * K,
        coeffs_ptr,
        mask_ptr,
        rows,
        rows < tokens,
        first,
        second,
        threshold,
        keep_scale,
        scaling,
        K,
        K2,
        G,
        G2,
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
        True,
        BLOCK_T,
    )


@triton.jit
def _column_sums(partials_ptr, rows, columns, used, STRIDE: tl.constexpr, BLOCK: tl.constexpr, C2: tl.constexpr):
    """Sums over all rows of some columns, `[C2]`."""
    total = tl.zeros([C2], dtype=tl.float32)
    row = tl.arange(0, BLOCK)
    start = 0
    while start < rows:  # `range` of a number that is not a constant fails in the interpreter
        inside = (start + row < rows)[:, None] & used[None, :]
        block = partials_ptr + (start + row)[:, None] * STRIDE + columns[None, :]
        total += tl.sum(tl.load(block, mask=inside, other=0.0), axis=0)
        start += BLOCK
    return total


# One program in all, for one layer. With f and P the shares of the heads (of the micro-batch; if WHOLE of the step so
# far, and if PRIOR of the step before for the tokens that are still expected):
#
#     KIND                     loss                          a_i          e     z
#     1 switch                 N sum_i f_i P_i               N f_i        0     0
#     2 importance             N sum_i P_i^2 - 1             2 N P_i      0     0
#     3 mutual_information     sum_i P_i log P_i + mean H    log P_i      1     0
#     4 z                      mean logsumexp^2              0            0     1
#
# Loads the partial sums [rows, 3 + 3 N], the statistics [3 + 3 N + 1] and the prior [2 N]. Stores the statistics with
# the sums and the loss added, and if COEFFS the coefficients (a, e, z) [N + 2] times factor and upstream gradient.
@triton.jit(do_not_specialize=["rows", "factor", "expected"])
def finalize_routing_stats_kernel(
    partials_ptr,
    stats_ptr,
    prior_ptr,
    upstream_ptr,
    coeffs_ptr,
    rows,
    factor,
    expected,
    N: tl.constexpr,
    N2: tl.constexpr,
    KIND: tl.constexpr,
    WHOLE: tl.constexpr,
    PRIOR: tl.constexpr,
    COEFFS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    heads = tl.arange(0, N2)
    used = heads < N
    stride: tl.constexpr = 3 + 3 * N
    index = tl.arange(0, 4)  # of the three sums that are not by head: tokens, squared log-sum-exp, entropy

    # Sums of the micro-batch, and with them those of the step so far.
    scalars = _column_sums(partials_ptr, rows, index, index < 3, stride, BLOCK, 4)
    top = _column_sums(partials_ptr, rows, 3 + heads, used, stride, BLOCK, N2)
    p = _column_sums(partials_ptr, rows, 3 + N + heads, used, stride, BLOCK, N2)
    w = _column_sums(partials_ptr, rows, 3 + 2 * N + heads, used, stride, BLOCK, N2)
    tokens = tl.sum(tl.where(index == 0, scalars, 0.0), axis=0)
    count = tl.maximum(tokens, 1.0)
    step_scalars = tl.load(stats_ptr + index, mask=index < 3, other=0.0) + scalars
    step_top = tl.load(stats_ptr + 3 + heads, mask=used, other=0.0) + top
    step_p = tl.load(stats_ptr + 3 + N + heads, mask=used, other=0.0) + p
    step_w = tl.load(stats_ptr + 3 + 2 * N + heads, mask=used, other=0.0) + w

    # Shares of the heads.
    f = top / count
    P = p / count
    micro_P = P
    if WHOLE:
        seen = tl.maximum(tl.sum(tl.where(index == 0, step_scalars, 0.0), axis=0), 1.0)
        f, P = step_top, step_p
        if PRIOR:
            left = tl.maximum(expected - seen, 0.0)
            f += left * tl.load(prior_ptr + heads, mask=used, other=0.0)
            P += left * tl.load(prior_ptr + N + heads, mask=used, other=0.0)
            seen += left
        f, P = f / seen, P / seen

    # The loss and its coefficients.
    a = tl.zeros([N2], dtype=tl.float32)
    of_entropy = 0.0
    of_z = 0.0
    loss = 0.0
    if KIND == 1:
        loss = N * tl.sum(f * micro_P, axis=0)
        a = N * f
    if KIND == 2:
        loss = N * tl.sum(P * P, axis=0) - 1.0
        a = 2.0 * N * P
    if KIND == 3:
        a = tl.where(used, tl.log(tl.maximum(P, 1.1754944e-38)), 0.0)
        loss = tl.sum(P * a, axis=0) + tl.sum(tl.where(index == 2, scalars, 0.0), axis=0) / count
        of_entropy = 1.0
    if KIND == 4:
        loss = tl.sum(tl.where(index == 1, scalars, 0.0), axis=0) / count
        of_z = 1.0

    tl.store(stats_ptr + index, step_scalars, mask=index < 3)
    tl.store(stats_ptr + 3 + heads, step_top, mask=used)
    tl.store(stats_ptr + 3 + N + heads, step_p, mask=used)
    tl.store(stats_ptr + 3 + 2 * N + heads, step_w, mask=used)
    tl.store(stats_ptr + stride, tl.load(stats_ptr + stride) + loss * tokens)
    if COEFFS:
        scale = factor * tl.load(upstream_ptr).to(tl.float32)
        tl.store(coeffs_ptr + heads, a * scale, mask=used)
        tl.store(coeffs_ptr + N, of_entropy * scale)
        tl.store(coeffs_ptr + N + 1, of_z * scale)


# One program per token: its projections stay in registers. Without dropout and with a shared A.
#
#     h = A x     h0 = A0 x     w = softmax(R x)     z_i = w_i h - h0 / N
#
# Loads x [T, d_in] and down [K, d_in] = [A; R; A0]. Stores Z [T, Z].
@triton.jit
def project_mix_kernel(
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
    token = tl.program_id(0).to(tl.int64)
    ranks = tl.arange(0, R2)
    heads = tl.arange(0, N2)
    anchor_start: tl.constexpr = R + N if ROUTED else R

    # The projections, over blocks of x.
    h = tl.zeros([R2], dtype=tl.float32)
    h0 = tl.zeros([R2], dtype=tl.float32)
    logits = tl.zeros([N2], dtype=tl.float32)
    for start in range(0, D_IN, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = columns < D_IN
        x = tl.load(x_ptr + token * D_IN + columns, mask=inside, other=0.0).to(tl.float32)
        of_rank = (ranks < R)[:, None] & inside[None, :]  # [R2, BLOCK_D]
        a = tl.load(down_ptr + ranks[:, None] * D_IN + columns[None, :], mask=of_rank, other=0.0).to(tl.float32)
        h += tl.sum(a * x[None, :], axis=1)
        if ROUTED:
            of_head = (heads < N)[:, None] & inside[None, :]  # [N2, BLOCK_D]
            row = (R + heads)[:, None] * D_IN
            router = tl.load(down_ptr + row + columns[None, :], mask=of_head, other=0.0).to(tl.float32)
            logits += tl.sum(router * x[None, :], axis=1)
        if ANCHORED:
            row0 = (anchor_start + ranks)[:, None] * D_IN
            a0 = tl.load(down_ptr + row0 + columns[None, :], mask=of_rank, other=0.0).to(tl.float32)
            h0 += tl.sum(a0 * x[None, :], axis=1)

    # The mixture.
    z_row = z_ptr + token * Z
    logits = tl.where(heads < N, logits, -float("inf"))
    e = tl.exp(logits - tl.max(logits, axis=0))
    w = tl.div_rn(e, tl.sum(e, axis=0) + tl.zeros_like(e))  # [N2]
    for i in tl.static_range(N):
        wi = tl.sum(tl.where(heads == i, w, 0.0), axis=0)
        # As in `_mix_rows`. Without an anchor h0 is zero.
        z = wi * (h - h0) + (wi - 1.0 / N) * h0
        tl.store(z_row + i * R + ranks, z.to(z_ptr.dtype.element_ty), mask=ranks < R)

    # h0, and the padding.
    used: tl.constexpr = (N + 1) * R if ANCHORED else N * R
    if ANCHORED:
        tl.store(z_row + N * R + ranks, h0.to(z_ptr.dtype.element_ty), mask=ranks < R)
    if Z > used:
        pad = used + tl.arange(0, Z2)
        tl.store(z_row + pad, tl.zeros([Z2], dtype=z_ptr.dtype.element_ty), mask=pad < Z)


# The first DOWN_PROGRAMS programs of a layer: one per block of BLOCK_D columns of one row of `down`. The others: one
# per block of BLOCK_W of the d_out r elements of a head. With LAYERS, the programs of layer after layer.
#
#     down [K, d_in]  = [A; R; A0; zeros]
#     up   [d_out, Z] = scaling [B_1 .. B_N, mean B - B0, zeros]       if SHARED
#                       scaling [B_1 .. B_N, (B_i - B0_i) / N, zeros]  otherwise
#
# Loads A [H, d_in], B [N, d_out, r], R [N, d_in], A0 and B0. Stores down and up, for many layers [L, K, d_in] and
# [L, d_out, Z].
@triton.jit(do_not_specialize=["scaling"])
def concat_kernel(
    addresses_ptr,
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
    ROUTER: tl.constexpr,
    ANCHORED: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
    LAYERS: tl.constexpr,
):
    program = tl.program_id(0)
    if LAYERS:
        # A row of addresses [L, 5] locates the five tensors of each layer. The pointers among the arguments, those of
        # the first layer, only give the dtypes.
        PROGRAMS: tl.constexpr = DOWN_PROGRAMS + (ELEMENTS + BLOCK_W - 1) // BLOCK_W
        layer = (program // PROGRAMS).to(tl.int64)
        program = program % PROGRAMS
        row_of_layer = addresses_ptr + layer * 5
        a_ptr = tl.load(row_of_layer).to(a_ptr.dtype)
        b_ptr = tl.load(row_of_layer + 1).to(b_ptr.dtype)
        router_ptr = tl.load(row_of_layer + 2).to(router_ptr.dtype)
        anchor_a_ptr = tl.load(row_of_layer + 3).to(anchor_a_ptr.dtype)
        anchor_b_ptr = tl.load(row_of_layer + 4).to(anchor_b_ptr.dtype)
        down_ptr += layer * (DOWN_PROGRAMS // DOWN_BLOCKS * D_IN)
        up_ptr += layer * (ELEMENTS // R * Z)

    H: tl.constexpr = R if SHARED else N * R
    router_end: tl.constexpr = H + N if ROUTED else H
    if program < DOWN_PROGRAMS:
        # One block of one row of [A; R; A0], or of the padding below them. Without a router its rows are zero.
        row = program // DOWN_BLOCKS
        columns = (program % DOWN_BLOCKS) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = columns < D_IN
        value = tl.load(a_ptr + row * D_IN + columns, mask=inside & (row < H), other=0.0).to(tl.float32)
        if ROUTER:
            of_router = inside & (row >= H) & (row < router_end)
            value += tl.load(router_ptr + (row - H) * D_IN + columns, mask=of_router, other=0.0).to(tl.float32)
        if ANCHORED:
            of_anchor = inside & (row >= router_end) & (row < router_end + H)
            anchor = tl.load(anchor_a_ptr + (row - router_end) * D_IN + columns, mask=of_anchor, other=0.0)
            value += anchor.to(tl.float32)
        tl.store(down_ptr + row.to(tl.int64) * D_IN + columns, value.to(down_ptr.dtype.element_ty), mask=inside)
    else:
        # One block of the elements of each head, [d_out, r] in row-major order, as in B and the anchor.
        index = (program - DOWN_PROGRAMS) * BLOCK_W + tl.arange(0, BLOCK_W)
        mask = index < ELEMENTS
        up_row = up_ptr + (index // R).to(tl.int64) * Z
        total = tl.zeros([BLOCK_W], dtype=tl.float32)
        for i in tl.static_range(N):
            head = tl.load(b_ptr + i * ELEMENTS + index, mask=mask, other=0.0).to(tl.float32)
            total += head
            tl.store(up_row + i * R + index % R, (head * scaling).to(up_ptr.dtype.element_ty), mask=mask)
            if ANCHORED and not SHARED:
                head0 = tl.load(anchor_b_ptr + i * ELEMENTS + index, mask=mask, other=0.0).to(tl.float32)
                head_shift = (head - head0) * (1.0 / N) * scaling
                tl.store(up_row + (N + i) * R + index % R, head_shift.to(up_ptr.dtype.element_ty), mask=mask)

        # The shared shift of the mean, and the padding.
        used: tl.constexpr = N * R + H if ANCHORED else N * R
        if ANCHORED and SHARED:
            # Divided as `mean_of_heads` does: `/` rounds in another way.
            mean = tl.div_rn(total, tl.zeros_like(total) + N)
            shift = mean - tl.load(anchor_b_ptr + index, mask=mask, other=0.0).to(tl.float32)
            tl.store(up_row + N * R + index % R, (shift * scaling).to(up_ptr.dtype.element_ty), mask=mask)
        if Z > used:
            pad = used + tl.arange(0, Z2)
            zero = tl.zeros([BLOCK_W, Z2], dtype=up_ptr.dtype.element_ty)
            first_of_row = mask & (index % R == 0)
            tl.store(up_row[:, None] + pad[None, :], zero, mask=first_of_row[:, None] & (pad < Z)[None, :])
