"""The model that a trainer is given: which adapter trains, or why none can."""

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
    Have the adapter name the revision of the base that it is trained on, which loading it asks for.

    Raises:
        ValueError: If it names another one.
    """
    loaded = (model_init_kwargs or {}).get("revision")
    if config.revision is not None and config.revision != (loaded or "main"):
        raise ValueError(
            f"`peft_config` names revision {config.revision!r} of the base model, and "
            f"`model_init_kwargs` loads {loaded or 'main'!r}. Name one of them in both, or none in `peft_config`."
        )
    if loaded != "main":  # which is what no name means
        config.revision = loaded


def _check_trains(model: PeftModel, config: RLoraConfig) -> None:
    """
    See that the active adapter of a model trains.

    Raises:
        ValueError: If it does not; `Trainer` would go through all steps and change nothing.
    """
    name = model.active_adapter
    adapters = [module.rlora_adapters[name] for module in model.modules() if _has_adapter(module, name)]
    merged = any(module.merged_adapters for module in model.modules() if isinstance(module, RLoraLayer))
    if merged:
        raise ValueError(
            "Adapters are merged into the base, which would be trained on as it is then. Call "
            "`model.unmerge_adapter()` before the trainer is made."
        )
    if any(adapter.trains for adapter in adapters):
        return
    if config.inference_mode:
        raise ValueError(
            f"Adapter {name!r} was loaded for inference, so that none of its parameters trains. Load it with "
            "`is_trainable=True`, as in `PeftModel.from_pretrained(base, adapter, is_trainable=True)`."
        )
    raise ValueError(
        f"No parameter of adapter {name!r} trains: it is frozen or disabled. Before the trainer is made, "
        f"{how_to_train([name])}."
    )


def _has_adapter(module: nn.Module, name: str) -> bool:
    return isinstance(module, RLoraLayer) and name in module.rlora_adapters


def how_to_train(names: list[str]) -> str:
    """What to call so that these adapters train."""
    chosen = repr(names[0] if len(names) == 1 else names)
    return f"call `model.base_model.enable_adapter_layers()` and `model.base_model.set_adapter({chosen})`"


def _adapted_already(model: nn.Module) -> str:
    """Why no new adapter is put into a model that has some, and what to do."""
    if getattr(model, "_hf_peft_config_loaded", False):
        return (
            "The model has adapters that were loaded through transformers, and `RLoraSFTTrainer` would put new ones "
            "over them. To train them further, load with "
            "`AutoPeftModelForCausalLM.from_pretrained(adapter, is_trainable=True)`."
        )
    return (
        "The model has adapters in its layers: an earlier trainer or `get_peft_model` has put them into this very "
        "object, and new ones would come on top. To train those further, pass the `PeftModel` (`trainer.model` of the "
        "earlier trainer). For a new adapter take the base from `peft_model.unload()`, or load it again."
    )


def _check_not_compiled(model: Any) -> None:
    """
    Refuse compiled modules, whose parameters have other names than those of the model.

    Raises:
        ValueError: If there are some, with what to do.
    """
    if isinstance(model, str):
        return
    if is_compiled_module(model):
        raise ValueError(
            "`model` was compiled with `torch.compile`, so that its parameters are named `_orig_mod....` and an "
            "adapter saved from it would not load on the model. Pass the model itself (`model._orig_mod`), and have "
            "the trainer compile it with `RLoraSFTConfig(torch_compile=True)`."
        )
    compiled = next((name for name, module in model.named_modules() if is_compiled_module(module)), None)
    if compiled is not None:
        raise ValueError(
            f"{compiled!r} of `model` was replaced by what `torch.compile` returned, so that its parameters are named "
            "`_orig_mod....` and an adapter saved from it would not load on the model. Compile it in place, with "
            "`module.compile()`, or have the trainer do so with `RLoraSFTConfig(torch_compile=True)`."
        )


def choose_peft_config(model: Any, peft_config: PeftConfig | None) -> RLoraConfig | None:
    """The configuration of the adapter to create, a copy; `None` for a model that has an adapter."""
    _check_not_compiled(model)
    if isinstance(model, PeftModel):
        active = model.peft_config[model.active_adapter]
        if not isinstance(active, RLoraConfig):
            raise TypeError(
                f"The model's active adapter is a {type(active).__name__}; `RLoraSFTTrainer` trains R-LoRA adapters. "
                "Use `trl.SFTTrainer` for it, or pass the base model and a `peft_config=RLoraConfig(...)`."
            )
        if peft_config is None:
            _check_trains(model, active)
        return peft_config  # `SFTTrainer` refuses a second one and says why
    if not isinstance(model, str) and any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise TypeError(_adapted_already(model))
    if isinstance(model, str) and os.path.isfile(os.path.join(model, "adapter_config.json")):
        if not os.path.isfile(os.path.join(model, "config.json")):
            raise ValueError(
                f"`model={model!r}` is an adapter, not a model. To train it further, pass "
                "`AutoPeftModelForCausalLM.from_pretrained(adapter, is_trainable=True)`."
            )
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
