"""Checks the tensors of an adapter before they are loaded into a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..reading import first_few
from .comparison import compare_tensors
from .layer import RLoraLayer


# Prefix that PEFT gives to the names in a file, and that names in a plain transformers model lack.
_PREFIX = "base_model.model."


def check_adapter_tensors(model: nn.Module, adapter_name: str, state_dict: Mapping[str, torch.Tensor]) -> None:
    """
    Check the tensors of an adapter against the model that they are about to be loaded into.

    Args:
        model (`torch.nn.Module`): A model that has the adapter already, with initial values.
        adapter_name (`str`): The adapter's name.
        state_dict (`Mapping[str, torch.Tensor]`): The tensors, by their names in the model.

    Raises:
        ValueError: If tensors are missing or unknown, have other shapes, or hold values that are not finite.
    """
    adapters: dict[str, Any] = {
        f"{layer_name}.rlora_adapters.{adapter_name}": layer.rlora_adapters[adapter_name]
        for layer_name, layer in model.named_modules()
        if isinstance(layer, RLoraLayer) and adapter_name in layer.rlora_adapters
    }
    expected = {
        f"{prefix}.{name}": shape for prefix, adapter in adapters.items() for name, shape in adapter.shapes.items()
    }
    tensors = {
        name if name in expected else name.removeprefix(_PREFIX): tensor
        for name, tensor in state_dict.items()
        if ".rlora_adapters." in name
    }
    missing, unknown, misshapen = compare_tensors(expected, {name: tensor.shape for name, tensor in tensors.items()})

    if missing or unknown:
        parts = [f"lacks {first_few(missing)}"] if missing else []
        parts += [f"has {first_few(unknown)}, which the model has no place for"] if unknown else []
        raise ValueError(
            f"Adapter {adapter_name!r} does not fit the model: its file {' and '.join(parts)}. The file is "
            "incomplete, or its adapter_config.json belongs to another adapter. Save or download both again."
        )
    for name, (needed, found) in misshapen.items():
        raise ValueError(
            f"Adapter {adapter_name!r} belongs to another base model or configuration: {name} is {list(found)} in the "
            f"file, the model needs {list(needed)}. Load it on the model named in its adapter_config.json "
            "(`base_model_name_or_path`)."
        )

    broken = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise ValueError(
            f"Adapter {adapter_name!r} holds NaN or infinity in {first_few(broken)}. The file is damaged or training "
            "diverged; use an earlier checkpoint."
        )
