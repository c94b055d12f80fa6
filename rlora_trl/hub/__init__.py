"""Adapters on the Hub: push, pull, cards, and the checks before anything is used."""

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
