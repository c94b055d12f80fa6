"""Intervals of scores: how far they would differ on other rows of the same tasks, by bootstrap or exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


_SAMPLES, _CONFIDENCE, _SEED = 10_000, 0.95, 0
# Gains of F1 that are equal differ by this.
_ROUNDING = 1e-9
# Counts of values that are drawn at once.
_CHUNK = 2**22


class Interval(NamedTuple):
    """Bounds of a score or of a difference of two."""

    low: float
    high: float


def bootstrap_interval(
    tasks: Sequence[Sequence[float] | np.ndarray], bounds: tuple[float, float] | None = None
) -> Interval:
    """
    The 95 % interval of a mean over tasks, by bootstrap: the rows of each task are drawn again, 10,000 times.

    It is that of the rows, not of training runs. To compare two models on the same rows, give the difference of each
    row: what both find easy or hard cancels out.

    Args:
        tasks (`Sequence[Sequence[float]]`): The values of the rows of each task; one task for the interval of a task.
        bounds (`tuple[float, float]`, *optional*): The lowest and the highest value that a row can have: (0, 1) for a
            score, (-1, 1) for the difference of two. They are needed where all rows of each task have one value, which
            a bootstrap takes for certain. The interval then has all means with which such rows are drawn in at least
            2.5 of 100 samples: that of Clopper and Pearson for the share of one task.

    Returns:
        [`Interval`]: The percentiles 2.5 and 97.5; the same for the same values in any order. Without `bounds`, and
        if all rows of each task have one value, it has no width, whatever the number of rows.

    Raises:
        ValueError: If there is no task, or one without rows, or a value outside of the bounds.
    """
    if not len(tasks) or not all(len(values) for values in tasks):
        raise ValueError("An interval needs at least one task, and each task at least one row. Leave out empty tasks.")
    arrays = [np.asarray(values, dtype=np.float64) for values in tasks]
    tail = (1 - _CONFIDENCE) / 2
    if bounds is not None:
        _check_bounds(arrays, bounds)
        if not any(np.ptp(values) > _ROUNDING for values in arrays):
            first, counts = np.array([values[0] for values in arrays]), np.array([len(values) for values in arrays])
            down, up = (
                _largest_change(first - bounds[0], counts, tail),
                _largest_change(bounds[1] - first, counts, tail),
            )
            return Interval(float(first.mean() - down), float(first.mean() + up))

    draw = np.random.default_rng(_SEED)
    means = np.mean([_resampled_means(values, draw) for values in arrays], axis=0)
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(low), float(high))


def _check_bounds(arrays: Sequence[np.ndarray], bounds: tuple[float, float]) -> None:
    lowest, highest = min(values.min() for values in arrays), max(values.max() for values in arrays)
    if lowest < bounds[0] or highest > bounds[1]:
        raise ValueError(
            f"The values are from {lowest:g} to {highest:g}, and `bounds` {bounds[0]:g} to {bounds[1]:g}. Give the "
            "lowest and the highest value that a row can have."
        )


def _largest_change(room: np.ndarray, counts: np.ndarray, tail: float) -> float:
    """
    How far the mean over tasks can be from what was drawn, of rows that all have one value.

    Args:
        room (`np.ndarray`): `[tasks]`, how far the value of a row can be from that of the others, in one direction.
        counts (`np.ndarray`): `[tasks]`, rows.
        tail (`float`): The chance that rows like these must have.
    """
    tasks, counts, room = len(room), counts[room > 0], room[room > 0]
    if not len(room):
        return 0.0
    # Shares q of rows with another value maximize the sum of room * q where the product of (1 - q) ** counts is the
    # chance: by Lagrange, 1 - q is in proportion to counts / room, and at most 1.
    low, high = 0.0, float((room / counts).max())
    for _ in range(100):
        factor = (low + high) / 2
        same = np.minimum(factor * counts / room, 1.0)
        low, high = (factor, high) if np.sum(counts * np.log(same)) < np.log(tail) else (low, factor)
    return float(np.sum(room * (1 - same)) / tasks)


def _resampled_means(values: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Means `[samples]` of rows drawn with replacement."""
    # How often each different value is drawn is all that counts, and most metrics have two values.
    distinct, counts = np.unique(values, return_counts=True)
    size = max(_CHUNK // len(distinct), 1)
    drawn = [
        draw.multinomial(len(values), counts / len(values), size=min(size, _SAMPLES - start)) @ distinct
        for start in range(0, _SAMPLES, size)
    ]
    return np.concatenate(drawn) / len(values)
