"""Adapters on the Hub: push, pull, cards, and the checks before anything is used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ..files.checks import AdapterCheckError, CheckedAdapter, adapter_digest, check_adapter
    from ..files.record import AdapterRecord, TaskRecord
    from .pull import pull_adapter
    from .push import push_adapter


__all__ = [
    "AdapterCheckError",
    "AdapterRecord",
    "CheckedAdapter",
    "TaskRecord",
    "adapter_digest",
    "check_adapter",
    "pull_adapter",
    "push_adapter",
]

# Loaded on first use: file names and records are wanted where PyTorch is not.
_MODULES = {
    **dict.fromkeys(("AdapterCheckError", "CheckedAdapter", "adapter_digest", "check_adapter"), "..files.checks"),
    **dict.fromkeys(("AdapterRecord", "TaskRecord"), "..files.record"),
    "pull_adapter": ".pull",
    "push_adapter": ".push",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
