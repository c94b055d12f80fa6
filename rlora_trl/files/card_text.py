"""Checks of a card's text before its metadata, which is YAML, is parsed."""

from __future__ import annotations

from pathlib import Path

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from ..reading import MIB, AdapterCheckError, read_bytes, shorten


CARD_LIMIT = MIB
METADATA_LIMIT = MIB // 4
_MAX_DEPTH = 32
# libyaml's parser is twenty times as fast, where PyYAML was built with it.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def check_card(path: str | Path) -> ModelCard:
    """
    Read and check a card.

    Args:
        path (`str` or `Path`): The file.

    Returns:
        `huggingface_hub.ModelCard`: The card.

    Raises:
        AdapterCheckError: If the file is too large or not text, or its metadata can't be parsed safely.
    """
    try:
        text = read_bytes(path, CARD_LIMIT).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AdapterCheckError(f"{path} is not text in UTF-8 ({error}). Write the card again.") from error
    return check_card_text(text, str(path))


def check_card_text(text: str, source: str = "the card") -> ModelCard:
    """
    Check the text of a card, as [`check_card`] does.

    Args:
        text (`str`): The card.
        source (`str`, *optional*, defaults to `"the card"`): Where the text comes from, for messages.

    Returns:
        `huggingface_hub.ModelCard`: The card.

    Raises:
        AdapterCheckError: As [`check_card`].
    """
    if len(text) > CARD_LIMIT:
        raise AdapterCheckError(f"{source} has {len(text)} characters, more than {CARD_LIMIT}. Shorten the card.")

    match = REGEX_YAML_BLOCK.search(text)
    if match is not None:
        _check_metadata(match.group(2), source, text.count("\n", 0, match.start(2)) + 1)

    try:
        return ModelCard(text, ignore_metadata_errors=True)
    # YAML's constructors and the classes of huggingface_hub raise all kinds of errors on unexpected values.
    except Exception as error:
        raise AdapterCheckError(
            f"{source} has metadata that can't be read: {shorten(str(error), 200)}. Correct the YAML at its top."
        ) from error


def _check_metadata(block: str, source: str, first_line: int) -> None:
    """Refuse what a safe YAML loader would still expand or recurse into."""
    if len(block) > METADATA_LIMIT:
        raise AdapterCheckError(
            f"{source} has metadata of {len(block)} characters, more than {METADATA_LIMIT}. Shorten it."
        )

    depth = 0
    try:
        for event in yaml.parse(block, Loader=_Loader):
            # Aliases of aliases grow without bound when they are written out.
            if isinstance(event, yaml.AliasEvent):
                line = first_line + event.start_mark.line
                raise AdapterCheckError(
                    f"{source}, line {line}: the metadata has a YAML alias, which no card needs. Write the value out."
                )
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:
                raise AdapterCheckError(f"{source} has metadata nested more than {_MAX_DEPTH} deep. Flatten it.")
    except (yaml.YAMLError, RecursionError) as error:
        raise AdapterCheckError(
            f"{source} has metadata that is not YAML: {shorten(str(error), 200)}. Correct the YAML at its top."
        ) from error
