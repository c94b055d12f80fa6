"""Datasets of several tasks, from a dictionary or a task column, as one dataset that names the task of each row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
from accelerate.logging import get_logger
from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    Value,
    concatenate_datasets,
    interleave_datasets,
)

from ..evaluation.columns import AnyDataset, add_column, encode_default_tasks, encode_tasks
from ..evaluation.formats import COMPANIONS_OF_TEXT, as_shown, check_format, check_rows, has_transform
from ..tuner.task_names import MAX_TASKS, task_name
from .task_features import align_features


# Columns that are kept in addition to those of the format. Others are dropped when tasks are joined.
_COMPANIONS = (
    *("labels", "completion_mask", "assistant_masks", "seq_lengths"),
    *("tools", "chat_template_kwargs", "images", "image"),
)

logger = get_logger(__name__)


def columns_of(dataset: AnyDataset) -> list[str]:
    """Names of the columns; of a stream without features, those of its first row."""
    if dataset.column_names is not None:
        return list(dataset.column_names)
    return list(next(iter(dataset.with_format(None))))


def values_of(dataset: Dataset, column: str) -> list[Any]:
    """The stored values of a column. A transform or a tensor format would change task names."""
    # `[:]`, because a column is read row by row otherwise.
    return dataset.with_format(None)[column][:]


# Names of tasks


def task_names(tasks: Iterable[Any], of: str = "train_dataset") -> list[str]:
    """
    The names of the tasks in a dictionary of datasets.

    Args:
        tasks (`Iterable`): The keys of the dictionary.
        of (`str`, *optional*, defaults to `"train_dataset"`): The argument that holds it, for messages.

    Returns:
        `list[str]`: The names, in the order of the keys.

    Raises:
        ValueError: If a key can't name a task, or two keys give one name.
        TypeError: If a key is neither a string nor an integer.
    """
    names = []
    for task in tasks:
        try:
            names.append(task_name(task))
        except (ValueError, TypeError) as error:
            raise type(error)(f"`{of}` has a key that can't be used. {error}") from error
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ValueError(
            f"`{of}` has {', '.join(map(repr, twice))} more than once, as a name and as a number. Give each "
            "task a different name."
        )
    return names


def name_tasks(datasets: Mapping[Any, Any], of: str = "train_dataset") -> dict[str, Any]:
    """The datasets by the names of their tasks; see [`task_names`]."""
    return dict(zip(task_names(datasets, of), datasets.values(), strict=True))


def tasks_in(dataset: AnyDataset, task_column: str, *, required: bool) -> list[str] | None:
    """
    The task names in a dataset.

    Args:
        dataset (`Dataset` or `IterableDataset`): The data.
        task_column (`str`): Column that names the task of each row.
        required (`bool`): Whether the column must be there.

    Returns:
        `list[str]`, *optional*: The names, sorted; `None` for a stream, without the column, and for a column that is
        not required and does not look like task names.

    Raises:
        ValueError: If the column is required and missing, or has rows without a task.
    """
    columns = columns_of(dataset)
    if task_column not in columns:
        if required:
            raise ValueError(
                f"`task_column={task_column!r}` is not a column of the dataset, which has {', '.join(columns)}. Name "
                "one of them, or give the tasks as a dictionary {name: dataset}."
            )
        return None
    if isinstance(dataset, IterableDataset):
        return None
    find = encode_tasks if required else partial(encode_default_tasks, warn=logger.warning)
    tasks = find(dataset, task_column)
    if tasks is None:
        return None
    names = sorted(set(tasks[0]))
    if len(names) > MAX_TASKS:
        raise ValueError(
            f"Column {task_column!r} names {len(names)} tasks, and an adapter has at most {MAX_TASKS}. Set "
            "`task_column` to the column that names them, or name groups of them."
        )
    return names


def refuse_splits(datasets: Any) -> None:
    """
    Refuse a `DatasetDict`: its splits would be treated as tasks, and a test split would become training data.

    Args:
        datasets: The argument that may be a dictionary of datasets by task.

    Raises:
        ValueError: If it is a `DatasetDict` or `IterableDatasetDict`, whatever its keys.
    """
    if isinstance(datasets, DatasetDict | IterableDatasetDict):
        first = "train" if "train" in datasets else next(iter(datasets), "train")
        raise ValueError(
            f"Got a {type(datasets).__name__} of the splits {', '.join(map(str, datasets)) or '(none)'}, which are "
            f'not tasks. Pass one of them, such as dataset["{first}"], or, if its keys really name tasks, a plain '
            "dictionary: dict(dataset)."
        )


# Joining


def join_tasks(datasets: Mapping[str, AnyDataset], *, seed: int = 42, **options: Any) -> AnyDataset:
    """
    Join the datasets of several tasks into one that names the task of each row.

    Map-style datasets are concatenated and shuffled. Streams take turns row by row until each has ended once.

    Args:
        datasets (`Mapping[str, Dataset | IterableDataset]`): Datasets by task, all of one of TRL's formats.
        seed (`int`, *optional*, defaults to `42`): Seed of the shuffle.
        options: See [`label_tasks`].

    Returns:
        `Dataset` or `IterableDataset`: With the columns of the common format and the task column.

    Raises:
        ValueError, TypeError: See [`label_tasks`].
    """
    return join_labeled(list(label_tasks(datasets, **options).values()), seed)


def join_labeled(labeled: list[AnyDataset], seed: int) -> AnyDataset:
    """As [`join_tasks`], of the datasets that [`label_tasks`] returns."""
    if isinstance(labeled[0], IterableDataset):
        return interleave_datasets(labeled, stopping_strategy="all_exhausted_without_replacement")
    return concatenate_datasets(labeled).shuffle(seed=seed)


def label_tasks(
    datasets: Mapping[str, AnyDataset],
    *,
    task_column: str = "task",
    text_column: str = "text",
    any_format: bool = False,
) -> dict[str, AnyDataset]:
    """
    Prepare the datasets of several tasks to be joined: one format, the same columns, and a column with the task.

    Args:
        datasets (`Mapping[str, Dataset | IterableDataset]`): Datasets by task, all of one of TRL's formats.
        task_column (`str`, *optional*, defaults to `"task"`): Name of the new column.
        text_column (`str`, *optional*, defaults to `"text"`): Column of plain text (`dataset_text_field`).
        any_format (`bool`, *optional*, defaults to `False`):
            Columns have no known format, because a `formatting_func` makes text of them. The columns that all tasks
            have are kept, if their types can be aligned.

    Returns:
        `dict[str, Dataset | IterableDataset]`: With the columns of the common format and the task column.

    Raises:
        ValueError: If there is no task, a task is empty or has a transform, formats or types differ, or `datasets` is
            a `DatasetDict`, which holds splits.
        TypeError: If a task is not a dataset or its key can't name one, or streams and map-style datasets are mixed.
    """
    refuse_splits(datasets)
    datasets = name_tasks(datasets)
    _check_datasets(datasets)
    datasets = {task: as_shown(dataset) for task, dataset in datasets.items()}

    # The columns to keep.
    if any_format:
        columns = _shared_columns(datasets, task_column)
    else:
        names = _common_format(datasets, text_column)
        if task_column in names:
            raise ValueError(
                f"`task_column={task_column!r}` is a column of the data itself ({' and '.join(names)}). Choose "
                "another name for the column that names the task."
            )
        _check_rows(datasets, names, text_column)
        columns = [*names, *_companions(datasets, names)]

    # Formats of tensors are dropped: TRL's preparation reads texts and lists, and joined rows have one format.
    plain = {task: dataset.with_format(None).select_columns(columns) for task, dataset in datasets.items()}
    aligned = align_features(plain, may_drop=any_format)
    return {task: _label(dataset, task, task_column) for task, dataset in aligned.items()}


def _check_datasets(datasets: Mapping[str, AnyDataset]) -> None:
    """Check that each task is a dataset with rows and that all are of one kind."""
    if not datasets:
        raise ValueError("Got a dictionary without tasks. Give it at least one, {name: Dataset}.")
    for task, dataset in datasets.items():
        if not isinstance(dataset, Dataset | IterableDataset):
            raise TypeError(
                f"Task {task!r} is a {type(dataset).__name__}; a task must be a datasets.Dataset or IterableDataset. "
                "Choose one split of a DatasetDict, or build one with Dataset.from_list(rows)."
            )
        if has_transform(dataset):
            raise ValueError(
                f"Task {task!r} is a dataset with a transform (`with_transform` or `set_transform`), which can't be "
                "joined with others: its rows are created when they are read. Apply the function with `Dataset.map` "
                "instead, or remove it with `with_format(None)`."
            )
        if next(iter(dataset.with_format(None)), None) is None:
            raise ValueError(f"Task {task!r} has no rows. Remove it, or check the filter or split that it comes from.")
    if len({isinstance(dataset, IterableDataset) for dataset in datasets.values()}) > 1:
        raise TypeError(
            "Tasks mix streamed and map-style datasets. Load all of them with, or without, `streaming=True`."
        )


def _common_format(datasets: Mapping[str, AnyDataset], text_column: str) -> tuple[str, ...]:
    formats = {task: _format_of(task, dataset, text_column) for task, dataset in datasets.items()}
    if len(set(formats.values())) > 1:
        by_task = "; ".join(f"{task}: {' and '.join(names)}" for task, names in formats.items())
        raise ValueError(f"Tasks come in different formats ({by_task}). Bring them to one format.")
    return next(iter(formats.values()))


def _format_of(task: str, dataset: AnyDataset, text_column: str) -> tuple[str, ...]:
    columns = columns_of(dataset)
    if "input_ids" in columns:
        return ("input_ids",)
    return check_format(columns, next(iter(dataset.with_format(None))), f"Task {task!r}", text_column=text_column)


def _check_rows(datasets: Mapping[str, AnyDataset], names: tuple[str, ...], text_column: str) -> None:
    """Refuse rows that can't be trained on while their task and index are known; streams are checked as read."""
    for task, dataset in datasets.items():
        if isinstance(dataset, Dataset):
            read = [name for name in dataset.column_names if name in (*names, *COMPANIONS_OF_TEXT)]
            check_rows(dataset.select_columns(read), f"Task {task!r}", text_column=text_column)


def _shared_columns(datasets: Mapping[str, AnyDataset], task_column: str) -> list[str]:
    columns = {task: set(columns_of(dataset)) for task, dataset in datasets.items()}
    shared = set.intersection(*columns.values()) - {task_column}
    if not shared:
        by_task = "; ".join(f"{task}: {', '.join(sorted(names))}" for task, names in columns.items())
        raise ValueError(f"Tasks have no column in common ({by_task}). Give a column of one name to all of them.")
    return sorted(shared)


def _companions(datasets: Mapping[str, AnyDataset], names: tuple[str, ...]) -> list[str]:
    """Additional columns that all tasks have. They affect training, so none may be dropped."""
    columns = {task: set(columns_of(dataset)) for task, dataset in datasets.items()}
    shared = []
    for name in _COMPANIONS:
        having = [task for task in columns if name in columns[task]]
        if not having or name in names:
            continue
        if len(having) < len(columns):
            lacking = next(task for task in columns if name not in columns[task])
            raise ValueError(
                f"Task {having[0]!r} has a column {name!r} and task {lacking!r} has not. Give it to all tasks, or "
                "remove it from all."
            )
        shared.append(name)
    return shared


def _label(dataset: AnyDataset, task: str, task_column: str) -> AnyDataset:
    if isinstance(dataset, Dataset):
        return add_column(dataset, task_column, np.full(len(dataset), task, dtype=object))
    # `IterableDataset.add_column` needs the length, which a stream does not have.
    features = dataset.features
    if features is not None:
        features = features.copy()
        features[task_column] = Value("string")
    return dataset.map(lambda _: {task_column: task}, features=features)
