"""What an adapter has learned: how alike its heads are, and which ones each task uses."""

from .figures import plot_head_similarity, plot_routing
from .heads import head_similarities, mean_similarity
from .measuring import HeadWeights, measure_head_weights


__all__ = [
    "HeadWeights",
    "head_similarities",
    "mean_similarity",
    "measure_head_weights",
    "plot_head_similarity",
    "plot_routing",
]
