"""Triton kernels for what happens in rank space, and for laying the small weights side by side.

Each is launched by the function of its name in `triton_ops.py`.
"""

import triton
import triton.language as tl


@triton.jit
def _mix32(v):
    v = v ^ (v >> 16)
    v = v * 0x7FEB352D
    v = v ^ (v >> 15)
    v = v * 0x846CA68B
    return v ^ (v >> 16)


@triton.jit
def _keys(low, high, seed_ptr, SEED_IN_MEMORY: tl.constexpr):
    """The two keys of a mask, as `dropout.mask_parameters` makes them from a seed: in two halves, or in memory."""
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
    """Whether the element of each token, in one head, is kept: the bits of `dropout.keep_mask`."""
    token = rows.to(tl.uint32)
    index = (token[:, None] * N + head) * R + columns[None, :].to(tl.uint32)
    bits = _mix32(_mix32(index + first) ^ second)
    return bits >= threshold.to(tl.uint32, bitcast=True)


@triton.jit
def _softmax(logits):
    """Probabilities of the heads, and the log-sum-exp of each token; logits beyond N are minus infinity."""
    top = tl.max(logits, axis=1)
    e = tl.exp(logits - top[:, None])
    total = tl.sum(e, axis=1)
    return e / total[:, None], top + tl.log(total)


@triton.jit
def _kept(logits, heads, N: tl.constexpr, TOP_K: tl.constexpr):
    """The logits with all but the TOP_K largest at minus infinity; of equal ones the first are kept."""
    larger = tl.zeros_like(logits)
    for j in tl.static_range(N):
        other = tl.max(tl.where((heads == j)[None, :], logits, -float("inf")), axis=1)[:, None]
        before = (other > logits) | ((other == logits) & (j < heads)[None, :])
        larger += tl.where(before, 1.0, 0.0)
    return tl.where(larger < TOP_K, logits, -float("inf"))


@triton.jit
def _load_logits(p_row, row_mask, heads, H: tl.constexpr, N: tl.constexpr):
    inside = row_mask[:, None] & (heads < N)[None, :]
    logits = tl.load(p_row[:, None] + H + heads[None, :], mask=inside, other=0.0).to(tl.float32)
    return tl.where((heads < N)[None, :], logits, -float("inf"))


@triton.jit
def _counted(mask_ptr, rows, row_mask, MASKED: tl.constexpr):
    """One for the tokens that count, zero for the others."""
    if MASKED:
        token = tl.load(mask_ptr + rows, mask=row_mask, other=0)
        return tl.where(token != 0, 1.0, 0.0)
    else:
        return tl.where(row_mask, 1.0, 0.0)


@triton.jit
def _store_statistics(target, logits, w, p, log_z, counted, heads, N: tl.constexpr):
    """The sums of `rank_space.statistics` over the tokens of one program."""
    in_use = (heads < N)[None, :]
    entropy = log_z - tl.sum(tl.where(in_use, p * logits, 0.0), axis=1)
    top = tl.where((logits == tl.max(logits, axis=1)[:, None]) & in_use, 1.0, 0.0)
    share = top / tl.sum(top, axis=1)[:, None]
    # Selected rather than multiplied: what padding computes may be NaN.
    counts = counted > 0.0
    tl.store(target, tl.sum(counted, axis=0))
    tl.store(target + 1, tl.sum(tl.where(counts, log_z * log_z, 0.0), axis=0))
    tl.store(target + 2, tl.sum(tl.where(counts, entropy, 0.0), axis=0))
    tl.store(target + 3 + heads, tl.sum(tl.where(counts[:, None], share, 0.0), axis=0), mask=heads < N)
    tl.store(target + 3 + N + heads, tl.sum(tl.where(counts[:, None], p, 0.0), axis=0), mask=heads < N)
    tl.store(target + 3 + 2 * N + heads, tl.sum(tl.where(counts[:, None], w, 0.0), axis=0), mask=heads < N)


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
    STATISTICS: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_mask = rows < tokens
    if DROPOUT:
        first, second = _keys(low, high, seed_ptr, SEED_IN_MEMORY)
    columns = tl.arange(0, R2)
    heads = tl.arange(0, N2)
    inside = row_mask[:, None] & (columns < R)[None, :]
    p_row = p_ptr + rows * K
    z_row = z_ptr + rows * Z
    H: tl.constexpr = R if SHARED else N * R
    anchor_start: tl.constexpr = H + N if ROUTED else H
    if ROUTED:
        logits = _load_logits(p_row, row_mask, heads, H, N)
        p, log_z = _softmax(logits)
        w = p
        if TOP_K > 0:
            w, _ = _softmax(_kept(logits, heads, N, TOP_K))
        if STATISTICS:
            counted = _counted(mask_ptr, rows, row_mask, MASKED)
            target = partials_ptr + tl.program_id(0) * (3 + 3 * N)
            _store_statistics(target, logits, w, p, log_z, counted, heads, N)
    else:
        w = tl.where((heads < N)[None, :], 1.0 / N, 0.0) + tl.zeros_like(row_mask[:, None].to(tl.float32))
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
                own = z_row[:, None] + (N + i) * R + columns[None, :]
                tl.store(own, h0.to(z_ptr.dtype.element_ty), mask=inside)
        wi = tl.sum(tl.where((heads == i)[None, :], w, 0.0), axis=1)
        z = wi[:, None] * h
        if DROPOUT:
            z = tl.where(_keep(rows, i, columns, first, second, threshold, N, R), z * keep_scale, 0.0)
        if ANCHORED:
            z -= h0 * (1.0 / N)
        tl.store(z_row[:, None] + i * R + columns[None, :], z.to(z_ptr.dtype.element_ty), mask=inside)
    used: tl.constexpr = N * R + H if ANCHORED else N * R
    if ANCHORED and SHARED:
        tl.store(z_row[:, None] + N * R + columns[None, :], h0.to(z_ptr.dtype.element_ty), mask=inside)
    if Z > used:
        pad = used + tl.arange(0, Z2)
        zero = tl.zeros([BLOCK_T, Z2], dtype=z_ptr.dtype.element_ty)
        tl.store(z_row[:, None] + pad[None, :], zero, mask=row_mask[:, None] & (pad < Z)[None, :])


@triton.jit(do_not_specialize=["tokens", "low", "high", "threshold", "keep_scale", "scaling"])
def mix_backward_kernel(
    p_ptr,
    dz_ptr,
    heads_ptr,
    dp_ptr,
    slope_ptr,
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
    row_mask = rows < tokens
    if DROPOUT:
        first, second = _keys(low, high, seed_ptr, SEED_IN_MEMORY)
    columns = tl.arange(0, R2)
    heads = tl.arange(0, N2)
    inside = row_mask[:, None] & (columns < R)[None, :]
    p_row = p_ptr + rows * K
    heads_row = heads_ptr + rows * G
    dz_row = dz_ptr + rows * Z
    dp_row = dp_ptr + rows * K
    H: tl.constexpr = R if SHARED else N * R
    anchor_start: tl.constexpr = H + N if ROUTED else H
    if ROUTED:
        logits = _load_logits(p_row, row_mask, heads, H, N)
        p, log_z = _softmax(logits)
        w = p
        if TOP_K > 0:
            w, _ = _softmax(_kept(logits, heads, N, TOP_K))
    else:
        w = tl.where((heads < N)[None, :], 1.0 / N, 0.0) + tl.zeros_like(row_mask[:, None].to(tl.float32))
    if SHARED:
        h = tl.load(p_row[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        dh = tl.zeros([BLOCK_T, R2], dtype=tl.float32)
        if ANCHORED:
            dh0 = tl.load(dz_row[:, None] + N * R + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK_T, N2], dtype=tl.float32)
    for i in tl.static_range(N):
        wi = tl.sum(tl.where((heads == i)[None, :], w, 0.0), axis=1)
        dz = tl.load(dz_row[:, None] + i * R + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        if not SHARED:
            h = tl.load(p_row[:, None] + i * R + columns[None, :], mask=inside, other=0.0).to(tl.float32)
            if ANCHORED:
                own = (N + i) * R + columns[None, :]
                dh0 = tl.load(dz_row[:, None] + own, mask=inside, other=0.0).to(tl.float32) - dz * (1.0 / N)
                target = dp_row[:, None] + anchor_start + i * R + columns[None, :]
                tl.store(target, dh0.to(dp_ptr.dtype.element_ty), mask=inside)
        z = wi[:, None] * h
        dm = dz
        if DROPOUT:
            keep = _keep(rows, i, columns, first, second, threshold, N, R)
            z = tl.where(keep, z * keep_scale, 0.0)
            dm = tl.where(keep, dz * keep_scale, 0.0)
        if SHARED:
            dh += wi[:, None] * dm
            if ANCHORED:
                dh0 -= dz * (1.0 / N)
        else:
            own_dh = (wi[:, None] * dm).to(dp_ptr.dtype.element_ty)
            tl.store(dp_row[:, None] + i * R + columns[None, :], own_dh, mask=inside)
        dw += tl.where((heads == i)[None, :], tl.sum(dm * h, axis=1)[:, None], 0.0)
        head = heads_row[:, None] + i * R + columns[None, :]
        tl.store(head, (z * scaling).to(heads_ptr.dtype.element_ty), mask=inside)
    if G > N * R:
        pad = N * R + tl.arange(0, G2)
        zero = tl.zeros([BLOCK_T, G2], dtype=heads_ptr.dtype.element_ty)
        tl.store(heads_row[:, None] + pad[None, :], zero, mask=row_mask[:, None] & (pad < G)[None, :])
    if SHARED:
        tl.store(dp_row[:, None] + columns[None, :], dh.to(dp_ptr.dtype.element_ty), mask=inside)
        if ANCHORED:
            target = dp_row[:, None] + anchor_start + columns[None, :]
            tl.store(target, dh0.to(dp_ptr.dtype.element_ty), mask=inside)
    if ROUTED:
        dlogits = w * (dw - tl.sum(w * dw, axis=1)[:, None])
        if BALANCED:
            in_use = (heads < N)[None, :]
            a = tl.load(slope_ptr + heads, mask=heads < N, other=0.0)[None, :]
            log_p = tl.where(in_use, logits - log_z[:, None], 0.0)
            entropy = -tl.sum(p * log_p, axis=1)[:, None]
            inner = a - tl.sum(p * a, axis=1)[:, None] - tl.load(slope_ptr + N) * (log_p + entropy)
            inner += 2.0 * tl.load(slope_ptr + N + 1) * log_z[:, None]
            counts = _counted(mask_ptr, rows, row_mask, MASKED)[:, None] > 0.0
            dlogits += tl.where(counts, p * inner, 0.0)
        routed = row_mask[:, None] & (heads < N)[None, :]
        tl.store(dp_row[:, None] + H + heads[None, :], dlogits.to(dp_ptr.dtype.element_ty), mask=routed)
    used_p: tl.constexpr = anchor_start + H if ANCHORED else anchor_start
    if K > used_p:
        pad_p = used_p + tl.arange(0, K2)
        zero_p = tl.zeros([BLOCK_T, K2], dtype=dp_ptr.dtype.element_ty)
        tl.store(dp_row[:, None] + pad_p[None, :], zero_p, mask=row_mask[:, None] & (pad_p < K)[None, :])


@triton.jit
def _column_sums(partials_ptr, rows, columns, used, STRIDE: tl.constexpr, BLOCK: tl.constexpr, C2: tl.constexpr):
    """Sums over the rows of some columns."""
    total = tl.zeros([C2], dtype=tl.float32)
    row = tl.arange(0, BLOCK)
    start = 0
    while start < rows:  # `range` of a number that is no constant fails in the interpreter
        inside = (start + row < rows)[:, None] & used[None, :]
        places = partials_ptr + (start + row)[:, None] * STRIDE + columns[None, :]
        total += tl.sum(tl.load(places, mask=inside, other=0.0), axis=0)
        start += BLOCK
    return total


@triton.jit(do_not_specialize=["rows", "factor", "expected"])
def finalize_routing_stats_kernel(
    partials_ptr,
    record_ptr,
    prior_ptr,
    upstream_ptr,
    slope_ptr,
    rows,
    factor,
    expected,
    N: tl.constexpr,
    N2: tl.constexpr,
    KIND: tl.constexpr,
    WHOLE: tl.constexpr,
    PRIOR: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    heads = tl.arange(0, N2)
    used = heads < N
    stride: tl.constexpr = 3 + 3 * N
    three = tl.arange(0, 4)
    scalars = _column_sums(partials_ptr, rows, three, three < 3, stride, BLOCK, 4)
    top = _column_sums(partials_ptr, rows, 3 + heads, used, stride, BLOCK, N2)
    p = _column_sums(partials_ptr, rows, 3 + N + heads, used, stride, BLOCK, N2)
    w = _column_sums(partials_ptr, rows, 3 + 2 * N + heads, used, stride, BLOCK, N2)
    tokens = tl.sum(tl.where(three == 0, scalars, 0.0), axis=0)
    count = tl.maximum(tokens, 1.0)
    seen_scalars = tl.load(record_ptr + three, mask=three < 3, other=0.0) + scalars
    seen_top = tl.load(record_ptr + 3 + heads, mask=used, other=0.0) + top
    seen_p = tl.load(record_ptr + 3 + N + heads, mask=used, other=0.0) + p
    seen_w = tl.load(record_ptr + 3 + 2 * N + heads, mask=used, other=0.0) + w
    f = top / count
    P = p / count
    own_P = P
    if WHOLE:
        seen = tl.maximum(tl.sum(tl.where(three == 0, seen_scalars, 0.0), axis=0), 1.0)
        f, P = seen_top, seen_p
        if PRIOR:
            left = tl.maximum(expected - seen, 0.0)
            f += left * tl.load(prior_ptr + heads, mask=used, other=0.0)
            P += left * tl.load(prior_ptr + N + heads, mask=used, other=0.0)
            seen += left
        f, P = f / seen, P / seen
    a = tl.zeros([N2], dtype=tl.float32)
    of_entropy = 0.0
    of_z = 0.0
    loss = 0.0
    if KIND == 1:
        loss = N * tl.sum(f * own_P, axis=0)
        a = N * f
    if KIND == 2:
        loss = N * tl.sum(P * P, axis=0) - 1.0
        a = 2.0 * N * P
    if KIND == 3:
        a = tl.where(used, tl.log(tl.maximum(P, 1.1754944e-38)), 0.0)
        loss = tl.sum(P * a, axis=0) + tl.sum(tl.where(three == 2, scalars, 0.0), axis=0) / count
        of_entropy = 1.0
    if KIND == 4:
        loss = tl.sum(tl.where(three == 1, scalars, 0.0), axis=0) / count
        of_z = 1.0
    tl.store(record_ptr + three, seen_scalars, mask=three < 3)
    tl.store(record_ptr + 3 + heads, seen_top, mask=used)
    tl.store(record_ptr + 3 + N + heads, seen_p, mask=used)
    tl.store(record_ptr + 3 + 2 * N + heads, seen_w, mask=used)
    tl.store(record_ptr + stride, tl.load(record_ptr + stride) + loss * tokens)
    if SLOPE:
        scale = factor * tl.load(upstream_ptr).to(tl.float32)
        tl.store(slope_ptr + heads, a * scale, mask=used)
        tl.store(slope_ptr + N, of_entropy * scale)
        tl.store(slope_ptr + N + 1, of_z * scale)


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
        # Many layers, whose five tensors are where a row of addresses says. The pointers among the arguments, those
        # of the first layer, only say what dtypes they have.
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
        # One block of one row of [A; R; A0], or of the padding below them. Rows of a router that is not there are
        # zero.
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
        # A block of the elements of one head, [d_out, r] in row-major order, as B and the anchor have them.
        index = (program - DOWN_PROGRAMS) * BLOCK_W + tl.arange(0, BLOCK_W)
        mask = index < ELEMENTS
        up_row = up_ptr + (index // R).to(tl.int64) * Z
        total = tl.zeros([BLOCK_W], dtype=tl.float32)
        for i in tl.static_range(N):
            head = tl.load(b_ptr + i * ELEMENTS + index, mask=mask, other=0.0).to(tl.float32)
            total += head
            tl.store(up_row + i * R + index % R, (head * scaling).to(up_ptr.dtype.element_ty), mask=mask)
            if ANCHORED and not SHARED:
                own = tl.load(anchor_b_ptr + i * ELEMENTS + index, mask=mask, other=0.0).to(tl.float32)
                own_shift = (head - own) * (1.0 / N) * scaling
                tl.store(up_row + (N + i) * R + index % R, own_shift.to(up_ptr.dtype.element_ty), mask=mask)
        used: tl.constexpr = N * R + H if ANCHORED else N * R
        if ANCHORED and SHARED:
            shift = total / N - tl.load(anchor_b_ptr + index, mask=mask, other=0.0).to(tl.float32)
            tl.store(up_row + N * R + index % R, (shift * scaling).to(up_ptr.dtype.element_ty), mask=mask)
        if Z > used:
            pad = used + tl.arange(0, Z2)
            zero = tl.zeros([BLOCK_W, Z2], dtype=up_ptr.dtype.element_ty)
            first_of_row = mask & (index % R == 0)
            tl.store(up_row[:, None] + pad[None, :], zero, mask=first_of_row[:, None] & (pad < Z)[None, :])
