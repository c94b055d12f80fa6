"""One process of `rlora train`, started by accelerate: `python -m rlora_cli.train_process`."""

from __future__ import annotations

import sys
from shlex import quote

from .errors import INTERRUPTED, quieten_libraries, report
from .output import note, print_text
from .terminal import guarded_streams
from .train import training_parser


def run(arguments: list[str]) -> None:
    """Train as the arguments say, and print the scores."""
    from rlora_trl.trainer import script

    # Arguments of the launcher in the file are ignored: `rlora train` has checked them.
    parsed = training_parser().parse_args_and_config(arguments, fail_with_unknown_args=False)
    script_args, training_args, model_args, rlora_args = parsed
    data = script.load_data(script_args, training_args)
    result = script.train(model_args.model_name_or_path, data, training_args, model_args, rlora_args)
    if result.trainer.accelerator.is_main_process:
        print_text(result.describe())
        folder = training_args.output_dir
        note(f"\nTo share it:\n\n    rlora card {quote(folder)} --write\n    rlora push {quote(folder)} user/name")


@guarded_streams()
def main() -> int:
    """Run, and turn errors into messages; returns the exit code."""
    quieten_libraries()
    try:
        run(sys.argv[1:])
    except KeyboardInterrupt:
        return INTERRUPTED  # reported by `rlora train`, which is interrupted too
    except Exception as error:
        return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
