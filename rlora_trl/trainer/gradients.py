"""Norms of the gradients of adapters, and a check of those of the first step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from ..reading import first_few
from ..tuner import MultiHeadAdapter


_PARAMETERS = ("A", "B", "router")


def gradient_norms(adapters: Sequence[MultiHeadAdapter]) -> dict[str, float]:
    """
    Norms of the gradients of all A, all B and all routers.

    Args:
        adapters (`Sequence[MultiHeadAdapter]`): The adapters in training.

    Returns:
        `dict[str, float]`: `grad_norm_A`, `grad_norm_B` and `grad_norm_router`, without those that have no gradient
        (none trains, or DeepSpeed holds them).
    """
    norms = {}
    for name in _PARAMETERS:
        parameters = [getattr(adapter, name) for adapter in adapters]
        grads = [p.grad for p in parameters if p is not None and p.grad is not None]
        if grads:
            norm = get_total_norm(grads)
            # The norm of a sharded gradient (FSDP2) is not summed over ranks yet.
            norms[f"grad_norm_{name}"] = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    values = torch.stack([norm.float() for norm in norms.values()]).tolist() if norms else []
    return dict(zip(norms, values, strict=True))


class FirstGradients:
    """
    Finds gradients of the first step that are missing or zero where they should not be.

    Hooks see the gradients before they are averaged over ranks, so that it works with every strategy. FSDP2 replaces
    the parameters that have the hooks: those gradients are read in [`report`].

    Args:
        adapters (`Mapping[str, MultiHeadAdapter]`): The adapters in training, by the name of their layer.
        fresh (`bool`, *optional*, defaults to `True`): Whether they have their initial values. For others it is not
            known which gradients may be zero.

    Attributes:
        squares (`dict`): Sums of squares of the gradients so far by layer and parameter: `[N]` of the heads of B, else
            `[1]`.
    """

    def __init__(self, adapters: Mapping[str, MultiHeadAdapter], *, fresh: bool = True) -> None:
        self.adapters, self.fresh = dict(adapters), fresh
        self.squares: dict[tuple[str, str], torch.Tensor] = {}
        self._hooks = [p.register_hook(partial(self._add, layer, name)) for layer, name, p in self._parameters()]

    def _parameters(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        for layer, adapter in self.adapters.items():
            for name in _PARAMETERS:
                parameter = getattr(adapter, name)
                if parameter is not None and parameter.requires_grad:
                    yield layer, name, parameter

    def _add(self, layer: str, name: str, grad: torch.Tensor) -> None:
        square = grad.detach().float().pow(2)
        # Heads of experts have one more dimension; an expert without tokens has no gradient.
        square = square.sum((-2, -1)).reshape(-1, square.shape[-3]).sum(0) if name == "B" else square.sum().reshape(1)
        self.squares[layer, name] = self.squares.get((layer, name), 0) + square

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def report(self) -> list[str]:
        """
        Describe what is wrong. To be called on all ranks, before gradients are clipped.

        Returns:
            `list[str]`: A sentence for each problem, with its likely cause.
        """
        missing: list[str] = []
        zero: dict[str, list[str]] = {}
        for layer, name, parameter in self._parameters():
            if (layer, name) not in self.squares and isinstance(parameter.grad, DTensor):
                self._add(layer, name, parameter.grad.full_tensor())
            if (layer, name) not in self.squares:
                missing.append(f"{layer} ({name})")
            elif self.fresh and name in _nonzero_at_start(self.adapters[layer]):
                for what in self._zeros(layer, name):
                    zero.setdefault(what, []).append(layer)

        problems = []
        if missing:
            problems.append(
                f"no gradient for {first_few(missing)}: the loss does not depend on these layers. They are not used "
                "on this data, or reentrant gradient checkpointing cuts them off because nothing before them requires "
                "a gradient (call `model.enable_input_require_grads()`)."
            )
        for what, layers in zero.items():
            cause = _cause(what, self.adapters[layers[0]])
            problems.append(f"a gradient of zero for {what} in {first_few(layers)}: {cause}")
        return problems

    def _zeros(self, layer: str, name: str) -> list[str]:
        """The heads of B, or the parameter, with a gradient of zero up to rounding."""
        square = self.squares[layer, name]
        if not bool(torch.isfinite(square).all()):
            return []  # what to do then is the `nan_policy`
        if name == "B":  # rounding of 16-bit products
            return [f"head {head} of B" for head in (square <= 1e-4 * square.max()).nonzero().flatten().tolist()]
        scale = self.squares.get((layer, "A" if name == "router" else "B"), square).sum()
        return [name] if bool(square.sum() <= 1e-10 * scale) else []  # rounding of sums in float32


def _nonzero_at_start(adapter: MultiHeadAdapter) -> set[str]:
    """The parameters with a gradient in the first step of a new adapter."""
    if adapter.init_weights in ("zero_a", "zero_b"):
        return {"A"} if adapter.init_weights == "zero_a" else {"B"}
    return {"A", "B", "router"} if adapter.num_heads > 1 else {"A", "B"}


def _cause(what: str, adapter: MultiHeadAdapter) -> str:
    if what.startswith("head") and adapter.router_kind == "top_k":
        return "no token selected it. Set `balance_loss='switch'`, without which it never learns."
    if what == "router":
        return "equal heads leave it nothing to choose from. Use `init_weights='rlora'`, or check what was loaded."
    return "no token of the first step has a loss (are all labels -100?), or the weights it multiplies are all zero."
