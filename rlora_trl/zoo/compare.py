"""Adapters side by side, by task, from what their cards say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .search import AdapterInfo, show


@dataclass(frozen=True)
class Comparison:
    """
    A table of adapters by task.

    Attributes:
        adapters (`tuple[AdapterInfo, ...]`): The columns.
        tasks (`tuple[str, ...]`): The rows: all tasks that one of them has the metric of.
        metric (`str`): What is compared.
    """

    adapters: tuple[AdapterInfo, ...]
    tasks: tuple[str, ...]
    metric: str = "accuracy"

    def value(self, task: str, adapter: AdapterInfo) -> float | None:
        """The metric of one adapter for one task, if its card has it."""
        return adapter.metrics.get(task, {}).get(self.metric)

    @property
    def shared(self) -> tuple[str, ...]:
        """The tasks that all adapters have the metric of."""
        return tuple(t for t in self.tasks if all(self.value(t, adapter) is not None for adapter in self.adapters))

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dictionary for each task, and the mean over the tasks that all have; values by repository."""
        rows = [{"task": t, **{a.repo_id: self.value(t, a) for a in self.adapters}} for t in self.tasks]
        if self.shared:
            label = "mean" if self.shared == self.tasks else f"mean of {len(self.shared)} shared"
            rows.append({"task": label, **{a.repo_id: self._mean(a) for a in self.adapters}})
        return rows

    def _mean(self, adapter: AdapterInfo) -> float:
        return sum(self.value(task, adapter) or 0.0 for task in self.shared) / len(self.shared)

    def to_markdown(self) -> str:
        """The table as Markdown; ratios as percentages, other metrics as they are."""
        names = [adapter.repo_id for adapter in self.adapters]
        lines = [f"| {self.metric} | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
        lines += [
            f"| {row['task']} | " + " | ".join(format_metric(self.metric, row[name]) for name in names) + " |"
            for row in self.rows
        ]
        return "\n".join(lines)

    __str__ = to_markdown

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        bases = {adapter.repo_id: adapter.base_model for adapter in self.adapters}
        return {"metric": self.metric, "base_models": bases, "rows": self.rows}


def format_metric(metric: str, value: float | None) -> str:
    """A metric for people: a ratio as a percentage, "-" where there is none."""
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if metric in ("accuracy", "f1", "exact_match") else f"{value:.4f}"


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
    for name in dict.fromkeys(repo_ids):
        repo_id, _, revision = name.partition("@")
        adapters.append(show(repo_id, revision=revision or None, token=token))
    tasks = dict.fromkeys(t for adapter in adapters for t, values in adapter.metrics.items() if metric in values)
    if not tasks:
        known = sorted({name for adapter in adapters for values in adapter.metrics.values() for name in values})
        raise ValueError(
            f"None of {', '.join(repo_ids)} tells `{metric}` of a task. Their cards have "
            f"{', '.join(known) or 'no metrics'}. Name one of these in `metric`."
        )
    return Comparison(tuple(adapters), tuple(tasks), metric)
