"""The memory that training takes, from a model's configuration alone."""

from .memory import CUDA_CONTEXT, STRATEGIES, MemoryEstimate, estimate_memory


__all__ = ["CUDA_CONTEXT", "STRATEGIES", "MemoryEstimate", "estimate_memory"]
