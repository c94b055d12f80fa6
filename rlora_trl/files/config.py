"""Reads an untrusted `adapter_config.json`, and checks it before PEFT uses it."""

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypedDict

from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig

from ..reading import MIB, AdapterCheckError, first_few, read_json, shorten
from ..tuner.config import RLoraConfig
from ..tuner.patterns import refuse_expressions


CONFIG_LIMIT = MIB
_MAX_ITEMS, _MAX_TEXT = 10_000, 512
# Fields that PEFT takes for regular expressions: the first two only if they are text rather than a list. It tries all
# of the others for each module, and compiles them again if there are more than 512.
_TARGETS = ("target_modules", "exclude_modules")
_PATTERNS = ("modules_to_save", "layers_pattern", "rank_pattern", "alpha_pattern")
_MAX_PATTERNS = 500
# Fields of a plain LoRA adapter that an export may set.
_EXPORT_FIELDS = frozenset(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r lora_alpha "
    "lora_dropout use_rslora fan_in_fan_out bias target_modules exclude_modules modules_to_save layers_to_transform "
    "layers_pattern rank_pattern alpha_pattern trainable_token_indices runtime_config".split()
)
_LIBRARY = re.compile(r"transformers(\.\w+)*", re.ASCII)

_MAX_FACTOR, _MAX_INDEX = 1e6, 2**31 - 1
# Bounds of the numbers in a field.
_BOUNDS: dict[str, tuple[float, float]] = {
    "r": (1, 16_384),
    "num_heads": (1, 4_096),
    "rank_pattern": (1, 16_384),
    "lora_alpha": (-_MAX_FACTOR, _MAX_FACTOR),
    "alpha_pattern": (-_MAX_FACTOR, _MAX_FACTOR),
    "init_gamma": (-_MAX_FACTOR, _MAX_FACTOR),
    "layers_to_transform": (0, _MAX_INDEX),
    "trainable_token_indices": (0, _MAX_INDEX),
}


class _FieldTypes(TypedDict, total=False):
    """Types of the fields that PEFT uses without a check."""

    r: int | None
    num_heads: int | None
    lora_alpha: int | float | None
    init_gamma: int | float | None
    rank_pattern: dict[str, int] | None
    alpha_pattern: dict[str, int | float] | None
    layers_to_transform: int | list[int] | None
    trainable_token_indices: list[int] | dict[str, list[int]] | None
    saved_embeddings: list[str] | None
    target_modules: str | list[str] | None
    exclude_modules: str | list[str] | None
    modules_to_save: str | list[str] | None
    layers_pattern: str | list[str] | None
    tasks: str | list[str] | None
    base_model_name_or_path: str | None
    revision: str | None


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
    data = _read(path, "RLORA", "Load it with `peft.PeftModel.from_pretrained`, or name an R-LoRA adapter.")

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
    data = _read(path, "LORA", "Export it again.")
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
    refuse_expressions({name: data.get(name) for name in _TARGETS}, str(path), _MAX_ITEMS)
    refuse_expressions({name: data.get(name) for name in _PATTERNS}, str(path), _MAX_PATTERNS)
    return data


def _read(path: Path, method: str, remedy: str) -> dict[str, Any]:
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
        _check_types(data)
        _check_bounds(data)
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


def _check_types(data: Mapping[str, Any]) -> None:
    for name, accepted in _FieldTypes.__annotations__.items():
        value = data.get(name)
        try:
            validate_typed_dict(_FieldTypes, {name: value})  # type: ignore[type-var]
        except StrictDataclassError as error:
            raise AdapterCheckError(
                f"`{name}` must be of type {accepted}, got {shorten(value)}. Correct it, or save the adapter again."
            ) from error
        if isinstance(value, list | dict) and len(value) > _MAX_ITEMS and name != "trainable_token_indices":
            raise AdapterCheckError(f"`{name}` has {len(value)} entries, more than {_MAX_ITEMS}. Shorten it.")


def _check_bounds(data: Mapping[str, Any]) -> None:
    for name, (least, most) in _BOUNDS.items():
        for number in _leaves(data.get(name)):
            if not least <= number <= most:
                raise AdapterCheckError(
                    f"`{name}` must be from {least:.10g} to {most:.10g}, got {shorten(number)}. Correct it, or save "
                    "the adapter again."
                )

    for name in (*_TARGETS, "modules_to_save", "layers_pattern", "tasks", "saved_embeddings"):
        is_expression = isinstance(data.get(name), str) and name in _TARGETS
        for text in _leaves(data.get(name)):
            if not text or (len(text) > _MAX_TEXT and not is_expression):
                raise AdapterCheckError(
                    f"`{name}` must have names of 1 to {_MAX_TEXT} characters, got {len(text)}: {shorten(text)}. "
                    "Correct it, or save the adapter again."
                )
    for name in ("base_model_name_or_path", "revision"):
        text = data.get(name) or ""
        if len(text) > _MAX_TEXT or not text.isprintable():
            raise AdapterCheckError(
                f"`{name}` must be printable text of at most {_MAX_TEXT} characters, got {shorten(text)}. Correct it."
            )


def _leaves(value: Any) -> Iterator[Any]:
    """All values of a field, which may hold one value, a list or an object of values, or null."""
    if isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    elif value is not None:
        yield value
