"""Checks of the `model` argument of the trainer: which adapter trains, or why none can."""

from __future__ import annotations

import copy
import os
from typing import Any

from accelerate.utils import is_compiled_module
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..tuner import RLoraConfig, RLoraLayer


def active_config(model: Any) -> RLoraConfig:
    """The configuration of the active adapter of a `PeftModel`."""
    return model.peft_config[model.active_adapter]


def name_revision(config: RLoraConfig, model_init_kwargs: Any) -> None:
    """
    Write the revision of the base model into the configuration of the adapter, for loading.

    Args:
        config ([`RLoraConfig`]): The configuration, which is changed.
        model_init_kwargs (`dict`, *optional*): `SFTConfig.model_init_kwargs`.

    Raises:
        ValueError: If the configuration names another revision.
    """
    loaded = (model_init_kwargs or {}).get("revision")
    if config.revision is not None and config.revision != (loaded or "main"):
        raise ValueError(
            f"`peft_config` names revision {config.revision!r} of the base model, and "
            f"`model_init_kwargs` loads {loaded or 'main'!r}. Name one of them in both, or none in `peft_config`."
        )
    if loaded != "main":  # the default
        config.revision = loaded


def _check_trains(model: PeftModel, config: RLoraConfig) -> None:
    """
    Check that the active adapter is trainable: otherwise `Trainer` would run all steps and change nothing.

    Raises:
        ValueError: If it does not.
    """
    name = model.active_adapter
    adapters = [module.rlora_adapters[name] for module in model.modules() if _has_adapter(module, name)]
    merged = any(module.merged_adapters for module in model.modules() if isinstance(module, RLoraLayer))
    if merged:
        raise ValueError(
            "Adapters are merged into the base model and could not be trained. Call `model.unmerge_adapter()` "
            "before creating the trainer."
        )
    if any(adapter.trains for adapter in adapters):
        return
    if config.inference_mode:
        raise ValueError(
            f"Adapter {name!r} was loaded for inference, with all its parameters frozen. Load it with "
            "`is_trainable=True`, as in `PeftModel.from_pretrained(base, adapter, is_trainable=True)`."
        )
    raise ValueError(
        f"No parameter of adapter {name!r} trains: it is frozen or disabled. Before creating the trainer, "
        f"{how_to_train([name])}."
    )


def _has_adapter(module: nn.Module, name: str) -> bool:
    return isinstance(module, RLoraLayer) and name in module.rlora_adapters


def how_to_train(names: list[str]) -> str:
    """The calls that make these adapters train, for messages."""
    argument = repr(names[0] if len(names) == 1 else names)
    return f"call `model.base_model.enable_adapter_layers()` and `model.base_model.set_adapter({argument})`"


def _adapted_already(model: nn.Module) -> str:
    """The error for a model that already has adapters, with the remedy."""
    if getattr(model, "_hf_peft_config_loaded", False):
        return (
            "The model has adapters that were loaded through transformers, and `RLoraSFTTrainer` would add new ones "
            "on top. To train them further, load with "
            "`AutoPeftModelForCausalLM.from_pretrained(adapter, is_trainable=True)`."
        )
    return (
        "The model already has adapters: an earlier trainer or `get_peft_model` added them to this object, and new "
        "ones would be added on top. To train them further, pass the `PeftModel` (`trainer.model` of the earlier "
        "trainer). For a new adapter, use the base model from `peft_model.unload()`, or load it again."
    )


def _check_not_compiled(model: Any) -> None:
    """
    Refuse compiled modules, because their parameters have other names.

    Raises:
        ValueError: If the model or a module of it is compiled.
    """
    if isinstance(model, str):
        return
    if is_compiled_module(model):
        raise ValueError(
            "`model` was compiled with `torch.compile`, so its parameters are named `_orig_mod....` and an adapter "
            "saved from it would not load on the model. Pass the model itself (`model._orig_mod`), and have the "
            "trainer compile it with `RLoraSFTConfig(torch_compile=True)`."
        )
    compiled = next((name for name, module in model.named_modules() if is_compiled_module(module)), None)
    if compiled is not None:
        raise ValueError(
            f"{compiled!r} of `model` was replaced by the result of `torch.compile`, so its parameters are named "
            "`_orig_mod....` and an adapter saved from it would not load on the model. Compile it in place, with "
            "`module.compile()`, or have the trainer do so with `RLoraSFTConfig(torch_compile=True)`."
        )


def choose_peft_config(model: Any, peft_config: PeftConfig | None) -> RLoraConfig | None:
    """
    Choose the configuration of the adapter to create.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): The `model` of the trainer.
        peft_config (`PeftConfig`, *optional*): Its `peft_config`.

    Returns:
        [`RLoraConfig`], *optional*: A copy of `peft_config`, or the default; `None` for a `PeftModel`, which has an
        adapter.

    Raises:
        TypeError: If the adapter is not an R-LoRA adapter, or the model has adapters in its layers.
        ValueError: If the adapter of a `PeftModel` does not train, or the model is compiled or a folder of an adapter.
    """
    _check_not_compiled(model)

    # A model with an adapter.
    if isinstance(model, PeftModel):
        active = model.peft_config[model.active_adapter]
        if not isinstance(active, RLoraConfig):
            raise TypeError(
                f"The model's active adapter is a {type(active).__name__}; `RLoraSFTTrainer` trains R-LoRA adapters. "
                "Use `trl.SFTTrainer` for it, or pass the base model and a `peft_config=RLoraConfig(...)`."
            )
        if peft_config is None:
            _check_trains(model, active)
        return peft_config  # `SFTTrainer` refuses a second one

    # A base model.
    if not isinstance(model, str) and any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise TypeError(_adapted_already(model))
    if isinstance(model, str) and os.path.isfile(os.path.join(model, "adapter_config.json")):
        if not os.path.isfile(os.path.join(model, "config.json")):
            raise ValueError(
                f"`model={model!r}` is an adapter, not a model. To train it further, pass "
                "`AutoPeftModelForCausalLM.from_pretrained(adapter, is_trainable=True)`."
            )

    # The configuration of a new adapter.
    if peft_config is None:
        peft_config = RLoraConfig()
    elif not isinstance(peft_config, RLoraConfig):
        raise TypeError(
            f"`peft_config` is a {type(peft_config).__name__}; `RLoraSFTTrainer` trains R-LoRA adapters and needs an "
            "`RLoraConfig`. Use `trl.SFTTrainer` for other methods."
        )
    peft_config = copy.deepcopy(peft_config)
    if peft_config.task_type is None:
        peft_config.task_type = "CAUSAL_LM"  # what `AutoPeftModelForCausalLM` looks for
    return peft_config
