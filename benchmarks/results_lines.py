"""Comparisons of docs/results.md, from the rows of `quality.py`: which settings of a method, on which seeds.

Settings are chosen on some seeds: of the settings that have most of them, the best. Methods are compared on other
seeds where both have these at their settings, and else on the seeds that the settings were chosen on, as far as both
have them, which makes all of them look better than they are.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from quality_intervals import Estimate, at_settings, chosen
from quality_plans import CELLS, IDEA_CELLS, METHODS, TRIED
from quality_report import REFERENCE, setting_text
from quality_rows import Cell, Method, Row, Setting, cells_of, methods_of


TUNING_SEEDS = (0, 1, 2)
PAPER_SETTING: Setting = (2e-4, 32)


class Study:
    """
    What is known of one base model.

    Args:
        rows (`Sequence[dict]`): Its rows.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows, self.methods = rows, methods_of(rows)
        self.cells = [cell for cell in cells_of(self.methods.values()) if cell in CELLS]

    @property
    def model(self) -> str:
        return self.rows[0]["model"]

    def named(self, names: Iterable[str]) -> list[Method]:
        """Those of the methods that have rows."""
        return [self.methods[name] for name in names if name in self.methods]


@dataclass(frozen=True)
class Line:
    """A method beside another: its settings by cell, the seeds that both are compared on, and the differences."""

    method: Method
    settings: dict[Cell, Setting]
    seeds: tuple[int, ...]
    each: dict[Cell, Estimate]
    mean: Estimate | None

    def accuracy(self, cell: Cell) -> float | None:
        return self.method.mean(cell, self.settings[cell], self.seeds) if cell in self.settings else None

    def mean_accuracy(self, cells: Sequence[Cell]) -> float | None:
        """Mean over cells, if there are rows in all."""
        found = [value for cell in cells if (value := self.accuracy(cell)) is not None]
        return statistics.mean(found) if cells and len(found) == len(cells) else None


def shared_seeds(*chosen_settings: tuple[Method, dict[Cell, Setting]]) -> tuple[int, ...]:
    """The seeds that all of these methods have at their settings, in all cells."""
    found = [
        {row["seed"] for row in method.runs(cell, setting)}
        for method, settings in chosen_settings
        for cell, setting in settings.items()
    ]
    return tuple(sorted(set.intersection(*found))) if found else ()


def tuned_line(ours: Method, other: Method, cells: Sequence[Cell], *, one: bool = False) -> Line:
    """Each with its best settings; `one` for all cells, or one for each."""
    mine, theirs = chosen(ours, cells, TUNING_SEEDS, one=one), chosen(other, cells, TUNING_SEEDS)
    theirs = {cell: setting for cell, setting in theirs.items() if cell in mine}
    shared = shared_seeds((ours, mine), (other, theirs))
    seeds = tuple(seed for seed in shared if seed not in TUNING_SEEDS) or shared
    each, mean = at_settings(ours, mine, other, theirs, seeds)
    return Line(ours, mine, seeds, each, mean if len(each) == len(cells) else None)


def gaps(method: Method, cells: Sequence[Cell]) -> list[str]:
    """The chosen settings that have rows of the tuning seed only, of a method that has other seeds elsewhere."""
    seeds = {row["seed"] for cell in cells for setting in method.settings(cell) for row in method.runs(cell, setting)}
    if seeds <= set(TUNING_SEEDS):
        return []
    return [
        f"{method.name}, {', '.join(cell)}: {setting_text(setting)}"
        for cell, setting in chosen(method, cells, TUNING_SEEDS).items()
        if {row["seed"] for row in method.runs(cell, setting)} <= set(TUNING_SEEDS)
    ]


def paper_line(ours: Method, other: Method, cells: Sequence[Cell]) -> Line:
    """Both at the paper's learning rate, on all seeds that they share: nothing is chosen."""
    mine, theirs = paper_settings(ours, cells), paper_settings(other, cells)
    theirs = {cell: setting for cell, setting in theirs.items() if cell in mine}
    seeds = shared_seeds((ours, mine), (other, theirs))
    each, mean = at_settings(ours, mine, other, theirs, seeds)
    return Line(ours, mine, seeds, each, mean if len(each) == len(cells) else None)


def paper_settings(method: Method, cells: Sequence[Cell]) -> dict[Cell, Setting]:
    """The paper's setting in the cells that have it; of a model that is not trained its only one."""
    found = {}
    for cell in cells:
        usable = [setting for setting in method.settings(cell) if setting == PAPER_SETTING or setting[0] == 0.0]
        if usable:
            found[cell] = usable[0]
    return found


def lines_of(study: Study, names: Iterable[str], reference: str, *, tuned: bool, cells: Sequence[Cell]) -> list[Line]:
    """Each of the methods beside the reference, those without rows left out."""
    if reference not in study.methods:
        return []
    make = tuned_line if tuned else paper_line
    lines = [make(method, study.methods[reference], cells) for method in study.named(names)]
    return [line for line in lines if any(line.accuracy(cell) is not None for cell in cells)]


def idea_lines(study: Study) -> list[Line]:
    """All ideas that have rows, the best first, on the seeds that settings are chosen on: few have more."""
    if REFERENCE not in study.methods:
        return []
    reference, cells = study.methods[REFERENCE], [cell for cell in IDEA_CELLS if cell in study.cells]
    best, lines = chosen(reference, cells, TUNING_SEEDS), []
    for method in study.named(name for name in TRIED if name != REFERENCE):
        mine = chosen(method, cells, TUNING_SEEDS)
        theirs = {cell: setting for cell, setting in best.items() if cell in mine}
        seeds = tuple(seed for seed in shared_seeds((method, mine), (reference, theirs)) if seed in TUNING_SEEDS)
        each, mean = at_settings(method, mine, reference, theirs, seeds)
        if each:
            lines.append(Line(method, mine, seeds, each, mean if len(each) == len(cells) else None))
    return sorted(lines, key=lambda line: -line.mean.value if line.mean else float("inf"))


def is_lora(name: str) -> bool:
    """Whether a method is LoRA with something that it usually lacks."""
    return METHODS[name].method == "lab_lora"


def seeds_text(seeds: Sequence[int]) -> str:
    """For example "0", "1-5" or "1, 3"."""
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]}-{seeds[-1]}"
    return ", ".join(map(str, seeds))


def with_seeds(seeds: Sequence[int]) -> str:
    """For sentences: "seed 0" or "seeds 1-5"."""
    return f"seed{'s' * (len(seeds) > 1)} {seeds_text(seeds)}"
