"""Arguments and options that several commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperGroup


AdapterArgument = Annotated[
    str, typer.Argument(metavar="ADAPTER", help="Folder of an adapter, or its name on the Hub.", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
RevisionOption = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit on the Hub.", show_default=False)
]
BaseOption = Annotated[
    str | None,
    typer.Option("--base", metavar="MODEL", help="Base model to load.", show_default="the one that the adapter names"),
]
LoadIn4BitOption = Annotated[
    bool, typer.Option("--load-in-4bit", help="Load the base model in 4 bits, as `rlora train` does.")
]
DtypeOption = Annotated[
    Literal["auto", "bfloat16", "float16", "float32"],
    typer.Option(
        "--dtype", metavar="DTYPE", help="Of the base model: bfloat16, float16, float32, or as it is stored."
    ),
]
DataOption = Annotated[
    str,
    typer.Option(
        "--data",
        help="Rows with prompt and completion, or messages that end with the answer, and options if any: "
        "a JSON-lines, Parquet or CSV file, a folder, or a data set on the Hub.",
        show_default=False,
    ),
]
SplitOption = Annotated[
    str | None,
    typer.Option("--split", help="Split of the data.", show_default='"test", or the only one'),
]
TaskColumnOption = Annotated[
    str | None,
    typer.Option("--task-column", help="Column that names the task.", show_default='"task"'),
]
LimitOption = Annotated[
    int | None, typer.Option("--limit", metavar="N", min=1, help="Only so many rows of each task.")
]
BatchSizeOption = Annotated[
    int, typer.Option("--batch-size", metavar="N", min=1, help="Sequences in one forward pass.")
]


class _PlainFlags:
    """Help without `<bool>` behind each flag, which takes no value."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False) and param.metavar is None:
                param.metavar = ""
        return params


class Command(_PlainFlags, TyperCommand):
    """A command of the program."""


class Group(_PlainFlags, TyperGroup):
    """A group of commands."""


def help_of(function: Callable[..., Any]) -> str:
    """
    The docstring of a command as its help: paragraphs on one line each, as the terminal wraps them; what follows a
    line with a backspace character is kept line by line.
    """
    shown = []
    for paragraph in (inspect.getdoc(function) or "").split("\n\n"):
        shown.append(paragraph[2:] if paragraph.startswith("\b") else " ".join(paragraph.split()))
    return "\n\n".join(shown)
