"""Finds an adapter and its layers in a model; context managers run it alone or with fixed head weights."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from .adapter import MultiHeadAdapter
from .config import RLoraConfig
from .layer import RLoraLayer


# Users round head weights; JSON keeps six digits.
SUM_TOLERANCE = 1e-3


def core_model(model: nn.Module) -> PreTrainedModel:
    """The model without its `PeftModel`, if it has one."""
    return model.base_model.model if isinstance(model, PeftModel) else model


def adapter_config(model: nn.Module, adapter_name: str | None = None) -> tuple[str, RLoraConfig]:
    """
    The name and configuration of an adapter of a model.

    Args:
        model (`torch.nn.Module`): A `PeftModel`, or a transformers model with an adapter loaded.
        adapter_name (`str`, *optional*): Its name; needed if the model has several R-LoRA adapters and not exactly one
            of them is active.

    Raises:
        ValueError: If there is no such adapter, it belongs to another method, or the name is needed.
    """
    all_configs = dict(getattr(model, "peft_config", None) or {})
    configs = {name: config for name, config in all_configs.items() if isinstance(config, RLoraConfig)}
    names = ", ".join(map(repr, sorted(configs))) or "none"

    if adapter_name is None:
        candidates = list(configs) if len(configs) == 1 else [n for n in _active_names(model) if n in configs]
        if len(candidates) != 1:
            raise ValueError(f"The model has several R-LoRA adapters: {names}. Set `adapter_name` to one of them.")
        return candidates[0], configs[candidates[0]]

    if adapter_name not in configs:
        other = all_configs.get(adapter_name)
        reason = "is unknown" if other is None else f"belongs to another method ({other.peft_type})"
        raise ValueError(
            f"Adapter {adapter_name!r} {reason}; R-LoRA adapters of the model: {names}. Name one of these."
        )
    return adapter_name, configs[adapter_name]


def _active_names(model: nn.Module) -> list[str]:
    for module in model.modules():
        if isinstance(module, RLoraLayer):
            return list(module.active_adapters)
    return []


def adapted_layers(model: nn.Module, adapter_name: str) -> dict[str, RLoraLayer]:
    """The layers with an adapter, by their names in the base model, e.g. "model.layers.0.mlp.gate_proj"."""
    return {
        name: layer
        for name, layer in core_model(model).named_modules()
        if isinstance(layer, RLoraLayer) and adapter_name in layer.rlora_adapters
    }


def adapter_of(layer: RLoraLayer, adapter_name: str) -> MultiHeadAdapter:
    """An adapter of a layer."""
    adapter = layer.rlora_adapters[adapter_name]
    assert isinstance(adapter, MultiHeadAdapter)
    return adapter


@contextmanager
def only_adapter(model: nn.Module, adapter_name: str) -> Generator[None, None, None]:
    """
    Run one adapter alone, in eval mode, for the duration of a `with` block.

    PEFT's `set_adapter` would also change which parameters require gradients.

    Raises:
        ValueError: If adapters are merged.
    """
    switches = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    merged = sorted({name for switch in switches for name in switch.merged_adapters})
    if merged:
        raise ValueError(
            f"Adapters are merged into the base ({', '.join(merged)}), so the base is a different model. Call "
            "`unmerge_adapter()` first."
        )

    # Some of PEFT's classes define these on the class, so an instance may lack them.
    names = ("_active_adapter", "_disable_adapters")
    before = [{name: vars(switch)[name] for name in names if name in vars(switch)} for switch in switches]
    training = [(module, module.training) for module in model.modules()]

    try:
        for switch in switches:
            switch._active_adapter = [adapter_name]
            switch._disable_adapters = adapter_name not in switch._get_available_adapters()
        model.eval()
        yield
    finally:
        for switch, values in zip(switches, before, strict=True):
            for name in names:
                vars(switch).pop(name, None)
            vars(switch).update(values)
        for module, mode in training:
            module.training = mode


def check_weights(
    weights: torch.Tensor | Sequence[float], num_heads: int, where: str = "", num_experts: int = 0
) -> torch.Tensor:
    """
    Check head weights that a user passes.

    Args:
        weights (`torch.Tensor` or `Sequence[float]`): The weights, which may be rounded; a tensor `[E, N]` has those
            of each expert.
        num_heads (`int`): Their number, N.
        where (`str`, *optional*): What they belong to, for the message.
        num_experts (`int`, *optional*, defaults to `0`): Number of experts, E; 0 for a linear layer.

    Returns:
        `torch.Tensor` of shape `[N]` or `[E, N]`: In float64, on the CPU, with a sum of one.

    Raises:
        ValueError: If there are not N of them, or they are not finite, negative, or sum to something else.
    """
    tensor = torch.as_tensor(weights).detach().to("cpu", torch.float64)
    if num_experts and tensor.shape == (num_experts, num_heads):
        return torch.stack([check_weights(row, num_heads, where) for row in tensor])
    total = float(tensor.sum()) if tensor.numel() else math.nan
    valid = tensor.shape == (num_heads,) and bool((tensor >= 0).all()) and abs(total - 1.0) <= SUM_TOLERANCE
    if not valid:
        raise ValueError(
            f"Head weights{where} must be {num_heads} numbers of at least 0 that sum to 1, got "
            f"{tensor.tolist()!r}. For equal weights pass {[round(1 / num_heads, 4)] * num_heads}."
        )
    return tensor / total


@contextmanager
def fixed_head_weights(
    model: nn.Module, adapter_name: str, head_weights: Mapping[str, torch.Tensor | Sequence[float]]
) -> Generator[None, None, None]:
    """
    Replace the routers of an adapter by constant head weights for the duration of a `with` block.

    Args:
        model (`torch.nn.Module`): A model with the adapter.
        adapter_name (`str`): Its name.
        head_weights (`Mapping[str, Sequence[float]]`): The N weights of each layer, named as by [`adapted_layers`].

    Raises:
        ValueError: If layers are missing or unknown, or weights are invalid.
    """
    layers = adapted_layers(model, adapter_name)
    if set(layers) != set(head_weights):
        differing = sorted(set(layers) ^ set(head_weights))
        raise ValueError(
            f"Head weights must name each layer of adapter {adapter_name!r} and no other; these differ: "
            f"{', '.join(differing[:3])}{' ...' if len(differing) > 3 else ''}. Measure them on this model."
        )
    checked = {
        name: check_weights(head_weights[name], layer.num_heads[adapter_name], f" of {name}", layer.num_experts)
        for name, layer in layers.items()
    }
    adapters = {name: adapter_of(layer, adapter_name) for name, layer in layers.items()}
    before = {name: adapter.fixed_logits for name, adapter in adapters.items()}
    try:
        for name, adapter in adapters.items():
            adapter.fix_head_weights(checked[name])
        yield
    finally:
        for name, adapter in adapters.items():
            adapter.fixed_logits = before[name]
