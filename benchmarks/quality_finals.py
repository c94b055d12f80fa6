"""Runs of `quality.py --finals`: methods at the settings that their rows chose, on other seeds."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from quality_intervals import chosen
from quality_rows import Row
from quality_runs import Run
from results_lines import TUNING_SEEDS, Study


FINAL_SEEDS = (3, 4, 5, 6, 7)


def finals(rows: Sequence[Row], labels: Iterable[str], seeds: Sequence[int] = FINAL_SEEDS) -> list[Run]:
    """
    Each method at its best setting in each cell that it has rows of.

    Args:
        rows (`Sequence[dict]`): Rows of one base model, with the seeds that settings are chosen on.
        labels (`Iterable[str]`): The methods.
        seeds (`Sequence[int]`, *optional*, defaults to 3 to 7): Of the new runs.

    Raises:
        ValueError: If a method has no rows on which to choose.
    """
    methods = Study(rows).methods if rows else {}
    found = []
    for label in labels:
        settings = {}
        if label in methods:
            settings = chosen(methods[label], list(methods[label].rows), TUNING_SEEDS)
        if not settings:
            raise ValueError(
                f"`--finals` needs rows of {label!r} with a seed of {TUNING_SEEDS} in `--out`, to choose its "
                "settings. Run its learning rates first (`--methods`, or a plan)."
            )
        for cell, setting in settings.items():
            row = next(iter(methods[label].runs(cell, setting)))
            found += [replace(Run.from_dict(row), seed=seed) for seed in seeds]
    return found
