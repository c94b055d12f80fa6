"""What an adapter has learned: how alike its heads are, and which ones each task uses."""

from ..files.head_weights import HeadWeights
from .figures import plot_head_similarity, plot_routing
from .heads import head_similarities, mean_similarity
from .measuring import measure_head_weights


__all__ = [
    "HeadWeights",
    "head_similarities",
    "mean_similarity",
    "measure_head_weights",
    "plot_head_similarity",
    "plot_routing",
]
