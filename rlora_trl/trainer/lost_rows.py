"""
Rows that preparation leaves without a token to train on, by task.

`SFTTrainer` drops a row if `max_length` cuts off all its labels: a prompt that fills it leaves no completion. Packing
keeps such a row without a label. Neither is reported, so all rows of a task could disappear from training.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset

from ..evaluation.columns import arrow_batches
from .task_ids import IGNORED_LABEL, TASK_IDS, add_ids, ids_of, with_ids
from .tasks import columns_of


logger = get_logger(__name__)


def rows_of_tasks(dataset: Dataset, num_tasks: int) -> np.ndarray:
    """
    Count the rows of each task.

    Args:
        dataset (`Dataset`): With a column of task ids; without, the task of all rows is unknown.
        num_tasks (`int`): Number of tasks.

    Returns:
        `np.ndarray` of shape `[num_tasks + 1]`: Rows by task; the last entry counts rows without a known task.
    """
    if TASK_IDS not in dataset.column_names:
        return np.bincount([num_tasks], minlength=num_tasks + 1) * len(dataset)
    return _count(ids_of(dataset), num_tasks)


def learnable_rows(dataset: Dataset, num_tasks: int, max_length: int | None = None) -> np.ndarray:
    """
    Count the rows of each task that have a token with a loss.

    Args:
        dataset (`Dataset`): Tokenized, with task ids and `labels`.
        num_tasks (`int`): Number of tasks.
        max_length (`int`, *optional*): Tokens of a row that are used, if rows are cut later.

    Returns:
        `np.ndarray` of shape `[num_tasks + 1]`: See [`rows_of_tasks`].
    """
    counts = np.zeros(num_tasks + 1, dtype=np.int64)
    for batch in arrow_batches(dataset.select_columns([TASK_IDS, "labels"])):
        have_loss = _have_loss(batch["labels"], max_length)
        counts += _count(batch[TASK_IDS].to_numpy()[have_loss], num_tasks)
    return counts


def _count(task_ids: np.ndarray, num_tasks: int) -> np.ndarray:
    return np.bincount(np.where(task_ids < 0, num_tasks, task_ids), minlength=num_tasks + 1)


def _have_loss(labels: pa.ChunkedArray, max_length: int | None) -> np.ndarray:
    """Which rows `[rows]` have a token with a loss."""
    lengths = pc.fill_null(pc.list_value_length(labels), 0).to_numpy()  # [rows]
    values = pc.list_flatten(labels).to_numpy()  # [tokens]
    columns = np.arange(values.size) - np.repeat(np.cumsum(lengths) - lengths, lengths)  # [tokens]

    # The first token of a row has no loss, whatever its label: nothing predicts it.
    has_loss = (values != IGNORED_LABEL) & (columns > 0)
    if max_length is not None:
        has_loss &= columns < max_length

    rows = np.zeros(lengths.size, dtype=bool)
    rows[np.repeat(np.arange(lengths.size), lengths)[has_loss]] = True
    return rows


def warn_of_unseen_tasks(seen: Mapping[str, Mapping[str, int]]) -> None:
    """
    Warn about tasks without a row in training. For streams this is known only at the end.

    Args:
        seen (`Mapping[str, Mapping[str, int]]`): Rows by task; see [`RLoraSFTTrainer.tasks_seen`].
    """
    unseen = [task for task, counts in seen.items() if not counts["rows"]]
    if unseen:
        logger.warning(
            f"Training saw no row of {', '.join(map(repr, unseen))}, which are in the adapter's `tasks`. Their rows "
            "come later in the stream, or were dropped because `max_length` left no token to train on. Train for more "
            "steps, raise `max_length`, or remove these tasks."
        )


class LostRows:
    """
    Finds rows that preparation drops, reports them, and removes tasks without remaining rows.

    Args:
        max_length (`int`, *optional*): `SFTConfig.max_length`, for messages.
        labels_are_used (`bool`): Whether batches use the labels of the data. A custom collator may set others.
        routes_by_task (`bool`): Whether each task has its own head weights, which must not stay untrained.

    Attributes:
        places (`np.ndarray` of shape `[tasks]`, *optional*): The new id of each task by the old one, -1 for those
            without rows; `None` if all tasks have rows.
    """

    def __init__(self, max_length: int | None, *, labels_are_used: bool, routes_by_task: bool) -> None:
        self.places: np.ndarray | None = None
        self._labels_are_used = labels_are_used
        self._routes_by_task = routes_by_task
        cause = (
            "" if max_length is None else f"a prompt that fills `max_length={max_length}` leaves no completion, and "
        )
        self._remedy = (
            f"Note that {cause}a row whose labels are all -100 has no loss. Raise `max_length`, or shorten or remove "
            "these rows."
        )
        # Pending and earlier warnings.
        self._training = ""
        self._evaluation: list[str] = []
        self._warned: set[str] = set()

    def note_training(
        self, dataset: Dataset, given: np.ndarray, tasks: Sequence[str], cut_at: int | None
    ) -> list[int]:
        """
        Note the rows that training data lost.

        Args:
            dataset (`Dataset`): The prepared data.
            given (`np.ndarray`): Rows of each task before preparation; see [`rows_of_tasks`].
            tasks (`Sequence[str]`): Names of the tasks.
            cut_at (`int`, *optional*): See `max_length` of [`learnable_rows`].

        Returns:
            `list[int]`: Ids of the tasks without rows.

        Raises:
            ValueError: If no row remains, or no row of a task that has its own head weights.
        """
        left = self._left(dataset, tasks, cut_at)
        losses = _list_losses(given, left, tasks)
        if not losses:
            return []
        if not left.any():
            raise ValueError(f"The training data has no row with a token to train on ({losses}). {self._remedy}")

        # Tasks without rows.
        gone = [task_id for task_id in range(len(tasks)) if given[task_id] and not left[task_id]]
        names = ", ".join(repr(tasks[task_id]) for task_id in gone)
        if gone and self._routes_by_task:
            raise ValueError(
                f'`router="task"` learns the head weights of each task from its rows, and no row remains of {names} '
                f"({losses}). {self._remedy}"
            )
        self._training = f"Training data has rows without a token to train on, which have no effect: {losses}."
        if gone:
            self._training += f" No row remains of {names}: the run does not train on it."
        return gone

    def note_evaluation(
        self, name: str, dataset: Dataset, given: np.ndarray, tasks: Sequence[str], cut_at: int | None
    ) -> Dataset:
        """
        Note the rows that evaluation data lost.

        Args:
            name (`str`): Name of the data in messages.
            dataset, given, tasks, cut_at: See [`note_training`].

        Returns:
            `Dataset`: The data.
        """
        before, after = int(given.sum()), int(self._left(dataset, tasks, cut_at).sum())
        if after < before:
            self._evaluation.append(f"{name} {before - after} of {before}{'' if after else ', so it gets no loss'}")
        return dataset

    def _left(self, dataset: Dataset, tasks: Sequence[str], cut_at: int | None) -> np.ndarray:
        if self._labels_are_used and {TASK_IDS, "labels"} <= set(dataset.column_names):
            return learnable_rows(dataset, len(tasks), cut_at)
        return rows_of_tasks(dataset, len(tasks))

    def forget(self, gone: Sequence[int], tasks: Sequence[str], kept: Collection[str]) -> list[str]:
        """
        Remove tasks, and number the others from 0.

        Args:
            gone (`Sequence[int]`): Ids of the tasks without rows.
            tasks (`Sequence[str]`): Names of all tasks.
            kept (`Collection[str]`): Names that stay, because the adapter was trained on these tasks before.

        Returns:
            `list[str]`: Names of the tasks that stay, by their new ids.
        """
        staying = [task_id for task_id, task in enumerate(tasks) if task_id not in gone or task in kept]
        if len(staying) < len(tasks):
            self.places = np.full(len(tasks), -1, dtype=np.int64)
            self.places[staying] = np.arange(len(staying))
        return [tasks[task_id] for task_id in staying]

    def renumber(self, dataset: Any) -> Any:
        """The dataset with the new task ids, if any changed; rows of tasks that are gone have -1."""
        is_data = isinstance(dataset, Dataset | IterableDataset)
        if self.places is None or not is_data or TASK_IDS not in columns_of(dataset):
            return dataset
        new_ids = np.append(self.places, -1)  # the id -1 stays
        if isinstance(dataset, IterableDataset):
            features = with_ids(dataset.features)
            return dataset.map(lambda row: {TASK_IDS: int(new_ids[row[TASK_IDS]])}, features=features)
        return add_ids(dataset.remove_columns(TASK_IDS), new_ids[ids_of(dataset)])

    def warn(self) -> None:
        """Warn, once for each text, of the rows that were noted, and forget them."""
        texts = [self._training] if self._training else []
        if self._evaluation:
            texts.append(
                "Evaluation data has rows without a token to evaluate, which have no effect: "
                f"{'; '.join(self._evaluation)}."
            )
        for text in texts:
            if text not in self._warned:
                logger.warning(f"{text} {self._remedy}")
        self._warned.update(texts)
        self._training, self._evaluation = "", []


def _list_losses(given: np.ndarray, left: np.ndarray, tasks: Sequence[str]) -> str:
    """The rows that each task lost, as `"sst2 3 of 40, rte 40 of 40"`; "" if no task lost any."""
    names = [*tasks, "(no task)"] if given[:-1].any() else ["all"] * len(given)
    return ", ".join(
        f"{name} {before - after} of {before}"
        for name, before, after in zip(names, given.tolist(), left.tolist(), strict=True)
        if before > after
    )
