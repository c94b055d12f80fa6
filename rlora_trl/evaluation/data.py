"""Data sets as users name them: a file, a folder or a name on the Hub; and their rows by task."""

from __future__ import annotations

import csv
import gzip
import json
import os
import sys
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from pandas.errors import ParserError
from trl import maybe_convert_to_chatml

from .columns import by_row, describe_no_tasks, encode, encode_tasks, is_text, why_no_tasks


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_FORMATS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
# What fails where rows are read after loading: those of a stream, and texts that are no UTF-8.
READING_ERRORS = (UnicodeDecodeError, json.JSONDecodeError, pa.ArrowInvalid, ParserError, DatasetGenerationError)

_EMPTY = " is empty. Give a file with at least one row."
# The keys of a message, by the column that holds it: as OpenAI and ShareGPT write messages.
_KEYS = {"conversations": ("from", "value")}
_OPENAI_KEYS = ("role", "content")
_PAIR = ("prompt", "completion")
# What preparation reads beside text or messages.
COMPANIONS_OF_TEXT = ("tools", "chat_template_kwargs")
_OTHER_KINDS = {
    "tools": "null, a list of tools, or such a list in JSON",
    "chat_template_kwargs": "a dictionary, empty for none",
    "input_ids": "a list of the numbers of tokens",
}
_ASSISTANTS = ("assistant", "gpt")  # as OpenAI and ShareGPT call the one who answers


def load_splits(
    name: str, config_name: str | None = None, *, file_split: str = "train", streaming: bool = False
) -> DatasetDict:
    """
    The splits of a data set.

    Args:
        name (`str`):
            A JSON-lines (`.jsonl`, `.ndjson`), JSON, Parquet or CSV file, also with `.gz`, a folder of such files, or
            a data set on the Hub.
        config_name (`str`, *optional*):
            Configuration of a data set on the Hub.
        file_split (`str`, *optional*, defaults to `"train"`):
            What the only split of a file is called.
        streaming (`bool`, *optional*, defaults to `False`):
            Read rows as they are needed.

    Cells of a CSV file are text as they stand there, also `NA` and `007`; empty ones are missing.

    Raises:
        FileNotFoundError: If there is neither a file, a folder nor a data set of this name.
        ValueError: If a file is empty or can't be read; with the line, where it is known.
    """
    path = Path(name)
    kind = _kind(path)
    if path.is_file():
        if kind is None:
            raise ValueError(
                f"{name} is a file of another kind; accepted are those whose names end in {', '.join(_FORMATS)}, also "
                "with .gz. Write the rows to one of these, or rename the file if it is one."
            )
        options = {"data_files": {file_split: name}, "streaming": streaming, **_csv_options([path])}
        with explained(path):
            return load_dataset(kind, **options)
    is_path = kind is not None or name.startswith((".", "~", os.sep)) or name.count("/") > 1
    if is_path and "://" not in name and not path.exists():
        raise FileNotFoundError(
            f"There is no data at {name}. Give a JSON-lines, Parquet or CSV file, a folder of such files, or the name "
            "of a data set on the Hub."
        )
    options = _csv_options(_data_files(path))
    try:
        with explained(path):
            return load_dataset(name, config_name, streaming=streaming, **options)
    except (DatasetNotFoundError, ConnectionError) as error:
        if path.exists():
            raise
        raise FileNotFoundError(
            f"There is no file or folder {name} here, and no such data set was found on the Hub: {error}"
        ) from error


def _data_files(path: Path) -> list[Path]:
    """The files of a folder of data, and a file itself."""
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if _kind(file) is not None and file.is_file())


def _csv_options(files: Sequence[Path]) -> dict[str, Any]:
    """
    Options that keep the cells of CSV files text: pandas makes numbers of "007", and nothing of "NA".

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


def _first_lines(file: Path, number: int) -> list[list[str]]:
    """The cells of the first lines of a CSV file, and at least one list."""
    try:
        with _csv_cells(file) as lines:
            return list(islice(filter(None, lines), number)) or [[]]
    except (UnicodeDecodeError, csv.Error):
        return [[]]  # `_find_mistake` says so once reading the file has failed


@contextmanager
def _csv_cells(file: Path, *, strict: bool = False) -> Iterator[Any]:
    """A reader of the cells of a CSV file, of any length."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with _open(file, newline="") as lines:
            yield csv.reader(lines, strict=strict)
    finally:
        csv.field_size_limit(limit)


def _open(file: Path, newline: str | None = None) -> TextIO:
    opened = gzip.open if file.suffix.lower() == ".gz" else open
    return cast(TextIO, opened(file, "rt", encoding="utf-8-sig", newline=newline))


def _kind(path: Path) -> str | None:
    """What `datasets` calls the form of a file, by the end of its name; `None` if it is none of ours."""
    name = path.name.lower().removesuffix(".gz")
    return _FORMATS.get(Path(name).suffix)


def _cell(text: str) -> str | None:
    return text or None


@contextmanager
def explained(path: Path, errors: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
    """Say where a local file is wrong, if reading it fails with one of these errors."""
    try:
        yield
    except errors as error:
        files = _data_files(path)
        for file in files:
            mistake = _find_mistake(file)
            if mistake is not None:
                raise ValueError(f"{file}{mistake}") from error
        columns = {file: names for file in files if (names := _columns(file))}
        differing = next((file for file in columns if set(columns[file]) != set(columns[next(iter(columns))])), None)
        if differing is not None:
            listed = "; ".join(f"{file.name}: {', '.join(columns[file])}" for file in (next(iter(columns)), differing))
            raise ValueError(f"The files of {path} have different columns ({listed}). Give all the same.") from error
        raise


def _columns(file: Path) -> list[str]:
    """The columns of a CSV or JSON-lines file, of its first row."""
    if _kind(file) == "csv":
        return _first_lines(file, 1)[0]
    if _kind(file) != "json":
        return []
    try:
        with _open(file) as lines:
            row = json.loads(next(line for line in lines if line.strip()))
    except json.JSONDecodeError:
        return []  # one document of many lines
    return list(row) if isinstance(row, dict) else []


def _find_mistake(file: Path) -> str | None:
    """What is wrong with a file that could not be read, and where, as the end of a sentence that its name begins."""
    if _kind(file) == "parquet":
        return _mistake_in_parquet(file)
    try:
        with _open(file) as lines:
            if not any(line.strip() for line in lines):
                return _EMPTY
        return (_mistake_in_csv if _kind(file) == "csv" else _mistake_in_json)(file)
    except UnicodeDecodeError as error:
        return f" is not UTF-8 text: {error.reason}, byte {error.object[error.start]:#04x}. Save it in UTF-8."
    except (gzip.BadGzipFile, EOFError, zlib.error):
        return " is no gzip file, or it was cut off. Write or download it again."


def _mistake_in_parquet(file: Path) -> str | None:
    if not file.stat().st_size:
        return _EMPTY
    try:
        pq.read_schema(file)
    except (pa.ArrowInvalid, OSError):
        return " is no Parquet file, or it was cut off. Write or download it again."
    return None


def _mistake_in_json(file: Path) -> str | None:
    accepted = 'Each line must be one JSON object, such as {"prompt": "...", "completion": "..."}.'
    with _open(file) as lines:
        text = lines.read()
    try:
        document = json.loads(text)
    except json.JSONDecodeError:
        document = None
    if document in ([], {}):
        return " has no rows. Give a file with at least one row."
    if document is not None:
        return None  # one document, which is accepted too
    has_fields = False
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            return f", line {number}: {error.msg} at column {error.colno}. {accepted}"
        if not isinstance(row, dict):
            return f", line {number}: the line is a {type(row).__name__}. {accepted}"
        has_fields |= bool(row)
    return None if has_fields else " has no rows with a field. Give a file with at least one row."


def _mistake_in_csv(file: Path) -> str | None:
    with _csv_cells(file, strict=True) as reader:
        header = next(reader)
        separator = _other_separator(header)
        if separator is not None:
            return f" names its columns {header[0]!r}. Separate cells by commas instead of {separator!r}."
        rows, begin = 0, reader.line_num + 1
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                return f", line {begin}: {error}. Close each double quote, and write one inside a cell as two."
            if cells is None:
                return None if rows else " has a header and no rows. Give a file with at least one row."
            if len(cells) > len(header):
                return (
                    f", line {reader.line_num}: {len(cells)} cells, and the first line names {len(header)} columns. "
                    "Put cells that contain commas into double quotes."
                )
            rows, begin = rows + bool(cells), reader.line_num + 1


def _other_separator(columns: Sequence[str]) -> str | None:
    """What separates the names in a header that was not separated by commas."""
    return next((mark for mark in ";\t|" if len(columns) == 1 and mark in columns[0]), None)


def find_format(
    columns: Iterable[str], first: Mapping[str, Any], *, text_column: str = "text"
) -> tuple[str, ...] | None:
    """
    The columns that TRL's preparation trains on. It looks at the first row, not at names of columns alone.

    Args:
        columns (`Iterable[str]`): Names of all columns.
        first (`Mapping[str, Any]`): The first row.
        text_column (`str`, *optional*, defaults to `"text"`): Column of plain text (`dataset_text_field`).

    Returns:
        `tuple[str, ...]`, *optional*: `("prompt", "completion")`, `("conversations",)`, `("messages",)` or
        `(text_column,)`; `None` if there is none of these.
    """
    columns = list(columns)
    if set(_PAIR) <= set(columns):
        return _PAIR
    chats = [name for name in ("conversations", "messages") if name in columns]
    usable = [name for name in chats if _is_chat(first.get(name), name)]
    text = [text_column] if text_column in columns else []
    # With nothing usable, what is wrong with the messages is of more use than that there is no text.
    return next(((name,) for name in (*usable, *text, *chats[::-1])), None)


def _is_chat(value: Any, name: str) -> bool:
    if not isinstance(value, list):
        return False
    # TRL fails on an empty list, even beside a text.
    required = _KEYS.get(name, ("role",))
    return not value or (isinstance(value[0], dict) and all(key in value[0] for key in required))


def check_format(
    columns: Iterable[str], first: Mapping[str, Any], where: str, *, text_column: str = "text"
) -> tuple[str, ...]:
    """
    The columns that TRL's preparation reads.

    Args:
        columns (`Iterable[str]`), first (`Mapping[str, Any]`), text_column (`str`): See [`find_format`].
        where (`str`): What the data are called in messages.

    Returns:
        `tuple[str, ...]`: See [`find_format`].

    Raises:
        ValueError: If there is none of these, or a prompt without a completion.
    """
    columns = list(columns)
    found = find_format(columns, first, text_column=text_column)
    accepted = f"accepted are 'prompt' with 'completion', {text_column!r}, or 'messages'"
    shown = _list_columns(columns)
    if found is None:
        separator = _other_separator(columns)
        remedy = f"Separate them by commas instead of {separator!r}." if separator else "Rename its columns."
        raise ValueError(f"{where} has the columns {shown}; {accepted}. {remedy}")
    if "prompt" in columns and len(found) == 1:  # which TRL takes for half a pair
        remedy = "Rename" if found == ("prompt",) else "Remove"
        raise ValueError(
            f"{where} has the columns {shown}, with a 'prompt' and no 'completion'; {accepted}. {remedy} the column "
            f"'prompt' to train on {'it' if found == ('prompt',) else repr(found[0])}, or add the completions."
        )
    return found


def _list_columns(columns: Iterable[str]) -> str:
    """Names of columns for messages, without those that the trainer adds."""
    return ", ".join(repr(name) for name in columns if not name.startswith("rlora_")) or "none"


def check_pictures(dataset: Any, where: str, *, text_column: str | None) -> None:
    """
    As [`check_rows`], of rows with pictures, which TRL's collator makes batches of without preparation.

    Args:
        dataset (`Dataset` or `IterableDataset`): The data.
        where (`str`): What they are called in messages.
        text_column (`str`, *optional*): Column of plain text, if it reaches the collator.

    Raises:
        ValueError: If it finds no text, or values that it fails on; of streams and transforms the first row is looked
            at.
    """
    first = next(iter(dataset), None)
    if first is None:
        return
    text = [] if text_column is None else [(text_column,)]
    names = next((names for names in (("messages",), *text, _PAIR) if set(names) <= set(first)), None)
    if names is None:
        raise ValueError(
            f"{where} has the columns {_list_columns(first)}; accepted beside pictures are 'messages', "
            f"{'' if text_column is None else f'{text_column!r}, '}or 'prompt' with 'completion'. Rename its columns."
        )
    if isinstance(dataset, Dataset) and dataset.format["type"] != "custom":
        check_rows(as_shown(dataset).select_columns(list(names)), where, text_column=text_column or "text")


def as_shown(dataset: Any) -> Any:
    """A map-style data set without its format: with the columns that the format shows, and with plain values."""
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        return dataset
    columns = dataset.format["columns"]
    # Formats make other values of lists, such as arrays, of which TRL's preparation knows nothing.
    plain = dataset.with_format(None)
    return plain if len(columns) == len(plain.column_names) else plain.select_columns(columns)


def check_rows(dataset: Any, where: str, *, text_column: str = "text") -> Any:
    """
    Refuse data that TRL's preparation fails on: other columns, missing values, or values of another kind.

    All rows of map-style data are checked: by Arrow where the type of a column leaves little to go wrong, and one by
    one where a column is JSON, which holds anything. Each row of a stream is checked as it is read.

    Args:
        dataset (`Dataset` or `IterableDataset`): The data. With a column `input_ids` it is tokenized; a stream of such
            is checked by its first row.
        where (`str`): What the data are called in messages.
        text_column (`str`, *optional*, defaults to `"text"`): Column of plain text (`dataset_text_field`).

    Returns:
        `Dataset` or `IterableDataset`: The data, without a format unless it is tokenized; a stream, which keeps its
        own, checks its rows as they are read.

    Raises:
        ValueError: With the row, counted from 1, and the column.
    """
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        return dataset  # columns are those of a transform, with which TRL refuses to prepare data
    plain = as_shown(dataset)
    first = next(iter(plain), None)
    if first is None:
        raise ValueError(f"{where} has no rows. Check the file, split or filter that it comes from.")
    columns = list(plain.column_names or first)
    is_tokenized = "input_ids" in columns
    names = ("input_ids",) if is_tokenized else check_format(columns, first, where, text_column=text_column)
    checked = [*names, *(_read_beside(names, first, text_column) if not is_tokenized else ())]
    check = partial(_check_values, names=checked, where=where, text_column=text_column, first=first)
    for place, row in _suspects(plain, first, [name for name in checked if name in columns]):
        check(row, place)
    if is_tokenized:
        return dataset
    if isinstance(dataset, IterableDataset):
        return dataset.map(check, with_indices=True, features=dataset.features)
    return plain


def _read_beside(names: tuple[str, ...], first: Mapping[str, Any], text_column: str) -> list[str]:
    """What TRL's preparation reads beside the columns that it trains on, of those that the data have."""
    # It ends a text even where it trains on prompts and completions.
    ends_text = len(names) == 2 and isinstance(first.get(names[0]), str)
    beside = [*COMPANIONS_OF_TEXT, *([text_column] if ends_text else [])]
    return [name for name in beside if name in first and name not in names]


def _check_values(
    row: Mapping[str, Any],
    place: int,
    *,
    names: Sequence[str],
    where: str,
    text_column: str,
    first: Mapping[str, Any] | None = None,
) -> Mapping[str, Any]:
    """The row at a place, counted from 0, if these columns have what they must have, with such a first row."""
    for name in names:
        if name in COMPANIONS_OF_TEXT and name not in row:
            continue
        value = row.get(name)
        problem = _value_problem(value, name, is_text=name == text_column)
        if problem is None and name in _PAIR and isinstance(value, list) and isinstance((first or {}).get(name), str):
            problem = "it is a list, and row 1 has text. Give all rows as text, or all as lists of messages."
        if problem is not None:
            raise ValueError(f"{where}, row {place + 1}, column {name!r}: {problem}")
    if set(_PAIR) <= set(names) and isinstance(row["prompt"], str) != isinstance(row["completion"], str):
        raise ValueError(
            f"{where}, row {place + 1}: of 'prompt' and 'completion' one is text and the other a list of messages. "
            "Give both as text, or both as lists of messages."
        )
    return row


def _suspects(dataset: Any, first: Mapping[str, Any], names: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """With their places: the first row, the first of each column that Arrow finds fault with, and all of JSON."""
    yield 0, first
    if not isinstance(dataset, Dataset):
        return
    read = dataset.select_columns(list(names))
    if "Json(" in repr(read.features):
        batches = (batch for batch in read.iter(batch_size=1000))
        rows = ({name: batch[name][i] for name in names} for batch in batches for i in range(len(batch[names[0]])))
        yield from enumerate(rows)
        return
    places: set[int] = set()
    for name in names:
        if name == "tools":
            places.update(_unreadable_tools(read))
        elif read.data.column(name).null_count or not isinstance(read.features[name], Value):
            places.update(np.flatnonzero(by_row(read, [name], partial(_are_faulty, name)))[:1].tolist())
    for place in sorted(places - {0}):
        yield place, read[place]


def _unreadable_tools(dataset: Dataset) -> list[int]:
    """The first row whose tools, written as JSON, can't be read."""
    if not is_text(dataset.features["tools"]):
        return []
    values, numbers = encode(dataset, "tools")
    broken = [number for number, value in enumerate(values) if _value_problem(value, "tools", is_text=False)]
    return np.flatnonzero(np.isin(numbers, broken))[:1].tolist()


def _are_faulty(name: str, values: pa.Array) -> pa.Array:
    """Which values of a column are null or, of messages, empty lists or with one that is null or without a role."""
    faulty = pc.is_null(values)
    is_list = pa.types.is_list(values.type) or pa.types.is_large_list(values.type)
    if not is_list or name in (*COMPANIONS_OF_TEXT, "input_ids"):
        return faulty
    lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy()
    messages = pc.list_flatten(values)
    roles = messages
    key = _KEYS.get(name, _OPENAI_KEYS)[0]
    if pa.types.is_struct(messages.type) and messages.type.get_field_index(key) >= 0:
        roles = pc.struct_field(messages, key)
    found = lengths == 0
    found[np.repeat(np.arange(len(values)), lengths)[pc.is_null(roles).to_numpy(zero_copy_only=False)]] = True
    return pc.or_(faulty, pa.array(found))


def _value_problem(value: Any, name: str, *, is_text: bool) -> str | None:
    """Why a value can't be trained on, and what to do; `None` if it can."""
    if name in _OTHER_KINDS:
        return _other_problem(value, name)
    what = "text" if is_text or name not in ("messages", "conversations") else "a list of messages"
    if value is None:
        return f"it is missing or null, and must be {what}. Fill it in, or remove the row."
    if isinstance(value, str):
        return None if what == "text" else f"it is text, and must be {what}. Use 'prompt' and 'completion' for text."
    if isinstance(value, list) and not is_text:
        return _messages_problem(value, name)
    return f"it is {_shorten(value)}, of type {type(value).__name__}, and must be {what}. {_remedy(value, what)}"


def _other_problem(value: Any, name: str) -> str | None:
    """As [`_value_problem`], of columns that are neither text nor messages."""
    if name == "tools":
        try:
            is_good = not isinstance(value, str) or json.loads(value) is not ...
        except json.JSONDecodeError:
            is_good = False
    elif name == "chat_template_kwargs":
        is_good = isinstance(value, Mapping)
    else:
        is_good = hasattr(value, "__len__") and not isinstance(value, str | bytes)
    shown = "missing or null" if value is None else _shorten(value)
    return None if is_good else f"it is {shown}, and must be {_OTHER_KINDS[name]}. Fill it in, or remove the row."


def _remedy(value: Any, what: str) -> str:
    if hasattr(value, "__array__"):
        return "It comes from a format of the data set: remove that with `with_format(None)`."
    if what == "text":
        return f"Write it as {json.dumps(str(value)) if isinstance(value, int | float) else 'text'}."
    if isinstance(value, dict):
        return "Put the message into a list."
    return 'Write it as a list, such as [{"role": "user", "content": "..."}].'


def _messages_problem(messages: list[Any], name: str) -> str | None:
    keys = _KEYS.get(name, _OPENAI_KEYS)
    listed = " and ".join(map(repr, keys))
    if not messages:
        return f"it is an empty list, and must have messages with {listed}. Fill it in, or remove the row."
    # A message that calls a tool may have no content, but each has a role. TRL converts those that have both.
    required = keys if name in _KEYS else keys[:1]
    for message in messages:
        if (
            not isinstance(message, dict)
            or message.get(keys[0]) is None
            or not all(key in message for key in required)
        ):
            is_other = isinstance(message, dict) and message.get("role") is not None and name in _KEYS
            hint = "Rename the column to 'messages'." if is_other else "Correct it."
            return f"it has {_shorten(message)}, and messages must have {listed}. {hint}"
    return None


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def rows_by_task(
    dataset: Any, task_column: str, limit: int | None = None, *, scored_as: str | None = None
) -> dict[str, list[dict]]:
    """
    The rows of each task, in the order in which tasks first occur.

    Args:
        dataset (`Dataset`): A data set with a column that names the task.
        task_column (`str`): That column, of strings, integers or classes.
        limit (`int`, *optional*): Only the first rows of each task.
        scored_as (`str`, *optional*):
            What the data are called in messages, if their prompts, completions and options are to be scored.

    Raises:
        ValueError: If the column is of another type, or has rows without a task or with a value that can't name one;
            if rows can't be scored, with the row, counted from 1, and the column.
    """
    names, numbers = encode_tasks(dataset, task_column)
    places = [np.flatnonzero(numbers == number)[:limit] for number in range(len(names))]
    kept = np.sort(np.concatenate(places))
    rows: dict[str, list[dict]] = {name: [] for name in names}
    for place, row in zip(kept.tolist(), dataset.select(kept), strict=True):
        checked = row if scored_as is None else _scorable_row(row, place, scored_as)
        rows[names[numbers[place]]].append(checked)
    return rows


def _scorable_row(row: dict[str, Any], place: int, where: str) -> dict[str, Any]:
    texts = dict.fromkeys(_PAIR, "")
    _check_values(row, place, names=_PAIR, where=where, text_column="completion", first=texts)
    return {**row, "options": _options(row.get("options"), f"{where}, row {place + 1}")}


def is_scorable(dataset: Any) -> bool:
    """Whether rows have a prompt and a completion, both plain text."""
    if isinstance(dataset, IterableDataset) or not set(_PAIR) <= set(dataset.column_names or ()):
        return False
    first = dataset[0] if len(dataset) else {}
    return bool(first) and all(is_text(dataset.features[name]) or isinstance(first[name], str) for name in _PAIR)


def default_tasks(dataset: Dataset, column: str, where: str) -> bool:
    """Whether a column that happens to be called like the default names tasks; warns where that may surprise."""
    if column not in dataset.column_names:
        return False
    reason = why_no_tasks(dataset, column)
    if reason:
        warnings.warn(f"{where}: {describe_no_tasks(column, reason)}", stacklevel=3)
    return reason is None


def load_task_rows(
    name: str,
    *,
    split: str | None = None,
    task_column: str | None = None,
    limit: int | None = None,
    default_task: str | None = None,
    answers: bool = False,
) -> dict[str, list[dict]]:
    """
    Rows to score or to measure on, by task: in any form that is trained on. `conversations` become `messages`.

    Args:
        name (`str`):
            As in [`load_splits`].
        split (`str`, *optional*):
            Defaults to "test" where there is one, else to the only one.
        task_column (`str`, *optional*):
            Column that names the task. Defaults to "task"; all rows are of one task where there is no such column, or
            its values don't seem to be names of tasks.
        limit (`int`, *optional*):
            Only the first rows of each task.
        default_task (`str`, *optional*):
            Name of that one task. Defaults to the name of the data.
        answers (`bool`, *optional*, defaults to `False`):
            Rows must have an answer to score, which plain text has not.

    Raises:
        ValueError: If there is no such split or column, or no rows, or rows without a task or of another form; see
            [`rows_by_task`] and [`check_rows`].
    """
    splits = load_splits(name, file_split=split or "test")
    chosen = split or ("test" if "test" in splits else next(iter(splits)))
    if chosen not in splits or (split is None and chosen != "test" and len(splits) > 1):
        wanted = f"split {split!r}" if split else 'split "test"'
        raise ValueError(f"{name} has no {wanted}; it has {', '.join(splits)}. Name one of them.")
    dataset = splits[chosen]
    if len(dataset) == 0:
        raise ValueError(f"{name} has no rows in split {chosen!r}.")
    column = task_column or "task"
    if task_column is not None and column not in dataset.column_names:
        raise ValueError(
            f"{name} has no column {task_column!r} to name tasks; it has {', '.join(dataset.column_names)}."
        )
    with explained(Path(name), READING_ERRORS):
        names = _check_scorable(dataset, name if len(splits) == 1 else f"{name}, split {chosen!r}", answers)
    if names == ("text",):
        dataset = dataset.remove_columns([chat for chat in ("messages", *_KEYS) if chat in dataset.column_names])
    if names == ("conversations",):
        dataset = dataset.map(maybe_convert_to_chatml, remove_columns="conversations")
    if task_column is not None or default_tasks(dataset, column, name):
        try:
            return rows_by_task(dataset, column, limit)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return {default_task or Path(name).stem: dataset.select(range(min(len(dataset), limit or len(dataset)))).to_list()}


def _check_scorable(dataset: Dataset, where: str, answers: bool) -> tuple[str, ...]:
    columns = [name for name in dataset.column_names if name != "input_ids"]  # measured by their text
    names = check_format(columns, dataset[0], where)
    if answers and names == ("text",):
        raise ValueError(
            f"{where} has the columns {', '.join(map(repr, columns))}; accepted are 'prompt' with 'completion', or "
            "'messages' that end with an answer, as plain text has no answer to score. Rename its columns."
        )
    read = [name for name in dataset.column_names if name in (*names, *COMPANIONS_OF_TEXT)]
    check_rows(dataset.select_columns(read), where)
    return names


def text_rows(tasks: Mapping[str, Sequence[Mapping[str, Any]]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """
    Rows by task with prompt, completion and options as text, as [`score_tasks`] takes them.

    Conversations become the text that the chat template makes of them, as in training. Of `messages` the last turn of
    the assistant is the answer; what follows it is left out. Options are texts, contents of that turn.

    Args:
        tasks (`Mapping[str, Sequence[Mapping]]`): Rows by task, from [`load_task_rows`].
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.

    Raises:
        ValueError: If messages have no answer, or the tokenizer has no chat template.
    """
    return {
        task: [_text_row(row, tokenizer, f"Task {task!r}, row {number}") for number, row in enumerate(rows, start=1)]
        for task, rows in tasks.items()
    }


def _text_row(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: str) -> dict[str, Any]:
    options = _options(row.get("options"), where)
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return {**row, "options": options}
    prompt, answer = _split_messages(row, where)
    if not tokenizer.chat_template:
        raise ValueError(
            f"{where} is a conversation, and the model's tokenizer has no chat template to write it with. Use a model "
            "that has one, or give 'prompt' and 'completion' as text."
        )
    completions = []
    for turn in [answer, *([{"role": answer[0]["role"], "content": option}] for option in options)]:
        text, completion = _write(prompt, turn, row, tokenizer)
        completions.append(completion)
    return {**row, "prompt": text, "completion": completions[0], "options": completions[1:]}


def _options(options: Any, where: str) -> list[str]:
    """The options of a row; those of a CSV file are a list in JSON."""
    if isinstance(options, str):
        try:
            options = json.loads(options)
        except json.JSONDecodeError:
            pass  # refused below
    options = [] if options is None else options
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise ValueError(
            f"{where}, column 'options': it is {_shorten(options)}, and must be a list of texts, such as "
            '[" yes", " no"]. Correct it.'
        )
    return options


def _split_messages(row: Mapping[str, Any], where: str) -> tuple[list[dict], list[dict]]:
    """The messages before the answer, and the answer."""
    if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        return row["prompt"], row["completion"]
    messages = row.get("messages") or []
    places = [place for place, message in enumerate(messages) if message.get("role") in _ASSISTANTS]
    if not places or places[-1] == 0:
        raise ValueError(
            f"{where}, column 'messages': it has no answer of the assistant to a message before it, only the roles "
            f"{', '.join(repr(message.get('role')) for message in messages) or 'none'}. Add the answer, or remove the "
            "row."
        )
    return messages[: places[-1]], [messages[places[-1]]]


def _write(
    prompt: list[dict], answer: list[dict], row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str]:
    """A conversation as text, parted where the answer begins. Scoring adds the end of the sequence itself."""
    tools = row.get("tools")
    options = {
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **(row.get("chat_template_kwargs") or {}),
    }
    before = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **options)
    whole = tokenizer.apply_chat_template([*prompt, *answer], tokenize=False, **options)
    before = os.path.commonprefix([before, whole])  # some templates open an answer otherwise than they write it
    bos = tokenizer.bos_token
    if bos and before.startswith(bos) and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]:
        whole, before = whole[len(bos) :], before[len(bos) :]  # the tokenizer puts it there as well
    completion = whole[len(before) :].rstrip("\n")
    return before, completion.removesuffix(tokenizer.eos_token or "")
