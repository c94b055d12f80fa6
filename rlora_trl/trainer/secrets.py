"""Leaves tokens and passwords out of what a run writes and reports."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any, TypeVar


# Names of values; `pad_token` and `eos_token` are none.
_SECRET_NAME = re.compile(
    r"^token$|(^|_)(auth|access|api|hub|hf|read|write|bearer)_?token$|(api|access|private)_?key|passw|secret|credential",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_Args = TypeVar("_Args")


def mask_secrets(value: Any, name: str = "") -> Any:
    """A copy of nested dictionaries and lists in which secrets are replaced, such as a `token` by `"<TOKEN>"`."""
    if isinstance(value, Mapping):
        return {key: mask_secrets(entry, str(key)) for key, entry in value.items()}
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(mask_secrets(entry, name) for entry in value)
    if isinstance(value, str) and (_SECRET_NAME.search(name) or _SECRET_VALUE.search(value)):
        return f"<{name.upper()}>"
    return value


def without_secrets(args: _Args) -> _Args:
    """A copy of training arguments in which tokens are `None`, and secrets in dictionaries are masked."""
    kept = copy.copy(args)
    for name, value in vars(args).items():
        if isinstance(value, str) and _SECRET_NAME.search(name):
            vars(kept)[name] = None
        elif isinstance(value, str | Mapping | list | tuple):
            vars(kept)[name] = mask_secrets(value, name)
    return kept
