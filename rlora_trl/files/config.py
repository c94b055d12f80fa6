"""Reads an untrusted `adapter_config.json`, and checks it before PEFT uses it."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import LoraConfig

from ..reading import AdapterCheckError, first_few, read_json, shorten
from ..tuner.config import RLoraConfig
from ..tuner.config_fields import CONFIG_LIMIT, MAX_ITEMS, TARGETS, check_fields
from ..tuner.patterns import refuse_expressions


# Fields that PEFT takes for regular expressions, besides `TARGETS`, which are some only if they are text rather than a
# list. It tries all of them for each module, and compiles them again if there are more than 512.
_PATTERNS = ("modules_to_save", "layers_pattern", "rank_pattern", "alpha_pattern")
_MAX_PATTERNS = 500
# Fields of a plain LoRA adapter that an export may set.
_EXPORT_FIELDS = frozenset(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r lora_alpha "
    "lora_dropout use_rslora fan_in_fan_out bias target_modules target_parameters exclude_modules modules_to_save "
    "layers_to_transform layers_pattern rank_pattern alpha_pattern trainable_token_indices runtime_config".split()
)
_OTHER_METHOD = "Load it with `peft.PeftModel.from_pretrained`, or convert LoRA with `rlora convert`."
_LIBRARY = re.compile(r"transformers(\.\w+)*", re.ASCII)


def read_config(path: Path) -> RLoraConfig:
    """
    Read the configuration of an R-LoRA adapter.

    Args:
        path (`Path`): The file.

    Returns:
        [`RLoraConfig`]: The configuration. Unknown fields are left out, with a warning.

    Raises:
        AdapterCheckError: If the file is not such a configuration, names code to import, or has a value out of range.
    """
    data = read_fields(path, "RLORA", _OTHER_METHOD)

    names = {field.name for field in fields(RLoraConfig)}
    unknown = sorted(set(data) - names - {"runtime_config"})  # which PEFT drops too
    if unknown:
        warnings.warn(
            f"{path} has unknown fields, which are ignored: {shorten(', '.join(unknown), 200)}. It was written by a "
            "newer version; update rlora_trl and peft if results differ.",
            stacklevel=3,
        )

    try:
        return RLoraConfig(**{name: value for name, value in data.items() if name in names})
    # Values of unexpected types raise many kinds of errors.
    except Exception as error:
        raise AdapterCheckError(
            f"{path} is not a valid configuration: {shorten(str(error), 400)} Save the adapter again."
        ) from error


def read_lora_config(path: Path) -> Mapping[str, Any]:
    """
    Read the configuration of a plain LoRA adapter, such as an export.

    Args:
        path (`Path`): The file.

    Returns:
        `Mapping[str, Any]`: The fields.

    Raises:
        AdapterCheckError: If the file is not such a configuration, names code to import, or has a value out of range.
    """
    data = read_fields(path, "LORA", "Export it again.")
    # PEFT imports the module named there.
    if data.get("megatron_config") or data.get("megatron_core") not in (None, "megatron.core"):
        raise AdapterCheckError(
            f"{path} sets `megatron_config` or `megatron_core`, which name code to import. Export it again."
        )
    # Others change the base when PEFT loads them: PiSSA its weights, `layer_replication` the number of its layers.
    defaults = vars(LoraConfig())
    unusual = [
        name
        for name, value in data.items()
        if value and name in defaults and name not in _EXPORT_FIELDS and value != defaults[name]
    ]
    if unusual:
        raise AdapterCheckError(
            f"{path} sets {first_few(unusual)}, which an export never does: it may change the base model, or run for "
            "long. Export it again."
        )
    # PEFT itself loads it, and would run regular expressions.
    refuse_expressions({name: data.get(name) for name in (*TARGETS, "target_parameters")}, str(path), MAX_ITEMS)
    refuse_expressions({name: data.get(name) for name in _PATTERNS}, str(path), _MAX_PATTERNS)
    return data


def read_fields(path: Path, method: str, remedy: str) -> dict[str, Any]:
    """
    Read the fields of a configuration of any kind of adapter.

    Args:
        path (`Path`): The file.
        method (`str`): The `peft_type` that it must have, such as `"LORA"`.
        remedy (`str`): What to do if it has another, for the message.

    Returns:
        `dict[str, Any]`: The fields.

    Raises:
        AdapterCheckError: If the file is not such a configuration, names code to import, or has a value out of range.
    """
    data = read_json(path, limit=CONFIG_LIMIT)
    if not isinstance(data, dict):
        raise AdapterCheckError(
            f"{path} holds a {type(data).__name__}, and a configuration must be a JSON object. Save the adapter again."
        )
    if data.get("peft_type") != method:
        raise AdapterCheckError(
            f"{path} has `peft_type` {shorten(data.get('peft_type'))}, and {method} is expected. {remedy}"
        )
    try:
        _check_auto_mapping(data.get("auto_mapping"))
        check_fields(data)
    except AdapterCheckError as error:
        raise AdapterCheckError(f"{path}: {error}") from error
    return data


def _check_auto_mapping(mapping: Any) -> None:
    if mapping is None:
        return
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    if not isinstance(library, str) or not _LIBRARY.fullmatch(library) or not str(name).isidentifier():
        raise AdapterCheckError(
            f"`auto_mapping` is {shorten(mapping)}, and PEFT would import what it names; only classes of transformers "
            "are accepted. Set `task_type` instead, and save the adapter again."
        )
