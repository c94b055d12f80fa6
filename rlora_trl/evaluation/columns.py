"""
Columns of map-style data sets by Arrow, and the tasks that a column names.

A data set that was shuffled, filtered or selected from is a table with the places of its rows in it. `datasets` reads
such rows one by one, and copies all columns before it adds one: 20 to 40 s for a million rows. So what depends on one
column is computed on the table as it is stored, and put in the order of the rows afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, IterableDataset, Json, Value

from ..tuner.task_names import MAX_TASK_NAME, MAX_TASKS, task_name


# Names of types, as `datasets` has them.
TEXT_TYPES = ("string", "large_string")
INTEGER_TYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")

# From here on a column of mostly different values is not taken to name tasks, unless it is asked for.
_FEW_ROWS = 20

# The whole stored table is computed on, and gets a column, where at least one in so many of its rows is used.
_STORED_ROWS_PER_ROW = 4


def arrow_batches(dataset: Dataset) -> Iterator[pa.Table]:
    """The rows of a data set as tables."""
    # Batches, because a data set that was shuffled or selected from is copied as it is read.
    return dataset.with_format("arrow").iter(batch_size=10_000)


def stored_places(dataset: Dataset) -> np.ndarray | None:
    """The place of each row in `dataset.data`; `None` where rows are all of the table, in its order."""
    # There is no public name as of datasets 5.2.
    indices = dataset._indices
    return None if indices is None else indices.column(0).to_numpy().astype(np.int64)


def _uses_most(dataset: Dataset) -> bool:
    return len(dataset) * _STORED_ROWS_PER_ROW >= dataset.data.num_rows


def by_row(dataset: Dataset, columns: Sequence[str], function: Callable[..., pa.Array]) -> np.ndarray:
    """
    What a function makes of some columns, in the order of the rows.

    Args:
        dataset (`Dataset`): The data set, of any format.
        columns (`Sequence[str]`): Names of the columns.
        function (`Callable`): Takes a part of each of these columns as an array `[n]`, as they are stored, and returns
            numbers or truth values `[n]`.

    Returns:
        `np.ndarray` of shape `[rows]`.
    """
    narrow = dataset.with_format(None).select_columns(list(columns))
    places = stored_places(narrow)
    if places is not None and not _uses_most(narrow):
        places = None
        batches = (batch for table in arrow_batches(narrow) for batch in table.combine_chunks().to_batches())
    else:
        batches = iter(narrow.data.to_batches())
    parts = [function(*(batch[name] for name in columns)).to_numpy(zero_copy_only=False) for batch in batches]
    values = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    return values if places is None else values[places]


def encode(dataset: Dataset, column: str) -> tuple[list[Any], np.ndarray]:
    """
    The different values of a column, in the order in which they first occur, and the number of that of each row.

    Args:
        dataset (`Dataset`): The data set, of any format.
        column (`str`): A column of values that can be compared, such as texts or integers.

    Returns:
        `tuple[list, np.ndarray]`: Values as they are stored, and integers of shape `[rows]`.
    """
    stored = dataset.data.column(column).unique()
    codes = by_row(dataset, [column], lambda part: pc.index_in(part, value_set=stored))
    present, first, numbers = np.unique(codes, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return stored.take(pa.array(present[order], type=pa.int64())).to_pylist(), rank[numbers]


def add_column(dataset: Dataset, name: str, values: np.ndarray) -> Dataset:
    """
    `Dataset.add_column` without copying all other columns of a data set that was shuffled or selected from.

    Args:
        dataset (`Dataset`): The data set. Its format is dropped.
        name (`str`): Name of the new column.
        values (`np.ndarray` of shape `[rows]`): Its values, the same wherever the same stored row occurs again.
    """
    places = stored_places(dataset)
    if places is None or not len(places) or not _uses_most(dataset):
        return dataset.add_column(name, values)

    stored = np.full(dataset.data.num_rows, values[0], dtype=values.dtype)
    stored[places] = values
    # The fingerprint, by which `datasets` finds cached results, is that of the rows; `select` adds to it.
    table = Dataset(dataset.data, info=dataset.info.copy(), split=dataset.split, fingerprint=dataset._fingerprint)
    return table.add_column(name, stored).select(places)


def is_missing(value: Any) -> bool:
    """Whether a value of a column of tasks names none."""
    # NaN is what pandas makes of an empty cell.
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _text_of(dataset: Dataset | IterableDataset, task_column: str) -> Callable[[Any], Any]:
    """What a value of a column says: the label of a class, `None` without one, and of other columns the value."""
    feature = (dataset.features or {}).get(task_column)
    if not isinstance(feature, ClassLabel):
        return lambda value: value
    # Data sets without public labels have -1.
    return lambda value: feature.int2str(value) if isinstance(value, int) and value >= 0 else None


def task_namer(dataset: Dataset | IterableDataset, task_column: str) -> Callable[[Any], str | None]:
    """What makes the name of a task of a value in its column; `None` of one that names no task."""
    text_of = _text_of(dataset, task_column)

    def name_of(value: Any) -> str | None:
        text = text_of(value)
        try:
            return None if is_missing(text) else task_name(text)
        except (ValueError, TypeError):
            return None

    return name_of


def is_text(feature: Any) -> bool:
    """Whether this is the type of a column of texts."""
    return isinstance(feature, Value) and feature.dtype in TEXT_TYPES


def can_name_tasks(feature: Any) -> bool:
    """Whether columns of this type can name tasks: classes, texts and integers."""
    return isinstance(feature, ClassLabel) or getattr(feature, "dtype", None) in (*TEXT_TYPES, *INTEGER_TYPES)


def tells_tasks(dataset: Dataset | IterableDataset, column: str) -> bool:
    """
    Whether rows can be looked up by the names of tasks in a column: one that is there, of a type that names some. Of a
    stream without features, which tell the type, each row is looked at.
    """
    if isinstance(dataset, IterableDataset) and dataset.features is None:
        return True
    feature = (dataset.features or {}).get(column)
    if feature is None or not can_name_tasks(feature):
        return False
    return isinstance(dataset, IterableDataset) or not all(map(is_missing, _texts(dataset, column)[0]))


def why_no_tasks(dataset: Dataset, column: str) -> str | None:
    """
    Why a column that happens to be called like the default names no tasks.

    Args:
        dataset (`Dataset`): The data set.
        column (`str`): One of its columns.

    Returns:
        `str`, *optional*: The reason, as the end of a sentence that the column begins; "" where it can't surprise, as
        of lists, structs and columns of nulls; `None` if the column names tasks.
    """
    feature = dataset.features[column]
    if not can_name_tasks(feature):
        is_plain = isinstance(feature, Value) and feature.dtype != "null"
        if isinstance(feature, Json):
            stored = (value for batch in dataset.select_columns([column]).iter(1000) for value in batch[column])
            is_plain = not isinstance(next((value for value in stored if value is not None), []), list | dict)
        return f"has values of the type {feature}" if is_plain else ""
    texts, values = _texts(dataset, column)
    if values and all(map(is_missing, texts)):
        return "" if values == [None] else "has no name in any row"
    counts = f"has {len(values)} different values in {len(dataset)} rows"
    if len(dataset) >= _FEW_ROWS and len(values) > len(dataset) / 2:
        return counts
    if any(len(str(value)) > MAX_TASK_NAME for value in values):
        return f"{counts}, some longer than {MAX_TASK_NAME} characters"
    if len(values) > MAX_TASKS:
        return f"{counts}, and an adapter has at most {MAX_TASKS} tasks"
    return None


def describe_no_tasks(column: str, reason: str) -> str:
    """A warning with the reason of [`why_no_tasks`]."""
    return (
        f"Column {column!r} {reason}: they don't seem to be names of tasks, and are not taken for such. Set "
        "`task_column` to the column that names them, or rename this one to be rid of this warning."
    )


def _texts(dataset: Dataset, column: str) -> tuple[list[Any], list[Any]]:
    """What the different values of a column say, and the values."""
    values, _ = encode(dataset, column)
    return list(map(_text_of(dataset, column), values)), values


def encode_tasks(dataset: Dataset, task_column: str) -> tuple[list[str], np.ndarray]:
    """
    The names of the tasks in a column, by its different values, and the number of that of each row; see [`encode`].

    Raises:
        ValueError: If the column can't name tasks, or has rows without a task or with a value that can't name one.
    """
    feature = dataset.features[task_column]
    if not can_name_tasks(feature):
        raise ValueError(
            f"`task_column={task_column!r}` holds {feature}, which can't name tasks. It must be a column of strings "
            "or integers: cast it, or rename it if it does not name tasks."
        )
    values, numbers = encode(dataset, task_column)
    texts = [_text_of(dataset, task_column)(value) for value in values]
    missing = {place for place, text in enumerate(texts) if is_missing(text)}
    try:
        names = ["" if place in missing else task_name(text) for place, text in enumerate(texts)]
    except (ValueError, TypeError) as error:
        raise ValueError(f"Column {task_column!r} has a value that can't be used. {error}") from error
    if missing:
        rows = np.flatnonzero(np.isin(numbers, list(missing)))
        raise ValueError(
            f"{len(rows)} rows have no task in column {task_column!r}, the first is row {rows[0] + 1}. Fill it in, or "
            "filter them out."
        )
    return names, numbers
