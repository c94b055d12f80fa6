"""Differences between methods of `quality.py` on the same test rows and seeds, and their intervals by bootstrap."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from quality_rows import Cell, Method, Row, Setting


REPEATS = 4000

# Differences of two methods in a cell: by task, -1, 0 or 1 for each seed and test row.
Differences = dict[str, np.ndarray]


def bits(row: Row, task: str) -> np.ndarray:
    """Which test rows of a task are right, 0 or 1."""
    count = row["scored_rows"][task]
    return np.array([int(bit) for bit in f"{int(row['right'][task], 16):0{count}b}"], dtype=np.int8)


def differences(ours: Sequence[Row], other: Sequence[Row]) -> Differences:
    """
    Of two methods in a cell, for the seeds that both have: by task `[seeds, rows]`; empty without such seeds.

    Raises:
        ValueError: If they were scored on other rows.
    """
    by_seed = {row["seed"]: row for row in other}
    pairs = [(row, by_seed[row["seed"]]) for row in ours if row["seed"] in by_seed]
    if not pairs:
        return {}
    for a, b in pairs:
        for task, count in a["scored_rows"].items():
            if b["scored_rows"].get(task) != count:
                raise ValueError(
                    f"{a['name']} has {count} test rows of {task}, and others {b['scored_rows'].get(task)}. Compare "
                    "rows of one `test_rows`."
                )
    return {task: np.stack([bits(a, task) - bits(b, task) for a, b in pairs]) for task in pairs[0][0]["right"]}


@lru_cache(maxsize=64)
def row_weights(suite: str, task: str, count: int, repeats: int, seed: int) -> np.ndarray:
    """Shares `[repeats, count]` of a task's rows, drawn with replacement."""
    # Kept, as drawing them takes most of the time, and all comparisons use the same ones.
    rng = np.random.default_rng([seed, *f"{suite}/{task}".encode()])
    return rng.multinomial(count, np.full(count, 1 / count), repeats).astype(np.float32) / count


def bootstrap(cells: dict[Cell, Differences], repeats: int = REPEATS, seed: int = 0) -> dict[Cell, np.ndarray]:
    """
    Resampled mean differences, in points.

    Test rows are drawn with replacement within each task, the same for all seeds and for the cells of a suite, which
    share them. Seeds are drawn in each cell.

    Args:
        cells (`dict[Cell, Differences]`): Not empty ones.
        repeats (`int`), seed (`int`): Of the draws.

    Returns:
        `dict[Cell, np.ndarray]`: `[repeats]` for each cell.
    """
    rng = np.random.default_rng(seed)
    samples = {}
    for cell, by_task in cells.items():
        by_seed = [  # of each task: [repeats, seeds]
            row_weights(cell[0], task, found.shape[1], repeats, seed) @ found.T.astype(np.float32)
            for task, found in by_task.items()
        ]
        means = np.mean(by_seed, axis=0)  # [repeats, seeds]
        drawn = rng.integers(means.shape[1], size=means.shape)
        samples[cell] = 100 * np.take_along_axis(means, drawn, 1).mean(1)
    return samples


@dataclass(frozen=True)
class Estimate:
    """A difference in points, its interval of 95 %, and the smallest number of seeds behind it."""

    value: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def compare(cells: dict[Cell, Differences], repeats: int = REPEATS) -> tuple[dict[Cell, Estimate], Estimate | None]:
    """The differences in each cell, and their mean over cells."""
    cells = {cell: found for cell, found in cells.items() if found}
    if not cells:
        return {}, None
    samples = bootstrap(cells, repeats)
    values = {c: 100 * float(np.mean([found.mean() for found in by_task.values()])) for c, by_task in cells.items()}
    seeds = {cell: len(next(iter(by_task.values()))) for cell, by_task in cells.items()}

    def estimate(value: float, drawn: np.ndarray, count: int) -> Estimate:
        low, high = np.percentile(drawn, [2.5, 97.5])
        return Estimate(value, float(low), float(high), count)

    each = {cell: estimate(values[cell], samples[cell], seeds[cell]) for cell in cells}
    mean = np.mean([samples[cell] for cell in cells], axis=0)
    return each, estimate(statistics.mean(values.values()), mean, min(seeds.values()))


@dataclass(frozen=True)
class Seeds:
    """Seeds to choose settings on, and seeds to compare on; `None` for all."""

    tune: tuple[int, ...] | None = None
    test: tuple[int, ...] | None = None


def chosen(
    method: Method, cells: Sequence[Cell], seeds: Sequence[int] | None, one: bool = False
) -> dict[Cell, Setting]:
    """
    The best setting of a method by cell, in those cells that have one.

    Args:
        method ([`Method`]): Whose settings.
        cells (`Sequence[Cell]`): To choose for.
        seeds (`Sequence[int]`, *optional*): To choose on; all by default.
        one (`bool`): One setting for all cells, instead of one for each.
    """
    fixed = method.best_for_all(cells, seeds) if one else None
    found = {cell: fixed if one else method.best(cell, seeds) for cell in cells}
    return {cell: setting for cell, setting in found.items() if setting is not None}


def at_settings(
    ours: Method,
    mine: dict[Cell, Setting],
    other: Method,
    theirs: dict[Cell, Setting],
    seeds: Sequence[int] | None = None,
) -> tuple[dict[Cell, Estimate], Estimate | None]:
    """The differences of two methods at given settings; the mean is `None` unless both have rows in all of `mine`."""
    each, mean = compare(
        {
            cell: differences(ours.runs(cell, setting, seeds), other.runs(cell, theirs[cell], seeds))
            for cell, setting in mine.items()
            if cell in theirs
        }
    )
    return each, mean if len(each) == len(mine) else None


def against(
    ours: Method, other: Method, cells: Sequence[Cell], seeds: Seeds, *, one_setting: bool = False
) -> tuple[dict[Cell, Estimate], Estimate | None]:
    """
    A method against another that is tuned for each cell.

    Args:
        ours ([`Method`]), other ([`Method`]): The methods.
        cells (`Sequence[Cell]`): Those to compare in; the mean is `None` unless both have rows in all.
        seeds ([`Seeds`]): To choose and to compare on.
        one_setting (`bool`): The method has one setting for all cells, instead of one for each.
    """
    mine, theirs = chosen(ours, cells, seeds.tune, one=one_setting), chosen(other, cells, seeds.tune)
    each, mean = at_settings(ours, mine, other, theirs, seeds.test)
    return each, mean if len(each) == len(cells) else None
