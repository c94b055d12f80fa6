"""Running one adapter of a model, and giving all tokens the same weights of its heads; and leaving no trace of it."""

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


# Weights as given by a user are rounded, in JSON to six digits.
SUM_TOLERANCE = 1e-3


def core_model(model: nn.Module) -> PreTrainedModel:
    """The model that adapters were put into: the inside of a `PeftModel`, or a transformers model itself."""
    return model.base_model.model if isinstance(model, PeftModel) else model


def adapter_config(model: nn.Module, adapter_name: str | None = None) -> tuple[str, RLoraConfig]:
    """
    The name and configuration of an adapter of a model.

    Args:
        model (`torch.nn.Module`): A `PeftModel`, or a transformers model with an adapter loaded.
        adapter_name (`str`, *optional*): Its name; without it the model must have one R-LoRA adapter, or one that is
            active.

    Raises:
        ValueError: If there is no such adapter, or it is of another method, or the name is needed.
    """
    configs = dict(getattr(model, "peft_config", None) or {})
    own = {name: config for name, config in configs.items() if isinstance(config, RLoraConfig)}
    listed = ", ".join(map(repr, sorted(own))) or "none"
    if adapter_name is None:
        active = [name for name in _active_names(model) if name in own]
        chosen = list(own) if len(own) == 1 else active
        if len(chosen) != 1:
            raise ValueError(
                f"The model has these R-LoRA adapters: {listed}; which one is meant is not known. Set `adapter_name`."
            )
        return chosen[0], own[chosen[0]]
    if adapter_name not in own:
        what = f"is of another method ({configs[adapter_name].peft_type})" if adapter_name in configs else "is unknown"
        raise ValueError(
            f"Adapter {adapter_name!r} {what}; R-LoRA adapters of the model: {listed}. Name one of these."
        )
    return adapter_name, own[adapter_name]


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
    Run one adapter and no other, in eval mode; afterwards all is as before.

    PEFT's `set_adapter` would also change which parameters train.

    Raises:
        ValueError: If adapters are merged.
    """
    switches = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    merged = sorted({name for switch in switches for name in switch.merged_adapters})
    if merged:
        raise ValueError(
            f"Adapters are merged into the base ({', '.join(merged)}), which is another model then. Call "
            "`unmerge_adapter()` first."
        )
    # Some of PEFT's classes keep these on the class until they are set.
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


@contextmanager
def kept_quantized(model: nn.Module) -> Generator[None, None, None]:
    """
    Put 4-bit weights back as they are now, in the end.

    On some CPUs bitsandbytes (0.50) reorders them for inference, and back when anything reads the state dict, as PEFT
    does; what comes back is rounded, and without double quantization wrong (see `undo_cpu_order`).
    """
    kept = []
    for module in model.modules():
        weight = getattr(module, "weight", None) if "weight" in module._parameters else None
        state = getattr(weight, "quant_state", None)
        if weight is not None and state is not None:
            kept.append((module, weight, weight.data, state, dict(vars(state)), getattr(module, "quant_state", None)))
    try:
        yield
    finally:
        for module, weight, data, state, values, own_state in kept:
            weight.data, weight.quant_state = data, state
            vars(state).clear()
            vars(state).update(values)
            if "quant_state" in vars(module):
                vars(module)["quant_state"] = own_state


def check_weights(weights: torch.Tensor | Sequence[float], num_heads: int, where: str = "") -> torch.Tensor:
    """
    Weights of heads as given by a user: `[N]` in float64, that sum to one.

    Raises:
        ValueError: If they are not N, not finite, negative, or sum to something else.
    """
    tensor = torch.as_tensor(weights).detach().to("cpu", torch.float64)
    total = float(tensor.sum()) if tensor.numel() else math.nan
    good = tensor.shape == (num_heads,) and bool((tensor >= 0).all()) and abs(total - 1.0) <= SUM_TOLERANCE
    if not good:
        raise ValueError(
            f"Weights of the heads{where} must be {num_heads} numbers of at least 0 that sum to 1, got "
            f"{tensor.tolist()!r}. For equal weights give {[round(1 / num_heads, 4)] * num_heads}."
        )
    return tensor / total


@contextmanager
def fixed_head_weights(
    model: nn.Module, adapter_name: str, mixtures: Mapping[str, torch.Tensor | Sequence[float]]
) -> Generator[None, None, None]:
    """
    Give all tokens the same weights of the heads in each layer, whatever the router of the adapter says.

    Args:
        model (`torch.nn.Module`): A model with the adapter.
        adapter_name (`str`): Its name.
        mixtures (`Mapping[str, Sequence[float]]`): The N weights by layer, named as by [`adapted_layers`].

    Raises:
        ValueError: If layers are missing or unknown, or weights are none.
    """
    layers = adapted_layers(model, adapter_name)
    if set(layers) != set(mixtures):
        differing = sorted(set(layers) ^ set(mixtures))
        raise ValueError(
            f"Weights are needed for each layer of adapter {adapter_name!r} and for no other; these differ: "
            f"{', '.join(differing[:3])}{' ...' if len(differing) > 3 else ''}. Measure them on this model."
        )
    checked = {
        name: check_weights(mixtures[name], layer.num_heads[adapter_name], f" of {name}")
        for name, layer in layers.items()
    }
    adapters = {name: adapter_of(layer, adapter_name) for name, layer in layers.items()}
    before = {name: adapter.fixed_logits for name, adapter in adapters.items()}
    try:
        for name, adapter in adapters.items():
            adapter.fix_mixture(checked[name])
        yield
    finally:
        for name, adapter in adapters.items():
            adapter.fixed_logits = before[name]
