"""Reading `adapter_config.json` from strangers: what it may say, before PEFT acts on it."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..tuner.config import RLoraConfig
from .patterns import check_pattern
from .reading import MIB, AdapterCheckError, read_json, shorten


CONFIG_LIMIT = MIB
_MAX_RANK, _MAX_HEADS = 16_384, 4_096
_MAX_ITEMS, _MAX_TEXT, _MAX_TOKENS = 10_000, 512, 1_000_000
_MAX_FACTOR = 1e6
# PEFT puts these into expressions of its own, with one repeat more, and tries each on every layer.
_INNER_REPEATS = 2
_LIBRARY = re.compile(r"transformers(\.\w+)*", re.ASCII)
_PLAIN_NAME = re.compile(r"[\w.-]*", re.ASCII)


def read_config(path: Path) -> RLoraConfig:
    """
    Read the configuration of an R-LoRA adapter.

    Args:
        path (`Path`): The file.

    Returns:
        [`RLoraConfig`]: The configuration. Fields that it does not know are left out, with a warning.

    Raises:
        AdapterCheckError: If it is not one, names code to import, or has a value out of range.
    """
    data = _read(path)
    if data.get("peft_type") != "RLORA":
        raise AdapterCheckError(
            f"{path} is of an adapter of type {shorten(data.get('peft_type'))}, and RLORA is expected. Load it with "
            "`peft.PeftModel.from_pretrained`, or name the repository of an R-LoRA adapter."
        )
    _check_tokens(data.get("trainable_token_indices"))
    known = {field.name for field in fields(RLoraConfig)}
    unknown = sorted(set(data) - known - {"runtime_config"})  # which PEFT drops too
    if unknown:
        warnings.warn(
            f"{path} has fields that this version does not know and ignores: {shorten(', '.join(unknown), 200)}. It "
            "was written by a newer version; update rlora_trl and peft if results differ.",
            stacklevel=3,
        )
    try:
        return RLoraConfig(**{name: value for name, value in data.items() if name in known})
    except (ValueError, TypeError) as error:
        raise AdapterCheckError(f"{path} is not a valid configuration: {shorten(str(error), 400)}") from error


def read_lora_config(path: Path) -> Mapping[str, Any]:
    """
    Read the configuration of a plain LoRA adapter, the export of one of ours.

    Raises:
        AdapterCheckError: If it is of another type, names code to import, or has a value out of range.
    """
    data = _read(path)
    if data.get("peft_type") != "LORA":
        raise AdapterCheckError(
            f"{path} is of an adapter of type {shorten(data.get('peft_type'))}, and exports are of type LORA. Export "
            "it again."
        )
    # PEFT imports the module that is named there.
    if data.get("megatron_config") or data.get("megatron_core") not in (None, "megatron.core"):
        raise AdapterCheckError(
            f"{path} sets `megatron_config` or `megatron_core`, which name code to import. Export it again."
        )
    return data


def _read(path: Path) -> dict[str, Any]:
    data = read_json(path, limit=CONFIG_LIMIT)
    if not isinstance(data, dict):
        raise AdapterCheckError(
            f"{path} holds a {type(data).__name__}, and a configuration is an object. Save it again."
        )
    try:
        _check_auto_mapping(data.get("auto_mapping"))
        _check_numbers(data)
        _check_texts(data)
        _check_patterns(data)
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


def _check_numbers(data: Mapping[str, Any]) -> None:
    _check_integer("r", data.get("r"), _MAX_RANK)
    for name, value in _mapping(data, "rank_pattern").items():
        _check_integer(f"rank_pattern[{shorten(name)}]", value, _MAX_RANK)
    _check_integer("num_heads", data.get("num_heads"), _MAX_HEADS)
    factors = {name: data.get(name) for name in ("lora_alpha", "init_gamma")}
    factors |= {f"alpha_pattern[{shorten(name)}]": value for name, value in _mapping(data, "alpha_pattern").items()}
    for name, value in factors.items():
        if value is not None and not (_is_number(value) and abs(value) <= _MAX_FACTOR):
            raise AdapterCheckError(f"`{name}` must be a number of at most {_MAX_FACTOR:g}, got {shorten(value)}.")
    indices = data.get("layers_to_transform")
    for value in indices if isinstance(indices, list) else [indices]:
        if value is not None and not _is_index(value):
            raise AdapterCheckError(f"`layers_to_transform` must be indices of layers, got {shorten(indices)}.")


def _check_integer(name: str, value: Any, limit: int) -> None:
    if value is not None and not (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= limit):
        raise AdapterCheckError(f"`{name}` must be an integer from 1 to {limit}, got {shorten(value)}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _mapping(data: Mapping[str, Any], field: str) -> dict[str, Any]:
    value = data.get(field)
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > _MAX_ITEMS:
        raise AdapterCheckError(f"`{field}` must be an object of at most {_MAX_ITEMS} entries, got {shorten(value)}.")
    return value


def _texts(data: Mapping[str, Any], field: str) -> Collection[str]:
    """A field that may be a text or a list of texts, as a list."""
    value = data.get(field)
    if value is None:
        return []
    listed = value if isinstance(value, list) else [value]
    if len(listed) > _MAX_ITEMS or not all(isinstance(item, str) and item for item in listed):
        raise AdapterCheckError(
            f"`{field}` must be a text or a list of at most {_MAX_ITEMS} texts, got {shorten(value)}."
        )
    return listed


def _check_texts(data: Mapping[str, Any]) -> None:
    for field in ("base_model_name_or_path", "revision"):
        value = data.get(field)
        if value is not None and not (isinstance(value, str) and len(value) <= _MAX_TEXT and value.isprintable()):
            raise AdapterCheckError(
                f"`{field}` must be a text of at most {_MAX_TEXT} characters, got {shorten(value)}."
            )
    for task in _texts(data, "tasks"):
        if len(task) > _MAX_TEXT:
            raise AdapterCheckError(f"`tasks` has a name of {len(task)} characters, more than {_MAX_TEXT}.")


def _check_patterns(data: Mapping[str, Any]) -> None:
    # As a text these are expressions, as a list names.
    for field in ("target_modules", "exclude_modules"):
        texts = _texts(data, field)
        if isinstance(data.get(field), str):
            check_pattern(data[field], field)
        elif any(len(text) > _MAX_TEXT for text in texts):
            raise AdapterCheckError(f"`{field}` has a name of more than {_MAX_TEXT} characters.")
    # And these are expressions always.
    for field in ("modules_to_save", "layers_pattern"):
        for text in _texts(data, field):
            _check_inner_pattern(text, field)
    for field in ("rank_pattern", "alpha_pattern"):
        for text in _mapping(data, field):
            _check_inner_pattern(text, field)


def _check_inner_pattern(text: str, field: str) -> None:
    if len(text) > _MAX_TEXT or not _PLAIN_NAME.fullmatch(text):
        check_pattern(text, field, _INNER_REPEATS)


def _check_tokens(value: Any) -> None:
    if value is None:
        return
    lists = list(value.values()) if isinstance(value, dict) else [value]
    if len(lists) > 100 or not all(isinstance(rows, list) and len(rows) <= _MAX_TOKENS for rows in lists):
        raise AdapterCheckError(
            f"`trainable_token_indices` must be a list of indices, or such lists by layer, got {shorten(value)}."
        )
    if not all(_is_index(row) for rows in lists for row in rows):
        raise AdapterCheckError("`trainable_token_indices` must hold indices of tokens, integers from 0.")
