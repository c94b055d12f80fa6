"""Models without memory: built on the meta device from a configuration, with stand-ins for bitsandbytes' layers."""

from __future__ import annotations

import os
from typing import Any

import torch
from huggingface_hub.errors import HTTPError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from ..foreign import explain_failure
from ..requirements import require_model_folder
from .attention import ATTENTION


# bitsandbytes' defaults: values per scale, and scales per second-level scale with double quantization.
BLOCK = 64
NESTED_BLOCK = 256
# Each matrix has a table of 16 float32 values; with double quantization also one of 256, and an offset.
CODE_BYTES = 16 * 4
NESTED_BYTES = 256 * 4 + 4
# Each layer is built, which takes about a millisecond.
_MAX_LAYERS = 10_000
_REMEDY = "Check its `config.json`."


class _QuantizedProduct(torch.autograd.Function):
    """A product with a weight that exists in 16 bits only while it is multiplied."""

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
    Stand-in for bitsandbytes' layers, whose product takes as much memory as theirs.

    Its exact type is not `nn.Linear`, so that R-LoRA treats it like those.

    Args:
        layer (`nn.Linear` or `Conv1D`): The layer that it replaces.
        bits (`int`): 4 or 8.
        compute_dtype (`torch.dtype`): Dtype of the products of 4-bit weights.
    """

    def __init__(self, layer: Any, *, bits: int, compute_dtype: torch.dtype) -> None:
        rows, columns = layer.weight.shape if not isinstance(layer, Conv1D) else layer.weight.T.shape
        super().__init__(columns, rows, bias=layer.bias is not None, device="meta", dtype=compute_dtype)
        if layer.bias is not None:
            self.bias = layer.bias
        self.bits, self.compute_dtype = bits, compute_dtype
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # 4-bit layers compute in their own dtype. 8-bit layers compute in that of the input, and save the input.
        wide = x.to(self.compute_dtype) if self.bits == 4 else x
        y = _QuantizedProduct.apply(wide, self.weight, self.bits == 8)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.to(x.dtype)


def quantized_bytes(numel: int, rows: int, *, bits: int, double_quant: bool) -> tuple[int, int]:
    """
    Bytes of a quantized matrix.

    Args:
        numel (`int`): Elements.
        rows (`int`): Rows; in 8 bits each has a scale.
        bits (`int`): 4 or 8.
        double_quant (`bool`): Whether the scales are quantized too.

    Returns:
        `tuple[int, int]`: Bytes of the values, and of the scales, which DeepSpeed and FSDP do not divide.
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
    A new configuration of a model. Weights are neither read nor downloaded.

    Args:
        model (`str`, path or `PretrainedConfig`): A folder, a `config.json`, a name on the Hub, or a configuration.

    Raises:
        FileNotFoundError: If the model is a path, and nothing is there.
        ValueError: If it has values of another type or out of range.
    """
    if isinstance(model, PretrainedConfig):
        return type(model).from_dict(model.to_dict())
    require_model_folder(os.fspath(model), "Give the folder or the `config.json` of a model, or its name on the Hub.")
    with explain_failure(f"The configuration of {model} can't be read", _REMEDY, unchanged=(OSError, HTTPError)):
        # If it is not set, transformers asks on a terminal whether to run the code.
        config = AutoConfig.from_pretrained(os.fspath(model), trust_remote_code=False)
        config.to_dict()
        layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
        if layers > _MAX_LAYERS:
            raise ValueError(f"it has {layers} layers, and at most {_MAX_LAYERS} are built")
    return config


def stored_bits(config: PretrainedConfig) -> int | None:
    """
    Bits of a model whose checkpoint is quantized with bitsandbytes; `None` if it is not quantized.

    Raises:
        ValueError: If it is quantized by another method.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    values = stored if isinstance(stored, dict) else stored.to_dict()
    if values.get("load_in_4bit") or values.get("load_in_8bit"):
        return 4 if values.get("load_in_4bit") else 8
    raise ValueError(
        f"The model is stored quantized with {values.get('quant_method')!r}; only bitsandbytes' 4 and 8 bits can be "
        "estimated. Estimate the model that it was quantized from, with `load_in_4bit` or `load_in_8bit`."
    )


def build_model(config: PretrainedConfig, dtype: torch.dtype, bits: int | None) -> Any:
    """
    The model on the meta device, with stand-ins for the layers that bitsandbytes would quantize.

    Args:
        config (`PretrainedConfig`): Its configuration, which is modified.
        dtype (`torch.dtype`): Dtype of the weights that are not quantized, and of products with 4-bit weights.
        bits (`int`, *optional*): 4 or 8.
    """
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    what = f"No {type(config).__name__.removesuffix('Config')} model can be built from the configuration"
    with torch.device("meta"), explain_failure(what, _REMEDY):
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
        except ValueError as error:
            if "attention" not in str(error) and "attn_implementation" not in str(error):
                raise
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # of one with its own attention
    if bits is not None:
        _quantize(model, bits, dtype)
    return model.requires_grad_(False)


def _quantize(model: Any, bits: int, compute_dtype: torch.dtype) -> None:
    # As transformers does: all layers but the head, and those that share its weight.
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if module is not head and (type(module) is nn.Linear or isinstance(module, Conv1D)):
            model.set_submodule(name, QuantizedLinear(module, bits=bits, compute_dtype=compute_dtype))
