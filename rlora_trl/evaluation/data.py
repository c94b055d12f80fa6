"""Data sets as users name them: a file, a folder or a name on the Hub; and their rows by task."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from datasets import ClassLabel, DatasetDict, IterableDataset, load_dataset
from datasets.exceptions import DatasetNotFoundError


_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def load_splits(
    name: str, config_name: str | None = None, *, file_split: str = "train", streaming: bool = False
) -> DatasetDict:
    """
    The splits of a data set.

    Args:
        name (`str`):
            A JSON-lines, JSON, Parquet or CSV file, a folder of such files, or a data set on the Hub.
        config_name (`str`, *optional*):
            Configuration of a data set on the Hub.
        file_split (`str`, *optional*, defaults to `"train"`):
            What the only split of a file is called.
        streaming (`bool`, *optional*, defaults to `False`):
            Read rows as they are needed.

    Raises:
        FileNotFoundError: If there is neither a file, a folder nor a data set of this name.
    """
    path = Path(name)
    if path.suffix in _FORMATS and path.is_file():
        return load_dataset(_FORMATS[path.suffix], data_files={file_split: name}, streaming=streaming)
    is_path = path.suffix in _FORMATS or name.startswith((".", "~", os.sep)) or name.count("/") > 1
    if is_path and "://" not in name and not path.exists():
        raise FileNotFoundError(
            f"There is no data at {name}. Give a JSON-lines, Parquet or CSV file, a folder of such files, or the name "
            "of a data set on the Hub."
        )
    try:
        return load_dataset(name, config_name, streaming=streaming)
    except (DatasetNotFoundError, ConnectionError) as error:
        if path.exists():
            raise
        raise FileNotFoundError(
            f"There is no file or folder {name} here, and no such data set was found on the Hub: {error}"
        ) from error


def rows_by_task(dataset: Any, task_column: str, limit: int | None = None) -> dict[str, list[dict]]:
    """
    The rows of each task, in the order in which tasks first occur.

    Args:
        dataset (`Dataset`): A data set with a column that names the task.
        task_column (`str`): That column.
        limit (`int`, *optional*): Only the first rows of each task.
    """
    feature = (dataset.features or {}).get(task_column)
    name_of = feature.int2str if isinstance(feature, ClassLabel) else str
    rows: dict[str, list[dict]] = {}
    for row in dataset:
        task_rows = rows.setdefault(name_of(row[task_column]), [])
        if limit is None or len(task_rows) < limit:
            task_rows.append(row)
    return rows


def is_scorable(dataset: Any) -> bool:
    """Whether rows have a prompt and a completion, both plain text."""
    if isinstance(dataset, IterableDataset) or not {"prompt", "completion"} <= set(dataset.column_names or ()):
        return False
    return len(dataset) > 0 and all(isinstance(dataset[0][column], str) for column in ("prompt", "completion"))


def load_task_rows(
    name: str,
    *,
    split: str | None = None,
    task_column: str | None = None,
    limit: int | None = None,
    default_task: str | None = None,
) -> dict[str, list[dict]]:
    """
    Rows to score or to measure on, by task.

    Args:
        name (`str`):
            As in [`load_splits`].
        split (`str`, *optional*):
            Defaults to "test" where there is one, else to the only one.
        task_column (`str`, *optional*):
            Column that names the task. Defaults to "task"; without such a column all rows are of one task.
        limit (`int`, *optional*):
            Only the first rows of each task.
        default_task (`str`, *optional*):
            Name of that one task. Defaults to the name of the data.

    Raises:
        ValueError: If there is no such split or column, or no rows.
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
    if column in dataset.column_names:
        return rows_by_task(dataset, column, limit)
    if task_column is not None:
        raise ValueError(
            f"{name} has no column {task_column!r} to name tasks; it has {', '.join(dataset.column_names)}."
        )
    return {default_task or Path(name).stem: dataset.select(range(min(len(dataset), limit or len(dataset)))).to_list()}
