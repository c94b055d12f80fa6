"""The weights of a model's adapters laid side by side all at once, when a forward pass begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..kernels.fused import DeltaSpec, backend, concat_layers
from ..kernels.rank_space import AdapterTensors
from .adapter import MultiHeadAdapter, PrefetchedWeights


class _Kind(NamedTuple):
    """What adapters that are packed together have in common."""

    spec: DeltaSpec
    dtype: torch.dtype
    tensors: tuple[tuple[torch.Size, torch.dtype, torch.device] | None, ...]


class _Group(NamedTuple):
    kind: _Kind
    targets: list[tuple[dict[int, PrefetchedWeights], int]]  # where the weights of each go
    tensors: list[AdapterTensors]
    addresses: torch.Tensor | None


class WeightPrefetch:
    """
    Packs the weights of many adapters with one launch for all that are of one kind, rather than one for each.

    Short steps are bound by the host (docs/performance.md), and this is a tenth of what a layer asks of it. What is
    packed is there for one forward pass and used for the very tensors that it was made from, as they were then (but
    for what is written through `.data` in between). Otherwise an adapter packs its own weights: in its first forward
    pass, which tells the dtype of its products; where they are sharded (DeepSpeed ZeRO-3, FSDP); and in the
    recomputations of gradient checkpointing.
    """

    def __init__(self) -> None:
        self._key: list = []
        self._groups: list[_Group] = []

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles take no plan along, which holds for the tensors of one model."""
        return {"_key": [], "_groups": []}

    @torch.no_grad()
    def pack(self, adapters: Sequence[MultiHeadAdapter]) -> None:
        """Put weights into `packed` of each adapter's `Routing`, where that can be done ahead."""
        # What a plan depends on: where all parameters are, whole ones and shards, and what is made of them.
        parameters = [parameter for adapter in adapters for parameter in adapter._parameters.values()]
        key: list = [p.data_ptr() if type(p) is nn.Parameter else type(p) for p in parameters]
        key += [(adapter.product_dtype, adapter.delta_spec()) for adapter in adapters]
        if key != self._key:
            self._key, self._groups = key, _plan(adapters)
        for (spec, dtype, _), targets, layers, addresses in self._groups:
            packed = concat_layers(layers, addresses, spec, dtype)
            for (weights_of, number), tensors, weights in zip(targets, layers, packed, strict=True):
                weights_of[number] = PrefetchedWeights.of(weights, spec, tensors)


def _plan(adapters: Sequence[MultiHeadAdapter]) -> list[_Group]:
    of_kind: dict[_Kind, list[MultiHeadAdapter]] = {}
    for adapter in adapters:
        kind = _kind_of(adapter)
        if kind is not None:
            of_kind.setdefault(kind, []).append(adapter)
    groups = []
    for kind, alike in of_kind.items():
        tensors = [adapter.kernel_tensors() for adapter in alike]
        addresses = backend(tensors[0][0].device, kind.dtype).addresses_of(tensors)
        targets = [(adapter.routing.packed, adapter.layer_number) for adapter in alike]
        groups.append(_Group(kind, targets, tensors, addresses))
    return groups


def _kind_of(adapter: MultiHeadAdapter) -> _Kind | None:
    """The kind of an adapter; `None` where its tensors are not there, or the dtype of products is not known."""
    if adapter.product_dtype is None or adapter.A.device.type == "meta":
        return None
    for name, shape in adapter.shapes.items():
        parameter = adapter._parameters.get(name)
        # Shards are made whole only when the adapter itself is called; and what stands in for a parameter (FSDP,
        # parametrizations, `functional_call`) may be another tensor each time.
        if type(parameter) is not nn.Parameter or "ds_id" in vars(parameter) or parameter.shape != shape:
            return None
        if not parameter.is_contiguous() or parameter.is_inference():
            return None
    sizes = tuple(
        None if tensor is None else (tensor.shape, tensor.dtype, tensor.device) for tensor in adapter.kernel_tensors()
    )
    return _Kind(adapter.delta_spec(), adapter.product_dtype, sizes)
