"""Adapters on the Hub: pull and cards, with the checks of an adapter's files. `rlora_trl.push_adapter` publishes."""

from ..files.checks import AdapterCheckError, CheckedAdapter, adapter_digest, check_adapter
from ..files.record import AdapterRecord, TaskRecord
from .pull import pull_adapter


__all__ = [
    "AdapterCheckError",
    "AdapterRecord",
    "CheckedAdapter",
    "TaskRecord",
    "adapter_digest",
    "check_adapter",
    "pull_adapter",
]
