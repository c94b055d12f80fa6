"""`rlora eval`: accuracy by task."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .loading import (
    LoadedAdapter,
    chosen_tasks,
    find_adapter,
    load_adapter,
    load_rows,
    local_record,
    say_saved,
)
from .options import (
    AdapterArgument,
    BaseOption,
    BatchSizeOption,
    Command,
    DataOption,
    DtypeOption,
    JsonOption,
    LimitOption,
    LoadIn4BitOption,
    RevisionOption,
    SplitOption,
    TaskColumnOption,
    help_of,
)
from .output import note, percent, print_json, print_table, results_only


if TYPE_CHECKING:
    from rlora_trl.evaluation import TaskScore
    from rlora_trl.files.checks import CheckedAdapter
    from rlora_trl.files.record import AdapterRecord


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("eval", cls=Command, help=help_of(evaluate))(evaluate)


def evaluate(
    adapter: AdapterArgument,
    data: DataOption,
    split: SplitOption = None,
    task_column: TaskColumnOption = None,
    limit: LimitOption = None,
    batch_size: BatchSizeOption = 32,
    base: BaseOption = None,
    compare_base: Annotated[
        bool, typer.Option("--compare-base", help="Score the base model without the adapter, too.")
    ] = False,
    dtype: DtypeOption = "auto",
    load_in_4bit: LoadIn4BitOption = False,
    revision: RevisionOption = None,
    save: Annotated[
        bool, typer.Option("--save", help="Record the scores in the adapter's folder, for its card and its push.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Let --save replace scores that were measured on more rows.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Score an adapter by task.

    A row with options counts if its completion is the most likely of them; one without, if greedy decoding writes it.
    """
    with results_only():
        from rlora_trl.evaluation.rows import text_rows

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
            say_saved(_with_scores(record, scores, base_scores, checked).save(checked.folder))
    rows = [_row(task, score, base_scores) for task, score in scores.items()]
    means = {"accuracy": _mean(scores), **({"base_accuracy": _mean(base_scores)} if base_scores else {})}
    if as_json:
        print_json({"adapter": adapter, "data": data, "tasks": rows, "mean": means})
    else:
        _show(rows, means)


def _score(loaded: LoadedAdapter, tasks: dict[str, Any], batch_size: int, description: str) -> dict[str, TaskScore]:
    from rlora_trl.evaluation import score_tasks

    scores: dict[str, TaskScore] = {}
    shown = description if sys.stderr.isatty() else None
    for portion in chosen_tasks(loaded, tasks):
        scores |= score_tasks(loaded.model, loaded.tokenizer, portion, batch_size=batch_size, description=shown)
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
    """The record with the scores of the adapter's tasks: it does not learn others by being tested on them."""
    from rlora_trl.files.record import TaskRecord

    known = {name: TaskRecord(name) for name in checked.config.tasks or scores}
    known |= {task.name: task for task in record.tasks}
    others = [name for name in scores if name not in known]
    if others:
        note(f"Not recorded, as the adapter was not trained on them: {', '.join(others)}")
    for name, score in scores.items():
        if name in known:
            metrics = {**known[name].metrics, "accuracy": score.accuracy}
            if base_scores is not None:
                metrics["base_accuracy"] = base_scores[name].accuracy
            elif score.total != known[name].metric_rows:  # of other rows, and not to be compared
                metrics.pop("base_accuracy", None)
            known[name] = replace(known[name], metrics=metrics, metric_rows=score.total)
    return replace(record, tasks=list(known.values()))


def _row(task: str, score: TaskScore, base_scores: dict[str, TaskScore] | None) -> dict[str, Any]:
    row = {"task": task, "rows": score.total, "correct": score.correct, "accuracy": score.accuracy}
    return row | ({"base_accuracy": base_scores[task].accuracy} if base_scores else {})


def _mean(scores: dict[str, TaskScore]) -> float:
    return sum(score.accuracy for score in scores.values()) / len(scores)


def _show(rows: list[dict[str, Any]], means: dict[str, float]) -> None:
    compared = "base_accuracy" in means
    columns = ["task", "rows", "accuracy, %", *(["base, %", "gain"] if compared else [])]
    shown = list(rows)
    if len(rows) > 1:
        shown.append({"task": "mean of tasks", "rows": sum(row["rows"] for row in rows), **means})
    cells = []
    for row in shown:
        line = [row["task"], row["rows"], percent(row["accuracy"])]
        if compared:
            gain = 100 * (row["accuracy"] - row["base_accuracy"])
            line += [percent(row["base_accuracy"]), f"{gain:+.1f}"]
        cells.append(line)
    print_table(columns, cells)
