"""Models of the shapes of real ones with random weights, made where they are used: in bfloat16, or in 4 bits.

A model is laid out without memory (`meta` device) and filled tensor by tensor, so a 4-bit one never exists in 16 bits:
each weight is drawn, quantized by bitsandbytes, and the 16-bit values are dropped. What comes out is what
`from_pretrained(quantization_config=...)` gives: the same classes, quantization states and attributes.
"""

from typing import Any

import torch
from large_shapes import Shape
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel


def build_model(
    shape: Shape, base: str, device: torch.device, length: int, storage: torch.dtype = torch.uint8
) -> PreTrainedModel:
    """
    A model of a shape with random weights on `device`.

    Args:
        shape (`Shape`): Its sizes.
        base (`str`): `"bf16"`, or `"nf4"`: NF4 with double quantization and bfloat16 products; embeddings, norms and
            the language model's head stay in bfloat16, as `from_pretrained` leaves them.
        device (`torch.device`): Where it is made.
        length (`int`): Longest row, in tokens.
        storage (`torch.dtype`, *optional*, defaults to `torch.uint8`): How 4-bit values are packed
            (`bnb_4bit_quant_storage`).
    """
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.config(length), dtype=torch.bfloat16)
    quantizer = _lay_out_in_four_bits(model, device, storage) if base == "nf4" else None
    _fill(model, device)
    _renew_buffers(model, device)
    absent = [name for name, t in [*model.named_parameters(), *model.named_buffers()] if t.device.type == "meta"]
    if absent:
        raise RuntimeError(f"Not filled: {', '.join(absent[:5])}. Teach `build_model` how such tensors are made.")
    if quantizer is not None:
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)
    return model.eval()  # as `from_pretrained` gives it


def _lay_out_in_four_bits(model: PreTrainedModel, device: torch.device, storage: torch.dtype) -> Any:
    """Put bitsandbytes' modules in, as transformers does before it loads weights; gives transformers' quantizer."""
    from transformers import BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=storage,
    )
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.preprocess_model(model, dtype=torch.bfloat16, device_map={"": device})
    return quantizer


@torch.no_grad()
def _fill(model: PreTrainedModel, device: torch.device) -> None:
    """Give each parameter its memory and values: norms one, biases zero, weights random."""
    std = model.config.initializer_range
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is None or old.device.type != "meta":
                continue
            # Not the dtype of `old`: bitsandbytes' modules are laid out in float32, whatever the model's.
            values = torch.empty(old.shape, dtype=torch.bfloat16, device=device)
            if name == "bias":
                values.zero_()
            elif values.ndim == 1:
                values.fill_(1.0)
            else:
                values.normal_(std=std)
            if type(old).__name__ == "Params4bit":
                state = dict(old.__dict__)
                module._parameters[name] = type(old)(values, requires_grad=False, **state).to(device)
            else:
                module._parameters[name] = nn.Parameter(values)


def _renew_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Make modules that hold computed buffers (rotary frequencies) anew, with memory."""
    for name, module in list(model.named_modules()):
        if any(buffer.device.type == "meta" for buffer in module._buffers.values() if buffer is not None):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, type(module)(config=model.config).to(device))
