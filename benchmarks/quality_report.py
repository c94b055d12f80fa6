"""Tables of `quality.py`, from the rows that it wrote: each method with its own learning rate, beside tuned LoRA.

    python benchmarks/quality_report.py                           # results/quality.jsonl, best learning rates
    python benchmarks/quality_report.py --rows ROWS --curves      # accuracy at each learning rate too
    python benchmarks/quality_report.py --tune_seeds 0 --test_seeds 1 2 3 4 5

A method is tuned over what its rows vary: learning rate and batch. The rate is chosen on the seeds of `--tune_seeds`
and the accuracies are those of `--test_seeds`, by default all seeds for both; then all methods look better than they
are, those with more settings most. Intervals are of 95 %, by a bootstrap of test rows (within tasks, the same for both
methods, all seeds and both sizes of a suite) and of seeds.
"""

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from report import HERE, replace_block


ROWS = HERE / "results" / "quality.jsonl"
REFERENCE = "LoRA r=10"
REPEATS = 4000

Row = dict[str, Any]
Cell = tuple[str, str]  # suite and size
Setting = tuple[float, int]  # learning rate and batch
# Differences of two methods in a cell: by task, -1, 0 or 1 for each seed and test row.
Differences = dict[str, np.ndarray]


@dataclass
class Method:
    """The rows of a method by cell, setting and seed."""

    name: str
    rows: dict[Cell, dict[Setting, dict[int, Row]]] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        cell, setting = (row["suite"], row["size"]), (row["learning_rate"], row["batch"])
        self.rows.setdefault(cell, {}).setdefault(setting, {})[row["seed"]] = row

    def settings(self, cell: Cell) -> list[Setting]:
        return sorted(self.rows.get(cell, {}))

    def runs(self, cell: Cell, setting: Setting, seeds: Sequence[int] | None = None) -> list[Row]:
        """Rows in the order of their seeds; of all seeds by default."""
        found = self.rows.get(cell, {}).get(setting, {})
        return [found[seed] for seed in sorted(found) if seeds is None or seed in seeds]

    def mean(self, cell: Cell, setting: Setting, seeds: Sequence[int] | None = None) -> float | None:
        """Accuracy, mean over tasks and seeds; `None` without rows."""
        runs = self.runs(cell, setting, seeds)
        return statistics.mean(row["mean_accuracy"] for row in runs) if runs else None

    def best(self, cell: Cell, seeds: Sequence[int] | None = None) -> Setting | None:
        """The best setting of a cell. Of settings with fewer seeds than others none is chosen."""
        counts = {setting: len(self.runs(cell, setting, seeds)) for setting in self.settings(cell)}
        most = max(counts.values(), default=0)
        full = [setting for setting, count in counts.items() if count == most > 0]
        return max(full, key=lambda setting: self.mean(cell, setting, seeds) or 0.0, default=None)

    def best_for_all(self, cells: Sequence[Cell], seeds: Sequence[int] | None = None) -> Setting | None:
        """The one setting with the best mean over cells, of those that all cells have."""
        common = set.intersection(*(set(self.settings(cell)) for cell in cells)) if cells else set()
        means = {s: [self.mean(cell, s, seeds) for cell in cells] for s in sorted(common)}
        full = {s: statistics.mean(values) for s, values in means.items() if None not in values}
        return max(full, key=lambda s: full[s], default=None)


def read(path: Path) -> list[Row]:
    """Rows without an error, the last one of each run."""
    rows: dict[str, Row] = {}
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # cut off
        if "error" not in row:
            rows[row["key"]] = row
    return list(rows.values())


def methods_of(rows: Iterable[Row]) -> dict[str, Method]:
    """Methods by name. What is not trained counts for all settings as one."""
    found: dict[str, Method] = {}
    for row in rows:
        found.setdefault(row["name"], Method(row["name"])).add(row)
    return found


def cells_of(methods: Iterable[Method]) -> list[Cell]:
    """All cells: suites by name, plenty before little."""
    return sorted({cell for method in methods for cell in method.rows}, key=lambda c: (c[0], c[1] != "plenty", c[1]))


# Differences and their intervals


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
    weights: dict[tuple[str, str, int], np.ndarray] = {}
    samples = {}
    for cell, by_task in cells.items():
        by_seed = []  # of each task: [repeats, seeds]
        for task, found in by_task.items():
            count = found.shape[1]
            key = (cell[0], task, count)
            if key not in weights:
                weights[key] = rng.multinomial(count, np.full(count, 1 / count), repeats).astype(np.float32) / count
            by_seed.append(weights[key] @ found.T.astype(np.float32))
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
    fixed = ours.best_for_all(cells, seeds.tune) if one_setting else None
    found = {}
    for cell in cells:
        setting, theirs = fixed if one_setting else ours.best(cell, seeds.tune), other.best(cell, seeds.tune)
        if setting is not None and theirs is not None:
            found[cell] = differences(ours.runs(cell, setting, seeds.test), other.runs(cell, theirs, seeds.test))
    each, mean = compare(found)
    return each, mean if len(each) == len(cells) else None


# Tables


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join(["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines)])


def in_order(methods: dict[str, Method], reference: str) -> list[Method]:
    """The reference first."""
    return sorted(methods.values(), key=lambda method: method.name != reference)


def setting_text(setting: Setting) -> str:
    rate, batch = setting
    return f"{rate:g}" + (f", batch {batch}" if batch != 32 else "")


def parameters(method: Method) -> str:
    """Trained parameters, in millions."""
    counts = {row["trainable"] for by in method.rows.values() for runs in by.values() for row in runs.values()}
    return " / ".join(f"{count / 1e6:.2f}" for count in sorted(counts))


def seconds(method: Method) -> str:
    """Seconds of training for a run, the median; of runs side by side their share."""
    shares = [
        row["seconds"].get("train", 0.0) / row["side_by_side"]
        for by_setting in method.rows.values()
        for runs in by_setting.values()
        for row in runs.values()
    ]
    return f"{statistics.median(shares):.1f}"


def tuned_table(methods: dict[str, Method], seeds: Seeds, reference: str = REFERENCE) -> str:
    """Each method at its best setting in each cell, and its difference from the reference at its own."""
    cells = cells_of(methods.values())
    lines = []
    for method in in_order(methods, reference):
        each = against(method, methods[reference], cells, seeds)[0] if reference in methods else {}
        line = [method.name, parameters(method), seconds(method)]
        for cell in cells:
            setting = method.best(cell, seeds.tune)
            mean = None if setting is None else method.mean(cell, setting, seeds.test)
            if setting is None or mean is None:
                line.append("")
                continue
            count = len(method.runs(cell, setting, seeds.test))
            text = f"{mean:.2f} ({setting_text(setting)}; {count} seed{'s' * (count > 1)})"
            line.append(text + (f" {each[cell]}" if cell in each and method.name != reference else ""))
        lines.append(line)
    head = ["method", "parameters, M", "s a run", *(", ".join(cell) for cell in cells)]
    return table(head, lines)


def mean_table(methods: dict[str, Method], seeds: Seeds, reference: str = REFERENCE) -> str:
    """Differences from the reference, tuned for each cell, as means over all cells that the reference has."""
    if reference not in methods:
        return ""
    cells = [cell for cell in cells_of(methods.values()) if cell in methods[reference].rows]
    ranked = []
    for method in methods.values():
        if method.name == reference:
            continue
        shared = [cell for cell in cells if cell in method.rows]
        tuned, fixed = (
            against(method, methods[reference], shared, seeds, one_setting=one)[1] for one in (False, True)
        )
        if tuned is not None:
            setting = method.best_for_all(shared, seeds.tune)
            one = "" if setting is None or fixed is None else f"{fixed} ({setting_text(setting)})"
            line = [method.name, f"{len(shared)} of {len(cells)}", str(tuned.seeds), str(tuned), one]
            ranked.append((len(shared), tuned.value, line))
    lines = [line for _, _, line in sorted(ranked, key=lambda entry: entry[:2], reverse=True)]
    return table(["method", "cells", "seeds", "tuned for each cell", "one setting for all cells"], lines)


def curves_table(methods: dict[str, Method], cell: Cell, reference: str = REFERENCE) -> str:
    """Accuracy by setting in a cell, mean over seeds."""
    columns = sorted({setting for method in methods.values() for setting in method.settings(cell)})
    lines = []
    for method in in_order(methods, reference):
        if cell in method.rows:
            means = [method.mean(cell, setting) for setting in columns]
            best = max(mean for mean in means if mean is not None)
            shown = ["" if m is None else f"**{m:.2f}**" if m == best else f"{m:.2f}" for m in means]
            lines.append([method.name, *shown])
    return table(["method", *map(setting_text, columns)], lines)


def report(rows: list[Row], seeds: Seeds, reference: str = REFERENCE, *, curves: bool = False) -> str:
    """All tables."""
    methods = methods_of(rows)
    parts = [
        f"Mean accuracy over tasks, %. Differences from {reference}, both at their best settings, in points.",
        tuned_table(methods, seeds, reference),
        f"Differences from {reference}, tuned for each cell: means over cells.",
        mean_table(methods, seeds, reference),
    ]
    if curves:
        for cell in cells_of(methods.values()):
            parts += [f"By learning rate: {', '.join(cell)}.", curves_table(methods, cell, reference)]
    return "\n\n".join(part for part in parts if part)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, nargs="+", default=[ROWS])
    parser.add_argument("--reference", default=REFERENCE, help="name of the method to compare with")
    parser.add_argument("--tune_seeds", type=int, nargs="+", help="to choose settings on")
    parser.add_argument("--test_seeds", type=int, nargs="+", help="to compare on")
    parser.add_argument("--curves", action="store_true", help="accuracy at each learning rate too")
    parser.add_argument("--update", type=Path, help="document with a block `quality` to write the tables into")
    args = parser.parse_args(arguments)
    seeds = Seeds(*(None if chosen is None else tuple(chosen) for chosen in (args.tune_seeds, args.test_seeds)))
    rows = [row for path in args.rows for row in read(path)]
    text = report(rows, seeds, args.reference, curves=args.curves)
    print(text)
    if args.update is not None:
        replace_block(args.update, "quality", text)


if __name__ == "__main__":
    main()
