"""4-bit weights of bitsandbytes, for products that need no call of their layer."""

from typing import Any

import torch

from . import rank_space
from .fused import backend


def dequantize(packed: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """
    A weight in `dtype`: with one launch where `fused.backend` chooses Triton, else with bitsandbytes.

    Double quantization takes bitsandbytes three launches and several layers of Python, and short steps wait for the
    host. The values are the same, bit for bit.

    Args:
        packed (`torch.Tensor`): Two values in each byte, of any storage dtype; not a subclass.
        state (`bitsandbytes.functional.QuantState`): How it was quantized.
        dtype (`torch.dtype`): Of the result.

    Returns:
        `torch.Tensor` of shape `state.shape`.
    """
    if backend(packed.device, dtype) is not rank_space:
        from . import triton_four_bit  # Triton may be missing elsewhere

        found = triton_four_bit.dequantize(packed, state, dtype)
        if found is not None:
            return found

    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(packed, state).to(dtype)
