"""`rlora lm-eval`: EleutherAI's lm-evaluation-harness, which can load adapters of this package then."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

import typer


# All arguments are the harness's own, `--help` too.
SETTINGS: dict[str, Any] = {
    "context_settings": {
        "allow_extra_args": True,
        "allow_interspersed_args": False,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
    "options_metavar": "ARGUMENTS...",
}


def lm_eval(context: typer.Context) -> None:
    """Run EleutherAI's lm-evaluation-harness on a model or an adapter.

    The command `lm-eval` itself can't load an adapter of R-LoRA, as nothing registers the method with PEFT. All
    arguments are passed to it unchanged.
    """
    if find_spec("lm_eval") is None:
        raise ImportError(
            "`rlora lm-eval` needs EleutherAI's lm-evaluation-harness, which is not installed. Install it with "
            "`pip install rlora-trl[lm-eval]`."
        )
    import rlora_trl  # noqa: F401  (registers R-LoRA with PEFT)

    from lm_eval.__main__ import cli_evaluate  # isort: skip

    before, sys.argv = sys.argv, ["lm-eval", *context.args]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
