"""The row formats that TRL trains on, and checks that report the row and column of an invalid value."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset, Value

from ..reading import shorten
from .columns import by_row, encode, is_text
from .loading import wrong_separator


PAIR = ("prompt", "completion")
# Columns that preparation reads in addition to text or messages.
COMPANIONS_OF_TEXT = ("tools", "chat_template_kwargs")

# The keys of a message in ShareGPT's format, by its column; all other columns have OpenAI's.
SHAREGPT_KEYS = {"conversations": ("from", "value")}
_OPENAI_KEYS = ("role", "content")
_FORMATS = (*PAIR, "messages", "conversations", "text")
_MAX_LISTED = 20  # columns in a message
_ACCEPTED = {
    "tools": "null, a list of tools, or such a list in JSON",
    "chat_template_kwargs": "a dictionary, empty for none",
    "input_ids": "a list of the numbers of tokens",
}


def check_format(
    columns: Iterable[str], first: Mapping[str, Any], where: str, *, text_column: str = "text"
) -> tuple[str, ...]:
    """
    The columns that TRL trains on. It decides by the first row, not only by the names of the columns.

    Args:
        columns (`Iterable[str]`): Names of all columns.
        first (`Mapping[str, Any]`): The first row.
        where (`str`): Name of the data in messages.
        text_column (`str`, *optional*, defaults to `"text"`): Column of plain text (`dataset_text_field`).

    Returns:
        `tuple[str, ...]`: `("prompt", "completion")`, `("conversations",)`, `("messages",)` or `(text_column,)`.

    Raises:
        ValueError: If none of these columns exists, or there is a prompt without a completion.
    """
    columns = list(columns)
    names = _find_format(columns, first, text_column)
    accepted = f"accepted are 'prompt' with 'completion', {text_column!r}, or 'messages'"
    if names is None:
        separator = wrong_separator(columns)
        remedy = f"Separate them by commas instead of {separator!r}." if separator else "Rename its columns."
        raise ValueError(f"{where} has the columns {list_columns(columns)}; {accepted}. {remedy}")

    # TRL takes a single 'prompt' column for half of a pair.
    if "prompt" in columns and len(names) == 1:
        is_prompt = names == ("prompt",)
        raise ValueError(
            f"{where} has the columns {list_columns(columns)}, with a 'prompt' and no 'completion'; {accepted}. "
            f"{'Rename' if is_prompt else 'Remove'} the column 'prompt' to train on "
            f"{'it' if is_prompt else repr(names[0])}, or add the completions."
        )
    return names


def _find_format(columns: list[str], first: Mapping[str, Any], text_column: str) -> tuple[str, ...] | None:
    if set(PAIR) <= set(columns):
        return PAIR
    chats = [name for name in ("conversations", "messages") if name in columns]
    usable = [name for name in chats if _is_chat(first.get(name), name)]
    text = [text_column] if text_column in columns else []
    # If nothing is usable, an error about the messages helps more than one about missing text.
    return next(((name,) for name in (*usable, *text, *chats[::-1])), None)


def _is_chat(value: Any, name: str) -> bool:
    # As `trl.data_utils.is_conversational`, which fails on an empty list, even if there is a text column.
    if not isinstance(value, list):
        return False
    required = SHAREGPT_KEYS.get(name, ("role",))
    return not value or (isinstance(value[0], dict) and all(key in value[0] for key in required))


def list_columns(columns: Iterable[Any]) -> str:
    """Names of columns or roles for messages, without those that the trainer adds."""
    names = [shorten(name) for name in columns if not str(name).startswith("rlora_")]
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return f"{', '.join(names[:_MAX_LISTED])}{more}" or "none"


def check_pictures(dataset: Any, where: str, *, text_column: str | None) -> None:
    """
    As [`check_rows`], for rows with images, which TRL's collator reads without preparation.

    Args:
        dataset (`Dataset` or `IterableDataset`): The data.
        where (`str`): Name of the data in messages.
        text_column (`str`, *optional*): Column of plain text, if it reaches the collator.

    Raises:
        ValueError: If there is no text, or the collator would fail on a value. For streams and transforms only the
            first row is checked.
    """
    first = next(iter(dataset), None)
    if first is None:
        return
    text = [] if text_column is None else [(text_column,)]
    names = next((names for names in (("messages",), *text, PAIR) if set(names) <= set(first)), None)
    if names is None:
        raise ValueError(
            f"{where} has the columns {list_columns(first)}; accepted with images are 'messages', "
            f"{'' if text_column is None else f'{text_column!r}, '}or 'prompt' with 'completion'. Rename its columns."
        )
    if isinstance(dataset, Dataset) and not has_transform(dataset):
        check_rows(as_shown(dataset).select_columns(list(names)), where, text_column=text_column or "text")


def has_transform(dataset: Any) -> bool:
    """Whether a custom function creates the rows when they are read (`Dataset.with_transform`)."""
    return isinstance(dataset, Dataset) and dataset.format["type"] == "custom"


def as_shown(dataset: Any) -> Any:
    """A map-style dataset without its format: with the columns that the format shows, and with plain values."""
    if not isinstance(dataset, Dataset) or has_transform(dataset):
        return dataset
    columns = dataset.format["columns"]
    # Formats turn lists into arrays or tensors, which TRL's preparation does not expect.
    plain = dataset.with_format(None)
    return plain if len(columns) == len(plain.column_names) else plain.select_columns(columns)


def check_rows(dataset: Any, where: str, *, text_column: str = "text") -> Any:
    """
    Refuse data that TRL's preparation fails on: other columns, missing values, or values of another type.

    All rows of map-style data are checked, by Arrow if the columns are typed, and one by one if a column is JSON. Each
    row of a stream is checked when it is read.

    Args:
        dataset (`Dataset` or `IterableDataset`): The data. A column `input_ids` means that it is tokenized; only the
            first row of a tokenized stream is checked.
        where (`str`): Name of the data in messages.
        text_column (`str`, *optional*, defaults to `"text"`): Column of plain text (`dataset_text_field`).

    Returns:
        `Dataset` or `IterableDataset`: The data, without a format unless tokenized. A stream keeps its format and
        checks its rows when they are read.

    Raises:
        ValueError: With the row, counted from 1, and the column.
    """
    if has_transform(dataset):
        return dataset  # TRL refuses to prepare data with a transform
    plain = as_shown(dataset)
    first = next(iter(plain), None)
    if first is None:
        raise ValueError(f"{where} has no rows. Check the file, split or filter that it comes from.")

    # The columns to check.
    columns = list(plain.column_names or first)
    is_tokenized = "input_ids" in columns
    names: tuple[str, ...] = ("input_ids",)
    if not is_tokenized:
        names = check_format(columns, first, where, text_column=text_column)
        names += _companions(names, first, text_column)

    others = [name for name in columns if name in _FORMATS and name not in names]
    check = partial(check_row, names=names, where=where, text_column=text_column, first=first, others=others)
    for index, row in _suspects(plain, first, [name for name in names if name in columns]):
        check(row, index)
    if is_tokenized:
        return dataset
    if isinstance(dataset, IterableDataset):
        return dataset.map(check, with_indices=True, features=dataset.features)
    return plain


def _companions(names: tuple[str, ...], first: Mapping[str, Any], text_column: str) -> tuple[str, ...]:
    """The columns that TRL's preparation reads in addition to those that it trains on."""
    # It appends the end of the sequence to a text even where it trains on prompts and completions.
    ends_text = len(names) == 2 and isinstance(first.get(names[0]), str)
    beside = (*COMPANIONS_OF_TEXT, *([text_column] if ends_text else []))
    return tuple(name for name in beside if name in first and name not in names)


def check_row(
    row: Mapping[str, Any],
    index: int,
    *,
    names: Sequence[str],
    where: str,
    text_column: str,
    first: Mapping[str, Any] | None = None,
    others: Sequence[str] = (),
) -> Mapping[str, Any]:
    """
    Check one row.

    Args:
        row (`Mapping[str, Any]`): The row.
        index (`int`): Its index, from 0.
        names (`Sequence[str]`): The columns to check.
        where (`str`), text_column (`str`): See [`check_rows`].
        first (`Mapping[str, Any]`, *optional*): The first row; all others must have the same kind of values.
        others (`Sequence[str]`, *optional*): Columns of other formats that the data have, for messages.

    Returns:
        `Mapping[str, Any]`: The row.

    Raises:
        ValueError: If a value can't be trained on.
    """
    for name in names:
        if name in COMPANIONS_OF_TEXT and name not in row:
            continue
        value = row.get(name)
        problem = _value_problem(value, name, is_text=name == text_column)
        if problem is None and name in PAIR and isinstance(value, list) and isinstance((first or {}).get(name), str):
            problem = "it is a list, and row 1 has text. Give all rows as text, or all as lists of messages."
        if problem is not None and value is None and others and name not in _ACCEPTED:
            problem += f" If it has {list_columns(others)} instead: rows have one format, so bring all to one."
        if problem is not None:
            raise ValueError(f"{where}, row {index + 1}, column {name!r}: {problem}")

    if set(PAIR) <= set(names) and isinstance(row["prompt"], str) != isinstance(row["completion"], str):
        raise ValueError(
            f"{where}, row {index + 1}: of 'prompt' and 'completion' one is text and the other a list of messages. "
            "Give both as text, or both as lists of messages."
        )
    return row


def _suspects(dataset: Any, first: Mapping[str, Any], names: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows to check, with their indices: the first, the first faulty one of each column, and all if one is JSON."""
    yield 0, first
    if not isinstance(dataset, Dataset):
        return
    read = dataset.select_columns(list(names))

    if "Json(" in repr(read.features):
        batches = (batch for batch in read.iter(batch_size=1000))
        rows = ({name: batch[name][i] for name in names} for batch in batches for i in range(len(batch[names[0]])))
        yield from enumerate(rows)
        return

    indices: set[int] = set()
    for name in names:
        if name == "tools":
            indices.update(_unreadable_tools(read))
        elif read.data.column(name).null_count or not isinstance(read.features[name], Value):
            indices.update(np.flatnonzero(by_row(read, [name], partial(_are_faulty, name)))[:1].tolist())
    for index in sorted(indices - {0}):
        yield index, read[index]


def _unreadable_tools(dataset: Dataset) -> list[int]:
    """The first row whose tools, written as JSON, can't be read."""
    if not is_text(dataset.features["tools"]):
        return []
    values, numbers = encode(dataset, "tools")
    broken = [number for number, value in enumerate(values) if _companion_problem(value, "tools")]
    return np.flatnonzero(np.isin(numbers, broken))[:1].tolist()


def _are_faulty(name: str, values: pa.Array) -> pa.Array:
    """Which values `[n]` of a column are null or, of messages, empty or with a message that is null or has no role."""
    nulls = pc.is_null(values)
    is_list = pa.types.is_list(values.type) or pa.types.is_large_list(values.type)
    if not is_list or name in _ACCEPTED:
        return nulls

    lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy()  # [n]
    messages = pc.list_flatten(values)
    roles = messages
    key = SHAREGPT_KEYS.get(name, _OPENAI_KEYS)[0]
    if pa.types.is_struct(messages.type) and messages.type.get_field_index(key) >= 0:
        roles = pc.struct_field(messages, key)

    faulty = lengths == 0
    faulty[np.repeat(np.arange(len(values)), lengths)[pc.is_null(roles).to_numpy(zero_copy_only=False)]] = True
    return pc.or_(nulls, pa.array(faulty))


def _value_problem(value: Any, name: str, *, is_text: bool) -> str | None:
    """The problem with a value and its remedy, for messages; `None` if the value is valid."""
    if name in _ACCEPTED:
        return _companion_problem(value, name)
    accepted = "text" if is_text or name not in ("messages", "conversations") else "a list of messages"
    if value is None:
        return f"it is missing or null, and must be {accepted}. Fill it in, or remove the row."
    if isinstance(value, str):
        is_chat = accepted != "text"
        return f"it is text, and must be {accepted}. Use 'prompt' and 'completion' for text." if is_chat else None
    if isinstance(value, list) and not is_text:
        return _messages_problem(value, name)
    shown = f"it is {shorten(value, 60)}, of type {type(value).__name__}"
    return f"{shown}, and must be {accepted}. {_remedy(value, accepted)}"


def _companion_problem(value: Any, name: str) -> str | None:
    """As [`_value_problem`], for columns that are neither text nor messages."""
    if name == "tools":
        try:
            is_good = not isinstance(value, str) or json.loads(value) is not ...
        except (ValueError, RecursionError):
            is_good = False
    elif name == "chat_template_kwargs":
        is_good = isinstance(value, Mapping)
    else:
        is_good = hasattr(value, "__len__") and not isinstance(value, str | bytes)
    shown = "missing or null" if value is None else shorten(value, 60)
    return None if is_good else f"it is {shown}, and must be {_ACCEPTED[name]}. Fill it in, or remove the row."


def _remedy(value: Any, accepted: str) -> str:
    if hasattr(value, "__array__"):
        return "The dataset has a format: remove it with `with_format(None)`."
    if accepted == "text":
        return f"Write it as {json.dumps(str(value)) if isinstance(value, int | float) else 'text'}."
    if isinstance(value, dict):
        return "Put the message into a list."
    return 'Write it as a list, such as [{"role": "user", "content": "..."}].'


def _messages_problem(messages: list[Any], name: str) -> str | None:
    keys = SHAREGPT_KEYS.get(name, _OPENAI_KEYS)
    both = " and ".join(map(repr, keys))
    if not messages:
        return f"it is an empty list, and must have messages with {both}. Fill it in, or remove the row."

    # A message that calls a tool may have no content, but each has a role. TRL converts those that have both.
    required = keys if name in SHAREGPT_KEYS else keys[:1]
    for message in messages:
        is_message = isinstance(message, dict)
        if is_message and message.get(keys[0]) is not None and all(key in message for key in required):
            continue
        is_openai = is_message and message.get("role") is not None and name in SHAREGPT_KEYS
        remedy = "Rename the column to 'messages'." if is_openai else "Correct it."
        return f"it has {shorten(message, 60)}, and messages must have {both}. {remedy}"
    return None
