"""The full model with an adapter merged into its weights, made beside the model and not in it."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from peft.utils import TrainableTokensWrapper, resolve_quantization_backend
from torch import nn
from transformers import PreTrainedModel

from ..analysis.measuring import input_device
from ..tuner import MultiHeadAdapter
from ..tuner.bnb_cpu import kept_quantized, undo_cpu_order
from ..tuner.layer import RLoraLayer
from ..tuner.selection import adapter_of, core_model, fixed_head_weights, only_adapter
from .bare import bare_base
from .lora import lora_factors
from .verify import (
    LOGITS_CEILING,
    NOISE_DRAWS,
    adapter_logits,
    logits_error,
    logits_tolerance,
    prompt_logits,
    rounded_at_random,
    rounding_noise,
    summed_rounding,
    term_factors,
    wide_copy,
    worst,
)


_SIXTEEN_BITS = (torch.bfloat16, torch.float16)
# Columns of a weight that are compared at once, in float64.
_COLUMNS = 256


def write_merged(
    model: nn.Module,
    adapter_name: str,
    layers: Mapping[str, RLoraLayer],
    mixtures: Mapping[str, torch.Tensor],
    folder: Path,
) -> tuple[str, ...]:
    """
    Write the base with an adapter under fixed mixtures in its weights; the base itself is not touched.

    Args:
        model (`torch.nn.Module`), adapter_name (`str`): The model and its adapter.
        layers (`Mapping[str, RLoraLayer]`), mixtures (`Mapping[str, torch.Tensor]`): Its layers, and the weights of
            their heads.
        folder (`Path`): Where to write.

    Returns:
        `tuple[str, ...]`: What was done to the base besides, in words.

    Raises:
        ValueError: If the base is quantized in a way that can't be undone.
    """
    core = core_model(model)
    quantized = bool(getattr(core, "is_quantized", False))
    dtype = merged_dtype(core)
    with kept_quantized(core), torch.no_grad():
        state = _base_state(core, adapter_name, dtype if quantized else None)
        for name, layer in layers.items():
            down, up = lora_factors(adapter_of(layer, adapter_name), mixtures[name])
            delta = (up @ down).float()
            weight = layer.get_base_weight()
            merged = weight.float().cpu() + (delta.T if layer.fan_in_fan_out else delta)
            state[f"{name}.weight"] = merged.to(dtype if quantized else weight.dtype)
    notes = []
    if quantized:
        notes.append(f"The base is quantized. Its weights were dequantized to {dtype} and the adapter added to them.")
    merged_model, untied = _assemble(core, state, dtype)
    if untied:
        notes.append("Input and output embeddings share their weight in the base, and are two in the merged model.")
    merged_model.save_pretrained(str(folder))
    return tuple(notes)


def merged_dtype(core: PreTrainedModel) -> torch.dtype:
    """The dtype of the merged model: the base's, or where that is quantized 16 bits."""
    if not getattr(core, "is_quantized", False):
        return core.dtype
    return core.dtype if core.dtype in _SIXTEEN_BITS else torch.bfloat16


def _base_state(core: PreTrainedModel, adapter_name: str, cast: torch.dtype | None) -> dict[str, torch.Tensor]:
    """State dict of the base with what the adapter trained in full, dequantized and cast if `cast` is given."""
    rows_of_embeddings = {
        f"{name}.weight": module.token_adapter.get_merged_weights([adapter_name]).detach()
        for name, module in core.named_modules()
        if isinstance(module, TrainableTokensWrapper) and adapter_name in module._get_available_adapters()
    }
    with bare_base(core, keep_trained=adapter_name) as base:
        weights = _dequantized(base)
        state = {
            name: tensor
            for name, tensor in base.state_dict().items()
            if not any(name.startswith(f"{layer}.weight") for layer in weights)
        }
    state |= {f"{name}.weight": weight for name, weight in weights.items()}
    state |= rows_of_embeddings
    if cast is None:
        return state
    return {name: tensor.to(cast) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def _dequantized(base: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of the quantized layers by name."""
    weights = {}
    for name, module in base.named_modules():
        backend = resolve_quantization_backend(module, get_apply_tensor_subclass=lambda: None)
        if backend is None:
            continue
        if not backend.supports_merge:
            raise ValueError(
                f"The base is quantized with {backend.backend_name}, whose weights PEFT can't dequantize. Load the "
                "adapter on a base of 16 bits and merge there."
            )
        undo_cpu_order(module)
        weights[name] = backend.get_base_weight(module).detach()
    return weights


def _assemble(
    core: PreTrainedModel, state: dict[str, torch.Tensor], dtype: torch.dtype
) -> tuple[PreTrainedModel, bool]:
    """A model of the class of `core` with these weights, and whether embeddings had to be untied for it."""
    config = copy.deepcopy(core.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    untied = False
    if getattr(config, "tie_word_embeddings", False):
        ends = [state[name] for name in _embedding_names(core) if name in state]
        untied = len(ends) == 2 and not torch.equal(ends[0].cpu(), ends[1].cpu())
        config.tie_word_embeddings = not untied
    with init_empty_weights(include_buffers=False):
        merged = type(core)(config)
    merged.load_state_dict({name: tensor.cpu() for name, tensor in state.items()}, strict=False, assign=True)
    merged.tie_weights()
    missing = [name for name, parameter in merged.named_parameters() if parameter.device.type == "meta"]
    if missing:
        raise ValueError(
            f"The merged model lacks {', '.join(missing[:3])}: {type(core).__name__} names its weights otherwise. "
            "Export a LoRA adapter instead (`merge=False`)."
        )
    if getattr(core, "generation_config", None) is not None:
        merged.generation_config = copy.deepcopy(core.generation_config)
    return merged.eval(), untied


def _embedding_names(core: PreTrainedModel) -> list[str]:
    """Names of the weights of the input and output embeddings."""
    with bare_base(core) as base:
        ends = (base.get_input_embeddings(), base.get_output_embeddings())
        return [f"{name}.weight" for end in ends for name, module in base.named_modules() if module is end]


def check_merged(
    model: nn.Module,
    adapter_name: str,
    layers: Mapping[str, RLoraLayer],
    mixtures: Mapping[str, torch.Tensor],
    folder: Path,
) -> float | None:
    """
    Load a merged model and compare its weights, and its logits, with those of the adapter under the same mixtures.

    Returns:
        `float` or `None`: The error of the logits, see [`logits_error`]; `None` where there are none.

    Raises:
        ValueError: If a weight differs from base plus delta by more than rounding, or logits do; on a quantized base,
            whose activations may be rounded too, by more than `LOGITS_CEILING`.
    """
    core = core_model(model)
    device_map = getattr(core, "hf_device_map", None) or {"": input_device(core)}
    loaded = type(core).from_pretrained(str(folder), dtype="auto", device_map=device_map).eval()
    dtype = merged_dtype(core)
    with only_adapter(model, adapter_name), fixed_head_weights(model, adapter_name, mixtures):
        with kept_quantized(core):
            for name, layer in layers.items():
                adapter = wide_copy(adapter_of(layer, adapter_name), mixtures[name])
                _check_weight(name, layer, adapter, mixtures[name], loaded.get_submodule(name).weight)
        reference = adapter_logits(model, dtype)
        noise = rounding_noise(model, adapter_name, layers, reference, dtype)
    logits = prompt_logits(loaded)
    error = logits_error(logits, reference)
    tolerance = LOGITS_CEILING
    if not getattr(core, "is_quantized", False):
        tolerance = logits_tolerance(dtype, max(noise, _weight_noise(loaded, layers, logits)))
    if not error <= tolerance:
        raise ValueError(
            f"The merged model does not do what the adapter does: logits differ by {error:.2g} of the largest, and at "
            f"most {tolerance:.2g} is accepted in {dtype}. Nothing was written; please report it."
        )
    return error if reference else None


@torch.no_grad()
def _weight_noise(merged: PreTrainedModel, layers: Collection[str], logits: list[torch.Tensor]) -> float:
    """
    What one more rounding of the merged weights, which it leaves changed, makes of a model's logits: the largest of
    `NOISE_DRAWS` changes. Each starts from the one before, as a copy of the weights may be as large as the model.
    """
    changes = []
    for draw in range(NOISE_DRAWS):
        for index, name in enumerate(layers):
            weight = merged.get_submodule(name).weight
            weight.copy_(rounded_at_random(weight, torch.finfo(weight.dtype).eps, draw * len(layers) + index))
        before, logits = logits, prompt_logits(merged)
        changes.append(logits_error(logits, before))
    return max(changes)


@torch.no_grad()
def _check_weight(
    name: str, layer: RLoraLayer, adapter: MultiHeadAdapter, weights: torch.Tensor, merged: torch.Tensor
) -> None:
    """
    Compare with the base weight plus what the adapter itself makes of the unit vectors.

    Args:
        name (`str`), layer (`RLoraLayer`): The layer.
        adapter ([`MultiHeadAdapter`]): Its adapter, a [`wide_copy`] under `weights` `[N]`.
        merged (`torch.Tensor`): The weight as it was written and loaded again.
    """
    device, wide = adapter.A.device, adapter.A.dtype
    base = layer.get_base_weight()
    if layer.fan_in_fan_out:
        base, merged = base.T, merged.T
    down, up = term_factors(adapter, weights)
    summed, stored, single = summed_rounding(adapter), torch.finfo(merged.dtype), torch.finfo(torch.float32)
    for start in range(0, layer.in_features, _COLUMNS):
        stop = min(start + _COLUMNS, layer.in_features)
        units = torch.zeros(stop - start, layer.in_features, dtype=wide, device=device)
        units[torch.arange(stop - start), torch.arange(start, stop)] = 1.0
        delta = adapter(units).T
        expected = base[:, start:stop].to(device, wide) + delta
        difference = (merged[:, start:stop].to(device, wide) - expected).abs()
        # The delta is rounded to float32, added in float32, and the sum rounded to the dtype of the weight, where the
        # smallest numbers have a rounding of their own.
        bound = (stored.eps + single.eps) * expected.abs() + single.eps * delta.abs() + stored.tiny * stored.eps
        bound += summed * (up @ down[:, start:stop])
        if not bool((difference <= bound).all()):
            raise ValueError(
                f"The merged weight of {name} is not the base's plus the adapter's delta: it "
                f"{worst(difference, bound)}. Nothing was written; please report it."
            )
