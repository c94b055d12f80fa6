"""Writes a multi-head adapter under fixed head weights as the two matrices of a LoRA adapter, exactly.

With fixed head weights w, scaling s, Bw = sum_i w_i B_i and the anchor A0, B0, the delta of a layer is

    s (Bw A - B0 A0)  =  s (Bw (A - A0) + (Bw - B0) A0)

The second form is exported: A' = [A - A0; A0], B' = s [Bw, Bw - B0], of rank 2r. Engines round A' and B' to 16 bits.
In the first form, A' = [A; A0], they would round large terms that cancel; in the second, what training changed.
Without an anchor A' = A, B' = s Bw. With one A per head the heads are concatenated: A' = [A_i - A0_i; A0_i],
B' = s [w_i B_i, w_i B_i - B0_i / N], of rank 2 N r.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import CONFIG_NAME, AuxiliaryTrainingWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from torch.nn import functional as F

from ..analysis.ranks import delta_factors
from ..reading import first_few
from ..tuner import MultiHeadAdapter, RLoraConfig
from ..tuner.experts import RLoraExperts
from ..tuner.layer import RLoraLayer, RLoraLinear
from ..tuner.selection import adapter_of
from .experts import pack, peft_names, place_in_module, split_layers


PREFIX = "base_model.model."


def lora_factors(adapter: MultiHeadAdapter, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Factor the delta of an adapter under fixed head weights as B' A'.

    Args:
        adapter ([`MultiHeadAdapter`]): The adapter, or an [`ExpertsAdapter`].
        weights (`torch.Tensor` of shape `[N]`): The head weights; of experts also `[E, N]`, for each its own.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: A' `[k, d_in]` and B' `[d_out, k]`, of experts `[E, k, d_in]` and
        `[E, d_out, k]`, in float64 on the CPU, scaling included. The rank k depends on the parts that the adapter has.
    """
    names = ("A", "B", "A0", "B0")
    tensors = {name: tensor for name in names if (tensor := getattr(adapter, name)) is not None}
    wide = {name: tensor.detach().to("cpu", torch.float64) for name, tensor in tensors.items()}
    ups, downs = delta_factors(wide, weights)
    return downs, adapter.scaling * ups


def tensor_names(layers: Mapping[str, RLoraLayer]) -> dict[str, tuple[str, str]]:
    """Names of A' and B' of each layer in PEFT's files."""
    linear, experts = split_layers(layers)
    places = {name: place_in_module(layer) for name, layer in experts.items()}
    modules = {**dict(zip(linear, linear, strict=True)), **peft_names(experts, places)}
    return {
        layer: (f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight")
        for layer, module in modules.items()
    }


def lora_tensors(
    layers: Mapping[str, RLoraLayer], adapter_name: str, head_weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """
    The tensors of a LoRA adapter in float32, named as in PEFT's files.

    All layers get the largest rank, padded with zeros: engines such as llama.cpp know one rank and one scaling.

    Args:
        layers (`Mapping[str, RLoraLayer]`): The adapted layers by name.
        adapter_name (`str`): The adapter.
        head_weights (`Mapping[str, torch.Tensor]`): Head weights `[N]` by layer.
    """
    linear, experts = split_layers(layers)
    factors = {
        name: lora_factors(adapter_of(layer, adapter_name), head_weights[name]) for name, layer in linear.items()
    }
    of_experts = {
        name: lora_factors(adapter_of(layer, adapter_name), head_weights[name]) for name, layer in experts.items()
    }
    rank = max(down.shape[-2] for down, _ in [*factors.values(), *of_experts.values()])

    tensors: dict[str, torch.Tensor] = {}
    names = tensor_names(layers)
    for name, (down, up) in of_experts.items():
        packed = pack(down, up, rank, experts[name])
        tensors |= {part: matrix.float().contiguous() for part, matrix in zip(names[name], packed, strict=True)}
    for name, (down, up) in factors.items():
        padding = rank - down.shape[0]
        A, B = names[name]
        tensors[A] = F.pad(down, (0, 0, 0, padding)).float().contiguous()  # [rank, d_in]
        tensors[B] = F.pad(up, (0, padding)).float().contiguous()  # [d_out, rank]
    return tensors


def rank_of(tensors: Mapping[str, torch.Tensor], layers: Mapping[str, RLoraLayer]) -> int:
    """The rank of the tensors of a LoRA adapter, which is that of all layers."""
    present = ((name, tensors[A]) for name, (A, _) in tensor_names(layers).items() if A in tensors)
    name, A = next(present)
    return A.shape[0] // (layers[name].num_experts or 1)


def base_module(module: nn.Module) -> nn.Module:
    """The module of the base model that adapters were put around, or the module itself."""
    while isinstance(module, RLoraLinear | RLoraExperts | AuxiliaryTrainingWrapper):
        module = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module.base_layer
    return module


def base_module_names(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """Names of all modules of the base model, without adapters."""
    for name, child in module.named_children():
        yield f"{prefix}{name}"
        yield from base_module_names(base_module(child), f"{prefix}{name}.")


def target_names(adapted: Iterable[str], modules: Iterable[str]) -> list[str]:
    """
    The shortest suffixes of names that select the adapted layers and no other module.

    Args:
        adapted (`Iterable[str]`): Names of the adapted layers.
        modules (`Iterable[str]`): Names of all modules of the base.
    """
    targets = set(adapted)
    others = {name for name in modules if name not in targets}
    for parts in range(1, max(name.count(".") for name in targets) + 1):
        suffixes = {_suffix(name, parts) for name in targets}
        # A name of fewer parts is its own suffix, and a suffix of longer names.
        lengths = {suffix.count(".") + 1 for suffix in suffixes}
        if not any(_suffix(name, length) in suffixes for name in others for length in lengths):
            return sorted(suffixes)
    return sorted(targets)


def _suffix(name: str, parts: int) -> str:
    """The last parts of a name, or all of it."""
    return ".".join(name.rsplit(".", parts)[-parts:])


def lora_config(
    config: RLoraConfig, rank: int, targets: list[str], parameters: list[str], transposed: bool
) -> LoraConfig:
    """
    The configuration of the exported adapter. Its scaling is 1, as B' includes the adapter's.

    Args:
        config ([`RLoraConfig`]): Configuration of the R-LoRA adapter.
        rank (`int`): Rank of all layers.
        targets (`list[str]`): Names of the linear layers.
        parameters (`list[str]`): Names of the weights of experts.
        transposed (`bool`): Whether the base stores weights as `[d_in, d_out]`.
    """
    options: dict[str, Any] = {
        "base_model_name_or_path": config.base_model_name_or_path,
        "revision": config.revision,
        "task_type": config.task_type,
        "modules_to_save": config.modules_to_save,
        "trainable_token_indices": config.trainable_token_indices,
        "bias": "lora_only" if config.bias == "rlora_only" else config.bias,
    }
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        use_rslora=False,
        target_modules=targets,
        target_parameters=parameters or None,
        fan_in_fan_out=transposed,
        inference_mode=True,
        **options,
    )


def check_targets_kept(config: LoraConfig, base: nn.Module) -> None:
    """
    Check that PEFT will load the export into the layers that the adapter adapts.

    In models whose experts transformers 5 has fused, PEFT (0.21) takes `gate_proj`, `up_proj` and `down_proj` for
    experts and skips dense and shared MLPs of these names (https://github.com/huggingface/peft/issues/3711).

    Args:
        config (`LoraConfig`): Configuration of the export.
        base (`torch.nn.Module`): The base model.

    Raises:
        ValueError: If PEFT would change the targets.
    """
    targets = set(config.target_modules or ())
    converted = copy.deepcopy(config)
    try:
        convert_peft_config_for_transformers(converted, model=base, conversions=None)
    except ValueError as error:  # only some of the layers that PEFT would fuse are adapted
        why, lost = f" ({error})", targets
    else:
        why, lost = "", targets - set(converted.target_modules or ())
    if lost:
        raise ValueError(
            f"The adapter can't be exported as LoRA: it adapts {first_few(lost)}, and for {type(base).__name__} PEFT "
            f"takes these names for fused experts{why}, and would leave out layers that have them. Train an adapter "
            "whose `target_modules` do not include `gate_proj`, `up_proj` and `down_proj`: experts "
            "(`target_parameters`) and attention are exported. Nothing was written."
        )


def save_lora_config(config: LoraConfig, folder: Path) -> None:
    """Save a configuration as PEFT does, but with sorted lists: PEFT writes sets in the order of their hashes."""
    config.save_pretrained(str(folder))
    path = folder / CONFIG_NAME
    values = json.loads(path.read_text(encoding="utf-8"))
    for key, value in values.items():
        if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
            values[key] = sorted(value)
    path.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")
