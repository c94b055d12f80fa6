"""Which layers of a model get an adapter: defaults by architecture, unsuitable layers, names without a match."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from copy import copy
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils import TrainableTokensWrapper, resolve_quantization_backend
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..reading import first_few
from .config import RLoraConfig
from .direct_use import bypassed_layers
from .layer import RLoraLayer


# Layers named "output.dense" are also in attention, so the MLP needs an expression.
_BERT = r".*\.layer\.\d+\.(intermediate|output)\.dense"
# Vision towers may have MLPs with the same names.
_LANGUAGE_MODEL = r"(.*\.)?(language_model|text_model)\..*\.(gate_proj|up_proj|gate_up_proj|down_proj)"
_GATED = ["gate_proj", "up_proj", "down_proj"]
_UNGATED = ["up_proj", "down_proj"]
_FUSED_GATED = ["gate_up_proj", "down_proj"]
_GPT_NEOX = ["dense_h_to_4h", "dense_4h_to_h"]
_FC = ["fc1", "fc2"]
# The MLP projections of each architecture: the layers that the paper trains.
MLP_TARGET_MODULES: dict[str, list[str] | str] = {
    # Decoders.
    **dict.fromkeys(
        "llama mistral ministral ministral3 qwen2 qwen3 qwen3_5_text gemma gemma2 gemma3_text gemma3 "
        "gemma4_text vaultgemma recurrent_gemma olmo olmo2 olmo3 olmo_hybrid smollm3 cohere cohere2 granite "
        "stablelm helium exaone4 seed_oss ernie4_5 hunyuan_v1_dense cwm diffllama doge minicpm3 youtu "
        "falcon_h1 bamba".split(),
        _GATED,
    ),
    **dict.fromkeys("phi3 glm glm4".split(), _FUSED_GATED),
    **dict.fromkeys("arcee apertus nemotron jais2".split(), _UNGATED),
    **dict.fromkeys("gpt_neox gpt_neox_japanese bloom falcon persimmon".split(), _GPT_NEOX),
    **dict.fromkeys("opt phi biogpt xglm nanochat".split(), _FC),
    **dict.fromkeys("gptj codegen".split(), ["fc_in", "fc_out"]),
    "starcoder2": ["c_fc", "c_proj"],
    # Attention has a c_proj too.
    **dict.fromkeys("gpt2 gpt_bigcode gpt_neo".split(), ["mlp.c_fc", "mlp.c_proj"]),
    "mpt": ["ffn.up_proj", "ffn.down_proj"],
    "lfm2": ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"],
    # State-space models have no MLP, and their kernels read the weights of the other layers (see `direct_use.py`).
    **dict.fromkeys("mamba mamba2 falcon_mamba".split(), ["in_proj"]),
    # Encoders, and encoders with decoders.
    **dict.fromkeys(
        "bert roberta xlm-roberta xlm-roberta-xl camembert electra ernie megatron-bert data2vec-text "
        "big_bird rembert deberta deberta-v2".split(),
        _BERT,
    ),
    "distilbert": ["lin1", "lin2"],
    **dict.fromkeys("modernbert modernbert-decoder".split(), ["Wi", "mlp.Wo"]),
    "eurobert": _GATED,
    **dict.fromkeys("bart mbart pegasus marian blenderbot m2m_100 led plbart whisper".split(), _FC),
    **dict.fromkeys("t5 mt5 umt5".split(), ["wi", "wi_0", "wi_1", "wo"]),
    # Pictures, and pictures with text: vision towers of language models are adapted only if `target_modules` says so.
    **dict.fromkeys("vit dinov2 beit swin".split(), ["mlp.fc1", "mlp.fc2"]),
    **dict.fromkeys("clip clip_vision_model clip_text_model".split(), ["mlp.fc1", "mlp.fc2"]),
    # Not the MLP of the pooling head, which a classifier doesn't use.
    **dict.fromkeys(
        "siglip siglip_vision_model siglip_text_model siglip2 siglip2_vision_model siglip2_text_model".split(),
        r"(.*\.)?layers\.\d+\.mlp\.fc[12]",
    ),
    **dict.fromkeys(
        "llava llava_next llava_onevision qwen2_vl qwen2_5_vl qwen3_vl qwen3_5 smolvlm idefics2 idefics3 "
        "paligemma gemma4 internvl mistral3 mllama glm4v exaone4_5".split(),
        _LANGUAGE_MODEL,
    ),
}
# Names that PEFT adds to `modules_to_save` for any classification or question-answering head; a model has one of them.
_PEFT_HEADS = frozenset(("classifier", "score", "qa_outputs"))


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer of a kind that can be adapted."""
    if isinstance(module, nn.Linear | Conv1D):
        return True
    backend = resolve_quantization_backend(module, get_apply_tensor_subclass=lambda: None)
    return backend is not None and getattr(backend, "layer_type", "linear") == "linear"


def leave_out_bypassed(config: RLoraConfig, model: nn.Module) -> None:
    """
    Leave layers that are not called, or are no linear maps, out of "all-linear", and refuse them if they are named.

    Args:
        config ([`RLoraConfig`]): The configuration; "all-linear" is replaced by the names of the other layers.
        model (`torch.nn.Module`): The base.

    Raises:
        ValueError: If `target_modules` names such a layer.
    """
    readers = bypassed_layers(model, is_linear)
    unlike = unlike_linear(model)
    if not readers and not unlike:
        return

    targets = config.target_modules
    if not isinstance(targets, str) or targets.lower() != "all-linear":
        _refuse_bypassed(config, readers)
        _refuse_unlike(config, unlike)
        return

    every: Any = _maybe_include_all_linear_layers(config, model).target_modules
    left_out = {**readers, **unlike}
    config.target_modules = every - set(left_out)
    # PEFT also matches names by their endings.
    matching = [name for name in left_out if check_target_module_exists(config, name)]
    if matching:
        config.exclude_modules = _exclude_also(config.exclude_modules, matching)

    # The source of torch and transformers is known to be read correctly.
    unsure = {n: cls for n, cls in readers.items() if not cls.__module__.startswith(("torch.", "transformers."))}
    if unsure:
        warn_once(
            f'"all-linear" leaves out {first_few(unsure)}: the source of {_names_of(unsure.values())} computes with '
            "their weights, and adapters would have no effect there. If these layers are called after all, read their "
            "weights outside of `forward`; if not, name them in `exclude_modules`."
        )


def _refuse_bypassed(config: RLoraConfig, readers: Mapping[str, type]) -> None:
    selected = {name: reader for name, reader in readers.items() if check_target_module_exists(config, name)}
    if selected:
        raise ValueError(
            f"`target_modules` selects {first_few(selected)}, but {_names_of(selected.values())} computes with the "
            "weight of that layer instead of calling it: an adapter would have no effect there, or not on every path. "
            "R-LoRA adapts layers that are called. Remove it from `target_modules`, or name it in `exclude_modules`; "
            '"all-linear" leaves such layers out.'
        )


def unlike_linear(model: nn.Module) -> dict[str, type]:
    """
    The layers of a model that derive from `torch.nn.Linear` and compute something else, as some routers of experts do.

    One layer of each class with a `forward` of its own is called with zeros.

    Args:
        model (`torch.nn.Module`): The model, with adapters or without.

    Returns:
        `dict[str, type]`: The class of each, by the name of the layer.
    """
    found: dict[str, type] = {}
    known: dict[type, bool] = {}
    for name, module in model.named_modules():
        cls = type(module)
        if not isinstance(module, nn.Linear) or cls.forward is nn.Linear.forward:
            continue
        # Not quantized layers, nor those whose parameters are elsewhere (ZeRO-3).
        if module.weight.shape != (module.out_features, module.in_features) or hasattr(module, "_hf_hook"):
            continue
        if cls not in known:
            known[cls] = resolve_quantization_backend(module, get_apply_tensor_subclass=lambda: None) is None and (
                not _maps_linearly(module)
            )
        if known[cls]:
            found[name] = cls
    return found


@torch.no_grad()
def _maps_linearly(module: nn.Linear) -> bool:
    """Whether a layer gives one output `[T, d_out]` for an input `[T, d_in]`."""
    try:
        output = module(module.weight.new_zeros(2, module.in_features))
    except Exception:
        return True  # it may need more than the input; an adapter reports what is wrong
    return isinstance(output, torch.Tensor) and output.shape == (2, module.out_features)


def _refuse_unlike(config: RLoraConfig, unlike: Mapping[str, type]) -> None:
    selected = {name: cls for name, cls in unlike.items() if check_target_module_exists(config, name)}
    if selected:
        raise ValueError(
            f"`target_modules` selects {first_few(selected)}, and {_names_of(selected.values())} derives from "
            "`torch.nn.Linear` but computes something else, as routers of experts do. R-LoRA adapts linear maps. "
            'Remove it from `target_modules`, or name it in `exclude_modules`; "all-linear" leaves such layers out.'
        )


def _exclude_also(excluded: Any, names: list[str]) -> Any:
    """`exclude_modules` (an expression or names) with further names."""
    if isinstance(excluded, str):
        return "|".join([f"(?:{excluded})", *map(re.escape, names)])
    return {*(excluded or ()), *names}


def _names_of(classes: Iterable[type]) -> str:
    return ", ".join(sorted({cls.__name__ for cls in classes}))


def warn_once(message: str) -> None:
    """Warn about a configuration, in the first process of a run only."""
    if os.environ.get("RANK", "0") == "0":
        warnings.warn(message, stacklevel=3)


def ignored_names(config: RLoraConfig, targets: Collection[str], names: Collection[str]) -> Iterator[str]:
    """
    Warnings about names in a configuration that no module has, which PEFT (0.21) ignores silently.

    PEFT itself reports `exclude_modules` if none of its names matches, `rank_pattern` and `alpha_pattern`. For
    `target_modules` see https://github.com/huggingface/peft/issues/3554 (open as of 0.21.2).

    Args:
        config ([`RLoraConfig`]): The configuration.
        targets (`Collection[str]`): The names in its `target_modules` that the user set.
        names (`Collection[str]`): Names of all modules of the model.
    """
    split = [name.split(".") for name in names]
    ends = {".".join(parts[start:]) for parts in split for start in range(len(parts))}
    unmatched = set(targets) - ends
    if unmatched:
        yield (
            f"`target_modules` names {_quoted(unmatched)}, but no module of the model has such a name: only the "
            "others are adapted. Correct the name or remove it."
        )

    excluded = config.exclude_modules
    unmatched = set() if excluded is None or isinstance(excluded, str) else set(excluded) - ends
    if excluded and unmatched and len(unmatched) < len(excluded):
        yield (
            f"`exclude_modules` names {_quoted(unmatched)}, but no module of the model has such a name: nothing is "
            "left out for it. Correct the name or remove it."
        )

    saved = set(config.modules_to_save or ()) - _PEFT_HEADS
    unmatched = {name for name in saved if not any(module.endswith(name) for module in names)}
    if unmatched:
        yield (
            f"`modules_to_save` names {_quoted(unmatched)}, but no module of the model has such a name: nothing is "
            "trained or saved for it. Correct the name or remove it."
        )


def ignored_indices(config: RLoraConfig, adapted: Collection[str]) -> Iterator[str]:
    """A warning about indices in `layers_to_transform` that no adapted layer has."""
    if not isinstance(config.layers_to_transform, list | tuple):
        return
    unmatched = []
    for index in config.layers_to_transform:
        single = copy(config)
        single.target_modules = {*(config.target_modules or ()), *(config.target_parameters or ())}  # type: ignore[assignment]
        single.layers_to_transform = index
        if not any(check_target_module_exists(single, name) for name in adapted):
            unmatched.append(index)
    if unmatched:
        yield (
            f"`layers_to_transform` has {_quoted(unmatched)}, but no selected layer has such an "
            "index: only the others are adapted. Indices count from 0; correct or remove those."
        )


def narrow_layers(config: RLoraConfig, adapter_name: str, layers: Mapping[str, RLoraLayer]) -> Iterator[str]:
    """A warning about layers that are too narrow for their rank in the configuration."""
    narrow = [name for name, layer in layers.items() if layer.r[adapter_name] < config.rank_of(name)]
    if narrow:
        name, layer = narrow[0], layers[narrow[0]]
        yield (
            f"{len(narrow)} of {len(layers)} adapted layers are too narrow for the rank that is configured and get "
            f"the largest possible one: for example {name!r}, with {layer.in_features} inputs and "
            f"{layer.out_features} outputs, gets rank {layer.r[adapter_name]} instead of {config.rank_of(name)}. To "
            "choose otherwise, lower `r`, set `rank_pattern`, or leave such layers out with `exclude_modules`."
        )


def _quoted(names: Collection[str] | Collection[int]) -> str:
    return ", ".join(sorted(map(repr, names)))


def refuse_token_rows_of_head(model: nn.Module) -> None:
    """
    Refuse `trainable_token_indices` for rows of the output head, or of an embedding that is tied to it.

    TRL (1.16) computes losses with the weight and bias of the head, and PEFT's wrapper has neither the trained weight
    nor a bias (no upstream issue as of trl 1.16.0; https://github.com/huggingface/peft/issues/3649 is about the bias).

    Args:
        model (`torch.nn.Module`): A model with adapters that `SFTTrainer` is to train.

    Raises:
        ValueError: If the head has such rows.
    """
    core: Any = model.base_model.model if isinstance(model, PeftModel) else model
    head = core.get_output_embeddings() if isinstance(core, PreTrainedModel) else None
    if not isinstance(head, TrainableTokensWrapper):
        return
    paths = [name for name, module in core.named_modules() if module in (core.get_input_embeddings(), head)]
    names = [path.rpartition(".")[2] for path in paths]
    raise ValueError(
        f"`trainable_token_indices` trains rows of the output head {paths[-1]!r} (which a model with tied embeddings "
        "shares with the input), and TRL computes the loss with the weight of the head, without these rows. Train "
        f"both in full with `modules_to_save={names}`, or give the head its own weight before the trainer is "
        "created (`model.config.tie_word_embeddings = False`, and a copy of the weight as its parameter) and train "
        "rows of the input embedding only."
    )
