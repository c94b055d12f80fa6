"""Reading files that strangers wrote: JSON and the header of a safetensors file, within limits, before anything else.

What is refused here would otherwise cost memory or time (nesting, long integers, shapes without data behind them), or
be read in two ways by two programs (keys given twice, tensors that overlap). It imports neither PyTorch nor PEFT.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


MIB = 2**20
JSON_LIMIT = 16 * MIB
# A tensor takes about 150 bytes and 12 elements of the header: room for the number of tensors below.
HEADER_LIMIT = 16 * MIB
MAX_TENSORS = 50_000
MAX_NAME = 512

_MAX_DEPTH = 32
_MAX_ELEMENTS = 1_000_000
# transformers writes `model_max_length` of tokenizers without a limit as an integer of 31 digits.
_MAX_DIGITS = 64
_MAX_DIMENSIONS = 8
# Strings whole, even where the closing quote is missing, so that each character is looked at once.
_STRUCTURE = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[\[\]{},]', re.DOTALL)
# Bytes of one element by the names that safetensors gives to types.
ITEM_SIZES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
_AGAIN = "Save the adapter again, or download it again."


class AdapterCheckError(ValueError):
    """The files of an adapter are not what they should be; nothing of them has been used."""


@dataclass(frozen=True)
class TensorEntry:
    """
    What the header of a safetensors file says of a tensor.

    Args:
        dtype (`str`): Type of the elements, as safetensors names it, such as `"BF16"`.
        shape (`tuple[int, ...]`): Its shape.
        start (`int`), end (`int`): Where its bytes lie, from the end of the header.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def first_few(names: Iterable[str], limit: int = 3) -> str:
    """Names for a message: the first of them in their order, and how many more there are."""
    ordered = sorted(names)
    listed = ", ".join(ordered[:limit])
    return listed if len(ordered) <= limit else f"{listed} and {len(ordered) - limit} more"


def shorten(value: object, limit: int = 80) -> str:
    """`repr` of a value that a message quotes, cut to `limit` characters: what is quoted may be huge."""
    if isinstance(value, str) and len(value) > limit:
        value = value[:limit] + "..."
    text = repr(value)
    return text if len(text) <= limit + 6 else text[:limit] + "..."


def check_regular_file(path: str | Path, limit: int) -> int:
    """
    Size in bytes of a file that is about to be read.

    Raises:
        AdapterCheckError: If there is no such file, it is not a regular one (a pipe would wait forever), or it is
            larger than `limit` bytes.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise AdapterCheckError(f"{path} can't be read ({error}). {_AGAIN}") from error
    if not stat.S_ISREG(status.st_mode):
        raise AdapterCheckError(f"{path} is not a regular file. Put the file itself there.")
    if status.st_size > limit:
        raise AdapterCheckError(
            f"{path} has {status.st_size} bytes, and at most {limit} are read. It is not what an adapter holds there."
        )
    return status.st_size


def read_bytes(path: str | Path, limit: int) -> bytes:
    """
    Contents of a file of at most `limit` bytes.

    Raises:
        AdapterCheckError: If it is larger, or can't be read.
    """
    check_regular_file(path, limit)
    try:
        with open(path, "rb") as file:
            # It may have grown since.
            data = file.read(limit + 1)
    except OSError as error:
        raise AdapterCheckError(f"{path} can't be read ({error}). {_AGAIN}") from error
    if len(data) > limit:
        raise AdapterCheckError(f"{path} has more than {limit} bytes. It is not what an adapter holds there.")
    return data


def read_json(path: str | Path, *, limit: int = JSON_LIMIT) -> Any:
    """
    Read a JSON file that may be hostile.

    Args:
        path (`str` or `Path`): The file.
        limit (`int`, *optional*, defaults to 16 MiB): The most bytes it may have.

    Returns:
        `Any`: What it holds: dictionaries, lists, strings, finite numbers, booleans and `None`.

    Raises:
        AdapterCheckError: If it is larger than `limit`, not JSON in UTF-8, nested deeply, has a key twice in one
            object, NaN, infinity or integers of more than 20 digits.
    """
    return parse_json(read_bytes(path, limit), str(path))


def parse_json(data: bytes, source: str) -> Any:
    """
    Parse JSON within the limits of [`read_json`].

    Args:
        data (`bytes`): JSON in UTF-8.
        source (`str`): Where it comes from, for messages.

    Raises:
        AdapterCheckError: As [`read_json`].
    """
    _check_structure(data, source)
    try:
        text = data.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_int=_bounded_int,
            parse_float=_finite_float,
            parse_constant=_finite_float,
        )
        # Half of a surrogate pair is no character, and fails wherever the text is written or hashed.
        if re.search(r"\\u[dD]", text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except ValueError as error:  # those of JSON and of Unicode, and those raised below
        raise AdapterCheckError(f"{source} is not valid JSON: {shorten(str(error), 200)}. {_AGAIN}") from error
    return value


def _check_structure(data: bytes, source: str) -> None:
    """Count depth and elements before a parser, which recurses, sees the text."""
    depth = elements = 0
    for match in _STRUCTURE.finditer(data):
        mark = data[match.start()]
        if mark == 0x22:  # a string
            continue
        elements += 1
        if mark in b"[{":
            depth += 1
        elif mark in b"]}":
            depth -= 1
        if depth > _MAX_DEPTH or elements > _MAX_ELEMENTS:
            raise AdapterCheckError(
                f"{source} is nested more than {_MAX_DEPTH} deep or has more than {_MAX_ELEMENTS} elements. It is not "
                "what an adapter holds there."
            )


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {shorten(key)} is given twice")
            seen.add(key)
    return result


def _bounded_int(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"the number {shorten(text)} has more than {_MAX_DIGITS} digits")
    return int(text)


def _finite_float(text: str) -> float:
    value = float(text) if len(text) <= 400 else math.inf
    if not math.isfinite(value):
        raise ValueError(f"{shorten(text)} is not a finite number")
    return value


def read_safetensors_header(path: str | Path, *, limit: int | None = None) -> dict[str, TensorEntry]:
    """
    Read and check the header of a safetensors file; the tensors themselves are not read.

    Args:
        path (`str` or `Path`): The file.
        limit (`int`, *optional*): The most bytes that the whole file may have.

    Returns:
        `dict[str, TensorEntry]`: Type, shape and place of each tensor, by name.

    Raises:
        AdapterCheckError: If the file is truncated, is not safetensors, or its tensors leave holes, overlap or do not
            fill it exactly.
    """
    size = check_regular_file(path, 2**63 if limit is None else limit)
    data = _header_bytes(path, size)
    try:
        header = parse_json(data, "its header")
        if not isinstance(header, dict):
            raise AdapterCheckError(f"its header is a {type(header).__name__}, not an object")
        _check_metadata(header.pop("__metadata__", None))
        if len(header) > MAX_TENSORS:
            raise AdapterCheckError(f"it has {len(header)} tensors, more than {MAX_TENSORS}")
        entries = {name: _tensor_entry(name, entry) for name, entry in header.items()}
    except AdapterCheckError as error:
        raise AdapterCheckError(f"{path} is not a safetensors file that can be used: {error}") from error
    _check_coverage(path, entries, size - 8 - len(data))
    return entries


def _header_bytes(path: str | Path, size: int) -> bytes:
    try:
        with open(path, "rb") as file:
            prefix = file.read(8)
            header_size = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or 8 + header_size > size:
                raise AdapterCheckError(
                    f"{path} is truncated or not a safetensors file: it has {size} bytes, its header alone needs "
                    f"{8 + header_size}. {_AGAIN}"
                )
            if header_size > HEADER_LIMIT:
                raise AdapterCheckError(
                    f"{path} has a header of {header_size} bytes, and at most {HEADER_LIMIT} are read. It is not the "
                    "file of an adapter."
                )
            return file.read(header_size)
    except OSError as error:
        raise AdapterCheckError(f"{path} can't be read ({error}). {_AGAIN}") from error


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterCheckError("its `__metadata__` is not an object of strings")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _tensor_entry(name: str, entry: Any) -> TensorEntry:
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise AdapterCheckError(f"{shorten(name)} is no name of a tensor")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise AdapterCheckError(
            f"the entry of {name} must have `dtype`, `shape` and `data_offsets`, got {shorten(entry)}"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise AdapterCheckError(f"{name} has the unknown type {shorten(dtype)}; known are {', '.join(ITEM_SIZES)}")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS or not all(map(_is_count, shape)):
        raise AdapterCheckError(f"{name} has the impossible shape {shorten(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise AdapterCheckError(f"{name} has the impossible `data_offsets` {shorten(offsets)}")
    needed = math.prod(shape) * ITEM_SIZES[dtype]
    if offsets[1] - offsets[0] != needed:
        raise AdapterCheckError(
            f"{name} of shape {shape} and type {dtype} needs {needed} bytes, its `data_offsets` {offsets} hold "
            f"{offsets[1] - offsets[0]}"
        )
    return TensorEntry(dtype, tuple(shape), offsets[0], offsets[1])


def _check_coverage(path: str | Path, entries: dict[str, TensorEntry], size: int) -> None:
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            raise AdapterCheckError(
                f"{path} is not a safetensors file that can be used: {name} starts at byte {entry.start}, and the "
                f"tensors before it end at {position}. {_AGAIN}"
            )
        position = entry.end
    if position != size:
        raise AdapterCheckError(
            f"{path} is truncated or altered: its header describes {position} bytes of tensors, it has {size}. "
            f"{_AGAIN}"
        )
