"""Which layers' own products may be computed together with the delta."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
from transformers.pytorch_utils import Conv1D

from ..kernels.four_bit import dequantize


# Where it saves memory traffic. (On a CPU, the tests.)
JOINED_DEVICES = {"cuda"}
# A subclass may do anything with the operations of the function.
JOINED_TYPES: set[type] = {torch.Tensor, nn.Parameter}
# Of all modules. (Newer versions of PyTorch have a function for this, 2.6 has not.)
_GLOBAL_HOOKS = (_global_forward_hooks, _global_forward_pre_hooks, _global_backward_hooks, _global_backward_pre_hooks)


class QuantizedWeight:
    """
    A 4-bit weight of bitsandbytes, which is dequantized for each product.

    Args:
        parameter (`bitsandbytes.nn.Params4bit`): The parameter.
        dtype (`torch.dtype`): Of the products.
    """

    def __init__(self, parameter: Any, dtype: torch.dtype) -> None:
        self.parameter, self.dtype = parameter, dtype
        self.shape: torch.Size = torch.Size(parameter.quant_state.shape)
        self.device: torch.device = parameter.device

    def dense(self) -> torch.Tensor:
        """The weight, `[d_out, d_in]`."""
        # Without the class: every operation on a `Params4bit` passes through its `__torch_function__`.
        return dequantize(self.parameter.data, self.parameter.quant_state, self.dtype)


class FrozenProduct(NamedTuple):
    """
    A layer as a product that needs no call of it.

    Args:
        weight (`torch.Tensor` or [`QuantizedWeight`] of shape `[d_out, d_in]`): Its weight.
        bias (`torch.Tensor` of shape `[d_out]`, *optional*): Its bias.
    """

    weight: torch.Tensor | QuantizedWeight
    bias: torch.Tensor | None


def owns_output(layer: nn.Module) -> bool:
    """Whether nothing else refers to the output of a layer, so that it may be overwritten."""
    if torch.compiler.is_compiling():
        return False  # the compiler plans memory
    return type(layer) in (nn.Linear, Conv1D) and not is_hooked(layer)


def is_hooked(layer: nn.Module) -> bool:
    """Whether a call of a module runs more than its class says."""
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or "forward" in layer.__dict__
    )


def may_join(x: torch.Tensor) -> bool:
    """Whether nothing but the device keeps products of `x` from running together with deltas in training."""
    return type(x) in JOINED_TYPES and not any(_GLOBAL_HOOKS)  # which calls of the layers would run


def product_dtype(x: torch.Tensor, device_type: str | None = None) -> torch.dtype:
    """The dtype of products of `x` here: that of autocast, or its own. To ask `x` for its device takes time."""
    device_type = device_type or x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


def frozen_product(layer: nn.Module, x: torch.Tensor) -> FrozenProduct | None:
    """
    The product of a layer, if it may be computed together with the delta.

    The weight must be frozen, whole, and in the dtype of the products or 4-bit.

    Args:
        layer (`torch.nn.Module`): The base layer.
        x (`torch.Tensor` of shape `[..., d_in]`): Its input.

    Returns:
        [`FrozenProduct`], or `None` if the layer must be called: it has hooks, is quantized in another way, sharded
        (DeepSpeed ZeRO-3; FSDP2 has gathered it by now) or trained.
    """
    if x.device.type not in JOINED_DEVICES or not may_join(x) or is_hooked(layer):
        return None
    # From the dictionary, as `nn.Module.__getattr__` is slow, and as it holds parameters only.
    parameters, dtype = layer._parameters, product_dtype(x)
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if weight is None or not (bias is None or (_is_frozen(bias, x) and bias.dtype == dtype)):
        return None
    if type(layer) is nn.Linear:
        fits = _is_frozen(weight, x) and weight.dtype == dtype and weight.ndim == 2
        return FrozenProduct(weight, bias) if fits else None
    if _is_4bit(layer, x, dtype):
        quantized = QuantizedWeight(weight, dtype)
        # A square weight may have been quantized from its transpose, which bitsandbytes treats like this too.
        return FrozenProduct(quantized, bias) if quantized.shape[-1] == x.shape[-1] else None
    return None


def _is_frozen(parameter: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether a parameter is whole, frozen and on the device of `x`."""
    return (
        type(parameter) is nn.Parameter
        and not parameter.requires_grad
        and parameter.device == x.device
        and "ds_id" not in vars(parameter)
    )


def _is_4bit(layer: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a layer is a frozen `bitsandbytes.nn.Linear4bit` that computes in a dtype on the device of `x`."""
    kind, weight = type(layer), layer._parameters["weight"]
    if kind.__name__ != "Linear4bit" or not kind.__module__.startswith("bitsandbytes.") or weight is None:
        return False
    state = getattr(weight, "quant_state", None)
    return (
        type(weight).__name__ == "Params4bit"
        and state is not None
        and not getattr(state, "packing_format_for_cpu", False)
        and len(state.shape) == 2
        and layer.compute_dtype in (None, dtype)
        and x.dtype == dtype  # the dtype of its output
        and not weight.requires_grad
        and weight.device == x.device
        and "ds_id" not in vars(weight)
    )
