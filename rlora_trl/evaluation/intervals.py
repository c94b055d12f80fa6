"""Intervals of scores: how far they would differ on other rows of the same tasks, by bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


_SAMPLES, _CONFIDENCE, _SEED = 10_000, 0.95, 0
# Counts of values that are drawn at once.
_CHUNK = 2**22


class Interval(NamedTuple):
    """Bounds of a score or of a difference of two."""

    low: float
    high: float


def bootstrap_interval(tasks: Sequence[Sequence[float] | np.ndarray]) -> Interval:
    """
    The 95 % interval of a mean over tasks, by bootstrap: the rows of each task are drawn again, 10,000 times.

    It is that of the rows, not of training runs. To compare two models on the same rows, give the difference of each
    row: what both find easy or hard cancels out.

    Args:
        tasks (`Sequence[Sequence[float]]`): The values of the rows of each task; one task for the interval of a task.

    Returns:
        [`Interval`]: The percentiles 2.5 and 97.5; the same for the same values in any order. If all values are the
        same, it has no width, whatever the number of rows.

    Raises:
        ValueError: If there is no task, or one without rows.
    """
    if not len(tasks) or not all(len(values) for values in tasks):
        raise ValueError("An interval needs at least one task, and each task at least one row. Leave out empty tasks.")
    draw = np.random.default_rng(_SEED)
    means = np.mean([_resampled_means(np.asarray(values, dtype=np.float64), draw) for values in tasks], axis=0)
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(low), float(high))


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
