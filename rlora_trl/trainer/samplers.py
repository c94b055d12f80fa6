"""Samplers of the rows of an epoch: the draws of a task mixture, and the packed draws of one epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


# First word of the key of each random stream, so that permutations of rows and shuffles never share random numbers.
_ROWS, _ORDER = 0, 1


def check_draw(seed: int, epoch: int) -> None:
    """Raise a `ValueError` if the seed or the epoch of a draw is negative."""
    for name, value in (("seed", seed), ("epoch", epoch)):
        if value < 0:
            raise ValueError(f"`{name}` must be 0 or more, got {value}. Count from 0.")


def _generator(seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


class MixtureSampler(Sampler[int]):
    """
    Draws rows of several tasks, a fixed number of each in every epoch, in random order.

    Each task has an endless sequence of shuffled passes over its rows; epoch e takes elements e * draws to
    (e + 1) * draws of it. So no row of a task is drawn a second time before all others were drawn once. The draws
    depend only on the seed and the epoch: all processes draw the same, and a run that resumes in a later epoch does
    not replay earlier ones.

    > [!NOTE]
    > In several processes, a data loader that accelerate prepared needs `dataloader.set_sampler(sampler)` before
    > `skip_first_batches`: otherwise its `set_epoch` does not find the sampler, and training resumes in epoch 0.

    Args:
        task_of_row (`Sequence[int]` or `np.ndarray`): Index of the task of each row of the dataset.
        draws (`Sequence[int]`): Rows of each task in one epoch, by index of the task.
        seed (`int`, *optional*, defaults to `42`): Seed of the draws.

    Raises:
        ValueError: If a row has a task without draws, draws have a task without rows, nothing is drawn, or the seed is
            negative.
    """

    def __init__(self, task_of_row: Sequence[int] | np.ndarray, draws: Sequence[int], seed: int = 42) -> None:
        super().__init__()
        check_draw(seed, 0)
        self.seed, self.epoch = seed, 0

        # `[:]` for the column of a dataset, which is read row by row otherwise.
        tasks = np.asarray(task_of_row[:], dtype=np.int64)  # [rows]
        self.draws = [int(number) for number in draws]
        outside = tasks[(tasks < 0) | (tasks >= len(self.draws))]
        if outside.size:
            raise ValueError(
                f"`task_of_row` has task {outside[0]}, and `draws` has {len(self.draws)} tasks. Count tasks "
                "from 0, and give the draws of each."
            )

        counts = np.bincount(tasks, minlength=len(self.draws))  # [tasks]
        for task, (count, number) in enumerate(zip(counts, self.draws, strict=True)):
            if number < 0 or (number > 0 and count == 0):
                raise ValueError(
                    f"`draws[{task}]` is {number}, and the task has {count} rows. Draw 0 or more, and only of tasks "
                    "with rows."
                )
        if not any(self.draws):
            raise ValueError("`draws` is all zeros; at least one task must be sampled. Give it a number of rows.")

        by_task = np.argsort(tasks, kind="stable")
        self._rows = np.split(by_task, np.cumsum(counts)[:-1])  # one array of rows for each task

    def set_epoch(self, epoch: int) -> None:
        """
        Choose the epoch that the next iteration draws.

        Args:
            epoch (`int`): Number of the epoch, from 0.

        Raises:
            ValueError: If it is negative.
        """
        check_draw(self.seed, epoch)
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return sum(self.draws)

    def __iter__(self) -> Iterator[int]:
        drawn = np.concatenate([self._draw(task) for task in range(len(self.draws))])
        yield from _generator(self.seed, _ORDER, self.epoch).permutation(drawn).tolist()

    def _draw(self, task: int) -> np.ndarray:
        rows, draws = self._rows[task], self.draws[task]
        if draws == 0:
            return rows[:0]

        # The passes over the rows that this epoch's part of the sequence is in.
        start, end = self.epoch * draws, (self.epoch + 1) * draws
        first = start // len(rows)
        passes = range(first, (end - 1) // len(rows) + 1)
        sequence = np.concatenate([_generator(self.seed, _ROWS, task, index).permutation(rows) for index in passes])
        offset = first * len(rows)
        return sequence[start - offset : end - offset]


class PartSampler(Sampler[int]):
    """
    Draws one part of a dataset per epoch, in random order, and starts over after the last part.

    Each part has the packed draws of one epoch. Parts differ slightly in length after packing; an epoch has as many
    rows as the shortest part, so that the number of steps is known.

    Args:
        lengths (`Sequence[int]`): Rows of the parts, which follow each other in the dataset.
        seed (`int`, *optional*, defaults to `42`): Seed of the order.
    """

    def __init__(self, lengths: Sequence[int], seed: int = 42) -> None:
        super().__init__()
        self.lengths, self.seed, self.epoch = list(lengths), seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration; see [`MixtureSampler.set_epoch`]."""
        check_draw(self.seed, epoch)
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return min(self.lengths)

    def __iter__(self) -> Iterator[int]:
        part = self.epoch % len(self.lengths)
        order = _generator(self.seed, _ORDER, self.epoch).permutation(self.lengths[part])[: len(self)]
        yield from (sum(self.lengths[:part]) + order).tolist()
