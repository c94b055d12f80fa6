"""Adapters on the Hub: push, pull and cards, with the checks of an adapter's files."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ..files.checks import AdapterCheckError, CheckedAdapter, adapter_digest, check_adapter
    from ..files.record import AdapterRecord, TaskRecord
    from ..publish import push_adapter
    from .pull import pull_adapter


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

# Loaded on first use, so that file names and records don't need PyTorch.
_MODULES = {
    **dict.fromkeys(("AdapterCheckError", "CheckedAdapter", "adapter_digest", "check_adapter"), "..files.checks"),
    **dict.fromkeys(("AdapterRecord", "TaskRecord"), "..files.record"),
    "pull_adapter": ".pull",
    "push_adapter": "..publish",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
