"""One process of `rlora train`, started by accelerate: `python -m rlora_cli.train_process`."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from shlex import quote


def run(arguments: list[str]) -> None:
    """Train as the arguments say, and print the scores."""
    from rlora_trl.trainer import script

    from .output import note, print_text
    from .train import training_parser

    # Arguments of the launcher in the file are ignored: `rlora train` has checked them.
    parsed = training_parser().parse_args_and_config(arguments, fail_with_unknown_args=False)
    script_args, training_args, model_args, rlora_args = parsed
    data = script.load_data(script_args, training_args)
    result = script.train(model_args.model_name_or_path, data, training_args, model_args, rlora_args)
    if result.trainer.accelerator.is_main_process:
        print_text(result.describe())
        folder = training_args.output_dir
        note(f"\nTo share it:\n\n    rlora card {quote(folder)} --write\n    rlora push {quote(folder)} user/name")


# Seconds from one look at the launcher to the next, and from SIGTERM to SIGKILL, as in PyTorch's launcher.
_LOOK, _GRACE = 1.0, 30.0


def stop_with(launcher: int) -> None:
    """Stop as by SIGTERM when the launcher, the parent of this process, has been killed."""
    while os.getppid() == launcher:
        time.sleep(_LOOK)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE)
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))


def main() -> int:
    """Run, and turn errors into messages; returns the exit code."""
    # Imported here, so that SIGINT has its own handler before; see below.
    from .errors import INTERRUPTED, quieten_libraries, report
    from .terminal import guarded_streams

    quieten_libraries()
    try:
        with guarded_streams():
            run(sys.argv[1:])
    except SystemExit as stopped:
        # Returned, so that workers of data loaders end with what the traceback keeps alive.
        return stopped.code if isinstance(stopped.code, int) else 1
    except KeyboardInterrupt:
        return INTERRUPTED  # reported by `rlora train`, which is interrupted too
    except Exception as error:
        return report(error)
    return 0


if __name__ == "__main__":
    # Before training there is nothing to finish, and no traceback to show. (A job in the background ignores SIGINT.)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=stop_with, args=(os.getppid(),), daemon=True).start()
    sys.exit(main())
