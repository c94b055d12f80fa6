"""Functions of tensors: the equations of R-LoRA, written once as a reference and once to be fast."""

from .balance import BALANCE_LOSSES, LayerProbe, RoutingTally, balance_loss, capture_loss_grad
from .compiled import compiled_multihead
from .dropout import draw_seed, draw_seed_tensor, keep_mask
from .fused import fused_multihead
from .multihead import multihead_delta
from .rank_space import routing_weights


__all__ = [
    "BALANCE_LOSSES",
    "LayerProbe",
    "RoutingTally",
    "capture_loss_grad",
    "balance_loss",
    "compiled_multihead",
    "draw_seed",
    "draw_seed_tensor",
    "fused_multihead",
    "keep_mask",
    "multihead_delta",
    "routing_weights",
]
