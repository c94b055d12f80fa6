"""Checks the fields of an `adapter_config.json`, which may be hostile, before anything uses them."""

# Without `from __future__ import annotations`: annotations are checked, and strings would be skipped.
from collections.abc import Iterator, Mapping
from typing import Any, TypedDict

from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassError

from ..reading import MIB, AdapterCheckError, shorten


CONFIG_LIMIT = MIB
MAX_ITEMS, _MAX_TEXT = 10_000, 512
# Text in these is a regular expression, which may be longer than a name.
TARGETS = ("target_modules", "exclude_modules")

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
    use_rslora: bool | None
    share_a: bool | None
    fan_in_fan_out: bool | None
    layers_to_transform: int | list[int] | None
    trainable_token_indices: list[int] | dict[str, list[int]] | None
    saved_embeddings: list[str] | None
    target_modules: str | list[str] | None
    exclude_modules: str | list[str] | None
    target_parameters: list[str] | None
    modules_to_save: str | list[str] | None
    layers_pattern: str | list[str] | None
    tasks: str | list[str] | None
    base_model_name_or_path: str | None
    revision: str | None
    task_type: str | None


def check_fields(data: Mapping[str, Any]) -> None:
    """
    Check types and ranges of the fields that PEFT or this package uses without a check.

    Args:
        data (`Mapping[str, Any]`): The fields.

    Raises:
        AdapterCheckError: If a field has another type, or a value out of its range; the message names it.
    """
    _check_types(data)
    _check_bounds(data)


def _check_types(data: Mapping[str, Any]) -> None:
    for name, accepted in _FieldTypes.__annotations__.items():
        value = data.get(name)
        try:
            validate_typed_dict(_FieldTypes, {name: value})  # type: ignore[type-var]
        except StrictDataclassError as error:
            raise AdapterCheckError(
                f"`{name}` must be of type {accepted}, got {shorten(value)}. Correct it, or save the adapter again."
            ) from error
        if isinstance(value, list | dict) and len(value) > MAX_ITEMS and name != "trainable_token_indices":
            raise AdapterCheckError(f"`{name}` has {len(value)} entries, more than {MAX_ITEMS}. Shorten it.")


def _check_bounds(data: Mapping[str, Any]) -> None:
    for name, (least, most) in _BOUNDS.items():
        for number in _leaves(data.get(name)):
            if not least <= number <= most:
                raise AdapterCheckError(
                    f"`{name}` must be from {least:.10g} to {most:.10g}, got {shorten(number)}. Correct it, or save "
                    "the adapter again."
                )

    for name in (*TARGETS, "target_parameters", "modules_to_save", "layers_pattern", "tasks", "saved_embeddings"):
        is_expression = isinstance(data.get(name), str) and name in TARGETS
        for text in _leaves(data.get(name)):
            if not text or (len(text) > _MAX_TEXT and not is_expression):
                raise AdapterCheckError(
                    f"`{name}` must have names of 1 to {_MAX_TEXT} characters, got {len(text)}: {shorten(text)}. "
                    "Correct it, or save the adapter again."
                )
    for name in ("base_model_name_or_path", "revision", "task_type"):
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
