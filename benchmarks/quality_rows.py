"""Rows of `quality.py`: how they are read, and the runs of each method by cell, setting and seed."""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


Row = dict[str, Any]
Cell = tuple[str, str]  # suite and size
Setting = tuple[float, int]  # learning rate and batch


def all_rows(path: Path) -> list[Row]:
    """The rows of a file in their order, also those with an error; a line that was cut off is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def read(*paths: Path) -> list[Row]:
    """Rows without an error, the last one of each run."""
    return list({row["key"]: row for path in paths for row in all_rows(path) if "error" not in row}.values())


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


def by_model(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each base model, that with the most rows first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.get("model", ""), []).append(row)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def methods_of(rows: Iterable[Row]) -> dict[str, Method]:
    """
    Methods by name. What is not trained counts for all settings as one.

    Raises:
        ValueError: If the rows are of several base models.
    """
    models = by_model(rows)
    if len(models) > 1:
        raise ValueError(f"Rows of {', '.join(models)}. Compare methods on one base model.")
    found: dict[str, Method] = {}
    for row in (row for same in models.values() for row in same):
        found.setdefault(row["name"], Method(row["name"])).add(row)
    return found


def cells_of(methods: Iterable[Method]) -> list[Cell]:
    """All cells: suites by name, plenty before little."""
    return sorted({cell for method in methods for cell in method.rows}, key=lambda c: (c[0], c[1] != "plenty", c[1]))
