"""The program: its commands, the options they share, and what happens to errors.

Modules of this package import typer and rich alone. PyTorch and what builds on it is imported by a command when it
runs, so that `--help` does not wait for it.
"""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any

import typer

from . import analyze, card, env, estimate, evaluate, export, pull, push, train, zoo
from .errors import quieten_libraries, report
from .options import Group
from .output import note


class ReportingGroup(Group):
    """Commands whose errors become a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, typer.TyperException, BrokenPipeError):
            raise  # typer shows a wrong argument with the usage of the command
        except (Exception, KeyboardInterrupt) as error:
            debug = bool(ctx.params.get("debug"))
            raise typer.Exit(report(error, debug=debug, translated=True)) from error


app = typer.Typer(
    name="rlora",
    cls=ReportingGroup,
    help="Train, measure, export and share R-LoRA adapters.",
    epilog="Each command has `--help`. Options may be written with hyphens or underscores.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        # `--base_model`, as training arguments are written, is `--base-model`.
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)


def _show_version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version  # not `rlora_trl`, whose import takes seconds

        typer.echo(f"rlora-trl {version('rlora-trl')}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error comes from. So does RLORA_DEBUG=1.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of all commands."""


for command in (train, estimate, evaluate, analyze, export, card, push, pull):
    command.register(app)
app.add_typer(zoo.app, name="zoo")
env.register(app)


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
    if not issubclass(category, (FutureWarning, DeprecationWarning)):  # which are for who writes the code
        note(f"Warning: {message}")


def main() -> None:
    """Entry point of the command `rlora`."""
    # Where in the code a warning was raised tells users nothing.
    warnings.showwarning = _show_warning
    quieten_libraries()
    app(prog_name="rlora", args=sys.argv[1:])
