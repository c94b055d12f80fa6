"""Checks and norms of the gradients of adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from ..tuner import MultiHeadAdapter


def gradient_norms(adapters: Sequence[MultiHeadAdapter]) -> dict[str, float]:
    """
    Norms of the gradients of all A, all B and all routers, as `grad_norm_A`, `grad_norm_B` and `grad_norm_router`.

    Without those that have no gradient at hand: none trains, or DeepSpeed keeps them.
    """
    norms = {}
    for name in ("A", "B", "router"):
        parameters = [getattr(adapter, name) for adapter in adapters]
        grads = [p.grad for p in parameters if p is not None and p.grad is not None]
        if grads:
            norm = get_total_norm(grads)
            # A sharded gradient (FSDP2) gives a norm that is still to be summed over ranks.
            norms[f"grad_norm_{name}"] = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    values = torch.stack([norm.float() for norm in norms.values()]).tolist() if norms else []
    return dict(zip(norms, values, strict=True))


class FirstGradients:
    """
    Watches the gradients of the first step for those that are missing, zero or not finite where they should not be.

    They are watched as they arrive, before any averaging over ranks, so that it works whoever keeps them afterwards.
    FSDP2 puts parameters of its own in place of those that are watched, and keeps their gradients: these are read
    when all is told.

    Args:
        adapters (`Mapping[str, MultiHeadAdapter]`): The adapters in training, by the name of their layer.
        fresh (`bool`, *optional*, defaults to `True`): Whether they are at their initial values. Of others it is not
            known which gradients may be zero.
        scaled (`bool`, *optional*, defaults to `False`): Whether the loss is scaled (fp16), so that gradients that are
            not finite are a matter of course in the first steps.
    """

    def __init__(self, adapters: Mapping[str, MultiHeadAdapter], *, fresh: bool = True, scaled: bool = False) -> None:
        self.adapters = dict(adapters)
        self.fresh, self.scaled = fresh, scaled
        self.squares: dict[tuple[str, str], torch.Tensor] = {}
        self.handles = []
        for layer, adapter in self.adapters.items():
            for name in ("A", "B", "router"):
                parameter = getattr(adapter, name)
                if parameter is not None and parameter.requires_grad:
                    self.handles.append(parameter.register_hook(self._watch(layer, name)))

    def _watch(self, layer: str, name: str) -> Callable[[torch.Tensor], None]:
        def hook(grad: torch.Tensor) -> None:
            square = _square(grad, name)
            key = (layer, name)
            self.squares[key] = self.squares[key] + square if key in self.squares else square

        return hook

    def close(self) -> None:
        """Stop watching."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def report(self) -> list[str]:
        """
        A sentence for each thing that is wrong, with its likely cause; empty if nothing is.

        To be called on all ranks, and before gradients are clipped.
        """
        missing: list[str] = []
        not_finite: list[str] = []
        zero: dict[str, list[str]] = {}
        for layer, adapter in self.adapters.items():
            for name in ("A", "B", "router"):
                parameter = getattr(adapter, name)
                if parameter is None or not parameter.requires_grad:
                    continue
                if isinstance(parameter.grad, DTensor) and (layer, name) not in self.squares:
                    self.squares[layer, name] = _square(parameter.grad.full_tensor(), name)
                square = self.squares.get((layer, name))
                if square is None:
                    missing.append(f"{layer} ({name})")
                elif not bool(torch.isfinite(square).all()):
                    not_finite += [] if self.scaled else [f"{layer} ({name})"]
                elif self.fresh and name in _expected(adapter):
                    for head in self._zeros(layer, name):
                        zero.setdefault(f"head {head} of B" if name == "B" else name, []).append(layer)
        return _sentences(missing, not_finite, zero, self.adapters)

    def _zeros(self, layer: str, name: str) -> list[int]:
        """
        The heads of B whose gradient is zero, or 0 for one that is not told apart.

        What cancels in exact arithmetic leaves rounding: of heads, as 16-bit products have it; of a router, as sums in
        float32 have it.
        """
        square = self.squares[layer, name]
        if name == "B":
            return (square <= 1e-4 * square.max()).nonzero().flatten().tolist()
        scale = self.squares.get((layer, "A" if name == "router" else "B"), square).sum()
        return [0] if bool(square.sum() <= 1e-10 * scale) else []


def _square(grad: torch.Tensor, name: str) -> torch.Tensor:
    """Sums of squares: of each head of B, which are told apart; of the rest as a whole."""
    square = grad.detach().float().pow(2)
    return square.flatten(1).sum(1) if name == "B" else square.sum().reshape(1)


def _sentences(
    missing: list[str], not_finite: list[str], zero: dict[str, list[str]], adapters: Mapping[str, MultiHeadAdapter]
) -> list[str]:
    told = []
    if missing:
        told.append(
            f"no gradient for {_few(missing)}: the loss does not depend on these layers. They are not used on "
            "this data, or reentrant gradient checkpointing cuts them off because nothing before them requires a "
            "gradient (call `model.enable_input_require_grads()`)."
        )
    if not_finite:
        told.append(
            f"gradients that are not finite for {_few(not_finite)}: the loss overflows. Lower the learning rate "
            "or the scaling (`lora_alpha`), or train in bf16 rather than fp16."
        )
    for what, layers in zero.items():
        told.append(f"no gradient to speak of for {what} in {_few(layers)}: {_cause(what, adapters[layers[0]])}")
    return told


def _expected(adapter: MultiHeadAdapter) -> set[str]:
    """Which gradients are not zero in the first step of a new adapter."""
    if adapter.init_weights == "zero_b":
        return {"B"}
    if adapter.init_weights == "zero_a":
        return {"A"}
    return {"A", "B", "router"} if adapter.num_heads > 1 else {"A", "B"}


def _cause(what: str, adapter: MultiHeadAdapter) -> str:
    if what.startswith("head") and adapter.router_kind == "top_k":
        return (
            "no token chose it. A balance loss (`balance_loss='switch'`) lets it be chosen; without one it never "
            "learns."
        )
    if what == "router":
        return "equal heads give it nothing to choose from. Use `init_weights='rlora'`, or check what was loaded."
    return "no token of the first step has a loss (are all labels -100?), or the weights that it meets are all zero."


def _few(names: list[str], limit: int = 3) -> str:
    listed = ", ".join(names[:limit])
    return listed if len(names) <= limit else f"{listed} and {len(names) - limit} more"
