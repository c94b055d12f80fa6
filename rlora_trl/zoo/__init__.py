"""The zoo: find published adapters, compare them by task, load several on one base model, mix them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .compare import Comparison, compare
from .search import AdapterInfo, search, show


if TYPE_CHECKING:
    from .combine import load, mix


__all__ = ["AdapterInfo", "Comparison", "compare", "load", "mix", "search", "show"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: search and comparison read cards, and need no PyTorch.
    if name in ("load", "mix"):
        return getattr(import_module(".combine", __name__), name)
    if name in ("Manifest", "PinnedAdapter"):
        # Not an `AttributeError`, which `from rlora_trl.zoo import ...` would replace by one without this text.
        raise ImportError(
            f"`rlora_trl.zoo.{name}` was removed together with `zoo.yaml`. Pin an adapter to a commit with "
            "`pull_adapter(repo_id, revision=...)`, which checks it and returns its folder for `zoo.load`."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
