"""The installed command for processes of their own, where it may not be installed."""

import sys


PROGRAM = [sys.executable, "-c", "import sys; sys.argv[0] = 'rlora'; from rlora_trl.cli import main; main()"]
