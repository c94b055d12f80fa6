"""Scores by task as tables and as JSON, with the base model's and with intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .output import percent, print_table


if TYPE_CHECKING:
    from collections.abc import Mapping

    from rlora_trl.evaluation import Interval, TaskScore


CONFIDENCE = 0.95


@dataclass
class Scores:
    """
    The scores of an adapter.

    Args:
        adapter (`Mapping[str, TaskScore]`): Scores by task.
        base (`Mapping[str, TaskScore]`, *optional*): Scores of the base model on the same rows.
    """

    adapter: Mapping[str, TaskScore]
    base: Mapping[str, TaskScore] | None = None

    @property
    def metric(self) -> str | None:
        """The metric of all tasks, if it is one."""
        metrics = {score.metric for score in self.adapter.values()}
        return metrics.pop() if len(metrics) == 1 else None

    def measured(self, task: str) -> tuple[dict[str, float], dict[str, list[float]]]:
        """The scores of a task and their intervals, by the names that records have for them."""
        metric = self.adapter[task].metric
        both = {metric: self.adapter, **({} if self.base is None else {f"base_{metric}": self.base})}
        metrics = {name: scores[task].score for name, scores in both.items()}
        return metrics, {name: list(_interval(scores, [task])) for name, scores in both.items()}

    def rows(self) -> list[dict[str, Any]]:
        """The facts about each task."""
        return [
            {
                "task": task,
                "rows": score.total,
                "correct": score.correct,
                "metric": score.metric,
                **self._facts([task], score.metric),
            }
            for task, score in self.adapter.items()
        ]

    def mean(self) -> dict[str, Any]:
        """The facts about the mean over tasks, which count equally."""
        return self._facts(list(self.adapter), self.metric)

    def _facts(self, tasks: list[str], metric: str | None) -> dict[str, Any]:
        """Mean score of some tasks, under the name of the metric too, with intervals, for the adapter and the base."""
        facts: dict[str, Any] = {"score": _mean(self.adapter, tasks), "interval": _interval(self.adapter, tasks)}
        if metric is not None:
            facts[metric] = facts["score"]
        if self.base is None:
            return facts

        facts["base_score"], facts["base_interval"] = _mean(self.base, tasks), _interval(self.base, tasks)
        if metric is not None:
            facts[f"base_{metric}"] = facts["base_score"]
        facts["gain"] = facts["score"] - facts["base_score"]
        facts["gain_interval"] = _interval(self.adapter, tasks, self.base)
        return facts

    def show(self) -> None:
        """Print a table."""
        rows = self.rows()
        if len(rows) > 1:
            total = sum(row["rows"] for row in rows)
            rows.append({"task": "mean of tasks", "rows": total, "metric": None, **self.mean()})
        metric = self.metric
        columns = ["task", "rows", *([] if metric else ["metric"])]
        columns += [f"{spoken(metric or 'score')}, %", "95 % interval"]
        columns += ["base, %", "gain", "interval of gain"] if self.base else []
        print_table(columns, [_cells(row, with_metric=metric is None) for row in rows])


def spoken(metric: str) -> str:
    """The name of a metric in text."""
    return metric.replace("_", " ")


def _cells(row: dict[str, Any], *, with_metric: bool) -> list[Any]:
    cells = [row["task"], row["rows"]]
    if with_metric:
        cells.append(row["metric"] and spoken(row["metric"]))
    cells += [percent(row["score"]), "{:.1f} to {:.1f}".format(*_percents(row["interval"]))]
    if "gain" in row:
        interval = "{:+.1f} to {:+.1f}".format(*_percents(row["gain_interval"]))
        cells += [percent(row["base_score"]), f"{100 * row['gain']:+.1f}", interval]
    return cells


def _percents(interval: Interval) -> list[float]:
    return [100 * bound + 0.0 for bound in interval]


def _mean(scores: Mapping[str, TaskScore], tasks: list[str]) -> float:
    return sum(scores[task].score for task in tasks) / len(tasks)


def _interval(
    scores: Mapping[str, TaskScore], tasks: list[str], base: Mapping[str, TaskScore] | None = None
) -> Interval:
    """The interval of a mean over tasks, or of the gain over a base model, row by row."""
    import numpy as np

    from rlora_trl.evaluation import bootstrap_interval

    values = [np.asarray(scores[task].values) for task in tasks]
    if base is not None:
        values = [own - np.asarray(base[task].values) for own, task in zip(values, tasks, strict=True)]
    return bootstrap_interval(values, bounds=(0.0 if base is None else -1.0, 1.0))
