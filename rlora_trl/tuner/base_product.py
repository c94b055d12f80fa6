"""Which layers' own products may be computed together with the delta."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


# Where it saves memory traffic. (On a CPU, the tests.)
JOINED_DEVICES = {"cuda"}


class FrozenProduct(NamedTuple):
    """
    A layer as a product that needs no call of it.

    Args:
        weight (`torch.Tensor` of shape `[d_out, d_in]`): Its weight.
        bias (`torch.Tensor` of shape `[d_out]`, *optional*): Its bias.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None


def owns_output(layer: nn.Module) -> bool:
    """Whether nothing else refers to the output of a layer, so that it may be overwritten."""
    if torch.compiler.is_compiling():
        return False  # the compiler plans memory
    return type(layer) in (nn.Linear, Conv1D) and not is_hooked(layer)


def is_hooked(layer: nn.Module) -> bool:
    """Whether a call of a module runs more than its class says."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))


def joins_products(x: torch.Tensor) -> bool:
    """Whether products of `x` run together with deltas: in training on a GPU."""
    return x.device.type in JOINED_DEVICES and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def frozen_product(layer: nn.Module, x: torch.Tensor) -> FrozenProduct | None:
    """
    The product of a layer, if it may be computed together with the delta.

    The weight must be frozen, whole and in the dtype of the products.

    Args:
        layer (`torch.nn.Module`): The base layer.
        x (`torch.Tensor` of shape `[..., d_in]`): Its input.

    Returns:
        [`FrozenProduct`], or `None` if the layer must be called: it has hooks, is quantized, sharded (DeepSpeed
        ZeRO-3; FSDP2 has gathered it by now) or trained, or `torch.compile` runs.
    """
    if type(layer) is not nn.Linear or not joins_products(x):
        return None
    # From the dictionary, as `nn.Module.__getattr__` is slow, and as it holds parameters only.
    parameters = layer._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    if not _is_frozen(weight, dtype, x) or not (bias is None or _is_frozen(bias, dtype, x)):
        return None
    if weight is None or weight.ndim != 2 or is_hooked(layer) or layer._backward_hooks:
        return None
    return FrozenProduct(weight, bias)


def _is_frozen(parameter: torch.Tensor | None, dtype: torch.dtype, x: torch.Tensor) -> bool:
    """Whether a parameter is whole, frozen, in a dtype and on the device of `x`."""
    return (
        type(parameter) is nn.Parameter
        and not parameter.requires_grad
        and parameter.dtype == dtype
        and parameter.device == x.device
        and "ds_id" not in vars(parameter)
    )
