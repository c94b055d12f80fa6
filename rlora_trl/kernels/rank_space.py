"""The rank-space functions in plain torch: twins of the Triton kernels, with the same arguments and results.

Columns of P and Z, both possibly padded with zeros; parts in brackets are optional:

    P  [T, K] = x down^T     down [K, d_in]  = [A; (R); (A0)]
    Z  [T, Z]                up   [d_out, Z] = scaling [B_1 .. B_N, (mean B - B0)]      delta = Z up^T

A has r rows if all heads share it and N r otherwise, and so has A0; then B0 is [N, d_out, r], and the last part of
`up` is [B_i - B0_i] / N for each head.
"""

from typing import NamedTuple, TypeAlias

import torch

from .dropout import keep_mask


# A, B, router, A0, B0
AdapterTensors: TypeAlias = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None
]


class Layout(NamedTuple):
    """
    The columns of P and Z, and how logits become head weights.

    Args:
        num_heads (`int`), r (`int`): N and r.
        routed (`bool`, *optional*, defaults to `True`): P has N columns of logits; without them every head weighs
            `1 / N`.
        anchored (`bool`, *optional*, defaults to `True`): P and Z have the anchor's columns.
        shared (`bool`, *optional*, defaults to `True`): All heads share one A.
        top_k (`int`, *optional*, defaults to `0`): Heads kept for each token, by their logits; 0 keeps all.
    """

    num_heads: int
    r: int
    routed: bool = True
    anchored: bool = True
    shared: bool = True
    top_k: int = 0


# Functions rather than properties of `Layout`: `torch.compile` of torch 2.6 cannot read properties of a named tuple.
def h_columns(layout: Layout) -> int:
    """Columns of A x, and of A0 x."""
    return layout.r if layout.shared else layout.r * layout.num_heads


def anchor_start(layout: Layout) -> int:
    """The first column of A0 x in P, after those of A x and of the logits."""
    return h_columns(layout) + layout.num_heads * layout.routed


def p_columns(layout: Layout) -> int:
    """Columns of P, without padding."""
    return anchor_start(layout) + h_columns(layout) * layout.anchored


def z_columns(layout: Layout) -> int:
    """Columns of Z, without padding."""
    return layout.num_heads * layout.r + h_columns(layout) * layout.anchored


def stats_columns(num_heads: int) -> int:
    """Columns of [`routing_stats`]."""
    return 3 + 3 * num_heads


def layout_of(A: torch.Tensor, B: torch.Tensor, *, routed: bool, anchor_A: torch.Tensor | None, top_k: int) -> Layout:
    """The layout that the shapes of the parameters imply."""
    return Layout(B.shape[0], B.shape[2], routed, anchor_A is not None, A.ndim == 2, top_k)


# Concatenated weights


def concat(
    A: torch.Tensor,
    B: torch.Tensor,
    router: torch.Tensor | None,
    anchor_A: torch.Tensor | None,
    anchor_B: torch.Tensor | None,
    layout: Layout,
    *,
    scaling: float,
    dtype: torch.dtype,
    down_rows: int = 0,
    up_columns: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Concatenate the weights of one adapter, in the dtype of the products.

    Args:
        A (`torch.Tensor` of shape `[r, d_in]` or `[N, r, d_in]`): Down-projection, shared or one for each head.
        B (`torch.Tensor` of shape `[N, d_out, r]`): Head matrices.
        router (`torch.Tensor` of shape `[N, d_in]`, *optional*): Router. Without it its rows are zero where the
            layout has them: the caller writes the logits.
        anchor_A (`torch.Tensor` like `A`, *optional*): Initial `A`.
        anchor_B (`torch.Tensor` of shape `[d_out, r]` or, with an A for each head, `[N, d_out, r]`, *optional*): Mean
            over heads of the initial `B`, or the initial `B`.
        layout ([`Layout`]): The columns of P and Z.
        scaling (`float`): Factor of the delta, which goes into `up`.
        dtype (`torch.dtype`): Dtype of the results.
        down_rows (`int`, *optional*, defaults to `0`), up_columns (`int`, *optional*, defaults to `0`): Sizes to pad
            to with zeros.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `down` `[K, d_in]` and `up` `[d_out, Z]`, with padding.
    """
    num_heads, d_out, r = B.shape
    d_in = A.shape[-1]

    # down = [A; R; A0]
    downs = [A.reshape(-1, d_in)]
    if layout.routed:
        downs.append(A.new_zeros(num_heads, d_in) if router is None else router)
    if anchor_A is not None:
        downs.append(anchor_A.reshape(-1, d_in))
    down = torch.cat(downs) if len(downs) > 1 else downs[0]  # [K, d_in]

    # up = [B_1 .. B_N, mean B - B0], or [B_i - B0_i] / N in the last part
    up = B.transpose(0, 1).reshape(d_out, num_heads * r)
    if anchor_B is not None and layout.shared:
        up = torch.cat([up, mean_of_heads(B) - anchor_B], dim=1)  # [d_out, (N + 1) r]
    elif anchor_B is not None:
        shift = (B - anchor_B) * (1.0 / num_heads)
        up = torch.cat([up, shift.transpose(0, 1).reshape(d_out, num_heads * r)], dim=1)  # [d_out, 2 N r]

    # Cast after the differences, so that the offset cancels before anything is rounded to 16 bits.
    down, up = down.to(dtype), (up * scaling).to(dtype)
    if down_rows > down.shape[0]:
        down = torch.nn.functional.pad(down, (0, 0, 0, down_rows - down.shape[0]))
    if up_columns > up.shape[1]:
        up = torch.nn.functional.pad(up, (0, up_columns - up.shape[1]))
    return down, up


def mean_of_heads(B: torch.Tensor) -> torch.Tensor:
    """
    The mean of the head matrices, with the same bits on all devices and in the Triton kernels.

    The anchor stores it, often computed on a CPU, and a delta starts at exactly zero only if it is the same number
    wherever the model runs. `Tensor.mean` sums in another order on each device, and multiplies by 1 / N on a GPU.

    Args:
        B (`torch.Tensor` of shape `[..., N, d_out, r]`): Head matrices.

    Returns:
        `torch.Tensor` of shape `[..., d_out, r]`.
    """
    first, *others = B.unbind(-3)
    total = first
    for head in others:
        total = total + head
    # A number would be turned into a product with its inverse on a GPU; a tensor is divided by.
    return total / total.new_full((), 1 + len(others))


def addresses_of(layers: list[AdapterTensors]) -> torch.Tensor | None:
    """The table of addresses that the Triton kernel of [`concat_many`] reads; plain torch needs none."""
    return None


def concat_many(
    layers: list[AdapterTensors],
    addresses: torch.Tensor | None,
    layout: Layout,
    *,
    scaling: float,
    dtype: torch.dtype,
    down_rows: int,
    up_columns: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    [`concat`] for L layers of the same sizes.

    Args:
        layers (`list[AdapterTensors]`): Contiguous tensors of each.
        addresses (`torch.Tensor`, *optional*): [`addresses_of`] the layers.

    The other arguments are those of [`concat`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: All `down` `[L, down_rows, d_in]` and all `up` `[L, d_out, up_columns]`.
    """
    pairs = [
        concat(*tensors, layout, scaling=scaling, dtype=dtype, down_rows=down_rows, up_columns=up_columns)
        for tensors in layers
    ]
    downs, ups = zip(*pairs, strict=True)
    return torch.stack(downs), torch.stack(ups)


def split_heads(dheads: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The gradient of B `[N, d_out, r]`, a view, from `dy^T heads` `[d_out, >= N r]` (see [`mix_backward`])."""
    columns = layout.num_heads * layout.r
    return dheads[:, :columns].view(-1, layout.num_heads, layout.r).transpose(0, 1)


# Parts of P


def logits_of(P: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The columns of P that hold the logits, a view `[T, N]`."""
    start = h_columns(layout)
    return P[:, start : start + layout.num_heads]


def with_logits(P: torch.Tensor, logits: torch.Tensor, layout: Layout) -> torch.Tensor:
    """A copy of P `[T, K]` with other logits `[T, N]`, which autograd and compilers can follow."""
    start = h_columns(layout)
    return torch.cat([P[:, :start], logits.to(P.dtype), P[:, start + layout.num_heads :]], dim=1)


def has_initial_A(down: torch.Tensor, layout: Layout) -> bool:
    """
    Whether A equals A0 in the concatenated weights of a CPU, so that A x equals A0 x.

    Matrix products on some CPUs round equal columns differently, depending on where they lie in a vector register.
    That would leave 1e-7 of the delta's terms in an adapter at its initial values, so one result serves for both.
    On other devices equal columns come out equal, and the comparison would wait for the device.
    """
    if not layout.anchored or down.device.type != "cpu" or type(down) is not torch.Tensor:
        return False
    width, start = h_columns(layout), anchor_start(layout)
    return torch.equal(down[:width], down[start : start + width])


def repeat_h(P: torch.Tensor, layout: Layout) -> None:
    """Write A x over A0 x in projections `[T, K]`; see [`has_initial_A`]."""
    width, start = h_columns(layout), anchor_start(layout)
    P[:, start : start + width].copy_(P[:, :width])


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax, mixing and cancellation: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def routing_weights(logits: torch.Tensor, top_k: int = 0) -> torch.Tensor:
    """
    The weights of the heads from the router's logits.

    Args:
        logits (`torch.Tensor` of shape `[..., N]`): Logits.
        top_k (`int`, *optional*, defaults to `0`): Keep the largest `top_k` logits of each token, the first of equal
            ones; the other heads get zero weight. 0 keeps all.

    Returns:
        `torch.Tensor` of shape `[..., N]`, in float32 or wider, with rows that sum to one.
    """
    logits = logits.to(_accumulation_dtype(logits.dtype))
    if 0 < top_k < logits.shape[-1]:
        # Not `topk`, whose choice between equal logits is unspecified.
        order = logits.sort(dim=-1, descending=True, stable=True).indices
        dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order[..., top_k:], True)
        logits = logits.masked_fill(dropped, float("-inf"))
    return torch.softmax(logits, dim=-1)


def _split(P: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`A x` [T, 1 or N, r], the head weights [T, N], and `A0 x` like `A x` or `None`, in float32 or wider."""
    dtype = _accumulation_dtype(P.dtype)
    width = h_columns(layout)
    h = P[:, :width].to(dtype).view(P.shape[0], width // layout.r, layout.r)
    if layout.routed:
        weights = routing_weights(logits_of(P, layout), layout.top_k)
    else:
        weights = h.new_full((P.shape[0], layout.num_heads), 1.0 / layout.num_heads)
    if not layout.anchored:
        return h, weights, None
    start = anchor_start(layout)
    return h, weights, P[:, start : start + width].to(dtype).view_as(h)


def _masked(tensor: torch.Tensor, dropout: float, seed: int | torch.Tensor | None) -> torch.Tensor:
    """Head dropout on `tensor` [T, N, r]: dropped elements are zero, the others are scaled up."""
    if seed is None or dropout <= 0.0:
        return tensor
    keep = keep_mask(seed, tuple(tensor.shape), dropout, tensor.device)
    return tensor * keep * (1.0 / (1.0 - dropout))


def _concat_columns(parts: list[torch.Tensor], width: int, dtype: torch.dtype) -> torch.Tensor:
    """The parts side by side, padded with zeros to `width` columns."""
    used = sum(part.shape[1] for part in parts)
    if width > used:
        parts = [*parts, parts[0].new_zeros(parts[0].shape[0], width - used)]
    return torch.cat(parts, dim=1).to(dtype) if len(parts) > 1 else parts[0].to(dtype)


# Mixing of heads


def mix(
    P: torch.Tensor,
    z_width: int,
    layout: Layout,
    *,
    dropout: float = 0.0,
    seed: int | torch.Tensor | None = None,
    partials: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Z from the projections P: `z_i = w_i (m_i . h) / (1 - p) - h0 / N` for each head, and h0.

    Args:
        P (`torch.Tensor` of shape `[T, K]`): Projections.
        z_width (`int`): Columns of the result, padded with zeros beyond [`z_columns`].
        layout ([`Layout`]): The columns of P.
        dropout (`float`, *optional*, defaults to `0.0`): Probability that an element is dropped.
        seed (`int` or scalar int64 `torch.Tensor`, *optional*): Seed of the masks; without it nothing is dropped.
        partials (`torch.Tensor` of shape `[stats_rows(T), 3 + 3 N]`, *optional*): Receives partial sums of
            [`routing_stats`].
        token_mask (`torch.Tensor` of shape `[T]`, *optional*): Non-zero for the tokens that count in them; by default
            all do.

    Returns:
        `torch.Tensor` of shape `[T, Z]`, in the dtype of P.
    """
    h, weights, h0 = _split(P, layout)  # [T, 1 or N, r], [T, N], like h
    if partials is not None:
        partials.copy_(routing_stats(P, layout, token_mask).unsqueeze(0))

    z = _masked(weights.unsqueeze(-1) * h, dropout, seed)  # [T, N, r]
    if h0 is None:
        return _concat_columns([z.flatten(1)], z_width, P.dtype)
    return _concat_columns([(z - h0 * (1.0 / layout.num_heads)).flatten(1), h0.flatten(1)], z_width, P.dtype)


def project_mix(x: torch.Tensor, down: torch.Tensor, z_width: int, layout: Layout) -> torch.Tensor:
    """
    `mix(x down^T)` without dropout, for the few tokens of a decoding step.

    Args:
        x (`torch.Tensor` of shape `[T, d_in]`): Tokens.
        down (`torch.Tensor` of shape `[K, d_in]`): Concatenated weights, see [`concat`].
        z_width (`int`): Columns of the result.
        layout ([`Layout`]): With `shared` and without `top_k`.

    Returns:
        `torch.Tensor` of shape `[T, Z]`, in the dtype of `x`.
    """
    return mix(x @ down.T, z_width, layout)


def mix_backward(
    P: torch.Tensor,
    dZ: torch.Tensor,
    layout: Layout,
    *,
    scaling: float = 1.0,
    heads_width: int = 0,
    dropout: float = 0.0,
    seed: int | torch.Tensor | None = None,
    coeffs: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The gradient of P from that of Z, and the factor that the gradients of the heads need. Masks are recomputed.

        dm_i = m_i . dz_i / (1 - p)      dh = sum_i w_i dm_i         dh0 = dZ_last - sum_i dz_i / N
        dw_i = dm_i . h                  dl = w . (dw - sum_j w_j dw_j)

    B_i enters the delta through z_i and through the mean in the anchor's columns. Together that is
    `dB_i = dy^T (scaling w_i (m_i . h) / (1 - p))`: the weighted and masked projections without the anchor.

    Args:
        P (`torch.Tensor` of shape `[T, K]`): Projections.
        dZ (`torch.Tensor` of shape `[T, Z]`): Gradient of Z.
        layout ([`Layout`]): The columns of P and Z.
        scaling (`float`, *optional*, defaults to `1.0`): Factor of the delta.
        heads_width (`int`, *optional*, defaults to `0`): Columns of the first result, padded with zeros beyond `N r`.
        dropout (`float`), seed (`int` or `torch.Tensor`), token_mask (`torch.Tensor`): As in [`mix`].
        coeffs (`torch.Tensor` of shape `[N + 2]`, *optional*): Adds [`balance_gradient`] to the gradient of the
            logits.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `heads` `[T, max(heads_width, N r)]`, with `dy^T heads` the gradient of
        the heads side by side (see [`split_heads`]), and dP `[T, K]`; in the dtype of P.
    """
    num_heads, columns = layout.num_heads, layout.num_heads * layout.r
    h, weights, h0 = _split(P, layout)  # [T, 1 or N, r], [T, N], like h
    wide = dZ.to(h.dtype)
    dz = wide[:, :columns].view(-1, num_heads, layout.r)  # [T, N, r]

    # Gradients of h, through the mask and the head weights.
    z = _masked(weights.unsqueeze(-1) * h, dropout, seed)  # [T, N, r]
    dm = _masked(dz, dropout, seed)
    dw = (dm * h).sum(-1)  # [T, N]
    dh = weights.unsqueeze(-1) * dm
    grads = [dh.sum(1) if layout.shared else dh.flatten(1)]

    # Gradients of the logits, through the softmax.
    if layout.routed:
        dlogits = weights * (dw - (weights * dw).sum(-1, keepdim=True))  # [T, N]
        if coeffs is not None:
            dlogits = dlogits + balance_gradient(P, layout, coeffs, token_mask)
        grads.append(dlogits)

    # Each z_i subtracts h0 / N.
    if h0 is not None:
        from_heads = (dz.sum(1) if layout.shared else dz.flatten(1)) * (1.0 / num_heads)
        grads.append(wide[:, columns : columns + h_columns(layout)] - from_heads)
    heads = _concat_columns([(z * scaling).flatten(1)], heads_width, P.dtype)
    return heads, _concat_columns(grads, P.shape[1], P.dtype)


# Routing statistics and balance losses


def stats_rows(tokens: int) -> int:
    """Rows of the buffer that [`mix`] fills with partial sums of [`routing_stats`]."""
    return 1


def routing_stats(P: torch.Tensor, layout: Layout, token_mask: torch.Tensor | None) -> torch.Tensor:
    """
    Sums over the tokens that count, from which balance losses and logs are computed.

    Probabilities are the softmax over all heads. Weights mix the heads; they differ from probabilities for `top_k`.

    Args:
        P (`torch.Tensor` of shape `[T, K]`): Projections.
        layout ([`Layout`]): Its columns, with logits.
        token_mask (`torch.Tensor` of shape `[T]`, *optional*): Non-zero for the tokens that count; by default all do.

    Returns:
        `torch.Tensor` of shape `[3 + 3 N]`, in float32 or wider: the number of tokens, the sum of the squared
        log-sum-exp of the logits, the sum of the entropies (nats) of the probabilities; then for each head the number
        of tokens for which it is the most probable (equal heads share the token), the sum of its probabilities, and
        the sum of its weights.
    """
    table = token_stats(logits_of(P, layout), layout.top_k)
    if token_mask is not None:
        # Selected rather than multiplied: padding may compute NaN.
        table = torch.where(token_mask.bool().unsqueeze(1), table, 0.0)
    return table.sum(0)


def token_stats(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """
    What [`routing_stats`] sums, for each token.

    Args:
        logits (`torch.Tensor` of shape `[T, N]`): The router's logits.
        top_k (`int`): See [`Layout`].

    Returns:
        `torch.Tensor` of shape `[T, 3 + 3 N]`: In float32 or wider.
    """
    logits = logits.to(_accumulation_dtype(logits.dtype))
    log_z = torch.logsumexp(logits, -1)  # [T]
    log_p = logits - log_z.unsqueeze(-1)
    p = log_p.exp()
    top = (logits == logits.amax(-1, keepdim=True)).to(p.dtype)

    scalars = torch.stack([torch.ones_like(log_z), log_z**2, -(p * log_p).sum(-1)], 1)  # [T, 3]
    heads = [top / top.sum(-1, keepdim=True), p, routing_weights(logits, top_k)]
    return torch.cat([scalars, *heads], dim=1)


def finalize_routing_stats(
    partials: torch.Tensor,
    stats: torch.Tensor,
    prior: torch.Tensor | None,
    layout: Layout,
    *,
    kind: str,
    factor: float,
    whole_step: bool,
    expected_tokens: float,
    upstream: torch.Tensor | None,
) -> torch.Tensor | None:
    """
    Add the sums of one layer in one micro-batch to its statistics, and derive the gradient of its balance loss.

    Args:
        partials (`torch.Tensor` of shape `[rows, 3 + 3 N]`): Partial sums of [`routing_stats`].
        stats (`torch.Tensor` of shape `[at least 3 + 3 N + 1]`): Sums of the step so far; written to. The element
            after those of [`routing_stats`] is the loss times its tokens.
        prior (`torch.Tensor` of shape `[at least 2 N]`, *optional*): Shares f and P of the step before.
        layout ([`Layout`]): With N heads.
        kind (`str`), factor (`float`), whole_step (`bool`), expected_tokens (`float`): See `balance.RoutingTally`.
        upstream (`torch.Tensor`, *optional*): Gradient of the loss of the micro-batch; without it the result is
            `None`.

    Returns:
        `torch.Tensor` of shape `[N + 2]` or `None`: Coefficients for [`balance_gradient`].
    """
    update = update_stats(
        partials.sum(0).to(stats.dtype), stats, prior, layout.num_heads, kind, expected_tokens if whole_step else None
    )
    return None if update is None or upstream is None else update * (factor * upstream.to(update.dtype))


def update_stats(
    sums: torch.Tensor,
    stats: torch.Tensor,
    prior: torch.Tensor | None,
    num_heads: int,
    kind: str,
    expected_tokens: float | torch.Tensor | None,
) -> torch.Tensor | None:
    """
    [`finalize_routing_stats`] without the factor, for one layer or for several, which are the first dimensions.

    Args:
        sums (`torch.Tensor` of shape `[..., 3 + 3 N]`): The result of [`routing_stats`], in the dtype of `stats`.
        stats (`torch.Tensor` of shape `[..., at least 3 + 3 N + 1]`): Sums of the step so far; written to.
        prior (`torch.Tensor` of shape `[..., at least 2 N]`, *optional*): Shares f and P of the step before.
        num_heads (`int`): N.
        kind (`str`): The balance loss.
        expected_tokens (`float` or `torch.Tensor` of shape `[...]`, *optional*): Tokens of the whole step, if the
            shares of heads are those of the step.

    Returns:
        `torch.Tensor` of shape `[..., N + 2]`, or `None` if there is no balance loss.
    """
    columns, shares = stats_columns(num_heads), slice(3, 3 + 2 * num_heads)
    stats[..., :columns] += sums
    if kind == "none":
        return None

    # Shares of heads: of this micro-batch, or of the step so far.
    count = sums[..., :1].clamp(min=1.0)
    f, P = (sums[..., shares] / count).split(num_heads, -1)  # [..., N] each
    micro_P = P
    if expected_tokens is not None:
        seen = stats[..., :1].clamp(min=1.0)
        left, rest = torch.zeros_like(seen), torch.zeros_like(sums[..., : 2 * num_heads])
        if prior is not None:
            each = isinstance(expected_tokens, torch.Tensor)
            expected = expected_tokens.unsqueeze(-1) if each else expected_tokens  # type: ignore[union-attr]
            left, rest = (expected - seen).clamp(min=0.0), prior[..., : 2 * num_heads]
        f, P = ((stats[..., shares] + left * rest) / (seen + left)).split(num_heads, -1)

    # The loss, and its derivatives for p_i, for the entropy and for the squared log-sum-exp of one token.
    coeffs = stats.new_zeros(*sums.shape[:-1], num_heads + 2)
    if kind == "switch":
        loss = num_heads * (f * micro_P).sum(-1)
        coeffs[..., :num_heads] = num_heads * f
    elif kind == "importance":
        loss = num_heads * (P * P).sum(-1) - 1.0
        coeffs[..., :num_heads] = 2.0 * num_heads * P
    elif kind == "mutual_information":
        log_P = P.clamp(min=torch.finfo(P.dtype).tiny).log()
        loss = (P * log_P).sum(-1) + sums[..., 2] / count[..., 0]
        coeffs[..., :num_heads] = log_P
        coeffs[..., num_heads] = 1.0
    else:
        loss = sums[..., 1] / count[..., 0]
        coeffs[..., num_heads + 1] = 1.0
    stats[..., columns] += loss * sums[..., 0]
    return coeffs


def balance_gradient(
    P: torch.Tensor, layout: Layout, coeffs: torch.Tensor, token_mask: torch.Tensor | None
) -> torch.Tensor:
    """
    The gradient of a balance loss for the logits: `p_j (a_j - sum_i a_i p_i - e (log p_j + H) + 2 z logsumexp)`.

    Args:
        P (`torch.Tensor` of shape `[T, K]`): Projections.
        layout ([`Layout`]): Its columns.
        coeffs (`torch.Tensor` of shape `[N + 2]` or `[T, N + 2]`): Derivatives `a` of the loss for the probability of
            each head in one token, `e` for the entropy of one token, and `z` for the squared log-sum-exp of one token.
        token_mask (`torch.Tensor` of shape `[T]`, *optional*): Non-zero for the tokens that count; by default all do.

    Returns:
        `torch.Tensor` of shape `[T, N]`, in float32 or wider.
    """
    logits = logits_of(P, layout).to(_accumulation_dtype(P.dtype))  # [T, N]
    log_z = torch.logsumexp(logits, -1, keepdim=True)  # [T, 1]
    log_p = logits - log_z
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1, keepdim=True)  # [T, 1]

    coeffs = coeffs.to(p.dtype)
    a, of_entropy, of_z = coeffs[..., : layout.num_heads], coeffs[..., -2:-1], coeffs[..., -1:]
    inner = a - (p * a).sum(-1, keepdim=True) - of_entropy * (log_p + entropy) + 2.0 * of_z * log_z
    gradient = p * inner
    return gradient if token_mask is None else torch.where(token_mask.bool().unsqueeze(1), gradient, 0.0)
