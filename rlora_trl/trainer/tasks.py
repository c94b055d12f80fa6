"""Datasets of several tasks: from a dictionary, or from a column, to one dataset that names the task of each row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
from ..evaluation.formats import COMPANIONS_OF_TEXT, as_shown, check_rows, find_format, has_transform
from ..tuner.task_names import MAX_TASKS, task_name
from .task_features import align_features


# What a task carries beside the columns of its format; all else is dropped when tasks are joined.
_COMPANIONS = (
    *("labels", "completion_mask", "assistant_masks", "seq_lengths"),
    *("tools", "chat_template_kwargs", "images", "image"),
)

logger = get_logger(__name__)


def columns_of(dataset: AnyDataset) -> list[str]:
    """Names of the columns; a stream that does not say is asked for its first row."""
    if dataset.column_names is not None:
        return list(dataset.column_names)
    return list(next(iter(dataset.with_format(None))))


def values_of(dataset: Dataset, column: str) -> list[Any]:
    """A column as it is stored, as neither a transform nor a format of tensors leaves names of tasks alone."""
    # `[:]`, as a column is read row by row otherwise.
    return dataset.with_format(None)[column][:]


def _check_not_empty(task: str, dataset: AnyDataset) -> None:
    if isinstance(dataset, Dataset):
        is_empty = len(dataset) == 0
    else:
        is_empty = next(iter(dataset.with_format(None)), None) is None
    if is_empty:
        raise ValueError(f"Task {task!r} has no rows. Remove it, or check the filter or split that it comes from.")


def _format_of(task: str, dataset: AnyDataset, text_column: str) -> tuple[str, ...]:
    columns = columns_of(dataset)
    if "input_ids" in columns:
        return ("input_ids",)
    names = find_format(columns, next(iter(dataset.with_format(None))), text_column=text_column)
    if names is not None:
        return names
    accepted = f"'input_ids'; 'messages'; 'conversations'; 'prompt' and 'completion'; {text_column!r}"
    raise ValueError(
        f"Task {task!r} has columns {', '.join(sorted(columns))}; a task needs one of: {accepted}. Rename its columns."
    )


def join_tasks(
    datasets: Mapping[str, AnyDataset],
    *,
    task_column: str = "task",
    text_column: str = "text",
    seed: int = 42,
    any_format: bool = False,
) -> AnyDataset:
    """
    Join the datasets of several tasks into one with a column that names the task.

    Map-style datasets are concatenated and shuffled. Streamed ones are interleaved row by row until each has ended
    once.

    Args:
        datasets (`Mapping[str, Dataset | IterableDataset]`): Datasets by task, all of one of TRL's formats.
        task_column (`str`, *optional*, defaults to `"task"`): Name of the new column.
        text_column (`str`, *optional*, defaults to `"text"`): Column of the format that is plain text.
        seed (`int`, *optional*, defaults to `42`): Seed of the shuffle.
        any_format (`bool`, *optional*, defaults to `False`): See [`label_tasks`].

    Returns:
        `Dataset` or `IterableDataset`: With the columns of the common format and the task column.

    Raises:
        ValueError: If there is no task, a task is empty or has a transform, formats or types differ, or what is given
            is a `DatasetDict`, which holds splits.
        TypeError: If a task is not a dataset or its key can't name one, or streamed and map-style ones are mixed.
    """
    options = {"task_column": task_column, "text_column": text_column}
    labeled = list(label_tasks(datasets, **options, any_format=any_format).values())
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
    The datasets of several tasks, ready to be joined: of one format, of the same columns, each naming its task.

    Args:
        datasets (`Mapping[str, Dataset | IterableDataset]`): Datasets by task, all of one of TRL's formats.
        task_column (`str`, *optional*, defaults to `"task"`): Name of the new column.
        text_column (`str`, *optional*, defaults to `"text"`): Column of the format that is plain text.
        any_format (`bool`, *optional*, defaults to `False`):
            Columns are of no known format, as a function of the user's makes text of them: those that all tasks have
            are kept, where their types can be brought together.

    Returns:
        `dict[str, Dataset | IterableDataset]`: With the columns of the common format and the task column.

    Raises:
        ValueError: If there is no task, a task is empty or has a transform, formats or types differ, or what is given
            is a `DatasetDict`, which holds splits.
        TypeError: If a task is not a dataset or its key can't name one, or streamed and map-style ones are mixed.
    """
    refuse_splits(datasets)
    datasets = name_tasks(datasets)
    _check_datasets(datasets)
    datasets = {task: as_shown(dataset) for task, dataset in datasets.items()}
    if any_format:
        return _label_all(datasets, _shared_columns(datasets, task_column), task_column, may_drop=True)
    formats = {task: _format_of(task, dataset, text_column) for task, dataset in datasets.items()}
    if len(set(formats.values())) > 1:
        listed = "; ".join(f"{task}: {' and '.join(names)}" for task, names in formats.items())
        raise ValueError(f"Tasks come in different formats ({listed}). Bring them to one format.")
    names = next(iter(formats.values()))
    if task_column in names:
        raise ValueError(
            f"`task_column={task_column!r}` is a column of the data itself ({' and '.join(names)}). Choose another "
            "name for the column that names the task."
        )
    _check_rows(datasets, names, text_column)
    return _label_all(datasets, [*names, *_companions(datasets, names)], task_column)


def _shared_columns(datasets: Mapping[str, AnyDataset], task_column: str) -> list[str]:
    columns = {task: set(columns_of(dataset)) for task, dataset in datasets.items()}
    shared = set.intersection(*columns.values()) - {task_column}
    if not shared:
        listed = "; ".join(f"{task}: {', '.join(sorted(own))}" for task, own in columns.items())
        raise ValueError(f"Tasks have no column in common ({listed}). Give a column of one name to all of them.")
    return sorted(shared)


def _check_rows(datasets: Mapping[str, AnyDataset], names: tuple[str, ...], text_column: str) -> None:
    """Refuse rows that can't be trained on while their task and their place are known; streams are checked as read."""
    for task, dataset in datasets.items():
        if isinstance(dataset, Dataset):
            read = [name for name in dataset.column_names if name in (*names, *COMPANIONS_OF_TEXT)]
            check_rows(dataset.select_columns(read), f"Task {task!r}", text_column=text_column)


def _label_all(
    datasets: Mapping[str, AnyDataset], kept: list[str], task_column: str, *, may_drop: bool = False
) -> dict[str, AnyDataset]:
    # Formats of tensors are dropped: TRL's preparation reads texts and lists, and joined rows have one format.
    plain = {task: dataset.with_format(None).select_columns(kept) for task, dataset in datasets.items()}
    aligned = align_features(plain, may_drop=may_drop)
    return {task: _label(dataset, task, task_column) for task, dataset in aligned.items()}


def _check_datasets(datasets: Mapping[str, AnyDataset]) -> None:
    """Check that each task is a dataset with rows and that all are of one kind."""
    if not datasets:
        raise ValueError("Got a dictionary without tasks. Give it at least one, {name: Dataset}.")
    kinds = set()
    for task, dataset in datasets.items():
        if not isinstance(dataset, Dataset | IterableDataset):
            raise TypeError(
                f"Task {task!r} is a {type(dataset).__name__}; a task must be a datasets.Dataset or IterableDataset. "
                "Choose one split of a DatasetDict, or build one with Dataset.from_list(rows)."
            )
        if has_transform(dataset):
            raise ValueError(
                f"Task {task!r} is a dataset with a transform (`with_transform` or `set_transform`), which can't be "
                "joined with others: its rows are made as they are read. Apply the function with `Dataset.map` "
                "instead, or remove it with `with_format(None)`."
            )
        _check_not_empty(task, dataset)
        kinds.add(isinstance(dataset, IterableDataset))
    if len(kinds) > 1:
        raise TypeError(
            "Tasks mix streamed and map-style datasets. Load all of them with, or without, `streaming=True`."
        )


def _companions(datasets: Mapping[str, AnyDataset], names: tuple[str, ...]) -> list[str]:
    """The columns beside the format that all tasks have. They change what is trained on, so none may be dropped."""
    columns = {task: set(columns_of(dataset)) for task, dataset in datasets.items()}
    kept = []
    for name in _COMPANIONS:
        having = [task for task in columns if name in columns[task]]
        if len(having) == len(columns) and name not in names:
            kept.append(name)
        elif having and name not in names:
            lacking = next(task for task in columns if name not in columns[task])
            raise ValueError(
                f"Task {having[0]!r} has a column {name!r} and task {lacking!r} has not. Give it to all tasks, or "
                "remove it from all."
            )
    return kept


def _label(dataset: AnyDataset, task: str, task_column: str) -> AnyDataset:
    if isinstance(dataset, Dataset):
        return add_column(dataset, task_column, np.full(len(dataset), task, dtype=object))
    # `IterableDataset.add_column` needs the length, which a stream does not have.
    features = dataset.features
    if features is not None:
        features = features.copy()
        features[task_column] = Value("string")
    return dataset.map(lambda _: {task_column: task}, features=features)


def tasks_in(dataset: AnyDataset, task_column: str, *, required: bool) -> list[str] | None:
    """
    The names of the tasks in a dataset, sorted; `None` for a stream or without the column.

    Args:
        dataset (`Dataset` or `IterableDataset`): The dataset.
        task_column (`str`): Column that names the task of each row.
        required (`bool`): Whether the column must be there.

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
    tasks = (
        encode_tasks(dataset, task_column) if required else encode_default_tasks(dataset, task_column, logger.warning)
    )
    if tasks is None:
        return None
    names = sorted(set(tasks[0]))
    if len(names) > MAX_TASKS:
        raise ValueError(
            f"Column {task_column!r} names {len(names)} tasks, and an adapter has at most {MAX_TASKS}. Set "
            "`task_column` to the column that names them, or name groups of them."
        )
    return names


def task_names(tasks: Iterable[Any], of: str = "train_dataset") -> list[str]:
    """
    The names of the tasks in a dictionary of datasets.

    Args:
        tasks (`Iterable`): Its keys.
        of (`str`, *optional*, defaults to `"train_dataset"`): What it is, for messages.

    Raises:
        ValueError: If a key can't name a task, or two keys give one name.
        TypeError: If a key is neither a text nor a whole number.
    """
    names = []
    for task in tasks:
        try:
            names.append(task_name(task))
        except (ValueError, TypeError) as error:
            raise type(error)(f"`{of}` has a key that can't be used. {error}") from error
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"`{of}` has {', '.join(map(repr, twice))} more than once, as a name and as a number. Give each "
            "task a name of its own."
        )
    return names


def name_tasks(datasets: Mapping[Any, Any], of: str = "train_dataset") -> dict[str, Any]:
    """The datasets by the names of their tasks; see [`task_names`]."""
    return dict(zip(task_names(datasets, of), datasets.values(), strict=True))


def refuse_splits(datasets: Any) -> None:
    """
    Refuse a `DatasetDict`, whose splits would be taken for tasks: a test split must not become training data.

    Args:
        datasets: What was given as datasets by task.

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


def collect_tasks(
    train_dataset: Any, *, task_column: str, text_column: str, seed: int, any_format: bool = False
) -> tuple[Any, list[str] | None]:
    """
    What `RLoraSFTTrainer` takes as `train_dataset`, as one dataset and the names of its tasks.

    Args:
        train_dataset: A dictionary of datasets by task, a dataset with or without a task column, or `None`.
        task_column (`str`): Column that names the task of each row.
        text_column (`str`): Column of the format that is plain text.
        seed (`int`): Seed of the shuffle when tasks are joined.
        any_format (`bool`, *optional*, defaults to `False`): See [`label_tasks`].

    Returns:
        `tuple`: The dataset, and the names of the tasks or `None` if it does not tell.

    Raises:
        ValueError: See [`join_tasks`] and [`tasks_in`].
    """
    refuse_splits(train_dataset)
    if isinstance(train_dataset, Mapping):
        names = task_names(train_dataset)
        if len(names) > MAX_TASKS:
            raise ValueError(
                f"`train_dataset` has {len(names)} tasks, and an adapter has at most {MAX_TASKS}. Join some of them."
            )
        columns = {"task_column": task_column, "text_column": text_column}
        return join_tasks(train_dataset, **columns, seed=seed, any_format=any_format), names
    if isinstance(train_dataset, Dataset | IterableDataset):
        return train_dataset, tasks_in(train_dataset, task_column, required=task_column != "task")
    return train_dataset, None
