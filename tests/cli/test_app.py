"""The program itself: its help, its version, and how fast it starts."""

import subprocess
import sys
import time

import pytest
from processes import RLORA

from rlora_trl import __version__


COMMANDS = (
    *("train", "eval", "analyze", "estimate", "export", "convert", "card", "push", "pull", "env"),
    *("zoo", "zoo search", "zoo compare", "zoo show"),
)


HEAVY = ("rlora_trl", "torch", "transformers", "peft", "datasets", "trl", "accelerate", "matplotlib")


ALL_HELP = f"""
import sys
import rlora_cli
for words in {["--version", "--help", *(f"{command} --help" for command in COMMANDS)]!r}:
    sys.argv = ["rlora", *words.split()]
    try:
        rlora_cli.main()
    except SystemExit as end:
        assert not end.code, words
print(sorted(set({HEAVY!r}) & set(sys.modules)))
"""


def test_help_and_version_import_neither_the_library_nor_pytorch():
    done = subprocess.run([sys.executable, "-c", ALL_HELP], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stdout + done.stderr
    assert done.stdout.count("Usage: rlora") == 1 + len(COMMANDS)


def test_help_is_quick():
    # Half a second on a free core; with PyTorch it would be several.
    def seconds():
        start = time.perf_counter()
        done = subprocess.run([*RLORA, "--help"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "Usage: rlora" in done.stdout, done.stderr
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 2.5


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(rlora, command):
    result = rlora(*command.split(), "-h")
    assert result.exit_code == 0
    assert f"rlora {command}" in result.stdout
    assert "<bool>" not in result.stdout


def test_version(rlora):
    assert rlora("--version").stdout == f"rlora-trl {__version__}\n"


def test_wrong_usage_is_shown_with_the_usage(rlora):
    result = rlora("eval", "folder")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Missing option '--data'" in result.stderr and "Usage: rlora eval" in result.stderr
    assert rlora("evaluate").exit_code == 2
