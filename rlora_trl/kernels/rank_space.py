"""What happens in rank space, in plain torch: the twins of the Triton kernels, with the same arguments and results.

Columns of P and Z, both possibly padded with zeros; the parts in brackets may be missing:

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


# Functions beside the properties of `Layout`: in torch 2.6, the floor, with which they end, `torch.compile` can't read
# properties of a named tuple; in 2.13 it can.
def h_columns(layout: "Layout") -> int:
    """Columns of A x, and of A0 x."""
    return layout.r if layout.shared else layout.r * layout.num_heads


def anchor_start(layout: "Layout") -> int:
    """The first column of A0 x in P, after those of A x and of the logits."""
    return h_columns(layout) + layout.num_heads * layout.routed


class Layout(NamedTuple):
    """
    Which columns P and Z have, and how the logits become weights.

    Args:
        num_heads (`int`), r (`int`): N and r.
        routed (`bool`): P has N columns of logits; without them every head weighs `1 / N`.
        anchored (`bool`): P and Z have the anchor's columns.
        shared (`bool`): All heads share one A.
        top_k (`int`): Heads kept for each token, by their logits; 0 keeps all.
    """

    num_heads: int
    r: int
    routed: bool = True
    anchored: bool = True
    shared: bool = True
    top_k: int = 0

    @property
    def h_columns(self) -> int:
        """Columns of A x, and of A0 x."""
        return h_columns(self)

    @property
    def anchor_start(self) -> int:
        """The first column of A0 x in P, after those of A x and of the logits."""
        return anchor_start(self)

    @property
    def p_columns(self) -> int:
        return self.anchor_start + self.h_columns * self.anchored

    @property
    def z_columns(self) -> int:
        return self.num_heads * self.r + self.h_columns * self.anchored

    @property
    def statistics_columns(self) -> int:
        """See [`statistics`]."""
        return 3 + 3 * self.num_heads


def layout_of(A: torch.Tensor, B: torch.Tensor, *, routed: bool, anchor_A: torch.Tensor | None, top_k: int) -> Layout:
    """The layout that the shapes of the parameters imply."""
    return Layout(B.shape[0], B.shape[2], routed, anchor_A is not None, A.ndim == 2, top_k)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax, mixing and cancellation: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def routing_weights(logits: torch.Tensor, top_k: int = 0) -> torch.Tensor:
    """
    The weights of the heads from the router's logits.

    Args:
        logits (`torch.Tensor` of shape `[..., N]`): Logits.
        top_k (`int`, *optional*, defaults to `0`): Keep the largest `top_k` logits of each token, of equal ones the
            first; the other heads weigh nothing. 0 keeps all.

    Returns:
        `torch.Tensor` of shape `[..., N]`, in float32 or wider, with rows that sum to one.
    """
    logits = logits.to(_accumulation_dtype(logits.dtype))
    if 0 < top_k < logits.shape[-1]:
        # Not `topk`, which does not say which of equal logits it takes.
        order = logits.sort(dim=-1, descending=True, stable=True).indices
        dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order[..., top_k:], True)
        logits = logits.masked_fill(dropped, float("-inf"))
    return torch.softmax(logits, dim=-1)


def logits_of(P: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The columns of P with the logits, `[T, N]`."""
    start = h_columns(layout)
    return P[:, start : start + layout.num_heads]


def has_initial_A(down: torch.Tensor, layout: Layout) -> bool:
    """
    Whether A and A0 are the same in packed weights on a CPU, so that A x and A0 x are too.

    The matrix product of some CPUs rounds equal columns differently, by where they are in a vector register: of an
    adapter at its initial values 1e-7 of the delta's terms would be left. With this, one result is taken for both.
    Elsewhere equal columns come out equal, and to ask would wait for the device.
    """
    if not layout.anchored or down.device.type != "cpu" or type(down) is not torch.Tensor:
        return False
    width, start = h_columns(layout), anchor_start(layout)
    return torch.equal(down[:width], down[start : start + width])


def repeat_h(P: torch.Tensor, layout: Layout) -> None:
    """Write A x over A0 x in projections `[T, K]`; see [`has_initial_A`]."""
    width, start = h_columns(layout), anchor_start(layout)
    P[:, start : start + width].copy_(P[:, :width])


def _split(P: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`A x` [T, 1 or N, r], the weights of the heads [T, N], and `A0 x` like `A x` or `None`, in float32 or wider."""
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
    """`tensor` [T, N, r] with what head dropout drops set to zero and the rest scaled up."""
    if seed is None or dropout <= 0.0:
        return tensor
    keep = keep_mask(seed, tuple(tensor.shape), dropout, tensor.device)
    return tensor * keep * (1.0 / (1.0 - dropout))


def _assemble(parts: list[torch.Tensor], width: int, dtype: torch.dtype) -> torch.Tensor:
    """The parts side by side, padded with zeros to `width` columns."""
    used = sum(part.shape[1] for part in parts)
    if width > used:
        parts = [*parts, parts[0].new_zeros(parts[0].shape[0], width - used)]
    return torch.cat(parts, dim=1).to(dtype) if len(parts) > 1 else parts[0].to(dtype)


def statistics_rows(tokens: int) -> int:
    """Rows of the buffer that [`mix`] fills with partial sums of [`statistics`]."""
    return 1


def statistics(P: torch.Tensor, layout: Layout, token_mask: torch.Tensor | None) -> torch.Tensor:
    """
    Sums over the tokens that count, of what balance losses and logs are made from.

    Probabilities are the softmax over all heads; weights are what mixes the heads, which differs for `top_k`.

    Args:
        P (`torch.Tensor` of shape `[T, K]`): Projections.
        layout ([`Layout`]): Its columns, with logits.
        token_mask (`torch.Tensor` of shape `[T]`, *optional*): Non-zero for the tokens that count; by default all do.

    Returns:
        `torch.Tensor` of shape `[3 + 3 N]`, in float32 or wider: the number of tokens, the sum of the squared
        log-sum-exp of the logits, the sum of the entropies (nats) of the probabilities; then for each head the number
        of tokens whose largest probability it has (equal ones share the token), the sum of its probabilities, and the
        sum of its weights.
    """
    logits = logits_of(P, layout).to(_accumulation_dtype(P.dtype))
    log_z = torch.logsumexp(logits, -1)
    log_p = logits - log_z.unsqueeze(-1)
    p = log_p.exp()
    top = (logits == logits.amax(-1, keepdim=True)).to(p.dtype)
    columns = [torch.ones_like(log_z), log_z**2, -(p * log_p).sum(-1)]
    heads = [top / top.sum(-1, keepdim=True), p, routing_weights(logits, layout.top_k)]
    table = torch.cat([torch.stack(columns, 1), *heads], dim=1)
    if token_mask is not None:
        # Selected rather than multiplied: what padding computes may be NaN.
        table = torch.where(token_mask.bool().unsqueeze(1), table, 0.0)
    return table.sum(0)


def finalize_routing_stats(
    partials: torch.Tensor,
    record: torch.Tensor,
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
    Add the sums of one layer in one micro-batch to its record, and derive the slope of its balance loss.

    Args:
        partials (`torch.Tensor` of shape `[rows, 3 + 3 N]`): Partial sums of [`statistics`].
        record (`torch.Tensor` of shape `[at least 3 + 3 N + 1]`): Sums of the step so far; written to. The element
            after those of [`statistics`] is the loss times its tokens.
        prior (`torch.Tensor` of shape `[at least 2 N]`, *optional*): Shares f and P of the step before.
        kind (`str`), factor (`float`), whole_step (`bool`), expected_tokens (`float`): See `balance.RoutingTally`.
        upstream (`torch.Tensor`, *optional*): Gradient of the loss of the micro-batch; without it there is no slope.

    Returns:
        `torch.Tensor` of shape `[N + 2]` or `None`: The slope, see [`balance_gradient`].
    """
    num_heads = layout.num_heads
    sums = partials.sum(0).to(record.dtype)
    record[: layout.statistics_columns] += sums
    if kind == "none":
        return None
    count = sums[0].clamp(min=1.0)
    top, p = sums[3 : 3 + num_heads], sums[3 + num_heads : 3 + 2 * num_heads]
    f, P = top / count, p / count
    own_P = P
    if whole_step:
        seen = record[0].clamp(min=1.0)
        left = (expected_tokens - seen).clamp(min=0.0) if prior is not None else torch.zeros_like(seen)
        known = prior if prior is not None else torch.zeros_like(sums[: 2 * num_heads])
        f, P = ((record[3 : 3 + 2 * num_heads] + left * known[: 2 * num_heads]) / (seen + left)).split(num_heads)
    slope = record.new_zeros(num_heads + 2)
    if kind == "switch":
        loss = num_heads * (f * own_P).sum()
        slope[:num_heads] = num_heads * f
    elif kind == "importance":
        loss = num_heads * (P * P).sum() - 1.0
        slope[:num_heads] = 2.0 * num_heads * P
    elif kind == "mutual_information":
        log_P = P.clamp(min=torch.finfo(P.dtype).tiny).log()
        loss = (P * log_P).sum() + sums[2] / count
        slope[:num_heads] = log_P
        slope[num_heads] = 1.0
    else:
        loss = sums[1] / count
        slope[num_heads + 1] = 1.0
    record[layout.statistics_columns] += loss * sums[0]
    return None if upstream is None else slope * (factor * upstream.to(slope.dtype))


def balance_gradient(
    P: torch.Tensor, layout: Layout, slope: torch.Tensor, token_mask: torch.Tensor | None
) -> torch.Tensor:
    """
    The gradient of a balance loss for the logits.

    Args:
        P (`torch.Tensor` of shape `[T, K]`): Projections.
        layout ([`Layout`]): Its columns.
        slope (`torch.Tensor` of shape `[N + 2]`): Derivative of the loss for the probability of each head in one
            token, for the entropy of one token, and for the squared log-sum-exp of one token.
        token_mask (`torch.Tensor` of shape `[T]`, *optional*): Non-zero for the tokens that count.

    Returns:
        `torch.Tensor` of shape `[T, N]`, in float32 or wider.
    """
    logits = logits_of(P, layout).to(_accumulation_dtype(P.dtype))
    log_z = torch.logsumexp(logits, -1, keepdim=True)
    log_p = logits - log_z
    p = log_p.exp()
    slope = slope.to(p.dtype)
    a = slope[: layout.num_heads]
    entropy = -(p * log_p).sum(-1, keepdim=True)
    inner = a - (p * a).sum(-1, keepdim=True) - slope[-2] * (log_p + entropy) + 2.0 * slope[-1] * log_z
    gradient = p * inner
    return gradient if token_mask is None else torch.where(token_mask.bool().unsqueeze(1), gradient, 0.0)


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
    The mixture Z from the projections P: weights, head dropout, and the cancellation of the anchor.

    Args:
        P (`torch.Tensor` of shape `[T, K]`): Projections.
        z_width (`int`): Columns of the result, at least `layout.z_columns`.
        layout ([`Layout`]): The columns of P.
        dropout (`float`): Probability that an element is dropped.
        seed (`int`, *optional*): Seed of the masks; without it nothing is dropped.
        partials (`torch.Tensor` of shape `[statistics_rows(T), layout.statistics_columns]`, *optional*):
            Filled with partial sums of [`statistics`].
        token_mask (`torch.Tensor` of shape `[T]`, *optional*): The tokens that count in them.

    Returns:
        `torch.Tensor` of shape `[T, z_width]`, in the dtype of P.
    """
    h, weights, h0 = _split(P, layout)
    if partials is not None:
        partials.copy_(statistics(P, layout, token_mask).unsqueeze(0))
    z = _masked(weights.unsqueeze(-1) * h, dropout, seed)  # [T, N, r]
    if h0 is None:
        return _assemble([z.flatten(1)], z_width, P.dtype)
    return _assemble([(z - h0 * (1.0 / layout.num_heads)).flatten(1), h0.flatten(1)], z_width, P.dtype)


def project_mix(x: torch.Tensor, down: torch.Tensor, z_width: int, layout: Layout) -> torch.Tensor:
    """
    `mix(x down^T)` without dropout, for the few tokens of a decoding step.

    Args:
        x (`torch.Tensor` of shape `[T, d_in]`), down (`torch.Tensor` of shape `[K, d_in]`): Tokens and packed weights.
        layout ([`Layout`]): With `shared` and without `top_k`.

    The other arguments, and the result, are those of [`mix`].
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
    slope: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The gradient of P from that of Z, and what the gradients of the heads need, whose masks are made anew.

    B_i enters the delta through z_i and through the mean in the anchor's columns, and together that is
    `dB_i = dy^T (scaling w_i (m_i . h) / (1 - p))`: the weighted and masked projections, before the anchor is taken
    off.

    Args:
        P (`torch.Tensor` of shape `[T, K]`), dZ (`torch.Tensor` of shape `[T, Z]`): Projections and upstream gradient.
        scaling (`float`): Factor of the delta.
        heads_width (`int`): Columns of the first result, of which those beyond `N r` are zero.
        slope (`torch.Tensor` of shape `[N + 2]`, *optional*): Adds [`balance_gradient`] to that of the logits.

    The other arguments are those of [`mix`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `heads` `[T, max(heads_width, N r)]`, with `dy^T heads` the gradient of
        the heads side by side (see [`unpack_heads`]), and dP `[T, K]`; in the dtype of P.
    """
    h, weights, h0 = _split(P, layout)
    num_heads = layout.num_heads
    columns = num_heads * layout.r
    wide = dZ.to(h.dtype)
    dz = wide[:, :columns].view(-1, num_heads, layout.r)
    z = _masked(weights.unsqueeze(-1) * h, dropout, seed)
    dm = _masked(dz, dropout, seed)
    dw = (dm * h).sum(-1)  # [T, N]
    dh = weights.unsqueeze(-1) * dm
    grads = [dh.sum(1) if layout.shared else dh.flatten(1)]
    if layout.routed:
        dlogits = weights * (dw - (weights * dw).sum(-1, keepdim=True))
        if slope is not None:
            dlogits = dlogits + balance_gradient(P, layout, slope, token_mask)
        grads.append(dlogits)
    if h0 is not None:
        from_heads = (dz.sum(1) if layout.shared else dz.flatten(1)) * (1.0 / num_heads)
        grads.append(wide[:, columns : columns + layout.h_columns] - from_heads)
    heads = _assemble([(z * scaling).flatten(1)], heads_width, P.dtype)
    return heads, _assemble(grads, P.shape[1], P.dtype)


def pack(
    A: torch.Tensor,
    B: torch.Tensor,
    router: torch.Tensor | None,
    anchor_A: torch.Tensor | None,
    anchor_B: torch.Tensor | None,
    layout: Layout,
    *,
    scaling: float,
    dtype: torch.dtype,
    down_rows: int,
    up_columns: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The small weights side by side, in the dtype of the products.

    Args:
        A `[r, d_in]` or `[N, r, d_in]`, B `[N, d_out, r]`, router `[N, d_in]`, anchor_A like A, anchor_B `[d_out, r]`
            or, with an A for each head, `[N, d_out, r]`: The parameters, the last three optional. Without `router` its
            rows are zero if the layout has them: the logits come from elsewhere.
        layout ([`Layout`]): The columns of P and Z.
        scaling (`float`): Factor of the delta, which goes into `up`.
        dtype (`torch.dtype`): Dtype of the results.
        down_rows (`int`), up_columns (`int`): Sizes with padding.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `down` `[down_rows, d_in]` and `up` `[d_out, up_columns]`.
    """
    num_heads, d_out, r = B.shape
    d_in = A.shape[-1]
    downs = [A.reshape(-1, d_in)]
    if layout.routed:
        downs.append(A.new_zeros(num_heads, d_in) if router is None else router)
    if anchor_A is not None:
        downs.append(anchor_A.reshape(-1, d_in))
    down = torch.cat(downs) if len(downs) > 1 else downs[0]
    ups = B.transpose(0, 1).reshape(d_out, num_heads * r)
    if anchor_B is not None and layout.shared:
        ups = torch.cat([ups, B.mean(0) - anchor_B], dim=1)
    elif anchor_B is not None:
        shift = (B - anchor_B) * (1.0 / num_heads)
        ups = torch.cat([ups, shift.transpose(0, 1).reshape(d_out, num_heads * r)], dim=1)
    down, ups = down.to(dtype), (ups * scaling).to(dtype)
    if down_rows > down.shape[0]:
        down = torch.nn.functional.pad(down, (0, 0, 0, down_rows - down.shape[0]))
    if up_columns > ups.shape[1]:
        ups = torch.nn.functional.pad(ups, (0, up_columns - ups.shape[1]))
    return down, ups


def addresses_of(layers: list[AdapterTensors]) -> torch.Tensor | None:
    """What a kernel needs to know of where tensors are; here nothing."""
    return None


def concat_layers(
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
    [`pack`] for L layers of the same sizes.

    Args:
        layers (`list[AdapterTensors]`): Contiguous tensors of each.
        addresses (`torch.Tensor`, *optional*): [`addresses_of`] the layers.

    The other arguments are those of [`pack`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: All `down` `[L, down_rows, d_in]` and all `up` `[L, d_out, up_columns]`.
    """
    packed = [
        pack(*tensors, layout, scaling=scaling, dtype=dtype, down_rows=down_rows, up_columns=up_columns)
        for tensors in layers
    ]
    downs, ups = zip(*packed, strict=True)
    return torch.stack(downs), torch.stack(ups)


def unpack_heads(dheads: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The gradient of B `[N, d_out, r]`, a view, from `dy^T heads` `[d_out, >= N r]` (see [`mix_backward`])."""
    columns = layout.num_heads * layout.r
    return dheads[:, :columns].view(-1, layout.num_heads, layout.r).transpose(0, 1)
