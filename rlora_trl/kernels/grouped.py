"""The multi-head delta of many experts at once: one adapter for each expert, products grouped by expert.

A mixture of experts sends each token to some of its E experts. Rows x [S, d_in] are pairs of a token and an expert,
sorted by expert; the rows of expert e end at `offsets[e]`. With the concatenated weights of each expert (see
`rank_space`), for the rows of expert e:

    P = x down_e^T        Z = mix(P)        delta = Z up_e^T

Only the products differ between experts. What is between them, in rank space, is the same for all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import rank_space
from .balance import RoutingTally
from .dropout import keep_mask
from .fused import backend, mm_wide
from .rank_space import Layout


class ExpertWeights(NamedTuple):
    """
    The concatenated weights of E experts, in the dtype of the parameters; autograd leads back to those.

    Args:
        down (`torch.Tensor` of shape `[E, K, d_in]`), up (`torch.Tensor` of shape `[E, d_out, Z]`): See `rank_space`.
        layout ([`Layout`]): The columns of P and Z.
        initial_A (`bool`): See `rank_space.has_initial_A`.
    """

    down: torch.Tensor
    up: torch.Tensor
    layout: Layout
    initial_A: bool


class RowGroups(NamedTuple):
    """
    Which expert each row belongs to: the rows of one expert, or rows sorted by expert.

    Args:
        offsets (`torch.Tensor` of shape `[E]`, *optional*): Integers: the end of the rows of each expert.
        expert (`int`, *optional*): The expert of all rows.
    """

    offsets: torch.Tensor | None = None
    expert: int | None = None

    def segments(self, rows: int) -> list[tuple[int, int, int]]:
        """Expert, first row and end of each group that has some of `rows`. Waits for the device of `offsets`."""
        assert self.offsets is not None
        if isinstance(self.offsets, FakeTensor):
            # An estimate of memory, where numbers of rows are unknown: one expert has them all.
            return [(0, 0, rows)]
        ends = self.offsets.tolist()
        return [(e, start, end) for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)) if end > start]

    def experts(self, rows: int, device: torch.device) -> torch.Tensor:
        """The expert of each of `rows`, `[S]`."""
        if self.expert is not None:
            return torch.full((rows,), self.expert, device=device)
        assert self.offsets is not None
        ends = self.offsets.long()
        positions = torch.arange(rows, device=device)
        return torch.searchsorted(ends, positions, right=True).clamp(max=len(ends) - 1)


def concat_experts(
    A: torch.Tensor,
    B: torch.Tensor,
    router: torch.Tensor | None,
    anchor_A: torch.Tensor | None,
    anchor_B: torch.Tensor | None,
    layout: Layout,
    *,
    scaling: float,
    multiple: int = 1,
) -> ExpertWeights:
    """
    Concatenate the weights of all experts, as `rank_space.concat` those of one adapter.

    Args:
        A (`torch.Tensor` of shape `[E, r, d_in]` or `[E, N, r, d_in]`): Down-projections.
        B (`torch.Tensor` of shape `[E, N, d_out, r]`): Head matrices.
        router (`torch.Tensor` of shape `[E, N, d_in]`, *optional*): Routers; without them their rows are zero.
        anchor_A (`torch.Tensor` like `A`, *optional*): Initial `A`.
        anchor_B (`torch.Tensor` of shape `[E, d_out, r]` or `[E, N, d_out, r]`, *optional*): As in
            `rank_space.concat`.
        layout ([`Layout`]): The columns of P and Z.
        scaling (`float`): Factor of the delta.
        multiple (`int`, *optional*, defaults to `1`): Pad K and Z with zeros to a multiple of this.

    Returns:
        [`ExpertWeights`]: Never views of the arguments, which DeepSpeed may release.
    """
    down, up = _ConcatExperts.apply(A, B, router, (anchor_A, anchor_B), layout, scaling, multiple)
    return ExpertWeights(down, up, layout, _has_initial_A(down.detach(), layout))


class _ConcatExperts(torch.autograd.Function):
    """
    `down = [A; R; A0]` and `up = scaling [B_1 .. B_N, mean B - B0]` of each expert, or `[B_i - B0_i] / N` in the last
    part, in one node of the graph.
    """

    @staticmethod
    def forward(
        ctx: Any,
        A: torch.Tensor,
        B: torch.Tensor,
        router: torch.Tensor | None,
        anchors: tuple[torch.Tensor | None, torch.Tensor | None],
        layout: Layout,
        scaling: float,
        multiple: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        (experts, num_heads, d_out, r), d_in = B.shape, A.shape[-1]
        anchor_A, anchor_B = anchors
        ctx.shapes, ctx.layout, ctx.scaling, ctx.routed = (A.shape, B.shape), layout, scaling, router is not None

        # Zeros pad to a multiple, and stand in for a router whose logits the caller writes.
        downs = [A.reshape(experts, -1, d_in)]
        if layout.routed:
            downs.append(A.new_zeros(experts, num_heads, d_in) if router is None else router)
        if anchor_A is not None:
            downs.append(anchor_A.reshape(experts, -1, d_in))
        downs.append(A.new_zeros(experts, -rank_space.p_columns(layout) % multiple, d_in))

        ups = [B.transpose(1, 2).reshape(experts, d_out, num_heads * r)]
        if anchor_B is not None and layout.shared:
            ups.append(rank_space.mean_of_heads(B) - anchor_B)
        elif anchor_B is not None:
            shift = (B - anchor_B) * (1.0 / num_heads)
            ups.append(shift.transpose(1, 2).reshape(experts, d_out, num_heads * r))
        ups.append(B.new_zeros(experts, d_out, -rank_space.z_columns(layout) % multiple))
        return torch.cat(downs, dim=1), torch.cat(ups, dim=2) * scaling  # [E, K, d_in], [E, d_out, Z]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ddown: torch.Tensor, dup: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (shape_A, shape_B), layout = ctx.shapes, ctx.layout
        experts, num_heads, d_out, r = shape_B
        start, columns = rank_space.h_columns(layout), num_heads * r
        dA = ddown[:, :start].clone(memory_format=torch.contiguous_format).view(shape_A)
        drouter = ddown[:, start : start + num_heads].clone(memory_format=torch.contiguous_format)

        # [E, d_out, N, r], and the part of the anchor, which each head has a share of.
        dheads = dup[:, :, :columns].reshape(experts, d_out, num_heads, r)
        if layout.anchored:
            shares = dup[:, :, columns : columns + start].reshape(experts, d_out, -1, r)
            dheads = dheads + shares * (1.0 / num_heads)
        dB = (dheads * ctx.scaling).transpose(1, 2).contiguous()
        return dA, dB, drouter if ctx.routed else None, None, None, None, None


def _has_initial_A(down: torch.Tensor, layout: Layout) -> bool:
    """`rank_space.has_initial_A` for all experts."""
    width, start = rank_space.h_columns(layout), rank_space.anchor_start(layout)
    if not layout.anchored or down.device.type != "cpu" or type(down) is not torch.Tensor:
        return False
    return torch.equal(down[:, :width], down[:, start : start + width])


# Grouped products


def grouped_product(x: torch.Tensor, weight: torch.Tensor, groups: RowGroups) -> torch.Tensor:
    """
    The product of each row with the matrix of its expert, `x weight_e^T`.

    Args:
        x (`torch.Tensor` of shape `[S, K]`): Rows.
        weight (`torch.Tensor` of shape `[E, M, K]`): A matrix for each expert, in the dtype of `x`. M or K is small: a
            width of the rank space.
        groups ([`RowGroups`]): The expert of each row; all rows belong to one.

    Returns:
        `torch.Tensor` of shape `[S, M]`.
    """
    if groups.expert is not None:
        return x @ weight[groups.expert].T
    ops = _triton(x)
    if ops is not None and weight.shape[1] <= weight.shape[2]:
        return ops.narrow(x, weight, groups.offsets)
    out = x.new_zeros(x.shape[0], weight.shape[1])
    return add_product(out, x, weight, groups)


def add_product(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, groups: RowGroups) -> torch.Tensor:
    """
    Add [`grouped_product`] to `out` in place, for rows that are sorted by expert.

    Args:
        out (`torch.Tensor` of shape `[S, M]`): Contiguous.
        x (`torch.Tensor` of shape `[S, K]`), weight (`torch.Tensor` of shape `[E, M, K]`), groups ([`RowGroups`]): As
            in [`grouped_product`].

    Returns:
        `torch.Tensor`: `out`.
    """
    ops = _triton(x)
    if ops is not None and weight.shape[1] > weight.shape[2] and out.is_contiguous():
        ops.add_wide(out, x, weight, groups.offsets)
        return out
    for expert, start, end in groups.segments(len(x)):
        out[start:end].addmm_(x[start:end], weight[expert].T)
    return out


def grouped_outer(a: torch.Tensor, b: torch.Tensor, groups: RowGroups, experts: int) -> torch.Tensor:
    """
    The sum over the rows of each expert of their outer products, `a^T b`: the gradient of its matrix.

    Args:
        a (`torch.Tensor` of shape `[S, M]`), b (`torch.Tensor` of shape `[S, K]`): Rows. M or K is small.
        groups ([`RowGroups`]): The expert of each row.
        experts (`int`): Number of experts, E.

    Returns:
        `torch.Tensor` of shape `[E, M, K]`: In float32 or wider; zero for experts without rows.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    ops = _triton(a)
    if groups.expert is None and ops is not None:
        return ops.outer(a, b, groups.offsets, experts)
    out = torch.zeros(experts, a.shape[1], b.shape[1], dtype=wide, device=a.device)
    segments = groups.segments(len(a)) if groups.expert is None else [(groups.expert, 0, a.shape[0])]
    for expert, start, end in segments:
        out[expert] = mm_wide(a[start:end].T, b[start:end])
    return out


def _triton(x: torch.Tensor) -> ModuleType | None:
    """The Triton kernels, where `fused.backend` chooses Triton."""
    if backend(x.device, x.dtype) is rank_space:
        return None
    from . import triton_grouped

    return triton_grouped


class _GroupedProduct(torch.autograd.Function):
    """[`grouped_product`]; the weight may have a wider dtype than `x`, and its gradient has that dtype."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        narrow = weight.to(x.dtype)
        ctx.save_for_backward(x, narrow)
        ctx.groups, ctx.dtype = groups, weight.dtype
        return grouped_product(x, narrow, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = grouped_product(dy, weight.transpose(1, 2), ctx.groups)
        if ctx.needs_input_grad[1]:
            dweight = grouped_outer(dy, x, ctx.groups, weight.shape[0]).to(ctx.dtype)
        return dx, dweight, None


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, groups: RowGroups) -> torch.Tensor:
    """[`grouped_product`] that autograd differentiates; the weight is cast to the dtype of `x`."""
    return _GroupedProduct.apply(x, weight, groups)


# Balance losses


class ExpertsProbe(NamedTuple):
    """
    Collects the routing statistics of experts in the backward pass, and attaches their balance loss.

    An expert has its own heads and router, and so its own statistics: those of a layer whose tokens are the rows that
    it gets. With S_e of the S rows, and K experts for each token, the loss of the whole weight is
    `sum_e S_e / S loss_e`. A row has a K-th of the weight that a token has in a linear layer.

    Args:
        tally ([`RoutingTally`]): The tally of the micro-batch.
        row (`int`): The first of the E rows of this weight in it.
        groups ([`RowGroups`]): The experts of the rows.
        num_experts (`int`): E.
        per_token (`int` or `torch.Tensor`): Experts that a token is sent to, K.
        counts (`torch.Tensor` of shape `[S]`, *optional*): Which rows count (`bool`); by default all do.
    """

    tally: RoutingTally
    row: int
    groups: RowGroups
    num_experts: int
    per_token: int | torch.Tensor
    counts: torch.Tensor | None = None

    def finish(self, P: torch.Tensor, layout: Layout) -> torch.Tensor | None:
        """
        Add the sums of the experts to their statistics.

        Args:
            P (`torch.Tensor` of shape `[S, K]`): Projections.
            layout ([`Layout`]): Its columns, with logits.

        Returns:
            `torch.Tensor` of shape `[S, N]`, or `None` without a balance loss: Its gradient for the logits.
        """
        tally, one = self.tally, self.groups.expert
        table = rank_space.token_stats(rank_space.logits_of(P, layout), layout.top_k)  # [S, 3 + 3 N]
        if self.counts is not None:
            table = torch.where(self.counts.unsqueeze(1), table, 0.0)
        if one is None:
            places = slice(self.row, self.row + self.num_experts)
            sums = grouped_outer(table.new_ones(len(table), 1), table, self.groups, self.num_experts)[:, 0]
        else:
            places, sums = slice(self.row + one, self.row + one + 1), table.sum(0, keepdim=True)

        stats, prior, expected = tally.stats.data[places], None, None
        if tally.whole_step:
            expected = tally.expected_tokens * self.per_token
            if tally.prior is not None and tally.prior_rows is not None:
                prior, expected = tally.prior[places], expected * tally.prior_rows[places]
        coeffs = rank_space.update_stats(
            *(sums.to(stats.dtype), stats, prior, layout.num_heads, tally.kind, expected)
        )  # [E or 1, N + 2]
        if coeffs is None or tally.upstream is None:
            return None
        coeffs = coeffs * (tally.factor * tally.upstream.to(coeffs.dtype) / self.per_token)
        if one is None:
            coeffs = coeffs[self.groups.experts(len(P), P.device)]
        return rank_space.balance_gradient(P, layout, coeffs, self.counts)


class _ProbedRows(torch.autograd.Function):
    """The identity on projections; the backward pass adds the gradient of the balance loss to the logits'."""

    @staticmethod
    def forward(ctx: Any, P: torch.Tensor, layout: Layout, probe: ExpertsProbe) -> torch.Tensor:
        ctx.save_for_backward(P)
        ctx.layout, ctx.probe = layout, probe
        return P.view_as(P)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dP: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (P,) = ctx.saved_tensors
        dP = dP.clone()
        _add_balance(P, dP, ctx.layout, ctx.probe)
        return dP, None, None


def _add_balance(P: torch.Tensor, dP: torch.Tensor, layout: Layout, probe: ExpertsProbe) -> None:
    """Add the gradient of the balance loss to that of P in place."""
    gradient = probe.finish(P, layout)
    if gradient is not None:
        rank_space.logits_of(dP, layout).add_(gradient)


# The delta


def grouped_delta(
    x: torch.Tensor,
    weights: ExpertWeights,
    groups: RowGroups,
    *,
    dropout: float = 0.0,
    seed: int | None = None,
    dropout_position: str = "head",
    logits: torch.Tensor | None = None,
    probe: ExpertsProbe | None = None,
) -> torch.Tensor:
    """
    The delta of the experts' adapters, composed of grouped products and PyTorch's own operations.

    Args:
        x (`torch.Tensor` of shape `[S, d_in]`): Rows, sorted by expert. The products run in its dtype.
        weights ([`ExpertWeights`]): The adapters.
        groups ([`RowGroups`]): The expert of each row.
        dropout (`float`, *optional*, defaults to `0.0`), seed (`int`, *optional*): Probability that an element is
            dropped, and the seed of the masks, whose rows are numbered as those of `x`.
        dropout_position (`str`, *optional*, defaults to `"head"`): As in `multihead.multihead_delta`.
        logits (`torch.Tensor` of shape `[S, N]`, *optional*): Logits of the heads, in place of the routers'.
        probe ([`ExpertsProbe`], *optional*): Makes the backward pass report how heads are used, and add the gradient
            of the balance loss.

    Returns:
        `torch.Tensor` of shape `[S, d_out]`, in the dtype of `x`.
    """
    layout = weights.layout
    start = rank_space.h_columns(layout)
    if seed is not None and dropout > 0.0 and dropout_position == "input":
        masked = x * keep_mask(seed, tuple(x.shape), dropout, x.device) * (1.0 / (1.0 - dropout))
        h = grouped_linear(masked, weights.down[:, :start], groups)
        P = torch.cat([h, grouped_linear(x, weights.down[:, start:], groups)], dim=1)
        seed = None
    else:
        P = grouped_linear(x, weights.down, groups)  # [S, K]
        if weights.initial_A:
            # The value of A x, the gradient of A0 x.
            first = rank_space.anchor_start(layout)
            h, h0, rest = P[:, :start], P[:, first : first + start], P[:, first + start :]
            P = torch.cat([P[:, :first], h.detach() + (h0 - h0.detach()), rest], dim=1)

    if logits is not None:
        P = rank_space.with_logits(P, logits, layout)
    if probe is not None:
        P = _ProbedRows.apply(P, layout, probe)
    Z = rank_space.mix(P, weights.up.shape[2], layout, dropout=dropout, seed=seed)  # [S, Z]
    return grouped_linear(Z, weights.up, groups)


class GroupedCall(NamedTuple):
    """
    The arguments of [`fused_grouped`] that have no gradient.

    Args:
        groups ([`RowGroups`]): The experts of the rows, by offsets.
        layout ([`Layout`]), initial_A (`bool`): Of the [`ExpertWeights`].
        dropout (`float`), seed (`int`, *optional*): As in [`grouped_delta`].
        product (`Callable`): The product of rows with the frozen weight of the experts, `[S, d_in]` to `[S, d_out]`.
        product_backward (`Callable`): The gradient of its rows, `[S, d_out]` to `[S, d_in]`.
        probe ([`ExpertsProbe`], *optional*): As in [`grouped_delta`].
    """

    groups: RowGroups
    layout: Layout
    initial_A: bool
    dropout: float
    seed: int | None
    product: Callable[[torch.Tensor], torch.Tensor]
    product_backward: Callable[[torch.Tensor], torch.Tensor]
    probe: ExpertsProbe | None = None


class _FusedGrouped(torch.autograd.Function):
    """
    `y = product(x) + delta(x)`, with head dropout. Nothing as wide as the layer is written twice.

        forward    P = x down^T    Z = mix(P)                         y = x W^T, y += Z up^T
        backward   dZ = dy up      heads, dP = mix_backward(P, dZ)    dB = dy^T heads    ddown = dP^T x
                   dx = dy W, dx += dP down
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        down: torch.Tensor,
        up: torch.Tensor,
        logits: torch.Tensor | None,
        call: GroupedCall,
    ) -> torch.Tensor:
        groups, layout = call.groups, call.layout
        ops = backend(x.device, x.dtype)
        narrow_down, narrow_up = down.to(x.dtype), up.to(x.dtype)

        P = grouped_product(x, narrow_down, groups)  # [S, K]
        if call.initial_A:
            rank_space.repeat_h(P, layout)
        if logits is not None:
            rank_space.logits_of(P, layout).copy_(logits)
        Z = ops.mix(P, up.shape[2], layout, dropout=call.dropout, seed=call.seed)  # [S, Z]
        y = add_product(call.product(x), Z, narrow_up, groups)

        # Small weights in the dtype of the products: those of the adapter may be released by then.
        ctx.save_for_backward(x, P, narrow_down, narrow_up)
        ctx.call, ctx.ops, ctx.dtypes = call, ops, (down.dtype, up.dtype, None if logits is None else logits.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, P, down, up = ctx.saved_tensors
        call: GroupedCall = ctx.call
        groups, layout, experts = call.groups, call.layout, down.shape[0]
        need_x, need_down, need_up, need_logits, _ = ctx.needs_input_grad
        dtype_down, dtype_up, dtype_logits = ctx.dtypes
        dx = ddown = dup = dlogits = None

        # From dy to dP, through the rank space.
        dy = dy.contiguous()
        dZ = grouped_product(dy, up.transpose(1, 2), groups)  # [S, Z]
        heads, dP = ctx.ops.mix_backward(
            *(P, dZ, layout), heads_width=up.shape[2], dropout=call.dropout, seed=call.seed
        )  # [S, Z], [S, K]
        if call.probe is not None:
            _add_balance(P, dP, layout, call.probe)

        # The heads' whole gradient; the anchor's columns, which are zero in `heads`, have none of their own.
        if need_up:
            dup = grouped_outer(dy, heads, groups, experts).to(dtype_up)  # [E, d_out, Z]
        if need_down:
            ddown = grouped_outer(dP, x, groups, experts).to(dtype_down)  # [E, K, d_in]
        if need_logits:
            dlogits = rank_space.logits_of(dP, layout).to(dtype_logits)
        if need_x:
            dx = add_product(call.product_backward(dy), dP, down.transpose(1, 2), groups)
        return dx, ddown, dup, dlogits, None


def fused_grouped(
    x: torch.Tensor, weights: ExpertWeights, logits: torch.Tensor | None, call: GroupedCall
) -> torch.Tensor:
    """
    The product of rows with the weights of experts and the deltas of their adapters, as one autograd function.

    Args:
        x (`torch.Tensor` of shape `[S, d_in]`): Rows, sorted by expert.
        weights ([`ExpertWeights`]): The adapters.
        logits (`torch.Tensor` of shape `[S, N]`, *optional*): Logits of the heads, in place of the routers'.
        call ([`GroupedCall`]): The other arguments.

    Returns:
        `torch.Tensor` of shape `[S, d_out]`, in the dtype of `x`.
    """
    return _FusedGrouped.apply(x, weights.down, weights.up, logits, call)


def sort_by_expert(experts: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, RowGroups]:
    """
    The order that sorts rows by expert.

    Args:
        experts (`torch.Tensor` of shape `[S]`): The expert of each row.
        num_experts (`int`): Number of experts, E.

    Returns:
        `tuple[torch.Tensor, RowGroups]`: Indices of the rows `[S]` in that order, and their groups.
    """
    order = torch.argsort(experts, stable=True)
    counts = F.one_hot(experts, num_experts).sum(0)
    return order, RowGroups(offsets=counts.cumsum(0).to(torch.int32))
