"""Adapted layers that get the same input, or one alone, computed with their deltas by one function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from ..kernels import LayerProbe
from ..kernels.fused import below_each_other
from ..kernels.joint import JointGroup, Outputs, joint_outputs
from ..kernels.joint_space import CallSettings
from . import base_product
from .adapter import MultiHeadAdapter
from .base_product import QuantizedWeight, frozen_product, is_hooked, product_dtype
from .batch import BatchContext
from .prefetch import is_whole
from .task_tables import derivatives_of


class AdaptedLayer(Protocol):
    """What groups need of [`RLoraLinear`], which imports this module."""

    base_layer: nn.Module
    joined: JoinedLayers | None
    ready: ReadyOutput | None

    def adapters_in_use(self) -> list[MultiHeadAdapter]:
        """The adapters that a forward pass runs."""
        ...


class _Member(NamedTuple):
    """A layer of a group, and what it was when the group was made."""

    layer: AdaptedLayer
    adapter: MultiHeadAdapter
    tensors: tuple[torch.Tensor | None, ...]
    parameter: torch.Tensor
    weight: torch.Tensor | QuantizedWeight
    bias: torch.Tensor | None
    memory: tuple[Any, ...]

    def is_unchanged(self, settings: tuple[Any, ...]) -> bool:
        """
        Whether the layer, if it runs this adapter, still computes the same function but for the values of its tensors.

        Args:
            settings (`tuple`): [`_settings_of`] the adapters of the group.
        """
        layer, adapter, (A, B, router, anchor_A, anchor_B), parameter, _, bias, memory = self
        of_adapter, base = adapter._parameters, layer.base_layer
        of_base = base._parameters
        return (
            of_adapter.get("A") is A
            and of_adapter.get("B") is B
            and of_adapter.get("router") is router
            and of_adapter.get("A0") is anchor_A
            and of_adapter.get("B0") is anchor_B
            and of_base.get("weight") is parameter
            and of_base.get("bias") is bias
            and _memory_of(parameter, bias) == memory
            and not is_hooked(base)
            and not is_hooked(adapter)
            and settings == _settings_of(adapter)
        )


def _memory_of(weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[Any, ...]:
    """Where frozen parameters are; `.data` replaces it without another sign, as DeepSpeed and `to` do."""
    if bias is None:
        return weight.data_ptr(), weight.dtype, weight.requires_grad
    return weight.data_ptr(), weight.dtype, weight.requires_grad, bias.data_ptr(), bias.dtype, bias.requires_grad


def _settings_of(adapter: MultiHeadAdapter) -> tuple[Any, ...]:
    """What the adapters of a group have in common, besides the sizes that never change."""
    return (
        *(adapter.training, adapter.scaling, adapter.dropout, adapter.dropout_position, adapter.top_k),
        *(adapter.fixed_logits is None, adapter.routing_row is None),
    )


class _Ahead(NamedTuple):
    """
    Weights that were concatenated for one forward pass; one object, as other threads may drop it at any time.

    Args:
        downs (`torch.Tensor`), ups (`Sequence[torch.Tensor]`): As `JointGroup.concat` gives them.
        versions (`list[int]`): The versions of their sources at that time.
    """

    downs: torch.Tensor | None
    ups: Sequence[torch.Tensor]
    versions: list[int]


_NOTHING_AHEAD = _Ahead(None, (), [])


class JoinedLayers:
    """
    Layers that get the same input, computed with their deltas by one function.

    Args:
        members (`Sequence[_Member]`): The layers.
        groups (`InputGroups`, *optional*): What they were grouped by; it is compared by identity.
        dtype (`torch.dtype`): Of the products.
    """

    def __init__(self, members: Sequence[_Member], groups: Any, dtype: torch.dtype) -> None:
        first = members[0].adapter
        self.members, self.groups, self.dtype = members, groups, dtype
        self.layer, self.device, self.settings = members[0].layer, members[0].weight.device, _settings_of(first)
        self.adapters = [member.adapter for member in members]
        self.device_type = self.device.type
        self.routing, self.scaling = first.routing, first.scaling
        self.dropout = first.dropout if first.training else 0.0
        tensors = [adapter.kernel_tensors() for adapter in self.adapters]
        weights, biases = [member.weight for member in members], [member.bias for member in members]
        routers: Any = [adapter.router for adapter in self.adapters] if first.router_kind == "task" else []
        self.group = JointGroup(tensors, weights, biases, first.layout(), self.scaling, dtype, routers)
        self.all_tensors = [tensor for of_layer in tensors for tensor in of_layer if tensor is not None]

        self.ahead: _Ahead | None = None

    @classmethod
    def of(
        cls, layer: AdaptedLayer, x: torch.Tensor, followers: Sequence[AdaptedLayer], groups: Any
    ) -> JoinedLayers | None:
        """
        The group that a layer begins with an input `x`.

        Args:
            layer ([`AdaptedLayer`]): The layer.
            x (`torch.Tensor` of shape `[..., d_in]`): The input.
            followers (`Sequence[AdaptedLayer]`): Layers that get it too; those that don't fit are left out.
            groups (`InputGroups`, *optional*): What they were grouped by.

        Returns:
            [`JoinedLayers`], or `None` if the base layer must be called.
        """
        first = _member(layer, x)
        if first is None:
            return None
        others = [_member(follower, x) for follower in followers]
        fitting = [member for member in others if member is not None and _fit(first.adapter, member.adapter)]
        return cls([first, *fitting], groups, product_dtype(x))

    def prefetch(self) -> None:
        """Use the weights that were concatenated ahead, if those of all layers were; see [`WeightPrefetch`]."""
        found = [one for adapter in self.adapters if (one := adapter.prefetched) is not None]
        if len(found) < len(self.adapters) or found[0].layers.dtype is not self.dtype:
            return
        if any(one.scaling != self.scaling for one in found):
            return

        downs = below_each_other([(one.layers, one.place) for one in found])
        ups = [one.layers.each_up[one.place] for one in found]
        self.ahead = _Ahead(downs, ups, [version for one in found for version in one.versions if version is not None])

    def release(self) -> None:
        """Drop the weights of a forward pass."""
        self.ahead = None

    def runs_in(self, x: torch.Tensor) -> bool:
        """Whether products of `x` have the dtype and the device of the group here."""
        if x.device != self.device or self.device_type not in base_product.JOINED_DEVICES:
            return False
        return product_dtype(x, self.device_type) is self.dtype

    def holds_for(self, layer: AdaptedLayer, adapter: MultiHeadAdapter, x: torch.Tensor, groups: Any) -> bool:
        """Whether the group computes what a layer with an adapter, and its followers in `groups`, compute for `x`."""
        if (
            self.layer is not layer  # replicas of `DataParallel` share this object
            or self.adapters[0] is not adapter
            or self.groups is not groups
            or not self.runs_in(x)
        ):
            return False
        for member in self.members:
            if not member.is_unchanged(self.settings):
                return False
        ahead = self.ahead
        if ahead is not None and ahead.versions != [tensor._version for tensor in self.all_tensors]:
            ahead = self.ahead = None
        # Weights that are concatenated in the call may have been sharded since.
        return ahead is not None or all(map(is_whole, self.adapters))

    def outputs(self, x: torch.Tensor, batch: BatchContext) -> Outputs:
        """The outputs of all layers."""
        self.routing.note_forward()

        # A dropout mask for each layer, derived from the seed of the batch if it has one.
        seeds: list[int] = []
        if self.dropout > 0.0:
            seeds = [adapter.derive_seed(batch.seed) for adapter in self.adapters]
        probes: list[LayerProbe] = []
        if batch.tally is not None:
            probes = [probe for adapter in self.adapters if (probe := adapter.probe(x)) is not None]
        settings = CallSettings(self.dropout, seeds, token_mask=probes[0].token_mask if probes else None)
        if self.routing.kind == "task":
            self._set_tables(settings, x, batch)

        # Everything has its dtype already, and in a short step autocast adds a third to the host time of each product.
        device_type = self.device_type
        downs, ups, _ = self.ahead or _NOTHING_AHEAD
        if x.dtype is not self.dtype:
            x = x.to(self.dtype)
        if not torch.is_autocast_enabled(device_type):
            return joint_outputs(x, self.group, settings, probes, downs, ups)
        torch.set_autocast_enabled(device_type, False)
        try:
            return joint_outputs(x, self.group, settings, probes, downs, ups)
        finally:
            torch.set_autocast_enabled(device_type, True)

    def _set_tables(self, settings: CallSettings, x: torch.Tensor, batch: BatchContext) -> None:
        """Logits by the tasks of the tokens, in place of a router on the input."""
        routing, task = self.routing, batch.task
        routers = [adapter._parameters["router"] for adapter in self.adapters]
        tables = [
            routing.table_of(adapter.layer_number, router)
            for adapter, router in zip(self.adapters, routers, strict=True)
            if router is not None
        ]
        settings.tables = [table.logits for table in tables]
        settings.of_mean = derivatives_of(tables)
        of_tokens = routing.one_hot_tasks(x.shape[:-1], x.device, self.dtype)
        if of_tokens is not None:
            settings.tasks, settings.one_hot = of_tokens
            return

        if task is None:
            routing.warn_of_mean_weights()
        settings.row = -1 if task is None else task
        settings.tables = [logits[settings.row :][:1].clone() for logits in settings.tables]


def _member(layer: AdaptedLayer, x: torch.Tensor) -> _Member | None:
    """A layer as a member of a group, if it can be one."""
    active = layer.adapters_in_use()
    if len(active) != 1:
        return None
    adapter = active[0]
    product = frozen_product(layer.base_layer, x)
    if product is None or product.weight.shape[1] != x.shape[-1] or not _joins(adapter):
        return None
    adapter.note_dtype(product_dtype(x))
    parameter: Any = layer.base_layer._parameters["weight"]
    memory = _memory_of(parameter, product.bias)
    return _Member(layer, adapter, tuple(adapter._parameters.values()), parameter, *product, memory)


def _joins(adapter: MultiHeadAdapter) -> bool:
    """Whether an adapter is of a kind that groups support, and in memory."""
    return (
        adapter.fixed_logits is None
        and (adapter.dropout == 0.0 or adapter.dropout_position == "head")
        and not is_hooked(adapter)
        and not adapter._buffers  # an anchor in buffers: the base is sharded
        and is_whole(adapter)
    )


def _fit(first: MultiHeadAdapter, other: MultiHeadAdapter) -> bool:
    """Whether two adapters can be computed by one function."""
    return (
        other.routing is first.routing
        and _settings_of(other) == _settings_of(first)
        and other.layout() == first.layout()
    )


class ReadyOutput(NamedTuple):
    """
    The output of a layer that the first layer of its group has computed.

    Args:
        output (`torch.Tensor` of shape `[..., d_out]`): The output.
        x (`torch.Tensor`), version (`int`), region (`Any`): The input, and the state of autograd at that time.
        member (`_Member`): The layer as it was then.
        joined ([`JoinedLayers`]): The group.
    """

    output: torch.Tensor
    x: torch.Tensor
    version: int
    region: Any
    member: _Member
    joined: JoinedLayers
