"""The multi-head delta as one autograd function around its matrix products.

Forward, over T tokens: P = x down^T, Z = mix(P), y = y0 + Z up^T. Saved for backward: x, P, the packed weights and a
seed. Backward: dZ = dy up, (heads, dP) = mix_backward(P, dZ), dB = dy^T heads, ddown = dP^T x, dx = dP down. See
README.md for the derivation.

Where the layer is a plain `torch.nn.Linear`, its own product joins in: y = Z up^T is written first, and x W^T is
accumulated onto it (backward likewise: dP down first, then dy W). A compute-bound product reads what it accumulates
onto in its shadow, while adding the delta to a finished output would read and write that output once more.
"""

from __future__ import annotations

import os
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from . import rank_space
from .balance import LayerProbe
from .rank_space import AdapterTensors, Layout


# Sizes in rank space are padded to this on a GPU: tensor cores take 16-bit operands in multiples of 8 or 16.
_ALIGNMENT = 16
# `torch.mm(..., out_dtype=torch.float32)` for 16-bit operands, on CUDA only.
_MM_OUT_DTYPE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)

# Up to here one program for each token projects and mixes, which saves a launch; decoding is a matter of launches.
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
    Where the rank-space functions come from: the Triton kernels on a CUDA device, their torch twins elsewhere.

    The environment variable `RLORA_TRL_KERNELS` forces one of them: "torch", or "triton" (which also runs on a CPU in
    Triton's interpreter).

    Raises:
        ImportError: If Triton is asked for and not installed.
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
    """What the function needs besides tensors."""

    layout: Layout
    scaling: float
    dropout: float = 0.0
    seed: int | None = None
    inplace: bool = False
    probe: LayerProbe | None = None


def widths(layout: Layout, device: torch.device) -> tuple[int, int]:
    """Columns of P and of Z, padded where that helps."""
    # Not by properties of `Layout`: see `rank_space.h_columns`.
    h = rank_space.h_columns(layout)
    anchor = h if layout.anchored else 0
    columns = rank_space.anchor_start(layout) + anchor
    return padded(columns, device), padded(layout.num_heads * layout.r + anchor, device)


def padded(columns: int, device: torch.device) -> int:
    """A number of columns that tensor cores take, on a device that has them."""
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
        down (`torch.Tensor` of shape `[K, d_in]`), up (`torch.Tensor` of shape `[d_out, Z]`): See `rank_space.pack`.
        down_t (`torch.Tensor`), up_t (`torch.Tensor`): The same, transposed.
        ops (`ModuleType`): Where the rank-space functions for them come from.
        heads_width (`int`): Columns of what gradients of heads are made from, with padding.
        layout ([`Layout`]): What the columns are.
        initial_A (`bool`): See `rank_space.has_initial_A`.
    """

    down: torch.Tensor
    up: torch.Tensor
    down_t: torch.Tensor
    up_t: torch.Tensor
    ops: ModuleType
    heads_width: int
    layout: Layout
    initial_A: bool = False


def concat_weights(
    A: torch.Tensor,
    B: torch.Tensor,
    router: torch.Tensor | None,
    anchor_A: torch.Tensor | None,
    anchor_B: torch.Tensor | None,
    spec: DeltaSpec,
    dtype: torch.dtype,
) -> ConcatWeights:
    """The weights of one adapter, packed for products in `dtype`."""
    layout, ops = spec.layout, backend(A.device, dtype)
    k, z = widths(layout, A.device)
    down, up = ops.pack(
        *(A, B, router, anchor_A, anchor_B, layout),
        scaling=spec.scaling,
        dtype=dtype,
        down_rows=k,
        up_columns=z,
    )
    width = padded(layout.num_heads * layout.r, A.device)
    return ConcatWeights(down, up, down.T, up.T, ops, width, layout, rank_space.has_initial_A(down, layout))


def concat_layers(
    layers: list[AdapterTensors], addresses: torch.Tensor | None, spec: DeltaSpec, dtype: torch.dtype
) -> list[ConcatWeights]:
    """
    [`concat_weights`] for adapters whose tensors have the same shapes and dtypes, are contiguous and on one device.

    `addresses` are those of the back end's `addresses_of` the layers.
    """
    layout, device = spec.layout, layers[0][0].device
    ops = backend(device, dtype)
    k, z = widths(layout, device)
    downs, ups = ops.concat_layers(
        *(layers, addresses, layout), scaling=spec.scaling, dtype=dtype, down_rows=k, up_columns=z
    )
    # All views of a kind by one call, which costs the host less than one for each.
    views = zip(downs.unbind(), ups.unbind(), downs.mT.unbind(), ups.mT.unbind(), strict=True)
    width = padded(layout.num_heads * layout.r, device)
    return [ConcatWeights(*four, ops, width, layout, rank_space.has_initial_A(four[0], layout)) for four in views]


def new_partials(P: torch.Tensor, layout: Layout) -> torch.Tensor:
    """A buffer for the partial sums of `rank_space.statistics` that `mix` makes of P `[T, K]`."""
    rows = backend(P.device, P.dtype).statistics_rows(P.shape[0])
    wide = torch.promote_types(P.dtype, torch.float32)
    return torch.empty(rows, layout.statistics_columns, dtype=wide, device=P.device)


class _Call:
    """What [`_MultiHeadDelta`] takes besides tensors with gradients, and what it finds on the way to the output."""

    __slots__ = ("Z", "anchors", "packed", "spec", "tokens", "weight", "write_later")

    Z: torch.Tensor
    tokens: torch.Tensor

    def __init__(
        self,
        spec: DeltaSpec,
        weight: torch.Tensor | None,
        anchors: tuple[torch.Tensor | None, torch.Tensor | None],
        packed: ConcatWeights | None,
    ) -> None:
        self.spec, self.weight, self.anchors, self.packed = spec, weight, anchors, packed
        self.write_later = packed is None

    def write(self, y: torch.Tensor, base: torch.Tensor | None) -> None:
        """Write the output; `base` is the one that the delta is added to, and `y` itself if that is in place."""
        assert self.packed is not None  # the forward pass has seen to it
        Z, up_t, weight = self.Z, self.packed.up_t, self.weight
        d_out = y.shape[-1]
        rows = y.view(-1, d_out)
        if weight is not None:
            torch.mm(Z, up_t, out=rows)
            rows.addmm_(self.tokens, weight.T)
        elif base is None:
            torch.mm(Z, up_t, out=rows)
        elif self.spec.inplace:
            rows.addmm_(Z, up_t)
        else:
            torch.addmm(base.reshape(-1, d_out), Z, up_t, out=rows)


class _MultiHeadDelta(torch.autograd.Function):
    """
    `y = base + delta(x)`, or `y = x weight^T + delta(x)`.

    Checkpointing (the kind that is not reentrant) stops a recomputation when the last tensor is saved, and the tensors
    of a function are saved when its forward pass ends. Where weights were not packed ahead, as in a recomputation, y
    is written after that, by [`fused_delta`]: the last product of a block, which only y needs, is left out so, as it
    is for a plain layer. (Not where all of a model is checkpointed as one, whose recomputation packs ahead too.)

    Short steps wait for the host, so what it does here is counted: a view costs it as much as a fifth of a product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        # First, because autograd takes the first gradient for that of the tensor written over, where it is a view.
        base: torch.Tensor | None,
        x: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        router: torch.Tensor | None,
        logits: torch.Tensor | None,
        call: _Call,
    ) -> torch.Tensor:
        spec, packed = call.spec, call.packed
        if packed is None:
            packed = call.packed = concat_weights(A, B, router, *call.anchors, spec, x.dtype)
        down, up, down_t, _, ops, heads_width, layout, initial_A = packed
        probe = spec.probe
        shape = x.shape
        call.tokens = tokens = x.reshape(-1, shape[-1])
        P = torch.mm(tokens, down_t)  # [T, K]
        if initial_A:
            rank_space.repeat_h(P, layout)
        if logits is not None:
            rank_space.logits_of(P, layout).copy_(logits)
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
        )
        # The packed weights are small and do not grow with the tokens. Kept, they need not be made again, and the
        # backward pass does not depend on parameters that DeepSpeed or FSDP may have taken away by then.
        # x itself, where `tokens` is a copy that nobody else holds.
        kept = tokens if tokens.data_ptr() == x.data_ptr() else x
        ctx.save_for_backward(kept, P, call.weight, down, up, partials)
        ctx.spec, ctx.ops, ctx.heads_width = spec, ops, heads_width
        ctx.has_base, ctx.shapes = base is not None, (shape, A.shape, B.shape)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (A, B, router, logits)]
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
        tokens, P, weight, down, up, partials = ctx.saved_tensors
        spec: DeltaSpec = ctx.spec
        need_base, need_x, need_A, need_B, need_router, need_logits, _ = ctx.needs_input_grad
        ops, layout, probe = ctx.ops, spec.layout, spec.probe
        dx = dA = dB = drouter = dlogits = None
        if need_x or need_A or need_B or need_router or need_logits:
            dy2 = dy.reshape(-1, dy.shape[-1])
            heads, dP = ops.mix_backward(
                *(P, torch.mm(dy2, up), layout),
                scaling=spec.scaling,
                heads_width=ctx.heads_width,
                dropout=spec.dropout,
                seed=spec.seed,
                slope=None if probe is None else probe.close(ops, partials, layout),
                token_mask=None if probe is None else probe.token_mask,
            )
            shape_x, shape_A, shape_B = ctx.shapes
            dtype_A, dtype_B, dtype_router, dtype_logits = ctx.dtypes
            if need_B:
                # The view of `rank_space.unpack_heads`, by one call.
                side_by_side = mm_wide(dy2.T, heads)
                dB = _as(side_by_side.as_strided(shape_B, (layout.r, side_by_side.stride(0), 1)), dtype_B)
            if need_A or need_router:
                tokens = tokens if tokens.ndim == 2 else tokens.reshape(-1, tokens.shape[-1])
                ddown = mm_wide(dP.T, tokens)  # [K, d_in]
                start = rank_space.h_columns(layout)
                if need_A:
                    dA = _as(ddown.narrow(0, 0, start), dtype_A)
                    dA = dA if layout.shared else dA.view(shape_A)
                if need_router:
                    drouter = _as(ddown.narrow(0, start, layout.num_heads), dtype_router)
            if need_logits:
                dlogits = _as(rank_space.logits_of(dP, layout), dtype_logits)
            if need_x:
                dx = torch.mm(dP, down)
                if weight is not None:
                    dx.addmm_(dy2, weight)
                dx = dx.view(shape_x)
        dbase = dy if ctx.has_base and need_base else None
        return dbase, dx, dA, dB, drouter, dlogits, None


def _as(gradient: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`gradient.to(dtype)`; without the call, which costs the host a microsecond, where there is nothing to do."""
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
    weight: torch.Tensor | None,
    spec: DeltaSpec,
    packed: ConcatWeights | None = None,
) -> torch.Tensor:
    """
    [`fused_multihead`] for those who have made a [`DeltaSpec`]; `spec.inplace` needs a contiguous `base`.

    `packed` is what [`concat_weights`] makes of the parameters, where that is known.
    """
    call = _Call(spec, weight, (anchor_A, anchor_B), packed)
    y = _MultiHeadDelta.apply(base, x, A, B, router, logits, call)
    if call.write_later:
        with torch.no_grad():
            call.write(y, base)
    return y


class InferenceDelta:
    """
    An adapter for inference: no gradients, no dropout.

    Args:
        packed ([`ConcatWeights`]): Its weights.
    """

    def __init__(self, packed: ConcatWeights) -> None:
        self.down, up, self.down_t, self.up_t, self.ops, _, self.layout, self.initial_A = packed
        self.z_width = up.shape[1]
        self.d_in, self.d_out = self.down.shape[1], up.shape[0]
        # What `project_mix` can do.
        self.projects = self.layout.shared and not self.layout.top_k and not self.initial_A

    def apply(
        self,
        x: torch.Tensor,
        base: torch.Tensor | None = None,
        *,
        logits: torch.Tensor | None = None,
        inplace: bool = False,
    ) -> torch.Tensor:
        """
        The delta for `x` `[..., d_in]`, or `base + delta`, written over `base` where `inplace` allows it.

        `logits` `[T, N]` take the place of the router's.
        """
        tokens = x.reshape(-1, self.d_in)
        if self.projects and logits is None and tokens.shape[0] <= _DECODING_TOKENS:
            Z = self.ops.project_mix(tokens, self.down, self.z_width, self.layout)
        else:
            P = tokens @ self.down_t
            if self.initial_A:
                rank_space.repeat_h(P, self.layout)
            if logits is not None:
                rank_space.logits_of(P, self.layout).copy_(logits)
            Z = self.ops.mix(P, self.z_width, self.layout)
        if base is None:
            return (Z @ self.up_t).view(*x.shape[:-1], self.d_out)
        if inplace and base.is_contiguous():
            base.view(-1, self.d_out).addmm_(Z, self.up_t)
            return base
        return torch.addmm(base.reshape(-1, self.d_out), Z, self.up_t).view_as(base)


def fused_multihead(
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
    seed: int | None = None,
    inplace: bool = False,
    logits: torch.Tensor | None = None,
    top_k: int = 0,
    probe: LayerProbe | None = None,
) -> torch.Tensor:
    """
    The delta of a multi-head adapter with head dropout, alone or added to the output of its layer.

    Args:
        x (`torch.Tensor` of shape `[..., d_in]`):
            Input of the layer. The products run in its dtype.
        A (`torch.Tensor` of shape `[r, d_in]` or `[N, r, d_in]`), B (`torch.Tensor` of shape `[N, d_out, r]`):
            Down-projection, of all heads or one for each, and heads.
        router (`torch.Tensor` of shape `[N, d_in]`, *optional*):
            Router. Without it, and without `logits`, every head weighs `1 / N`.
        anchor_A (`torch.Tensor` like `A`, *optional*), anchor_B (`torch.Tensor` of shape `[d_out, r]`, *optional*):
            Initial `A` and mean of the initial `B`, both or neither. They get no gradient. With an A for each head
            `anchor_B` is the initial `B` itself.
        base (`torch.Tensor` of shape `[..., d_out]`, *optional*):
            Output of the layer, in the dtype of `x`.
        weight (`torch.Tensor` of shape `[d_out, d_in]`, *optional*):
            Frozen weight of the layer, in the dtype of `x`, to compute that output here. It gets no gradient.
        scaling (`float`, *optional*, defaults to `1.0`):
            Factor of the delta.
        dropout (`float`, *optional*, defaults to `0.0`):
            Probability that an element is dropped, with an independent mask for each head. Applied only with a `seed`.
        seed (`int`, *optional*):
            Seed of the masks.
        inplace (`bool`, *optional*, defaults to `False`):
            Write the result over `base`, which must not be needed by anyone else.
        logits (`torch.Tensor` of shape `[T, N]`, *optional*):
            Logits of the heads for each token, in place of a router's.
        top_k (`int`, *optional*, defaults to `0`):
            Heads kept for each token; 0 keeps all.
        probe (`LayerProbe`, *optional*):
            Has the backward pass record how heads are used, and add the gradient of a balance loss.

    Returns:
        `torch.Tensor` of shape `[..., d_out]`: `base + delta`, `x weight^T + delta`, or the delta.

    Raises:
        ValueError: If both `base` and `weight`, or both `router` and `logits`, are given.
    """
    if base is not None and weight is not None:
        raise ValueError("Give `base` (the layer's output) or `weight` (to compute it here), not both.")
    if router is not None and logits is not None:
        raise ValueError("Give `router` or `logits` (which take its place), not both.")
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if torch.compiler.is_compiling():
        from .compiled import compiled_multihead  # which is built on this module

        return compiled_multihead(
            *(x, A, B, router, anchor_A, anchor_B),
            base=base,
            weight=weight,
            scaling=scaling,
            dropout=dropout,
            seed=seed,
            logits=logits,
            top_k=top_k,
            probe=probe,
        )
    spec = DeltaSpec(
        layout=rank_space.layout_of(
            *(A, B), routed=router is not None or logits is not None, anchor_A=anchor_A, top_k=top_k
        ),
        scaling=scaling,
        dropout=dropout if seed is not None else 0.0,
        seed=seed if dropout > 0.0 else None,
        inplace=inplace and base is not None and base.is_contiguous(),
        # Under reentrant checkpointing the first pass has no backward pass: the recomputation records.
        probe=probe if torch.is_grad_enabled() else None,
    )
    return fused_delta(x, A, B, router, anchor_A, anchor_B, logits, base, weight, spec)
