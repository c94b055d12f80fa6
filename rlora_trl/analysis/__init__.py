"""What an adapter has learned: how similar its heads are, which ones each task uses, and how much it changes."""

import warnings
from typing import Any

from ..files.head_weights import HeadWeights
from .figures import plot_head_similarity, plot_routing
from .heads import head_similarities, mean_similarity
from .measuring import measure_head_weights
from .ranks import effective_ranks
from .report import write_report


__all__ = [
    "HeadWeights",
    "effective_ranks",
    "head_similarities",
    "mean_similarity",
    "measure_head_weights",
    "plot_head_similarity",
    "plot_routing",
    "write_report",
]

_RENAMED = {"HeadMixtures": "HeadWeights", "measure_mixtures": "measure_head_weights"}


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = _RENAMED[name]
    warnings.warn(
        f"`rlora_trl.analysis.{name}` is now called `{new}`, and will be removed in version 0.2. Use the new name.",
        FutureWarning,
        stacklevel=2,
    )
    # An import statement looks the name up twice, and warns once.
    return globals().setdefault(name, globals()[new])
