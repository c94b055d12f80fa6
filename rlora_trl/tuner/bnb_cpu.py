"""
The one home of a workaround: 4-bit weights that bitsandbytes reorders on some CPUs.

For inference on a CPU with AVX512-BF16, bitsandbytes (0.50) brings 4-bit weights into another order. In that order no
gradient flows. It restores the first order only when the state dict is read, which PEFT does at every save; the
restored scales are rounded, and without double quantization they stay in the other order. All of this exists since
bitsandbytes#1804. No upstream issue as of 0.50.2 (bitsandbytes#2078, with the fix #2083, is about the same order in
`to`); remove this module when a release restores weights bit for bit and trains after inference.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn


# Attribute of a 4-bit layer on a CPU that holds its scales as they were stored.
_STORED_SCALES = "_rlora_stored_scales"


def _is_reordered(layer: nn.Module) -> bool:
    return bool(getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False))


def undo_cpu_order(layer: nn.Module) -> None:
    """
    Restore the order of 4-bit weights that dequantization and the backward pass expect.

    Scales come back bit for bit where [`guard_cpu_order`] stored them. Other layers are left alone.
    """
    quant_state = getattr(getattr(layer, "weight", None), "quant_state", None)
    if quant_state is None:
        return

    # bitsandbytes restores the weight when the state dict is read, and rounds the scales.
    if _is_reordered(layer):
        layer._save_to_state_dict({}, "", False)
        stored = vars(layer).get(_STORED_SCALES)
        if stored is not None:
            vars(quant_state).clear()
            vars(quant_state).update(stored)

    # Scales that it leaves in the other order are two-dimensional.
    absmax = getattr(quant_state, "absmax", None)
    if absmax is not None and absmax.ndim == 2:
        quant_state.absmax = absmax.T.reshape(-1).float()


def _before_forward(layer: nn.Module, args: tuple) -> None:
    if not _is_reordered(layer):
        # A shallow copy is enough: bitsandbytes replaces these tensors and does not write into them.
        quant_state = getattr(layer.weight, "quant_state", None)
        vars(layer)[_STORED_SCALES] = None if quant_state is None else dict(vars(quant_state))
    elif layer.training or (torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in args)):
        undo_cpu_order(layer)


def _before_state_dict(layer: nn.Module, prefix: str, keep_vars: bool) -> None:
    if _is_reordered(layer):
        undo_cpu_order(layer)


def guard_cpu_order(model: nn.Module) -> None:
    """Make the 4-bit layers of a model on a CPU train after inference, and save as they were stored, bit for bit."""
    for layer in model.modules():
        if not hasattr(layer, "support_avx512bf16_for_cpu") or _before_forward in layer._forward_pre_hooks.values():
            continue
        if layer.weight.device.type == "cpu":
            vars(layer)[_STORED_SCALES] = None
            layer.register_forward_pre_hook(_before_forward)
            layer.register_state_dict_pre_hook(_before_state_dict)


@contextmanager
def kept_quantized(model: nn.Module) -> Generator[None, None, None]:
    """Restore the quantized weights of a model at the end of a `with` block, whatever order they are in by then."""
    saved = []
    for module in model.modules():
        weight = getattr(module, "weight", None) if "weight" in module._parameters else None
        state = getattr(weight, "quant_state", None)
        if weight is not None and state is not None:
            saved.append((module, weight, weight.data, state, dict(vars(state)), getattr(module, "quant_state", None)))

    try:
        yield
    finally:
        for module, weight, data, state, values, layer_state in saved:
            weight.data, weight.quant_state = data, state
            vars(state).clear()
            vars(state).update(values)
            if "quant_state" in vars(module):
                vars(module)["quant_state"] = layer_state
