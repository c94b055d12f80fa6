"""Reads the metadata of cards, which is YAML of strangers. Nothing here renders a card or parses HTML in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.repocard import REGEX_YAML_BLOCK

from ..reading import MIB, AdapterCheckError, parse_yaml, printable, read_bytes, shorten


# Room for the results of thousands of tasks.
CARD_LIMIT = 4 * MIB
METADATA_LIMIT = 2 * MIB
# Arguments of `huggingface_hub.ModelCardData` that are not metadata. As keys of a card they break its constructor.
_RESERVED = ("self", "ignore_metadata_errors", "eval_results")


def read_card_text(path: str | Path) -> str:
    """
    Read the text of a card, with its line ends unchanged.

    Args:
        path (`str` or `Path`): The file.

    Raises:
        AdapterCheckError: If the file is larger than 4 MiB, or is not text in UTF-8.
    """
    try:
        return read_bytes(path, CARD_LIMIT).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AdapterCheckError(
            f"{printable(str(path))} is not text in UTF-8 ({error}). Write the card again."
        ) from error


def check_card(path: str | Path) -> dict[str, Any]:
    """
    Read and check a card.

    Args:
        path (`str` or `Path`): The file.

    Returns:
        `dict[str, Any]`: Its metadata, empty if it has none. Values are plain, and may have unexpected types.

    Raises:
        AdapterCheckError: If the file is too large or not text, or `huggingface_hub` could not read its metadata.
    """
    return check_card_text(read_card_text(path), printable(str(path)))


def check_card_text(text: str, source: str = "the card") -> dict[str, Any]:
    """
    Check the text of a card, as [`check_card`] does.

    Args:
        text (`str`): The card.
        source (`str`, *optional*, defaults to `"the card"`): Where the text comes from, for messages.

    Returns:
        `dict[str, Any]`: As [`check_card`].

    Raises:
        AdapterCheckError: As [`check_card`].
    """
    if len(text) > CARD_LIMIT:
        raise AdapterCheckError(f"{source} has {len(text)} characters, more than {CARD_LIMIT}. Shorten the card.")
    match = REGEX_YAML_BLOCK.search(text)
    if match is None:
        return {}

    block = match.group(2)
    if len(block) > METADATA_LIMIT:
        raise AdapterCheckError(
            f"{source} has metadata of {len(block)} characters, more than {METADATA_LIMIT}. Shorten it."
        )
    metadata = parse_yaml(block, f"The metadata of {source}", first_line=text.count("\n", 0, match.start(2)) + 1)
    return check_metadata({} if metadata is None else metadata, source)


def check_metadata(metadata: Any, source: str) -> dict[str, Any]:
    """
    Check that the classes of `huggingface_hub` can hold the metadata of a card.

    Args:
        metadata (`Any`): Plain values, from YAML or JSON.
        source (`str`): Where they come from, for messages.

    Returns:
        `dict[str, Any]`: The metadata. Values may have unexpected types otherwise.

    Raises:
        AdapterCheckError: If it is not a mapping, has a key that its constructors reserve, `tags` that are neither a
            text nor a list, or a result whose `source` has no address.
    """
    if not isinstance(metadata, dict):
        raise AdapterCheckError(
            f"{source} has metadata that can't be read: it must be a mapping, got {shorten(metadata)}. Correct it."
        )
    for key in _RESERVED:
        if key in metadata:
            raise AdapterCheckError(f"{source} has metadata that can't be read: a key is `{key}`. Remove it.")
    if not isinstance(metadata.get("tags"), str | list | None):
        raise AdapterCheckError(
            f"{source} has metadata that can't be read: `tags` must be a list of texts, got "
            f"{shorten(metadata['tags'])}. Correct it."
        )

    for model in _mappings(metadata.get("model-index")):
        for result in _mappings(model.get("results")):
            address = result.get("source") or {"url": ""}
            if not isinstance(address, Mapping) or address.get("url") is None:
                raise AdapterCheckError(
                    f"{source} has metadata that can't be read: the `source` of a result in `model-index` must have "
                    f"a `url`, got {shorten(address)}. Correct it."
                )
    return metadata


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list) else []
