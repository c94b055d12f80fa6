"""`rlora train`: TRL's parser and accelerate's launcher, which runs `train_process.py` in each process."""

from __future__ import annotations

import logging
import os
import signal
from subprocess import CalledProcessError
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import DEBUG_VARIABLE
from .output import note
from .relay import Relay


if TYPE_CHECKING:
    from argparse import ArgumentParser


USAGE = "rlora train [--config FILE] --model_name_or_path MODEL --dataset_name DATA [--NAME VALUE ...]"
PROCESS = "rlora_cli.train_process"
# Settings of the command, which accepts any argument and passes it on.
SETTINGS: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
    "options_metavar": "[--NAME VALUE]...",
}


def train(
    context: typer.Context,
    help_all: Annotated[bool, typer.Option("--help-all", help="Show all arguments, about two hundred.")] = False,
) -> None:
    """Train an adapter on one or many tasks.

    The arguments are those of RLoraConfig, RLoraSFTConfig (with TRL's SFTConfig and transformers' TrainingArguments)
    and TRL's ModelConfig. Each can also be set in a YAML file; the command line takes precedence. The most used:

    \b
    --config FILE                  YAML file of arguments
    --model_name_or_path MODEL     base model: a folder or a name on the Hub
    --dataset_name DATA            a JSON-lines, Parquet or CSV file, a folder,
                                   or a name on the Hub
    --task_column COLUMN           column with the task of each row (task)
    --output_dir FOLDER            where to write the adapter
    --r, --num_heads N             rank of a head (4), number of heads (3)
    --learning_rate, --num_train_epochs, --per_device_train_batch_size
    --load_in_4bit                 quantize the base model to 4 bits (QLoRA)
    --score_rows N                 test rows of each task to score (25)
    --resume_from_checkpoint true  resume from the last checkpoint
    --push_to_hub, --hub_model_id  publish the adapter

    All other arguments are passed to `accelerate launch`:

    \b
    --num_processes N              number of processes, one for each GPU
    --accelerate_config NAME       file, multi_gpu, zero1, zero2, zero3 or fsdp2
    """
    parser = training_parser()
    if help_all:
        typer.echo(parser.format_help())
        return
    if not context.args:
        typer.echo(context.get_help())
        raise typer.Exit(2)

    launch_args, training_args = split_arguments(parser, context.args)
    if context.find_root().params.get("debug"):
        os.environ[DEBUG_VARIABLE] = "1"  # for the started processes
    launch(launch_args, training_args)


def training_parser() -> Any:
    """TRL's parser for the arguments of training, which must be written in full."""
    from rlora_trl.trainer.script import make_parser

    # An option of the launcher may be a prefix of one of these.
    return make_parser(prog="rlora train", usage=USAGE, allow_abbrev=False)


def split_arguments(parser: Any, arguments: list[str]) -> tuple[list[str], list[str]]:
    """
    Divide the command line between `accelerate launch` and the training program.

    Args:
        parser (`TrlParser`): The parser of the training program.
        arguments (`list[str]`): The command line.

    Returns:
        `tuple[list[str], list[str]]`: Arguments of the launcher, including those in the YAML file, and of the program.

    Raises:
        typer.BadParameter: If neither has an argument, or the model or the data is missing.
    """
    from accelerate.commands.launch import launch_command_parser

    # TRL's parser accepts `--config FILE` only as two words (no upstream issue as of trl 1.16).
    arguments = [
        part for word in arguments for part in (word.split("=", 1) if word.startswith("--config=") else [word])
    ]
    without_file, from_file = _apply_file(parser, arguments)
    parsed, remaining = parser.parse_known_args(without_file)
    launch_args = [*from_file, *remaining]
    _refuse_unknown(launch_args, parser, launch_command_parser())
    for name, what in (("model_name_or_path", "the base model"), ("dataset_name", "the data")):
        if getattr(parsed, name) is None:
            raise typer.BadParameter(f"`--{name}`, {what}, is missing.")
    return launch_args, _without(arguments, remaining)


def _apply_file(parser: Any, arguments: list[str]) -> tuple[list[str], list[str]]:
    """Apply a YAML file to the parser; returns the arguments without the file, and the file's for the launcher."""
    if "--config" not in arguments:
        return arguments, []
    import yaml

    index = arguments.index("--config")
    if index + 1 == len(arguments):
        raise typer.BadParameter("`--config` needs a YAML file after it.")
    path = arguments[index + 1]
    with open(path, encoding="utf-8") as file:
        values = yaml.safe_load(file)
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a YAML mapping of arguments, got {type(values).__name__}.")
    # The launcher reads some of them too, such as CUDA_VISIBLE_DEVICES.
    os.environ.update({name: str(value) for name, value in (values.pop("env", None) or {}).items()})
    return [*arguments[:index], *arguments[index + 2 :]], parser.set_defaults_with_config(**values)


def _refuse_unknown(launch_args: list[str], parser: ArgumentParser, launcher: ArgumentParser) -> None:
    from difflib import get_close_matches

    if launch_args and not launch_args[0].startswith("-"):
        hint = f" Did you mean `--config {launch_args[0]}`?" if launch_args[0].endswith((".yaml", ".yml")) else ""
        raise typer.BadParameter(f"Unexpected argument `{launch_args[0]}`.{hint}")
    accepted = {option for action in launcher._actions for option in action.option_strings} | {"--accelerate_config"}
    for word in launch_args:
        name = word.split("=", 1)[0]
        if not name.startswith("--") or name in accepted:
            continue
        options = [option for action in parser._actions for option in action.option_strings]
        close = get_close_matches(name, [*options, *accepted], n=1)
        hint = f" Did you mean `{close[0]}`?" if close else ""
        raise typer.BadParameter(f"No such argument: `{name}`.{hint} `rlora train --help-all` shows all.")


def _without(arguments: list[str], removed: list[str]) -> list[str]:
    """The arguments without some of them, which are in the same order."""
    rest = iter(removed)
    skipped = next(rest, None)
    remaining = []
    for word in arguments:
        if word == skipped:
            skipped = next(rest, None)
        else:
            remaining.append(word)
    return remaining


def with_defaults(launch_args: list[str]) -> list[str]:
    """
    Add the defaults of `accelerate launch`, which warns about each: one process for each GPU of this machine.

    Args:
        launch_args (`list[str]`): Arguments of the launcher. A configuration file, including the one that
            `accelerate config` writes, sets all of them.
    """
    from accelerate.commands.config.config_args import default_config_file

    names = {word.split("=", 1)[0].replace("-", "_") for word in launch_args if word.startswith("--")}
    if "__config_file" in names or os.path.isfile(default_config_file):
        return launch_args
    import torch

    devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 1
    values = {"num_processes": devices, "num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no"}
    missing = [(f"--{name}", str(value)) for name, value in values.items() if f"__{name}" not in names]
    return [*(word for pair in missing for word in pair), *launch_args]


def launch(launch_args: list[str], training_args: list[str]) -> None:
    """
    Run the training program through `accelerate launch`.

    Args:
        launch_args (`list[str]`): Arguments of the launcher; `--accelerate_config` may name one of TRL's files.
        training_args (`list[str]`): Arguments of the program.

    Raises:
        typer.Exit: If it fails, each process has reported its error; or a signal has stopped it, with 128 + the number
            of the signal.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    resolved = with_defaults(resolve_accelerate_config_argument(launch_args))
    words = [*resolved, "--module", PROCESS, *training_args]
    arguments = launch_command_parser().parse_args(words)
    # PyTorch's launcher (2.8 or later) leaves signals to the relay, as its own handler answers a second signal by
    # waiting another 30 seconds.
    arguments.signals_to_handle = "SIGQUIT"
    # It would log how it ends the other processes when one has failed, which reports its error itself.
    logging.getLogger(SignalException.__module__).setLevel(logging.CRITICAL)
    with Relay() as relay:
        try:
            launch_command(arguments)
        except (CalledProcessError, ChildFailedError, SignalException) as error:
            raise typer.Exit(_exit_code(error, relay.signal)) from error


def _exit_code(error: Any, received: int | None) -> int:
    """The exit code where a launcher of accelerate or of PyTorch has raised an error, after a signal or none."""
    if received is None:
        received = getattr(error, "sigval", None)
    if received is not None:
        return 128 + received
    code: int = error.returncode if hasattr(error, "returncode") else error.get_first_failure()[1].exitcode
    if code < 0:  # it could not report that itself
        name = signal.Signals(-code).name
        note(f"A training process was killed by {name}{', perhaps for lack of memory' if name == 'SIGKILL' else ''}.")
        return 128 - code
    return code if code > 128 else 1  # over 128: it was stopped by a signal of its own
