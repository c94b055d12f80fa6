"""The multi-head delta composed of PyTorch's own operations, which autograd differentiates.

With h = A x, h0 = A0 x and the weights w of the router, equation 4 of the R-LoRA paper (arXiv 2502.15455) reads

    y = s (sum_i w_i B_i (m_i . h) / (1 - p)  -  Bbar0 h0)

Heads are weighted and masked in rank space, where they are `r` wide, not `d_out`, and the sum is computed as

    z_i = w_i (m_i . h) / (1 - p) - h0 / N                 [T, r] for each head
    y   = s (sum_i B_i z_i + (mean_i B_i - Bbar0) h0)      one product with [B_1 .. B_N, mean B - Bbar0]

which is the same function, but the offset cancels before anything is rounded to 16 bits: while the adapter is at its
initial value and the weights are 1 / N, both terms are exactly zero in every dtype.
"""

import torch
from torch.nn import functional as F

from . import rank_space
from .balance import LayerProbe
from .dropout import keep_mask
from .operators import probe_projections


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
    seed: int | torch.Tensor | None = None,
    dropout_position: str = "head",
    logits: torch.Tensor | None = None,
    top_k: int = 0,
    probe: LayerProbe | None = None,
) -> torch.Tensor:
    """
    The delta that a multi-head adapter adds to the output of its layer.

    The products run in the dtype of `x`, so the small weights are cast and the activations are not; softmax, mixing
    and the cancellation of the offset run in float32 (float64 for float64 inputs).

    Args:
        x (`torch.Tensor` of shape `[..., d_in]`):
            Input of the layer.
        A (`torch.Tensor` of shape `[r, d_in]` or `[N, r, d_in]`):
            Down-projection, shared or one for each head.
        B (`torch.Tensor` of shape `[N, d_out, r]`):
            Head matrices.
        router (`torch.Tensor` of shape `[N, d_in]`, *optional*):
            Router. Without it, and without `logits`, every head weighs `1 / N`.
        anchor_A (`torch.Tensor` like `A`, *optional*), anchor_B (`torch.Tensor` of shape `[d_out, r]`, *optional*):
            Initial `A` and mean of the initial `B` ([`mean_of_heads`]), both or neither. They get no gradient. With an
            A for each head `anchor_B` is the initial `B` itself.
        scaling (`float`, *optional*, defaults to `1.0`):
            Factor of the delta.
        dropout (`float`, *optional*, defaults to `0.0`):
            Probability in `[0, 1)` that an element is dropped. Applied only if `seed` is given.
        seed (`int` or scalar int64 `torch.Tensor`, *optional*):
            Seed of the dropout mask.
        dropout_position (`str`, *optional*, defaults to `"head"`):
            `"head"`: one independent mask for each head, on `A x`. `"input"`: one mask, on the `x` that `A` reads.
        logits (`torch.Tensor` of shape `[T, N]`, *optional*):
            Logits of the heads for each token, in place of a router's.
        top_k (`int`, *optional*, defaults to `0`):
            Heads kept for each token; 0 keeps all.
        probe (`LayerProbe`, *optional*):
            Makes the backward pass report how heads are used, and add the gradient of a balance loss.

    Returns:
        `torch.Tensor` of shape `[..., d_out]`, in the dtype in which the products ran.
    """
    tokens = x.reshape(-1, x.shape[-1])  # [T, d_in]
    anchor_A = None if anchor_A is None else anchor_A.detach()
    anchor_B = None if anchor_B is None else anchor_B.detach()
    routed = router is not None or logits is not None
    layout = rank_space.layout_of(A, B, routed=routed, anchor_A=anchor_A, top_k=top_k)
    down, up = rank_space.concat(A, B, router, anchor_A, anchor_B, layout, scaling=scaling, dtype=x.dtype)

    # P = x down^T; a mask on the input is for the rows of A alone.
    start = rank_space.h_columns(layout)
    if seed is not None and dropout > 0.0 and dropout_position == "input":
        keep = keep_mask(seed, tuple(tokens.shape), dropout, tokens.device)
        h = F.linear(tokens * keep * (1.0 / (1.0 - dropout)), down[:start])
        P = torch.cat([h, F.linear(tokens, down[start:])], dim=1) if down.shape[0] > start else h
        seed = None
    else:
        P = F.linear(tokens, down)  # [T, K]
        if not torch.compiler.is_compiling() and rank_space.has_initial_A(down.detach(), layout):
            # The value of A x, the gradient of A0 x.
            h, h0 = P[:, :start], P[:, rank_space.anchor_start(layout) :]
            P = torch.cat([P[:, : P.shape[1] - h0.shape[1]], h.detach() + (h0 - h0.detach())], dim=1)
    if logits is not None:
        P = rank_space.with_logits(P, logits, layout)
    if probe is not None:
        P = probe_projections(P, layout, probe)

    Z = rank_space.mix(P, 0, layout, dropout=dropout, seed=seed)  # [T, Z]
    return F.linear(Z, up).view(*x.shape[:-1], B.shape[1])
