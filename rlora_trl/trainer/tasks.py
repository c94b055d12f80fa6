"""Data sets of several tasks: from a dictionary, or from a column, to one data set that names the task of each row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import pyarrow as pa
from accelerate.logging import get_logger
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    Value,
    concatenate_datasets,
    interleave_datasets,
)


# The columns that TRL's preparation reads, by format; what else a task carries is dropped when tasks are joined.
_FORMATS = (("input_ids",), ("messages",), ("conversations",), ("prompt", "completion"), ("text",))
_COMPANIONS = (
    *("labels", "completion_mask", "assistant_masks", "seq_lengths"),
    *("tools", "chat_template_kwargs", "images", "image"),
)

# From here on a column of mostly different values is not taken to name tasks, unless it is asked for.
_FEW_ROWS = 20

_NAME_TYPES = ("string", "large_string", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")

logger = get_logger(__name__)

AnyDataset: TypeAlias = Dataset | IterableDataset


def columns_of(dataset: AnyDataset) -> list[str]:
    """Names of the columns; a stream that does not say is asked for its first row."""
    if dataset.column_names is not None:
        return list(dataset.column_names)
    return list(next(iter(dataset)))


def _check_not_empty(task: str, dataset: AnyDataset) -> None:
    if next(iter(dataset), None) is None:
        raise ValueError(f"Task {task!r} has no rows. Remove it, or check the filter or split that it comes from.")


def _format_of(task: str, dataset: AnyDataset, text_column: str) -> tuple[str, ...]:
    columns = set(columns_of(dataset))
    formats = (*_FORMATS[:-1], (text_column,))
    for names in formats:
        if columns.issuperset(names):
            return names
    accepted = "; ".join(" and ".join(repr(name) for name in names) for names in formats)
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
    Join the data sets of several tasks into one with a column that names the task.

    Map-style data sets are concatenated and shuffled. Streamed ones are interleaved row by row until each has ended
    once.

    Args:
        datasets (`Mapping[str, Dataset | IterableDataset]`): Data sets by task, all of one of TRL's formats.
        task_column (`str`, *optional*, defaults to `"task"`): Name of the new column.
        text_column (`str`, *optional*, defaults to `"text"`): Column of the format that is plain text.
        seed (`int`, *optional*, defaults to `42`): Seed of the shuffle.
        any_format (`bool`, *optional*, defaults to `False`): See [`label_tasks`].

    Returns:
        `Dataset` or `IterableDataset`: With the columns of the common format and the task column.

    Raises:
        ValueError: If there is no task, a task is empty, or formats differ.
        TypeError: If a task is not a data set, or streamed and map-style ones are mixed.
    """
    options = {"task_column": task_column, "text_column": text_column}
    labelled = list(label_tasks(datasets, **options, any_format=any_format).values())
    if isinstance(labelled[0], IterableDataset):
        return interleave_datasets(labelled, stopping_strategy="all_exhausted_without_replacement")
    return concatenate_datasets(labelled).shuffle(seed=seed)


def label_tasks(
    datasets: Mapping[str, AnyDataset],
    *,
    task_column: str = "task",
    text_column: str = "text",
    any_format: bool = False,
) -> dict[str, AnyDataset]:
    """
    The data sets of several tasks, ready to be joined: of one format, of the same columns, each naming its task.

    Args:
        datasets (`Mapping[str, Dataset | IterableDataset]`): Data sets by task, all of one of TRL's formats.
        task_column (`str`, *optional*, defaults to `"task"`): Name of the new column.
        text_column (`str`, *optional*, defaults to `"text"`): Column of the format that is plain text.
        any_format (`bool`, *optional*, defaults to `False`):
            Columns are of no known format, as a function of the user's makes text of them: those that all tasks have
            are kept.

    Returns:
        `dict[str, Dataset | IterableDataset]`: With the columns of the common format and the task column.

    Raises:
        ValueError: If there is no task, a task is empty, or formats differ.
        TypeError: If a task is not a data set, or streamed and map-style ones are mixed.
    """
    streamed = _check_datasets(datasets)
    if any_format:
        names = tuple(set.intersection(*(set(columns_of(dataset)) for dataset in datasets.values())) - {task_column})
        return _label_all(datasets, sorted(names), task_column, streamed)
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
    return _label_all(datasets, [*names, *_companions(datasets, names)], task_column, streamed)


def _label_all(
    datasets: Mapping[str, AnyDataset], kept: list[str], task_column: str, streamed: bool
) -> dict[str, AnyDataset]:
    labelled = {task: _label(dataset.select_columns(kept), task, task_column) for task, dataset in datasets.items()}
    # `interleave_datasets` aligns the features of streams itself.
    return labelled if streamed else _align(labelled)


def _check_datasets(datasets: Mapping[str, AnyDataset]) -> bool:
    """Whether the tasks are streams, after checking that each is a data set with rows and that all are of one kind."""
    if not datasets:
        raise ValueError("Got a dictionary without tasks. Give it at least one, {name: Dataset}.")
    kinds = set()
    for task, dataset in datasets.items():
        if not isinstance(dataset, Dataset | IterableDataset):
            raise TypeError(
                f"Task {task!r} is a {type(dataset).__name__}; a task must be a datasets.Dataset or IterableDataset. "
                "Choose one split of a DatasetDict, or build one with Dataset.from_list(rows)."
            )
        _check_not_empty(task, dataset)
        kinds.add(isinstance(dataset, IterableDataset))
    if len(kinds) > 1:
        raise TypeError(
            "Tasks mix streamed and map-style data sets. Load all of them with, or without, `streaming=True`."
        )
    return kinds.pop()


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


def _align(datasets: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """The data sets with the features of the first, where they can be cast."""
    first_task, first = next(iter(datasets.items()))
    aligned = {}
    for task, dataset in datasets.items():
        if dataset.features != first.features:
            try:
                dataset = dataset.cast(first.features)
            except (ValueError, TypeError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise ValueError(
                    f"Tasks {first_task!r} and {task!r} can't be joined: their columns have the types "
                    f"{first.features} and {dataset.features}. Bring them to the same types."
                ) from error
        aligned[task] = dataset
    return aligned


def _label(dataset: AnyDataset, task: str, task_column: str) -> AnyDataset:
    if isinstance(dataset, Dataset):
        return dataset.add_column(task_column, [task] * len(dataset))
    # `IterableDataset.add_column` needs the length, which a stream does not have.
    features = dataset.features
    if features is not None:
        features = features.copy()
        features[task_column] = Value("string")
    return dataset.map(lambda _: {task_column: task}, features=features)


def tasks_in(dataset: AnyDataset, task_column: str, *, required: bool) -> list[str] | None:
    """
    The names of the tasks in a data set, sorted; `None` for a stream or without the column.

    Args:
        dataset (`Dataset` or `IterableDataset`): The data set.
        task_column (`str`): Column that names the task of each row.
        required (`bool`): Whether the column must be there.

    Raises:
        ValueError: If the column is required and missing, or has rows without a task.
    """
    columns = columns_of(dataset)
    if task_column not in columns:
        if required:
            raise ValueError(
                f"`task_column={task_column!r}` is not a column of the data set, which has {', '.join(columns)}. Name "
                "one of them, or give the tasks as a dictionary {name: dataset}."
            )
        return None
    if isinstance(dataset, IterableDataset):
        return None
    feature = dataset.features[task_column]
    if not isinstance(feature, ClassLabel) and getattr(feature, "dtype", None) not in _NAME_TYPES:
        if not required:  # a column that happens to be called like the default
            return None
        raise ValueError(
            f"`task_column={task_column!r}` holds {feature}, which can't name tasks. It must be a column of strings "
            "or integers."
        )
    names = dataset.unique(task_column)
    if not required and names == [None]:
        return None
    if not required and len(dataset) >= _FEW_ROWS and len(names) > len(dataset) / 2:
        logger.warning(
            f"Column {task_column!r} has {len(names)} different values in {len(dataset)} rows: they don't seem to be "
            f"names of tasks, and are not taken for such. Set `task_column` to the column that names them, or rename "
            "this one to be rid of this warning."
        )
        return None
    missing = (None, "")
    if any(name in missing for name in names):
        rows = sum(name in missing for name in dataset[task_column])
        raise ValueError(f"{rows} rows have no task in column {task_column!r}. Fill it in, or filter them out.")
    return sorted(map(task_namer(dataset, task_column), names))


def task_namer(dataset: AnyDataset, task_column: str) -> Callable[[Any], str]:
    """What makes the name of a task of a value in its column: the label of a class, or the text of the value."""
    feature = (dataset.features or {}).get(task_column)
    return feature.int2str if isinstance(feature, ClassLabel) else str


def task_names(datasets: Mapping[Any, Any]) -> list[str]:
    """
    The names of the tasks in a dictionary of data sets.

    Raises:
        ValueError: If two keys give one name.
    """
    names = [str(task) for task in datasets]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"`train_dataset` has {', '.join(map(repr, twice))} more than once, as a name and as a number. Give each "
            "task a name of its own."
        )
    return names


def refuse_splits(datasets: Any) -> None:
    """
    Refuse a `DatasetDict` of splits, which would be taken for tasks: a test split must not become training data.

    Args:
        datasets: What was given as data sets by task.

    Raises:
        ValueError: If it is a `DatasetDict` or `IterableDatasetDict` of nothing but splits.
    """
    splits = {"train", "test", "validation", "eval", "dev"}
    if isinstance(datasets, DatasetDict | IterableDatasetDict) and set(datasets) <= splits:
        raise ValueError(
            f"Got a DatasetDict of the splits {', '.join(datasets)}, which are not tasks. Pass one of them, such as "
            'dataset["train"].'
        )


def collect_tasks(
    train_dataset: Any, *, task_column: str, text_column: str, seed: int, any_format: bool = False
) -> tuple[Any, list[str] | None]:
    """
    What `RLoraSFTTrainer` takes as `train_dataset`, as one data set and the names of its tasks.

    Args:
        train_dataset: A dictionary of data sets by task, a data set with or without a task column, or `None`.
        task_column (`str`): Column that names the task of each row.
        text_column (`str`): Column of the format that is plain text.
        seed (`int`): Seed of the shuffle when tasks are joined.
        any_format (`bool`, *optional*, defaults to `False`): See [`label_tasks`].

    Returns:
        `tuple`: The data set, and the names of the tasks or `None` if it does not tell.

    Raises:
        ValueError: See [`join_tasks`] and [`tasks_in`].
    """
    refuse_splits(train_dataset)
    if isinstance(train_dataset, Mapping):
        names = task_names(train_dataset)
        columns = {"task_column": task_column, "text_column": text_column}
        return join_tasks(train_dataset, **columns, seed=seed, any_format=any_format), names
    if isinstance(train_dataset, Dataset | IterableDataset):
        return train_dataset, tasks_in(train_dataset, task_column, required=task_column != "task")
    return train_dataset, None
