"""Adapters side by side, by task, from what their cards say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .names import split_revision
from .search import AdapterInfo, show


BASE_METRIC = "base_accuracy"  # accuracy of the base model without the adapter


@dataclass(frozen=True)
class Comparison:
    """
    A table of adapters by task.

    Attributes:
        adapters (`tuple[AdapterInfo, ...]`): The columns.
        tasks (`tuple[str, ...]`): The rows: all tasks that one of them has the metric of.
        metric (`str`): What is compared.
        names (`tuple[str, ...]`): What the columns are called. Defaults to the repositories.
    """

    adapters: tuple[AdapterInfo, ...]
    tasks: tuple[str, ...]
    metric: str = "accuracy"
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.names:
            object.__setattr__(self, "names", tuple(adapter.repo_id for adapter in self.adapters))

    def value(self, task: str, adapter: AdapterInfo) -> float | None:
        """The metric of one adapter for one task, if its card has it."""
        return adapter.metrics.get(task, {}).get(self.metric)

    def gain(self, task: str, adapter: AdapterInfo) -> float | None:
        """Accuracy of one adapter for one task less that of its base model, if its card has both."""
        value, base = self.value(task, adapter), adapter.metrics.get(task, {}).get(BASE_METRIC)
        return value - base if self.metric == "accuracy" and value is not None and base is not None else None

    @property
    def shared(self) -> tuple[str, ...]:
        """The tasks that all adapters have the metric of."""
        return tuple(t for t in self.tasks if all(self.value(t, adapter) is not None for adapter in self.adapters))

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dictionary for each task, and the mean over the tasks that all have; values by column."""
        rows = [{"task": t, **{name: self.value(t, a) for name, a in self._columns()}} for t in self.tasks]
        if self.shared:
            label = "mean" if self.shared == self.tasks else f"mean of {len(self.shared)} shared"
            rows.append({"task": label, **{name: self._mean(a) for name, a in self._columns()}})
        return rows

    @property
    def cells(self) -> list[list[str]]:
        """The rows as text for people: gains over the base model stand behind the accuracies where they are known."""
        shown = []
        for place, row in enumerate(self.rows):
            # The mean, which is the last row, is of tasks with gains and of tasks without.
            task = self.tasks[place] if place < len(self.tasks) else None
            cells = [format_metric(self.metric, row[name]) for name in self.names]
            gains = [None if task is None else self.gain(task, adapter) for adapter in self.adapters]
            told = [
                cell if gain is None else f"{cell} ({100 * gain:+.1f})"
                for cell, gain in zip(cells, gains, strict=True)
            ]
            shown.append([row["task"], *told])
        return shown

    def _columns(self) -> Iterator[tuple[str, AdapterInfo]]:
        return zip(self.names, self.adapters, strict=True)

    def _mean(self, adapter: AdapterInfo) -> float:
        return sum(self.value(task, adapter) or 0.0 for task in self.shared) / len(self.shared)

    def to_markdown(self) -> str:
        """The table as Markdown; ratios as percentages, other metrics as they are."""
        head = [[self.metric, *self.names], ["---"] * (1 + len(self.names))]
        return "\n".join(f"| {' | '.join(map(_escape, cells))} |" for cells in head + self.cells)

    __str__ = to_markdown

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        bases = {name: adapter.base_model for name, adapter in self._columns()}
        gains = [{"task": t, **{name: self.gain(t, adapter) for name, adapter in self._columns()}} for t in self.tasks]
        return {"metric": self.metric, "base_models": bases, "rows": self.rows, "gains": gains}


def _escape(text: str) -> str:
    """Text of others as one cell."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")


def format_metric(metric: str, value: float | None) -> str:
    """A metric for people: a ratio as a percentage, "-" where there is none."""
    if value is None:
        return "-"
    # Beyond 1 somebody has written percents by hand.
    is_ratio = metric in ("accuracy", BASE_METRIC, "f1", "exact_match") and 0 <= value <= 1
    return f"{100 * value:.1f} %" if is_ratio else f"{value:.4f}"


def compare(repo_ids: Sequence[str], *, metric: str = "accuracy", token: str | bool | None = None) -> Comparison:
    """
    Compare published adapters by task, from the metadata of their cards alone.

    What cards say is what their authors measured: on data of their own, perhaps, and on other rows.

    Args:
        repo_ids (`Sequence[str]`): Repositories; `"user/name@revision"` names a revision.
        metric (`str`, *optional*, defaults to `"accuracy"`): What to compare.
        token (`str` or `bool`, *optional*): As in `huggingface_hub.model_info`.

    Raises:
        ValueError: If there is nothing to compare.
        HfHubHTTPError: If a repository is not there or may not be read.
    """
    if isinstance(repo_ids, str) or not repo_ids:
        raise ValueError(f"`compare` needs a list of repositories, got {repo_ids!r}.")
    adapters = []
    names = tuple(dict.fromkeys(repo_ids))
    for name in names:
        repo_id, revision = split_revision(name)
        adapters.append(show(repo_id, revision=revision, token=token))
    tasks = dict.fromkeys(t for adapter in adapters for t, values in adapter.metrics.items() if metric in values)
    if not tasks:
        known = sorted({name for adapter in adapters for values in adapter.metrics.values() for name in values})
        raise ValueError(
            f"None of {', '.join(repo_ids)} tells `{metric}` of a task. Their cards have "
            f"{', '.join(known) or 'no metrics'}. Name one of these in `metric`."
        )
    return Comparison(tuple(adapters), tuple(tasks), metric, names)
