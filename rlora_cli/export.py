"""`rlora export`: a plain LoRA adapter, or a merged model, for programs that do not know R-LoRA."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from .loading import find_adapter, load_adapter, load_rows, refuse_unknown_task
from .options import (
    AdapterArgument,
    BaseOption,
    Command,
    DtypeOption,
    JsonOption,
    LimitOption,
    LoadIn4BitOption,
    RevisionOption,
    SplitOption,
    TaskColumnOption,
    help_of,
)
from .output import note, percent, print_facts, print_json, results_only


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("export", cls=Command, help=help_of(export))(export)


def export(
    adapter: AdapterArgument,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to write.", show_default=False)],
    task: Annotated[
        str | None, typer.Option("--task", help="Use the mixture of this task.", show_default="mean of tasks")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            help="Weigh the heads by these numbers, e.g. 0.2,0.3,0.5.",
            metavar="W,W,...",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Rows by task: mixtures that were not recorded in training are measured on them, and so is what "
            "the export loses.",
            show_default=False,
        ),
    ] = None,
    split: SplitOption = None,
    task_column: TaskColumnOption = None,
    limit: LimitOption = 64,
    merge: Annotated[
        bool, typer.Option("--merge", help="Write the whole model with the adapter merged into its weights.")
    ] = False,
    base: BaseOption = None,
    dtype: DtypeOption = "auto",
    load_in_4bit: LoadIn4BitOption = False,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write an adapter as plain LoRA, which PEFT, vLLM and llama.cpp load without this package.

    Routing by token becomes one fixed mixture of the heads: exact for adapters that mix by task or uniformly, else an
    approximation, whose loss is measured if there is data. It is checked before it is written.
    """
    routing = _parse_weights(weights) if weights is not None else None
    if routing is not None and task is not None:
        raise typer.BadParameter("`--task` and `--weights` both say how to mix the heads. Give one of them.")
    with results_only():
        from rlora_trl.evaluation.rows import text_rows
        from rlora_trl.export import export_lora

        checked = find_adapter(adapter, revision)
        if task is not None:
            refuse_unknown_task(checked, task)
        if routing is not None:
            _check_weights(routing, weights, checked.config.num_heads)
        rows = load_rows(checked, data, split, task_column, limit, answers=True) if data is not None else None
        loaded = load_adapter(checked, base=base, dtype=dtype, load_in_4bit=load_in_4bit)
        report = export_lora(
            loaded.model,
            str(output),
            task=task,
            routing=routing,
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
        note(f"Warning: {warning}")


def _parse_weights(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"`--weights` must be numbers with commas between, got {text!r}.") from None


def _check_weights(values: list[float], typed: str | None, num_heads: int) -> None:
    """Refuse weights that are no mixture, as they were typed."""
    if len(values) != num_heads or min(values) < 0 or not math.isclose(sum(values), 1.0, abs_tol=1e-3):
        raise ValueError(
            f"`--weights {typed}` must be {num_heads} numbers, one for each head, of at least 0 and with the sum 1; "
            f"these are {len(values)} with the sum {sum(values):g}. Correct them."
        )


def _facts(values: dict[str, Any]) -> dict[str, Any]:
    error = values.get("max_logit_error")
    loss = values.get("kl")
    accuracies = [percent(values.get(name)) for name in ("accuracy_export", "accuracy_dynamic")]
    return {
        "Written to": values.get("path"),
        "Task": values.get("task"),
        "Kind": "merged model" if values.get("merged") else f"plain LoRA of rank {values.get('rank')}",
        "Layers": values.get("layers"),
        "Weights": values.get("mixture"),
        "ExportGap": "none: the same function" if values.get("exact") else None,
        "Checked": None if error is None else f"logits differ by at most {error:.1e} of the largest",
        "KL to routing": None if loss is None else f"{loss:.4f} nats a token",
        "Accuracy": None if None in accuracies else f"{accuracies[0]} %, with routing by token {accuracies[1]} %",
    }
