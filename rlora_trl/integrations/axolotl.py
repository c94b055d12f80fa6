"""
A plugin for axolotl (tried with 0.19.0), which trains R-LoRA adapters from axolotl's YAML files:

    plugins: [rlora_trl.integrations.axolotl.RLoraPlugin]
    adapter: rlora
    rlora: {r: 4, num_heads: 3}

Axolotl looks classes up by these names. docs/integrations/axolotl.md has a whole file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftModel, get_peft_model
from pydantic import BaseModel, Field, model_validator
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

from ..files.checks import check_adapter
from ..files.layout import WEIGHTS_NAME
from ..reading import shorten
from ..tuner import RLoraConfig
from .settings import config_from_settings


logger = logging.get_logger(__name__)

ADAPTER = "rlora"
# Axolotl's settings of LoRA, and the field of `rlora` with that meaning.
_LORA_SETTINGS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "head_dropout",
    "lora_target_modules": "target_modules",
    "lora_target_linear": "target_modules: all-linear",
    "lora_rank_pattern": "rank_pattern",
    "lora_alpha_pattern": "alpha_pattern",
    "lora_fan_in_fan_out": "fan_in_fan_out",
    "peft_use_rslora": "use_rslora",
    "peft_init_lora_weights": "init_weights",
    "peft_layers_to_transform": "layers_to_transform",
    "peft_layers_pattern": "layers_pattern",
    **dict.fromkeys(
        (
            "lora_target_parameters",
            "peft_use_dora",
            "peft_trainable_token_indices",
            "lora_mlp_kernel",
            "lora_qkv_kernel",
            "lora_o_kernel",
            "lora_embedding_kernel",
            "loraplus_lr_ratio",
            "loraplus_lr_embedding",
            "peft_layer_replication",
            "peft_ensure_weight_tying",
            "peft",
        )
    ),
}
_REFUSED = {
    **dict.fromkeys(
        ("load_in_4bit", "load_in_8bit"),
        "axolotl quantizes a base only for its own adapters. Name a base that is stored quantized as `base_model`, or "
        "use `rlora train --load_in_4bit`",
    ),
    **dict.fromkeys(
        ("fsdp", "fsdp_config"),
        "axolotl saves only the parameters of an adapter whose names contain `lora_`, without the values that R-LoRA "
        "subtracts. Use DDP or DeepSpeed ZeRO-1 or 2, or `rlora train` with FSDP2",
    ),
    "merge_lora": "the weights of the heads depend on the token, so that an adapter can't be merged in general. Use "
    "`rlora export --merge`, which measures what is lost",
}


class RLoraArgs(BaseModel):
    """
    The settings that the plugin adds to axolotl's.

    Args:
        rlora (`dict[str, Any]`, *optional*): Fields of [`RLoraConfig`].
    """

    rlora: dict[str, Any] | None = Field(default=None, description="Fields of RLoraConfig, for `adapter: rlora`.")

    @model_validator(mode="before")
    @classmethod
    def check_rlora(cls, data: Any) -> Any:
        """Refuse, before a model is loaded, settings that would have no effect or a wrong one."""
        if data.get("adapter") != ADAPTER:
            if data.get("rlora"):
                raise ValueError(f"`rlora` needs `adapter: rlora`, got `adapter: {data.get('adapter')}`.")
            return data
        for name, reason in _REFUSED.items():
            if data.get(name):
                raise ValueError(f"`{name}` can't be used with `adapter: rlora`: {reason}.")
        config = adapter_config(data)
        for name, field in _LORA_SETTINGS.items():
            if not _agrees(config, name, data.get(name)):
                remedy = f"Set `{field}` under `rlora`" if field else "Remove it"
                raise ValueError(f"`{name}` has no effect with `adapter: rlora`. {remedy}.")
        return data


def _agrees(config: RLoraConfig, name: str, value: Any) -> bool:
    """Whether a setting of LoRA is not set, is off, or, where zero or false mean something, is that of R-LoRA."""
    if value or value is None:
        return value is None
    # Axolotl itself sets this one to zero, before the plugin sees it.
    if name == "lora_dropout" or not isinstance(value, int | float):
        return True
    return bool(getattr(config, _LORA_SETTINGS[name] or "", value) == value)


def adapter_config(cfg: Any) -> RLoraConfig:
    """
    The configuration of the adapter in axolotl's settings.

    Args:
        cfg (`Mapping`): Axolotl's settings; `rlora` has fields of [`RLoraConfig`], and `lora_modules_to_save`, which
            axolotl requires for new tokens, stands for `modules_to_save`.

    Raises:
        ValueError: If a field is unknown or has a wrong value, or both name modules to save, and not the same.
    """
    given = cfg.get("rlora")
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(
            f"`rlora` must be a mapping of fields of RLoraConfig, got {shorten(given)}. For example {{r: 4}}."
        )
    values = dict(given or {})
    saved = cfg.get("lora_modules_to_save")
    if saved:
        named = values.get("modules_to_save")
        if named is None:
            values["modules_to_save"] = saved
        elif sorted(map(str, _listed(named))) != sorted(map(str, _listed(saved))):
            raise ValueError(
                f"`lora_modules_to_save` is {shorten(saved)}, and `modules_to_save` under `rlora` is "
                f"{shorten(named)}. Remove the second."
            )
    return config_from_settings(values, where="rlora", tool="axolotl", task_type="CAUSAL_LM")


def _listed(names: Any) -> Sequence[Any]:
    return names if isinstance(names, list | tuple) else [names]


class RLoraPlugin(BasePlugin):
    """Adds `adapter: rlora` to axolotl."""

    def get_input_args(self) -> str:
        return f"{__name__}.{RLoraArgs.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=ADAPTER)]

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[Any, RLoraConfig] | None:
        """
        Add a new adapter to the base model, or load that of `lora_model_dir`.

        Returns:
            `tuple`: The model (`None` with `config_only`) and the configuration; or `None` for other adapters, which
            axolotl or another plugin loads.

        Raises:
            ValueError: If a setting is refused, or `lora_model_dir` has an adapter of another method.
        """
        if cfg.get("adapter") != ADAPTER:
            return None
        config = adapter_config(cfg)
        if config_only:
            return None, config
        if is_deepspeed_zero3_enabled() and not inference:
            raise ValueError(
                "DeepSpeed ZeRO-3 can't be used with `adapter: rlora` in axolotl, which would save an adapter without "
                "the values that R-LoRA subtracts. Use ZeRO-1 or 2, or `rlora train --accelerate_config zero3`."
            )

        options = {}
        if cfg.get("peft_autocast_adapter_dtype") is not None:
            options["autocast_adapter_dtype"] = cfg.get("peft_autocast_adapter_dtype")
        folder = cfg.get("lora_model_dir")
        if not folder:
            return get_peft_model(model, config, **options), config
        loaded = PeftModel.from_pretrained(model, folder, is_trainable=not inference, **options)
        found = loaded.peft_config["default"]
        if not isinstance(found, RLoraConfig):
            raise ValueError(
                f"`lora_model_dir: {folder}` has an adapter of PEFT's method {found.peft_type}, and `adapter: rlora` "
                "loads R-LoRA. Set `adapter` to its method."
            )
        return loaded, found

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """Where there is evaluation, write the mean head weights by layer to `head_usage.json` in `output_dir`."""
        if cfg.get("adapter") != ADAPTER or trainer.eval_dataset is None:
            return []
        from ..trainer.callbacks import HeadUsageCallback

        callback = HeadUsageCallback(path=Path(cfg.get("output_dir")) / "head_usage.json")
        callback.start(trainer.model, trainer.args.device)  # the trainer has been made, and calls no `on_init_end`
        return [callback]

    def post_train_unload(self, cfg: Any) -> None:
        """
        Check the saved adapter as a pull does.

        Raises:
            AdapterCheckError: If it is incomplete or not finite.
        """
        if cfg.get("adapter") != ADAPTER or int(os.environ.get("RANK", "0")) != 0:
            return
        folder = Path(cfg.get("output_dir"))
        if (folder / WEIGHTS_NAME).is_file():
            checked = check_adapter(folder)
            logger.info(f"The adapter in {folder} is complete: {len(checked.layers)} layers, {checked.digest}.")
