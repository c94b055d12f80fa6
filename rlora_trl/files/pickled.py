"""
Reads the tensors of an `adapter_model.bin`, a pickle in a zip archive, as `torch.save` wrote it.

`torch.load(weights_only=True)` refuses code, but not sizes that a stranger chose: a tensor of terabytes that repeats
one value, a storage that is larger than its part of the file, a tuple of tuples that takes years to hash. So the
archive and the pickle are read as data first. `read_pickled_header` interprets the few instructions that a dictionary
of tensors needs, creates nothing but descriptions, and compares these with the archive. Only then does PyTorch load
the file.
"""

from __future__ import annotations

import math
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..reading import MIB, AdapterCheckError, TensorEntry, check_regular_file, printable, shorten
from .tensors import DTYPE_NAMES


_MAX_RECORDS, _MAX_PICKLE, _MAX_INSTRUCTIONS, _MAX_NAME, _MAX_DIMENSIONS = 100_000, 8 * MIB, 1_000_000, 512, 8
_STORAGES = {
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
}
_DICTIONARY, _TENSOR = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_KNOWN = frozenset((*_STORAGES, _DICTIONARY, _TENSOR, _PARAMETER))
_REMEDY = "Save the adapter again with `torch.save`, as a dictionary of floating-point tensors by name."
# Ends of a zip archive without a comment: the record itself, and the locator of its 64-bit form before it.
_END, _LOCATOR, _END_64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sLQL"), struct.Struct("<4sQ2H2L4Q")


class _Global(NamedTuple):
    """A name that a pickle imports, with its module."""

    name: str


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str
    numel: int


class _Tensor(NamedTuple):
    storage: _Storage
    shape: tuple[int, ...]


def read_pickled_header(path: str | Path, *, limit: int) -> dict[str, TensorEntry]:
    """
    Read and check the structure of a pickled file of tensors. Nothing is unpickled, and no tensor is read.

    Args:
        path (`str` or `Path`): The file.
        limit (`int`): The most bytes that it may have.

    Returns:
        `dict[str, TensorEntry]`: Type and shape of each tensor, by name.

    Raises:
        AdapterCheckError: If the file is not an archive that `torch.save` writes, or its pickle is more than a
            dictionary of contiguous floating-point tensors that fit their storages.
    """
    source = printable(str(path))
    size = check_regular_file(path, limit)
    try:
        sizes, data = _read_archive(Path(path), size)
        tensors = _Interpreter().run(data)
        _check_storages(tensors, sizes, size)
    except AdapterCheckError as error:
        raise AdapterCheckError(f"{source} is not a file of tensors that can be read safely: {error}") from error
    # Of zipfile, struct, pickletools, and of instructions without the values that they need.
    except (zipfile.BadZipFile, OSError, ValueError, LookupError, TypeError, NotImplementedError, EOFError) as error:
        raise AdapterCheckError(
            f"{source} is damaged, or not a file that `torch.save` wrote: {shorten(str(error), 200)}. {_REMEDY}"
        ) from error
    return {name: TensorEntry(DTYPE_NAMES[t.storage.dtype], t.shape) for name, t in tensors.items()}


def load_pickled(path: str | Path, entries: Mapping[str, TensorEntry]) -> dict[str, torch.Tensor]:
    """
    Load the tensors of a file whose structure was checked.

    Args:
        path (`str` or `Path`): The file.
        entries (`Mapping[str, TensorEntry]`): What [`read_pickled_header`] returned for it.

    Returns:
        `dict[str, torch.Tensor]`: The tensors by name, on the CPU, without gradients.

    Raises:
        AdapterCheckError: If PyTorch refuses the file, or finds other tensors in it.
    """
    source = printable(str(path))
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, ValueError) as error:
        raise AdapterCheckError(f"{source} can't be loaded: {shorten(str(error), 200)}. {_REMEDY}") from error
    tensors = {name: tensor.detach() for name, tensor in loaded.items()}
    if {name: TensorEntry(DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()} != dict(entries):
        raise AdapterCheckError(f"{source} changed while it was read, or can be read in two ways. {_REMEDY}")
    return tensors


def _read_archive(path: Path, size: int) -> tuple[dict[str, int], bytes]:
    """Sizes in bytes of the storages in the archive, by key, and the pickle."""
    _check_directory(path, size)
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        names = {record.filename for record in records}
        pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(names) < len(records) or len(pickles) != 1:
            raise AdapterCheckError(f"its archive has records of the same name, or not one `data.pkl`. {_REMEDY}")
        # A compressed record could be a thousand times as large as the file.
        if any(record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1 for record in records):
            raise AdapterCheckError(
                f"its archive is compressed or encrypted, which `torch.save` never does. {_REMEDY}"
            )
        if sum(record.file_size for record in records) > size:
            raise AdapterCheckError(f"the records of its archive overlap. {_REMEDY}")

        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
            raise AdapterCheckError(f"its numbers are in big-endian order. {_REMEDY}")
        if archive.getinfo(pickles[0]).file_size > _MAX_PICKLE:
            raise AdapterCheckError(f"its pickle has more than {_MAX_PICKLE} bytes. It is not the file of an adapter.")
        prefix = f"{folder}data/"
        sizes = {
            record.filename.removeprefix(prefix): record.file_size
            for record in records
            if record.filename.startswith(prefix)
        }
        return sizes, archive.read(pickles[0])


def _check_directory(path: Path, size: int) -> None:
    """Count the records of a zip archive before `zipfile` creates an object for each."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4" or size < _END.size:
            raise AdapterCheckError(
                "it does not begin like a zip archive, the only form that is read (`torch.save` writes it since "
                f"PyTorch 1.6). {_REMEDY}"
            )
        file.seek(size - _END.size)
        mark, *_, count, length, _, comment = _END.unpack(file.read(_END.size))
        if mark != b"PK\5\6" or comment:
            raise AdapterCheckError(f"its archive is truncated, or has something behind its end. {_REMEDY}")

        # Larger numbers are in a 64-bit record right before the locator.
        tail = _END_64.size + _LOCATOR.size
        if size >= _END.size + tail:
            file.seek(size - _END.size - tail)
            mark_64, *_, count_64, length_64, _ = _END_64.unpack(file.read(_END_64.size))
            mark, _, place, _ = _LOCATOR.unpack(file.read(_LOCATOR.size))
            if mark == b"PK\6\7":
                if mark_64 != b"PK\6\6" or place != size - _END.size - tail:
                    raise AdapterCheckError(f"the end of its archive can be read in two ways. {_REMEDY}")
                count = max(count_64, count if count != 0xFFFF else 0)
                length = max(length_64, length if length != 0xFFFFFFFF else 0)
    # A record of the directory has 46 bytes and a name.
    if count > _MAX_RECORDS or length > _MAX_RECORDS * 200:
        raise AdapterCheckError(f"its archive has more than {_MAX_RECORDS} records. It is not the file of an adapter.")


class _Interpreter:
    """Executes the instructions of a pickle of tensors, as descriptions; all others are refused."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> dict[str, _Tensor]:
        """The tensors by name."""
        for count, (instruction, argument, _) in enumerate(pickletools.genops(data)):
            if count >= _MAX_INSTRUCTIONS:
                raise AdapterCheckError(f"its pickle has more than {_MAX_INSTRUCTIONS} instructions. {_REMEDY}")
            if instruction.name == "STOP":
                break
            self._execute(instruction.name, argument)
        root = self.stack.pop()
        if self.stack or type(root) is not dict or not root:
            raise AdapterCheckError(f"it is not a dictionary of tensors by name, or it is empty. {_REMEDY}")
        for name, tensor in root.items():
            if type(tensor) is not _Tensor:
                raise AdapterCheckError(f"{shorten(name)} is not a tensor. {_REMEDY}")
        return root

    def _execute(self, instruction: str, argument: Any) -> None:
        stack = self.stack
        match instruction:
            case "PROTO" | "FRAME":
                pass
            case "GLOBAL":
                stack.append(_known(argument))
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(argument)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(instruction == "NEWTRUE")
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_DICT":
                stack.append({})
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "MARK":
                self.marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(self._marked()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack[:], items = stack[: -int(instruction[-1])], stack[-int(instruction[-1]) :]
                stack.append(tuple(items))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_called(function, arguments))
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set_items(stack[-1], [key, value])
            case "SETITEMS":
                items = self._marked()
                _set_items(stack[-1], items)
            case _:
                raise AdapterCheckError(
                    f"its pickle has the instruction {instruction}, which no dictionary of tensors needs. Nothing was "
                    f"executed. {_REMEDY}"
                )

    def _marked(self) -> list[Any]:
        """Take what lies above the last mark."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items


def _known(name: str) -> _Global:
    if name not in _KNOWN:
        shown = shorten(name.replace(" ", "."))
        raise AdapterCheckError(
            f"its pickle imports {shown}. An adapter needs only floating-point tensors; other imports could run any "
            f"code. Nothing was executed. {_REMEDY}"
        )
    return _Global(name)


def _storage(value: Any) -> _Storage:
    """The storage that a persistent id describes: ("storage", type, key, device, number of elements)."""
    if type(value) is tuple and len(value) == 5 and value[0] == "storage":
        _, kind, key, _, numel = value
        if type(kind) is _Global and kind.name in _STORAGES and type(key) is str and _is_size(numel):
            return _Storage(_STORAGES[kind.name], key, numel)
    raise AdapterCheckError(f"a storage of its pickle is not described as `torch.save` does. {_REMEDY}")


def _called(function: Any, arguments: Any) -> Any:
    """The result of a call: a dictionary, a tensor, or the tensor of a parameter."""
    name = function.name if type(function) is _Global else None
    if name == _DICTIONARY and arguments == ():
        return {}
    if name == _PARAMETER and len(arguments) == 3 and type(arguments[0]) is _Tensor:
        return arguments[0]
    if name == _TENSOR and len(arguments) == 6:
        storage, offset, shape, stride = arguments[:4]
        if type(storage) is _Storage and _is_size(offset) and _are_sizes(shape) and _are_sizes(stride):
            _check_tensor(storage, offset, shape, stride)
            return _Tensor(storage, shape)
    raise AdapterCheckError(f"its pickle calls something with other arguments than `torch.save` writes. {_REMEDY}")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _are_sizes(values: Any) -> bool:
    return type(values) is tuple and len(values) <= _MAX_DIMENSIONS and all(map(_is_size, values))


def _check_tensor(storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
    """A tensor must lie in its storage, each value once."""
    expected = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
    strides = list(zip(shape, stride, expected, strict=False))
    if len(stride) != len(shape) or any(size > 1 and given != needed for size, given, needed in strides):
        raise AdapterCheckError(
            f"a tensor of shape {list(shape)} is not contiguous: it has strides {list(stride)}. Save it with "
            "`tensor.contiguous()`."
        )
    if offset + math.prod(shape) > storage.numel:
        raise AdapterCheckError(
            f"a tensor of shape {list(shape)} at {offset} does not fit its storage of {storage.numel} values. "
            f"{_REMEDY}"
        )


def _set_items(target: Any, items: list[Any]) -> None:
    """Set keys and values, which alternate."""
    if type(target) is not dict or len(items) % 2:
        raise AdapterCheckError(f"its pickle sets items of something that is not a dictionary. {_REMEDY}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # A key of another type could take very long to hash.
        if type(key) is not str or not key or len(key) > _MAX_NAME or not key.isprintable():
            shown = shorten(key) if type(key) is str else f"of type {type(key).__name__}"
            raise AdapterCheckError(f"a key is {shown}, and must be the name of a tensor. {_REMEDY}")
        if key in target:
            raise AdapterCheckError(f"it has two tensors named {shorten(key)}. {_REMEDY}")
        target[key] = value


def _check_storages(tensors: Mapping[str, _Tensor], sizes: Mapping[str, int], size: int) -> None:
    """Storages must be as large as their records, and tensors must not share so much that they exceed the file."""
    for name, (storage, _) in tensors.items():
        expected = storage.numel * storage.dtype.itemsize
        if sizes.get(storage.key) != expected:
            raise AdapterCheckError(
                f"the storage of {name} needs {expected} bytes, and its record has {sizes.get(storage.key, 0)}. "
                f"{_REMEDY}"
            )
    total = sum(math.prod(tensor.shape) * tensor.storage.dtype.itemsize for tensor in tensors.values())
    if total > size:
        raise AdapterCheckError(
            f"its tensors have {total} bytes, more than the whole file: they share storages. {_REMEDY}"
        )
