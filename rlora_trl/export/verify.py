"""Checks the written tensors of an export against what the adapter computes, layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch

from ..kernels.grouped import RowGroups
from ..reading import first_few
from ..tuner import MultiHeadAdapter
from ..tuner.expert_products import ExpertRows
from ..tuner.experts import ExpertsAdapter, RLoraExpertWeight
from ..tuner.layer import RLoraLayer
from ..tuner.selection import adapter_of
from .experts import unpack
from .lora import tensor_names


_ROWS = 4


@torch.no_grad()
def check_deltas(
    tensors: Mapping[str, torch.Tensor],
    layers: Mapping[str, RLoraLayer],
    adapter_name: str,
    head_weights: Mapping[str, torch.Tensor],
) -> None:
    """
    Check that the LoRA tensors of an export compute what the adapter computes under the same head weights.

    Args:
        tensors (`Mapping[str, torch.Tensor]`): The written tensors, with scaling 1.
        layers (`Mapping[str, RLoraLayer]`): The adapted layers by name.
        adapter_name (`str`): The adapter.
        head_weights (`Mapping[str, torch.Tensor]`): Head weights `[N]` by layer.

    Raises:
        ValueError: If a layer is missing, or its delta on random inputs differs by more than rounding explains.
    """
    names = tensor_names(layers)
    expected_names = {part for parts in names.values() for part in parts}
    written_names = {name for name in tensors if ".lora_" in name}
    if written_names != expected_names:
        raise ValueError(
            "The export differs from the adapter: missing or unexpected tensors are "
            f"{first_few(sorted(written_names ^ expected_names))}. Nothing was written; please report it."
        )

    for name, layer in layers.items():
        adapter = _wide_copy(adapter_of(layer, adapter_name), head_weights[name])
        inputs = _random_inputs(layer.in_features)  # [T, d_in]
        reference = _delta(adapter, inputs)  # [T, d_out], or [E, T, d_out]
        if not bool(reference.isfinite().all()):
            raise ValueError(
                f"The adapter itself gives values that are not finite in {name}. Load a checkpoint whose parameters "
                "are finite. Nothing was written."
            )

        down, up = (tensors[part].cpu().double() for part in names[name])  # [k, d_in], [d_out, k]
        if isinstance(layer, RLoraExpertWeight):
            down, up = unpack(down, up, layer)  # [E, k, d_in], [E, d_out, k]
        difference = (inputs @ down.mT @ up.mT - reference).abs()

        # Each of both factors was rounded to float32 once.
        terms = inputs.abs() @ down.abs().mT @ up.abs().mT
        bound = 2 * torch.finfo(torch.float32).eps * terms + _reference_rounding(adapter, inputs)
        if not bool((difference <= bound).all()):
            worst = torch.where(difference <= bound, 0.0, difference - bound).argmax()
            raise ValueError(
                f"The export differs from the adapter: in {name} its delta is off by "
                f"{difference.flatten()[worst]:.2g}, where rounding explains {bound.flatten()[worst]:.2g}. Nothing "
                "was written; please report it."
            )


def _delta(adapter: MultiHeadAdapter, inputs: torch.Tensor) -> torch.Tensor:
    """The delta of inputs, `[T, d_out]`; of experts that of each, `[E, T, d_out]`."""
    if not isinstance(adapter, ExpertsAdapter):
        return adapter(inputs)
    ready = adapter()
    groups = [RowGroups(expert=expert) for expert in range(adapter.num_experts)]
    return torch.stack([adapter.delta(ready, inputs, ExpertRows(group, None, len(inputs))) for group in groups])


def _random_inputs(in_features: int) -> torch.Tensor:
    """Inputs `[4, d_in]`, the same for all layers of one width."""
    generator = torch.Generator().manual_seed(in_features)
    return torch.randn(_ROWS, in_features, generator=generator, dtype=torch.float64)


def _wide_copy(adapter: MultiHeadAdapter, weights: torch.Tensor) -> MultiHeadAdapter:
    """A copy that computes in float64 on the CPU under fixed head weights `[N]`, whatever the adapter's dtype."""
    copied = copy.deepcopy(adapter, {id(adapter.routing): adapter.routing}).to("cpu", torch.float64).eval()
    copied.fix_head_weights(weights)
    return copied


def _reference_rounding(adapter: MultiHeadAdapter, inputs: torch.Tensor) -> torch.Tensor:
    """
    An upper bound `[T, 1]` of the rounding error of a delta in float64, which matters where its terms cancel.

    Head weights sum to 1, and the anchor adds up to three times as much: the absolute terms sum to at most
    4 s r |x| max|A| max|B|.
    """
    largest_a, largest_b = (
        max(float(tensor.abs().max()) for tensor in pair if tensor is not None)
        for pair in ((adapter.A, adapter.A0), (adapter.B, adapter.B0))
    )
    terms = 4 * adapter.scaling * adapter.r * largest_a * largest_b * inputs.abs().sum(1, keepdim=True)  # [T, 1]
    # One rounding for each term of each sum.
    return (adapter.in_features + adapter.r + adapter.num_heads) * torch.finfo(torch.float64).eps * terms
