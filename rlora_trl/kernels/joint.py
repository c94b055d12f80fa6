"""Layers with their deltas as one autograd function, for plain layers and layers that get the same input.

    forward    P = x [down_1; ..]^T    Z_j = mix(P_j)    y_j = Z_j up_j^T + bias_j, then + x W_j^T
    backward   dP, dB_j from one read of dy_j            ddown = dP^T x             dx = dP down, then + dy_j W_j

The order matters: a base product is bound by arithmetic and hides the read of what it accumulates onto, while adding a
delta to a finished output would read and write that output once more. Layers with the same input (gate and up; q, k
and v) share the reads of x, the products with `down`, and one dx: autograd has nothing to add.

Short steps wait for the host, so a group is prepared once, and a call does little more than launch kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, Protocol, TypeAlias

import torch
from torch.autograd.function import once_differentiable

from . import joint_space, rank_space
from .balance import LayerProbe
from .fused import DeltaSpec, backend, concat_weights, mm_wide, widths
from .joint_space import CallSettings, GroupSizes
from .rank_space import AdapterTensors, Layout


Outputs: TypeAlias = tuple[torch.Tensor, ...]


@lru_cache(maxsize=1)
def _joint_ops() -> ModuleType:
    from . import joint_ops

    return joint_ops


def joint_backend(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """`joint_ops` where `fused.backend` chooses Triton, else its twins in `joint_space`; same arguments and errors."""
    return joint_space if backend(device, dtype) is rank_space else _joint_ops()


class DequantizedWeight(Protocol):
    """A weight that is dequantized for each product."""

    shape: torch.Size
    device: torch.device

    def dense(self) -> torch.Tensor:
        """The weight, `[d_out, d_in]`."""
        ...


class JointGroup:
    """
    Layers with the same input, whose own products are computed together with their deltas.

    Args:
        tensors (`Sequence[AdapterTensors]`): A, B, router, A0 and B0 of each, as in `rank_space.concat`.
        weights (`Sequence[torch.Tensor | DequantizedWeight]` of shapes `[d_out, d_in]`): Frozen weights. They get no
            gradient.
        biases (`Sequence[torch.Tensor | None]` of shapes `[d_out]`): Frozen biases.
        layout ([`Layout`]), scaling (`float`): Of all adapters.
        dtype (`torch.dtype`): Of the input, the weights and the products.
        task_routers (`Sequence[torch.Tensor]` of shapes `[K, N]`, *optional*): Parameters behind the tables of logits
            of each call, which get their gradients.
    """

    __slots__ = (
        "biases",
        "columns",
        "kinds",
        "ops",
        "parameters",
        "saved",
        "sizes",
        "tensors",
        "weights",
    )

    def __init__(
        self,
        tensors: Sequence[AdapterTensors],
        weights: Sequence[torch.Tensor | DequantizedWeight],
        biases: Sequence[torch.Tensor | None],
        layout: Layout,
        scaling: float,
        dtype: torch.dtype,
        task_routers: Sequence[torch.Tensor] = (),
    ) -> None:
        device = weights[0].device
        self.tensors, self.weights, self.biases = tensors, weights, biases
        self.saved = [weight if isinstance(weight, torch.Tensor) else None for weight in weights]
        self.ops = joint_backend(device, dtype)
        k, z = widths(layout, device)
        d_outs = [weight.shape[0] for weight in weights]
        self.sizes = GroupSizes(weights[0].shape[1], d_outs, k, z, layout, float(scaling), dtype)

        # The trained tensors, their shapes and dtypes, and where their gradients lie in ddown `[M K, d_in]`.
        self.parameters = [tensor for of_layer in tensors for tensor in of_layer[:3]]
        if task_routers:
            self.parameters[2::3] = task_routers
        self.kinds = [None if tensor is None else (tensor.shape, tensor.dtype) for tensor in self.parameters]
        width, routed = rank_space.h_columns(layout), layout.num_heads * layout.routed
        self.columns = [width, routed, k - width - routed] * len(d_outs)

    def add_base(self, place: int, tokens: torch.Tensor, output: torch.Tensor) -> None:
        """Accumulate `x W^T` of a layer onto its output `[T, d_out]`."""
        output.addmm_(tokens, self.dense(place).t())

    def dense(self, place: int) -> torch.Tensor:
        """The weight of a layer, dequantized."""
        weight = self.weights[place]
        return weight if isinstance(weight, torch.Tensor) else weight.dense()

    def concat(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """`downs` `[M K, d_in]` and `up` `[d_out, Z]` of each layer."""
        spec = DeltaSpec(self.sizes.layout, self.sizes.scaling)
        concats = [concat_weights(*tensors, spec, self.sizes.dtype) for tensors in self.tensors]
        downs = concats[0].down if len(concats) == 1 else torch.cat([concat.down for concat in concats])
        return downs, [concat.up for concat in concats]


class _Call:
    """The arguments of [`_Joint`] without gradients, and what writing the outputs later takes."""

    __slots__ = ("Zs", "downs", "group", "probes", "settings", "tokens", "ups", "write_later")

    Zs: Sequence[torch.Tensor]
    tokens: torch.Tensor

    def __init__(
        self,
        group: JointGroup,
        settings: CallSettings,
        probes: Sequence[LayerProbe],
        downs: torch.Tensor | None,
        ups: Sequence[torch.Tensor],
    ) -> None:
        self.group, self.settings, self.probes, self.downs, self.ups = group, settings, probes, downs, ups
        self.write_later = downs is None


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """`[..., d]` as contiguous `[T, d]`."""
    if tensor.is_contiguous():
        return tensor if tensor.ndim == 2 else tensor.view(-1, tensor.shape[-1])
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


class _Joint(torch.autograd.Function):
    """
    The outputs of a group of layers.

    As in `fused.fused_delta`, outputs are written after the function if weights were not concatenated ahead, so that
    non-reentrant checkpointing skips the last products of a recomputation.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, call: _Call, *parameters: torch.Tensor | None) -> Outputs:
        group, shape = call.group, x.shape
        sizes, ops = group.sizes, group.ops
        if call.downs is None:
            call.downs, call.ups = group.concat()

        # P, and the deltas.
        tokens = _flat(x)
        outputs = tuple([x.new_empty((*shape[:-1], d_out)) for d_out in sizes.d_outs])
        rows = outputs if len(shape) == 2 else [output.view(-1, output.shape[-1]) for output in outputs]
        partials = None
        if call.probes:
            size = (sizes.count, ops.stats_rows(tokens.shape[0]), rank_space.stats_columns(sizes.layout.num_heads))
            partials = tokens.new_empty(size, dtype=torch.promote_types(x.dtype, torch.float32))
        written = None if call.write_later else rows
        P, Zs = ops.project(sizes, tokens, call.downs, call.ups, group.biases, written, call.settings, partials)

        # If `tokens` is a copy, x itself is saved, so that the copy can be freed.
        saved_x = tokens if tokens.data_ptr() == x.data_ptr() else x
        weights = group.saved if ctx.needs_input_grad[0] else [None] * sizes.count
        ctx.save_for_backward(saved_x, P, call.downs, *call.ups, *weights, partials)
        ctx.call, ctx.shape = call, shape
        ctx.set_materialize_grads(False)

        # The base products, now or later.
        if call.write_later:
            call.tokens, call.Zs = tokens, Zs
        else:
            for place, output in enumerate(rows):
                group.add_base(place, tokens, output)
            call.downs, call.ups = None, ()  # saved, and freed with what is saved
        return outputs

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        # Only gradients of gradients need the decorator, which takes host time.
        return _gradients_once(ctx, *dys) if torch.is_grad_enabled() else _gradients(ctx, *dys)


def _gradients(ctx: Any, *dys: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The backward pass of [`_Joint`]."""
    call, needed = ctx.call, ctx.needs_input_grad
    group = call.group
    sizes, kinds, count = group.sizes, group.kinds, group.sizes.count
    tokens, P, downs, *rest = ctx.saved_tensors
    partials = rest[-1]

    # dP and dB of all members, and dP down.
    used = [dy is not None for dy in dys]
    if False in used:
        dys, needed = _without_unused(dys, needed, ctx.shape, call.group.sizes, P)
    rows = [_flat(dy) for dy in dys if dy is not None]
    coeffs = None if partials is None else _report(call.probes, partials, sizes, used)
    dtypes = [kinds[3 * place + 1][1] if needed[3 * place + 3] else None for place in range(count)]
    of_x = downs if needed[0] else None
    dP, dBs, dx = group.ops.project_backward(sizes, rows, P, rest[:count], call.settings, coeffs, dtypes, of_x)

    grads: list[torch.Tensor | None] = [None] * len(needed)
    grads[3::3] = dBs
    _add_down_gradients(grads, needed, dP, tokens, call)

    # dy W accumulates onto dx = dP down.
    if dx is not None:
        for place in range(count):
            weight = rest[count + place]
            dx.addmm_(rows[place], group.dense(place) if weight is None else weight)
        grads[0] = dx if len(ctx.shape) == 2 else dx.view(ctx.shape)
    return tuple(grads)


_gradients_once = once_differentiable(_gradients)
_apply = super(torch.autograd.Function, _Joint).apply


def _add_down_gradients(
    grads: list[torch.Tensor | None],
    needed: Sequence[bool],
    dP: torch.Tensor,
    tokens: torch.Tensor,
    call: _Call,
) -> None:
    """dA and drouter are rows of dP^T x; a task router sums the gradients of the logits by task."""
    group, of_tasks = call.group, bool(call.settings.tables)
    if of_tasks:
        routers = _of_task_routers(dP, call.settings, group)
        grads[4::3] = [grad if need else None for grad, need in zip(routers, needed[4::3], strict=True)]
    if not (True in needed[2::3] or (True in needed[4::3] and not of_tasks)):
        return

    ddown = mm_wide(dP.t(), tokens if tokens.ndim == 2 else tokens.reshape(-1, tokens.shape[-1]))
    parts = ddown.split_with_sizes(group.columns)
    for place in range(group.sizes.count):
        first = 3 * place
        if needed[first + 2]:
            grads[first + 2] = _like(parts[first], group.kinds[first])
        if needed[first + 4] and not of_tasks:
            grads[first + 4] = _like(parts[first + 1], group.kinds[first + 2])


def _without_unused(
    dys: Sequence[torch.Tensor | None],
    needed: Sequence[bool],
    shape: torch.Size,
    sizes: GroupSizes,
    like: torch.Tensor,
) -> tuple[tuple[torch.Tensor | None, ...], tuple[bool, ...]]:
    """Zeros for outputs that were not used, whose parameters then get no gradient, as if their layers had not run."""
    used = [dy is not None for dy in dys]
    filled = [
        like.new_zeros((*shape[:-1], d_out)) if dy is None else dy for dy, d_out in zip(dys, sizes.d_outs, strict=True)
    ]
    of_members = [need and used[place // 3] for place, need in enumerate(needed[2:])]
    return tuple(filled), (*needed[:2], *of_members)


def _report(
    probes: Sequence[LayerProbe], partials: torch.Tensor, sizes: GroupSizes, used: Sequence[bool]
) -> list[torch.Tensor | None]:
    """Report to the probes of a group whose outputs were used; returns the coefficients of balance losses."""
    ops = backend(partials.device, sizes.dtype)
    coeffs = [
        probe.finish(ops, sums, sizes.layout) if is_used else None
        for probe, sums, is_used in zip(probes, partials.unbind(), used, strict=True)
    ]
    if any(one is not None for one in coeffs):
        none = partials.new_zeros(sizes.layout.num_heads + 2)
        return [none if one is None else one for one in coeffs]
    return coeffs


def _of_task_routers(dP: torch.Tensor, settings: CallSettings, group: JointGroup) -> list[torch.Tensor]:
    """The gradients of task routers `[K, N]`, from those of the logits; for all layers at once, to save host time."""
    one_hot, of_mean, sizes = settings.one_hot, settings.of_mean, group.sizes
    assert of_mean is not None
    (count, _, heads), width = of_mean.shape, dP.shape[1]
    if one_hot is None:
        sums = dP.sum(0, keepdim=True, dtype=torch.promote_types(dP.dtype, torch.float32))
    else:
        sums = mm_wide(one_hot.t(), dP)  # [K + 1, M K]
    sums = sums if sums.dtype == of_mean.dtype else sums.to(of_mean.dtype)

    # The logits of member j begin at column `first + j * k`.
    kind = group.kinds[2]
    assert kind is not None
    shape, dtype = kind
    tasks, first = shape[0], rank_space.h_columns(sizes.layout)
    last = sums.as_strided((count, heads, 1), (sizes.k, 1, 1), first + (len(sums) - 1) * width)
    if one_hot is not None:
        rows = sums.as_strided((count, tasks, heads), (sizes.k, width, 1), first).reshape(count, -1, 1)
        gradients = torch.baddbmm(rows, of_mean, last).view(count, *shape)
    elif settings.row < 0:
        gradients = torch.bmm(of_mean, last).view(count, *shape)
    else:
        gradients = of_mean.new_zeros((count, *shape))
        gradients[:, settings.row] = last.squeeze(-1)
    gradients = gradients if gradients.dtype == dtype else gradients.to(dtype)
    return list(gradients.unbind())


def _like(gradient: torch.Tensor, kind: tuple[torch.Size, torch.dtype] | None) -> torch.Tensor:
    """A gradient in the shape and dtype of its parameter; calls that change nothing are left out."""
    assert kind is not None
    shape, dtype = kind
    gradient = gradient if len(shape) == 2 else gradient.view(shape)
    return gradient if gradient.dtype == dtype else gradient.to(dtype)


def joint_outputs(
    x: torch.Tensor,
    group: JointGroup,
    settings: CallSettings,
    probes: Sequence[LayerProbe] = (),
    downs: torch.Tensor | None = None,
    ups: Sequence[torch.Tensor] = (),
) -> Outputs:
    """
    The outputs of layers that get the same input, with their deltas.

    Args:
        x (`torch.Tensor` of shape `[..., d_in]`): Input, in the dtype of the group.
        group ([`JointGroup`]): The layers.
        settings ([`CallSettings`]): Masks and logits; its token mask is that of the probes. Tables of logits
            need `task_routers` in the group, and have one row without `tasks`.
        probes (`Sequence[LayerProbe]`, *optional*): One for each layer, or none.
        downs (`torch.Tensor`), ups (`Sequence[torch.Tensor]`), *optional*: Results of `group.concat()`, if they were
            computed ahead.

    Returns:
        `tuple[torch.Tensor, ...]`: `x weight^T + bias + delta` of each, `[..., d_out]`.
    """
    call = _Call(group, settings, probes, downs, ups)
    # `Function.apply` looks at every argument for `torch.func`, which takes a quarter of its host time.
    apply = _Joint.apply if torch._C._are_functorch_transforms_active() else _apply
    outputs: Outputs = apply(x, call, *group.parameters)
    if call.write_later:
        with torch.no_grad():
            for place, output in enumerate(outputs):
                rows = output.view(-1, output.shape[-1])
                joint_space.write_delta(call.Zs[place], call.ups[place], group.biases[place], rows)
                group.add_base(place, call.tokens, rows)
        del call.tokens, call.Zs
        call.downs, call.ups = None, ()
    return outputs
