"""Functions of tensors: the equations of R-LoRA, written once as a reference and once to be fast."""

from .dropout import draw_seed, keep_mask
from .multihead import multihead_delta, routing_weights


__all__ = ["draw_seed", "keep_mask", "multihead_delta", "routing_weights"]
