"""Evaluation by task: splitting data by task, accuracy of rows with options, means over tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from datasets import Dataset, DatasetDict, IterableDatasetDict
from transformers import PreTrainedTokenizerBase

from ..evaluation import score_tasks
from ..evaluation.columns import encode_tasks, task_namer, tells_tasks
from ..evaluation.formats import has_transform
from ..tuner import Routing
from ..tuner.routing import using_all
from .tasks import name_tasks, tasks_in


logger = get_logger(__name__)

_SCORED = ("prompt", "completion", "options")


def split_by_task(dataset: Any, task_column: str) -> Any:
    """
    Split evaluation data by task.

    Args:
        dataset: The `eval_dataset` of `SFTTrainer`. A `DatasetDict` is evaluated split by split, as there.
        task_column (`str`): Column that names the task of each row.

    Returns:
        A dictionary by task, if `dataset` is a map-style dataset with a column of several tasks. Dictionaries get
        strings as keys; other data are returned unchanged.

    Raises:
        ValueError, TypeError: See [`task_names`] and [`tasks_in`].
    """
    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        return {str(split): data for split, data in dataset.items()}
    if isinstance(dataset, Mapping):
        return name_tasks(dataset, "eval_dataset")
    if not isinstance(dataset, Dataset) or task_column not in dataset.column_names:
        return dataset
    tasks = tasks_in(dataset, task_column, required=task_column != "task")
    if tasks is None or len(tasks) < 2:
        return dataset
    names, numbers = encode_tasks(dataset, task_column)
    task_of_row = np.asarray([tasks.index(name) for name in names])[numbers]
    return {task: dataset.select(np.flatnonzero(task_of_row == index)) for index, task in enumerate(tasks)}


@dataclass(frozen=True)
class OptionRows:
    """
    Rows of evaluation data that can be scored, kept because preparation drops their options.

    Args:
        rows (`Dataset`): With `prompt`, `completion` and `options` that contain the completion, and perhaps a task
            column.
        task (`str`): The task of rows without a task column.
        task_column (`str`, *optional*): Column that names the task of each row.
    """

    rows: Dataset
    task: str
    task_column: str | None = None

    def by_task(self) -> dict[str, Dataset]:
        """The rows of each task."""
        if self.task_column is None:
            return {self.task: self.rows}
        split = split_by_task(self.rows, self.task_column)
        if isinstance(split, dict):
            return split
        return {task_namer(self.rows, self.task_column)(self.rows[0][self.task_column]) or self.task: self.rows}


def find_option_rows(eval_dataset: Any, task_column: str) -> dict[str, OptionRows]:
    """
    Find the rows that can be scored.

    Args:
        eval_dataset: The `eval_dataset` of `SFTTrainer`. A single dataset has the name "".
        task_column (`str`): Column that names the task of each row.

    Returns:
        `dict[str, OptionRows]`: By the name of their dataset. Skipped are tokenized datasets (preparation adds
        the end of the sequence to completions, which then match no option), and those with images or a transform.
    """
    named = eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset}
    scorable = {}
    for name, dataset in named.items():
        columns = set(dataset.column_names) if isinstance(dataset, Dataset) else set()
        unscored = {"input_ids", "image", "images"}
        if not set(_SCORED) <= columns or columns & unscored or len(dataset) == 0 or has_transform(dataset):
            continue
        dataset = dataset.with_format(None)
        if _is_scorable(dataset, str(name)):
            has_tasks = task_column in columns and tells_tasks(dataset, task_column)
            rows = dataset.select_columns([*_SCORED, task_column] if has_tasks else list(_SCORED))
            scorable[str(name)] = OptionRows(rows, str(name), task_column if has_tasks else None)
    return scorable


def _is_scorable(dataset: Dataset, name: str) -> bool:
    """Whether all rows have a completion among their options; warns if only some have."""
    outside = 0
    for batch in dataset.select_columns(list(_SCORED)).iter(batch_size=1000):
        for prompt, completion, options in zip(*(batch[column] for column in _SCORED), strict=True):
            is_text = isinstance(prompt, str) and isinstance(completion, str)
            if not (is_text and isinstance(options, list) and options):
                return False
            outside += completion not in options
    if outside:
        logger.warning(
            f"Evaluation data{f' of {name!r}' if name else ''} has {outside} rows with a completion that is not "
            "among their `options`, so no accuracy is computed. Correct these rows (spaces count), or remove the "
            "column `options`."
        )
    return outside == 0


def count_correct_options(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    scored: OptionRows,
    *,
    batch_size: int,
    accelerator: Accelerator,
    share_rows: bool,
    routings: Sequence[Routing],
    max_length: int | None = None,
) -> list[int]:
    """
    Count the correct rows of this rank: those with the completion as the most likely option.

    Args:
        model (`torch.nn.Module`), tokenizer (`PreTrainedTokenizerBase`): The model, and its tokenizer.
        scored ([`OptionRows`]): The rows.
        batch_size (`int`): Sequences in one forward pass.
        accelerator (`Accelerator`): Has the ranks.
        share_rows (`bool`): Whether each rank scores a part of the rows, rather than all.
        routings (`Sequence[Routing]`): Routing states of the adapters, which get the task.
        max_length (`int`, *optional*): See [`score_tasks`].

    Returns:
        `list[int]`: Correct rows and all rows of this rank.
    """
    ranks = accelerator.num_processes if share_rows else 1
    counts = [0, 0]
    for task, rows in scored.by_task().items():
        part = rows.select(range(accelerator.process_index, len(rows), ranks)) if ranks > 1 else rows
        if not len(part):
            continue
        # The use of heads was counted in the evaluation of the same rows.
        with using_all([(routing, {"usage": None, "task": routing.find_task(task)}) for routing in routings]):
            scores = score_tasks(
                model, tokenizer, {task: part.to_list()}, batch_size=batch_size, max_length=max_length
            )
        score = scores[task]
        counts = [counts[0] + score.correct, counts[1] + score.total]
    return counts


def mean_over_tasks(metrics: Mapping[str, float], tasks: Sequence[str], prefix: str) -> dict[str, float]:
    """
    Plain means over the tasks that have a metric.

    Args:
        metrics (`Mapping[str, float]`): With `<prefix>_<task>_loss` and `<prefix>_<task>_accuracy`.
        tasks (`Sequence[str]`): Names of the tasks.
        prefix (`str`): Prefix of the metrics, such as `"eval"`.

    Returns:
        `dict[str, float]`: `<prefix>_loss` and `<prefix>_accuracy`.
    """
    means = {}
    for name in ("loss", "accuracy"):
        values = [metrics[key] for task in tasks if (key := f"{prefix}_{task}_{name}") in metrics]
        if values:
            means[f"{prefix}_{name}"] = sum(values) / len(values)
    return means
