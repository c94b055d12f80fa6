"""What is checked of a card before it is parsed or shown: its metadata, which is YAML, and HTML that would act."""

from __future__ import annotations

import html
import re
from pathlib import Path

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from .reading import MIB, AdapterCheckError, read_bytes, shorten


CARD_LIMIT = MIB
METADATA_LIMIT = MIB // 4
_MAX_DEPTH = 32
# libyaml's parser is twenty times as fast, where PyYAML was built with it.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# Characters that browsers skip, so that they hide a word from a search: all controls but line ends and tabs, and
# those of no width.
_INVISIBLE = dict.fromkeys((*range(9), 11, 12, *range(14, 32), 0x7F, 0xAD, *range(0x200B, 0x2010), 0xFEFF))
_SCHEME = r"\s{0,3}".join
# Each stops at the next "<" or after a few characters, so that a search takes time in proportion to the text.
_ACTIVE = {
    "a tag that loads or runs something": re.compile(
        r"<[\s/]{0,8}(?:script|iframe|frame|frameset|object|embed|applet)\b", re.IGNORECASE
    ),
    "an event handler": re.compile(
        r"""<[a-z](?:[^<>"']|"[^"<]*"|'[^'<]*')*?(?<=[\s/"'])on[a-z]{3,24}\s{0,8}=""", re.IGNORECASE
    ),
    "a link that runs a script": re.compile(
        rf"""(?:[(<"'=]|\]:)\s{{0,8}}(?:{_SCHEME("javascript:")}|{_SCHEME("vbscript:")}|data:text/html)""",
        re.IGNORECASE,
    ),
}


def check_card(path: str | Path) -> ModelCard:
    """
    Read and check a card.

    Args:
        path (`str` or `Path`): The file.

    Returns:
        `huggingface_hub.ModelCard`: The card.

    Raises:
        AdapterCheckError: If it is too large or not text, its metadata can't be read safely, or it has scripts.
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
        source (`str`, *optional*): Where it comes from, for messages.
    """
    if len(text) > CARD_LIMIT:
        raise AdapterCheckError(f"{source} has {len(text)} characters, more than {CARD_LIMIT}. Shorten the card.")
    _check_active(text, source)
    match = REGEX_YAML_BLOCK.search(text)
    if match is not None:
        _check_metadata(match.group(2), source, text.count("\n", 0, match.start(2)) + 1)
    try:
        return ModelCard(text, ignore_metadata_errors=True)
    # Whatever YAML's constructors and the classes of huggingface_hub make of values they do not expect.
    except Exception as error:
        raise AdapterCheckError(f"{source} has metadata that can't be read: {shorten(str(error), 200)}") from error


def _check_metadata(block: str, source: str, first_line: int) -> None:
    """Refuse what a safe YAML loader would still expand or recurse into."""
    if len(block) > METADATA_LIMIT:
        raise AdapterCheckError(
            f"{source} has metadata of {len(block)} characters, more than {METADATA_LIMIT}. Shorten it."
        )
    depth = 0
    try:
        for event in yaml.parse(block, Loader=_Loader):
            # References to references grow without bound when they are written out again.
            if isinstance(event, yaml.AliasEvent):
                line = first_line + event.start_mark.line
                raise AdapterCheckError(
                    f"{source}, line {line}: the metadata refers to a part of itself, which no card needs. Write the "
                    "value out."
                )
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:
                raise AdapterCheckError(f"{source} has metadata nested more than {_MAX_DEPTH} deep. Flatten it.")
    except (yaml.YAMLError, RecursionError) as error:
        raise AdapterCheckError(f"{source} has metadata that is not YAML: {shorten(str(error), 200)}") from error


def _check_active(text: str, source: str) -> None:
    # By line, as what stands for a line end in HTML must not count as one.
    lines = [" ".join(html.unescape(html.unescape(line)).split("\n")) for line in text.split("\n")]
    decoded = "\n".join(lines).translate(_INVISIBLE)
    for meaning, pattern in _ACTIVE.items():
        for searched in (text, decoded):
            match = pattern.search(searched)
            if match is not None:
                line = searched.count("\n", 0, match.start()) + 1
                raise AdapterCheckError(
                    f"{source}, line {line}: {shorten(match.group().strip())} is {meaning}, which a card must not "
                    "have. Remove it from the card."
                )
