"""`rlora export`: a plain LoRA adapter, or a merged model, for programs without this package."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .loading import find_adapter, load_adapter, load_rows, refuse_unknown_task
from .output import note, percent, print_facts, print_json, results_only
from .terminal import as_message


if TYPE_CHECKING:
    from rlora_trl.files.checks import CheckedAdapter


def export(
    adapter: options.Adapter,
    output_dir: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to write.")],
    task: Annotated[
        str | None, typer.Option("--task", help="Use the head weights of this task.", show_default="mean of tasks")
    ] = None,
    routing: Annotated[
        str | None, typer.Option("--weights", help="Use these head weights, e.g. 0.2,0.3,0.5.", metavar="W,W,...")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Rows by task, to compare the export with the adapter, and to measure head weights that training "
            "did not record.",
        ),
    ] = None,
    split: options.Split = None,
    task_column: options.TaskColumn = None,
    limit: options.Limit = 64,
    merge: Annotated[
        bool, typer.Option("--merge", help="Write the whole model with the adapter merged into its weights.")
    ] = False,
    base: options.Base = None,
    dtype: options.Dtype = "auto",
    load_in_4bit: options.LoadIn4Bit = False,
    revision: options.Revision = None,
    as_json: options.Json = False,
) -> None:
    """Write an adapter as plain LoRA, which PEFT, vLLM and llama.cpp load without this package.

    All tokens get the same head weights. This is exact for `router="task"` and `"uniform"`, and an approximation for
    routers that decide per token. With `--data` the fidelity is measured.
    """
    weights = _parse_weights(routing) if routing is not None else None
    if weights is not None and task is not None:
        raise typer.BadParameter("`--task` and `--weights` both set the head weights. Use only one of them.")
    with results_only():
        from rlora_trl.evaluation.rows import text_rows
        from rlora_trl.export import export_lora

        # Checks that need no model come first.
        checked = find_adapter(adapter, revision)
        if task is not None:
            refuse_unknown_task(checked, task)
        if weights is not None:
            _check_weights(weights, routing, checked.config.num_heads)
        elif data is None:
            _refuse_unmeasured(checked, task)
        rows = load_rows(checked, data, split, task_column, limit, answers=True) if data is not None else None

        loaded = load_adapter(checked, base=base, dtype=dtype, load_in_4bit=load_in_4bit)
        report = export_lora(
            loaded.model,
            str(output_dir),
            task=task,
            routing=weights,
            data=None if rows is None else text_rows(rows, loaded.tokenizer),
            tokenizer=loaded.tokenizer,
            merge=merge,
        )
    values = report.to_dict()
    if as_json:
        print_json(values)
        return
    print_facts(_facts(values))
    for warning in values.get("warnings") or ():
        note(as_message(f"Warning: {warning}"))


def _parse_weights(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"`--weights` must be numbers separated by commas, got {text!r}.") from None


def _check_weights(values: list[float], typed: str | None, num_heads: int) -> None:
    """Refuse weights that do not fit the heads; the message quotes the command line."""
    if len(values) != num_heads or min(values) < 0 or not math.isclose(sum(values), 1.0, abs_tol=1e-3):
        raise ValueError(
            f"`--weights {typed}` must be {num_heads} numbers, one for each head, none below 0, with the sum 1; got "
            f"{len(values)} with the sum {sum(values):g}. Correct them."
        )


def _refuse_unmeasured(checked: CheckedAdapter, task: str | None) -> None:
    """Refuse an adapter that routes by token and has no recorded head weights."""
    config, recorded = checked.config, checked.record.mixtures if checked.record else None
    if config.num_heads == 1 or config.router in ("uniform", "task"):
        return
    if recorded is None or (task is not None and task not in recorded.weights):
        of_task = f" for task {task!r}" if task is not None else ""
        raise ValueError(
            f"{checked.folder} routes by token, and no mean head weights are recorded{of_task}. Add `--data` to "
            "measure them, or set them with `--weights`."
        )


def _facts(values: dict[str, Any]) -> dict[str, Any]:
    divergence = values.get("kl")
    accuracies = [percent(values.get(name)) for name in ("accuracy_export", "accuracy_dynamic")]
    return {
        "Written to": values.get("path"),
        "Task": values.get("task"),
        "Kind": "merged model" if values.get("merged") else f"plain LoRA of rank {values.get('rank')}",
        "Layers": values.get("layers"),
        "Weights": values.get("mixture"),
        "Fidelity": "exact: the same function as the adapter" if values.get("exact") else None,
        "KL to adapter": None if divergence is None else f"{divergence:.4f} nats per token",
        "Accuracy": None if None in accuracies else f"{accuracies[0]}%, of the adapter {accuracies[1]}%",
    }
