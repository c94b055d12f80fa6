"""Task ids from a column of names, through preparation, packing and collation, to the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset

from .tasks import AnyDataset, columns_of


TASK_IDS = "task_ids"
# Only where tokens that don't count can't be told from an attention mask.
TOKEN_MASK = "token_mask"


def number_tasks(
    dataset: AnyDataset, names: Sequence[str], task_column: str, *, unknown_allowed: bool = False
) -> AnyDataset:
    """
    Add a column `task_ids` with the place of each row's task among `names`.

    Args:
        dataset (`Dataset` or `IterableDataset`): With the column `task_column`.
        names (`Sequence[str]`): Names of the tasks.
        task_column (`str`): Column of names.
        unknown_allowed (`bool`, *optional*, defaults to `False`): Tasks that are not among `names` get -1.

    Raises:
        ValueError: If a task is not among `names`, at once or, in a stream, when its row comes; or if the data set has
            a column `task_ids` already.
    """
    if TASK_IDS in columns_of(dataset):
        raise ValueError(
            f"The data set has a column {TASK_IDS!r}, which is made from `task_column={task_column!r}`. Rename or "
            "remove it."
        )
    index = {name: place for place, name in enumerate(names)}

    def place_of(name: Any) -> int:
        if str(name) in index:
            return index[str(name)]
        if unknown_allowed:
            return -1
        raise ValueError(
            f"Column {task_column!r} has a row of task {name!r}, and the adapter's tasks are {', '.join(names)}. Add "
            "it to `RLoraConfig(tasks=[...])` of a new adapter, or filter the row out."
        )

    feature = (dataset.features or {}).get(task_column)
    to_name = feature.int2str if isinstance(feature, ClassLabel) else str
    if isinstance(dataset, Dataset):
        values, inverse = np.unique(np.asarray(dataset[task_column]), return_inverse=True)
        places = np.asarray([place_of(to_name(value.item())) for value in values])
        return dataset.add_column(TASK_IDS, places[inverse].astype(np.int64))
    return dataset.map(lambda row: {TASK_IDS: place_of(to_name(row[task_column]))})


def number_alike(dataset: AnyDataset, task_id: int) -> AnyDataset:
    """Add a column `task_ids` with one number in all rows."""
    if TASK_IDS in columns_of(dataset):
        return dataset
    if isinstance(dataset, Dataset):
        return dataset.add_column(TASK_IDS, np.full(len(dataset), task_id, dtype=np.int64))
    return dataset.map(lambda row: {TASK_IDS: task_id})


def spread_over_tokens(dataset: AnyDataset, **map_kwargs: Any) -> AnyDataset:
    """Turn the task of each row into a list with the task of each of its tokens, which can be packed like them."""

    def spread(row: dict[str, Any]) -> dict[str, list[int]]:
        return {"_token_task_ids": [row[TASK_IDS]] * len(row["input_ids"])}

    spread_out = dataset.map(spread, remove_columns=[TASK_IDS], **map_kwargs)
    return spread_out.rename_column("_token_task_ids", TASK_IDS)


class TaskCollator:
    """
    Any collator, and the tasks of the batch.

    Adds `task_ids` to the batch if examples have them: `[B]`, or `[B, S]` with -1 for padding where rows were packed
    or joined (padding-free). Adds `token_mask` `[B, S]` where padding can't be told from an attention mask.

    Args:
        collator (`Callable`): Makes a batch of examples, with `input_ids` `[B, S]`.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        given = [example.get(TASK_IDS) for example in examples]
        rest = [{name: value for name, value in example.items() if name != TASK_IDS} for example in examples]
        batch = self.collator(rest)
        rows, width = batch["input_ids"].shape
        if "input_ids" in examples[0]:
            lengths = [len(example["input_ids"]) for example in examples]
            if rows != len(examples) and "attention_mask" not in batch and width > sum(lengths):
                batch[TOKEN_MASK] = (torch.arange(width) < sum(lengths)).expand(rows, width)
        if given[0] is None:
            return batch
        if rows == len(examples) and not isinstance(given[0], list):
            batch[TASK_IDS] = torch.tensor(given)
            return batch
        by_token = [
            ids if isinstance(ids, list) else [ids] * length for ids, length in zip(given, lengths, strict=True)
        ]
        if rows != len(examples):  # all in one row
            by_token = [[task_id for ids in by_token for task_id in ids]]
        batch[TASK_IDS] = torch.tensor([ids + [-1] * (width - len(ids)) for ids in by_token])
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
