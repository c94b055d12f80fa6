"""What a configuration asks of a model that the model does not have, or can't do: a warning or an error for each."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from copy import copy
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import TrainableTokensWrapper, infer_device
from torch import nn
from transformers import PreTrainedModel

from ..files.reading import first_few
from .config import RLoraConfig
from .layer import RLoraLayer, offload_hook


# Heads that PEFT adds to `modules_to_save` itself, of which a model has one.
_PEFT_HEADS = frozenset(("classifier", "score", "qa_outputs"))


def warn_once(message: str) -> None:
    """Warn of a configuration, in the first process of a run only."""
    if os.environ.get("RANK", "0") == "0":
        warnings.warn(message, stacklevel=3)


def ignored_names(config: RLoraConfig, targets: Collection[str], names: Collection[str]) -> Iterator[str]:
    """
    Warnings for names in a configuration that no module has; PEFT (0.21) passes over them silently.

    PEFT reports names in `exclude_modules` if none of them matches, and those in `rank_pattern` and `alpha_pattern`.
    See https://github.com/huggingface/peft/issues/3554 for `target_modules`.

    Args:
        config ([`RLoraConfig`]): The configuration.
        targets (`Collection[str]`): The names in its `target_modules` that the user chose.
        names (`Collection[str]`): Names of all modules of the model.
    """
    split = [name.split(".") for name in names]
    ends = {".".join(parts[start:]) for parts in split for start in range(len(parts))}
    lost = set(targets) - ends
    if lost:
        yield (
            f"`target_modules` names {_quoted(lost)}, which no module of the model is called: only the others are "
            "adapted. Correct the name or remove it."
        )

    excluded = config.exclude_modules
    lost = set() if excluded is None or isinstance(excluded, str) else set(excluded) - ends
    if excluded and lost and len(lost) < len(excluded):
        yield (
            f"`exclude_modules` names {_quoted(lost)}, which no module of the model is called: nothing is left out "
            "for it. Correct the name or remove it."
        )

    saved = set(config.modules_to_save or ()) - _PEFT_HEADS
    lost = {name for name in saved if not any(known.endswith(name) for known in names)}
    if lost:
        yield (
            f"`modules_to_save` names {_quoted(lost)}, which no module of the model is called: nothing is trained or "
            "saved for it. Correct the name or remove it."
        )


def ignored_indices(config: RLoraConfig, adapted: Collection[str]) -> Iterator[str]:
    """A warning for indices in `layers_to_transform` that none of the adapted layers has."""
    if not isinstance(config.layers_to_transform, list | tuple):
        return
    lost = []
    for index in config.layers_to_transform:
        alone = copy(config)
        alone.layers_to_transform = index
        if not any(check_target_module_exists(alone, name) for name in adapted):
            lost.append(index)
    if lost:
        yield (
            f"`layers_to_transform` has {_quoted(lost)}, which no layer that `target_modules` selects is numbered: "
            "only the others are adapted. Indices count from 0; correct or remove those."
        )


def narrow_layers(config: RLoraConfig, adapter_name: str, layers: Mapping[str, RLoraLayer]) -> Iterator[str]:
    """A warning for layers that are too narrow for the rank that the configuration has for them."""
    narrow = [name for name, layer in layers.items() if layer.r[adapter_name] < config.rank_of(name)]
    if narrow:
        name, layer = narrow[0], layers[narrow[0]]
        yield (
            f"{len(narrow)} of {len(layers)} adapted layers are too narrow for the rank that is configured and get "
            f"the largest one that they allow: for example {name!r}, of {layer.in_features} inputs and "
            f"{layer.out_features} outputs, gets rank {layer.r[adapter_name]} instead of {config.rank_of(name)}. "
            "Lower `r`, set `rank_pattern`, or leave such layers out with `exclude_modules` to choose otherwise."
        )


def _quoted(names: Collection[str] | Collection[int]) -> str:
    return ", ".join(sorted(map(repr, names)))


def refuse_offloaded(config: RLoraConfig, model: nn.Module, in_peft_model: bool = True) -> None:
    """
    Refuse to train or load weights of the base that accelerate offloads.

    In a forward pass such a module has a copy of its weights that is dropped afterwards, with its gradient. Adapters
    stay on the device that computes, and are trained and loaded by a `PeftModel` as on any base.

    Args:
        config ([`RLoraConfig`]): The configuration.
        model (`torch.nn.Module`): The base.
        in_peft_model (`bool`, *optional*, defaults to `True`): A `PeftModel` holds the adapter and loads its weights.

    Raises:
        ValueError: If the configuration has a module of its own that is offloaded, the base can't be dispatched, or
            transformers would load the adapter, which it does by the place of the base's weights.
    """
    if config.loaded and not in_peft_model:
        _refuse_loading_by_transformers(config, model)
    offloaded = {name: module for name, module in model.named_modules() if offload_hook(module) is not None}
    if offloaded:
        own = {"modules_to_save": _below(config.modules_to_save or (), model) & set(offloaded)}
        tokens = config.trainable_token_indices
        if isinstance(tokens, dict):
            own["trainable_token_indices"] = _below(tokens, model) & set(offloaded)
        elif tokens:
            embedding = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
            own["trainable_token_indices"] = {name for name, module in offloaded.items() if module is embedding}
        if config.bias != "none":
            biased = {name for name, module in offloaded.items() if getattr(module, "bias", None) is not None}
            every = config.bias == "all"
            own["bias"] = {name for name in biased if every or check_target_module_exists(config, name)}
        for field, names in own.items():
            if names:
                raise ValueError(
                    f"`{field}={getattr(config, field)!r}` trains weights of {first_few(names)}, which accelerate "
                    "offloads: they would neither be trained nor loaded. Keep these modules on the device that "
                    "computes (in `device_map`), or train the adapter alone."
                )
    on_disk = "disk" in (getattr(model, "hf_device_map", None) or {}).values() and not offloaded
    on_disk = on_disk and any(parameter.device.type == "meta" for parameter in model.parameters())
    if config.loaded and on_disk and infer_device() == "cpu":
        # `PeftModel.from_pretrained` (0.21) takes the hooks off and dispatches again, for which it needs a GPU.
        raise ValueError(
            'The base has layers on "disk" in its `device_map`, and PEFT dispatches it again when it loads an '
            "adapter, which it can't without a GPU. Load the base without `device_map` and offload it with "
            "`accelerate.disk_offload(base, folder, execution_device=torch.device('cpu'))` first."
        )


def refuse_token_rows_of_head(model: nn.Module) -> None:
    """
    Refuse rows of an output head that `trainable_token_indices` trains: the head itself, or one that is tied to the
    embedding.

    TRL (1.16) computes losses with the weight and bias of the head, and PEFT's wrapper has neither the trained weight
    nor a bias (no upstream issue as of trl 1.16; https://github.com/huggingface/peft/issues/3649 is about the bias).

    Args:
        model (`torch.nn.Module`): A model with adapters that `SFTTrainer` is to train.

    Raises:
        ValueError: If the head has such rows.
    """
    core: Any = model.base_model.model if isinstance(model, PeftModel) else model
    head = core.get_output_embeddings() if isinstance(core, PreTrainedModel) else None
    if not isinstance(head, TrainableTokensWrapper):
        return
    ends = [name for name, module in core.named_modules() if module in (core.get_input_embeddings(), head)]
    names = [name.rpartition(".")[2] for name in ends]
    raise ValueError(
        f"`trainable_token_indices` trains rows of the output head {ends[-1]!r} (which a model with tied embeddings "
        "shares with the input), and TRL computes the loss with the head's weight itself, without these rows. Train "
        f"both in full with `modules_to_save={names}`, or give the head a weight of its own before the trainer is "
        "made (`model.config.tie_word_embeddings = False`, and a copy of the weight as its parameter) and train rows "
        "of the input embedding alone."
    )


def _refuse_loading_by_transformers(config: RLoraConfig, model: nn.Module) -> None:
    """
    `load_adapter` of transformers (5.23) puts the tensors of an adapter where `device_map` has the layer: they are
    dropped if that is the disk, and the adapter keeps its initial values (no upstream issue as of 5.23).
    """
    away = {
        name
        for name, module in model.named_modules()
        if check_target_module_exists(config, name)
        and (offload_hook(module) is not None or any(weight.is_meta for weight in module.parameters()))
    }
    if away:
        raise ValueError(
            f"transformers (`load_adapter`, or `from_pretrained` with the name of an adapter) can't load an R-LoRA "
            f"adapter onto layers that accelerate offloads, here {first_few(away)}: the adapter would keep random "
            "values. Load the base by itself, offload it with `accelerate.cpu_offload` or `accelerate.disk_offload`, "
            "and load the adapter with `peft.PeftModel.from_pretrained(base, adapter)`."
        )


def _below(ends: Collection[str], model: nn.Module) -> set[str]:
    """Names of the modules whose names have one of the given ends, as PEFT matches them, and of all in them."""
    chosen = [name for name, _ in model.named_modules() if any(name.endswith(end) for end in ends)]
    return {name for name, _ in model.named_modules() if any(f"{name}.".startswith(f"{top}.") for top in chosen)}
