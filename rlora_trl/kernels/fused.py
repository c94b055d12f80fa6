"""The multi-head delta as one autograd function around its matrix products.

Over T tokens, with the rank-space functions `mix` and `mix_backward` between the products:

    forward    P = x down^T    Z = mix(P)                         y = y0 + Z up^T
    backward   dZ = dy up      heads, dP = mix_backward(P, dZ)    dB = dy^T heads    ddown = dP^T x    dx = dP down

Saved for backward: x, P, the concatenated weights and a seed. README.md has the derivation.

Here the layer has been called, or is not known. `joint.py` computes plain layers together with their deltas.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property, lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from . import rank_space
from .balance import LayerProbe
from .rank_space import AdapterTensors, Layout


# Sizes in rank space are padded to this on a GPU: tensor cores need multiples of 8 or 16 for 16-bit operands.
_ALIGNMENT = 16
# `torch.mm(..., out_dtype=torch.float32)` for 16-bit operands, on CUDA only.
_MM_OUT_DTYPE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)
# Up to this many tokens one program per token projects and mixes, which saves a launch: launches dominate decoding.
_DECODING_TOKENS = 32

KERNELS_VARIABLE = "RLORA_TRL_KERNELS"
_CHOICES = ("auto", "triton", "torch")


def _choice() -> str:
    value = os.environ.get(KERNELS_VARIABLE, "auto").lower()
    if value not in _CHOICES:
        raise ValueError(
            f"${KERNELS_VARIABLE} must be one of {', '.join(_CHOICES)}, got {value!r}. Unset it for 'auto'."
        )
    return value


@lru_cache(maxsize=1)
def _triton_ops() -> ModuleType | None:
    try:
        from . import triton_ops
    except ImportError:
        return None
    return triton_ops


def backend(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """
    The module with the rank-space functions: the Triton kernels on a CUDA device, their torch twins elsewhere.

    The environment variable `RLORA_TRL_KERNELS` forces one of them: "torch", or "triton" (which also runs on a CPU in
    Triton's interpreter).

    Args:
        device (`torch.device`): Where the tensors are.
        dtype (`torch.dtype`): Dtype of the products; float64 always takes the torch twins.

    Returns:
        `ModuleType`: `triton_ops` or `rank_space`.

    Raises:
        ImportError: If the variable requires Triton, which is not installed.
        ValueError: If the variable has another value.
    """
    choice = _choice()
    if choice == "torch" or dtype == torch.float64 or (choice == "auto" and device.type != "cuda"):
        return rank_space

    triton_ops = _triton_ops()
    if triton_ops is None:
        if choice == "triton":
            raise ImportError(f"${KERNELS_VARIABLE}=triton, but Triton is not installed. Run `pip install triton`.")
        return rank_space
    return triton_ops


class DeltaSpec(NamedTuple):
    """
    The arguments of a delta besides tensors.

    Args:
        layout ([`Layout`]): The columns of P and Z.
        scaling (`float`): Factor of the delta.
        dropout (`float`, *optional*, defaults to `0.0`): Probability that an element is dropped.
        seed (`int`, *optional*): Seed of the masks; without it nothing is dropped.
        inplace (`bool`, *optional*, defaults to `False`): Write the result over the layer's output.
        probe ([`LayerProbe`], *optional*): Makes the backward pass report how heads are used, and add the gradient of
            a balance loss.
    """

    layout: Layout
    scaling: float
    dropout: float = 0.0
    seed: int | None = None
    inplace: bool = False
    probe: LayerProbe | None = None


def widths(layout: Layout, device: torch.device) -> tuple[int, int]:
    """Columns of P and of Z, padded on a GPU."""
    return padded(rank_space.p_columns(layout), device), padded(rank_space.z_columns(layout), device)


def padded(columns: int, device: torch.device) -> int:
    """A number of columns rounded up to what tensor cores need, on a GPU."""
    return columns if device.type != "cuda" else -(-columns // _ALIGNMENT) * _ALIGNMENT


def mm_wide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` with a result in float32 (float64 for float64): gradients of parameters are not rounded to 16 bits."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if _MM_OUT_DTYPE and a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


class ConcatWeights(NamedTuple):
    """
    The weights of an adapter side by side, in the dtype of the products.

    Args:
        down (`torch.Tensor` of shape `[K, d_in]`), up (`torch.Tensor` of shape `[d_out, Z]`): See `rank_space.concat`.
        down_t (`torch.Tensor` of shape `[d_in, K]`), up_t (`torch.Tensor` of shape `[Z, d_out]`): Views of them.
        ops (`ModuleType`): The rank-space functions for them, see [`backend`].
        heads_width (`int`): Columns of the factor of dB, with padding.
        layout ([`Layout`]): The columns of P and Z.
        initial_A (`bool`, *optional*, defaults to `False`): See `rank_space.has_initial_A`.
    """

    down: torch.Tensor
    up: torch.Tensor
    down_t: torch.Tensor
    up_t: torch.Tensor
    ops: ModuleType
    heads_width: int
    layout: Layout
    initial_A: bool = False

    def project(self, tokens: torch.Tensor, logits: torch.Tensor | None) -> torch.Tensor:
        """P `[T, K]` of tokens `[T, d_in]`; `logits` `[T, N]`, if any, replace those of a router."""
        P = torch.mm(tokens, self.down_t)
        if self.initial_A:
            rank_space.repeat_h(P, self.layout)
        if logits is not None:
            rank_space.logits_of(P, self.layout).copy_(logits)
        return P


class ConcatLayers:
    """
    The weights of many adapters side by side, of which views are made when they are needed.

    Args:
        downs (`torch.Tensor` of shape `[L, K, d_in]`), ups (`torch.Tensor` of shape `[L, d_out, Z]`): The weights.
        ops (`ModuleType`), heads_width (`int`), layout ([`Layout`]): See [`ConcatWeights`].
    """

    def __init__(
        self, downs: torch.Tensor, ups: torch.Tensor, ops: ModuleType, heads_width: int, layout: Layout
    ) -> None:
        self.downs, self.ups, self.ops, self.heads_width, self.layout = downs, ups, ops, heads_width, layout
        self.dtype, self.device = downs.dtype, downs.device

    def __getitem__(self, place: int) -> ConcatWeights:
        down, up = self.each_down[place], self.each_up[place]
        initial_A = rank_space.has_initial_A(down, self.layout)
        return ConcatWeights(down, up, down.t(), up.t(), self.ops, self.heads_width, self.layout, initial_A)

    @cached_property
    def each_down(self) -> tuple[torch.Tensor, ...]:
        """Views `[K, d_in]` of all layers; one call takes less host time than one for each."""
        return self.downs.unbind()

    @cached_property
    def each_up(self) -> tuple[torch.Tensor, ...]:
        """Views `[d_out, Z]` of all layers."""
        return self.ups.unbind()


def below_each_other(parts: Sequence[tuple[ConcatLayers, int]]) -> torch.Tensor:
    """The matrices `down` of some layers, `[M K, d_in]`: a view if they follow each other in memory."""
    (layers, first), count = parts[0], len(parts)
    if count == 1:
        return layers.each_down[first]
    if any(other is not layers or place != first + i for i, (other, place) in enumerate(parts)):
        return torch.cat([other.each_down[place] for other, place in parts])
    _, rows, d_in = layers.downs.shape
    return layers.downs.as_strided((count * rows, d_in), (d_in, 1), first * rows * d_in)


def concat_weights(
    A: torch.Tensor,
    B: torch.Tensor,
    router: torch.Tensor | None,
    anchor_A: torch.Tensor | None,
    anchor_B: torch.Tensor | None,
    spec: DeltaSpec,
    dtype: torch.dtype,
) -> ConcatWeights:
    """
    Concatenate the weights of one adapter.

    Args:
        A, B, router, anchor_A, anchor_B: As in `rank_space.concat`.
        spec ([`DeltaSpec`]): Its layout and scaling.
        dtype (`torch.dtype`): Dtype of the products.

    Returns:
        [`ConcatWeights`]: In that dtype, padded on a GPU.
    """
    layout, ops = spec.layout, backend(A.device, dtype)
    k, z = widths(layout, A.device)
    down, up = ops.concat(
        *(A, B, router, anchor_A, anchor_B, layout),
        scaling=spec.scaling,
        dtype=dtype,
        down_rows=k,
        up_columns=z,
    )
    heads_width = padded(layout.num_heads * layout.r, A.device)
    return ConcatWeights(down, up, down.T, up.T, ops, heads_width, layout, rank_space.has_initial_A(down, layout))


def concat_layers(
    layers: list[AdapterTensors], addresses: torch.Tensor | None, spec: DeltaSpec, dtype: torch.dtype
) -> ConcatLayers:
    """
    [`concat_weights`] for many adapters by one launch.

    Args:
        layers (`list[AdapterTensors]`): Their tensors, of the same shapes and dtypes, contiguous and on one device.
        addresses (`torch.Tensor`, *optional*): The back end's `addresses_of(layers)`, if it is still valid.
        spec ([`DeltaSpec`]): Their layout and scaling.
        dtype (`torch.dtype`): Dtype of the products.

    Returns:
        [`ConcatLayers`]: One for each adapter.
    """
    layout, device = spec.layout, layers[0][0].device
    ops = backend(device, dtype)
    k, z = widths(layout, device)
    downs, ups = ops.concat_many(
        *(layers, addresses, layout), scaling=spec.scaling, dtype=dtype, down_rows=k, up_columns=z
    )  # [L, K, d_in], [L, d_out, Z]
    return ConcatLayers(downs, ups, ops, padded(layout.num_heads * layout.r, device), layout)


def new_partials(P: torch.Tensor, layout: Layout) -> torch.Tensor:
    """A buffer for the partial sums of `rank_space.routing_stats` that `mix` computes from P `[T, K]`."""
    rows = backend(P.device, P.dtype).stats_rows(P.shape[0])
    wide = torch.promote_types(P.dtype, torch.float32)
    return torch.empty(rows, rank_space.stats_columns(layout.num_heads), dtype=wide, device=P.device)


class _Call:
    """The arguments of [`_MultiHeadDelta`] without gradients, and the tensors for writing the output later."""

    __slots__ = ("Z", "anchors", "concat", "spec", "write_later")

    Z: torch.Tensor

    def __init__(
        self,
        spec: DeltaSpec,
        anchors: tuple[torch.Tensor | None, torch.Tensor | None],
        concat: ConcatWeights | None,
    ) -> None:
        self.spec, self.anchors, self.concat = spec, anchors, concat
        self.write_later = concat is None

    def write(self, y: torch.Tensor, base: torch.Tensor | None) -> None:
        """Write the output `[..., d_out]`; the delta is added to `base`, which is `y` itself if that is in place."""
        assert self.concat is not None  # set by the forward pass
        Z, up_t = self.Z, self.concat.up_t
        d_out = y.shape[-1]
        rows = y.view(-1, d_out)  # [T, d_out]
        if base is None:
            torch.mm(Z, up_t, out=rows)
        elif self.spec.inplace:
            rows.addmm_(Z, up_t)
        else:
            torch.addmm(base.reshape(-1, d_out), Z, up_t, out=rows)


class _MultiHeadDelta(torch.autograd.Function):
    """
    `y = base + delta(x)`, or the delta alone.

    Non-reentrant checkpointing stops a recomputation when the last tensor is saved, and the tensors of a function are
    saved when its forward pass ends. If weights were not concatenated ahead, as in a recomputation, [`fused_delta`]
    writes y afterwards. The last product of a block, which only y needs, is then skipped.
    (Not if a whole model is one checkpoint, whose recomputation concatenates ahead too.)

    Short steps wait for the host, so each operation matters: a view takes a fifth of the host time of a product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        # First, because autograd assigns the first gradient to an overwritten tensor that is a view.
        base: torch.Tensor | None,
        x: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        router: torch.Tensor | None,
        logits: torch.Tensor | None,
        call: _Call,
    ) -> torch.Tensor:
        spec, concat = call.spec, call.concat
        if concat is None:
            concat = call.concat = concat_weights(A, B, router, *call.anchors, spec, x.dtype)
        up, ops, layout, probe, shape = concat.up, concat.ops, concat.layout, spec.probe, x.shape

        # P = x down^T, Z = mix(P)
        tokens = x.reshape(-1, shape[-1])  # [T, d_in]
        P = concat.project(tokens, logits)  # [T, K]
        partials, token_mask = None, None
        if probe is not None:
            partials = new_partials(P, layout)
            token_mask = probe.token_mask
        d_out, z_width = up.shape
        call.Z = ops.mix(
            *(P, z_width, layout),
            dropout=spec.dropout,
            seed=spec.seed,
            partials=partials,
            token_mask=token_mask,
        )  # [T, Z]

        # The size of the concatenated weights does not depend on the tokens. If they are saved, the backward pass need
        # not compute them again, nor use parameters that DeepSpeed or FSDP may have released by then.
        # If `tokens` is a copy, x itself is saved, so that the copy can be freed.
        saved_x = tokens if tokens.data_ptr() == x.data_ptr() else x
        ctx.save_for_backward(saved_x, P, concat.down, up, partials)
        ctx.spec, ctx.ops, ctx.heads_width = spec, ops, concat.heads_width
        ctx.has_base, ctx.shapes = base is not None, (shape, A.shape, B.shape)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (A, B, router, logits)]

        # y = y0 + Z up^T, now or later.
        if base is not None and spec.inplace:
            ctx.mark_dirty(base)
            y = base
        else:
            y = torch.empty(*shape[:-1], d_out, dtype=x.dtype, device=x.device)
        if not call.write_later:
            call.write(y, base)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tokens, P, down, up, partials = ctx.saved_tensors
        spec: DeltaSpec = ctx.spec
        need_base, need_x, need_A, need_B, need_router, need_logits, _ = ctx.needs_input_grad
        ops, layout, probe = ctx.ops, spec.layout, spec.probe
        dx = dA = dB = drouter = dlogits = None

        if need_x or need_A or need_B or need_router or need_logits:
            # From dy to dP, through the rank space.
            dy2 = dy.reshape(-1, dy.shape[-1])  # [T, d_out]
            heads, dP = ops.mix_backward(
                *(P, torch.mm(dy2, up), layout),
                scaling=spec.scaling,
                heads_width=ctx.heads_width,
                dropout=spec.dropout,
                seed=spec.seed,
                coeffs=None if probe is None else probe.finish(ops, partials, layout),
                token_mask=None if probe is None else probe.token_mask,
            )  # [T, N r], [T, K]
            shape_x, shape_A, shape_B = ctx.shapes
            dtype_A, dtype_B, dtype_router, dtype_logits = ctx.dtypes

            # dB = dy^T heads
            if need_B:
                side_by_side = mm_wide(dy2.T, heads)  # [d_out, N r]
                # The view of `rank_space.split_heads`, by one call.
                dB = _cast(side_by_side.as_strided(shape_B, (layout.r, side_by_side.stride(0), 1)), dtype_B)

            # dA and drouter are rows of dP^T x.
            if need_A or need_router:
                tokens = tokens if tokens.ndim == 2 else tokens.reshape(-1, tokens.shape[-1])
                ddown = mm_wide(dP.T, tokens)  # [K, d_in]
                start = rank_space.h_columns(layout)
                if need_A:
                    dA = _cast(ddown.narrow(0, 0, start), dtype_A)
                    dA = dA if layout.shared else dA.view(shape_A)
                if need_router:
                    drouter = _cast(ddown.narrow(0, start, layout.num_heads), dtype_router)
            if need_logits:
                dlogits = _cast(rank_space.logits_of(dP, layout), dtype_logits)

            if need_x:
                dx = torch.mm(dP, down).view(shape_x)

        dbase = dy if ctx.has_base and need_base else None
        return dbase, dx, dA, dB, drouter, dlogits, None


def _cast(gradient: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`gradient.to(dtype)`, which is skipped if the dtype is right: the call takes a microsecond of host time."""
    return gradient if gradient.dtype == dtype else gradient.to(dtype)


def fused_delta(
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    router: torch.Tensor | None,
    anchor_A: torch.Tensor | None,
    anchor_B: torch.Tensor | None,
    logits: torch.Tensor | None,
    base: torch.Tensor | None,
    spec: DeltaSpec,
    concat: ConcatWeights | None = None,
) -> torch.Tensor:
    """
    The delta of a multi-head adapter with head dropout, alone or added to the output of its layer.

    Args:
        x (`torch.Tensor` of shape `[..., d_in]`):
            Input of the layer. The products run in its dtype.
        A, B, router, anchor_A, anchor_B, logits:
            As in `multihead.multihead_delta`.
        base (`torch.Tensor` of shape `[..., d_out]`, *optional*):
            Output of the layer, in the dtype of `x`; contiguous if `spec.inplace` is set.
        spec ([`DeltaSpec`]):
            The other arguments.
        concat ([`ConcatWeights`], *optional*):
            Result of [`concat_weights`] for these parameters, if it was computed ahead.

    Returns:
        `torch.Tensor` of shape `[..., d_out]`: `base + delta`, or the delta.
    """
    call = _Call(spec, (anchor_A, anchor_B), concat)
    y = _MultiHeadDelta.apply(base, x, A, B, router, logits, call)
    if call.write_later:
        with torch.no_grad():
            call.write(y, base)
    return y


class InferenceDelta:
    """
    An adapter for inference: no gradients, no dropout.

    Args:
        concat ([`ConcatWeights`]): Its weights.
    """

    def __init__(self, concat: ConcatWeights) -> None:
        self.concat = concat
        self.d_out, self.z_width = concat.up.shape
        # The cases that `project_mix` supports.
        self.projects = concat.layout.shared and not concat.layout.top_k and not concat.initial_A

    def apply(
        self,
        x: torch.Tensor,
        base: torch.Tensor | None = None,
        *,
        logits: torch.Tensor | None = None,
        inplace: bool = False,
    ) -> torch.Tensor:
        """
        The delta, alone or added to the output of the layer.

        Args:
            x (`torch.Tensor` of shape `[..., d_in]`): Input of the layer.
            base (`torch.Tensor` of shape `[..., d_out]`, *optional*): Output of the layer.
            logits (`torch.Tensor` of shape `[T, N]`, *optional*): Logits that replace the router's.
            inplace (`bool`, *optional*, defaults to `False`): Write the result over `base`, if that is contiguous.

        Returns:
            `torch.Tensor` of shape `[..., d_out]`: The delta, or `base + delta`.
        """
        concat = self.concat
        tokens = x.reshape(-1, x.shape[-1])  # [T, d_in]
        if self.projects and logits is None and tokens.shape[0] <= _DECODING_TOKENS:
            Z = concat.ops.project_mix(tokens, concat.down, self.z_width, concat.layout)
        else:
            Z = concat.ops.mix(concat.project(tokens, logits), self.z_width, concat.layout)  # [T, Z]

        if base is None:
            return (Z @ concat.up_t).view(*x.shape[:-1], self.d_out)
        if inplace and base.is_contiguous():
            base.view(-1, self.d_out).addmm_(Z, concat.up_t)
            return base
        return torch.addmm(base.reshape(-1, self.d_out), Z, concat.up_t).view_as(base)
