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
    dtype of its products; if they are sharded (DeepSpeed ZeRO-3, FSDP); and in recomputations of gradient
    checkpointing.
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


def is_whole(adapter: MultiHeadAdapter) -> bool:
    """Whether the parameters of an adapter are in memory as the kernels read them."""
    for name, shape in adapter.shapes.items():
        parameter = adapter._parameters.get(name)
        # Shards are gathered only when the adapter is called. What replaces a parameter (FSDP, parametrizations,
        # `functional_call`) may be another tensor each time.
        if type(parameter) is not nn.Parameter or "ds_id" in vars(parameter) or parameter.shape != shape:
            return False
        if parameter.device.type == "meta" or not parameter.is_contiguous() or parameter.is_inference():
            return False
    return True


def _kind_of(adapter: MultiHeadAdapter) -> _Kind | None:
    """The kind of an adapter; `None` if its tensors are not in memory or the dtype of its products is unknown yet."""
    if adapter.product_dtype is None or not is_whole(adapter):
        return None

    sizes = tuple(
        None if tensor is None else (tensor.shape, tensor.dtype, tensor.device) for tensor in adapter.kernel_tensors()
    )
    return _Kind(adapter.delta_spec(), adapter.product_dtype, sizes)
