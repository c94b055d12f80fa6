"""
Reads untrusted files, JSON and the header of a safetensors file, within limits on size, depth and values.

safetensors itself checks that tensors fill the file without holes or overlaps. Duplicate keys, which programs may read
differently, are refused here. This module imports neither PyTorch nor PEFT.
"""

from __future__ import annotations

import json
import math
import os
import stat
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


MIB = 2**20
JSON_LIMIT = 16 * MIB
# A tensor takes about 150 bytes of the header: room for `_MAX_TENSORS`.
HEADER_LIMIT = 16 * MIB

_MAX_TENSORS, _MAX_NAME, _MAX_DIMENSIONS = 50_000, 512, 8
_MAX_DEPTH, _MAX_ELEMENTS = 32, 1_000_000
# transformers writes `model_max_length` of tokenizers without a limit as an integer of 31 digits.
_MAX_DIGITS = 64
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
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise AdapterCheckError(f"{path} can't be read ({error}). {_REMEDY}") from error
    if not stat.S_ISREG(status.st_mode):
        raise AdapterCheckError(f"{path} is not a regular file. Replace it by the file itself.")
    if status.st_size > limit:
        raise AdapterCheckError(
            f"{path} has {status.st_size} bytes, and at most {limit} are read. It is not the file of an adapter."
        )
    return status.st_size


def read_bytes(path: str | Path, limit: int) -> bytes:
    """
    Contents of a file of at most `limit` bytes.

    Raises:
        AdapterCheckError: If the file is larger, or can't be read.
    """
    check_regular_file(path, limit)
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise AdapterCheckError(f"{path} can't be read ({error}). {_REMEDY}") from error
    # The file may have grown since its size was checked.
    if len(data) > limit:
        raise AdapterCheckError(f"{path} has more than {limit} bytes. It is not the file of an adapter.")
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
    return parse_json(read_bytes(path, limit), str(path))


def parse_json(data: bytes, source: str) -> Any:
    """[`read_json`] of bytes that are in memory; `source` is their name in messages."""
    # Counted before parsing, which would create an object for each.
    if sum(map(data.count, (b",", b"[", b"]", b"{", b"}"))) > _MAX_ELEMENTS:
        raise AdapterCheckError(f"{source} has more than {_MAX_ELEMENTS} elements. It is not the file of an adapter.")

    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_int=_bounded_int,
            parse_float=_finite_float,
            parse_constant=_finite_float,
        )
        too_deep = _is_deeper(value, _MAX_DEPTH)
        # Half of a surrogate pair is not a character, and would fail when the text is written or hashed.
        if b"\\u" in data and not too_deep:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        too_deep = True
    except ValueError as error:  # of JSON and of Unicode, and those raised below
        raise AdapterCheckError(f"{source} is not valid JSON: {shorten(str(error), 200)}. {_REMEDY}") from error
    if too_deep:
        raise AdapterCheckError(f"{source} is nested more than {_MAX_DEPTH} deep. It is not the file of an adapter.")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {shorten(key)} occurs twice")
        result[key] = value
    return result


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
    level = [value]
    for _ in range(limit + 1):
        level = [item for item in level if isinstance(item, dict | list)]
        if not level:
            return False
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
    return True


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
    # The checks of safetensors: overlaps, holes, unknown types, and inconsistent sizes.
    size = check_regular_file(path, 2**63 if limit is None else limit)
    try:
        with open(path, "rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            # The largest header that safetensors reads takes gigabytes when it is parsed.
            if HEADER_LIMIT < header_size <= size - 8:
                raise AdapterCheckError(
                    f"{path} has a header of {header_size} bytes, and at most {HEADER_LIMIT} are read. It is not the "
                    "file of an adapter."
                )
            with safe_open(str(path), framework="np") as tensors:
                count = len(tensors.keys())
            header = file.read(header_size)
    except (SafetensorError, OSError) as error:
        raise AdapterCheckError(
            f"{path} is truncated or not a safetensors file: {shorten(str(error), 300)}. {_REMEDY}"
        ) from error

    # The header again, for parts that programs may read differently.
    try:
        if count > _MAX_TENSORS:
            raise AdapterCheckError(f"it has {count} tensors, more than {_MAX_TENSORS}. {_REMEDY}")
        entries = parse_json(header, "its header")
        entries.pop("__metadata__", None)
        return {name: _tensor_entry(name, entry) for name, entry in entries.items()}
    except AdapterCheckError as error:
        raise AdapterCheckError(f"{path} is not a safetensors file of an adapter: {error}") from error


def _tensor_entry(name: str, entry: Any) -> TensorEntry:
    """Check an entry that safetensors accepts, but PyTorch or another program may not."""
    if not name or len(name) > _MAX_NAME or not name.isprintable():
        raise AdapterCheckError(f"{shorten(name)} is not the name of a tensor. {_REMEDY}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise AdapterCheckError(
            f"the entry of {name} must have `dtype`, `shape` and `data_offsets`, got {shorten(entry)}. {_REMEDY}"
        )
    if entry["dtype"] not in _DTYPES or len(entry["shape"]) > _MAX_DIMENSIONS:
        raise AdapterCheckError(
            f"{name} must have a type of {', '.join(sorted(_DTYPES))} and at most {_MAX_DIMENSIONS} dimensions, got "
            f"{shorten(entry)}. {_REMEDY}"
        )
    return TensorEntry(entry["dtype"], tuple(entry["shape"]))
