"""The multi-head delta for `torch.compile`: an autograd function that the compiler traces.

The matrix products and the concatenation of the small weights are PyTorch's own, which the compiler plans and fuses;
the rank-space functions between them are the operators of `operators.py`.
"""

from __future__ import annotations

from typing import Any

import torch

from . import rank_space
from .balance import LayerProbe
from .fused import mm_wide, padded, widths
from .operators import mix, mix_backward, mix_backward_with_stats, mix_with_stats
from .rank_space import Layout


def _with_equal_columns(P: torch.Tensor, down: torch.Tensor, layout: Layout) -> torch.Tensor:
    """P with A x in place of A0 x if A is at its initial value, without a branch; see `rank_space.has_initial_A`."""
    width, start = rank_space.h_columns(layout), rank_space.anchor_start(layout)
    initial = (down[:width] == down[start : start + width]).all()
    h0 = torch.where(initial, P[:, :width], P[:, start : start + width])
    return torch.cat([P[:, :start], h0, P[:, start + width :]], dim=1)


class _CompiledDelta(torch.autograd.Function):
    """
    The delta in a form that `torch.compile` traces; the compiler drops the gradients that no input needs.

    Saved are x, P, the concatenated weights, the statistics and the seed: the masks and Z are recomputed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tokens: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        router: torch.Tensor | None,
        anchor_A: torch.Tensor | None,
        anchor_B: torch.Tensor | None,
        logits: torch.Tensor | None,
        seed: torch.Tensor | None,
        token_mask: torch.Tensor | None,
        ticket: torch.Tensor | None,
        row: int,
        scaling: float,
        dropout: float,
        top_k: int,
    ) -> torch.Tensor:
        routed = router is not None or logits is not None
        layout = rank_space.layout_of(A, B, routed=routed, anchor_A=anchor_A, top_k=top_k)
        k, z = widths(layout, tokens.device)
        down, up = rank_space.concat(
            *(A, B, router, anchor_A, anchor_B, layout),
            scaling=scaling,
            dtype=tokens.dtype,
            down_rows=k,
            up_columns=z,
        )

        # P = x down^T, with given logits in the columns of the router's.
        P = torch.mm(tokens, down.T)  # [T, K]
        if layout.anchored and tokens.device.type == "cpu":
            P = _with_equal_columns(P, down, layout)
        if logits is not None:
            P = rank_space.with_logits(P, logits, layout)

        # Z = mix(P)
        partials = None
        if ticket is None:
            Z = mix(P, seed, dropout, z, *layout)  # [T, Z]
        else:
            Z, partials = mix_with_stats(P, token_mask, seed, dropout, z, *layout)

        ctx.save_for_backward(tokens, P, down, up, seed, partials, token_mask, ticket)
        ctx.layout, ctx.row, ctx.scaling, ctx.dropout = layout, row, scaling, dropout
        ctx.shape_A, ctx.dtype_A, ctx.dtype_B = A.shape, A.dtype, B.dtype
        ctx.dtype_router = None if router is None else router.dtype
        ctx.dtype_logits = None if logits is None else logits.dtype
        return torch.mm(Z, up.T)  # [T, d_out]

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tokens, P, down, up, seed, partials, token_mask, ticket = ctx.saved_tensors
        layout = ctx.layout

        # From dy to dP, through the rank space.
        dZ = torch.mm(dy, up)  # [T, Z]
        options = (seed, ctx.dropout, ctx.scaling, padded(layout.num_heads * layout.r, dy.device), *layout)
        if ticket is None:
            heads, dP = mix_backward(P, dZ, *options)  # [T, N r], [T, K]
        else:
            heads, dP = mix_backward_with_stats(P, dZ, partials, token_mask, ticket, ctx.row, *options)

        # Gradients of the parameters: dB = dy^T heads; dA and drouter are rows of dP^T x.
        dB = rank_space.split_heads(mm_wide(dy.T, heads), layout).to(ctx.dtype_B)
        ddown = mm_wide(dP.T, tokens)  # [K, d_in]
        start = rank_space.h_columns(layout)
        dA = ddown[:start].to(ctx.dtype_A).view(ctx.shape_A)
        drouter = dlogits = None
        if ctx.dtype_router is not None:
            drouter = ddown[start : start + layout.num_heads].to(ctx.dtype_router)
        if ctx.dtype_logits is not None:
            dlogits = rank_space.logits_of(dP, layout).to(ctx.dtype_logits)

        dtokens = torch.mm(dP, down)  # [T, d_in]
        return dtokens, dA, dB, drouter, None, None, dlogits, None, None, None, None, None, None, None


def compiled_multihead(
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    router: torch.Tensor | None = None,
    anchor_A: torch.Tensor | None = None,
    anchor_B: torch.Tensor | None = None,
    *,
    base: torch.Tensor | None = None,
    scaling: float = 1.0,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
    logits: torch.Tensor | None = None,
    top_k: int = 0,
    probe: LayerProbe | None = None,
) -> torch.Tensor:
    """
    The delta of a multi-head adapter with head dropout under `torch.compile`, alone or added to its layer's output.

    Args:
        x (`torch.Tensor` of shape `[..., d_in]`):
            Input of the layer. The products run in its dtype.
        A, B, router, anchor_A, anchor_B, scaling, dropout, logits, top_k, probe:
            As in `multihead.multihead_delta`.
        base (`torch.Tensor` of shape `[..., d_out]`, *optional*):
            Output of the layer, in any dtype.
        seed (scalar int64 `torch.Tensor`, *optional*):
            Seed of the masks, see `dropout.draw_seed_tensor`; a number would be a constant of the graph. Without it
            nothing is dropped.

    Returns:
        `torch.Tensor` of shape `[..., d_out]`: `base + delta`, or the delta. In the dtype of `base` where it is
        given.
    """
    delta = _CompiledDelta.apply(
        *(x.reshape(-1, x.shape[-1]), A, B, router, anchor_A, anchor_B, logits, seed),
        probe.token_mask if probe is not None else None,
        probe.tally.ticket if probe is not None else None,
        probe.row if probe is not None else 0,
        *(scaling, dropout if seed is not None else 0.0, top_k),
    )
    delta = delta.view(*x.shape[:-1], B.shape[1])
    # Not `addmm`: the compiler can fuse a sum with what follows it.
    return delta if base is None else base + delta.to(base.dtype)
