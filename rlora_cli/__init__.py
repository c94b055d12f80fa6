"""The command `rlora`, beside the library and not in it.

`import rlora_trl` registers R-LoRA with PEFT, which imports PyTorch and takes seconds. The command's `--help` must not
wait for that, so only while `main` imports the commands does the library skip the registration. A command that needs
a model imports `rlora_trl.tuner`, which registers.
"""

# Read by `rlora_trl/__init__.py`.
imports_commands = False


def main() -> None:
    """Entry point of the command `rlora`."""
    global imports_commands
    imports_commands = True
    try:
        from rlora_trl.cli.app import main as run
    finally:
        imports_commands = False

    run()
