"""Base weights that accelerate offloads: the device that their layers compute on, and unsupported uses."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import chain

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import infer_device
from torch import nn
from transformers import PreTrainedModel

from ..reading import first_few
from .config import RLoraConfig


def offload_hook(module: nn.Module) -> AlignDevicesHook | None:
    """The hook with which accelerate loads the weights of a module for a forward pass, if it offloads them."""
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return next((hook for hook in hooks if isinstance(hook, AlignDevicesHook) and hook.offload), None)


def compute_device(layer: nn.Module) -> torch.device | None:
    """
    The device that a layer computes on; `None` if it has no tensors.

    PEFT looks at `weight`, which layers of HQQ and AQLM lack, and which is elsewhere if accelerate offloads it.
    """
    hook = offload_hook(layer)
    if hook is not None and hook.execution_device is not None:
        return torch.device(hook.execution_device)
    tensor = next(chain(layer.parameters(), layer.buffers()), getattr(layer, "W_q", None))
    return None if tensor is None else tensor.device


def refuse_offloaded(config: RLoraConfig, model: nn.Module, in_peft_model: bool = True) -> None:
    """
    Refuse to train or load offloaded weights of the base.

    In a forward pass accelerate gives such a module a copy of its weights, and drops it afterwards with its gradient.
    Adapters stay on the device that computes, and a `PeftModel` trains and loads them as on any base.

    Args:
        config ([`RLoraConfig`]): The configuration.
        model (`torch.nn.Module`): The base.
        in_peft_model (`bool`, *optional*, defaults to `True`): The adapter is part of a `PeftModel`, which loads it.

    Raises:
        ValueError: If the configuration trains an offloaded module, PEFT could not dispatch the base again, or
            transformers would load the adapter, which looks at where the weights of the base are.
    """
    if config.loaded and not in_peft_model:
        _refuse_loading_by_transformers(config, model)

    # Weights of the base that the configuration trains.
    offloaded = {name: module for name, module in model.named_modules() if offload_hook(module) is not None}
    for field, names in _trained_parts(config, model, offloaded):
        if names:
            raise ValueError(
                f"`{field}={getattr(config, field)!r}` trains weights of {first_few(names)}, which accelerate "
                "offloads: they would neither be trained nor loaded. Keep these modules on the device that computes "
                "(in `device_map`), or train the adapter alone."
            )

    # `PeftModel.from_pretrained` removes the hooks and dispatches the base again, for which it needs a GPU (peft#1431
    # is about disk offloading there, open as of 0.21.2).
    on_disk = "disk" in (getattr(model, "hf_device_map", None) or {}).values() and not offloaded
    on_disk = on_disk and any(parameter.device.type == "meta" for parameter in model.parameters())
    if config.loaded and on_disk and infer_device() == "cpu":
        raise ValueError(
            'The base has layers on "disk" in its `device_map`, and PEFT dispatches it again when it loads an '
            "adapter, which it can't without a GPU. Load the base without `device_map` and offload it with "
            "`accelerate.disk_offload(base, folder, execution_device=torch.device('cpu'))` first."
        )


def _trained_parts(
    config: RLoraConfig, model: nn.Module, offloaded: dict[str, nn.Module]
) -> Iterator[tuple[str, set[str]]]:
    """The fields that train weights of the base, each with the offloaded modules that it trains."""
    if not offloaded:
        return
    yield "modules_to_save", _below(config.modules_to_save or (), model) & set(offloaded)

    tokens = config.trainable_token_indices
    if isinstance(tokens, dict):
        yield "trainable_token_indices", _below(tokens, model) & set(offloaded)
    elif tokens:
        embedding = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
        yield "trainable_token_indices", {name for name, module in offloaded.items() if module is embedding}

    if config.bias != "none":
        biased = {name for name, module in offloaded.items() if getattr(module, "bias", None) is not None}
        every = config.bias == "all"
        yield "bias", {name for name in biased if every or check_target_module_exists(config, name)}


def _refuse_loading_by_transformers(config: RLoraConfig, model: nn.Module) -> None:
    """
    `load_adapter` of transformers (5.23) puts the tensors of an adapter where `device_map` puts the layer. On disk
    they are dropped, and the adapter keeps its initial values (no upstream issue as of 5.23).
    """
    offloaded = {
        name
        for name, module in model.named_modules()
        if check_target_module_exists(config, name)
        and (offload_hook(module) is not None or any(weight.is_meta for weight in module.parameters()))
    }
    if offloaded:
        raise ValueError(
            f"transformers (`load_adapter`, or `from_pretrained` with the name of an adapter) can't load an R-LoRA "
            f"adapter onto layers that accelerate offloads, here {first_few(offloaded)}: the adapter would keep "
            "random values. Load the base alone, offload it with `accelerate.cpu_offload` or "
            "`accelerate.disk_offload`, and load the adapter with `peft.PeftModel.from_pretrained(base, adapter)`."
        )


def _below(suffixes: Collection[str], model: nn.Module) -> set[str]:
    """Names of the modules that end in one of the suffixes, as PEFT matches them, and of all modules inside these."""
    names = [name for name, _ in model.named_modules()]
    matches = [name for name in names if any(name.endswith(suffix) for suffix in suffixes)]
    return {name for name in names if any(f"{name}.".startswith(f"{match}.") for match in matches)}
