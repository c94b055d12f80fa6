"""The zoo: find published adapters, compare them by task, load several on one base model, pin a set of them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .compare import Comparison, compare
from .search import AdapterInfo, search, show


if TYPE_CHECKING:
    from .combine import load, mix
    from .manifest import Manifest, PinnedAdapter


__all__ = ["AdapterInfo", "Comparison", "Manifest", "PinnedAdapter", "compare", "load", "mix", "search", "show"]

# Loaded on first use: search and comparison read cards, and need no PyTorch.
_MODULES = {"load": ".combine", "mix": ".combine", "Manifest": ".manifest", "PinnedAdapter": ".manifest"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
