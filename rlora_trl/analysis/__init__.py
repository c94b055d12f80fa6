"""What an adapter has learned: how alike its heads are, and which ones each task uses."""

from .figures import plot_head_similarity, plot_routing
from .heads import head_similarities, mean_similarity
from .mixtures import HeadMixtures, measure_mixtures


__all__ = [
    "HeadMixtures",
    "head_similarities",
    "mean_similarity",
    "measure_mixtures",
    "plot_head_similarity",
    "plot_routing",
]
