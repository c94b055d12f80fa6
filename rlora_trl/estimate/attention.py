"""The memory of fused attention, which saves queries, keys, values, output, and one number for each row of scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface


# Transformers builds masks for known implementations only; building one would read values.
ATTENTION = "rlora_memory"


class _FusedAttention(torch.autograd.Function):
    """The memory of PyTorch's scaled-dot-product attention and of FlashAttention; it computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        batch, heads, length, _ = query.shape
        out = query.new_empty(batch, length, heads, value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(batch, heads, length, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return _FusedAttention.apply(query, key, value), None


AttentionInterface.register(ATTENTION, _attend)
