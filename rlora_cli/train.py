"""`rlora train`: TRL's parser, accelerate's launcher, and in each process `train_process.py`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import DEBUG_VARIABLE
from .options import Command, help_of


if TYPE_CHECKING:
    from argparse import ArgumentParser


USAGE = "rlora train [--config FILE] --model_name_or_path MODEL --dataset_name DATA [--NAME VALUE ...]"
PROCESS = "rlora_cli.train_process"


def register(app: typer.Typer) -> None:
    """Add the command."""
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    layout: dict[str, Any] = {"cls": Command, "options_metavar": "[--NAME VALUE]..."}
    app.command("train", help=help_of(train), context_settings=settings, **layout)(train)


def train(
    context: typer.Context,
    help_all: Annotated[
        bool, typer.Option("--help-all", help="Show all arguments, of which there are some two hundred.")
    ] = False,
) -> None:
    """Train an adapter on one or many tasks.

    Arguments are those of RLoraConfig, RLoraSFTConfig (TRL's SFTConfig and transformers' TrainingArguments with it)
    and TRL's ModelConfig. Each may stand in a YAML file too, and the command line overrides the file. The most used:

    \b
    --config FILE                  YAML file of arguments
    --model_name_or_path MODEL     base model: a folder or a name on the Hub
    --dataset_name DATA            a JSON-lines, Parquet or CSV file, a folder,
                                   or a name on the Hub
    --task_column COLUMN           column that names the task of a row (task)
    --output_dir FOLDER            where the adapter is written
    --r, --num_heads N             rank of a head (4), number of heads (3)
    --learning_rate, --num_train_epochs, --per_device_train_batch_size
    --load_in_4bit                 train on a 4-bit base (QLoRA)
    --score_rows N                 test rows of each task to score (25)
    --resume_from_checkpoint true  go on from the last checkpoint
    --push_to_hub, --hub_model_id  publish the adapter

    What else there is goes to `accelerate launch`:

    \b
    --num_processes N              processes, one for each GPU
    --accelerate_config NAME       a file, multi_gpu, zero1, zero2, zero3, fsdp2
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
        os.environ[DEBUG_VARIABLE] = "1"  # for the processes that are started
    launch(launch_args, training_args)


def training_parser() -> Any:
    """TRL's parser of the training program's arguments, which must be written in full."""
    from rlora_trl.trainer.script import make_parser

    # An option of the launcher may be how one of ours begins.
    return make_parser(prog="rlora train", usage=USAGE, allow_abbrev=False)


def split_arguments(parser: Any, arguments: list[str]) -> tuple[list[str], list[str]]:
    """
    Part the command line between `accelerate launch` and the training program.

    Args:
        parser (`TrlParser`): Knows what belongs to the training program.
        arguments (`list[str]`): What was typed.

    Returns:
        `tuple[list[str], list[str]]`: Arguments of the launcher, also those in the YAML file, and of the program.

    Raises:
        typer.BadParameter: If an argument is of neither, or the model or the data is missing.
    """
    from accelerate.commands.launch import launch_command_parser

    # TRL's parser takes `--config FILE` in two words only (no upstream issue as of trl 1.16).
    arguments = [part for word in arguments for part in _split_config(word)]
    own, from_file = _apply_file(parser, arguments)
    known, remaining = parser.parse_known_args(own)
    launch_args = [*from_file, *remaining]
    _refuse_unknown(launch_args, parser, launch_command_parser())
    for name, what in (("model_name_or_path", "the base model"), ("dataset_name", "the data")):
        if getattr(known, name) is None:
            raise typer.BadParameter(f"`--{name}`, {what}, is missing.")
    return launch_args, _without(arguments, remaining)


def _split_config(word: str) -> list[str]:
    return word.split("=", 1) if word.startswith("--config=") else [word]


def _apply_file(parser: Any, arguments: list[str]) -> tuple[list[str], list[str]]:
    """Give the parser the defaults of a YAML file; the arguments without it, and what the launcher is to get."""
    if "--config" not in arguments:
        return arguments, []
    import yaml

    place = arguments.index("--config")
    if place + 1 == len(arguments):
        raise typer.BadParameter("`--config` needs a YAML file after it.")
    path = arguments[place + 1]
    with open(path, encoding="utf-8") as file:
        values = yaml.safe_load(file)
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a YAML mapping of arguments, got {type(values).__name__}.")
    # Set here already, as the launcher heeds some, such as CUDA_VISIBLE_DEVICES.
    os.environ.update({name: str(value) for name, value in (values.pop("env", None) or {}).items()})
    return [*arguments[:place], *arguments[place + 2 :]], parser.set_defaults_with_config(**values)


def _refuse_unknown(launch_args: list[str], parser: ArgumentParser, launcher: ArgumentParser) -> None:
    from difflib import get_close_matches

    if launch_args and not launch_args[0].startswith("-"):
        hint = f" Did you mean `--config {launch_args[0]}`?" if launch_args[0].endswith((".yaml", ".yml")) else ""
        raise typer.BadParameter(f"Unexpected argument `{launch_args[0]}`.{hint}")
    launchers = {option for action in launcher._actions for option in action.option_strings}
    for word in launch_args:
        name = word.split("=", 1)[0]
        if not name.startswith("--") or name in launchers or name == "--accelerate_config":
            continue
        options = [option for action in parser._actions for option in action.option_strings]
        close = get_close_matches(name, [*options, *launchers, "--accelerate_config"], n=1)
        hint = f" Did you mean `{close[0]}`?" if close else ""
        raise typer.BadParameter(f"No such argument: `{name}`.{hint} `rlora train --help-all` shows all.")


def _without(arguments: list[str], removed: list[str]) -> list[str]:
    """The arguments less a part of them, which is in the same order."""
    rest, kept = list(removed), []
    for word in arguments:
        if rest and word == rest[0]:
            rest.pop(0)
        else:
            kept.append(word)
    return kept


def with_defaults(launch_args: list[str]) -> list[str]:
    """
    Add what `accelerate launch` chooses by itself, which it would tell at length: a process for each GPU of this
    machine and nothing else.

    Args:
        launch_args (`list[str]`): Arguments of the launcher. A configuration file has all of them, also the one that
            `accelerate config` has written.
    """
    from accelerate.commands.config.config_args import default_config_file

    given = {word.split("=", 1)[0].replace("-", "_") for word in launch_args if word.startswith("--")}
    if "__config_file" in given or os.path.isfile(default_config_file):
        return launch_args
    import torch

    devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 1
    values = {"num_processes": devices, "num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no"}
    missing = [(f"--{name}", str(value)) for name, value in values.items() if f"__{name}" not in given]
    return [*(word for pair in missing for word in pair), *launch_args]


def launch(launch_args: list[str], training_args: list[str]) -> None:
    """
    Run the training program through `accelerate launch`.

    Args:
        launch_args (`list[str]`): Arguments of the launcher; `--accelerate_config` names one of TRL's files.
        training_args (`list[str]`): Arguments of the program.

    Raises:
        typer.Exit: If it fails; each process has said why.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    resolved = with_defaults(resolve_accelerate_config_argument(launch_args))
    # A failing process tells the error itself; `--quiet` keeps the launcher from adding its own traceback.
    words = [*resolved, "--quiet", "--module", PROCESS, *training_args]
    try:
        launch_command(launch_command_parser().parse_args(words))
    except ChildFailedError as error:
        raise typer.Exit(1) from error
