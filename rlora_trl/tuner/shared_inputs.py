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
from typing import Any

import torch

from .adapter import MultiHeadAdapter
from .batch import BatchContext
from .joined import AdaptedLayer, JoinedLayers, ReadyOutput
from .recomputation import in_backward
from .routing import Routing


# Layers of a group at most: q, k and v.
_LARGEST = 3
# Passes to observe if layers are called several times in each.
_PASSES = 3
# Not public (no upstream issue as of torch 2.13); without it, as in torch 2.6, nothing is grouped.
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def _region() -> Any:
    """What tells a checkpointed region from another one: the hooks on tensors that are saved for backward."""
    return _top_hooks(False) if _top_hooks is not None else object()


class InputGroups:
    """
    The groups of one forward pass and its recomputations.

    Args:
        groups (`dict`, *optional*): For the first layer of each group, by its id, weak references to it and the layers
            that get its input after it. Without it the pass is observed.
    """

    def __init__(self, groups: dict[int, tuple[weakref.ref[AdaptedLayer], ...]] | None = None) -> None:
        self.groups = groups or {}
        self.observes = groups is None
        self.missed: set[int] = set()  # groups of which a layer got another input, by their first layers
        self.in_pass = False
        self._passes = 0
        self._last: tuple[torch.Tensor, int, Any] | None = None
        self._found: list[list[weakref.ref[AdaptedLayer]]] = []

    def followers_of(self, layer: AdaptedLayer) -> list[AdaptedLayer]:
        """The layers that get the input of a layer after it."""
        members = self.groups.get(id(layer), ())
        if not members or members[0]() is not layer:  # the id of a deleted one
            return []
        return [follower for reference in members[1:] if (follower := reference()) is not None]

    def observe(self, layer: AdaptedLayer, x: torch.Tensor) -> None:
        """Note that a layer is called in a forward pass."""
        # In a pass without gradients a reentrant checkpoint may run, and nothing tells its region from another's.
        if in_backward() or not self.in_pass or not torch.is_grad_enabled():
            return
        region = _region()
        last, version, region_of_last = self._last or (None, 0, None)
        if last is not x or version != x._version or region != region_of_last:
            self._last = (x, x._version, region)
            self._found.append([])
        self._found[-1].append(weakref.ref(layer))

    def forget(self) -> None:
        """Forget what was observed."""
        self._last, self._found = None, []

    def learned(self) -> InputGroups:
        """The groups of later passes, after a pass was observed; these if it was a pass of many, as in `generate`."""
        self._passes += 1
        calls = Counter(layer for group in self._found for layer in group)
        groups = {}
        for group in self._found:
            # A layer that is called several times in a pass may get other company each time.
            first = group[0]()
            if first is not None and len(group) > 1 and all(calls[layer] == 1 for layer in group):
                groups[id(first)] = tuple(group[:_LARGEST])
        several = any(count > 1 for count in calls.values())
        self.forget()
        if several and self._passes < _PASSES:
            return self
        return InputGroups(groups)

    def holding(self) -> InputGroups:
        """These groups without those that were missed."""
        if not self.missed:
            return self
        return InputGroups({first: group for first, group in self.groups.items() if first not in self.missed})

    def take_back(self) -> None:
        """Drop outputs that no layer has asked for."""
        for first, members in self.groups.items():
            for reference in members[1:]:
                follower = reference()
                if follower is not None and follower.__dict__.pop("ready", None) is not None:
                    self.missed.add(first)


def join(layer: AdaptedLayer, adapter: MultiHeadAdapter, x: torch.Tensor, batch: BatchContext) -> torch.Tensor | None:
    """
    The output of a layer computed together with its delta, and those of the layers that get the same input after it.

    Args:
        layer ([`AdaptedLayer`]): The layer.
        adapter ([`MultiHeadAdapter`]): The one adapter that it runs.
        x (`torch.Tensor` of shape `[..., d_in]`): Its input.
        batch ([`BatchContext`]): The context of the pass, with its groups.

    Returns:
        `torch.Tensor` of shape `[..., d_out]`, or `None` if the base layer must be called.
    """
    groups, region = batch.groups, _region()
    if region is None and in_backward():
        groups = None  # a reentrant checkpoint: layers of other regions may get the same input
    joined = layer.joined
    if joined is None or not joined.holds_for(layer, adapter, x, groups):
        followers = [] if groups is None else groups.followers_of(layer)
        joined = JoinedLayers.of(layer, x, followers, groups)
        if joined is None:
            return None
        # `nn.Module.__setattr__` is slow.
        for member in joined.members:
            member.layer.__dict__.pop("joined", None)
        layer.__dict__["joined"] = joined

    outputs = joined.outputs(x, batch)
    if len(outputs) > 1:
        version = x._version
        for member, output in zip(joined.members[1:], outputs[1:], strict=True):
            member.layer.__dict__["ready"] = ReadyOutput(output, x, version, region, member, joined)
    return outputs[0]


def take_ready(layer: AdaptedLayer, adapter: MultiHeadAdapter, x: torch.Tensor) -> torch.Tensor | None:
    """The output of a layer for `x` that the first layer of its group has computed, if it still holds."""
    ready: ReadyOutput | None = layer.__dict__.pop("ready", None)
    if ready is None:  # taken in another thread
        return None
    output, of_x, version, region, member, joined = ready
    if (
        of_x is x
        and version == x._version
        and region == _region()
        and member.layer is layer
        and member.adapter is adapter
        and joined.runs_in(x)
        and member.is_unchanged(joined.settings)
    ):
        return output
    if joined.groups is not None:
        joined.groups.missed.add(id(joined.layer))
    return None


class SharedInputs:
    """The groups of a model, which follow its layers and what is observed of them."""

    def __init__(self) -> None:
        self._adapters: list[MultiHeadAdapter] = []
        self.groups = InputGroups()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles observe their own layers."""
        return {"_adapters": [], "groups": InputGroups()}

    def begin_pass(self, adapters: Sequence[MultiHeadAdapter], routings: Sequence[Routing]) -> InputGroups:
        """The groups of a forward pass with these adapters, which share these states."""
        if len(adapters) != len(self._adapters) or not all(map(is_, adapters, self._adapters)):
            self._adapters, self.groups = list(adapters), InputGroups()
        for routing in routings:
            if routing.batch.groups is not self.groups:
                routing.update(groups=self.groups)
        self.groups.in_pass = True
        return self.groups

    def finish_pass(self, groups: InputGroups, failed: bool = False) -> None:
        """Learn from a forward pass: groups that were observed, or that did not hold. One that failed says neither."""
        groups.take_back()
        groups.in_pass = False
        if failed:
            groups.missed.clear()
            groups.forget()
        elif groups is self.groups:
            self.groups = groups.learned() if groups.observes else groups.holding()
