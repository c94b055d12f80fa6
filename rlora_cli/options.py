"""Arguments and options that several commands share, and how a command runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperGroup

from .errors import report
from .terminal import guarded_streams, shown


def _needs_bitsandbytes(quantize: bool) -> bool:
    if quantize:
        from rlora_trl.requirements import require_bitsandbytes

        try:
            require_bitsandbytes("`--load-in-4bit`")
        except ImportError as error:
            raise typer.BadParameter(str(error)) from error
    return quantize


Adapter = Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder of an adapter, or its name on the Hub.")]
AdapterFolder = Annotated[str, typer.Argument(metavar="FOLDER", help="Folder of an adapter.")]
Repositories = Annotated[list[str], typer.Argument(metavar="REPO...", help="user/name or user/name@revision.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the Hub.")]
Base = Annotated[
    str | None,
    typer.Option("--base", metavar="MODEL", help="Base model to load.", show_default="the one that the adapter names"),
]
LoadIn4Bit = Annotated[
    bool,
    typer.Option("--load-in-4bit", help="Quantize the base model to 4 bits (QLoRA).", callback=_needs_bitsandbytes),
]
Dtype = Annotated[
    Literal["auto", "bfloat16", "float16", "float32"],
    typer.Option(
        "--dtype", metavar="DTYPE", help="Dtype of the base model: bfloat16, float16, float32, or auto, as stored."
    ),
]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="Rows with prompt and completion, or messages that end with the answer; options if there are any. "
        "A JSON-lines, Parquet or CSV file, a folder, a dataset on the Hub, or the paper's: paper:setting1.",
    ),
]
Split = Annotated[
    str | None,
    typer.Option(
        "--split",
        help="Split of the data; of a single file, any name is taken.",
        show_default='"test", or the only one',
    ),
]
TaskColumn = Annotated[
    str | None, typer.Option("--task-column", help="Column with the task of each row.", show_default='"task"')
]
Limit = Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="Maximum number of rows per task.")]
BatchSize = Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help="Sequences per forward pass.")]


class _PlainFlags:
    """Help without `<bool>` behind flags, which take no value."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False) and param.metavar is None:
                param.metavar = ""
        return params


class Command(_PlainFlags, TyperCommand):
    """A command whose errors become a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        with guarded_streams():
            return self._invoke(ctx)

    def _invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, typer.TyperException, BrokenPipeError, SystemExit):
            raise  # typer shows a wrong argument with the usage of the command
        except BaseException as error:  # also interruptions, and panics of libraries in Rust
            # A parameter is named like the argument of the library, and may have an option of another name.
            names = {
                param.name: param.opts[0] if param.opts[0].startswith("-") else str(param.metavar)
                for param in self.params
                if param.name is not None
            }
            # `--no-x` for `x=False`.
            names |= {f"{param.name}=False": param.secondary_opts[0] for param in self.params if param.secondary_opts}
            debug = bool(ctx.find_root().params.get("debug"))
            raise typer.Exit(report(error, debug=debug, names=names)) from error


@contextmanager
def _shown_usage() -> Iterator[None]:
    """Escape what errors of usage quote, which typer prints: names on a command line may be foreign."""
    try:
        yield
    except typer.TyperException as error:
        error.message = shown(error.message, keep="\n")
        raise


class Group(_PlainFlags, TyperGroup):
    """A group of commands."""

    def make_context(self, *args: Any, **extra: Any) -> Any:
        with _shown_usage():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        with _shown_usage():
            return super().invoke(ctx)


def help_of(function: Callable[..., Any]) -> str:
    """
    The docstring of a command as its help.

    A paragraph becomes one line, which the terminal wraps. What follows a line with a backspace character keeps its
    lines.
    """
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    return "\n\n".join(text[2:] if text.startswith("\b") else " ".join(text.split()) for text in paragraphs)
