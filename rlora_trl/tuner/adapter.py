"""One multi-head adapter as a module: it owns A, the heads B, the router and the anchor, and knows nothing of PEFT."""

from typing import Any, TypeAlias

import torch
from torch import nn

from ..kernels import draw_seed, draw_seed_tensor, fused_multihead, multihead_delta, routing_weights
from ..kernels.fused import DeltaSpec, PackedAdapter, pack_weights
from .initialization import init_heads_, init_router_


# A, B, router, A0, B0
AdapterTensors: TypeAlias = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None
]


class MultiHeadAdapter(nn.Module):
    """
    Shared down-projection `A`, `num_heads` head matrices `B` mixed by a router, and the frozen anchor `A0`, `B0`.

    With h = A x, w = softmax(router x) and m_i the dropout mask of head i (R-LoRA, arXiv 2502.15455, equation 4):

        delta(x) = scaling * (sum_i w_i B_i (m_i . h) / (1 - p)  -  B0 (A0 x))

    `A0` and `B0` are the initial `A` and the mean over heads of the initial `B`. The paper subtracts `B0 A0` from the
    frozen weight; kept here instead, the base layer is never touched, whatever its dtype or quantisation.

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
            `"softmax"` or `"uniform"`.
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

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        num_heads: int,
        scaling: float,
        *,
        router: str = "softmax",
        router_init: str = "zeros",
        dropout: float = 0.0,
        dropout_position: str = "head",
        init_weights: str | bool = "rlora",
        init_gamma: float = 64.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self._cache: tuple[list, PackedAdapter] | None = None  # see `_packed`
        self.in_features, self.out_features = in_features, out_features
        self.r, self.num_heads = r, num_heads
        self.scaling = scaling
        self.router_kind, self.router_init = router, router_init
        self.dropout, self.dropout_position = dropout, dropout_position
        self.init_weights, self.init_gamma = init_weights, init_gamma

        self.A = nn.Parameter(torch.empty(r, in_features, dtype=dtype))
        self.B = nn.Parameter(torch.empty(num_heads, out_features, r, dtype=dtype))
        if router == "softmax":
            self.router = nn.Parameter(torch.empty(num_heads, in_features, dtype=dtype))
        else:
            self.register_parameter("router", None)
        # With a zero A or a zero B the initial delta is zero: there is nothing to subtract.
        anchored = init_weights == "rlora"
        # Frozen parameters rather than buffers: DistributedDataParallel broadcasts buffers before each forward pass.
        self.A0 = nn.Parameter(torch.empty_like(self.A), requires_grad=False) if anchored else None
        self.B0 = nn.Parameter(torch.empty_like(self.B[0]), requires_grad=False) if anchored else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new initial values and set the anchor to them."""
        init_heads_(self.A, self.B, self.init_weights, self.init_gamma)
        if self.router is not None:
            # A router of zeros hides from tests whether it is used at all.
            init_router_(self.router, self.router_init if self.init_weights is not False else "kaiming_uniform")
        self.reset_anchor()

    @torch.no_grad()
    def reset_anchor(self) -> None:
        """Set the anchor to the present values, so that the delta with equal weights of all heads is zero."""
        if self.A0 is not None and self.B0 is not None:
            self.A0.copy_(self.A)
            self.B0.copy_(self.B.mean(0))

    @torch.no_grad()
    def is_at_anchor(self) -> bool:
        """Whether A and the mean of B still are at the initial values: the delta with equal weights is zero."""
        return (
            self.A0 is not None
            and self.B0 is not None
            and torch.equal(self.A0, self.A)
            and torch.equal(self.B0, self.B.mean(0))
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
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        masked = self.training and self.dropout > 0.0
        composed = torch.compiler.is_compiling() or (masked and self.dropout_position == "input")
        if composed or (base is not None and base.dtype != x.dtype):
            return self._composed(x, base, weight, masked)
        if not self.training and not torch.is_grad_enabled() and weight is None:
            return self._packed(x).apply(x, base, inplace=inplace)
        return fused_multihead(
            x,
            *self._tensors(),
            base=base,
            weight=weight,
            scaling=self.scaling,
            dropout=self.dropout,
            seed=draw_seed() if masked else None,
            inplace=inplace,
        )

    def _tensors(self) -> AdapterTensors:
        return self.A, self.B, self.router, self.A0, self.B0

    def _composed(
        self, x: torch.Tensor, base: torch.Tensor | None, weight: torch.Tensor | None, masked: bool
    ) -> torch.Tensor:
        """The same from PyTorch's own operations."""
        seed: int | torch.Tensor | None = None
        if masked:
            seed = draw_seed_tensor(x.device) if torch.compiler.is_compiling() else draw_seed()
        delta = multihead_delta(
            x,
            *self._tensors(),
            scaling=self.scaling,
            dropout=self.dropout,
            seed=seed,
            dropout_position=self.dropout_position,
        )
        if weight is not None:
            base = nn.functional.linear(x, weight)
        return delta if base is None else base + delta.to(base.dtype)

    def _packed(self, x: torch.Tensor) -> PackedAdapter:
        """The weights side by side in the dtype of `x`, made once for inference, and again when one has changed."""
        # Straight from the dictionary: `nn.Module` looks attributes up in Python, which counts in decoding.
        parameters = [parameter for parameter in self._parameters.values() if parameter is not None]
        key = [x.dtype, torch.is_inference_mode_enabled()]
        key += [parameter._version for parameter in parameters] + [parameter.data_ptr() for parameter in parameters]
        if self._cache is None or self._cache[0] != key:
            routed, anchored = self.router is not None, self.A0 is not None
            spec = DeltaSpec(self.num_heads, self.r, self.scaling, 0.0, None, routed, anchored)
            self._cache = (key, PackedAdapter(*pack_weights(*self._tensors(), spec, x.dtype), spec))
        return self._cache[1]

    def train(self, mode: bool = True) -> "MultiHeadAdapter":
        """Switch between training and inference; what inference keeps is dropped."""
        # Some optimizers write through `.data`, which leaves no trace that `_packed` sees; but not while in eval mode.
        self._cache = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take along: all but what inference keeps, which they make for themselves."""
        return {**self.__dict__, "_cache": None}

    def mixture(self, x: torch.Tensor) -> torch.Tensor:
        """The weights `[..., N]` of the heads for inputs `x` `[..., d_in]`, in float32 or wider."""
        if self.router is None:
            return x.new_full((*x.shape[:-1], self.num_heads), 1.0 / self.num_heads, dtype=torch.float32)
        return routing_weights(nn.functional.linear(x, self.router.to(x.dtype)))

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
        delta = self.B.to(dtype).mean(0) @ self.A.to(dtype)
        if self.A0 is not None and self.B0 is not None:
            delta = delta - self.B0.to(dtype) @ self.A0.to(dtype)
        return self.scaling * delta

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"num_heads={self.num_heads}, scaling={self.scaling:g}, router={self.router_kind!r}, "
            f"dropout={self.dropout:g} ({self.dropout_position})"
        )
