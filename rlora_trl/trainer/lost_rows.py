"""
Rows that preparation leaves nothing to learn from, by task.

`SFTTrainer` drops a row whose labels `max_length` cuts off: a prompt that fills it leaves no completion. Packing keeps
such a row without a label. Both are silent there, so a task can vanish from a run that names it.
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
    How many rows each task has.

    Args:
        dataset (`Dataset`): With a column of task ids, or without, where no task is known.
        num_tasks (`int`): Number of tasks.

    Returns:
        `np.ndarray` of shape `[num_tasks + 1]`: Rows by task; the last are those of no known task.
    """
    if TASK_IDS not in dataset.column_names:
        return np.bincount([num_tasks], minlength=num_tasks + 1) * len(dataset)
    return _count(ids_of(dataset), num_tasks)


def learnable_rows(dataset: Dataset, num_tasks: int, max_length: int | None = None) -> np.ndarray:
    """
    How many rows of each task have a token with a loss.

    Args:
        dataset (`Dataset`): Tokenized, with task ids and `labels`.
        num_tasks (`int`): Number of tasks.
        max_length (`int`, *optional*): Tokens of a row that are used, where it is still to be cut.

    Returns:
        `np.ndarray` of shape `[num_tasks + 1]`: As of [`rows_of_tasks`].
    """
    counts = np.zeros(num_tasks + 1, dtype=np.int64)
    for batch in arrow_batches(dataset.select_columns([TASK_IDS, "labels"])):
        have_loss = _have_loss(batch["labels"], max_length)
        counts += _count(batch[TASK_IDS].to_numpy()[have_loss], num_tasks)
    return counts


def _count(numbers: np.ndarray, num_tasks: int) -> np.ndarray:
    return np.bincount(np.where(numbers < 0, num_tasks, numbers), minlength=num_tasks + 1)


def _have_loss(labels: pa.ChunkedArray, max_length: int | None) -> np.ndarray:
    lengths = pc.fill_null(pc.list_value_length(labels), 0).to_numpy()
    values = pc.list_flatten(labels).to_numpy()
    ends = np.cumsum(lengths)
    places = np.arange(values.size) - np.repeat(ends - lengths, lengths)
    # The first token of a row is predicted from nothing, and has no loss whatever its label.
    counted = (values != IGNORED_LABEL) & (places > 0)
    if max_length is not None:
        counted &= places < max_length
    have = np.zeros(lengths.size, dtype=bool)
    have[np.repeat(np.arange(lengths.size), lengths)[counted]] = True
    return have


def warn_of_unseen_tasks(seen: Mapping[str, Mapping[str, int]]) -> None:
    """
    Warn of tasks of which training saw no row, which of streams is not known before.

    Args:
        seen (`Mapping[str, Mapping[str, int]]`): Rows by task, as `RLoraSFTTrainer.tasks_seen` gives them.
    """
    unseen = [task for task, counts in seen.items() if not counts["rows"]]
    if unseen:
        logger.warning(
            f"Training saw no row of {', '.join(map(repr, unseen))}, which the adapter names as tasks. Their rows may "
            "have come later than the last step, or have been dropped as no token was left to learn from: train for "
            "more steps, raise `max_length`, or remove these tasks."
        )


class LostRows:
    """
    What preparation leaves of each task, of one trainer: refuses, remembers for a warning, and numbers tasks again.

    Args:
        max_length (`int`, *optional*): `SFTConfig.max_length`, for messages.
        labels_are_used (`bool`): Whether the labels of the data are those of the batch, not a collator of the user's.
        routes_by_task (`bool`): Whether each task has a mixture of its own, which must not stay untrained.

    Attributes:
        places (`np.ndarray`, *optional*): The new number of each task by the old one, -1 of those without rows; `None`
            where all tasks have rows.
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
        self._training = ""
        self._evaluation: list[str] = []
        self._known: list[Dataset] = []
        self._told: set[str] = set()

    def is_known(self, dataset: Any) -> bool:
        """Whether this is evaluation data that was prepared, and noted, since the last [`tell`]."""
        return any(dataset is known for known in self._known)

    def note_training(
        self, dataset: Dataset, given: np.ndarray, tasks: Sequence[str], cut_at: int | None
    ) -> list[int]:
        """
        Note what is left of the training data.

        Args:
            dataset (`Dataset`): The prepared data.
            given (`np.ndarray`): Rows of each task before; see [`rows_of_tasks`].
            tasks (`Sequence[str]`): Names of the tasks.
            cut_at (`int`, *optional*): See `max_length` of [`learnable_rows`].

        Returns:
            `list[int]`: The tasks of which nothing is left.

        Raises:
            ValueError: If nothing is left of all tasks or, where each has a mixture of its own, of one.
        """
        left = self._left(dataset, tasks, cut_at)
        lost = _list_losses(given, left, tasks)
        if not lost:
            return []
        if not left.any():
            raise ValueError(f"The training data has no row with a token to learn from ({lost}). {self._remedy}")
        gone = [place for place in range(len(tasks)) if given[place] and not left[place]]
        names = ", ".join(repr(tasks[place]) for place in gone)
        if gone and self._routes_by_task:
            raise ValueError(
                f'With `router="task"` each task needs rows to learn its mixture from, and none is left of {names} '
                f"({lost}). {self._remedy}"
            )
        self._training = f"Training data has rows without a token to learn from, which are not trained on: {lost}."
        if gone:
            self._training += f" Nothing is left of {names}, and the adapter is not recorded as trained on it."
        return gone

    def note_evaluation(
        self, name: str, dataset: Dataset, given: np.ndarray, tasks: Sequence[str], cut_at: int | None
    ) -> Dataset:
        """Note what is left of evaluation data, which is returned; arguments as of [`note_training`]."""
        self._known.append(dataset)
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
        Number tasks again without those that are gone.

        Args:
            gone (`Sequence[int]`): Tasks of which nothing is left.
            tasks (`Sequence[str]`): Names of all tasks.
            kept (`Collection[str]`): Names that stay, as the adapter was trained on these tasks before.

        Returns:
            `list[str]`: Names of the tasks that stay, by their new numbers.
        """
        staying = [place for place, task in enumerate(tasks) if place not in gone or task in kept]
        if len(staying) < len(tasks):
            self.places = np.full(len(tasks), -1, dtype=np.int64)
            self.places[staying] = np.arange(len(staying))
        return [tasks[place] for place in staying]

    def renumber(self, dataset: Any) -> Any:
        """The dataset with the new numbers of tasks, if it has any; rows of tasks that are gone have none."""
        is_data = isinstance(dataset, Dataset | IterableDataset)
        if self.places is None or not is_data or self.is_known(dataset) or TASK_IDS not in columns_of(dataset):
            return dataset
        places = np.append(self.places, -1)  # of the number -1
        if isinstance(dataset, IterableDataset):
            features = with_ids(dataset.features)
            return dataset.map(lambda row: {TASK_IDS: int(places[row[TASK_IDS]])}, features=features)
        return add_ids(dataset.remove_columns(TASK_IDS), places[ids_of(dataset)])

    def tell(self) -> None:
        """Warn once of what was noted, and forget it."""
        texts = [self._training] if self._training else []
        if self._evaluation:
            listed = "; ".join(self._evaluation)
            texts.append(f"Evaluation data has rows without a token to learn from, which are not evaluated: {listed}.")
        for text in texts:
            if text not in self._told:
                logger.warning(f"{text} {self._remedy}")
        self._told.update(texts)
        self._training, self._evaluation, self._known = "", [], []


def _list_losses(given: np.ndarray, left: np.ndarray, tasks: Sequence[str]) -> str:
    """`"sst2 3 of 40, rte 40 of 40"`: the rows that each task lost of those that were given; "" if none did."""
    if not given[:-1].any():
        names = ["all"] * len(given)
    else:
        names = [*tasks, "(no task)"]
    return ", ".join(
        f"{name} {before - after} of {before}"
        for name, before, after in zip(names, given.tolist(), left.tolist(), strict=True)
        if before > after
    )
