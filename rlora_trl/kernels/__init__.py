"""Functions of tensors: the equations of R-LoRA, written once as a reference and once to be fast."""

from .balance import LayerProbe, RoutingStats, RoutingTally, capture_loss_grad
from .compiled import compiled_multihead
from .dropout import draw_seed, draw_seed_tensor, keep_mask
from .multihead import multihead_delta
from .rank_space import mean_of_heads, routing_weights
from .reference import BALANCE_LOSSES, balance_loss


__all__ = [
    "BALANCE_LOSSES",
    "LayerProbe",
    "RoutingStats",
    "RoutingTally",
    "balance_loss",
    "capture_loss_grad",
    "compiled_multihead",
    "draw_seed",
    "draw_seed_tensor",
    "keep_mask",
    "mean_of_heads",
    "multihead_delta",
    "routing_weights",
]
