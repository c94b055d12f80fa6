"""Evaluation by task: data split by task, accuracy of rows with options, means over tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from datasets import Dataset, DatasetDict, IterableDatasetDict
from transformers import PreTrainedTokenizerBase

from ..evaluation import score_tasks
from ..evaluation.columns import by_row, encode_tasks, is_text, task_namer, tells_tasks
from ..tuner import Routing
from ..tuner.routing import using_all
from .tasks import has_transform, name_tasks, tasks_in


logger = get_logger(__name__)

_SCORED = ("prompt", "completion", "options")


def split_by_task(dataset: Any, task_column: str) -> Any:
    """
    Evaluation data by task: a map-style data set with a column that names several tasks becomes a dictionary.

    Everything else is returned as it is, a dictionary with its keys as strings.

    Args:
        dataset: What `SFTTrainer` takes as `eval_dataset`. A `DatasetDict` is evaluated split by split, as there.
        task_column (`str`): Column that names the task of each row.

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
    places = np.asarray([tasks.index(name) for name in names])[numbers]
    return {task: dataset.select(np.flatnonzero(places == place)) for place, task in enumerate(tasks)}


@dataclass(frozen=True)
class OptionRows:
    """
    Rows of evaluation data that can be scored, kept apart because preparation for training drops their options.

    Args:
        rows (`Dataset`): With `prompt`, `completion` and `options`, which contain it, and perhaps a task column.
        task (`str`): The task of rows that don't name one.
        task_column (`str`, *optional*): Column that names it, if there is one.
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


def find_option_rows(eval_dataset: Any, task_column: str, prefix: str = "") -> dict[str, OptionRows]:
    """
    The rows that can be scored, by the name of their data set, with `prefix` and an underscore before it if given.

    Args:
        eval_dataset: What `SFTTrainer` takes as `eval_dataset`. A data set by itself has the name "".
        task_column (`str`): Column that names the task of each row.
        prefix (`str`, *optional*): Prefix of the names.
    """
    named = eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset}
    found = {}
    for name, dataset in named.items():
        columns = set(dataset.column_names) if isinstance(dataset, Dataset) else set()
        # Preparation adds the end of the sequence to completions, which then are none of the options. Options are
        # scored as text alone, which says little about pictures; and a transform makes other rows than are stored.
        unscored = {"input_ids", "image", "images"}
        if not set(_SCORED) <= columns or columns & unscored or len(dataset) == 0 or has_transform(dataset):
            continue
        dataset = dataset.with_format(None)
        key = "_".join(part for part in (prefix, str(name)) if part)
        if _is_scorable(dataset, str(name)):
            tells = task_column in columns and tells_tasks(dataset, task_column)
            kept = dataset.select_columns([*_SCORED, task_column] if tells else list(_SCORED))
            found[key] = OptionRows(kept, str(name), task_column if tells else None)
    return found


def _count_outside(dataset: Dataset) -> int | None:
    """Rows whose completion is none of their options, of columns of texts; `None` if one of these is missing."""
    if by_row(dataset, _SCORED, _are_lacking).any():
        return None
    return len(dataset) - int(by_row(dataset, ["completion", "options"], _are_among).sum())


def _are_lacking(prompts: pa.Array, completions: pa.Array, options: pa.Array) -> pa.Array:
    without = pc.equal(pc.fill_null(pc.list_value_length(options), 0), 0)
    return pc.or_(pc.or_(pc.is_null(prompts), pc.is_null(completions)), without)


def _are_among(completions: pa.Array, options: pa.Array) -> pa.Array:
    rows = pc.list_parent_indices(options)
    equal = pc.equal(completions.take(rows), pc.list_flatten(options))
    found = np.zeros(len(options), dtype=bool)
    found[rows.filter(equal)] = True
    return pa.array(found)


def _count_outside_by_row(dataset: Dataset) -> int | None:
    """As [`_count_outside`], of columns that may hold something else, such as JSON."""
    outside = 0
    for row in dataset:
        if not (isinstance(row["prompt"], str) and isinstance(row["completion"], str) and row["options"]):
            return None
        outside += row["completion"] not in row["options"]
    return outside


def _is_scorable(dataset: Dataset, name: str) -> bool:
    dataset = dataset.select_columns(list(_SCORED))
    prompt, completion, options = (dataset.features[column] for column in _SCORED)
    are_texts = is_text(prompt) and is_text(completion) and is_text(getattr(options, "feature", None))
    outside = _count_outside(dataset) if are_texts else _count_outside_by_row(dataset)
    if outside is None:
        return False
    if outside:
        logger.warning(
            f"Evaluation data{f' of {name!r}' if name else ''} have {outside} rows whose completion is none of their "
            "`options`: no accuracy is computed. Make them agree, spaces too, or remove the column `options`."
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
    Rows whose completion is the most likely of its options, and all rows, of this rank.

    Args:
        model (`torch.nn.Module`), tokenizer (`PreTrainedTokenizerBase`), scored ([`OptionRows`]): What to score.
        batch_size (`int`): Sequences in one forward pass.
        accelerator (`Accelerator`): Ranks over which rows are shared out.
        share_rows (`bool`): Whether each rank scores a part of the rows, rather than all.
        routings (`Sequence[Routing]`): State of the adapters, which get the task.
        max_length (`int`, *optional*): See [`score_tasks`].
    """
    ranks = accelerator.num_processes if share_rows else 1
    counts = [0, 0]
    for task, rows in scored.by_task().items():
        own = rows.select(range(accelerator.process_index, len(rows), ranks)) if ranks > 1 else rows
        if not len(own):
            continue
        # The head usage of these rows was counted in the evaluation before.
        with using_all([(routing, {"usage": None, "task": routing.find_task(task)}) for routing in routings]):
            score = score_tasks(model, tokenizer, {"": own.to_list()}, batch_size=batch_size, max_length=max_length)[
                ""
            ]
        counts = [counts[0] + score.correct, counts[1] + score.total]
    return counts


def mean_over_tasks(metrics: Mapping[str, float], tasks: Sequence[str], prefix: str) -> dict[str, float]:
    """`<prefix>_loss` and `<prefix>_accuracy`: plain means over the tasks that have them."""
    means = {}
    for name in ("loss", "accuracy"):
        values = [metrics[key] for task in tasks if (key := f"{prefix}_{task}_{name}") in metrics]
        if values:
            means[f"{prefix}_{name}"] = sum(values) / len(values)
    return means
