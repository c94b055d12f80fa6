"""
The command `rlora`, in a separate package.

Importing `rlora_trl` registers R-LoRA with PEFT, which imports PyTorch and takes seconds. `--help` must not wait for
that, so each command imports the library inside its function.
"""

import os


# Environment variables that set how threads wait, in OpenMP, GCC's runtime, and LLVM's and Intel's.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")


def main() -> None:
    """Entry point of the command `rlora`."""
    wait_passively()
    from .app import main as run

    run()


def wait_passively() -> None:
    """
    Let OpenMP threads sleep while they wait for each other, in this process and in those that it starts.

    By default they spin. If another process needs one of their cores, a spinning thread takes time from the thread
    that it waits for, and a training step takes up to ten times as long. OpenMP reads its settings when PyTorch is
    imported, so call this before. Variables that the user has set are kept.
    """
    if not any(name in os.environ for name in _WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
