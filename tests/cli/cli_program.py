"""The installed command for processes of their own, where it may not be installed."""

import sys


PROGRAM = [sys.executable, "-c", "from rlora_cli import main; main()"]
