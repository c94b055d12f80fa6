"""
Finds layers that get the same input, such as gate and up, or q, k and v, so that one function computes all of them.

A forward pass of training is observed: a layer that gets the very tensor that the adapted layer before it got follows
that layer. In later passes the first layer of such a group computes the outputs of all, and the others hand theirs out
when they are called with the same tensor. No model is changed, and a layer that is called in another way computes its
output itself.

Which groups a pass uses is part of the context of its batch, so that a recomputation (activation checkpointing) uses
the same and saves the same tensors.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..kernels.rank_space import Layout
from .adapter import MultiHeadAdapter, OtherLayer
from .base_product import FrozenProduct, frozen_product, is_hooked
from .prefetch import is_whole
from .recomputation import in_backward


if TYPE_CHECKING:
    from .layer import RLoraLinear


# Layers of a group at most: q, k and v.
_LARGEST = 3


# Not public (no upstream issue as of torch 2.13); without it nothing is grouped.
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def _region() -> Any:
    """What tells a checkpointed region from another one: the hooks on tensors that are saved for backward."""
    return _top_hooks(False) if _top_hooks is not None else object()


class _Input(NamedTuple):
    """An input, and the state of autograd in which a layer got it."""

    x: torch.Tensor
    version: int
    region: Any
    autocast: bool

    @classmethod
    def of(cls, x: torch.Tensor) -> _Input:
        return cls(x, x._version, _region(), torch.is_autocast_enabled(x.device.type))

    def is_that_of(self, x: torch.Tensor) -> bool:
        """Whether a layer gets this input now."""
        return (
            self.x is x
            and self.version == x._version
            and self.autocast == torch.is_autocast_enabled(x.device.type)
            and torch.is_grad_enabled()
            and self.region == _region()
        )


class ReadyOutput(NamedTuple):
    """
    The output of a layer that the first layer of its group has computed.

    Args:
        output (`torch.Tensor` of shape `[..., d_out]`): The output.
        given (`_Input`): The input.
        adapter ([`MultiHeadAdapter`]), scaling (`float`), product ([`FrozenProduct`]), tensors (`tuple`): What it was
            computed with.
    """

    output: torch.Tensor
    given: _Input
    adapter: MultiHeadAdapter
    scaling: float
    product: FrozenProduct
    tensors: tuple[Any, ...]

    def holds_for(self, x: torch.Tensor, layer: RLoraLinear) -> bool:
        """Whether a layer that is called with `x` would compute this output."""
        active = layer.adapters_in_use()
        parameters, base = self.adapter._parameters, layer.base_layer._parameters
        return (
            len(active) == 1
            and active[0] is self.adapter
            and self.given.is_that_of(x)
            and self.adapter.training
            and self.adapter.scaling == self.scaling
            and base.get("weight") is self.product.weight
            and base.get("bias") is self.product.bias
            and all(map(is_, parameters.values(), self.tensors))
        )


class InputGroups:
    """
    The groups of one forward pass and its recomputations.

    Args:
        followers (`dict`, *optional*): For the first layer of each group, by its id, weak references to it and the
            layers that get its input after it. Without it the pass is observed.
    """

    def __init__(self, followers: dict[int, tuple[weakref.ref[RLoraLinear], ...]] | None = None) -> None:
        self.followers = followers or {}
        self.observes = followers is None
        self._last: _Input | None = None
        self._group: list[weakref.ref[RLoraLinear]] = []
        self._found: list[list[weakref.ref[RLoraLinear]]] = []

    def observe(self, layer: RLoraLinear, x: torch.Tensor) -> None:
        """Note that a layer is called in a forward pass."""
        if in_backward() or torch.compiler.is_compiling():
            return
        if self._last is None or self._last.x is not x or self._last.version != x._version:
            self._last, self._group = _Input.of(x), []
            self._found.append(self._group)
        elif self._last.region != _region():
            return  # recomputed on its own
        self._group.append(weakref.ref(layer))

    def learned(self) -> InputGroups:
        """The groups of later passes, after a pass was observed."""
        self._last = None
        calls = Counter(layer for group in self._found for layer in group)
        followers = {}
        for group in self._found:
            # A layer that is called several times in a pass may get other company each time.
            first = group[0]()
            if first is not None and len(group) > 1 and all(calls[layer] == 1 for layer in group):
                followers[id(first)] = tuple(group[:_LARGEST])
        return InputGroups(followers)

    def without(self, firsts: set[int]) -> InputGroups:
        """These groups without some."""
        return InputGroups({key: group for key, group in self.followers.items() if key not in firsts})


def others_for(x: torch.Tensor, layer: RLoraLinear, groups: InputGroups) -> list[tuple[RLoraLinear, OtherLayer]]:
    """The layers that get the input `x` of a layer after it and can be computed with it."""
    members = groups.followers.get(id(layer))
    if members is None or members[0]() is not layer:  # a copy of it has another id, or the id of a deleted one
        return []
    adapter = layer.adapters_in_use()[0]
    others = []
    for reference in members[1:]:
        follower = reference()
        active = [] if follower is None else follower.adapters_in_use()
        if follower is None or len(active) != 1 or is_hooked(follower) or not _fit(adapter, active[0]):
            continue
        product = frozen_product(follower.base_layer, x)
        if product is not None and product.weight.shape[1] == x.shape[-1]:
            others.append((follower, OtherLayer(active[0], *product)))
    return others


def _fit(first: MultiHeadAdapter, other: MultiHeadAdapter) -> bool:
    """Whether two adapters can be computed by one function."""
    return (
        other.routing is first.routing
        and other.training == first.training
        and other.joins
        and other.scaling == first.scaling
        and other.dropout == first.dropout
        and other.dropout_position == first.dropout_position
        and _layout_of(other) == _layout_of(first)
        and not is_hooked(other)
        and (other.prefetched is not None or is_whole(other))
    )


def _layout_of(adapter: MultiHeadAdapter) -> Layout:
    ahead = adapter.prefetched
    return adapter.delta_spec().layout if ahead is None or adapter.top_k != ahead.layout.top_k else ahead.layout


def hand_out(
    x: torch.Tensor, outputs: Sequence[torch.Tensor], others: Sequence[tuple[RLoraLinear, OtherLayer]]
) -> None:
    """Leave the outputs of further layers with them until they are called."""
    given = _Input.of(x)
    for output, (follower, other) in zip(outputs, others, strict=True):
        adapter = other.adapter
        product = FrozenProduct(other.weight, other.bias)
        tensors = tuple(adapter._parameters.values())
        ready = ReadyOutput(output, given, adapter, adapter.scaling, product, tensors)
        # `nn.Module.__setattr__` is slow.
        follower.__dict__["ready"] = ready


class SharedInputs:
    """The groups of a model, which follow its layers and what is observed of them."""

    def __init__(self) -> None:
        self._adapters: list[MultiHeadAdapter] = []
        self.groups = InputGroups()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles observe their own layers."""
        return {"_adapters": [], "groups": InputGroups()}

    def for_pass(self, adapters: Sequence[MultiHeadAdapter]) -> InputGroups:
        """The groups of a forward pass with these adapters."""
        if len(adapters) != len(self._adapters) or not all(map(is_, adapters, self._adapters)):
            self._adapters, self.groups = list(adapters), InputGroups()
        return self.groups

    def finish_pass(self, groups: InputGroups, failed: bool = False) -> None:
        """Learn from a forward pass: groups that were observed, or that did not hold. One that failed says neither."""
        if failed:
            for members in groups.followers.values():
                _left_over(members)
            return
        if groups.observes:
            learned = groups.learned()
        else:
            unused = {first for first, members in groups.followers.items() if _left_over(members)}
            learned = groups.without(unused) if unused else groups
        if groups is self.groups:
            self.groups = learned


def _left_over(members: Sequence[weakref.ref[RLoraLinear]]) -> bool:
    """Drop outputs that no layer has asked for; returns whether there were any."""
    found = False
    for reference in members[1:]:
        follower = reference()
        if follower is not None and follower.__dict__.pop("ready", None) is not None:
            found = True
    return found
