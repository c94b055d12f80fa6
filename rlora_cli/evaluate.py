"""`rlora eval`: accuracy by task."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .loading import LoadedAdapter, by_task_setting, find_adapter, load_adapter, load_rows, local_record, note_saved
from .output import note, percent, print_json, print_table, results_only
from .terminal import shown


if TYPE_CHECKING:
    from rlora_trl.evaluation import TaskScore
    from rlora_trl.files.checks import CheckedAdapter
    from rlora_trl.files.record import AdapterRecord


def evaluate(
    adapter: options.Adapter,
    data: options.Data,
    split: options.Split = None,
    task_column: options.TaskColumn = None,
    limit: options.Limit = None,
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
    reproduces the completion.
    """
    with results_only():
        from rlora_trl.evaluation.rows import text_rows

        # Checks that need no model come first.
        checked = find_adapter(adapter, revision)
        record = local_record(checked, adapter) if save else None
        tasks = load_rows(checked, data, split, task_column, limit, answers=True)
        if record is not None and not overwrite:
            _refuse_fewer_rows(record, tasks)

        loaded = load_adapter(checked, base=base, dtype=dtype, load_in_4bit=load_in_4bit)
        tasks = text_rows(tasks, loaded.tokenizer)
        scores = _score(loaded, tasks, batch_size, "Scoring the adapter")
        base_scores = None
        if compare_base:
            with loaded.model.disable_adapter():
                base_scores = _score(loaded, tasks, batch_size, "Scoring the base model")
        if record is not None:
            note_saved(_with_scores(record, scores, base_scores, checked).save(checked.folder))

    rows = [_row(task, score, base_scores) for task, score in scores.items()]
    means = {"accuracy": _mean(scores), **({"base_accuracy": _mean(base_scores)} if base_scores else {})}
    if as_json:
        print_json({"adapter": adapter, "data": data, "tasks": rows, "mean": means})
    else:
        _show(rows, means)


def _score(loaded: LoadedAdapter, tasks: dict[str, Any], batch_size: int, description: str) -> dict[str, TaskScore]:
    from rlora_trl.evaluation import score_tasks

    scores: dict[str, TaskScore] = {}
    visible = description if sys.stderr.isatty() else None
    for portion in by_task_setting(loaded, tasks):
        scores |= score_tasks(loaded.model, loaded.tokenizer, portion, batch_size=batch_size, description=visible)
    return scores


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


def _with_scores(
    record: AdapterRecord,
    scores: dict[str, TaskScore],
    base_scores: dict[str, TaskScore] | None,
    checked: CheckedAdapter,
) -> AdapterRecord:
    """The record with the scores of the tasks that the adapter was trained on."""
    from rlora_trl.files.record import TaskRecord

    tasks = {name: TaskRecord(name) for name in checked.config.tasks or scores}
    tasks |= {task.name: task for task in record.tasks}
    others = [name for name in scores if name not in tasks]
    if others:
        note(f"Not recorded, as the adapter was not trained on them: {', '.join(map(shown, others))}")

    for name, score in scores.items():
        if name not in tasks:
            continue
        metrics = {**tasks[name].metrics, "accuracy": score.accuracy}
        if base_scores is not None:
            metrics["base_accuracy"] = base_scores[name].accuracy
        elif score.total != tasks[name].metric_rows:  # the base was scored on other rows
            metrics.pop("base_accuracy", None)
        tasks[name] = replace(tasks[name], metrics=metrics, metric_rows=score.total)
    return replace(record, tasks=list(tasks.values()))


def _row(task: str, score: TaskScore, base_scores: dict[str, TaskScore] | None) -> dict[str, Any]:
    row = {"task": task, "rows": score.total, "correct": score.correct, "accuracy": score.accuracy}
    return row | ({"base_accuracy": base_scores[task].accuracy} if base_scores else {})


def _mean(scores: dict[str, TaskScore]) -> float:
    return sum(score.accuracy for score in scores.values()) / len(scores)


def _show(rows: list[dict[str, Any]], means: dict[str, float]) -> None:
    if len(rows) > 1:
        rows = [*rows, {"task": "mean of tasks", "rows": sum(row["rows"] for row in rows), **means}]
    columns = ["task", "rows", "accuracy, %"]
    cells = [[row["task"], row["rows"], percent(row["accuracy"])] for row in rows]
    if "base_accuracy" in means:
        columns += ["base, %", "gain"]
        for line, row in zip(cells, rows, strict=True):
            line += [percent(row["base_accuracy"]), f"{100 * (row['accuracy'] - row['base_accuracy']):+.1f}"]
    print_table(columns, cells)
