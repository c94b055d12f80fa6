"""The zoo: find published adapters, compare them by task, load several on one base model, mix them."""

from typing import Any

from .combine import load, mix
from .compare import Comparison, compare
from .search import AdapterInfo, search, show


__all__ = ["AdapterInfo", "Comparison", "compare", "load", "mix", "search", "show"]


def __getattr__(name: str) -> Any:
    if name in ("Manifest", "PinnedAdapter"):
        # Not an `AttributeError`, which `from rlora_trl.zoo import ...` would replace by one without this text.
        raise ImportError(
            f"`rlora_trl.zoo.{name}` was removed together with `zoo.yaml`. Pin an adapter to a commit with "
            "`pull_adapter(repo_id, revision=...)`, which checks it and returns its folder for `zoo.load`."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
