"""
Columns of map-style datasets as Arrow arrays, and the task names in a column.

A dataset that was shuffled, filtered or selected from is a stored table with the indices of its rows. `datasets` reads
such rows one by one, and copies all columns before it adds one: 20 to 40 s for a million rows. The functions here
compute on the stored column and reorder the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, IterableDataset, Json, Value

from ..tuner.task_names import MAX_TASK_NAME, MAX_TASKS, task_name


AnyDataset: TypeAlias = Dataset | IterableDataset

# Names of types in `datasets`.
TEXT_TYPES = ("string", "large_string")
INTEGER_TYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")

# From this many rows on, a column of mostly different values does not look like task names.
_FEW_ROWS = 20

# The whole stored table is used if it has at most this many rows for each row of the dataset.
_STORED_ROWS_PER_ROW = 4


def arrow_batches(dataset: Dataset) -> Iterator[pa.Table]:
    """The rows of a dataset as tables."""
    # In batches, because reading copies the rows of a dataset that was shuffled or selected from.
    return dataset.with_format("arrow").iter(batch_size=10_000)


def stored_indices(dataset: Dataset) -> np.ndarray | None:
    """The index of each row in `dataset.data`; `None` if the rows are the stored table itself."""
    # No public name as of datasets 5.2.
    indices = dataset._indices
    return None if indices is None else indices.column(0).to_numpy().astype(np.int64)


def _uses_most(dataset: Dataset) -> bool:
    return len(dataset) * _STORED_ROWS_PER_ROW >= dataset.data.num_rows


def by_row(dataset: Dataset, columns: Sequence[str], function: Callable[..., pa.Array]) -> np.ndarray:
    """
    Apply a function to some columns, and return its results in the order of the rows.

    Args:
        dataset (`Dataset`): The data, of any format.
        columns (`Sequence[str]`): Names of the columns.
        function (`Callable`): Takes a part of each stored column as an array `[n]`, and returns numbers or booleans
            `[n]`.

    Returns:
        `np.ndarray` of shape `[rows]`.
    """
    narrow = dataset.with_format(None).select_columns(list(columns))
    indices = stored_indices(narrow)

    if indices is not None and not _uses_most(narrow):
        indices = None
        batches = (batch for table in arrow_batches(narrow) for batch in table.combine_chunks().to_batches())
    else:
        batches = iter(narrow.data.to_batches())

    parts = [function(*(batch[name] for name in columns)).to_numpy(zero_copy_only=False) for batch in batches]
    values = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    return values if indices is None else values[indices]


def encode(dataset: Dataset, column: str) -> tuple[list[Any], np.ndarray]:
    """
    The distinct values of a column, and the index of the value of each row.

    Args:
        dataset (`Dataset`): The data, of any format.
        column (`str`): A column of values that can be compared, such as strings or integers.

    Returns:
        `tuple[list, np.ndarray]`: Values as they are stored, in the order in which they first occur, and for each row
        `[rows]` the index of its value.
    """
    stored = dataset.data.column(column).unique()
    codes = by_row(dataset, [column], lambda part: pc.index_in(part, value_set=stored))
    present, first, numbers = np.unique(codes, return_index=True, return_inverse=True)

    # `np.unique` sorts by the stored order; renumber by the first row.
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return stored.take(pa.array(present[order], type=pa.int64())).to_pylist(), rank[numbers]


def add_column(dataset: Dataset, name: str, values: np.ndarray) -> Dataset:
    """
    `Dataset.add_column` without copying the other columns of a dataset that was shuffled or selected from.

    Args:
        dataset (`Dataset`): The data, whose format is dropped.
        name (`str`): Name of the new column.
        values (`np.ndarray` of shape `[rows]`): Its values, the same wherever the same stored row occurs again.

    Returns:
        `Dataset`: The data with the column.
    """
    indices = stored_indices(dataset)
    if indices is None or not len(indices) or not _uses_most(dataset):
        return dataset.add_column(name, values)

    stored = np.full(dataset.data.num_rows, values[0], dtype=values.dtype)
    stored[indices] = values
    # `datasets` caches results by the fingerprint, which identifies the rows; `select` updates it.
    table = Dataset(dataset.data, info=dataset.info.copy(), split=dataset.split, fingerprint=dataset._fingerprint)
    return table.add_column(name, stored).select(indices)


def is_missing(value: Any) -> bool:
    """Whether a value of a task column is empty."""
    # pandas reads an empty cell as NaN.
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def is_text(feature: Any) -> bool:
    """Whether a feature is a column of strings."""
    return isinstance(feature, Value) and feature.dtype in TEXT_TYPES


def can_name_tasks(feature: Any) -> bool:
    """Whether a feature can name tasks: class labels, strings and integers can."""
    return isinstance(feature, ClassLabel) or getattr(feature, "dtype", None) in (*TEXT_TYPES, *INTEGER_TYPES)


def _label_reader(dataset: AnyDataset, task_column: str) -> Callable[[Any], Any]:
    """A function that turns a class number into its label (`None` if it has no label) and returns other values."""
    feature = (dataset.features or {}).get(task_column)
    if not isinstance(feature, ClassLabel):
        return lambda value: value
    # Datasets without public labels use -1.
    return lambda value: feature.int2str(value) if isinstance(value, int) and value >= 0 else None


def task_namer(dataset: AnyDataset, task_column: str) -> Callable[[Any], str | None]:
    """A function that turns a value of a task column into a task name, or `None` if it does not name a task."""
    read_label = _label_reader(dataset, task_column)

    def name_of(value: Any) -> str | None:
        label = read_label(value)
        try:
            return None if is_missing(label) else task_name(label)
        except (ValueError, TypeError):
            return None

    return name_of


class _TaskColumn:
    """The different values of a task column, their labels, and the index `[rows]` of the value of each row."""

    def __init__(self, dataset: Dataset, column: str) -> None:
        self.column = column
        self.values, self.indices = encode(dataset, column)
        self.labels = list(map(_label_reader(dataset, column), self.values))

    @property
    def is_empty(self) -> bool:
        return all(map(is_missing, self.labels))

    def names(self) -> list[str]:
        """The task name of each value, or a `ValueError`."""
        missing = [index for index, label in enumerate(self.labels) if is_missing(label)]
        try:
            names = ["" if index in missing else task_name(label) for index, label in enumerate(self.labels)]
        except (ValueError, TypeError) as error:
            raise ValueError(f"Column {self.column!r} has a value that can't be used. {error}") from error
        if missing:
            rows = np.flatnonzero(np.isin(self.indices, missing))
            raise ValueError(
                f"{len(rows)} rows have no task in column {self.column!r}, the first is row {rows[0] + 1}. Fill it "
                "in, or filter them out."
            )
        return names

    def unlike_names(self) -> str | None:
        """Why the values do not look like task names, as the end of a sentence; "" if no warning is needed."""
        if self.values and self.is_empty:
            return "" if self.values == [None] else "has no name in any row"
        rows, count = len(self.indices), len(self.values)
        counts = f"has {count} different values in {rows} rows"
        if rows >= _FEW_ROWS and count > rows / 2:
            return counts
        if any(len(str(value)) > MAX_TASK_NAME for value in self.values):
            return f"{counts}, some longer than {MAX_TASK_NAME} characters"
        if count > MAX_TASKS:
            return f"{counts}, and an adapter has at most {MAX_TASKS} tasks"
        return None


def tells_tasks(dataset: AnyDataset, column: str) -> bool:
    """
    Whether a column can be used to look up the task of each row.

    Args:
        dataset (`Dataset` or `IterableDataset`): The data. A stream without features is not read: its rows are checked
            as they come.
        column (`str`): Name of the column, which may be missing.

    Returns:
        `bool`: `True` if the column exists, has a type that can name tasks, and is not empty in all rows.
    """
    if isinstance(dataset, IterableDataset) and dataset.features is None:
        return True
    feature = (dataset.features or {}).get(column)
    if feature is None or not can_name_tasks(feature):
        return False
    return isinstance(dataset, IterableDataset) or not _TaskColumn(dataset, column).is_empty


def encode_tasks(dataset: Dataset, task_column: str) -> tuple[list[str], np.ndarray]:
    """
    The task names in a column, and which of them each row has.

    Args:
        dataset (`Dataset`): The data, of any format.
        task_column (`str`): Column of strings, integers or class labels.

    Returns:
        `tuple[list[str], np.ndarray]`: Names by the different values of the column, in the order in which they first
        occur (two values may give one name), and for each row `[rows]` the index of its name.

    Raises:
        ValueError: If the column can't name tasks, or has rows without a task or with a value that can't name one.
    """
    feature = dataset.features[task_column]
    if not can_name_tasks(feature):
        raise ValueError(
            f"`task_column={task_column!r}` holds {feature}, which can't name tasks. It must be a column of strings "
            "or integers: cast it, or rename it if it does not name tasks."
        )
    column = _TaskColumn(dataset, task_column)
    return column.names(), column.indices


def encode_default_tasks(
    dataset: Dataset, column: str, warn: Callable[[str], Any]
) -> tuple[list[str], np.ndarray] | None:
    """
    As [`encode_tasks`], for a column with the default name, which the user did not choose.

    Args:
        dataset (`Dataset`): The data, of any format.
        column (`str`): Name of the column.
        warn (`Callable`): Receives the warning that the column is ignored; not called for columns of lists, structs
            and nulls.

    Returns:
        `tuple[list[str], np.ndarray]`, *optional*: See [`encode_tasks`]; `None` if the values do not look like task
        names.

    Raises:
        ValueError: If they do, and some rows have no task or a value that can't name one.
    """
    feature, tasks = dataset.features[column], None
    if can_name_tasks(feature):
        tasks = _TaskColumn(dataset, column)
        reason = tasks.unlike_names()
    else:
        reason = f"has values of the type {feature}" if _has_scalars(dataset, column) else ""

    if tasks is not None and reason is None:
        return tasks.names(), tasks.indices
    if reason:
        warn(
            f"Column {column!r} {reason}: it does not look like task names and is ignored. If another column names "
            "the tasks, set `task_column` to it; to silence this warning, rename the column."
        )
    return None


def _has_scalars(dataset: Dataset, column: str) -> bool:
    feature = dataset.features[column]
    if not isinstance(feature, Json):
        return isinstance(feature, Value) and feature.dtype != "null"
    stored = (value for batch in dataset.select_columns([column]).iter(1000) for value in batch[column])
    first = next((value for value in stored if value is not None), None)
    return first is not None and not isinstance(first, list | dict)
