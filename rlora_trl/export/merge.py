"""The full model with an export merged into its weights, by stock PEFT on a copy of the base."""

from __future__ import annotations

import copy
from collections.abc import Collection
from pathlib import Path

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from .lora import base_module


def check_mergeable(core: PreTrainedModel) -> None:
    """
    Refuse to merge into a quantized base.

    Raises:
        ValueError: If the base is quantized: the sum would be rounded to its few bits again.
    """
    if getattr(core, "is_quantized", False):
        raise ValueError(
            "`merge=True` needs a base of 16 bits or more, and this one is quantized. Load the adapter on the base in "
            "16 bits, for example `AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.bfloat16)`, and "
            "export that."
        )


def merge_export(core: PreTrainedModel, export: Path, targets: Collection[str], folder: Path) -> tuple[str, ...]:
    """
    Merge an export into a copy of its base and save the result. The base in use is not touched.

    Args:
        core (`PreTrainedModel`): The base with adapters in it, which is copied: its memory is needed twice.
        export (`Path`): Folder of the exported LoRA adapter.
        targets (`Collection[str]`): Names of the layers that it adapts.
        folder (`Path`): Folder to write the model to.

    Returns:
        `tuple[str, ...]`: What users of the merged model should know.
    """
    base = _copy_base(core)
    tied = bool(getattr(base.config, "tie_word_embeddings", False))

    # A head that shares the weight of the embeddings would change them too.
    head = base.get_output_embeddings()
    if tied and any(module is head for name, module in base.named_modules() if name in targets):
        head.weight = nn.Parameter(head.weight.detach().clone())
        base.config.tie_word_embeddings = False

    merged = PeftModel.from_pretrained(base, str(export)).merge_and_unload()
    merged.save_pretrained(str(folder))
    if tied and not merged.config.tie_word_embeddings:
        return ("Input and output embeddings share their weight in the base, and are two in the merged model.",)
    return ()


def _copy_base(core: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model without the adapters in it."""
    base = copy.deepcopy(core)
    for module in list(base.modules()):
        for name, child in module.named_children():
            setattr(module, name, base_module(child))

    # transformers marks a model that it loaded adapters into, and keeps how it renamed their tensors.
    if vars(base).pop("_hf_peft_config_loaded", False):
        vars(base).pop("_weight_conversions", None)
    vars(base).pop("peft_config", None)
    return base
