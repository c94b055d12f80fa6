"""The weights of a model's adapters laid side by side all at once, when a forward pass begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..kernels.fused import DeltaSpec, Packed, backend, pack_layers
from ..kernels.rank_space import AdapterTensors
from .adapter import MultiHeadAdapter


class _Kind(NamedTuple):
    """What adapters that are packed together have in common."""

    spec: DeltaSpec
    dtype: torch.dtype
    tensors: tuple[tuple[torch.Size, torch.dtype, torch.device] | None, ...]


class _Group(NamedTuple):
    spec: DeltaSpec
    dtype: torch.dtype
    members: list[tuple[dict[int, Packed], int]]  # where the weights of each go
    tensors: list[AdapterTensors]
    addresses: torch.Tensor | None


class StepPacking:
    """
    Packs the weights of many adapters with one launch for all that are of one kind, rather than one for each.

    Short steps are bound by the host (docs/performance.md), and this is a tenth of what a layer asks of it. What is
    packed holds for one forward pass, in which no weight changes: there is nothing to go stale. An adapter packs its
    own weights in its first forward pass, which tells the dtype of its products; where they are sharded (DeepSpeed
    ZeRO-3, FSDP); and in the recomputations of gradient checkpointing.
    """

    def __init__(self) -> None:
        self._signs: list = []
        self._groups: list[_Group] = []

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles plan anew: their tensors are elsewhere."""
        return {"_signs": [], "_groups": []}

    def pack(self, adapters: Sequence[MultiHeadAdapter]) -> None:
        """Put weights into `packed` of each adapter's `Routing`, where that can be done ahead."""
        # What a plan depends on: where all parameters are, whole ones and shards, and what is made of them.
        parameters = [parameter for adapter in adapters for parameter in adapter._parameters.values()]
        signs: list = [p.data_ptr() if type(p) is nn.Parameter else type(p) for p in parameters]
        signs += [(adapter.product_dtype, adapter.scaling, adapter.fixed_logits is None) for adapter in adapters]
        if signs != self._signs:
            self._signs, self._groups = signs, _plan(adapters)
        for spec, dtype, members, tensors, addresses in self._groups:
            for (places, number), packed in zip(members, pack_layers(tensors, addresses, spec, dtype), strict=True):
                places[number] = packed


def _plan(adapters: Sequence[MultiHeadAdapter]) -> list[_Group]:
    of_kind: dict[_Kind, list[MultiHeadAdapter]] = {}
    for adapter in adapters:
        kind = _kind_of(adapter)
        if kind is not None:
            of_kind.setdefault(kind, []).append(adapter)
    groups = []
    for kind, alike in of_kind.items():
        tensors = [adapter.packing()[1] for adapter in alike]
        addresses = backend(tensors[0][0].device, kind.dtype).addresses_of(tensors)
        members = [(adapter.routing.packed, adapter.layer_number) for adapter in alike]
        groups.append(_Group(kind.spec, kind.dtype, members, tensors, addresses))
    return groups


def _kind_of(adapter: MultiHeadAdapter) -> _Kind | None:
    """The kind of an adapter; `None` where its tensors are not there, or the dtype of products is not known."""
    spec, tensors = adapter.packing()
    if adapter.product_dtype is None or adapter.A.device.type == "meta":
        return None
    for name, shape in adapter.shapes.items():
        parameter = adapter._parameters.get(name)
        # Shards are made whole only when the adapter itself is called; and what stands in for a parameter (FSDP,
        # parametrizations, `functional_call`) may be another tensor each time.
        if type(parameter) is not nn.Parameter or "ds_id" in vars(parameter) or parameter.shape != shape:
            return None
        if not parameter.is_contiguous():
            return None
    sizes = tuple(None if tensor is None else (tensor.shape, tensor.dtype, tensor.device) for tensor in tensors)
    return _Kind(spec, adapter.product_dtype, sizes)
