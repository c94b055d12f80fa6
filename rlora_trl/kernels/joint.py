"""Layers with their deltas as one autograd function, for plain layers and layers that get the same input.

    forward    P = x [down_1; ..]^T    Z_j = mix(P_j)    y_j = Z_j up_j^T + bias_j, then + x W_j^T
    backward   dP, dB_j from one read of dy_j            ddown = dP^T x             dx = dP down, then + dy_j W_j

The order matters: a base product is bound by arithmetic and hides the read of what it accumulates onto, while adding a
delta to a finished output would read and write that output once more. Layers with the same input (gate and up; q, k
and v) share the reads of x, the products with `down`, and one dx: autograd has nothing to add.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.autograd.function import once_differentiable

from . import joint_space, rank_space
from .fused import ConcatWeights, DeltaSpec, backend, concat_weights, mm_wide
from .joint_space import Member
from .rank_space import AdapterTensors


@lru_cache(maxsize=1)
def _joint_ops() -> ModuleType:
    from . import joint_ops

    return joint_ops


def joint_backend(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """`joint_ops` where `fused.backend` chooses Triton, else its twins in `joint_space`; same arguments and errors."""
    return joint_space if backend(device, dtype) is rank_space else _joint_ops()


class JointLayer(NamedTuple):
    """
    A layer whose own product is computed together with its delta.

    Args:
        tensors (`AdapterTensors`): A, B, router, A0 and B0, as in `rank_space.concat`.
        weight (`torch.Tensor` of shape `[d_out, d_in]`): Frozen, in the dtype of the input.
        bias (`torch.Tensor` of shape `[d_out]`, *optional*): Frozen bias, in that dtype.
        spec ([`DeltaSpec`]): Layout, scaling, dropout, seed and probe.
        concat ([`ConcatWeights`], *optional*): Result of `concat_weights` for these tensors, if it was computed ahead.
    """

    tensors: AdapterTensors
    weight: torch.Tensor
    bias: torch.Tensor | None
    spec: DeltaSpec
    concat: ConcatWeights | None = None


Outputs: TypeAlias = tuple[torch.Tensor, ...]


class _Call:
    """The arguments of [`_Joint`] without gradients, and what is needed to write the outputs later."""

    __slots__ = ("Zs", "layers", "members", "ops", "tokens", "write_later")

    Zs: list[torch.Tensor]
    members: list[Member]
    ops: ModuleType
    tokens: torch.Tensor

    def __init__(self, layers: Sequence[JointLayer]) -> None:
        self.layers = layers
        self.write_later = any(layer.concat is None for layer in layers)

    def add_bases(self, outputs: Sequence[torch.Tensor]) -> None:
        """Accumulate `x W^T` onto the outputs `[T, d_out]`, of which the deltas may be written first."""
        tokens = self.tokens
        for index, (layer, output) in enumerate(zip(self.layers, outputs, strict=True)):
            if self.write_later:
                joint_space.write_delta(self.Zs[index], self.members[index], output)
            output.addmm_(tokens, layer.weight.t())


def _side_by_side(concats: Sequence[ConcatWeights]) -> torch.Tensor:
    """`down` of all layers of a group, `[M K, d_in]`: a view if they lie one after another."""
    first = concats[0].down
    if len(concats) == 1:
        return first
    size = first.numel() * first.element_size()
    start = first.data_ptr()
    if all(concat.down.data_ptr() == start + index * size for index, concat in enumerate(concats)):
        rows, d_in = first.shape
        return first.as_strided((len(concats) * rows, d_in), (d_in, 1))
    return torch.cat([concat.down for concat in concats])


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """`[..., d]` as contiguous `[T, d]`."""
    flat = tensor if tensor.ndim == 2 else tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.is_contiguous() else flat.contiguous()


class _Joint(torch.autograd.Function):
    """
    The outputs of a group of layers.

    As in `fused.fused_delta`, outputs are written after the function if weights were not concatenated ahead, so that
    non-reentrant checkpointing skips the last products of a recomputation.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, call: _Call, *parameters: torch.Tensor | None) -> Outputs:
        layers, shape = call.layers, x.shape
        spec = layers[0].spec
        concats = [layer.concat or concat_weights(*layer.tensors, layer.spec, x.dtype) for layer in layers]
        call.ops = ops = joint_backend(x.device, x.dtype)

        # The members of the group, and P.
        call.tokens = tokens = _flat(x)
        token_mask = None if spec.probe is None else spec.probe.token_mask
        partials = _new_partials(ops, layers, tokens)
        call.members = members = [
            Member(concat.up, layer.spec.seed, layer.bias) for concat, layer in zip(concats, layers, strict=True)
        ]
        downs = _side_by_side(concats)
        outputs = tuple(
            torch.empty(*shape[:-1], concat.up.shape[0], dtype=x.dtype, device=x.device) for concat in concats
        )
        rows = [output if output.ndim == 2 else output.view(-1, output.shape[-1]) for output in outputs]
        P, call.Zs = ops.project(
            *(tokens, downs, members, spec.layout, None if call.write_later else rows),
            dropout=spec.dropout,
            partials=partials,
            token_mask=token_mask,
        )

        # If `tokens` is a copy, x itself is saved, so that the copy can be freed.
        saved_x = tokens if tokens.data_ptr() == x.data_ptr() else x
        ups = [concat.up for concat in concats]
        ctx.save_for_backward(saved_x, P, downs, *ups, *[layer.weight for layer in layers], partials)
        ctx.specs, ctx.shape, ctx.ops = [layer.spec for layer in layers], shape, ops
        ctx.kinds = [None if p is None else (p.shape, p.dtype) for p in parameters]
        if not call.write_later:
            call.add_bases(rows)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        specs, ops, needed, kinds = ctx.specs, ctx.ops, ctx.needs_input_grad, ctx.kinds
        count, spec = len(specs), specs[0]
        tokens, P, downs, *rest = ctx.saved_tensors
        ups, weights, partials = rest[:count], rest[count:-1], rest[-1]

        # dP and dB of all members.
        rows = [_flat(dy) for dy in dys]
        members = [
            _for_backward(up, spec, partials, place) for place, (up, spec) in enumerate(zip(ups, specs, strict=True))
        ]
        dP, dBs = ops.project_backward(
            *(rows, P, members, spec.layout),
            scaling=spec.scaling,
            dropout=spec.dropout,
            token_mask=None if spec.probe is None else spec.probe.token_mask,
            dtypes=[kinds[3 * index + 1][1] if needed[3 * index + 3] else None for index in range(count)],
        )

        # dA and drouter are rows of dP^T x.
        grads: list[torch.Tensor | None] = [None, None]
        if any(needed[2::3]) or any(needed[4::3]):
            tokens = tokens if tokens.ndim == 2 else tokens.reshape(-1, tokens.shape[-1])
            ddown = mm_wide(dP.t(), tokens)  # [M K, d_in]
        width, k = rank_space.h_columns(spec.layout), downs.shape[0] // count
        for index in range(count):
            need_A, _, need_router = needed[3 * index + 2 : 3 * index + 5]
            dA = _rows(ddown, index * k, width, kinds[3 * index]) if need_A else None
            router = kinds[3 * index + 2]
            drouter = _rows(ddown, index * k + width, router[0][0], router) if need_router else None
            grads += [dA, dBs[index], drouter]

        # dx = dP down, then dy W accumulates onto it.
        if needed[0]:
            dx = torch.mm(dP, downs)  # [T, d_in]
            for dy, weight in zip(rows, weights, strict=True):
                dx.addmm_(dy, weight)
            grads[0] = dx if len(ctx.shape) == 2 else dx.view(ctx.shape)
        return tuple(grads)


def _new_partials(ops: ModuleType, layers: Sequence[JointLayer], tokens: torch.Tensor) -> torch.Tensor | None:
    """A buffer for the partial sums of `rank_space.routing_stats`, if probes collect them."""
    if layers[0].spec.probe is None:
        return None
    columns = rank_space.stats_columns(layers[0].spec.layout.num_heads)
    wide = torch.promote_types(tokens.dtype, torch.float32)
    rows = ops.stats_rows(tokens.shape[0])
    return torch.empty(len(layers), rows, columns, dtype=wide, device=tokens.device)


def _for_backward(up: torch.Tensor, spec: DeltaSpec, partials: torch.Tensor | None, place: int) -> Member:
    """A member of the backward pass, which reports to its probe."""
    coeffs = None
    if spec.probe is not None and partials is not None:
        coeffs = spec.probe.finish(backend(up.device, up.dtype), partials[place], spec.layout)
    return Member(up, spec.seed, coeffs=coeffs)


def _rows(ddown: torch.Tensor, start: int, count: int, kind: tuple[torch.Size, torch.dtype]) -> torch.Tensor:
    """Some rows as the gradient of a parameter of a shape and dtype; a call that changes nothing is left out."""
    shape, dtype = kind
    rows = ddown.narrow(0, start, count)
    rows = rows if len(shape) == 2 else rows.view(shape)
    return rows if rows.dtype == dtype else rows.to(dtype)


def joint_outputs(x: torch.Tensor, layers: Sequence[JointLayer]) -> Outputs:
    """
    The outputs of layers that get the same input, with their deltas.

    Args:
        x (`torch.Tensor` of shape `[..., d_in]`): Input. The products run in its dtype.
        layers (`Sequence[JointLayer]`): With the same layout, scaling and dropout; probes have the same token mask.

    Returns:
        `tuple[torch.Tensor, ...]`: `x weight^T + bias + delta` of each, `[..., d_out]`.
    """
    call = _Call(layers)
    outputs = _Joint.apply(x, call, *[parameter for layer in layers for parameter in layer.tensors[:3]])
    if call.write_later:
        with torch.no_grad():
            call.add_bases([output.view(-1, output.shape[-1]) for output in outputs])
    return outputs
