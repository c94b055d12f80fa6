"""What is prepared for all layers when a forward pass of training begins, and dropped when it ends."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch

from .adapter import MultiHeadAdapter
from .joined import JoinedLayers
from .layer import RLoraLayer, RLoraLinear
from .prefetch import WeightPrefetch, is_whole
from .recomputation import in_backward
from .routing import Routing
from .shared_inputs import InputGroups, SharedInputs


class ForwardPass:
    """
    Concatenated weights, groups of layers, and tables of task routers, for one forward pass.

    Args:
        layers (`Sequence[RLoraLayer]`): All layers of the model.
        prefetch ([`WeightPrefetch`]), shared_inputs ([`SharedInputs`]): Of the model.
    """

    def __init__(self, layers: Sequence[RLoraLayer], prefetch: WeightPrefetch, shared_inputs: SharedInputs) -> None:
        self.layers, self.prefetch, self.shared_inputs = layers, prefetch, shared_inputs
        self.adapters: list[MultiHeadAdapter] = []
        self.routings: list[Routing] = []
        self.joined: list[JoinedLayers] = []
        self.groups: InputGroups | None = None

    def begin(self) -> None:
        """Prepare everything."""
        self.adapters = [adapter for layer in self.layers for adapter in layer.adapters_in_use()]
        # A recomputation of the whole model has the groups of the pass that it repeats.
        if not in_backward():
            for adapter in self.adapters:
                adapter.__dict__.pop("kept", None)
            self.routings = list({id(adapter.routing): adapter.routing for adapter in self.adapters}.values())
            self.groups = self.shared_inputs.begin_pass(self.adapters, self.routings)
            for routing in self.routings:
                if routing.kind == "task":
                    routing.begin_tables(_task_routers(self.adapters, routing))

        self.prefetch.concat(self.adapters)
        if self.groups is not None:
            candidates = [layer.joined for layer in self.layers if isinstance(layer, RLoraLinear)]
            self.joined = [joined for joined in candidates if joined is not None]
            for joined in self.joined:
                joined.prefetch()

    def finish(self, failed: bool) -> None:
        """
        Drop it.

        Args:
            failed (`bool`): Whether the pass raised, so that it says nothing about groups.
        """
        for joined in self.joined:
            joined.release()
        for adapter in self.adapters:
            adapter.__dict__.pop("prefetched", None)
        for routing in self.routings:
            routing.begin_tables({})
        if self.groups is not None:
            self.shared_inputs.finish_pass(self.groups, failed)


def _task_routers(adapters: Sequence[MultiHeadAdapter], routing: Routing) -> dict[int, torch.Tensor]:
    """The routers of a state that layers share, by number of the layer, where they are in memory."""
    routers: dict[int, torch.Tensor] = {}
    for adapter in adapters:
        router = adapter._parameters.get("router")
        if adapter.routing is routing and not adapter.num_experts and router is not None and is_whole(adapter):
            routers[adapter.layer_number] = router
    return routers


def outside_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """
    A function that `torch.compile` leaves alone.

    Where it can't trace the call of a whole model, it compiles the functions that are called there one by one: also
    those that run between graphs, whose launches CUDA graphs must not record.
    """
    return _disabled(function) if "torch._dynamo" in sys.modules else function


@lru_cache(maxsize=8)
def _disabled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compiler.disable(function)
