"""A table of adapters by task, from the metadata of their cards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .search import AdapterInfo, show, split_revision


BASE_METRIC = "base_accuracy"  # accuracy of the base model without the adapter


@dataclass(frozen=True)
class Comparison:
    """
    A table of adapters by task.

    Attributes:
        adapters (`tuple[AdapterInfo, ...]`): The columns.
        tasks (`tuple[str, ...]`): The rows: all tasks that at least one of them has the metric for.
        metric (`str`): The metric.
        names (`tuple[str, ...]`): Names of the columns. Defaults to the repositories.
    """

    adapters: tuple[AdapterInfo, ...]
    tasks: tuple[str, ...]
    metric: str = "accuracy"
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.names:
            object.__setattr__(self, "names", tuple(adapter.repo_id for adapter in self.adapters))

    def value(self, task: str, adapter: AdapterInfo) -> float | None:
        """The metric of one adapter for one task, or `None` if its card does not have it."""
        return adapter.metrics.get(task, {}).get(self.metric)

    def gain(self, task: str, adapter: AdapterInfo) -> float | None:
        """Accuracy of one adapter for one task minus that of its base model, or `None` if its card lacks either."""
        value, base = self.value(task, adapter), adapter.metrics.get(task, {}).get(BASE_METRIC)
        return value - base if self.metric == "accuracy" and value is not None and base is not None else None

    @property
    def shared(self) -> tuple[str, ...]:
        """The tasks that all adapters have the metric for."""
        return tuple(t for t in self.tasks if all(self.value(t, adapter) is not None for adapter in self.adapters))

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Values by column, one dictionary for each task, and one for the mean over the tasks that all have."""
        values = {task: [self.value(task, adapter) for adapter in self.adapters] for task in self.tasks}
        rows = [{"task": task, **self._by_name(values[task])} for task in self.tasks]
        if shared := self.shared:
            label = "mean" if shared == self.tasks else f"mean of {len(shared)} shared"
            means = self._by_name(
                [sum(adapter.metrics[task][self.metric] for task in shared) / len(shared) for adapter in self.adapters]
            )
            rows.append({"task": label, **means})
        return rows

    @property
    def cells(self) -> list[list[str]]:
        """The rows as text, accuracies followed by the gain over the base model in points where cards have it."""
        cells = [[task, *(self._cell(task, adapter) for adapter in self.adapters)] for task in self.tasks]
        for row in self.rows[len(self.tasks) :]:  # the mean
            cells.append([row["task"], *(format_metric(self.metric, row[name]) for name in self.names)])
        return cells

    def _cell(self, task: str, adapter: AdapterInfo) -> str:
        text, gain = format_metric(self.metric, self.value(task, adapter)), self.gain(task, adapter)
        return text if gain is None else f"{text} ({100 * gain:+.1f})"

    def _by_name(self, values: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(self.names, values, strict=True))

    def to_markdown(self) -> str:
        """The table as Markdown, ratios as percentages."""
        head = [[self.metric, *self.names], ["---"] * (1 + len(self.names))]
        return "\n".join(f"| {' | '.join(map(_escape, cells))} |" for cells in head + self.cells)

    __str__ = to_markdown

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON values."""
        bases = self._by_name([adapter.base_model for adapter in self.adapters])
        gains = [
            {"task": task, **self._by_name([self.gain(task, adapter) for adapter in self.adapters])}
            for task in self.tasks
        ]
        return {"metric": self.metric, "base_models": bases, "rows": self.rows, "gains": gains}


def _escape(text: str) -> str:
    """Text from a card as one cell of a Markdown table."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")


def format_metric(metric: str, value: float | None) -> str:
    """A metric as text: a ratio as a percentage, "-" for `None`."""
    if value is None:
        return "-"
    # Values above 1 are percentages that were written by hand.
    is_ratio = metric in ("accuracy", BASE_METRIC, "f1", "exact_match") and 0 <= value <= 1
    if is_ratio:
        return f"{100 * value:.1f}%"
    return f"{value:.4f}" if abs(value) < 1e9 else f"{value:.4g}"


def compare(repo_ids: Sequence[str], *, metric: str = "accuracy", token: str | bool | None = None) -> Comparison:
    """
    Compare published adapters by task, from the metadata of their cards alone.

    The values are those that their authors measured, perhaps on different data.

    Args:
        repo_ids (`Sequence[str]`): Repositories; `"user/name@revision"` names a revision.
        metric (`str`, *optional*, defaults to `"accuracy"`): The metric to compare.
        token (`str` or `bool`, *optional*): As in `huggingface_hub.model_info`.

    Raises:
        ValueError: If there is nothing to compare, or a name is not that of a repository, such as a folder.
        AdapterCheckError: If a card can't be read.
        HfHubHTTPError: If a repository does not exist or may not be read.
    """
    if isinstance(repo_ids, str) or not repo_ids:
        raise ValueError(f"`compare` needs a list of repositories, got {repo_ids!r}.")
    names = tuple(dict.fromkeys(repo_ids))
    adapters = []
    for repo_id, revision in map(split_revision, names):
        adapters.append(show(repo_id, revision=revision, token=token))

    tasks = dict.fromkeys(t for adapter in adapters for t, values in adapter.metrics.items() if metric in values)
    if not tasks:
        metrics = sorted({name for adapter in adapters for values in adapter.metrics.values() for name in values})
        raise ValueError(
            f"None of the cards of {', '.join(repo_ids)} has `{metric}` for a task. They have "
            f"{', '.join(metrics) or 'no metrics'}. Name one of these in `metric`."
        )
    return Comparison(tuple(adapters), tuple(tasks), metric, names)
