"""The command `rlora`, beside the library and not in it.

`import rlora_trl` registers R-LoRA with PEFT, which imports PyTorch and takes seconds. The command's `--help` must not
wait for that, so only while `main` imports the commands does the library skip the registration. A command that needs
a model imports `rlora_trl.tuner`, which registers.
"""

import os
import sys
from importlib import import_module


# Read by `rlora_trl/__init__.py`.
imports_commands = False

# By which users choose how threads wait: of OpenMP, of GCC's runtime, and of LLVM's and Intel's.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")


def main() -> None:
    """Entry point of the command `rlora`."""
    global imports_commands
    wait_passively()
    imports_commands = True
    try:
        from .app import main as run
    finally:
        imports_commands = False

    try:
        run()
    finally:
        _register()


def _register() -> None:
    """Register in a process that goes on and has PyTorch already, such as a notebook: that takes no time there."""
    if "torch" in sys.modules:
        try:
            import_module("rlora_trl.tuner")
        except ImportError:
            pass  # of a broken installation, which `rlora env` describes: what is imported later says so


def wait_passively() -> None:
    """
    Have threads of OpenMP sleep while they wait for each other, in this process and those that it starts.

    By default they spin. As soon as another process has a core of theirs, a thread that spins takes its time from the
    one that it waits for, and a training step takes up to ten times as long. OpenMP reads its settings when PyTorch is
    imported: call this before. What the user has set stays.
    """
    if not any(name in os.environ for name in _WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
