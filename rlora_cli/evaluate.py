"""`rlora eval`: scores by task."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .loading import LoadedAdapter, find_adapter, load_adapter, load_rows, local_record, note_saved
from .output import note, print_json, results_only
from .ranks import Ranks
from .scores import CONFIDENCE, Scores
from .terminal import shown


if TYPE_CHECKING:
    from rlora_trl.evaluation import TaskScore
    from rlora_trl.files.checks import CheckedAdapter
    from rlora_trl.files.record import AdapterRecord, TaskRecord


def evaluate(
    adapter: options.Adapter,
    data: options.Data,
    split: options.Split = None,
    task_column: options.TaskColumn = None,
    limit: options.Limit = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            metavar="METRIC",
            help="accuracy, exact_match, f1 or number for all tasks without options, or TASK=METRIC for one task. "
            "May be repeated.",
            show_default="accuracy",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Maximum number of tokens of an answer.")
    ] = 256,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", metavar="TEXT", help=r"Text that ends an answer, such as \n. May be repeated."),
    ] = None,
    batch_size: options.BatchSize = 32,
    base: options.Base = None,
    compare_base: Annotated[
        bool, typer.Option("--compare-base", help="Also score the base model without the adapter.")
    ] = False,
    dtype: options.Dtype = "auto",
    load_in_4bit: options.LoadIn4Bit = False,
    revision: options.Revision = None,
    save: Annotated[
        bool, typer.Option("--save", help="Record the scores in the adapter's folder, for its card and push.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Let --save replace scores that were measured on more rows.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Score an adapter by task.

    A row with options is correct if its completion is the most likely option; a row without, if greedy decoding
    reproduces the completion. The metrics exact_match, f1 (both after SQuAD's normalization) and number (GSM8K's)
    compare the text of a generated answer with the completion instead.
    """
    with Ranks() as ranks, results_only(), ranks.quiet():
        from rlora_trl.evaluation.rows import text_rows

        with ranks.together():
            # Checks that need no model come first.
            checked = find_adapter(adapter, revision)
            record = local_record(checked, adapter) if save else None
            tasks = load_rows(checked, data, split, task_column, limit, answers=True)
            metrics, stop = _read_metrics(metric or [], tasks), _read_stop(stop or [])
            if record is not None and not overwrite:
                _refuse_fewer_rows(record, tasks)

            loaded = load_adapter(checked, base=base, dtype=dtype, load_in_4bit=load_in_4bit, device=ranks.device)
            tasks = text_rows(tasks, loaded.tokenizer)
            settings = _Settings(_choose_metrics(metrics, tasks, data), max_new_tokens, stop, batch_size)

        scores = Scores(_score(loaded, tasks, settings, ranks, "Scoring the adapter"))
        if compare_base:
            with loaded.model.disable_adapter():
                scores.base = _score(loaded, tasks, settings, ranks, "Scoring the base model")
        if not ranks.is_main:
            return
        if record is not None:
            note_saved(_with_scores(record, scores, checked).save(checked.folder))

    if as_json:
        facts = {"tasks": scores.rows(), "mean": scores.mean(), "confidence": CONFIDENCE}
        print_json({"adapter": adapter, "data": data, **facts})
    else:
        scores.show()


@dataclass
class _Settings:
    """How to score, with the metric of each task."""

    metrics: dict[str, str]
    max_new_tokens: int
    stop: list[str]
    batch_size: int


def _read_metrics(words: list[str], tasks: dict[str, Any]) -> dict[str, str]:
    """
    The metrics on the command line by task; "" stands for all others.

    Raises:
        ValueError: If there is no such metric or task, or two for one task.
    """
    from rlora_trl.evaluation.scoring import choose_metric

    metrics: dict[str, str] = {}
    for word in words:
        task, _, name = word.rpartition("=")
        choose_metric(name, [])  # refuses unknown names
        if task and task not in tasks:
            raise ValueError(f"`--metric {word}` names no task of the data, which has {', '.join(tasks)}.")
        if task in metrics:
            raise ValueError(f"`--metric` has two metrics for {task or 'all tasks'}: {metrics[task]} and {name}.")
        metrics[task] = name
    return metrics


def _read_stop(words: list[str]) -> list[str]:
    if "" in words:
        raise ValueError("`--stop` is empty, and would end each answer before it begins. Give it a text.")
    return [word.replace("\\n", "\n") for word in words]


def _choose_metrics(metrics: dict[str, str], tasks: dict[str, Any], data: str) -> dict[str, str]:
    """The metric of each task: its own on the command line or in the paper's data, or that of all others."""
    from rlora_trl.evaluation.paper import paper_metrics
    from rlora_trl.evaluation.scoring import choose_metric

    default = metrics.get("", "auto")
    own = {**(paper_metrics(data) if default == "auto" else {}), **metrics}
    return {task: own.get(task) or choose_metric(default, rows) for task, rows in tasks.items()}


def _score(
    loaded: LoadedAdapter, tasks: dict[str, Any], settings: _Settings, ranks: Ranks, description: str
) -> dict[str, TaskScore]:
    """Scores of all rows, of which each process computes a share."""
    from rlora_trl.evaluation import score_tasks

    with ranks.together():
        share = ranks.share(tasks)
        scores = score_tasks(
            loaded.model,
            loaded.tokenizer,
            share,
            batch_size=settings.batch_size,
            description=description if ranks.is_main and sys.stderr.isatty() else None,
            metric={task: settings.metrics[task] for task in share},
            max_new_tokens=settings.max_new_tokens,
            stop=settings.stop,
        )
    return ranks.join(scores, tasks)


def _refuse_fewer_rows(record: AdapterRecord, tasks: dict[str, Any]) -> None:
    fewer = [
        f"{task.name} ({len(tasks[task.name])} rows, recorded are scores of {task.metric_rows})"
        for task in record.tasks
        if task.name in tasks and task.metric_rows is not None and len(tasks[task.name]) < task.metric_rows
    ]
    if fewer:
        raise ValueError(
            f"`--save` would replace scores that were measured on more rows: {', '.join(fewer)}. Score all rows, or "
            "add `--overwrite`."
        )


def _with_scores(record: AdapterRecord, scores: Scores, checked: CheckedAdapter) -> AdapterRecord:
    """The record with the scores of the tasks that the adapter was trained on."""
    from rlora_trl.files.record import TaskRecord

    tasks = {name: TaskRecord(name) for name in checked.config.tasks or scores.adapter}
    tasks |= {task.name: task for task in record.tasks}
    others = [name for name in scores.adapter if name not in tasks]
    if others:
        note(f"Not recorded, as the adapter was not trained on them: {', '.join(map(shown, others))}")

    for name, score in scores.adapter.items():
        if name not in tasks:
            continue
        task = tasks[name]
        # Scores of other rows can't stand beside these.
        if score.total != task.metric_rows:
            task = _without_scores(task)
        metrics, intervals = scores.measured(name)
        tasks[name] = replace(
            task,
            metrics={**task.metrics, **metrics},
            metric_rows=score.total,
            intervals={**task.intervals, **intervals},
        )
    return replace(record, tasks=list(tasks.values()))


def _without_scores(task: TaskRecord) -> TaskRecord:
    from rlora_trl.evaluation.metrics import METRICS

    scores = {*METRICS, *(f"base_{metric}" for metric in METRICS)}
    return replace(
        task,
        metrics={name: value for name, value in task.metrics.items() if name not in scores},
        intervals={name: bounds for name, bounds in task.intervals.items() if name not in scores},
    )
