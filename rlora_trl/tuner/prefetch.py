"""Concatenates the weights of all adapters of a model at once, when a forward pass begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..kernels.fused import DeltaSpec, backend, concat_layers
from ..kernels.rank_space import AdapterTensors
from .adapter import MultiHeadAdapter, PrefetchedWeights


class _Kind(NamedTuple):
    """The common properties of adapters that are concatenated in one launch."""

    spec: DeltaSpec
    dtype: torch.dtype
    tensors: tuple[tuple[torch.Size, torch.dtype, torch.device] | None, ...]


class _Group(NamedTuple):
    """Adapters of one kind, their tensors, and the addresses of these tensors."""

    kind: _Kind
    adapters: list[MultiHeadAdapter]
    tensors: list[AdapterTensors]
    addresses: torch.Tensor | None


class WeightPrefetch:
    """
    Concatenates the weights of many adapters with one launch for each kind, rather than one for each adapter.

    Short steps are limited by the host (docs/performance.md), and this takes a tenth off the host time of a layer. The
    weights are valid for one forward pass, as long as the tensors are the same and unchanged (writes through `.data`
    are not detected). Otherwise an adapter concatenates its own weights: in its first forward pass, which fixes the
    dtype of its products; if they are sharded (FSDP, and DeepSpeed ZeRO-3 unless it has gathered them for the whole
    step); and in recomputations of gradient checkpointing, except under ZeRO-3.
    """

    def __init__(self) -> None:
        self._key: list = []
        self._groups: list[_Group] = []

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out the plan, which belongs to the tensors of one model."""
        return {"_key": [], "_groups": []}

    @torch.no_grad()
    def concat(self, adapters: Sequence[MultiHeadAdapter]) -> None:
        """Set `prefetched` of each adapter that allows it."""
        # A plan depends on where all parameters are, on which are whole, and on how they are concatenated.
        parameters = [parameter for adapter in adapters for parameter in adapter._parameters.values()]
        key: list = [p.data_ptr() if type(p) is nn.Parameter else type(p) for p in parameters]
        key += [(a.product_dtype, a.scaling, a.top_k, a.fixed_logits is None) for a in adapters]
        # DeepSpeed shards all parameters or none, and then anchors are buffers. Memory that was known before may wait
        # for its values.
        for adapter in adapters:
            if adapter._buffers or is_sharded(adapter):
                key += [None if buffer is None else buffer.data_ptr() for buffer in adapter._buffers.values()]
                key += [_is_gathered(parameter) for parameter in adapter._parameters.values()]
        if key != self._key:
            self._key, self._groups = key, _plan(adapters)

        for (spec, dtype, _), members, layers, addresses in self._groups:
            concatenated = concat_layers(layers, addresses, spec, dtype)
            for place, (adapter, tensors) in enumerate(zip(members, layers, strict=True)):
                # `nn.Module.__setattr__` is slow.
                adapter.__dict__["prefetched"] = PrefetchedWeights.of(concatenated, place, spec.scaling, tensors)


def _plan(adapters: Sequence[MultiHeadAdapter]) -> list[_Group]:
    by_kind: dict[_Kind, list[MultiHeadAdapter]] = {}
    for adapter in adapters:
        kind = _kind_of(adapter)
        if kind is not None:
            by_kind.setdefault(kind, []).append(adapter)

    groups = []
    for kind, members in by_kind.items():
        tensors = [adapter.kernel_tensors() for adapter in members]
        addresses = backend(tensors[0][0].device, kind.dtype).addresses_of(tensors)
        groups.append(_Group(kind, members, tensors, addresses))
    return groups


def is_sharded(adapter: MultiHeadAdapter) -> bool:
    """Whether the parameters of an adapter belong to DeepSpeed ZeRO-3."""
    A = adapter._parameters.get("A")
    return A is not None and "ds_id" in vars(A)


def _is_gathered(parameter: torch.Tensor | None) -> bool:
    """Whether DeepSpeed ZeRO-3 has all values of a parameter in memory now."""
    status: Any = getattr(parameter, "ds_status", None)
    return getattr(status, "name", None) == "AVAILABLE"


def is_whole(adapter: MultiHeadAdapter, *, now: bool = False) -> bool:
    """
    Whether the tensors of an adapter are in memory as the kernels read them.

    Args:
        adapter ([`MultiHeadAdapter`]): The adapter.
        now (`bool`, *optional*, defaults to `False`): Accept parameters that DeepSpeed ZeRO-3 has gathered for now.
    """
    for name, shape in adapter.shapes.items():
        # What replaces a parameter (FSDP, parametrizations, `functional_call`) may be another tensor each time.
        parameter = adapter._parameters.get(name)
        tensor = adapter._buffers.get(name) if parameter is None else parameter
        if type(tensor) is not (torch.Tensor if parameter is None else nn.Parameter) or tensor.shape != shape:
            return False
        # Most shards are gathered only when the adapter is called.
        if "ds_id" in vars(tensor) and not (now and _is_gathered(tensor)):
            return False
        if tensor.device.type == "meta" or not tensor.is_contiguous() or tensor.is_inference():
            return False
    return True


def _kind_of(adapter: MultiHeadAdapter) -> _Kind | None:
    """The kind of an adapter; `None` if its tensors are not in memory or the dtype of its products is unknown yet."""
    # The weights are copied when the pass begins: shards may go before it ends.
    if adapter.product_dtype is None or not is_whole(adapter, now=True):
        return None

    sizes = tuple(
        None if tensor is None else (tensor.shape, tensor.dtype, tensor.device) for tensor in adapter.kernel_tensors()
    )
    return _Kind(adapter.delta_spec(), adapter.product_dtype, sizes)
