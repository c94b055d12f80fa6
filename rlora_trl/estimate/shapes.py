"""Models without memory: built on the meta device from a configuration, with what bitsandbytes would make of them."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from .attention import ATTENTION


# bitsandbytes' defaults: values that share a scale, and scales that share one with double quantization.
BLOCK = 64
NESTED_BLOCK = 256
# A table of 16 float32 values for each matrix; with double quantization one of 256, and an offset.
CODE_BYTES = 16 * 4
NESTED_BYTES = 256 * 4 + 4


class _QuantizedProduct(torch.autograd.Function):
    """A product with a weight that is there in 16 bits only while it is multiplied."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, keeps_input: bool) -> torch.Tensor:
        ctx.weight = weight
        ctx.save_for_backward(x if keeps_input else None)
        return x @ weight.new_empty(weight.shape, dtype=x.dtype).T

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return dy @ ctx.weight.new_empty(ctx.weight.shape, dtype=dy.dtype), None, None


class QuantizedLinear(nn.Linear):
    """
    Stands for bitsandbytes' layers: its product takes as much memory as theirs. Not an `nn.Linear` by its exact type,
    so that R-LoRA treats it as it treats those.
    """

    def __init__(self, layer: Any, *, bits: int, compute_dtype: torch.dtype) -> None:
        rows, columns = layer.weight.shape if not isinstance(layer, Conv1D) else layer.weight.T.shape
        super().__init__(columns, rows, bias=layer.bias is not None, device="meta", dtype=compute_dtype)
        if layer.bias is not None:
            self.bias = layer.bias
        self.bits, self.compute_dtype = bits, compute_dtype
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # 4-bit layers compute in their own dtype, 8-bit ones in that of the input, which they keep.
        wide = x.to(self.compute_dtype) if self.bits == 4 else x
        y = _QuantizedProduct.apply(wide, self.weight, self.bits == 8)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.to(x.dtype)


def quantized_bytes(numel: int, rows: int, *, bits: int, double_quant: bool) -> tuple[int, int]:
    """
    Bytes of a quantized matrix: its values, and its scales, which DeepSpeed and FSDP do not divide.

    Args:
        numel (`int`): Elements.
        rows (`int`): Rows; in 8 bits each has a scale.
        bits (`int`): 4 or 8.
        double_quant (`bool`): Whether the scales are quantized as well.
    """
    if bits == 8:
        return numel, 4 * rows
    blocks = -(-numel // BLOCK)
    scales = CODE_BYTES + 4 * blocks
    if double_quant:
        scales = CODE_BYTES + blocks + 4 * -(-blocks // NESTED_BLOCK) + NESTED_BYTES
    return -(-numel // 2), scales


def load_config(model: str | os.PathLike[str] | PretrainedConfig) -> PretrainedConfig:
    """
    The configuration of a model.

    Args:
        model (`str`, path or `PretrainedConfig`): A folder, a `config.json`, a name on the Hub, or the configuration.
            Weights are neither read nor downloaded.
    """
    if isinstance(model, PretrainedConfig):
        return type(model).from_dict(model.to_dict())
    return AutoConfig.from_pretrained(os.fspath(model))


def stored_bits(config: PretrainedConfig) -> int | None:
    """
    Bits of a model whose checkpoint is quantized with bitsandbytes already; `None` if it is not quantized.

    Raises:
        ValueError: If it is quantized otherwise.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    values = stored if isinstance(stored, dict) else stored.to_dict()
    if values.get("load_in_4bit") or values.get("load_in_8bit"):
        return 4 if values.get("load_in_4bit") else 8
    raise ValueError(
        f"The model is stored quantized with {values.get('quant_method')!r}; only bitsandbytes' 4 and 8 bits are "
        "estimated. Estimate the model that it was made from, with `load_in_4bit` or `load_in_8bit`."
    )


def build_model(config: PretrainedConfig, dtype: torch.dtype, bits: int | None, compute_dtype: torch.dtype) -> Any:
    """
    The model on the meta device, with stand-ins for what bitsandbytes would quantize.

    Args:
        config (`PretrainedConfig`): Its configuration.
        dtype (`torch.dtype`): Dtype of what is not quantized.
        bits (`int`, *optional*): 4 or 8.
        compute_dtype (`torch.dtype`): Dtype of the products with 4-bit weights.
    """
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
        except ValueError as error:
            if "attn_implementation" not in str(error) and "attention" not in str(error):
                raise
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if bits is not None:
        _quantize(model, bits, compute_dtype)
    return model.requires_grad_(False)


def _quantize(model: Any, bits: int, compute_dtype: torch.dtype) -> None:
    # As transformers does: all but the head, and what shares its weight.
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if module is head or not (type(module) is nn.Linear or isinstance(module, Conv1D)):
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, QuantizedLinear(module, bits=bits, compute_dtype=compute_dtype))
