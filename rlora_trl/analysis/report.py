"""
An HTML page about an adapter: which heads each task uses, how similar the heads are, and how much is changed.

The page is one file without scripts and without anything from elsewhere, which its content security policy states: it
can be mailed, archived and opened on a phone, in light and in dark. Names of tasks and layers may be foreign; the
template escapes all of them. Drawings are SVG without text, stretched to the width of the page; their labels are HTML,
which keeps its size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from .._version import __version__
from ..files.config import read_config
from ..files.head_weights import HeadWeights
from ..files.layout import CONFIG_NAME
from ..files.record import AdapterRecord
from ..reading import printable
from ..tuner.config import RLoraConfig
from ..writing import write_text
from .heads import head_similarities, mean_between
from .history import TrainingHistory, read_history
from .kinds import color_span, evenly_spaced, group_layers
from .ranks import effective_ranks


# Cells of all routing maps together; each takes about 100 bytes of the page.
_MAX_CELLS = 40_000
_MAX_TASKS, _MAX_KINDS, _MAX_LAYERS = 60, 12, 500
_LABELS = 8  # of an axis of layers, few enough for a phone


@dataclass
class Line:
    """A line of a chart: the points are ratios in `[0, 1]` of the width and the height from the top."""

    label: str
    points: str


@dataclass
class Chart:
    """A chart of lines; labels of the x axis stand at ratios of the width."""

    lines: list[Line]
    low: str
    high: str
    x_labels: list[tuple[float, str]]
    x_title: str


@dataclass
class Cell:
    """A weight of a map: what is shown when the pointer rests on it, its side of an equal share, and its strength."""

    title: str
    side: str
    strength: str


@dataclass
class RoutingMap:
    """The head weights of one kind of layers: a row of cells for each task."""

    kind: str
    rows: list[tuple[str, list[Cell]]]
    borders: str
    x_labels: list[tuple[float, str]]
    means: list[tuple[str, list[str]]]


@dataclass
class Facts:
    """What the page shows."""

    title: str
    subtitle: str
    tiles: list[tuple[str, str, str]]
    tasks: list[list[str]]
    maps: list[RoutingMap] = field(default_factory=list)
    scale: tuple[str, str, str] = ("", "", "")
    heads: int = 0
    left_out: list[str] = field(default_factory=list)
    cosines: list[list[tuple[str, str]]] = field(default_factory=list)
    similarity: Chart | None = None
    history: Chart | None = None
    history_ends: tuple[str, str, str] = ("", "", "")
    ranks: Chart | None = None
    rank_limit: int = 0
    layers: list[list[str]] = field(default_factory=list)
    version: str = __version__


def write_report(
    folder: str | Path, path: str | Path, *, head_weights: HeadWeights | None = None, name: str | None = None
) -> Path:
    """
    Write an HTML page about an adapter, as one file that loads nothing from elsewhere.

    It shows the tasks with their scores, the head weights of each task by layer, the similarity of the heads by layer
    and over the steps of training, and the effective rank of the delta by layer. What is unknown is left out: weights
    that were not measured, and the course of training without `trainer_state.json` (see [`read_history`]).

    Args:
        folder (`str` or `Path`): Folder of the adapter, as it was saved or pulled.
        path (`str` or `Path`): The HTML file to write, in an existing folder.
        head_weights ([`HeadWeights`], *optional*): Head weights to show. Defaults to those that training recorded.
        name (`str`, *optional*): Title of the page. Defaults to the name of the folder.

    Returns:
        `Path`: The file.

    Raises:
        AdapterCheckError: If the configuration is not that of an R-LoRA adapter.
        ValueError: If the record or the tensors can't be read, or the head weights are of another number of heads.
        FileNotFoundError: If the folder has no adapter.
        OSError: If the file can't be written.
    """
    folder = Path(folder)
    record = AdapterRecord.load(folder)
    weights = head_weights or (record.mixtures if record else None)
    facts = collect_facts(folder, read_config(folder / CONFIG_NAME), record, weights, name)
    environment = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    write_text(path, environment.get_template("report_template.html").render(vars(facts)))
    return Path(path)


def collect_facts(
    folder: Path,
    config: RLoraConfig,
    record: AdapterRecord | None,
    weights: HeadWeights | None,
    name: str | None = None,
) -> Facts:
    """What the page of [`write_report`] shows."""
    weights = weights if weights is not None and weights.weights and weights.layers else None
    measured = next(iter(weights.weights.values())).shape[-1] if weights else config.num_heads
    if measured != config.num_heads:
        raise ValueError(
            f"The head weights are of {measured} heads, and the adapter has {config.num_heads}. Measure them on this "
            "adapter with `measure_head_weights`, or `rlora analyze --data`."
        )
    facts = Facts(
        title=_text(name or folder.resolve().name),
        subtitle=_subtitle(config, record),
        tiles=[],
        tasks=_task_rows(record),
        heads=config.num_heads,
    )
    similarities = head_similarities(folder) if config.num_heads > 1 else {}
    ranks = effective_ranks(folder, weights.mean() if weights else None)

    # Each part, with its tile at the top.
    if weights is not None:
        _add_maps(facts, weights)
    if similarities:
        _add_similarities(facts, similarities, read_history(folder))
    if ranks:
        _add_ranks(facts, ranks)
    facts.layers = _layer_rows(similarities, ranks)
    return facts


def _text(value: Any) -> str:
    """A text of unknown origin on one line. The template escapes what HTML would read."""
    return printable(" ".join(str(value).split()))


def _subtitle(config: RLoraConfig, record: AdapterRecord | None) -> str:
    base = record.base_model if record else None
    base = base or config.base_model_name_or_path
    parts = [f"on {_text(Path(base).name if Path(base).is_absolute() else base)}"] if base else []
    parts += [f"{config.num_heads} heads of rank {config.r}", f"router {_text(config.router)}"]
    return ", ".join(parts)


def _task_rows(record: AdapterRecord | None) -> list[list[str]]:
    """Name, rows, share and accuracy of each task, without and with the adapter."""
    rows = []
    for task in (record.tasks if record else [])[:_MAX_TASKS]:
        before, after = (task.metrics.get(metric) for metric in ("base_accuracy", "accuracy"))
        rows.append(
            [
                _text(task.name),
                "" if task.rows is None else f"{task.rows:,}",
                "" if task.share is None else f"{100 * task.share:.1f}",
                "" if before is None else f"{100 * before:.1f}",
                "" if after is None else f"{100 * after:.1f}",
            ]
        )
    return rows


def _x_labels(names: Sequence[str], most: int = _LABELS) -> list[tuple[float, str]]:
    """Some of the names, evenly spaced, at the middles of their places as ratios of the width."""
    step = -(-len(names) // most)
    return [((index + 0.5) / len(names), names[index]) for index in range(0, len(names), max(1, step))]


# Head weights


def _add_maps(facts: Facts, weights: HeadWeights) -> None:
    groups = group_layers(weights.layers)
    kinds = dict(list(groups.items())[:_MAX_KINDS])
    columns = sum(map(len, kinds.values())) * facts.heads
    tasks = evenly_spaced(list(weights.weights), max(2, min(_MAX_TASKS, _MAX_CELLS // max(columns, 1))))
    table = torch.stack([weights.weights[task].float() for task in tasks])  # [tasks, L, N]
    for what, shown, total in (
        ("tasks, evenly spaced in their order", len(tasks), len(weights.weights)),
        ("kinds of layers", len(kinds), len(groups)),
    ):
        if shown < total:
            facts.left_out.append(f"{shown} of {total:,} {what}")

    equal = 1.0 / table.shape[-1]
    span, clipped = color_span(table)
    low = max(0.0, equal - span)
    more, less = ("≥ " if clipped else ""), ("≤ " if clipped and low > 0 else "")
    facts.scale = (f"{less}{low:.2f}", f"{equal:.2f}", f"{more}{equal + span:.2f}")
    for kind, members in kinds.items():
        facts.maps.append(_routing_map(kind, members[:_MAX_LAYERS], weights.layers, tasks, table, equal, span))

    # The strongest preference.
    task, layer, head = torch.unravel_index(table.argmax(), table.shape)
    facts.tiles.append(
        (
            f"{float(table.max()):.2f}",
            "largest head weight",
            f"head {int(head) + 1} of {_text(weights.layers[int(layer)])} for {_text(tasks[int(task)])}; an equal "
            f"share is {equal:.2f}",
        )
    )


def _routing_map(
    kind: str,
    members: Sequence[tuple[str, int]],
    layers: Sequence[str],
    tasks: Sequence[str],
    table: torch.Tensor,
    equal: float,
    span: float,
) -> RoutingMap:
    """
    The map of one kind of layers.

    Args:
        members (`Sequence[tuple[str, int]]`): Depth and row in `table` of each layer.
        table (`torch.Tensor` of shape `[tasks, L, N]`): Head weights.
        equal (`float`), span (`float`): An equal share, and the distance from it that has the strongest color.
    """
    heads = table.shape[-1]
    rows, means = [], []
    for place, task in enumerate(tasks):
        cells = []
        for _, layer in members:
            for head, weight in enumerate(table[place, layer].tolist(), start=1):
                title = f"{_text(task)}, {_text(layers[layer])}, head {head}: {weight:.3f}"
                cells.append(
                    Cell(title, "m" if weight > equal else "l", f"{min(1.0, abs(weight - equal) / span):.2f}")
                )
        rows.append((_text(task), cells))
        mean = table[place, [layer for _, layer in members]].mean(0).tolist()
        means.append((_text(task), [f"{weight:.3f}" for weight in mean]))
    borders = "".join(f"M{layer * heads} 0v1" for layer in range(1, len(members)))
    return RoutingMap(_text(kind), rows, borders, _x_labels([depth for depth, _ in members]), means)


# Similarity


def _add_similarities(facts: Facts, similarities: Mapping[str, torch.Tensor], history: TrainingHistory | None) -> None:
    mean = torch.stack(list(similarities.values())).mean(0)
    if len(mean) <= 12:  # as many as a phone has room for
        facts.cosines = [
            [(f"{value:.2f}".replace("-0.00", "0.00"), f"{abs(value):.2f}") for value in row] for row in mean.tolist()
        ]
    of_layers = {layer: float(mean_between(matrix)) for layer, matrix in similarities.items()}
    facts.similarity = _chart_by_depth(of_layers)
    overall = sum(of_layers.values()) / len(of_layers)
    facts.tiles.append(
        (f"{overall:.2f}", "mean cosine between heads", "0: nothing in common; 1: copies of each other")
    )

    if history is not None and len(history.steps) > 1:
        steps = history.steps
        points = [(step, value) for step, value in zip(steps, history.similarity, strict=True)]
        facts.history = _chart({"": points}, "step", labels=[(0.0, str(steps[0])), (1.0, str(steps[-1]))])
        facts.history_ends = (f"{steps[-1]:,}", f"{history.similarity[0]:.3f}", f"{history.similarity[-1]:.3f}")


def _add_ranks(facts: Facts, ranks: Mapping[str, tuple[float, int]]) -> None:
    facts.rank_limit = max(limit for _, limit in ranks.values())
    facts.ranks = _chart_by_depth(
        {layer: rank for layer, (rank, _) in ranks.items()}, bounds=(0.0, float(facts.rank_limit))
    )
    mean = sum(rank for rank, _ in ranks.values()) / len(ranks)
    facts.tiles.append(
        (f"{mean:.1f}", "effective rank of the delta", f"mean over layers, of at most {facts.rank_limit}")
    )


def _chart_by_depth(values: Mapping[str, float], bounds: tuple[float, float] | None = None) -> Chart:
    """A line for each kind of layers, over their depth."""
    names = list(values)
    lines: dict[str, list[tuple[float, float]]] = {}
    for kind, members in list(group_layers(names).items())[:_MAX_KINDS]:
        by_depth: dict[int, list[float]] = {}
        for depth, index in members:
            by_depth.setdefault(int(depth or 0), []).append(values[names[index]])
        lines[_text(kind)] = [(depth, sum(entries) / len(entries)) for depth, entries in by_depth.items()]
    return _chart(lines, "layer", bounds=bounds)


def _chart(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    x_title: str,
    *,
    bounds: tuple[float, float] | None = None,
    labels: list[tuple[float, str]] | None = None,
) -> Chart:
    xs = sorted({x for points in lines.values() for x, _ in points})
    ys = [y for points in lines.values() for _, y in points]
    if bounds is None:  # a little air, and no mountains out of noise
        middle, span = (min(ys) + max(ys)) / 2, max(0.05, 1.1 * (max(ys) - min(ys)))
        bounds = (middle - span / 2, middle + span / 2)
    bottom, top = bounds

    def place(x: float, y: float) -> str:
        across = (x - xs[0]) / (xs[-1] - xs[0]) if len(xs) > 1 else 0.5
        return f"{1000 * across:.0f},{1000 * (top - y) / (top - bottom):.0f}"

    if labels is None:
        step = -(-len(xs) // _LABELS)
        width = max(1.0, xs[-1] - xs[0])
        labels = [((x - xs[0]) / width if len(xs) > 1 else 0.5, f"{x:g}") for x in xs[::step]]
    drawn = [Line(label, " ".join(place(x, y) for x, y in sorted(points))) for label, points in lines.items()]
    return Chart(drawn, f"{bottom:.3g}", f"{top:.3g}", labels, x_title)


def _layer_rows(similarities: Mapping[str, torch.Tensor], ranks: Mapping[str, tuple[float, int]]) -> list[list[str]]:
    """Name, mean cosine between heads, and effective rank of each layer."""
    names: Iterable[str] = dict.fromkeys([*similarities, *ranks])
    rows = []
    for layer in list(names)[:_MAX_LAYERS]:
        cosine = f"{float(mean_between(similarities[layer])):.3f}" if layer in similarities else ""
        rank = "{:.2f} of {}".format(*ranks[layer]) if layer in ranks else ""
        rows.append([_text(layer), cosine, rank])
    return rows
