"""Names of layers, and the values that patterns of a configuration give to them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TypeVar

from ..reading import shorten


_Value = TypeVar("_Value")

# Prefix that PEFT gives to the names in a file, and that names in a plain transformers model lack.
PREFIX = "base_model.model."

_PLAIN = re.compile(r"[\w.-]+")


def is_plain(pattern: str) -> bool:
    """Whether a pattern is the name of a module or the end of one, rather than a regular expression."""
    return _PLAIN.fullmatch(pattern) is not None


def endings(name: str) -> Iterator[str]:
    """The name of a module, and its ends after each dot."""
    yield name
    start = name.find(".")
    while start >= 0:
        yield name[start + 1 :]
        start = name.find(".", start + 1)


def value_for(patterns: Mapping[str, _Value], layer: str, default: _Value) -> _Value:
    """
    The value of the first pattern that matches a layer, as PEFT's `get_pattern_key` finds it.

    Args:
        patterns (`Mapping[str, Any]`): Values by name or regular expression, of the user's own configuration.
        layer (`str`): The layer's name in the model.
        default (`Any`): The value if none matches.

    Raises:
        ValueError: If a pattern is neither a name nor a regular expression that can stand within another one.
    """
    if not patterns:
        return default
    ends = set(endings(layer))
    for pattern, value in patterns.items():
        if pattern in ends or (not is_plain(pattern) and _matches(pattern, layer)):
            return value
    return default


def _matches(pattern: str, layer: str) -> bool:
    try:
        return re.match(rf"(.*\.)?({pattern})$", layer) is not None
    except re.error as error:
        raise ValueError(
            f"{shorten(pattern)} in `rank_pattern` or `alpha_pattern` is not a regular expression for a name's end: "
            rf"{error.msg}. Write the end of a layer's name, such as 'mlp.up_proj', or r'layers\.[0-3]\..*'."
        ) from error


def module_of(tensor: str) -> str | None:
    """
    The module of the base model whose whole weight a tensor is, such as an embedding of a resized vocabulary.

    Args:
        tensor (`str`): A name in a file or a model.

    Returns:
        `str`: The module's name in the base model, or `None` if it is another tensor.
    """
    module, _, leaf = tensor.removeprefix(PREFIX).rpartition(".")
    # With `trainable_token_indices` or `modules_to_save` the embedding is within a wrapper.
    for wrapper in (".base_layer", ".token_adapter", ".original_module", ".modules_to_save"):
        module = module.removesuffix(wrapper)
    return module if leaf == "weight" else None
