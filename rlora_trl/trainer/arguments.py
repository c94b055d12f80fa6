"""Command-line arguments for TRL's parser: the fields of `RLoraConfig`, and TRL's `ModelConfig`."""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from typing import Any, get_type_hints

from peft import PeftConfig
from trl import ModelConfig

from ..requirements import require_bitsandbytes, require_model_folder
from ..tuner import RLoraConfig


# Types on the command line, of fields whose own type the parser can't read.
_ARGUMENT_TYPES: dict[str, Any] = {
    "target_modules": list[str] | None,
    "exclude_modules": list[str] | None,
    "layers_to_transform": list[int] | None,
    "layers_pattern": list[str] | None,
    "tasks": list[str] | None,
    "saved_embeddings": list[str] | None,
    "trainable_token_indices": list[int] | None,
    "init_weights": str,
    "rank_pattern": str | None,
    "alpha_pattern": str | None,
}
# Arguments that `ModelConfig` already has.
_SHARED = ("lora_alpha", "use_rslora")
_PATTERNS = ("rank_pattern", "alpha_pattern")
# Arguments of `ModelConfig` that configure LoRA, and their replacements.
_LORA_ONLY = {
    "use_peft": "nothing: R-LoRA is always on",
    "lora_r": "--r",
    "lora_dropout": "--head_dropout",
    "lora_target_modules": "--target_modules",
    "lora_target_parameters": "--target_parameters",
    "lora_modules_to_save": "--modules_to_save",
    "use_dora": "nothing: R-LoRA has no such variant",
}


def _rlora_fields() -> list[tuple[str, Any, Any]]:
    skipped = {entry.name for entry in fields(PeftConfig)} | {"peft_type", *_SHARED}
    types = {**get_type_hints(RLoraConfig), **_ARGUMENT_TYPES}
    entries = []
    for entry in fields(RLoraConfig):
        if entry.name in skipped:
            continue
        default = None if entry.default is MISSING else entry.default
        help_text = entry.metadata["help"] + (" As JSON." if entry.name in _PATTERNS else "")
        entries.append((entry.name, types[entry.name], field(default=default, metadata={"help": help_text})))
    return entries


RLoraArguments = make_dataclass("RLoraArguments", _rlora_fields(), namespace={"__module__": __name__})
RLoraArguments.__doc__ = "The fields of [`RLoraConfig`] as command-line arguments."


@dataclass
class RLoraModelConfig(ModelConfig):
    """
    TRL's `ModelConfig` with R-LoRA's default for `use_rslora`.

    Raises:
        ValueError: If an argument is set that configures LoRA; the message names its replacement.
        FileNotFoundError: If the model is a path, and nothing is there.
        ImportError: If the base is to be quantized, and bitsandbytes is not installed.
    """

    use_rslora: bool = field(
        default=True, metadata={"help": "Scale by `lora_alpha / sqrt(r)` instead of `lora_alpha / r`."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, replacement in _LORA_ONLY.items():
            if getattr(self, name) != ModelConfig.__dataclass_fields__[name].default:
                raise ValueError(
                    f"`--{name} {getattr(self, name)}` configures LoRA, and this command trains R-LoRA. Use instead: "
                    f"{replacement}."
                )
        if self.model_name_or_path is not None:
            require_model_folder(self.model_name_or_path, "Give the folder of a model, or its name on the Hub.")
        for name in ("load_in_4bit", "load_in_8bit"):
            if getattr(self, name):
                require_bitsandbytes(f"`--{name}`")


def _one_or_many(value: list[Any] | None) -> Any:
    """A single name may be a regular expression or "all-linear", which PEFT takes as a string."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _mapping(name: str, value: str | dict | None) -> dict:
    try:
        parsed = json.loads(value) if isinstance(value, str) and value else value or {}
    except json.JSONDecodeError:
        parsed = None
    if not isinstance(parsed, dict):
        raise ValueError(
            f"`--{name}` must be a JSON object in quotes, such as '{{\"down_proj\": 8}}', got {value!r}. Correct it."
        )
    return parsed


def rlora_config_from_arguments(rlora_args: Any, model_args: ModelConfig) -> RLoraConfig:
    """
    Build the configuration of the adapter from the command line.

    Args:
        rlora_args ([`RLoraArguments`]): The fields of [`RLoraConfig`].
        model_args ([`RLoraModelConfig`]): Has `lora_alpha`, `use_rslora` and `lora_task_type`.

    Returns:
        [`RLoraConfig`].

    Raises:
        ValueError: If a pattern is not a JSON object, or a field is outside its range.
    """
    values = dict(vars(rlora_args))
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        values[name] = _one_or_many(values[name])
    for name in _PATTERNS:
        values[name] = _mapping(name, values[name])
    if str(values["init_weights"]).lower() == "false":
        values["init_weights"] = False
    return RLoraConfig(
        **values,
        lora_alpha=model_args.lora_alpha,
        use_rslora=model_args.use_rslora,
        task_type=model_args.lora_task_type,
    )
