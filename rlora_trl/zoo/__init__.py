"""The zoo: find published adapters, compare them by task, load several on one base model, pin a set of them."""

from .combine import load, mix
from .compare import Comparison, compare
from .manifest import Manifest, PinnedAdapter
from .search import AdapterInfo, search, show


__all__ = ["AdapterInfo", "Comparison", "Manifest", "PinnedAdapter", "compare", "load", "mix", "search", "show"]
