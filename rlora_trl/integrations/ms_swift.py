"""
A tuner for ms-swift (tried with 4.6.0), which a file for its `--external_plugins` registers as `--tuner_type rlora`:

    from rlora_trl import RLoraConfig
    from rlora_trl.integrations.ms_swift import register

    register(RLoraConfig(r=4, num_heads=3))

docs/integrations/ms-swift.md has the commands.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from swift.tuner_plugin import PeftTuner, tuners_map
from transformers.integrations import is_deepspeed_zero3_enabled

from ..files.checks import check_adapter
from ..tuner import RLoraConfig
from .settings import check_router


TUNER = "rlora"
# ms-swift's arguments of LoRA, which have no effect here.
_LORA_ARGUMENTS = (
    *(
        "lora_rank",
        "lora_alpha",
        "lora_dropout",
        "lora_bias",
        "lora_dtype",
        "lorap_lr_ratio",
        "use_rslora",
        "use_dora",
    ),
    *("target_modules", "target_regex", "target_parameters", "modules_to_save", "init_weights"),
)
_REMEDY = "Use DDP or DeepSpeed ZeRO-1 or 2, or `rlora train`"


def register(config: RLoraConfig | None = None) -> None:
    """
    Add `--tuner_type rlora` to ms-swift; a second call replaces the configuration.

    Args:
        config ([`RLoraConfig`], *optional*): Configuration of new adapters. Defaults to `RLoraConfig()`.

    Raises:
        TypeError: If it is not an [`RLoraConfig`].
        ValueError: If it has `router="task"`: batches of ms-swift do not say which task a row belongs to.
    """
    if config is None:
        config = RLoraConfig()
    if not isinstance(config, RLoraConfig):
        raise TypeError(f"`config` must be an `RLoraConfig`, got {type(config).__name__}.")
    check_router(config, where="register", tool="ms-swift")
    RLoraTuner.config = config
    tuners_map[TUNER] = RLoraTuner


class RLoraTuner(PeftTuner):
    """
    Makes, saves and loads adapters for ms-swift, which calls the class and not an instance.

    Attributes:
        config ([`RLoraConfig`]): Configuration of new adapters, set by [`register`].
    """

    config: RLoraConfig

    @staticmethod
    def prepare_model(args: Any, model: Any) -> PeftModel:
        """
        Add a new adapter to the base model.

        Raises:
            ValueError: If arguments of LoRA are set, or the strategy would save an incomplete adapter.
        """
        _check_strategy(args)
        changed = [f"--{name}" for name in _LORA_ARGUMENTS if _is_set(args, name)]
        if changed:
            raise ValueError(
                f"{', '.join(changed)} have no effect with `--tuner_type rlora`. Set the fields of the `RLoraConfig` "
                "that the file of `--external_plugins` passes to `register`."
            )
        task_type = "SEQ_CLS" if getattr(args, "task_type", None) == "seq_cls" else "CAUSAL_LM"
        config = deepcopy(RLoraTuner.config)  # the model changes it
        config.task_type = config.task_type or task_type
        return get_peft_model(model, config)

    @staticmethod
    def save_pretrained(
        model: Any, save_directory: str, state_dict: Any = None, safe_serialization: bool = True, **kwargs: Any
    ) -> None:
        """
        Save the adapter, and check the file.

        Raises:
            AdapterCheckError: If it is incomplete or not finite.
        """
        # `state_dict` has only what trains. The model has all, under the strategies that `prepare_model` accepts.
        PeftTuner.save_pretrained(model, save_directory, None, safe_serialization, **kwargs)
        check_adapter(Path(save_directory))

    @staticmethod
    def from_pretrained(model: Any, model_id: str, **kwargs: Any) -> PeftModel:
        """
        Load an adapter, to train it further with `is_trainable=True`.

        Raises:
            ValueError: If it is one of another method, or DeepSpeed ZeRO-3 is set up for training.
        """
        if kwargs.get("is_trainable"):
            _check_strategy(None)
        loaded = PeftTuner.from_pretrained(model, model_id, **kwargs)
        found = loaded.peft_config[loaded.active_adapter]
        if not isinstance(found, RLoraConfig):
            raise ValueError(
                f"{model_id} has an adapter of PEFT's method {found.peft_type}, and `--tuner_type rlora` loads "
                "R-LoRA. Set `--tuner_type` to its method."
            )
        return loaded


def _is_set(args: Any, name: str) -> bool:
    """Whether an argument has another value than its default."""
    for field in fields(args):
        if field.name == name:
            default = field.default if field.default_factory is MISSING else field.default_factory()
            return str(getattr(args, name)).lower() != str(default).lower()  # "true" has become True
    return False


def _check_strategy(args: Any) -> None:
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "DeepSpeed ZeRO-3 can't be used with `--tuner_type rlora`: ms-swift would save the shards of one process. "
            f"{_REMEDY} with `--accelerate_config zero3`."
        )
    if getattr(args, "fsdp", None):
        raise ValueError(
            "`--fsdp` can't be used with `--tuner_type rlora`: ms-swift would save an adapter without the values that "
            f"R-LoRA subtracts. {_REMEDY} with `--accelerate_config fsdp2`."
        )
