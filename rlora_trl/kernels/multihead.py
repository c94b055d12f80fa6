"""The multi-head delta in its rank-space form: heads are weighted and masked where they are `r` wide, not `d_out`.

With h = A x, h0 = A0 x and the weights w of the router, equation 4 of the paper (arXiv 2502.15455) reads

    y = s (sum_i w_i B_i (m_i . h) / (1 - p)  -  Bbar0 h0)

It is computed as

    z_i = w_i (m_i . h) / (1 - p) - h0 / N                 [T, r] for each head
    y   = s (sum_i B_i z_i + (mean_i B_i - Bbar0) h0)      one product with [B_1 .. B_N, mean B - Bbar0]

which is the same function, but the offset cancels in rank space, before anything is rounded to 16 bits: where the
adapter is at its initial value and the weights are 1 / N, both terms are exactly zero in every dtype.
"""

import torch
from torch.nn import functional as F

from .dropout import keep_mask


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax, mixing and cancellation: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def routing_weights(logits: torch.Tensor) -> torch.Tensor:
    """Softmax over heads of the router's logits `[..., N]`, in float32 or wider."""
    return torch.softmax(logits.to(_accumulation_dtype(logits.dtype)), dim=-1)


def multihead_delta(
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    router: torch.Tensor | None = None,
    anchor_A: torch.Tensor | None = None,
    anchor_B: torch.Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout: float = 0.0,
    seed: int | None = None,
    dropout_position: str = "head",
) -> torch.Tensor:
    """
    What a multi-head adapter adds to the output of its layer.

    The products run in the dtype of `x`, so the small weights are cast and the activations are not; softmax, mixing
    and the cancellation of the offset run in float32 (float64 for float64 inputs).

    Args:
        x (`torch.Tensor` of shape `[..., d_in]`):
            Input of the layer.
        A (`torch.Tensor` of shape `[r, d_in]`):
            Shared down-projection.
        B (`torch.Tensor` of shape `[N, d_out, r]`):
            Head matrices.
        router (`torch.Tensor` of shape `[N, d_in]`, *optional*):
            Router. Without it every head weighs `1 / N`.
        anchor_A (`torch.Tensor` of shape `[r, d_in]`, *optional*), anchor_B (`torch.Tensor` of shape `[d_out, r]`,
            *optional*): Initial `A` and mean over heads of the initial `B`, both or neither. They get no gradient.
        scaling (`float`, *optional*, defaults to `1.0`):
            Factor of the delta.
        dropout (`float`, *optional*, defaults to `0.0`):
            Probability in `[0, 1)` that an element is dropped. Applied only if `seed` is given.
        seed (`int`, *optional*):
            Seed of the dropout mask.
        dropout_position (`str`, *optional*, defaults to `"head"`):
            `"head"`: one independent mask for each head, on `A x`. `"input"`: one mask, on the `x` that `A` sees.

    Returns:
        `torch.Tensor` of shape `[..., d_out]`, in the dtype in which the products ran.
    """
    num_heads, d_out, r = B.shape
    tokens = x.reshape(-1, x.shape[-1])  # [T, d_in]
    dtype = _accumulation_dtype(x.dtype)
    mask_seed = seed if dropout > 0.0 else None
    drop_input = mask_seed is not None and dropout_position == "input"

    h, logits, h0 = _project(tokens, None if drop_input else A, router, anchor_A)
    if mask_seed is not None and drop_input:
        keep = keep_mask(mask_seed, tuple(tokens.shape), dropout, tokens.device)
        h = F.linear(tokens * keep * (1.0 / (1.0 - dropout)), A.to(x.dtype))
    assert h is not None  # from one of the two
    h = h.to(dtype).unsqueeze(1)  # [T, 1, r]

    if logits is None:
        z = (h * (1.0 / num_heads)).expand(-1, num_heads, -1)  # [T, N, r]
    else:
        z = routing_weights(logits).unsqueeze(-1) * h
    if mask_seed is not None and not drop_input:
        z = z * keep_mask(mask_seed, tuple(z.shape), dropout, z.device) * (1.0 / (1.0 - dropout))

    ups = B.transpose(0, 1).reshape(d_out, num_heads * r)
    if h0 is None or anchor_B is None:
        z = z.flatten(1)
    else:
        h0 = h0.to(dtype)
        z = torch.cat([(z - h0.unsqueeze(1) * (1.0 / num_heads)).flatten(1), h0], dim=-1)
        ups = torch.cat([ups, B.mean(0) - anchor_B.detach()], dim=-1)
    y = F.linear((z * scaling).to(x.dtype), ups.to(x.dtype))  # [T, d_out]
    return y.view(*x.shape[:-1], d_out)


def _project(
    tokens: torch.Tensor, A: torch.Tensor | None, router: torch.Tensor | None, anchor_A: torch.Tensor | None
) -> list[torch.Tensor | None]:
    """`A x` [T, r], `R x` [T, N] and `A0 x` [T, r] by one product that reads x once; `None` for what is not given."""
    downs = [A, router, None if anchor_A is None else anchor_A.detach()]
    given = [weight for weight in downs if weight is not None]
    if not given:
        return [None, None, None]
    projected = F.linear(tokens, torch.cat(given).to(tokens.dtype))
    parts = iter(projected.split([weight.shape[0] for weight in given], dim=-1))
    return [None if weight is None else next(parts) for weight in downs]
