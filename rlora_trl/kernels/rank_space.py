"""What happens in rank space, in plain torch: the twins of the Triton kernels, with the same arguments and results.

Layout, with K = r + N + r columns of P and Z = (N + 1) r columns of the mixture, both possibly padded with zeros:

    P  [T, K] = x down^T     down [K, d_in]  = [A; R; A0]
    Z  [T, Z]                up   [d_out, Z] = scaling [B_1 .. B_N, mean B - B0]      delta = Z up^T

Without a router (uniform weights) the N columns of R are missing, without an anchor the last r columns of both.
"""

import torch

from .dropout import keep_mask


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax, mixing and cancellation: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def routing_weights(logits: torch.Tensor) -> torch.Tensor:
    """Softmax over heads of the router's logits `[..., N]`, in float32 or wider."""
    return torch.softmax(logits.to(_accumulation_dtype(logits.dtype)), dim=-1)


def _split(
    P: torch.Tensor, num_heads: int, r: int, routed: bool, anchored: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`A x` [T, r], the weights of the heads [T, N], and `A0 x` [T, r] or `None`, in float32 or wider."""
    dtype = _accumulation_dtype(P.dtype)
    h = P[:, :r].to(dtype)
    if routed:
        weights = routing_weights(P[:, r : r + num_heads])
    else:
        weights = h.new_full((P.shape[0], num_heads), 1.0 / num_heads)
    start = r + num_heads * routed
    return h, weights, P[:, start : start + r].to(dtype) if anchored else None


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


def mix(
    P: torch.Tensor,
    z_width: int,
    num_heads: int,
    r: int,
    *,
    routed: bool,
    anchored: bool,
    dropout: float,
    seed: int | torch.Tensor | None,
) -> torch.Tensor:
    """
    The mixture Z from the projections P: weights, head dropout, and the cancellation of the anchor.

    Args:
        P (`torch.Tensor` of shape `[T, K]`): Projections.
        z_width (`int`): Columns of the result, at least `(N + anchored) * r`.
        num_heads (`int`), r (`int`): N and r.
        routed (`bool`), anchored (`bool`): Whether P has the router's and the anchor's columns.
        dropout (`float`): Probability that an element is dropped.
        seed (`int`, *optional*): Seed of the masks; without it nothing is dropped.

    Returns:
        `torch.Tensor` of shape `[T, z_width]`, in the dtype of P.
    """
    h, weights, h0 = _split(P, num_heads, r, routed, anchored)
    z = _masked(weights.unsqueeze(-1) * h.unsqueeze(1), dropout, seed)  # [T, N, r]
    if h0 is None:
        return _assemble([z.flatten(1)], z_width, P.dtype)
    return _assemble([(z - h0.unsqueeze(1) * (1.0 / num_heads)).flatten(1), h0], z_width, P.dtype)


def project_mix(
    x: torch.Tensor, down: torch.Tensor, z_width: int, num_heads: int, r: int, *, routed: bool, anchored: bool
) -> torch.Tensor:
    """
    `mix(x down^T)` without dropout, for the few tokens of a decoding step.

    Args:
        x (`torch.Tensor` of shape `[T, d_in]`), down (`torch.Tensor` of shape `[K, d_in]`): Tokens and packed weights.

    The other arguments, and the result, are those of [`mix`].
    """
    P = x @ down.T
    return mix(P, z_width, num_heads, r, routed=routed, anchored=anchored, dropout=0.0, seed=None)


def mix_backward(
    P: torch.Tensor,
    dZ: torch.Tensor,
    num_heads: int,
    r: int,
    *,
    routed: bool,
    anchored: bool,
    dropout: float,
    seed: int | torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The gradient of P from that of Z, and Z itself again, whose masks are made anew from the seed.

    Args:
        P (`torch.Tensor` of shape `[T, K]`), dZ (`torch.Tensor` of shape `[T, Z]`): Projections and upstream gradient.

    The other arguments are those of [`mix`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Z `[T, Z]` and dP `[T, K]`, in the dtype of P.
    """
    h, weights, h0 = _split(P, num_heads, r, routed, anchored)
    wide = dZ.to(h.dtype)
    dz = wide[:, : num_heads * r].view(-1, num_heads, r)
    z = _masked(weights.unsqueeze(-1) * h.unsqueeze(1), dropout, seed)
    dm = _masked(dz, dropout, seed)
    dw = (dm * h.unsqueeze(1)).sum(-1)  # [T, N]
    grads = [(weights.unsqueeze(-1) * dm).sum(1)]
    if routed:
        grads.append(weights * (dw - (weights * dw).sum(-1, keepdim=True)))
    mixture = [z.flatten(1)]
    if h0 is not None:
        mixture = [(z - h0.unsqueeze(1) * (1.0 / num_heads)).flatten(1), h0]
        grads.append(wide[:, num_heads * r : (num_heads + 1) * r] - dz.sum(1) * (1.0 / num_heads))
    return _assemble(mixture, dZ.shape[1], P.dtype), _assemble(grads, P.shape[1], P.dtype)


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
    """
    The small weights side by side, in the dtype of the products.

    Args:
        A `[r, d_in]`, B `[N, d_out, r]`, router `[N, d_in]`, anchor_A `[r, d_in]`, anchor_B `[d_out, r]`:
            The parameters, the last three optional.
        scaling (`float`): Factor of the delta, which goes into `up`.
        dtype (`torch.dtype`): Dtype of the results.
        down_rows (`int`), up_columns (`int`): Sizes with padding.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `down` `[down_rows, d_in]` and `up` `[d_out, up_columns]`.
    """
    num_heads, d_out, r = B.shape
    downs = [weight for weight in (A, router, anchor_A) if weight is not None]
    down = torch.cat(downs) if len(downs) > 1 else A
    ups = B.transpose(0, 1).reshape(d_out, num_heads * r)
    if anchor_B is not None:
        ups = torch.cat([ups, B.mean(0) - anchor_B], dim=1)
    down, ups = down.to(dtype), (ups * scaling).to(dtype)
    if down_rows > down.shape[0]:
        down = torch.nn.functional.pad(down, (0, 0, 0, down_rows - down.shape[0]))
    if up_columns > ups.shape[1]:
        ups = torch.nn.functional.pad(ups, (0, up_columns - ups.shape[1]))
    return down, ups


def unpack_up(
    dUp: torch.Tensor, num_heads: int, r: int, *, scaling: float, anchored: bool, dtype: torch.dtype
) -> torch.Tensor:
    """
    The gradient of B `[N, d_out, r]`, in `dtype`, from that of `up` `[d_out, Z]`.

    Through `mean B` each head gets 1/N of what the anchor's columns get.
    """
    d_out = dUp.shape[0]
    heads = dUp[:, : num_heads * r].view(d_out, num_heads, r)
    if anchored:
        heads = heads + dUp[:, num_heads * r : (num_heads + 1) * r].unsqueeze(1) * (1.0 / num_heads)
    return (heads * scaling).transpose(0, 1).to(dtype).contiguous()
