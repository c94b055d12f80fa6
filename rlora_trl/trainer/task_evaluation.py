"""Evaluation by task: data split by task, accuracy of rows with options, means over tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset
from transformers import PreTrainedTokenizerBase

from ..evaluation import score_tasks
from ..tuner import Routing
from .tasks import tasks_in


_SCORED = ("prompt", "completion", "options")


def split_by_task(dataset: Any, task_column: str) -> Any:
    """
    Evaluation data by task: a map-style data set with a column that names several tasks becomes a dictionary.

    Everything else is returned as it is.

    Args:
        dataset: What `SFTTrainer` takes as `eval_dataset`.
        task_column (`str`): Column that names the task of each row.
    """
    if not isinstance(dataset, Dataset) or task_column not in dataset.column_names:
        return dataset
    tasks = tasks_in(dataset, task_column, required=task_column != "task")
    if tasks is None or len(tasks) < 2:
        return dataset
    feature = dataset.features[task_column]
    names = [
        feature.int2str(value) if isinstance(feature, ClassLabel) else str(value) for value in dataset[task_column]
    ]
    places: dict[str, list[int]] = {task: [] for task in tasks}
    for place, name in enumerate(names):
        places[name].append(place)
    return {task: dataset.select(rows) for task, rows in places.items()}


class OptionRows:
    """
    The rows of evaluation data that can be scored: with a prompt, a completion and the options it is one of.

    Preparation for training drops the options, so they are kept apart.

    Args:
        eval_dataset: What `SFTTrainer` takes as `eval_dataset`.
    """

    def __init__(self, eval_dataset: Any) -> None:
        self._by_name: dict[str, Dataset] = {}
        self._by_prefix: dict[str, Dataset] = {}
        if isinstance(eval_dataset, Mapping):
            self._by_name = {
                name: rows for name in eval_dataset if (rows := _scorable(eval_dataset[name])) is not None
            }
        elif (rows := _scorable(eval_dataset)) is not None:
            self._by_name = {"": rows}

    def add(self, eval_dataset: Any, prefix: str) -> None:
        """Take in data that is given to `evaluate`, whose metrics will have this prefix."""
        named = (
            {f"{prefix}_{name}": data for name, data in eval_dataset.items()}
            if isinstance(eval_dataset, Mapping)
            else {prefix: eval_dataset}
        )
        for key, data in named.items():
            rows = _scorable(data)
            if rows is not None:
                self._by_prefix[key] = rows
            elif "input_ids" not in (getattr(data, "column_names", None) or ()):
                self._by_prefix.pop(key, None)  # of an earlier call

    def find(self, eval_dataset: Any, prefix: str) -> Dataset | None:
        """The rows that belong to one evaluation, by its name or by the prefix of its metrics."""
        if eval_dataset is None:
            return self._by_name.get("")
        return self._by_name.get(eval_dataset) if isinstance(eval_dataset, str) else self._by_prefix.get(prefix)


def _scorable(dataset: Any) -> Dataset | None:
    columns = set(dataset.column_names) if isinstance(dataset, Dataset) else set()
    # Preparation adds the end of the sequence to completions, which then are none of the options.
    if not set(_SCORED) <= columns or "input_ids" in columns or len(dataset) == 0:
        return None
    row = dataset[0]
    plain = isinstance(row["prompt"], str) and isinstance(row["completion"], str) and bool(row["options"])
    return dataset.select_columns(list(_SCORED)) if plain else None


def score_options(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    *,
    batch_size: int,
    accelerator: Accelerator,
    share_rows: bool,
    routings: Sequence[Routing],
    task: str | None,
) -> float:
    """
    The share of rows whose completion is the most likely of its options.

    Args:
        model (`torch.nn.Module`), tokenizer (`PreTrainedTokenizerBase`), rows (`Dataset`): What to score.
        batch_size (`int`): Sequences in one forward pass.
        accelerator (`Accelerator`): Ranks over which rows are shared out.
        share_rows (`bool`): Whether each rank scores a part of the rows, rather than all.
        routings (`Sequence[Routing]`): State of the adapters, which are told the task.
        task (`str`, *optional*): The task, if the adapters know it.
    """
    ranks = accelerator.num_processes if share_rows else 1
    own = rows.select(range(accelerator.process_index, len(rows), ranks)) if ranks > 1 else rows
    before = [(routing.task, routing.usage) for routing in routings]
    for routing in routings:
        routing.usage = None  # these passes repeat rows that were counted
        if routing.kind == "task":
            routing.task = None if task is None else routing.index_of(task)
    try:
        counts = [0, 0]
        if len(own):
            score = score_tasks(model, tokenizer, {"": own.to_list()}, batch_size=batch_size)[""]
            counts = [score.correct, score.total]
    finally:
        for routing, (told, usage) in zip(routings, before, strict=True):
            routing.task, routing.usage = told, usage
    total = torch.tensor(counts, dtype=torch.float64, device=accelerator.device)
    if ranks > 1:
        total = accelerator.reduce(total, "sum")
    correct, scored = total.tolist()
    return correct / scored


def mean_over_tasks(metrics: Mapping[str, float], tasks: Sequence[str], prefix: str) -> dict[str, float]:
    """`<prefix>_loss` and `<prefix>_accuracy`: plain means over the tasks that have them."""
    means = {}
    for name in ("loss", "accuracy"):
        values = [metrics[key] for task in tasks if (key := f"{prefix}_{task}_{name}") in metrics]
        if values:
            means[f"{prefix}_{name}"] = sum(values) / len(values)
    return means
