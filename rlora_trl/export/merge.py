"""Merges an export into a copy of its base by stock PEFT."""

from __future__ import annotations

import copy
from collections.abc import Collection
from pathlib import Path

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .lora import base_module


def check_mergeable(core: PreTrainedModel) -> None:
    """
    Refuse to merge into a quantized base, which would round the sum to its few bits.

    Raises:
        ValueError: If the base is quantized.
    """
    if getattr(core, "is_quantized", False):
        raise ValueError(
            "`merge=True` needs a base in 16 bits or more, and the base is quantized. Load the adapter on the base "
            "in 16 bits, for example `AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.bfloat16)`, and "
            "export that."
        )


def merge_export(
    core: PreTrainedModel,
    export: Path,
    targets: Collection[str],
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[str, ...]:
    """
    Merge an export into a copy of its base and save the result. The model itself is not changed.

    Args:
        core (`PreTrainedModel`): The base with its adapters. The copy needs the same memory again.
        export (`Path`): Folder of the exported LoRA adapter.
        targets (`Collection[str]`): Names of the layers that it adapts.
        folder (`Path`): Folder to write the model to.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Saved with it.

    Returns:
        `tuple[str, ...]`: Notes for users of the merged model.
    """
    base = _copy_base(core)
    tied = bool(getattr(base.config, "tie_word_embeddings", False))

    # Merging into a head that shares its weight with the embeddings would change those too.
    head = base.get_output_embeddings()
    if tied and any(module is head for name, module in base.named_modules() if name in targets):
        head.weight = nn.Parameter(head.weight.detach().clone())
        base.config.tie_word_embeddings = False

    merged = PeftModel.from_pretrained(base, str(export)).merge_and_unload()
    merged.save_pretrained(str(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    if tied and not merged.config.tie_word_embeddings:
        return (
            "Input and output embeddings share a weight in the base, and have separate weights in the merged model.",
        )
    return ()


def _copy_base(core: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model without its adapters."""
    base = copy.deepcopy(core)
    for module in list(base.modules()):
        for name, child in module.named_children():
            setattr(module, name, base_module(child))

    # transformers marks a model that it loaded adapters into, and would rename the tensors as those of an adapter.
    if vars(base).pop("_hf_peft_config_loaded", False):
        vars(base).pop("_weight_conversions", None)
    vars(base).pop("peft_config", None)
    return base
