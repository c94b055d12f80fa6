"""One multi-head adapter as a module: it owns A, the heads B, the router and the anchor, and knows nothing of PEFT."""

from operator import is_
from typing import Any, NamedTuple

import torch
from torch import nn

from ..kernels import LayerProbe, compiled_multihead, draw_seed, draw_seed_tensor, multihead_delta, routing_weights
from ..kernels.fused import ConcatWeights, DeltaSpec, InferenceDelta, concat_weights, fused_delta
from ..kernels.rank_space import AdapterTensors, Layout
from .initialization import init_heads_, init_router_
from .routing import Routing


# Weights below this are none: their logits stay finite in 16 bits, and zero times them is zero.
_TINY = 1e-300
# An odd number that spreads the numbers of layers over the bits of a seed.
_SPREAD = 0x2545F4914F6CDD1D


class PrefetchedWeights(NamedTuple):
    """Weights of an adapter that were packed before it was called, and what they were made from."""

    packed: ConcatWeights
    layout: Layout
    scaling: float
    tensors: AdapterTensors
    versions: list[int | None]

    @classmethod
    def of(cls, packed: ConcatWeights, spec: DeltaSpec, tensors: AdapterTensors) -> "PrefetchedWeights":
        """The weights `packed` just now from `tensors`."""
        return cls(packed, spec.layout, spec.scaling, tensors, _versions(tensors))

    def holds_for(self, tensors: AdapterTensors, layout: Layout, scaling: float, x: torch.Tensor) -> bool:
        """Whether these are the weights for an input, made from these very tensors as they are now."""
        down = self.packed.down
        return (
            # Not the same ones in `torch.func.functional_call`, nor on the same device where layers come and go.
            all(map(is_, tensors, self.tensors))
            and down.dtype == x.dtype
            and down.device == x.device
            and scaling == self.scaling
            and layout == self.layout
            and _versions(tensors) == self.versions
        )


def _versions(tensors: AdapterTensors) -> list[int | None]:
    """How often each tensor was written to."""
    return [None if tensor is None else tensor._version for tensor in tensors]


class MultiHeadAdapter(nn.Module):
    """
    Down-projection `A`, `num_heads` head matrices `B` mixed by a router, and the frozen anchor `A0`, `B0`.

    With h = A x, w the weights of the heads and m_i the dropout mask of head i (R-LoRA, arXiv 2502.15455, equation 4):

        delta(x) = scaling * (sum_i w_i B_i (m_i . h) / (1 - p)  -  B0 (A0 x))

    `A0` and `B0` are the initial `A` and the mean over heads of the initial `B`. The paper subtracts `B0 A0` from the
    frozen weight; kept here instead, the base layer is never touched, whatever its dtype or quantization. With an A
    for each head (`share_a=False`) h is A_i x, `A0` and `B0` are the initial `A` and `B`, and what is subtracted is
    the mean over heads of B0_i (A0_i x).

    The weights are the softmax of logits, which are `router x` ("softmax"), the same with all but the largest
    `router_top_k` left out ("top_k"), or those of the token's task ("task"); or they are all alike ("uniform").

    All parameters are direct members, so that DeepSpeed ZeRO-3 gathers them when the module is called.

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
            Heads kept for each token by `"top_k"`.
        share_a (`bool`, *optional*, defaults to `True`):
            One A for all heads rather than one for each.
        routing ([`Routing`], *optional*):
            What the layers of one adapter share; its tasks are the rows of a task router.
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
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Dtype of the parameters.
    """

    # Parameters that hold the initial value: saved with the adapter, never trained.
    anchor_names = ("A0", "B0")
    # What a state dict of this module may contain.
    tensor_names = ("A", "B", "router", "A0", "B0")
    A: nn.Parameter
    B: nn.Parameter
    router: nn.Parameter | None
    A0: nn.Parameter | None
    B0: nn.Parameter | None

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
    ) -> dict[str, tuple[int, ...]]:
        """
        The tensors that an adapter of these settings has: the only place that knows them.

        Args:
            num_tasks (`int`, *optional*, defaults to `0`): Rows of a task router.

        See the class for the other arguments.

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
        return shapes

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
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self._cache: tuple[list, InferenceDelta] | None = None  # see `_packed`
        # That of the last products for which the weights were not packed ahead.
        self.product_dtype: torch.dtype | None = None
        self.in_features, self.out_features = in_features, out_features
        self.r, self.num_heads = r, num_heads
        self.scaling = scaling
        self.router_kind, self.router_init = router, router_init
        self.dropout, self.dropout_position = dropout, dropout_position
        self.init_weights, self.init_gamma = init_weights, init_gamma

        self.top_k = router_top_k or 0
        self.share_a = share_a
        self.routing = routing if routing is not None else Routing(None, router)
        self.layer_number = self.routing.number_layer()
        # This layer's rows in the records of a trainer, and of evaluation.
        self.routing_row: int | None = None
        self.usage_row: int | None = None
        # Logits `[N]` of the weights that all tokens get, in place of the router; see `fixed_head_weights`.
        self.fixed_logits: torch.Tensor | None = None

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
            # A router of zeros hides from tests whether it is used at all.
            init_router_(self.router, self.router_init if self.init_weights is not False else "kaiming_uniform")
        self.reset_anchor()

    def _anchor_of(self, B: torch.Tensor) -> torch.Tensor:
        """What the anchor keeps of B: with a shared A its mean is enough."""
        return B.mean(0) if self.share_a else B

    @torch.no_grad()
    def reset_anchor(self) -> None:
        """Set the anchor to the present values, so that the delta with equal weights of all heads is zero."""
        if self.A0 is not None and self.B0 is not None:
            self.A0.copy_(self.A)
            self.B0.copy_(self._anchor_of(self.B))

    @torch.no_grad()
    def is_at_anchor(self) -> bool:
        """Whether A and the mean of B still are at the initial values: the delta with equal weights is zero."""
        return (
            self.A0 is not None
            and self.B0 is not None
            and torch.equal(self.A0, self.A)
            and torch.equal(self.B0, self._anchor_of(self.B))
        )

    def cast(self, dtype: torch.dtype) -> None:
        """Cast all parameters; an adapter at its initial values stays there, with an anchor of the rounded values."""
        at_anchor = self.A.device.type != "meta" and self.is_at_anchor()
        self.to(dtype)
        if at_anchor:
            self.reset_anchor()

    def freeze_anchor(self) -> None:
        """Take gradients off the anchor again, after code that turned them on for every parameter."""
        for name in self.anchor_names:
            parameter = getattr(self, name)
            if parameter is not None:
                parameter.requires_grad_(False)

    @property
    def trains(self) -> bool:
        """Whether any parameter is trained."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def requires_grad_(self, requires_grad: bool = True) -> "MultiHeadAdapter":
        """Turn gradients on or off for all parameters but the anchor, which stays frozen."""
        super().requires_grad_(requires_grad)
        self.freeze_anchor()
        return self

    def forward(
        self,
        x: torch.Tensor,
        base: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
        inplace: bool = False,
    ) -> torch.Tensor:
        """
        The delta, alone or added to the output of the layer.

        Args:
            x (`torch.Tensor` of shape `[..., d_in]`): Input of the layer.
            base (`torch.Tensor` of shape `[..., d_out]`, *optional*): Output of the layer.
            weight (`torch.Tensor` of shape `[d_out, d_in]`, *optional*): Frozen weight, to compute that output here.
            inplace (`bool`, *optional*, defaults to `False`): The result may be written over `base`.

        Returns:
            `torch.Tensor` of shape `[..., d_out]`: In the dtype of `base` where it is given.
        """
        device_type = x.device.type
        autocast = torch.is_autocast_enabled(device_type)
        if autocast and x.dtype != (dtype := torch.get_autocast_dtype(device_type)):
            x = x.to(dtype)
        training, routing = self.training, self.routing
        if training or torch.is_grad_enabled():
            routing.note_forward()
        if not training and routing.batch.usage is not None:
            self._record_usage(x)
        masked = training and self.dropout > 0.0
        on_input = masked and self.dropout_position == "input"
        if torch.compiler.is_compiling() and not on_input:
            return self._compiled(x, base, weight, masked)
        if on_input or (base is not None and base.dtype != x.dtype):
            return self._composed(x, base, weight, masked)
        logits = self._given_logits(x)
        if not training and not torch.is_grad_enabled() and weight is None:
            return self._packed(x).apply(x, base, logits=logits, inplace=inplace)
        tensors, layout = self.kernel_tensors(), self._layout()
        packed = self._prefetched(tensors, layout, x)
        spec = DeltaSpec(
            layout,
            self.scaling,
            self.dropout if masked else 0.0,
            self._draw_seed() if masked else None,
            inplace and base is not None and base.is_contiguous(),
            self._probe(x),
        )
        if not autocast:
            return fused_delta(x, *tensors, logits, base, weight, spec, packed)
        # All is in its dtype by now, and autocast costs each product of a short step a third more of the host's time.
        torch.set_autocast_enabled(device_type, False)
        try:
            return fused_delta(x, *tensors, logits, base, weight, spec, packed)
        finally:
            torch.set_autocast_enabled(device_type, True)

    def _draw_seed(self) -> int:
        """The seed of a dropout mask; made from that of the batch, where there is one."""
        seed = self.routing.batch.seed
        return draw_seed() if seed is None else (seed ^ (self.layer_number * _SPREAD)) & (2**63 - 1)

    def _draw_seed_tensor(self, device: torch.device) -> torch.Tensor:
        """The same for `torch.compile`."""
        seed = self.routing.batch.seed_tensor
        if seed is None:
            return draw_seed_tensor(device)
        own = (self.layer_number * _SPREAD) & (2**63 - 1)
        return torch.full((), own, dtype=torch.int64, device=device) ^ seed

    def kernel_tensors(self) -> AdapterTensors:
        """What the kernels get: with the router where it is a matrix for the input, which that of tasks is not."""
        routed = self.router_kind != "task" and self.fixed_logits is None
        return self.A, self.B, self.router if routed else None, self.A0, self.B0

    def _layout(self) -> Layout:
        """The columns of the projections: with logits where a router or a fixed mixture gives them."""
        routed = self.router_kind != "uniform" or self.fixed_logits is not None
        return Layout(self.num_heads, self.r, routed, self.init_weights == "rlora", self.share_a, self._top_k())

    def delta_spec(self) -> DeltaSpec:
        """What [`concat_weights`] needs to know of this adapter, besides its tensors."""
        return DeltaSpec(self._layout(), self.scaling)

    def _prefetched(self, tensors: AdapterTensors, layout: Layout, x: torch.Tensor) -> ConcatWeights | None:
        """The weights that were packed for this forward pass of the model, where they hold."""
        ahead = self.routing.packed.get(self.layer_number)
        if ahead is not None and ahead.holds_for(tensors, layout, self.scaling, x):
            return ahead.packed
        if self.product_dtype != x.dtype:  # `nn.Module` takes its time to set attributes
            self.product_dtype = x.dtype
        return None

    def _top_k(self) -> int:
        return self.top_k if self.fixed_logits is None else 0

    def _probe(self, x: torch.Tensor) -> LayerProbe | None:
        if not self.training or self.fixed_logits is not None:
            return None
        # Under reentrant checkpointing the first pass has no backward pass: the recomputation records.
        return self.routing.probe(self.routing_row, x.shape[:-1].numel()) if torch.is_grad_enabled() else None

    def _composed(
        self, x: torch.Tensor, base: torch.Tensor | None, weight: torch.Tensor | None, masked: bool
    ) -> torch.Tensor:
        """The same from PyTorch's own operations."""
        seed: int | torch.Tensor | None = None
        if masked:
            seed = self._draw_seed_tensor(x.device) if torch.compiler.is_compiling() else self._draw_seed()
        delta = multihead_delta(
            x,
            *self.kernel_tensors(),
            scaling=self.scaling,
            dropout=self.dropout,
            seed=seed,
            dropout_position=self.dropout_position,
            logits=self._given_logits(x),
            top_k=self._top_k(),
            probe=self._probe(x),
        )
        if weight is not None:
            base = nn.functional.linear(x, weight)
        return delta if base is None else base + delta.to(base.dtype)

    def _compiled(
        self, x: torch.Tensor, base: torch.Tensor | None, weight: torch.Tensor | None, masked: bool
    ) -> torch.Tensor:
        """The same for `torch.compile`: matrix products and operators that it does not look into."""
        return compiled_multihead(
            x,
            *self.kernel_tensors(),
            base=base,
            weight=weight,
            scaling=self.scaling,
            dropout=self.dropout,
            seed=self._draw_seed_tensor(x.device) if masked else None,
            logits=self._given_logits(x),
            top_k=self._top_k(),
            probe=self._probe(x),
        )

    def _packed(self, x: torch.Tensor) -> InferenceDelta:
        """The weights side by side in the dtype of `x`, made once for inference, and again when one has changed."""
        parameters = [parameter for parameter in self._parameters.values() if parameter is not None]
        key = [x.dtype, torch.is_inference_mode_enabled(), self.fixed_logits is None, self.scaling]
        key += [parameter._version for parameter in parameters] + [parameter.data_ptr() for parameter in parameters]
        if self._cache is None or self._cache[0] != key:
            packed = concat_weights(*self.kernel_tensors(), self.delta_spec(), x.dtype)
            self._cache = (key, InferenceDelta(packed))
        return self._cache[1]

    def task_mixtures(self) -> torch.Tensor:
        """
        Logits of the heads `[K + 1, N]` for each of the K tasks, and for no task: the mean of the K mixtures.

        In float32 or wider.
        """
        logits = self.router.to(torch.promote_types(self.router.dtype, torch.float32))
        return torch.cat([logits, logits.softmax(-1).mean(0, keepdim=True).log()])

    def _given_logits(self, x: torch.Tensor) -> torch.Tensor | None:
        """Logits `[T, N]` that take the place of a router's, if there are any."""
        if self.fixed_logits is not None:
            return self.fixed_logits.expand(x.shape[:-1].numel(), -1)
        return self._task_logits(x) if self.router_kind == "task" else None

    def _task_logits(self, x: torch.Tensor) -> torch.Tensor:
        """Logits `[T, N]` of the tasks of the tokens of `x`."""
        mixtures = self.task_mixtures()
        task_ids = self.routing.token_task_ids(x.shape[:-1], x.device)
        if task_ids is None:
            self.routing.warn_of_mean_mixture()
            return mixtures[-1].expand(x.shape[:-1].numel(), -1)
        # `embedding`, as its gradient is summed in a fixed order.
        return nn.functional.embedding(torch.where(task_ids < 0, len(mixtures) - 1, task_ids), mixtures)

    @torch.no_grad()
    def _record_usage(self, x: torch.Tensor) -> None:
        routing = self.routing
        usage = routing.batch.usage
        if usage is None or self.usage_row is None:
            return
        tokens = x.shape[:-1].numel()
        weights = self.mixture(x).reshape(tokens, self.num_heads)
        task_ids = routing.token_task_ids(x.shape[:-1], x.device)
        usage.add(self.usage_row, weights, task_ids, routing.mask_for(tokens))

    def train(self, mode: bool = True) -> "MultiHeadAdapter":
        """Switch between training and inference; what inference keeps is dropped."""
        # Some optimizers write through `.data`, which leaves no trace that `_packed` sees; but not while in eval mode.
        self._cache = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take along: all but what inference keeps, and what holds for a while only."""
        return {**self.__dict__, "_cache": None, "fixed_logits": None}

    def fix_mixture(self, weights: torch.Tensor | None) -> None:
        """Give all tokens the weights `[N]` of the heads from now on, or with `None` those of the router again."""
        if weights is None:
            self.fixed_logits = None
            return
        wide = torch.promote_types(self.A.dtype, torch.float32)
        logits = weights.to("cpu", torch.float64).clamp(min=_TINY).log()
        # The kernels take logits in the dtype of the activations: near zero, where weights are large, 16 bits round
        # them least.
        self.fixed_logits = (logits - logits.max()).to(self.A.device, wide)

    def mixture(self, x: torch.Tensor) -> torch.Tensor:
        """The weights `[..., N]` of the heads for inputs `x` `[..., d_in]`, in float32 or wider."""
        logits = self._given_logits(x)
        if logits is not None:
            return routing_weights(logits).view(*x.shape[:-1], self.num_heads)
        if self.router is None:
            return x.new_full((*x.shape[:-1], self.num_heads), 1.0 / self.num_heads, dtype=torch.float32)
        return routing_weights(nn.functional.linear(x, self.router.to(x.dtype)), self.top_k)

    def delta_weight(self) -> torch.Tensor:
        """
        The delta as a matrix `[d_out, d_in]` in float32 or wider, where it is one.

        Raises:
            ValueError: If the weights of the heads depend on the token.
        """
        if self.router is not None:
            raise ValueError(
                f"The delta of an adapter with `router={self.router_kind!r}` depends on the token and is not a "
                'matrix. Only `router="uniform"` has one.'
            )
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        A, B = self.A.to(dtype), self.B.to(dtype)
        delta = B.mean(0) @ A if self.share_a else (B @ A).mean(0)
        if self.A0 is not None and self.B0 is not None:
            offset = self.B0.to(dtype) @ self.A0.to(dtype)
            delta = delta - (offset if self.share_a else offset.mean(0))
        return self.scaling * delta

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"num_heads={self.num_heads}, scaling={self.scaling:g}, router={self.router_kind!r}, "
            f"share_a={self.share_a}, "
            f"dropout={self.dropout:g} ({self.dropout_position})"
        )
