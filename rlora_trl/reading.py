"""
Reads untrusted contents, JSON, YAML and the header of a safetensors file, within limits on size, depth and values.

Reading takes time in proportion to the size, and gives plain values: dictionaries with texts as keys, lists, texts,
numbers, booleans and `None`. Whatever else a file has ends in one error, [`AdapterCheckError`].

safetensors itself checks that tensors fill the file without holes or overlaps. Duplicate keys, which programs may read
differently, are refused here. This module imports neither PyTorch nor PEFT.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open


MIB = 2**20
JSON_LIMIT = 16 * MIB
# A tensor takes about 150 bytes of the header: room for `_MAX_TENSORS`.
HEADER_LIMIT = 16 * MIB

_MAX_TENSORS, _MAX_NAME, _MAX_DIMENSIONS, _MAX_SIZE = 50_000, 512, 8, 2**40
_MAX_DEPTH, _MAX_ELEMENTS = 32, 1_000_000
# transformers writes `model_max_length` of tokenizers without a limit as an integer of 31 digits.
_MAX_DIGITS = 64
# Strings as a whole, and what separates values outside of them.
_JSON_MARKS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{},]', re.DOTALL)
_MAX_YAML_VALUES = 250_000
# libyaml's parser is twenty times as fast, where PyYAML was built with it.
_YamlParser = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_YAML_WORDS: dict[str, bool | None] = {
    form: value
    for words, value in (("~ null", None), ("true yes on", True), ("false no off", False))
    for word in words.split()
    for form in (word, word.capitalize(), word.upper())
} | {"": None}
_YAML_INT = re.compile(r"([-+]?)(0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)")
_YAML_FLOAT = re.compile(r"[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?")
_YAML_NOT_FINITE = dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan) | {
    sign + form: float(f"{sign}inf") for sign in ("", "+", "-") for form in (".inf", ".Inf", ".INF")
}
# Types that PyTorch has, too, as safetensors names them.
_DTYPES = frozenset("BOOL U8 I8 F8_E5M2 F8_E4M3 U16 I16 F16 BF16 U32 I32 F32 U64 I64 F64 C64".split())
# Unicode's categories of characters that show nothing, or change how others are shown.
_ESCAPED = frozenset(("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"))
# Combining marks on one letter; languages need up to four.
_MAX_MARKS = 4
_REMEDY = "Save the adapter again, or download it again."


class AdapterCheckError(ValueError):
    """The files of an adapter are damaged, hostile or inconsistent. None of their contents were used."""


@dataclass(frozen=True)
class TensorEntry:
    """
    Type and shape of a tensor, from the header of a safetensors file.

    Args:
        dtype (`str`): Type of the elements, as safetensors names it, such as `"BF16"`.
        shape (`tuple[int, ...]`): The shape.
    """

    dtype: str
    shape: tuple[int, ...]


def printable(text: str, *, keep: str = "") -> str:
    """
    Escape what does more on a terminal than show a character, for text of unknown origin.

    Letters, digits and symbols of all languages stay as they are. Escaped, as in `"\\x1b"` and `"\\u202e"`, are
    control characters (`ESC`, tabs and line ends among them), format characters (those that reverse the direction of
    writing among them), separators of lines and paragraphs, surrogates, characters of private use or without a
    meaning, and all but the first few of a run of combining marks, which would cover the lines above and below.

    Args:
        text (`str`): The text.
        keep (`str`, *optional*): Characters to leave as they are, such as `"\\n"` for text of several lines.

    Returns:
        `str`: The text on one line, unless `keep` has line ends. Backslashes are not doubled.
    """
    if text.isascii() and text.isprintable():
        return text

    shown, marks = [], 0
    for character in text:
        category = unicodedata.category(character)
        marks = marks + 1 if category in ("Mn", "Me") else 0
        is_safe = category not in _ESCAPED and marks <= _MAX_MARKS
        shown.append(character if is_safe or character in keep else character.encode("unicode_escape").decode())
    return "".join(shown)


def first_few(names: Iterable[str], limit: int = 3) -> str:
    """The first `limit` sorted names, made [`printable`], and the number of the others, for a message."""
    ordered = sorted(names)
    listed = ", ".join(printable(_cut(name, _MAX_NAME)) for name in ordered[:limit])
    return listed if len(ordered) <= limit else f"{listed} and {len(ordered) - limit} more"


def shorten(value: object, limit: int = 80) -> str:
    """`repr` of a value for a message, [`printable`] and cut to `limit` characters: the value may be huge."""
    text = repr(_cut(value, limit) if isinstance(value, str) else value)
    return printable(_cut(text, limit, limit + 6))


def _cut(text: str, limit: int, most: int | None = None) -> str:
    return text if len(text) <= (most or limit) else text[:limit] + "..."


def check_regular_file(path: str | Path, limit: int) -> int:
    """
    Check a file that is about to be read.

    Args:
        path (`str` or `Path`): The file.
        limit (`int`): The most bytes that it may have.

    Returns:
        `int`: Its size in bytes.

    Raises:
        AdapterCheckError: If the file is missing, is not a regular file (a pipe would block), or has more than `limit`
            bytes.
    """
    name = printable(str(path))
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise AdapterCheckError(f"{name} can't be read ({error}). {_REMEDY}") from error
    if not stat.S_ISREG(status.st_mode):
        raise AdapterCheckError(f"{name} is not a regular file. Replace it by the file itself.")
    if status.st_size > limit:
        raise AdapterCheckError(
            f"{name} has {status.st_size} bytes, and at most {limit} are read. It is not the file of an adapter."
        )
    return status.st_size


def read_bytes(path: str | Path, limit: int) -> bytes:
    """
    Contents of a file of at most `limit` bytes.

    Raises:
        AdapterCheckError: If the file is larger, or can't be read.
    """
    name = printable(str(path))
    check_regular_file(path, limit)
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise AdapterCheckError(f"{name} can't be read ({error}). {_REMEDY}") from error
    # The file may have grown since its size was checked.
    if len(data) > limit:
        raise AdapterCheckError(f"{name} has more than {limit} bytes. It is not the file of an adapter.")
    return data


def read_json(path: str | Path, *, limit: int = JSON_LIMIT) -> Any:
    """
    Read a JSON file that may be hostile.

    Args:
        path (`str` or `Path`): The file.
        limit (`int`, *optional*, defaults to 16 MiB): The most bytes it may have.

    Returns:
        `Any`: Dictionaries, lists, strings, finite numbers, booleans and `None`.

    Raises:
        AdapterCheckError: If the file is larger than `limit`, is not JSON in UTF-8, is nested more than 32 deep, has a
            key twice in one object, NaN, infinity or an integer of more than 64 digits.
    """
    return parse_json(read_bytes(path, limit), printable(str(path)))


def parse_json(data: bytes, source: str) -> Any:
    """
    Parse JSON that may be hostile.

    Args:
        data (`bytes`): The JSON.
        source (`str`): Where it comes from, for messages.

    Returns:
        `Any`: As [`read_json`].

    Raises:
        AdapterCheckError: As [`read_json`].
    """
    _check_elements(data, source)

    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_int=_bounded_int,
            parse_float=_finite_float,
            parse_constant=_finite_float,
        )
        too_deep = _is_deeper(value, _MAX_DEPTH)
        if b"\\u" in data and not too_deep:
            _check_characters(value)
    except RecursionError:
        too_deep = True
    except ValueError as error:  # of JSON and of Unicode, and those raised below
        raise AdapterCheckError(f"{source} is not valid JSON: {shorten(str(error), 200)}. {_REMEDY}") from error
    if too_deep:
        raise AdapterCheckError(f"{source} is nested more than {_MAX_DEPTH} deep. It is not the file of an adapter.")
    return value


def split_json_list(data: bytes, source: str) -> Iterator[bytes]:
    """
    Split a list in JSON without parsing its elements, one of which may be hostile.

    Args:
        data (`bytes`): The JSON.
        source (`str`): Where it comes from, for messages.

    Yields:
        `bytes`: The JSON of one element, which [`parse_json`] checks.

    Raises:
        AdapterCheckError: If it is not one list.
    """
    depth, start = 0, 0
    for match in _JSON_MARKS.finditer(data):
        mark = match[0]
        if depth == 0 and (mark != b"[" or data[start : match.start()].strip()):
            break
        if mark in (b"[", b"{"):
            depth += 1
            start = match.end() if depth == 1 else start
        elif mark in (b"]", b"}"):
            depth -= 1
            if depth == 0:
                element = data[start : match.start()]
                if element.strip():
                    yield element
                if data[match.end() :].strip():
                    break
                return
        elif mark == b"," and depth == 1:
            yield data[start : match.start()]
            start = match.end()
    raise AdapterCheckError(f"{source} is not a list in JSON. Try again, or correct the address.")


def _check_elements(data: bytes, source: str) -> None:
    """Count the elements of JSON before it is parsed, which creates an object for each."""
    if sum(map(data.count, (b",", b":", b"[", b"]", b"{", b"}"))) > _MAX_ELEMENTS:
        raise AdapterCheckError(f"{source} has more than {_MAX_ELEMENTS} elements. It is not the file of an adapter.")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"key {shorten(twice)} occurs twice")
    return result


def _check_characters(value: Any) -> None:
    """Refuse half of a surrogate pair: it is not a character, and would fail when the text is written or hashed."""
    json.dumps(value, ensure_ascii=False).encode("utf-8")


def _bounded_int(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"the number {shorten(text)} has more than {_MAX_DIGITS} digits")
    return int(text)


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{shorten(text)} is not a finite number")
    return value


def _is_deeper(value: Any, limit: int) -> bool:
    """Whether lists and dictionaries are nested more than `limit` deep, found without recursion."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(limit):
        children = (child for item in level for child in (item.values() if type(item) is dict else item))
        level = [child for child in children if type(child) is dict or type(child) is list]
    return bool(level)


def parse_yaml(text: str, source: str, *, first_line: int = 1) -> Any:
    """
    Parse YAML that may be hostile: one document of plain values.

    Words for booleans and null, integers and decimal fractions are read as PyYAML reads them. Dates, times and numbers
    to the base 60 stay texts.

    Args:
        text (`str`): The YAML.
        source (`str`): Where it comes from, for messages.
        first_line (`int`, *optional*, defaults to 1): Number of its first line in the source.

    Returns:
        `Any`: Dictionaries with texts as keys, lists, texts, numbers (which may be NaN), booleans and `None`.

    Raises:
        AdapterCheckError: If it is not YAML, has an alias, an anchor, a tag, a key that is not a text or occurs
            twice in one mapping, more than one document, is nested more than 32 deep or has more than 250,000 values.
    """
    line = first_line
    builder = _YamlBuilder()
    try:
        for event in yaml.parse(text, Loader=_YamlParser):
            line = first_line + event.start_mark.line
            builder.add(event)
        _check_characters(builder.documents)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # of PyYAML and of Unicode, and those of the builder
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        line = line if mark is None else first_line + mark.line
        raise AdapterCheckError(
            f"{source}, line {line}, is not YAML of plain values: {shorten(problem, 200)}. Correct it."
        ) from error
    return builder.documents[0] if builder.documents else None


class _YamlBuilder:
    """Values from the events of a YAML parser: one pass, without PyYAML's constructors."""

    def __init__(self) -> None:
        self.documents: list[Any] = []
        self.items = self.documents  # of the open list or mapping; keys and values of a mapping alternate
        self.in_mapping = False
        self.parents: list[tuple[list[Any], bool]] = []
        self.count = 0

    def add(self, event: yaml.Event) -> None:
        kind = type(event)
        is_key = self.in_mapping and len(self.items) % 2 == 0
        if kind is yaml.ScalarEvent:
            self._check_node(event)
            is_plain = event.implicit[0]
            value = _yaml_scalar(event.value) if is_plain else event.value
            if is_key and (not isinstance(value, str) or (is_plain and value == "<<")):
                raise ValueError(f"the key {event.value[:80]!r} is not a text; put it into quotes")
            self.items.append(value)
        elif kind is yaml.SequenceStartEvent or kind is yaml.MappingStartEvent:
            self._check_node(event)
            if is_key:
                raise ValueError("a list or mapping is a key; use a text")
            if len(self.parents) >= _MAX_DEPTH:
                raise ValueError(f"values are nested more than {_MAX_DEPTH} deep; flatten them")
            self.parents.append((self.items, self.in_mapping))
            self.items, self.in_mapping = [], kind is yaml.MappingStartEvent
        elif kind is yaml.SequenceEndEvent or kind is yaml.MappingEndEvent:
            items = self.items
            value = _unique_keys(list(zip(items[::2], items[1::2], strict=True))) if self.in_mapping else items
            self.items, self.in_mapping = self.parents.pop()
            self.items.append(value)
        elif kind is yaml.AliasEvent:
            # Aliases of aliases grow without bound when they are written out.
            raise ValueError("an alias, which no card needs; write the value out")
        elif kind is yaml.DocumentStartEvent and self.documents:
            raise ValueError("a second document begins; keep one")

    def _check_node(self, event: yaml.NodeEvent) -> None:
        self.count += 1
        if self.count > _MAX_YAML_VALUES:
            raise ValueError(f"it has more than {_MAX_YAML_VALUES} values; shorten it")
        if event.anchor is not None or event.tag is not None:
            raise ValueError("a tag (`!`) or an anchor (`&`), which no card needs; write the value alone")


def _yaml_scalar(text: str) -> Any:
    """The value of a text without quotes."""
    if text in _YAML_WORDS:
        return _YAML_WORDS[text]
    if len(text) > _MAX_DIGITS or text[0] not in "+-.0123456789":
        return text

    try:
        if match := _YAML_INT.fullmatch(text):
            digits = match[2].replace("_", "")
            return int(match[1] + digits, {"0b": 2, "0x": 16}.get(digits[:2], 8 if digits[0] == "0" else 10))
        if _YAML_FLOAT.fullmatch(text):
            return float(text.replace("_", ""))
    except ValueError:  # only underscores where digits should be
        return text
    return _YAML_NOT_FINITE.get(text, text)


def read_safetensors_header(path: str | Path, *, limit: int | None = None) -> dict[str, TensorEntry]:
    """
    Read and check the header of a safetensors file; the tensors themselves are not read.

    Args:
        path (`str` or `Path`): The file.
        limit (`int`, *optional*): The most bytes that the whole file may have.

    Returns:
        `dict[str, TensorEntry]`: Type and shape of each tensor, by name.

    Raises:
        AdapterCheckError: If the file is truncated, is not safetensors, or its tensors leave holes, overlap or do not
            fill it exactly.
    """
    source = printable(str(path))
    # The checks of safetensors: overlaps, holes, unknown types, and inconsistent sizes.
    size = check_regular_file(path, 2**63 if limit is None else limit)
    try:
        with open(path, "rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            # The largest header that safetensors reads takes gigabytes when it is parsed.
            if HEADER_LIMIT < header_size <= size - 8:
                raise AdapterCheckError(
                    f"{source} has a header of {header_size} bytes, and at most {HEADER_LIMIT} are read. It is not "
                    "the file of an adapter."
                )
            header = file.read(min(header_size, HEADER_LIMIT))
            _check_elements(header, f"The header of {source}")
            with safe_open(str(path), framework="np") as tensors:
                count = len(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise AdapterCheckError(
            f"{source} is truncated or not a safetensors file: {shorten(str(error), 300)}. {_REMEDY}"
        ) from error

    # The header again, for parts that programs may read differently.
    try:
        if count > _MAX_TENSORS:
            raise AdapterCheckError(f"it has {count} tensors, more than {_MAX_TENSORS}. {_REMEDY}")
        entries = parse_json(header, "its header")
        entries.pop("__metadata__", None)
        return {name: _tensor_entry(name, entry) for name, entry in entries.items()}
    except AdapterCheckError as error:
        raise AdapterCheckError(f"{source} is not a safetensors file of an adapter: {error}") from error


def _tensor_entry(name: str, entry: Any) -> TensorEntry:
    """Check an entry that safetensors accepts, but PyTorch or another program may not."""
    if not name or len(name) > _MAX_NAME or not name.isprintable():
        raise AdapterCheckError(f"{shorten(name)} is not the name of a tensor. {_REMEDY}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise AdapterCheckError(
            f"the entry of {name} must have `dtype`, `shape` and `data_offsets`, got {shorten(entry)}. {_REMEDY}"
        )
    dtype, shape = entry["dtype"], entry["shape"]
    # A tensor without elements may claim any size in its other dimensions.
    if dtype not in _DTYPES or len(shape) > _MAX_DIMENSIONS or max(shape, default=0) > _MAX_SIZE:
        raise AdapterCheckError(
            f"{name} must have a type of {', '.join(sorted(_DTYPES))} and at most {_MAX_DIMENSIONS} dimensions of at "
            f"most {_MAX_SIZE} elements, got {shorten(entry)}. {_REMEDY}"
        )
    return TensorEntry(dtype, tuple(shape))
