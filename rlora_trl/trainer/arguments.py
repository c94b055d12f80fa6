"""Command-line arguments: the fields of `RLoraConfig` beside TRL's `ModelConfig`, for TRL's argument parser."""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from typing import Any, get_type_hints

from peft import PeftConfig
from trl import ModelConfig

from ..tuner import RLoraConfig


# How each argument of another shape than its field is written on the command line.
_ARGUMENT_TYPES: dict[str, Any] = {
    "target_modules": list[str] | None,
    "exclude_modules": list[str] | None,
    "layers_to_transform": list[int] | None,
    "layers_pattern": list[str] | None,
    "tasks": list[str] | None,
    "trainable_token_indices": list[int] | None,
    "init_weights": str,
    "rank_pattern": str | None,
    "alpha_pattern": str | None,
}
# ModelConfig already has these two, so they stay there.
_SHARED = ("lora_alpha", "use_rslora")
# Arguments of ModelConfig that configure LoRA, and what R-LoRA has in their place.
_LORA_ONLY = {
    "use_peft": "nothing: R-LoRA is always on",
    "lora_r": "--r",
    "lora_dropout": "--head_dropout",
    "lora_target_modules": "--target_modules",
    "lora_target_parameters": "nothing: R-LoRA adapts linear layers",
    "lora_modules_to_save": "--modules_to_save",
    "use_dora": "nothing: R-LoRA has no such variant",
}


def _rlora_fields() -> list[tuple[str, Any, Any]]:
    inherited = {entry.name for entry in fields(PeftConfig)} | {"peft_type"}
    entries = []
    hints = get_type_hints(RLoraConfig)
    for entry in fields(RLoraConfig):
        name = entry.name
        if name in inherited or name in _SHARED:
            continue
        default = None if entry.default is MISSING else entry.default
        help_text = entry.metadata["help"]
        if name in ("rank_pattern", "alpha_pattern"):
            help_text += " As JSON."
        entries.append(
            (name, _ARGUMENT_TYPES.get(name, hints[name]), field(default=default, metadata={"help": help_text}))
        )
    return entries


RLoraArguments = make_dataclass("RLoraArguments", _rlora_fields(), namespace={"__module__": __name__})
RLoraArguments.__doc__ = "The fields of [`RLoraConfig`] as command-line arguments."


@dataclass
class RLoraModelConfig(ModelConfig):
    """
    TRL's `ModelConfig` with R-LoRA's default for `use_rslora`.

    Raises:
        ValueError: If an argument is set that configures LoRA; the message names R-LoRA's.
    """

    use_rslora: bool = field(
        default=True, metadata={"help": "Scale by `lora_alpha / sqrt(r)` rather than by `lora_alpha / r`."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, instead in _LORA_ONLY.items():
            if getattr(self, name) != ModelConfig.__dataclass_fields__[name].default:
                raise ValueError(
                    f"`--{name} {getattr(self, name)}` configures LoRA, and this command trains R-LoRA. In its place: "
                    f"{instead}."
                )


def _one_or_many(value: list[Any] | None) -> Any:
    """A single name may be a regular expression or "all-linear", which PEFT takes as a string."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _mapping(name: str, value: str | dict | None) -> dict:
    if not value:
        return {}
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(
            f"`--{name}` must be a JSON object such as '{{\"down_proj\": 8}}', got {value!r} ({error})."
        ) from error
    if not isinstance(parsed, dict):
        raise ValueError(f"`--{name}` must be a JSON object such as '{{\"down_proj\": 8}}', got {value!r}.")
    return parsed


def rlora_config_from_arguments(rlora_args: Any, model_args: ModelConfig) -> RLoraConfig:
    """
    The configuration of the adapter that the command line describes.

    Args:
        rlora_args ([`RLoraArguments`]): R-LoRA's own arguments.
        model_args ([`RLoraModelConfig`]): TRL's, which have `lora_alpha`, `use_rslora` and `lora_task_type`.

    Raises:
        ValueError: If a pattern is not a JSON object, or a field is outside its range.
    """
    values = dict(vars(rlora_args))
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        values[name] = _one_or_many(values[name])
    for name in ("rank_pattern", "alpha_pattern"):
        values[name] = _mapping(name, values[name])
    if str(values["init_weights"]).lower() == "false":
        values["init_weights"] = False
    return RLoraConfig(
        **values,
        lora_alpha=model_args.lora_alpha,
        use_rslora=model_args.use_rslora,
        task_type=model_args.lora_task_type,
    )
