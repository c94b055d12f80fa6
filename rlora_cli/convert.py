"""`rlora convert`: an adapter of other code as an R-LoRA adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from . import options
from .output import note, print_facts, print_json, results_only
from .terminal import as_message


def convert(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="Folder with adapter_config.json and the weights beside it."),
    ],
    output_dir: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to write; new or empty.")],
    source_format: Annotated[
        Literal["lora", "hydralora", "r-lora"] | None,
        typer.Option(
            "--from",
            metavar="FORMAT",
            help="lora, hydralora or r-lora. Required for the last two: their files look the same.",
            show_default="lora",
        ),
    ] = None,
    use_rslora: Annotated[
        bool | None,
        typer.Option(
            "--use-rslora/--no-use-rslora",
            help="Required for r-lora, which does not save it: trained with --rank_stablization True (scaling "
            "alpha/sqrt(r)), or without (alpha/r).",
            show_default="as the source",
        ),
    ] = None,
    initial_values: Annotated[
        str | None,
        typer.Option(
            "--initial-values",
            metavar="FOLDER",
            help="For r-lora: the adapter as its code saves it before the first step.",
        ),
    ] = None,
    ignore_offset: Annotated[
        bool,
        typer.Option(
            "--ignore-offset",
            help="For r-lora without initial values: what its code computes when it loads the files.",
        ),
    ] = False,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="TASK", help="A task that the adapter was trained on; may be repeated."),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="MODEL",
            help="Base model to name in the adapter.",
            show_default="the one that the source names",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Convert an adapter of other code: R-LoRA's or HydraLoRA's by their authors, or plain LoRA of PEFT.

    The values are copied, and heads and routers are kept. Plain LoRA becomes one head, which is the same function;
    `rlora export` is the way back. Pickled weights (adapter_model.bin) are read without running code in them.
    """
    with results_only():
        from rlora_trl.convert import convert_adapter

        report = convert_adapter(
            source,
            output_dir,
            source_format=source_format,
            use_rslora=use_rslora,
            initial_values=initial_values,
            ignore_offset=ignore_offset,
            tasks=tasks or None,
            base_model=base_model,
        )
    values = report.to_dict()
    if as_json:
        print_json(values)
        return
    print_facts(_facts(values))
    for warning in report.warnings:
        note(as_message(f"Warning: {warning}"))


def _facts(values: dict[str, Any]) -> dict[str, Any]:
    origins = {"lora": "plain LoRA", "hydralora": "HydraLoRA", "r-lora": "R-LoRA by its authors"}
    offsets = {"none": None, "ignored": "not subtracted", "initial values": "that of the initial values, subtracted"}
    heads = "1 head" if values["num_heads"] == 1 else f"{values['num_heads']} heads"
    return {
        "Written to": values["path"],
        "Converted from": origins[values["source_format"]],
        "Layers": values["layers"],
        "Heads": f"{heads} of rank {values['r']}, router {values['router']}",
        "Scaling": f"{values['scaling']:.6g} = lora_alpha / {'sqrt(r)' if values['use_rslora'] else 'r'}",
        "Initial delta": offsets[values["offset"]],
        "Base model": values["base_model"],
        "Tasks": ", ".join(values["tasks"]),
    }
