"""One multi-head adapter as a module: A, the heads B, the router and the anchor. It knows nothing of PEFT."""

from __future__ import annotations

from collections.abc import Callable
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import nn

from ..kernels import LayerProbe, compiled_multihead, draw_seed, draw_seed_tensor, multihead_delta, routing_weights
from ..kernels.fused import ConcatLayers, ConcatWeights, DeltaSpec, InferenceDelta, concat_weights, fused_delta
from ..kernels.rank_space import AdapterTensors, Layout, mean_of_heads
from .initialization import init_heads_, init_router_
from .recomputation import in_backward
from .routing import Routing


# Smaller head weights count as zero. Their logits stay finite in 16 bits, and zero times them is zero.
_TINY = 1e-300
# An odd number that spreads the index of a layer over the bits of a seed.
_SPREAD = 0x2545F4914F6CDD1D


class PrefetchedWeights(NamedTuple):
    """
    Weights of an adapter that were concatenated before its forward pass; see [`WeightPrefetch`].

    Args:
        layers ([`ConcatLayers`]), place (`int`): The concatenated weights of many adapters, and which are this one's.
        scaling (`float`): How they were concatenated.
        tensors (`AdapterTensors`): The source tensors.
        versions (`list[int | None]`): Version counter of each source tensor at that time.
    """

    layers: ConcatLayers
    place: int
    scaling: float
    tensors: AdapterTensors
    versions: list[int | None]

    @classmethod
    def of(cls, layers: ConcatLayers, place: int, scaling: float, tensors: AdapterTensors) -> PrefetchedWeights:
        """Weights that were just computed from `tensors`."""
        return cls(layers, place, scaling, tensors, _versions(tensors))

    def holds_for(self, tensors: AdapterTensors, layout: Layout, scaling: float, x: torch.Tensor) -> bool:
        """Whether the weights fit the input `x`, and the tensors have not changed since."""
        return (
            # `torch.func.functional_call` passes other tensors, and offloaded layers change their device.
            all(map(is_, tensors, self.tensors))
            and self.layers.dtype == x.dtype
            and self.layers.device == x.device
            and scaling == self.scaling
            and layout == self.layers.layout
            and _versions(tensors) == self.versions
        )


def _versions(tensors: AdapterTensors) -> list[int | None]:
    return [None if tensor is None else tensor._version for tensor in tensors]


class MultiHeadAdapter(nn.Module):
    """
    Down-projection `A`, `num_heads` head matrices `B` mixed by a router, and the frozen anchor `A0`, `B0`.

    With h = A x, w the weights of the heads and m_i the dropout mask of head i (R-LoRA, arXiv 2502.15455, equation 4):

        delta(x) = scaling * (sum_i w_i B_i (m_i . h) / (1 - p)  -  B0 (A0 x))

    `A0` and `B0` are the initial `A` and the mean over heads of the initial `B`. The paper subtracts `B0 A0` from the
    frozen weight; keeping them here leaves the base layer untouched, whatever its dtype or quantization. With one A
    for each head (`share_a=False`) h is A_i x, `A0` and `B0` are the initial `A` and `B`, and the mean over heads of
    B0_i (A0_i x) is subtracted.

    The head weights w are the softmax of logits, which are `router x` ("softmax"), its `router_top_k` largest entries
    ("top_k"), or parameters of the token's task ("task"). With "uniform" all heads weigh the same.

    All parameters are direct members: DeepSpeed ZeRO-3 gathers those when the module is called. The anchor is made of
    frozen parameters, or under ZeRO-3 of buffers; see `hold_anchor_in_buffers`.

    Args:
        in_features (`int`), out_features (`int`):
            Sizes of the layer.
        r (`int`):
            Rank of each head.
        num_heads (`int`):
            Number of head matrices.
        scaling (`float`):
            Factor of the delta.
        router (`str`, *optional*, defaults to `"softmax"`):
            `"softmax"`, `"top_k"`, `"task"` or `"uniform"`.
        router_top_k (`int`, *optional*):
            Number of heads for each token with `"top_k"`.
        share_a (`bool`, *optional*, defaults to `True`):
            Use one A for all heads rather than one for each.
        routing ([`Routing`], *optional*):
            State that the layers of one adapter share; its tasks are the rows of a task router.
        router_init (`str`, *optional*, defaults to `"zeros"`):
            `"zeros"` or `"kaiming_uniform"`.
        dropout (`float`, *optional*, defaults to `0.0`):
            Probability in `[0, 1)` that an element is dropped during training.
        dropout_position (`str`, *optional*, defaults to `"head"`):
            `"head"` or `"input"`, see [`multihead_delta`].
        init_weights (`str` or `bool`, *optional*, defaults to `"rlora"`):
            See [`init_heads_`].
        init_gamma (`float`, *optional*, defaults to `64.0`):
            Constant of the paper's Table 1.
        num_experts (`int`, *optional*, defaults to `0`):
            For [`ExpertsAdapter`]: the first dimension of all tensors.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Dtype of the parameters.
    """

    # Tensors that hold the initial value: saved with the adapter, never trained.
    anchor_names = ("A0", "B0")
    # What a state dict of this module may contain.
    tensor_names = ("A", "B", "router", "A0", "B0")
    # Set by `WeightPrefetch` for one forward pass.
    prefetched: PrefetchedWeights | None = None
    # The same weights for a recomputation of that pass, under ZeRO-3; until they are used, or another pass begins.
    kept: PrefetchedWeights | None = None
    # Called when the mode is set after a loading that the tuner does not see; see `check_on_first_use`.
    first_use: Callable[[], None] | None = None

    A: nn.Parameter
    B: nn.Parameter
    router: nn.Parameter | None
    A0: torch.Tensor | None
    B0: torch.Tensor | None

    @classmethod
    def expected_tensors(
        cls,
        in_features: int,
        out_features: int,
        r: int,
        num_heads: int,
        *,
        router: str = "softmax",
        num_tasks: int = 0,
        share_a: bool = True,
        init_weights: str | bool = "rlora",
        num_experts: int = 0,
    ) -> dict[str, tuple[int, ...]]:
        """
        The tensors of an adapter with these settings. Nothing else knows them.

        Args:
            num_tasks (`int`, *optional*, defaults to `0`):
                Number of tasks of a task router. Other arguments: see the class.
            num_experts (`int`, *optional*, defaults to `0`):
                Number of experts, the first dimension of all tensors; 0 for a layer without experts.

        Returns:
            `dict[str, tuple[int, ...]]`: Shapes by name, in the order of `tensor_names`.
        """
        shapes: dict[str, tuple[int, ...]] = {
            "A": (r, in_features) if share_a else (num_heads, r, in_features),
            "B": (num_heads, out_features, r),
        }
        if router != "uniform":
            shapes["router"] = (num_tasks, num_heads) if router == "task" else (num_heads, in_features)

        # With a zero A or a zero B the initial delta is zero: there is nothing to subtract. A shared A needs no more
        # than the mean of B.
        if init_weights == "rlora":
            shapes |= {"A0": shapes["A"], "B0": (out_features, r) if share_a else shapes["B"]}
        return {name: (num_experts, *shape) for name, shape in shapes.items()} if num_experts else shapes

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        num_heads: int,
        scaling: float,
        *,
        router: str = "softmax",
        router_top_k: int | None = None,
        share_a: bool = True,
        routing: Routing | None = None,
        router_init: str = "zeros",
        dropout: float = 0.0,
        dropout_position: str = "head",
        init_weights: str | bool = "rlora",
        init_gamma: float = 64.0,
        num_experts: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.num_experts = num_experts
        self.r, self.num_heads = r, num_heads
        self.scaling = scaling
        self.router_kind, self.router_init = router, router_init
        self.dropout, self.dropout_position = dropout, dropout_position
        self.init_weights, self.init_gamma = init_weights, init_gamma

        self.top_k = router_top_k or 0
        self.share_a = share_a
        self.routing = routing if routing is not None else Routing(None, router)
        self.layer_number = self.routing.number_layer()

        # Rows of this layer in the routing statistics of a trainer, and in `HeadUsage`.
        self.routing_row: int | None = None
        self.usage_row: int | None = None
        # Logits `[N]` that replace the router for all tokens; see `fixed_head_weights`.
        self.fixed_logits: torch.Tensor | None = None
        # Dtype of the last products that ran without prefetched weights.
        self.product_dtype: torch.dtype | None = None
        self._cache: tuple[list, InferenceDelta] | None = None  # see `_inference_delta`

        # Shapes of the whole tensors: DeepSpeed and FSDP leave shards in the parameters.
        self.shapes = self.expected_tensors(
            in_features,
            out_features,
            r,
            num_heads,
            router=router,
            num_tasks=len(self.routing.tasks),
            share_a=share_a,
            init_weights=init_weights,
            num_experts=num_experts,
        )
        for name in self.tensor_names:
            parameter = None
            if name in self.shapes:
                # A frozen anchor, not a buffer: DistributedDataParallel broadcasts buffers before each forward pass.
                trained = name not in self.anchor_names
                parameter = nn.Parameter(torch.empty(self.shapes[name], dtype=dtype), requires_grad=trained)
            self.register_parameter(name, parameter)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new initial values and set the anchor to them."""
        init_heads_(self.A, self.B, self.init_weights, self.init_gamma)
        if self.router is not None:
            # In tests a router of zeros would hide whether it is used.
            init_router_(self.router, self.router_init if self.init_weights is not False else "kaiming_uniform")
        self.reset_anchor()

    def _anchor_of(self, B: torch.Tensor) -> torch.Tensor:
        """The part of B that the anchor stores: with a shared A, the mean over heads."""
        return mean_of_heads(B) if self.share_a else B

    @torch.no_grad()
    def reset_anchor(self) -> None:
        """Set the anchor to the current values, so that the delta with equal head weights is zero."""
        if self.A0 is not None and self.B0 is not None:
            self.A0.copy_(self.A)
            self.B0.copy_(self._anchor_of(self.B))

    @torch.no_grad()
    def is_at_anchor(self) -> bool:
        """Whether A and the mean of B equal the anchor, so that the delta with equal head weights is zero."""
        return (
            self.A0 is not None
            and self.B0 is not None
            and torch.equal(self.A0, self.A)
            and torch.equal(self.B0, self._anchor_of(self.B))
        )

    def cast(self, dtype: torch.dtype) -> None:
        """Cast all parameters. An adapter that equals its anchor still equals it after rounding."""
        at_anchor = self.A.device.type != "meta" and self.is_at_anchor()
        self.to(dtype)
        if at_anchor:
            self.reset_anchor()

    def freeze_anchor(self) -> None:
        """Freeze the anchor again, after code that made every parameter trainable."""
        for name in self.anchor_names:
            parameter = getattr(self, name)
            if parameter is not None:
                parameter.requires_grad_(False)

    def hold_anchor_in_buffers(self) -> None:
        """
        Make the anchor persistent buffers of the same names.

        DeepSpeed ZeRO-3 shards all parameters, looks at them in each call of their module, and gathers small ones anew
        after each step, whether they have changed or not. It leaves buffers alone. An anchor that is sharded already
        remains so.
        """
        for name in self.anchor_names:
            parameter = self._parameters.get(name)
            if parameter is not None and "ds_id" not in vars(parameter):
                delattr(self, name)
                self.register_buffer(name, parameter.detach())

    @property
    def trains(self) -> bool:
        """Whether any parameter requires a gradient."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def requires_grad_(self, requires_grad: bool = True) -> MultiHeadAdapter:
        """Turn gradients on or off for all parameters but the anchor, which stays frozen."""
        super().requires_grad_(requires_grad)
        self.freeze_anchor()
        return self

    def forward(
        self,
        x: torch.Tensor,
        base: torch.Tensor | None = None,
        inplace: bool = False,
    ) -> torch.Tensor:
        """
        The delta, alone or added to the output of the layer.

        Args:
            x (`torch.Tensor` of shape `[..., d_in]`): Input of the layer.
            base (`torch.Tensor` of shape `[..., d_out]`, *optional*): Output of the layer.
            inplace (`bool`, *optional*, defaults to `False`): The result may overwrite `base`.

        Returns:
            `torch.Tensor` of shape `[..., d_out]`: In the dtype of `base`, if that is passed.
        """
        # Autocast does not look into the fused function, so its dtype is applied here.
        device_type = x.device.type
        autocast = torch.is_autocast_enabled(device_type)
        if autocast and x.dtype != (dtype := torch.get_autocast_dtype(device_type)):
            x = x.to(dtype)

        # A recomputation needs the context of this pass, and an evaluation counts it.
        training, routing = self.training, self.routing
        if training or torch.is_grad_enabled():
            routing.note_forward()
        if not training and routing.batch.usage is not None:
            self._count_usage(x)

        # Cases that the fused function does not cover.
        masked = training and self.dropout > 0.0
        on_input = masked and self.dropout_position == "input"
        if torch.compiler.is_compiling() and not on_input:
            return self._compiled(x, base, masked)
        if on_input or (base is not None and base.dtype != x.dtype):
            return self._composed(x, base, masked)

        # Inference keeps its concatenated weights from call to call.
        if not training and not torch.is_grad_enabled():
            logits = self._replacing_logits(x)
            return self._inference_delta(x).apply(x, base, logits=logits, inplace=inplace)

        if not autocast:
            return self._fused(x, base, inplace, masked)
        # Everything has its dtype already, and in a short step autocast adds a third to the host time of each product.
        torch.set_autocast_enabled(device_type, False)
        try:
            return self._fused(x, base, inplace, masked)
        finally:
            torch.set_autocast_enabled(device_type, True)

    def _fused(self, x: torch.Tensor, base: torch.Tensor | None, inplace: bool, masked: bool) -> torch.Tensor:
        """`forward` as one autograd function, for training."""
        logits = self._replacing_logits(x)
        tensors, layout = self.kernel_tensors(), self.layout()
        weights = self._prefetched(tensors, layout, x)
        spec = DeltaSpec(
            layout,
            self.scaling,
            self.dropout if masked else 0.0,
            self.draw_seed() if masked else None,
            inplace and base is not None and base.is_contiguous(),
            self.probe(x),
        )
        return fused_delta(x, *tensors, logits, base, spec, weights)

    def draw_seed(self) -> int:
        """The seed of a dropout mask, derived from the seed of the batch if it has one."""
        return self.derive_seed(self.routing.batch.seed)

    def derive_seed(self, seed: int | None) -> int:
        """The seed of a dropout mask from that of the batch, or a new one."""
        return draw_seed() if seed is None else (seed ^ (self.layer_number * _SPREAD)) & (2**63 - 1)

    def _draw_seed_tensor(self, device: torch.device) -> torch.Tensor:
        """[`draw_seed`] for `torch.compile`."""
        seed = self.routing.batch.seed_tensor
        if seed is None:
            return draw_seed_tensor(device)
        layer_seed = (self.layer_number * _SPREAD) & (2**63 - 1)
        return torch.full((), layer_seed, dtype=torch.int64, device=device) ^ seed

    def kernel_tensors(self) -> AdapterTensors:
        """The tensors for the kernels: with the router only if it is applied to the input."""
        routed = self.router_kind != "task" and self.fixed_logits is None
        return self.A, self.B, self.router if routed else None, self.A0, self.B0

    def layout(self) -> Layout:
        """The columns of the projections, with logits unless all heads weigh the same."""
        fixed = self.fixed_logits is not None
        routed, top_k = fixed or self.router_kind != "uniform", 0 if fixed else self.top_k
        return Layout(self.num_heads, self.r, routed, self.init_weights == "rlora", self.share_a, top_k)

    def delta_spec(self) -> DeltaSpec:
        """The settings that [`concat_weights`] needs."""
        return DeltaSpec(self.layout(), self.scaling)

    def _prefetched(self, tensors: AdapterTensors, layout: Layout, x: torch.Tensor) -> ConcatWeights | None:
        """The prefetched weights, if they are valid for this call."""
        prefetched = self.prefetched
        if prefetched is None and self.kept is not None:
            # A forward pass that did not begin with the model may see other weights.
            kept = self.__dict__.pop("kept")
            prefetched = kept if in_backward() else None
        if prefetched is not None and prefetched.holds_for(tensors, layout, self.scaling, x):
            # Steps of ZeRO-3 are limited by the host, and its layers join no products, so recomputations use these
            # weights too. Those of one pass are all small, as others are not gathered when it begins.
            if "ds_id" in vars(tensors[0]) and not in_backward():
                self.__dict__["kept"] = prefetched
            return prefetched.layers[prefetched.place]
        self.note_dtype(x.dtype)
        return None

    def note_dtype(self, dtype: torch.dtype) -> None:
        """Remember the dtype of products, for [`WeightPrefetch`]."""
        if self.product_dtype != dtype:  # `nn.Module.__setattr__` is slow
            self.product_dtype = dtype

    def probe(self, x: torch.Tensor) -> LayerProbe | None:
        if not self.training or self.fixed_logits is not None:
            return None
        # With reentrant checkpointing the first pass has no backward pass; the recomputation reports.
        return self.routing.probe(self.routing_row, x.shape[:-1].numel()) if torch.is_grad_enabled() else None

    def _composed(self, x: torch.Tensor, base: torch.Tensor | None, masked: bool) -> torch.Tensor:
        """`forward` in PyTorch's own operations."""
        seed: int | torch.Tensor | None = None
        if masked:
            seed = self._draw_seed_tensor(x.device) if torch.compiler.is_compiling() else self.draw_seed()
        delta = multihead_delta(
            x,
            *self.kernel_tensors(),
            scaling=self.scaling,
            dropout=self.dropout,
            seed=seed,
            dropout_position=self.dropout_position,
            logits=self._replacing_logits(x),
            top_k=self.layout().top_k,
            probe=self.probe(x),
        )
        return delta if base is None else base + delta.to(base.dtype)

    def _compiled(self, x: torch.Tensor, base: torch.Tensor | None, masked: bool) -> torch.Tensor:
        """`forward` for `torch.compile`: matrix products, and operators that it does not trace."""
        return compiled_multihead(
            x,
            *self.kernel_tensors(),
            base=base,
            scaling=self.scaling,
            dropout=self.dropout,
            seed=self._draw_seed_tensor(x.device) if masked else None,
            logits=self._replacing_logits(x),
            top_k=self.layout().top_k,
            probe=self.probe(x),
        )

    def _inference_delta(self, x: torch.Tensor) -> InferenceDelta:
        """The weights, concatenated in the dtype of `x`; kept for inference until one of them changes."""
        stored = [*self._parameters.values(), *self._buffers.values()]
        tensors = [tensor for tensor in stored if tensor is not None]
        key = [x.dtype, torch.is_inference_mode_enabled(), self.fixed_logits is None, self.scaling]
        key += [tensor._version for tensor in tensors] + [tensor.data_ptr() for tensor in tensors]
        if self._cache is None or self._cache[0] != key:
            weights = concat_weights(*self.kernel_tensors(), self.delta_spec(), x.dtype)
            self._cache = (key, InferenceDelta(weights))
        return self._cache[1]

    def task_logits(self) -> torch.Tensor:
        """
        Logits of the heads for each of the K tasks of a task router, and last those of the mean over tasks.

        Returns:
            `torch.Tensor` of shape `[K + 1, N]`: In float32 or wider.
        """
        assert self.router is not None
        logits = self.router.to(torch.promote_types(self.router.dtype, torch.float32))  # [K, N]
        return torch.cat([logits, logits.softmax(-1).mean(0, keepdim=True).log()])

    def _replacing_logits(self, x: torch.Tensor) -> torch.Tensor | None:
        """Logits `[T, N]` that replace a router on the input; `None` with such a router."""
        if self.fixed_logits is not None:
            return self.fixed_logits.expand(x.shape[:-1].numel(), -1)
        return self._logits_by_task(x) if self.router_kind == "task" else None

    def _logits_by_task(self, x: torch.Tensor) -> torch.Tensor:
        """Logits `[T, N]` for the tasks of the tokens of `x`."""
        logits = self.task_logits()  # [K + 1, N]
        task_ids = self.routing.token_task_ids(x.shape[:-1], x.device)  # [T]
        if task_ids is None:
            self.routing.warn_of_mean_weights()
            return logits[-1].expand(x.shape[:-1].numel(), -1)
        # Indexing would sum the gradient in a random order; `embedding` has a fixed one.
        return nn.functional.embedding(torch.where(task_ids < 0, len(logits) - 1, task_ids), logits)

    @torch.no_grad()
    def _count_usage(self, x: torch.Tensor) -> None:
        """Add the head weights of the tokens of `x` to the `HeadUsage` of the batch."""
        routing = self.routing
        usage = routing.batch.usage
        if usage is None or self.usage_row is None:
            return
        tokens = x.shape[:-1].numel()
        weights = self.head_weights(x).reshape(tokens, self.num_heads)  # [T, N]
        task_ids = routing.token_task_ids(x.shape[:-1], x.device)  # [T]
        usage.add(self.usage_row, weights, task_ids, routing.mask_for(tokens))

    def train(self, mode: bool = True) -> MultiHeadAdapter:
        """Switch between training and inference, and drop the weights that inference keeps."""
        # Some optimizers write through `.data`, which `_inference_delta` can't notice; but none does in eval mode.
        self._cache = None
        self.__dict__.pop("kept", None)
        if self.first_use is not None:
            self.first_use()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out the weights that inference keeps, and temporary state."""
        temporary = ("_cache", "fixed_logits", "prefetched", "kept", "first_use")
        return {**self.__dict__, **dict.fromkeys(temporary)}

    def fix_head_weights(self, weights: torch.Tensor | None) -> None:
        """
        Replace the router by constant head weights.

        Args:
            weights (`torch.Tensor` of shape `[N]`, *optional*): Weights for all tokens; `None` restores the router.
        """
        if weights is None:
            self.fixed_logits = None
            return
        wide = torch.promote_types(self.A.dtype, torch.float32)
        logits = weights.to("cpu", torch.float64).clamp(min=_TINY).log()
        # The kernels take logits in the dtype of the activations. 16 bits round least near zero, so that is where the
        # largest weights go.
        self.fixed_logits = (logits - logits.max()).to(self.A.device, wide)

    def head_weights(self, x: torch.Tensor) -> torch.Tensor:
        """
        The head weights for an input.

        Args:
            x (`torch.Tensor` of shape `[..., d_in]`): Input of the layer.

        Returns:
            `torch.Tensor` of shape `[..., N]`: In float32 or wider.
        """
        logits = self._replacing_logits(x)
        if logits is not None:
            return routing_weights(logits).view(*x.shape[:-1], self.num_heads)
        if self.router is None:
            return x.new_full((*x.shape[:-1], self.num_heads), 1.0 / self.num_heads, dtype=torch.float32)
        return routing_weights(nn.functional.linear(x, self.router.to(x.dtype)), self.top_k)

    def delta_weight(self) -> torch.Tensor:
        """
        The delta as a matrix.

        Returns:
            `torch.Tensor` of shape `[d_out, d_in]`: In float32 or wider.

        Raises:
            ValueError: If the head weights depend on the token.
        """
        if self.router is not None:
            raise ValueError(
                f"The delta of an adapter with `router={self.router_kind!r}` depends on the token, so it is not a "
                'matrix. Only `router="uniform"` has one.'
            )
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        A, B = self.A.to(dtype), self.B.to(dtype)
        delta = mean_of_heads(B) @ A if self.share_a else (B @ A).mean(0)
        if self.A0 is not None and self.B0 is not None:
            offset = self.B0.to(dtype) @ self.A0.to(dtype)
            delta = delta - (offset if self.share_a else offset.mean(0))
        return self.scaling * delta

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"num_heads={self.num_heads}, scaling={self.scaling:g}, router={self.router_kind!r}, "
            f"share_a={self.share_a}, dropout={self.dropout:g} ({self.dropout_position})"
        )
