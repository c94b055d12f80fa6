"""Task ids from a column of names, through preparation, packing and collation, to the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset, LargeList, List

from .tasks import AnyDataset, has_transform, task_namer, values_of


# Not a name that data sets use; a user's own column `task_ids` is none of the trainer's business.
TASK_IDS = "rlora_task_ids"
# Where rows of the data begin, in batches whose rows are packed or joined.
ROW_STARTS = "rlora_row_starts"
# Only where tokens that don't count can't be told from an attention mask.
TOKEN_MASK = "rlora_token_mask"
# Added to the id of the first token of a row, so that packing carries both in one column.
_START = 1 << 30


def number_tasks(
    dataset: AnyDataset, names: Sequence[str], task_column: str, *, unknown_allowed: bool = False
) -> AnyDataset:
    """
    Add a column with the place of each row's task among `names`.

    Args:
        dataset (`Dataset` or `IterableDataset`): With the column `task_column`.
        names (`Sequence[str]`): Names of the tasks.
        task_column (`str`): Column of names.
        unknown_allowed (`bool`, *optional*, defaults to `False`): Tasks that are not among `names` get -1.

    Raises:
        ValueError: If a task is not among `names`, at once or, in a stream, when its row comes.
    """
    index: dict[str | None, int] = {name: place for place, name in enumerate(names)}
    name_of = task_namer(dataset, task_column)

    def place_of(value: Any) -> int:
        name = name_of(value)
        if name in index:
            return index[name]
        if unknown_allowed:
            return -1
        raise ValueError(
            f"Column {task_column!r} has a row of task {value!r}, and the adapter's tasks are {', '.join(names)}. Add "
            "it to `RLoraConfig(tasks=[...])` of a new adapter, or filter the row out."
        )

    if isinstance(dataset, Dataset):
        places = {value: place_of(value) for value in dataset.unique(task_column)}
        numbers = [places[value] for value in values_of(dataset, task_column)]
        return _add_ids(dataset, np.asarray(numbers, dtype=np.int64))
    return dataset.map(lambda row: {TASK_IDS: place_of(row[task_column])})


def _add_ids(dataset: Dataset, numbers: np.ndarray) -> Dataset:
    """The data set with a column of task ids, which a transform passes on beside what it makes of a row."""
    numbered = dataset.add_column(TASK_IDS, numbers)
    if not has_transform(dataset):
        return numbered
    transform = dataset.format["format_kwargs"]["transform"]
    columns = [*dataset.format["columns"], TASK_IDS]
    return numbered.with_transform(partial(_transform_but_ids, transform), columns)


def _transform_but_ids(transform: Callable[[dict[str, Any]], Any], batch: dict[str, Any]) -> dict[str, Any]:
    rest = dict(batch)
    numbers = rest.pop(TASK_IDS, None)
    made = dict(transform(rest))
    return made if numbers is None else {**made, TASK_IDS: numbers}


def number_alike(dataset: AnyDataset, task_id: int) -> AnyDataset:
    """Add a column of task ids with one number in all rows."""
    if isinstance(dataset, Dataset):
        return _add_ids(dataset, np.full(len(dataset), task_id, dtype=np.int64))
    return dataset.map(lambda row: {TASK_IDS: task_id})


def is_packed(dataset: Any) -> bool:
    """Whether a data set has the task of each token, as [`spread_over_tokens`] gives it, rather than of each row."""
    features = dataset.features if isinstance(dataset, Dataset) else None
    return features is not None and isinstance(features.get(TASK_IDS), List | LargeList)


def spread_over_tokens(dataset: AnyDataset, **map_kwargs: Any) -> AnyDataset:
    """
    Turn the task of each row into a list with the task of each of its tokens, which can be packed like them.

    The first of a row is marked as such; [`TaskCollator`] takes the mark off again.
    """

    def spread(row: dict[str, Any]) -> dict[str, list[int]]:
        task_id, length = int(row[TASK_IDS]), len(row["input_ids"])
        return {"_token_task_ids": [task_id + _START * (place == 0) for place in range(length)]}

    spread_out = dataset.map(spread, remove_columns=[TASK_IDS], **map_kwargs)
    return spread_out.rename_column("_token_task_ids", TASK_IDS)


class TaskCollator:
    """
    Any collator, and the tasks of the batch.

    Adds task ids to the batch if examples have them: `[B]`, or `[B, S]` with -1 for padding where rows were packed or
    joined (padding-free), with a mask `[B, S]` of the tokens that begin a row. Adds a mask of the tokens that count
    where padding can't be told from an attention mask.

    Args:
        collator (`Callable`): Makes a batch of examples, with `input_ids` `[B, S]`.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        given: list[Any] = [example.get(TASK_IDS) for example in examples]
        rest = [{name: value for name, value in example.items() if name != TASK_IDS} for example in examples]
        batch = self.collator(rest)
        if "input_ids" not in examples[0]:  # pictures, which the collator turns into tokens
            if given[0] is not None:
                batch[TASK_IDS] = torch.tensor([int(task_id) for task_id in given])
            return batch
        rows, width = batch["input_ids"].shape
        lengths = [len(example["input_ids"]) for example in examples]
        joined = "attention_mask" not in batch  # padding-free: all in one row
        if joined and width > sum(lengths):
            batch[TOKEN_MASK] = (torch.arange(width) < sum(lengths)).expand(rows, width)
        if given[0] is None:
            return batch
        packed = np.ndim(given[0]) > 0
        if not packed and not joined:
            batch[TASK_IDS] = torch.tensor([int(task_id) for task_id in given])
            return batch
        marked = [
            np.asarray(ids) if packed else np.where(np.arange(length) == 0, int(ids) + _START, int(ids))
            for ids, length in zip(given, lengths, strict=True)
        ]
        table = np.full((rows, width), -1, dtype=np.int64)
        for row, ids in enumerate([np.concatenate(marked)] if joined else marked):
            table[row, : len(ids)] = ids
        starts = table >= _START - 1  # a row of no known task starts with -1, marked
        batch[TASK_IDS] = torch.from_numpy(np.where(starts, table - _START, table))
        batch[ROW_STARTS] = torch.from_numpy(starts)
        return batch


def token_mask_of(batch: dict[str, Any]) -> torch.Tensor | None:
    """The mask `[B, S]` of the tokens of a batch that count, or `None` where all do."""
    for name in (TOKEN_MASK, "attention_mask"):
        mask = batch.get(name)
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            return mask
    return None


def count_tokens(batch: dict[str, Any]) -> int | torch.Tensor:
    """How many tokens of a batch count."""
    mask = token_mask_of(batch)
    if mask is not None:
        return mask.sum()
    tokens = batch.get("input_ids", batch.get("inputs_embeds"))
    return 0 if tokens is None else tokens.shape[0] * tokens.shape[1]
