"""
The program: its commands and its global options.

Modules of this package import only typer and rich. A command imports the library when it runs, so that `--help` does
not wait for PyTorch.
"""

from __future__ import annotations

import sys
import warnings
from io import TextIOWrapper
from typing import Annotated, Any

import typer

from . import analyze, card, convert, env, estimate, evaluate, export, lm_eval, pull, push, train, zoo
from .errors import quieten_libraries
from .options import Command, Group, help_of
from .output import note
from .terminal import as_message


app = typer.Typer(
    name="rlora",
    cls=Group,
    help="Train, evaluate, export and share R-LoRA adapters.",
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
        bool, typer.Option("--debug", help="Show the traceback of an error. RLORA_DEBUG=1 does the same.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Global options."""


_COMMANDS: dict[str, Any] = {
    "train": train.train,
    "estimate": estimate.estimate,
    "eval": evaluate.evaluate,
    "lm-eval": lm_eval.lm_eval,
    "analyze": analyze.analyze,
    "export": export.export,
    "convert": convert.convert,
    "card": card.show_card,
    "push": push.push,
    "pull": pull.pull,
    "env": env.show_environment,
}

# Settings of commands that pass arguments on.
_SETTINGS: dict[str, dict[str, Any]] = {"train": train.SETTINGS, "lm-eval": lm_eval.SETTINGS}

for _name, _function in _COMMANDS.items():
    app.command(_name, cls=Command, help=help_of(_function), **_SETTINGS.get(_name, {}))(_function)
app.add_typer(zoo.app, name="zoo")


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
    if not issubclass(category, (FutureWarning, DeprecationWarning)):  # those are for programmers
        note(as_message(f"Warning: {message}"))


def main() -> None:
    """Entry point of the command `rlora`."""
    # Help and errors of usage have characters that some terminals don't.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # The line of code that raised a warning does not help users.
    warnings.showwarning = _show_warning
    quieten_libraries()
    app(prog_name="rlora", args=sys.argv[1:])
