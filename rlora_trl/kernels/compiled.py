"""The rank-space functions as operators of PyTorch, and the multi-head delta made of them for `torch.compile`.

A compiler can't look into the kernels, so each function of `rank_space` that a layer needs is a `torch.library`
operator here: opaque, with a twin that tells shapes, so that a compiled model has no graph break in its adapters. The
matrix products stay PyTorch's own, which the compiler plans and fuses, and so does the packing of the small weights.

    mix                     Z from P                              pure
    mix_recorded            the same, with the layer's statistics pure
    mix_backward            dP from dZ, and what dB is made from pure
    mix_backward_recorded   the same, and reports to a tally      at run time, in the backward pass
    record                  dP with a balance gradient added      at run time, in the backward pass

What changes with each micro-batch may not be a constant of a graph. A [`RoutingTally`] is therefore known by its
ticket, a scalar tensor that the graph takes as an input, and is looked up when the backward pass runs. The last two
operators need the upstream gradient as an argument, so a compiler can't move them to the forward pass, and what they
return is used, so it can't drop them; recomputed forward passes have no effects that could double.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from . import rank_space
from .balance import LayerProbe, report, tally_of
from .fused import backend, mm_wide, new_partials, padded, widths
from .rank_space import Layout


NAMESPACE = "rlora_trl"
# CUDA graphs replay kernels without the Python that looks up the tally. Versions without the tag, such as torch 2.6,
# leave out whatever has inputs on the CPU, which tickets are.
_EFFECTS = tuple(tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None)
# Kernels take rows that are side by side. torch 2.6 has the second tag only.
_LAYOUT_TAG = getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)
# The six numbers of `Layout`, in its order.
_LAYOUT = "int num_heads, int r, bool routed, bool anchored, bool shared, int top_k"


def _define(name: str, schema: str, run: Callable, fake: Callable, tags: tuple = ()) -> Any:
    """Register an operator; `run` is for all devices."""
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag, _LAYOUT_TAG, *tags))
    torch.library.impl(qualified, "CompositeExplicitAutograd", run)
    torch.library.register_fake(qualified, fake)
    return getattr(getattr(torch.ops, NAMESPACE), name)


def _mix(P: torch.Tensor, seed: torch.Tensor | None, dropout: float, z_width: int, *layout: Any) -> torch.Tensor:
    return backend(P.device, P.dtype).mix(P.contiguous(), z_width, Layout(*layout), dropout=dropout, seed=seed)


def _mix_fake(P: torch.Tensor, seed: torch.Tensor | None, dropout: float, z_width: int, *layout: Any) -> torch.Tensor:
    return P.new_empty(P.shape[0], z_width)


def _mix_recorded(
    P: torch.Tensor,
    token_mask: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout: float,
    z_width: int,
    *layout: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    partials = new_partials(P, Layout(*layout))
    Z = backend(P.device, P.dtype).mix(
        *(P.contiguous(), z_width, Layout(*layout)),
        dropout=dropout,
        seed=seed,
        partials=partials,
        token_mask=token_mask,
    )
    return Z, partials


def _mix_recorded_fake(
    P: torch.Tensor,
    token_mask: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout: float,
    z_width: int,
    *layout: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    return P.new_empty(P.shape[0], z_width), new_partials(P, Layout(*layout))


def _mix_backward(
    P: torch.Tensor,
    dZ: torch.Tensor,
    seed: torch.Tensor | None,
    dropout: float,
    scaling: float,
    heads_width: int,
    *layout: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    return backend(P.device, P.dtype).mix_backward(
        *(P.contiguous(), dZ.contiguous(), Layout(*layout)),
        scaling=scaling,
        heads_width=heads_width,
        dropout=dropout,
        seed=seed,
    )


def _mix_backward_fake(
    P: torch.Tensor,
    dZ: torch.Tensor,
    seed: torch.Tensor | None,
    dropout: float,
    scaling: float,
    heads_width: int,
    *layout: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_heads, r, *_ = layout
    return P.new_empty(P.shape[0], max(heads_width, num_heads * r)), P.new_empty(P.shape)


def _mix_backward_recorded(
    P: torch.Tensor,
    dZ: torch.Tensor,
    partials: torch.Tensor,
    token_mask: torch.Tensor | None,
    ticket: torch.Tensor,
    row: int,
    seed: torch.Tensor | None,
    dropout: float,
    scaling: float,
    heads_width: int,
    *layout: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    ops, columns = backend(P.device, P.dtype), Layout(*layout)
    slope = LayerProbe(tally_of(ticket), row, token_mask).close(ops, partials, columns)
    return ops.mix_backward(
        *(P.contiguous(), dZ.contiguous(), columns),
        scaling=scaling,
        heads_width=heads_width,
        dropout=dropout,
        seed=seed,
        slope=slope,
        token_mask=token_mask,
    )


def _mix_backward_recorded_fake(
    P: torch.Tensor, dZ: torch.Tensor, partials: Any, token_mask: Any, ticket: Any, row: Any, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return _mix_backward_fake(P, dZ, *rest)


def _record(
    P: torch.Tensor, dP: torch.Tensor, token_mask: torch.Tensor | None, ticket: torch.Tensor, row: int, *layout: Any
) -> torch.Tensor:
    return report(P, dP.clone(), Layout(*layout), LayerProbe(tally_of(ticket), row, token_mask))


mix = _define(
    "mix",
    f"(Tensor P, Tensor? seed, float dropout, SymInt z_width, {_LAYOUT}) -> Tensor",
    _mix,
    _mix_fake,
)
mix_recorded = _define(
    "mix_recorded",
    f"(Tensor P, Tensor? token_mask, Tensor? seed, float dropout, SymInt z_width, {_LAYOUT}) -> (Tensor, Tensor)",
    _mix_recorded,
    _mix_recorded_fake,
)
mix_backward = _define(
    "mix_backward",
    "(Tensor P, Tensor dZ, Tensor? seed, float dropout, float scaling, SymInt heads_width, "
    f"{_LAYOUT}) -> (Tensor, Tensor)",
    _mix_backward,
    _mix_backward_fake,
)
mix_backward_recorded = _define(
    "mix_backward_recorded",
    "(Tensor P, Tensor dZ, Tensor partials, Tensor? token_mask, Tensor ticket, SymInt row, Tensor? seed, "
    f"float dropout, float scaling, SymInt heads_width, {_LAYOUT}) -> (Tensor, Tensor)",
    _mix_backward_recorded,
    _mix_backward_recorded_fake,
    _EFFECTS,
)
record = _define(
    "record",
    f"(Tensor P, Tensor dP, Tensor? token_mask, Tensor ticket, SymInt row, {_LAYOUT}) -> Tensor",
    _record,
    lambda P, *rest: P.new_empty(P.shape),
    _EFFECTS,
)


def _mix_setup(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    P, seed, dropout, _, *layout = inputs
    ctx.save_for_backward(P, seed)
    ctx.dropout, ctx.layout = dropout, layout


def _mix_gradient(ctx: Any, dZ: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    P, seed = ctx.saved_tensors
    return mix_backward(P, dZ, seed, ctx.dropout, 1.0, 0, *ctx.layout)[1], *(None,) * 9


torch.library.register_autograd(f"{NAMESPACE}::mix", _mix_gradient, setup_context=_mix_setup)


def _with_equal_columns(P: torch.Tensor, down: torch.Tensor, layout: Layout) -> torch.Tensor:
    """P with A0 x as A x where A is at its initial value, without asking; see `rank_space.has_initial_A`."""
    width, start = rank_space.h_columns(layout), rank_space.anchor_start(layout)
    initial = (down[:width] == down[start : start + width]).all()
    h0 = torch.where(initial, P[:, :width], P[:, start : start + width])
    return torch.cat([P[:, :start], h0, P[:, start + width :]], dim=1)


class _CompiledDelta(torch.autograd.Function):
    """
    The delta, in a form that `torch.compile` traces; of what backward returns it drops what nobody asks for.

    Saved are x, P, the packed weights, the statistics and the seed: the mask and Z are made again.
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
        down, up = rank_space.pack(
            *(A, B, router, anchor_A, anchor_B, layout),
            scaling=scaling,
            dtype=tokens.dtype,
            down_rows=k,
            up_columns=z,
        )
        P = torch.mm(tokens, down.T)  # [T, K]
        if layout.anchored and tokens.device.type == "cpu":
            P = _with_equal_columns(P, down, layout)
        if logits is not None:
            start = rank_space.h_columns(layout)
            P = torch.cat([P[:, :start], logits.to(P.dtype), P[:, start + layout.num_heads :]], dim=1)
        partials = None
        if ticket is None:
            Z = mix(P, seed, dropout, z, *layout)
        else:
            Z, partials = mix_recorded(P, token_mask, seed, dropout, z, *layout)
        ctx.save_for_backward(tokens, P, down, up, seed, partials, token_mask, ticket)
        ctx.layout, ctx.row, ctx.scaling, ctx.dropout = layout, row, scaling, dropout
        ctx.shape_A, ctx.dtype_A, ctx.dtype_B = A.shape, A.dtype, B.dtype
        ctx.dtype_router = None if router is None else router.dtype
        ctx.dtype_logits = None if logits is None else logits.dtype
        return torch.mm(Z, up.T)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tokens, P, down, up, seed, partials, token_mask, ticket = ctx.saved_tensors
        layout = ctx.layout
        dZ = torch.mm(dy, up)  # [T, Z]
        how = (seed, ctx.dropout, ctx.scaling, padded(layout.num_heads * layout.r, dy.device), *layout)
        if ticket is None:
            heads, dP = mix_backward(P, dZ, *how)
        else:
            heads, dP = mix_backward_recorded(P, dZ, partials, token_mask, ticket, ctx.row, *how)
        dB = rank_space.unpack_heads(mm_wide(dy.T, heads), layout).to(ctx.dtype_B)
        ddown = mm_wide(dP.T, tokens)  # [K, d_in]
        start = rank_space.h_columns(layout)
        dA = ddown[:start].to(ctx.dtype_A).view(ctx.shape_A)
        drouter = dlogits = None
        if ctx.dtype_router is not None:
            drouter = ddown[start : start + layout.num_heads].to(ctx.dtype_router)
        if ctx.dtype_logits is not None:
            dlogits = rank_space.logits_of(dP, layout).to(ctx.dtype_logits)
        dtokens = torch.mm(dP, down)
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
    weight: torch.Tensor | None = None,
    scaling: float = 1.0,
    dropout: float = 0.0,
    seed: int | torch.Tensor | None = None,
    logits: torch.Tensor | None = None,
    top_k: int = 0,
    probe: LayerProbe | None = None,
) -> torch.Tensor:
    """
    [`fused_multihead`] for code under `torch.compile`: without a graph break, and with products that it may fuse.

    Args:
        base (`torch.Tensor` of shape `[..., d_out]`, *optional*):
            Output of the layer, in any dtype.
        seed (`int` or scalar int64 `torch.Tensor`, *optional*):
            Seed of the masks. A tensor, see `draw_seed_tensor`; a number would be a constant of the graph.

    The other arguments are those of [`fused_multihead`], without `inplace`, which is for the compiler to decide.

    Returns:
        `torch.Tensor` of shape `[..., d_out]`: `base + delta`, `x weight^T + delta`, or the delta. In the dtype of
        `base` where it is given.

    Raises:
        ValueError: If both `base` and `weight`, or both `router` and `logits`, are given.
    """
    if base is not None and weight is not None:
        raise ValueError("Give `base` (the layer's output) or `weight` (to compute it here), not both.")
    if router is not None and logits is not None:
        raise ValueError("Give `router` or `logits` (which take its place), not both.")
    if dropout <= 0.0:
        seed = None
    elif isinstance(seed, int):
        seed = torch.full((), seed, dtype=torch.int64, device=x.device)
    # Under reentrant checkpointing the first pass has no backward pass: the recomputation records.
    if not torch.is_grad_enabled():
        probe = None
    delta = _CompiledDelta.apply(
        *(x.reshape(-1, x.shape[-1]), A, B, router, anchor_A, anchor_B, logits, seed),
        probe.token_mask if probe is not None else None,
        probe.tally.ticket if probe is not None else None,
        probe.row if probe is not None else 0,
        *(scaling, dropout if seed is not None else 0.0, top_k),
    )
    delta = delta.view(*x.shape[:-1], B.shape[1])
    if weight is not None:
        base = F.linear(x, weight)
    # Not `addmm`: a sum can be fused with what follows it.
    return delta if base is None else base + delta.to(base.dtype)
