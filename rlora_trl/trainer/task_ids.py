"""Task ids of rows and tokens: columns of datasets, and tensors of batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, LargeList, List, Value

from ..evaluation.columns import AnyDataset, add_column, by_row, encode, task_namer
from ..evaluation.formats import as_shown, has_transform


# The column and batch entry with task ids, -1 for no task. A user's own column `task_ids` is left alone.
TASK_IDS = "rlora_task_ids"
# In batches whose rows are packed or joined: the tokens that begin a row of the data.
ROW_STARTS = "rlora_row_starts"
# In batches without an attention mask: the tokens that are not padding.
TOKEN_MASK = "rlora_token_mask"

# Added to the id of the first token of a row, so that packing carries both in one column.
ROW_START_MARK = 1 << 30
IGNORED_LABEL = -100  # the label of a token without a loss


def number_tasks(
    dataset: AnyDataset, names: Sequence[str], task_column: str, *, unknown_allowed: bool = False
) -> AnyDataset:
    """
    Add a column with the index of each row's task in `names`.

    Args:
        dataset (`Dataset` or `IterableDataset`): With the column `task_column`.
        names (`Sequence[str]`): Names of the tasks.
        task_column (`str`): Column of names.
        unknown_allowed (`bool`, *optional*, defaults to `False`): Tasks that are not among `names` get -1.

    Returns:
        `Dataset` or `IterableDataset`: With the column `TASK_IDS`.

    Raises:
        ValueError: If a task is not among `names`; in a stream, when its row is read.
    """
    ids: dict[str | None, int] = {name: task_id for task_id, name in enumerate(names)}
    name_of = task_namer(dataset, task_column)

    def id_of(value: Any) -> int:
        name = name_of(value)
        if name in ids:
            return ids[name]
        if unknown_allowed:
            return -1
        raise ValueError(
            f"Column {task_column!r} has a row of task {value!r}, and the adapter's tasks are {', '.join(names)}. Add "
            "it to `RLoraConfig(tasks=[...])` of a new adapter, or filter the row out."
        )

    if isinstance(dataset, Dataset):
        values, numbers = encode(dataset, task_column)
        value_ids = np.asarray([id_of(value) for value in values], dtype=np.int64)
        return add_ids(dataset, value_ids[numbers])
    return dataset.map(lambda row: {TASK_IDS: id_of(row[task_column])}, features=with_ids(dataset.features))


def ids_of(dataset: Dataset) -> np.ndarray:
    """The task id of each row `[rows]` of a dataset that is not packed."""
    return by_row(dataset, [TASK_IDS], lambda ids: ids)


def with_ids(features: Features | None) -> Features | None:
    """The features of a stream with a column of task ids; `None` leaves them unknown."""
    return None if features is None else Features({**features, TASK_IDS: Value("int64")})


def add_ids(dataset: Dataset, numbers: np.ndarray) -> Dataset:
    """Add a column of task ids, which a transform of the dataset passes through."""
    numbered = add_column(as_shown(dataset), TASK_IDS, numbers)  # which drops formats
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
    """Add a column with one task id for all rows."""
    if isinstance(dataset, Dataset):
        return add_ids(dataset, np.full(len(dataset), task_id, dtype=np.int64))
    return dataset.map(lambda row: {TASK_IDS: task_id}, features=with_ids(dataset.features))


def is_packed(dataset: Any) -> bool:
    """Whether a dataset has the task of each token (see [`spread_over_tokens`]) rather than of each row."""
    features = dataset.features if isinstance(dataset, Dataset) else None
    return features is not None and isinstance(features.get(TASK_IDS), List | LargeList)


def spread_over_tokens(dataset: AnyDataset, **map_kwargs: Any) -> AnyDataset:
    """
    Replace the task id of each row by a list with one for each token, which can be packed like the tokens.

    The id of the first token of a row is marked by `ROW_START_MARK`, which [`TaskCollator`] removes.

    Args:
        dataset (`Dataset` or `IterableDataset`): Tokenized, with task ids of rows.
        map_kwargs: Options of `Dataset.map`.

    Returns:
        `Dataset` or `IterableDataset`: With task ids of tokens.
    """

    def spread(row: dict[str, Any]) -> dict[str, list[int]]:
        task_id, length = int(row[TASK_IDS]), len(row["input_ids"])
        return {"_token_task_ids": [task_id + ROW_START_MARK * (index == 0) for index in range(length)]}

    spread_out = dataset.map(spread, remove_columns=[TASK_IDS], **map_kwargs)
    return spread_out.rename_column("_token_task_ids", TASK_IDS)


def token_mask_of(batch: dict[str, Any]) -> torch.Tensor | None:
    """The mask `[B, S]` of the tokens of a batch that are not padding; `None` if none is padding."""
    for name in (TOKEN_MASK, "attention_mask"):
        mask = batch.get(name)
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            return mask
    return None


def count_tokens(batch: dict[str, Any]) -> int | torch.Tensor:
    """The number of tokens of a batch that are not padding."""
    mask = token_mask_of(batch)
    if mask is not None:
        return mask.sum()
    tokens = batch.get("input_ids", batch.get("inputs_embeds"))
    return 0 if tokens is None else tokens.shape[0] * tokens.shape[1]
