"""Datasets by the names that users type: a file, a folder, a dataset on the Hub; and what is wrong with a file."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import sys
import zlib
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from pandas.errors import ParserError

from ..reading import printable
from .paper import PREFIX, load_paper_data


_FORMATS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
# Errors of reading rows after loading: of a stream, and of text that is not UTF-8.
READING_ERRORS = (UnicodeDecodeError, json.JSONDecodeError, pa.ArrowInvalid, ParserError, DatasetGenerationError)

_ONE_ROW = "Give a file with at least one row."
_REWRITE = "or it was cut off. Write or download it again."

# Characters of a file that are read to find a mistake, and levels of nesting that Arrow reads without a crash.
_MAX_EXPLAINED, _MAX_DEPTH = 2**26, 500
_NESTING = re.compile(rb'"(?:[^"\\]|\\.)*"?|[\[\]{}]')


def load_splits(
    name: str, config_name: str | None = None, *, file_split: str = "train", streaming: bool = False
) -> DatasetDict:
    """
    Load the splits of a dataset. Cells of a CSV file are text as written, also `NA` and `007`; empty ones are missing.

    Args:
        name (`str`):
            A JSON-lines (`.jsonl`, `.ndjson`), JSON, Parquet or CSV file, also with `.gz`; a folder of such files; a
            dataset on the Hub; or data of the paper, such as `"paper:setting1"` (see [`load_paper_data`]).
        config_name (`str`, *optional*):
            Configuration of a dataset on the Hub.
        file_split (`str`, *optional*, defaults to `"train"`):
            Name for the only split of a file.
        streaming (`bool`, *optional*, defaults to `False`):
            Read rows as they are needed.

    Returns:
        `DatasetDict`: The splits by name.

    Raises:
        FileNotFoundError: If there is no file, folder or dataset of this name.
        ValueError: If a file is empty or can't be read; with the line, where it is known.
    """
    path = Path(name)
    kind = _kind(path)

    if name.startswith(PREFIX) and not path.exists():
        if streaming:
            raise ValueError(f"{name} can't be streamed: it is converted as a whole. Leave streaming out.")
        return load_paper_data(name.removeprefix(PREFIX))

    # One file.
    if path.is_file():
        if kind is None:
            raise ValueError(
                f"{name} is a file of another kind; accepted are those whose names end in {', '.join(_FORMATS)}, also "
                "with .gz. Write the rows to one of these, or rename the file if it is one."
            )
        _refuse_unreadable([path])
        options = {"data_files": {file_split: name}, "streaming": streaming, **_csv_options([path])}
        with explain_read_errors(path):
            return load_dataset(kind, **options)

    # A path to nothing.
    is_path = kind is not None or name.startswith((".", "~", os.sep)) or name.count("/") > 1
    if is_path and "://" not in name and not path.exists():
        raise FileNotFoundError(
            f"There is no data at {name}. Give a JSON-lines, Parquet or CSV file, a folder of such files, or the name "
            "of a dataset on the Hub."
        )

    # A folder, or a dataset on the Hub.
    files = _data_files(path)
    _refuse_unreadable(files)
    options = _csv_options(files)
    try:
        with explain_read_errors(path):
            return load_dataset(name, config_name, streaming=streaming, **options)
    except (DatasetNotFoundError, ConnectionError) as error:
        if path.exists():
            raise
        raise FileNotFoundError(
            f"There is no file or folder {name} here, and no such dataset was found on the Hub: {error}"
        ) from error


@contextmanager
def explain_read_errors(path: Path, errors: tuple[type[Exception], ...] = (Exception,)) -> Generator[None, None, None]:
    """
    Name the local file and the line that are wrong, if reading fails.

    Args:
        path (`Path`): The file or folder that is read; a name on the Hub is left alone.
        errors (`tuple`, *optional*): The errors to explain, by default all.

    Raises:
        ValueError: If one of these errors comes from a mistake in a file, or from files of different columns.
    """
    try:
        yield
    except errors as error:
        files = _data_files(path)
        for file in files:
            mistake = _find_mistake(file)
            if mistake is not None:
                raise ValueError(f"{file}{mistake}") from error

        columns = [(file.name, names) for file in files if (names := _columns(file))]
        differing = [entry for entry in columns if set(entry[1]) != set(columns[0][1])]
        if differing:
            both = "; ".join(f"{name}: {', '.join(names)}" for name, names in (columns[0], differing[0]))
            raise ValueError(f"The files of {path} have different columns ({both}). Give all the same.") from error
        if not files or isinstance(error, OSError):
            raise
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        text = printable(" ".join(f"{type(cause).__name__}: {cause}".split()))[:300]
        raise ValueError(f"{path} can't be read ({text}). Correct it, or write it again.") from error


def wrong_separator(columns: Sequence[str]) -> str | None:
    """The character that separates the names in the only column of a CSV header, if it is not a comma."""
    return next((mark for mark in ";\t|" if len(columns) == 1 and mark in columns[0]), None)


def _kind(path: Path) -> str | None:
    """The format of a file for `datasets`, by the end of its name; `None` if it is not a data file."""
    name = path.name.lower().removesuffix(".gz")
    return _FORMATS.get(Path(name).suffix)


def _data_files(path: Path) -> list[Path]:
    """The data files in a folder; a file itself."""
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if _kind(file) is not None and file.is_file())


def _opener(file: Path) -> Any:
    return gzip.open if file.suffix.lower() == ".gz" else open


def _open(file: Path, newline: str | None = None) -> TextIO:
    return cast(TextIO, _opener(file)(file, "rt", encoding="utf-8-sig", newline=newline))


def _refuse_unreadable(files: Iterable[Path]) -> None:
    """
    Refuse what the readers do not survive: rows that fill the memory, and JSON so deep that Arrow overflows the stack.

    The first line of each file is checked, and the nesting of as much JSON as is read in a second.

    Raises:
        ValueError: With the line.
    """
    left = _MAX_EXPLAINED
    for file in files:
        if _kind(file) == "parquet":
            continue
        # What is wrong with a compressed file is said when reading it fails.
        with suppress(EOFError, OSError, zlib.error), _opener(file)(file, "rb") as stream:
            first = stream.readline(_MAX_EXPLAINED)
            is_document = file.name.lower().removesuffix(".gz").endswith(".json")  # which may be on one line
            if len(first) == _MAX_EXPLAINED and not is_document:
                raise ValueError(f"{file}, line 1: it has more than {_MAX_EXPLAINED} bytes. Give each row a line.")

            if _kind(file) == "json" and left > 0:
                rest = stream.read(max(left - len(first), 0))
                left -= len(first) + len(rest)
                _refuse_deep(file, [first, *rest.split(b"\n")])


def _refuse_deep(file: Path, lines: Sequence[bytes]) -> None:
    deep = next((number for number, line in enumerate(lines, start=1) if _is_deep(line)), None)
    if deep is not None:
        raise ValueError(f"{file}, line {deep}: it is nested more than {_MAX_DEPTH} deep. Write fewer levels.")


def _is_deep(line: bytes) -> bool:
    if line.count(b"[") + line.count(b"{") <= _MAX_DEPTH:
        return False
    depth = 0
    for token in _NESTING.finditer(line):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token[0], 0)
        if depth > _MAX_DEPTH:
            return True
    return False


# Reading CSV and JSON


def _csv_options(files: Sequence[Path]) -> dict[str, Any]:
    """
    Options that keep the cells of CSV files text: pandas reads "007" as a number and "NA" as missing.

    Raises:
        ValueError: If rows have more cells than there are columns: pandas takes their first cells for an index.
    """
    if not files or any(_kind(file) != "csv" for file in files):
        return {}
    names = set()
    for file in files:
        header, *rows = _first_lines(file, 2)
        names.update(header)
        if rows and len(rows[0]) > len(header):
            raise ValueError(f"{file}{_mistake_in_csv(file)}")
    return {"converters": dict.fromkeys(sorted(names), _cell), "na_filter": False} if names else {}


def _cell(text: str) -> str | None:
    return text or None


def _first_lines(file: Path, number: int) -> list[list[str]]:
    """The cells of the first lines of a CSV file, and at least one list."""
    try:
        with _csv_cells(file) as lines:
            return list(islice(filter(None, lines), number)) or [[]]
    except (UnicodeDecodeError, csv.Error):
        return [[]]  # `_find_mistake` explains it once reading the file has failed


@contextmanager
def _csv_cells(file: Path, *, strict: bool = False) -> Generator[Any, None, None]:
    """A reader of the cells of a CSV file, of any length."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with _open(file, newline="") as lines:
            yield csv.reader(lines, strict=strict)
    finally:
        csv.field_size_limit(limit)


def _columns(file: Path) -> list[str]:
    """The columns in the first row of a CSV or JSON-lines file."""
    if _kind(file) == "csv":
        return _first_lines(file, 1)[0]
    if _kind(file) != "json":
        return []
    try:
        with _open(file) as lines:
            row = json.loads(next(line for line in lines if line.strip()))
    except (ValueError, RecursionError):
        return []  # one document of many lines
    return list(row) if isinstance(row, dict) else []


# What is wrong with a file that could not be read: the end of a sentence that begins with its name


def _find_mistake(file: Path) -> str | None:
    if _kind(file) == "parquet":
        return _mistake_in_parquet(file)
    try:
        with _open(file) as lines:
            if not lines.read(_MAX_EXPLAINED).strip():
                return f" is empty. {_ONE_ROW}"
        return (_mistake_in_csv if _kind(file) == "csv" else _mistake_in_json)(file)
    except UnicodeDecodeError as error:
        return f" is not UTF-8 text: {error.reason}, byte {error.object[error.start]:#04x}. Save it in UTF-8."
    except (gzip.BadGzipFile, EOFError, zlib.error):
        return f" is no gzip file, {_REWRITE}"


def _mistake_in_parquet(file: Path) -> str | None:
    if not file.stat().st_size:
        return f" is empty. {_ONE_ROW}"
    try:
        pq.read_schema(file)
    except (pa.ArrowInvalid, OSError):
        return f" is no Parquet file, {_REWRITE}"
    return None


def _mistake_in_json(file: Path) -> str | None:
    accepted = 'Each line must be one JSON object, such as {"prompt": "...", "completion": "..."}.'
    with _open(file) as lines:
        text = lines.read(_MAX_EXPLAINED)
    if len(text) == _MAX_EXPLAINED:
        text = text.rpartition("\n")[0]  # whole lines

    # One document is accepted too.
    try:
        document = json.loads(text)
    except json.JSONDecodeError:
        document = None
    except RecursionError:
        return " is nested too deeply. Write fewer levels."
    except ValueError as error:
        return f" has a value that can't be read: {error}. Correct it."
    if document is not None:
        return f" has no rows. {_ONE_ROW}" if document in ([], {}) else None

    has_fields = False
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            return f", line {number}: {error.msg} at column {error.colno}. {accepted}"
        except (ValueError, RecursionError) as error:
            return f", line {number}: {error}. {accepted}"
        if not isinstance(row, dict):
            return f", line {number}: the line is a {type(row).__name__}. {accepted}"
        has_fields |= bool(row)
    return None if has_fields else f" has no rows with a field. {_ONE_ROW}"


def _mistake_in_csv(file: Path) -> str | None:
    with _csv_cells(file, strict=True) as reader:
        header = next(reader)
        separator = wrong_separator(header)
        if separator is not None:
            return f" names its columns {header[0]!r}. Separate cells by commas instead of {separator!r}."

        rows, begin = 0, reader.line_num + 1
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                return f", line {begin}: {error}. Close each double quote, and write one inside a cell as two."
            if cells is None:
                return None if rows else f" has a header and no rows. {_ONE_ROW}"
            if len(cells) > len(header):
                return (
                    f", line {reader.line_num}: {len(cells)} cells, and the first line names {len(header)} columns. "
                    "Put cells that contain commas into double quotes."
                )
            rows, begin = rows + bool(cells), reader.line_num + 1
