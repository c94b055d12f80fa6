"""Draws adapters as PNG files: which heads each task uses, and how similar the heads are.

Figures are made without `pyplot`, which leaves a user's back end and open figures alone. The same input gives the same
bytes with the same version of matplotlib; the file contains nothing about the machine.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..files.head_weights import HeadWeights
from ..reading import printable
from .heads import check_similarities, mean_between
from .kinds import color_span, evenly_spaced, group_layers


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Web pages show figures about 900 pixels wide, where text of 8 points is 12 pixels high.
_WIDTH = 8.0  # inches
_DPI = 187.5  # 1500 pixels
_COLORS = "RdBu_r"
_LONGEST_NAME = 26
_MARGIN = 0.62  # inches above, between and below panels, for titles and labels
# More would make pages of many screens that take minutes to draw.
_MAX_TASKS, _MAX_KINDS = 60, 12
_MAX_BORDERS = 200  # lines between layers, or there would be nothing but lines
_SMALLEST_RANGE = 0.1  # of the axis of cosines, or noise would fill the panel


def plot_routing(head_weights: HeadWeights, path: str | Path) -> Path:
    """
    Draw the mean head weights: one panel per kind of layer, one row per task, one column per head of each layer, from
    the first layer to the last. White is an equal share, red more, blue less. The color bar ends in arrows where a few
    weights lie outside its range.

    Of more than 60 tasks, 60 are shown, evenly spaced in their order; of more than 12 kinds of layers, the first 12 by
    name. The figure says so.

    Args:
        head_weights ([`HeadWeights`]): What to draw.
        path (`str` or `Path`): The PNG file to write.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: If there are no tasks or layers.
        ImportError: If matplotlib is not installed.
    """
    if not head_weights.weights or not head_weights.layers:
        raise ValueError("There are no head weights to draw. Measure at least one task with `measure_head_weights`.")
    tasks = evenly_spaced(list(head_weights.weights), _MAX_TASKS)
    table = torch.stack([head_weights.weights[task].detach().float().cpu() for task in tasks])  # [tasks, L, N]
    every_kind = group_layers(head_weights.layers)
    groups = dict(list(every_kind.items())[:_MAX_KINDS])
    heads = f"within it heads 1 to {table.shape[-1]}"
    left_out = [
        f"{shown} of {total:,} {what}"
        for what, shown, total in (
            ("tasks, evenly spaced in their order", len(tasks), len(head_weights.weights)),
            ("kinds of layers", len(groups), len(every_kind)),
        )
        if shown < total
    ]

    # Sizes follow the number of tasks, the margin their names.
    row = min(0.18, max(0.08, 3.2 / len(tasks)))  # inches
    size = min(9.0, row * 72 * 0.8)  # points
    left = max(len(_shorten(task)) for task in tasks) * size * 0.62 / 72 + 0.15
    # A single panel needs room for the label of the color bar.
    heights = [max(0.5 if len(groups) > 1 else 1.4, row * len(tasks))] * len(groups)

    with _figure(heights, left, right=1.4, notes=len(left_out)) as (figure, panels):
        norm, clipped = _weight_norm(table)
        for axes, (kind, members) in zip(panels, groups.items(), strict=True):
            image = _draw_weights(axes, table[:, [index for _, index in members]], norm)
            # A task may be called "$a$", which is no formula.
            axes.set_yticks(range(len(tasks)), [_shorten(task) for task in tasks], fontsize=size, parse_math=False)
            axes.tick_params(axis="y", length=0)
            _label_layers(axes, [depth for depth, _ in members], table.shape[-1])
            axes.set_title(_shorten(kind), fontsize=10, loc="left", parse_math=False)
        axes.set_xlabel("\n".join([f"layer; {heads}", *left_out]), fontsize=9)
        _add_color_bar(figure, image, panels, clipped)
        return _save(figure, path)


def plot_head_similarity(similarities: Mapping[str, torch.Tensor], path: str | Path) -> Path:
    """
    Draw how similar the heads are: on the left the mean over layers, on the right the mean over heads by layer.

    Of more than 12 kinds of layers, the right part shows the first 12 by name, and its legend says so.

    Args:
        similarities (`Mapping[str, torch.Tensor]`): Cosines `[N, N]` by layer, from [`head_similarities`].
        path (`str` or `Path`): The PNG file to write.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: If there are no layers, or only one head.
        ImportError: If matplotlib is not installed.
    """
    check_similarities(similarities)

    mean = torch.stack(list(similarities.values())).mean(0)
    side = 1.8 if len(mean) <= 4 else 2.4  # inches
    longest = max(len(line) for label, _ in _shown_kinds(similarities) for line in label.splitlines())
    with _figure([2.4], left=0.55, right=0.55 + longest * 8 * 0.6 / 72) as (figure, (axes,)):
        left, bottom, width, height = axes.get_position().bounds
        share = side / 2.4
        axes.set_position((left, bottom + (1 - share) * height, side / _WIDTH, share * height))
        _draw_cosines(axes, mean)
        start = (side + 0.7) / _WIDTH  # leaves room for the labels of the axis
        _draw_by_depth(figure.add_axes((left + start, bottom, width - start, height)), similarities)
        return _save(figure, path)


def _shown_kinds(layers: Iterable[str]) -> list[tuple[str, list[tuple[str, int]]]]:
    """Labels and members of the kinds of layers that a legend has room for; see [`group_layers`]."""
    groups = group_layers(list(layers))
    shown = [(_shorten(kind), members) for kind, members in list(groups.items())[:_MAX_KINDS]]
    if len(groups) > len(shown):
        label, members = shown[-1]
        shown[-1] = (f"{label}\n({len(shown)} of {len(groups):,} kinds)", members)
    return shown


@contextmanager
def _figure(
    heights: Sequence[float], left: float, right: float, notes: int = 0
) -> Generator[tuple[Figure, list[Axes]], None, None]:
    """
    A figure with panels one below the other, with matplotlib's default settings.

    Args:
        heights (`Sequence[float]`): Heights of the panels, in inches.
        left (`float`), right (`float`): Margins, in inches.
        notes (`int`, *optional*, defaults to 0): Lines of text below the label of the last panel.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Figures need matplotlib, which is not installed. Run `pip install rlora-trl[analysis]`."
        ) from error

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # `rc_context` restores the user's style
        total = sum(heights) + _MARGIN * (len(heights) + 0.6) + 0.15 * notes
        figure = Figure(figsize=(_WIDTH, total), dpi=_DPI)
        panels, top = [], total - 0.6 * _MARGIN
        for height in heights:
            box = (left / _WIDTH, (top - height) / total, 1 - (left + right) / _WIDTH, height / total)
            panels.append(figure.add_axes(box))
            top -= height + _MARGIN
        yield figure, panels


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})
    return path


def _weight_norm(table: torch.Tensor) -> tuple[Any, bool]:
    """Colors by the distance from an equal share, the same above and below it, and whether weights lie outside."""
    from matplotlib.colors import Normalize

    equal = 1.0 / table.shape[-1]
    span, clipped = color_span(table)
    return Normalize(vmin=equal - span, vmax=equal + span), clipped


def _draw_weights(axes: Axes, table: torch.Tensor, norm: Any) -> Any:
    """Weights `[tasks, layers, N]` as an image of `[tasks, layers * N]`, with a line between layers."""
    tasks, layers, heads = table.shape
    image = axes.imshow(
        table.reshape(tasks, layers * heads).numpy(), aspect="auto", cmap=_COLORS, norm=norm, interpolation="nearest"
    )
    borders = [layer * heads - 0.5 for layer in range(1, layers if layers <= _MAX_BORDERS else 1)]
    axes.vlines(borders, -0.5, tasks - 0.5, color="black", linewidth=0.4)
    return image


def _label_layers(axes: Axes, depths: Sequence[str], heads: int) -> None:
    starts = [i for i, depth in enumerate(depths) if i == 0 or depth != depths[i - 1]]
    shown = starts[:: -(-len(starts) // 24)]
    axes.set_xticks([(i + 0.5) * heads - 0.5 for i in shown], [depths[i] for i in shown], fontsize=7.5)
    axes.tick_params(axis="x", length=2)


def _add_color_bar(figure: Figure, image: Any, panels: Sequence[Axes], clipped: bool) -> None:
    top, bottom = panels[0].get_position().y1, panels[-1].get_position().y0
    height = min(2.6 / figure.get_figheight(), top - bottom)
    axes = figure.add_axes((1 - 1.25 / _WIDTH, top - height, 0.018, height))

    # Colors reach as far below an equal share as above it, but weights end at 0.
    low, equal, high = max(0.0, image.norm.vmin), (image.norm.vmin + image.norm.vmax) / 2, image.norm.vmax
    extend = ("both" if low > 0 else "max") if clipped else "neither"
    bar = figure.colorbar(image, cax=axes, extend=extend, ticks=[low, equal, high], format="%.3g")
    axes.set_ylim(low, high)
    axes.tick_params(labelsize=8)
    bar.set_label(f"mean weight (equal share: {equal:.3g})", fontsize=8)


def _draw_cosines(axes: Axes, mean: torch.Tensor) -> None:
    heads = mean.shape[0]
    axes.imshow(mean.numpy(), cmap=_COLORS, vmin=-1.0, vmax=1.0, interpolation="nearest")
    shown = range(0, heads, 1 if heads <= 12 else -(-heads // 8))
    axes.set_xticks(shown, [str(i + 1) for i in shown], fontsize=8)
    axes.set_yticks(shown, [str(i + 1) for i in shown], fontsize=8)
    axes.set_xlabel("head", fontsize=9)
    axes.set_ylabel("head", fontsize=9)
    axes.set_title("cosine between heads,\nmean over layers", fontsize=9)
    if heads > 10:
        return
    for i in range(heads):
        for j in range(heads):
            value = float(mean[i, j])
            text = f"{value:.2f}".replace("-0.00", "0.00")
            color = "white" if abs(value) > 0.6 else "black"
            axes.text(j, i, text, ha="center", va="center", color=color, fontsize=min(9.0, 60.0 / heads))


def _draw_by_depth(axes: Axes, similarities: Mapping[str, torch.Tensor]) -> None:
    from matplotlib.ticker import MaxNLocator

    means = [float(mean_between(matrix)) for matrix in similarities.values()]
    drawn = []
    for label, members in _shown_kinds(similarities):
        by_depth: dict[int, list[float]] = {}
        for depth, index in members:
            by_depth.setdefault(int(depth or 0), []).append(means[index])
        values = [sum(entries) / len(entries) for entries in by_depth.values()]
        drawn += values
        axes.plot(list(by_depth), values, marker="o", markersize=3, linewidth=1.2, label=label)

    middle, span = (min(drawn) + max(drawn)) / 2, max(_SMALLEST_RANGE, 1.2 * (max(drawn) - min(drawn)))
    axes.axhline(0.0, color="0.7", linewidth=0.8)
    axes.set_ylim(middle - span / 2, middle + span / 2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=8)
    axes.set_xlabel("layer", fontsize=9)
    axes.set_ylabel("cosine", fontsize=9)
    axes.set_title("mean between different heads, by layer", fontsize=9)

    legend = axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for text in legend.get_texts():
        text.set_parse_math(False)


def _shorten(name: str) -> str:
    """A printable name on one line, long ones without their middle: names of tasks often differ at the end."""
    line = printable(" ".join(name.split()))
    tail = _LONGEST_NAME // 2
    return line if len(line) <= _LONGEST_NAME else f"{line[: _LONGEST_NAME - tail - 1]}…{line[-tail:]}"
