"""The rank-space functions as operators of PyTorch, which `torch.compile` does not look into.

A compiler cannot trace the kernels, so each function of `rank_space` that a layer needs is a `torch.library` operator
with a fake implementation that gives the shapes of its results. A compiled model has no graph break in its adapters.

    mix                      Z from P                               pure
    mix_with_stats           Z, and the layer's partial sums        pure
    mix_backward             dP from dZ, and the factor of dB       pure
    mix_backward_with_stats  the same, and reports to a tally       at run time, in the backward pass
    add_balance_gradient     dP with a balance gradient added       at run time, in the backward pass

What changes with each micro-batch must not be a constant of a graph. The graph therefore knows a [`RoutingTally`] by
its ticket, a scalar tensor among its inputs, and looks it up when the backward pass runs. The last two operators need
the upstream gradient as an argument, so a compiler cannot move them to the forward pass, and their results are used,
so it cannot drop them. Recomputed forward passes have no effects that could double.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import rank_space
from .balance import LayerProbe, tally_of
from .fused import backend, new_partials
from .rank_space import Layout


NAMESPACE = "rlora_trl"
# CUDA graphs replay kernels without the Python that looks up the tally. Versions without the tag, such as torch 2.6,
# exclude whatever has inputs on the CPU, which tickets are.
_EFFECTS = tuple(tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None)
# Kernels need contiguous rows. torch 2.6 has the second tag only.
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


# Forward


def _mix(P: torch.Tensor, seed: torch.Tensor | None, dropout: float, z_width: int, *layout: Any) -> torch.Tensor:
    return backend(P.device, P.dtype).mix(P.contiguous(), z_width, Layout(*layout), dropout=dropout, seed=seed)


def _mix_fake(P: torch.Tensor, seed: torch.Tensor | None, dropout: float, z_width: int, *layout: Any) -> torch.Tensor:
    return P.new_empty(P.shape[0], z_width)


def _mix_with_stats(
    P: torch.Tensor,
    token_mask: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout: float,
    z_width: int,
    *layout: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    columns = Layout(*layout)
    partials = new_partials(P, columns)
    Z = backend(P.device, P.dtype).mix(
        *(P.contiguous(), z_width, columns), dropout=dropout, seed=seed, partials=partials, token_mask=token_mask
    )
    return Z, partials


def _mix_with_stats_fake(
    P: torch.Tensor, token_mask: Any, seed: Any, dropout: float, z_width: int, *layout: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return P.new_empty(P.shape[0], z_width), new_partials(P, Layout(*layout))


mix = _define(
    "mix",
    f"(Tensor P, Tensor? seed, float dropout, SymInt z_width, {_LAYOUT}) -> Tensor",
    _mix,
    _mix_fake,
)
mix_with_stats = _define(
    "mix_with_stats",
    f"(Tensor P, Tensor? token_mask, Tensor? seed, float dropout, SymInt z_width, {_LAYOUT}) -> (Tensor, Tensor)",
    _mix_with_stats,
    _mix_with_stats_fake,
)


# Backward


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
    P: torch.Tensor, dZ: Any, seed: Any, dropout: float, scaling: float, heads_width: int, *layout: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    num_heads, r, *_ = layout
    return P.new_empty(P.shape[0], max(heads_width, num_heads * r)), P.new_empty(P.shape)


def _mix_backward_with_stats(
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
    coeffs = LayerProbe(tally_of(ticket), row, token_mask).finish(ops, partials, columns)
    return ops.mix_backward(
        *(P.contiguous(), dZ.contiguous(), columns),
        scaling=scaling,
        heads_width=heads_width,
        dropout=dropout,
        seed=seed,
        coeffs=coeffs,
        token_mask=token_mask,
    )


def _mix_backward_with_stats_fake(
    P: torch.Tensor, dZ: torch.Tensor, partials: Any, token_mask: Any, ticket: Any, row: Any, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return _mix_backward_fake(P, dZ, *rest)


def _add_balance_gradient(
    P: torch.Tensor, dP: torch.Tensor, token_mask: torch.Tensor | None, ticket: torch.Tensor, row: int, *layout: Any
) -> torch.Tensor:
    columns, dP = Layout(*layout), dP.clone()
    partials = rank_space.routing_stats(P, columns, token_mask).unsqueeze(0)
    coeffs = LayerProbe(tally_of(ticket), row, token_mask).finish(rank_space, partials, columns)
    if coeffs is not None:
        rank_space.logits_of(dP, columns).add_(rank_space.balance_gradient(P, columns, coeffs, token_mask))
    return dP


mix_backward = _define(
    "mix_backward",
    "(Tensor P, Tensor dZ, Tensor? seed, float dropout, float scaling, SymInt heads_width, "
    f"{_LAYOUT}) -> (Tensor, Tensor)",
    _mix_backward,
    _mix_backward_fake,
)
mix_backward_with_stats = _define(
    "mix_backward_with_stats",
    "(Tensor P, Tensor dZ, Tensor partials, Tensor? token_mask, Tensor ticket, SymInt row, Tensor? seed, "
    f"float dropout, float scaling, SymInt heads_width, {_LAYOUT}) -> (Tensor, Tensor)",
    _mix_backward_with_stats,
    _mix_backward_with_stats_fake,
    _EFFECTS,
)
add_balance_gradient = _define(
    "add_balance_gradient",
    f"(Tensor P, Tensor dP, Tensor? token_mask, Tensor ticket, SymInt row, {_LAYOUT}) -> Tensor",
    _add_balance_gradient,
    lambda P, *rest: P.new_empty(P.shape),
    _EFFECTS,
)


class _ProbedProjections(torch.autograd.Function):
    """The identity on the projections P; the backward pass adds the gradient of the balance loss to the logits'."""

    @staticmethod
    def forward(
        ctx: Any,
        P: torch.Tensor,
        token_mask: torch.Tensor | None,
        ticket: torch.Tensor,
        row: int,
        layout: Layout,
    ) -> torch.Tensor:
        ctx.save_for_backward(P, token_mask, ticket)
        ctx.row, ctx.layout = row, layout
        return P.view_as(P)

    @staticmethod
    def backward(ctx: Any, dP: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        P, token_mask, ticket = ctx.saved_tensors
        return add_balance_gradient(P, dP, token_mask, ticket, ctx.row, *ctx.layout), None, None, None, None


def probe_projections(P: torch.Tensor, layout: Layout, probe: LayerProbe) -> torch.Tensor:
    """P `[T, K]` itself, with the balance loss attached to its logits, for forms that autograd differentiates."""
    return _ProbedProjections.apply(P, probe.token_mask, probe.tally.ticket, probe.row, layout)
