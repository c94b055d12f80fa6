"""Figures of docs/results.md, from the rows of `quality.py`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quality_intervals import Estimate
from quality_report import REFERENCE
from quality_rows import Cell, Method, Row
from results_lines import (
    PAPER_SETTING,
    TUNING_SEEDS,
    Line,
    Study,
    idea_lines,
    is_lora,
    lines_of,
    seeds_text,
    shared_seeds,
    with_seeds,
)
from results_tables import FORMS, accuracy_lines


# Color and marker of each line, at most five; the default is the darkest.
CURVES = {
    REFERENCE: ("#4d4d4d", "o"),
    "R-LoRA, no dropout": ("#08519c", "D"),
    "R-LoRA": ("#6baed6", "s"),
    "ranks as heads": ("#e6550d", "^"),
}
LOWEST = 8.0  # points below the best of a panel that are shown
_COLORS = {"ours": "#08519c", "lora": "#9a9a9a"}


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    _pyplot().close(figure)


def curve(method: Method, cell: Cell) -> dict[float, float]:
    """Accuracy by learning rate with the usual batch, mean over the seeds that all of these rates have."""
    settings = [setting for setting in method.settings(cell) if setting[1] == PAPER_SETTING[1] and setting[0] > 0]
    seeds = shared_seeds(*((method, {cell: setting}) for setting in settings))
    means = {setting[0]: method.mean(cell, setting, seeds) for setting in settings}
    return {rate: mean for rate, mean in means.items() if mean is not None}


def draw_learning_rates(studies: Sequence[Study], path: Path) -> None:
    """A panel for each model and cell; nothing without rows. Accuracies far below the best are cut off."""
    found = [(study, cell, _curves(study, cell)) for study in studies for cell in study.cells]
    found = [panel for panel in found if panel[2]]
    if not found:
        return
    plt = _pyplot()
    columns = min(2, len(found))
    lines = -(-len(found) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 0.7 + 2.5 * lines), squeeze=False)
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    handles: dict[str, Any] = {}
    for axis, (study, cell, curves) in zip(axes.flat, found, strict=False):
        handles |= _draw_curves(axis, curves)
        axis.set_title(f"{study.model}: {', '.join(cell)}", fontsize=9.5)
    ordered = [name for name in CURVES if name in handles]
    figure.legend(
        [handles[n] for n in ordered], ordered, loc="upper center", ncols=len(ordered), fontsize=8.5, frameon=False
    )
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.13 / lines))
    _save(figure, path)


def _curves(study: Study, cell: Cell) -> dict[str, dict[float, float]]:
    """The curves of a panel that have points."""
    found = {method.name: curve(method, cell) for method in study.named(CURVES)}
    return {name: points for name, points in found.items() if points}


def _draw_curves(axis: Any, curves: dict[str, dict[float, float]]) -> dict[str, Any]:
    """A panel of [`draw_learning_rates`]; its lines by method."""
    best = max(value for points in curves.values() for value in points.values())
    lowest = min(value for points in curves.values() for value in points.values())
    handles = {}
    for name, points in curves.items():
        color, marker = CURVES[name]
        (handles[name],) = axis.plot(*zip(*sorted(points.items()), strict=True), color=color, marker=marker, ms=4.5)
    rates = sorted({rate for points in curves.values() for rate in points})
    axis.set_xscale("log")
    axis.set_xticks(rates, [f"{rate:g}" for rate in rates], fontsize=8.5)
    axis.minorticks_off()
    axis.tick_params(axis="y", labelsize=8.5)
    axis.set_ylim(max(lowest, best - LOWEST) - 0.4, best + 0.4)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("learning rate", fontsize=9)
    axis.set_ylabel("mean accuracy, %", fontsize=9)
    return handles


def _lay_out_differences(axis: Any, label: str) -> None:
    """The axes of a figure whose horizontal axis is a difference."""
    axis.axvline(0, color="black", linewidth=0.8)
    axis.grid(axis="x", color="#e0e0e0", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(axis="x", labelsize=8.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel(label, fontsize=9)


def draw_accuracy(studies: Sequence[Study], path: Path) -> None:
    """R-LoRA, with and without head dropout, beside LoRA in each cell, all tuned, by model; nothing without rows."""
    found = [(study, accuracy_lines(study)) for study in studies]
    found = [(study, lines) for study, lines in found if lines]
    if not found:
        return
    plt = _pyplot()
    heights = [len(study.cells) + 1 for study, _ in found]
    figure, axes = plt.subplots(
        len(found),
        figsize=(7.0, 1.0 + 0.5 * len(found) + 0.36 * sum(heights)),
        squeeze=False,
        sharex=True,
        height_ratios=heights,
    )
    for axis, (study, lines) in zip(axes[:, 0], found, strict=True):
        _draw_accuracy_of(axis, study, lines)
    axes[-1, 0].set_xlabel(f"points above tuned {REFERENCE}, with 95 % intervals", fontsize=9)
    axes[0, 0].legend(fontsize=8.5, loc="lower right", bbox_to_anchor=(1, 1.08), ncols=2, frameon=False)
    figure.tight_layout()
    _save(figure, path)


def _draw_accuracy_of(axis: Any, study: Study, lines: Sequence[Line]) -> None:
    """A panel of [`draw_accuracy`]: the cells of one model, and their mean."""
    (reference,) = lines_of(study, [REFERENCE], REFERENCE, tuned=True, cells=study.cells)
    reference = replace(reference, seeds=lines[0].seeds)  # those of the points beside it
    # The README has it, too: a reader should not need the page to know what a row is.
    names = [f"{', '.join(cell)} (LoRA {reference.accuracy(cell):.1f} %)" for cell in study.cells]
    for place, line in enumerate(lines):
        color, marker = CURVES[line.method.name]
        estimates = [*(line.each[cell] for cell in study.cells), line.mean]
        for row, estimate in enumerate(reversed(estimates)):
            if estimate is not None:
                height = row + 0.13 * (len(lines) - 1 - 2 * place)
                axis.plot([estimate.low, estimate.high], [height, height], color=color, linewidth=1.6)
                label = FORMS[line.method.name] if row == 0 else None
                axis.plot(estimate.value, height, marker, color=color, ms=5, label=label)
    axis.axhline(0.5, color="#bbbbbb", linewidth=0.6)
    axis.set_yticks(range(len(names) + 1), [f"mean of {len(names)}", *reversed(names)], fontsize=9)
    axis.set_title(f"{study.model}, {with_seeds(lines[0].seeds)}", fontsize=9.5, loc="left")
    _lay_out_differences(axis, "")


def draw_ideas(study: Study, path: Path) -> None:
    """The difference of each idea from tuned LoRA with its interval, the best first; nothing without rows."""
    lines: list[tuple[Line, Estimate]] = [(line, line.mean) for line in idea_lines(study) if line.mean is not None]
    if not lines:
        return
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(8.2, 1.2 + 0.21 * len(lines)))
    shown: dict[str, Any] = {}
    for place, (line, mean) in enumerate(reversed(lines)):
        kind = "lora" if is_lora(line.method.name) else "ours"
        axis.plot([mean.low, mean.high], [place, place], color=_COLORS[kind], linewidth=1.4)
        (shown[kind],) = axis.plot(mean.value, place, "o", color=_COLORS[kind], ms=5)
    axis.set_yticks(range(len(lines)), [line.method.name for line, _ in reversed(lines)], fontsize=8.5)
    for label in axis.get_yticklabels():
        if label.get_text() in FORMS:
            label.set_weight("bold")
    axis.set_title(f"{study.model}, screening", fontsize=9.5, loc="left")
    axis.set_ylim(-0.8, len(lines) - 0.2)
    cells = len(lines[0][0].settings)
    where = f"mean over {cells} cells, seeds of {seeds_text(TUNING_SEEDS)}"
    _lay_out_differences(axis, f"points above {REFERENCE}, each tuned in each cell: {where}")
    names = {"ours": "forms of R-LoRA", "lora": "forms of LoRA"}
    kinds = [kind for kind in names if kind in shown]
    # Above the axes, as intervals may be anywhere within.
    axis.legend(
        [shown[kind] for kind in kinds],
        [names[kind] for kind in kinds],
        fontsize=8.5,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=2,
        frameon=False,
    )
    figure.tight_layout()
    _save(figure, path)


# Methods of the figure of heads: what they are called there, color and line.
HEADS = {
    "HydraLoRA": ("HydraLoRA: from zero, random router, dropout on x", "#e6550d", "-"),
    "rlora_trl, zero B": ("from zero, head dropout 0.2", "#fdae6b", "--"),
    "rlora_trl, no dropout": ("Table 1, no dropout (the default)", "#6baed6", "--"),
    "rlora_trl": ("Table 1, head dropout 0.2 (the paper's R-LoRA)", "#08519c", "-"),
}


def draw_heads(rows: Sequence[Row], path: Path) -> None:
    """The mean cosine between heads by layer, a panel for each projection; of rows with `head_similarities`."""
    drawn = {row["name"]: row["head_similarities"] for row in rows if row["name"] in HEADS}
    if not drawn:
        return
    names = list(next(iter(drawn.values())))
    figure, axes = _pyplot().subplots(
        1, len(names), figsize=(9, 3.6), sharey=True, layout="constrained", squeeze=False
    )
    for axis, name in zip(axes[0], names, strict=True):
        for label, (text, color, style) in HEADS.items():
            if label in drawn:
                axis.plot(drawn[label][name], style, color=color, label=text)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("layer")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("mean cosine between heads")
    axes[0][0].set_ylim(-0.05, 1.05)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    _save(figure, path)
