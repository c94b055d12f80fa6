"""Keeps adapters in float32 on every base; TRL and DeepSpeed would round them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import set_seed

from ..tuner import MultiHeadAdapter


def undo_bf16_cast(model: nn.Module, loaded: Mapping[nn.Parameter, torch.Tensor], seed: int) -> None:
    """
    Restore the float32 values of adapters that `SFTTrainer.__init__` has rounded to bfloat16.

    TRL casts trained parameters on a quantized base (peft#2889) and leaves out DoRA's magnitudes, which bfloat16
    freezes (trl#7268); other adapters can't ask for that as of trl 1.16.

    Args:
        model (`torch.nn.Module`): The trainer's model.
        loaded (`Mapping`): Values of the parameters before the cast. An adapter that is not among them was created
            by TRL: it is drawn again from the seed, on the CPU, so that it is the same under every strategy.
        seed (`int`): Seed of the run.
    """
    rounded = [adapter for adapter in _adapters(model) if adapter.A.dtype == torch.bfloat16]
    for parameter, values in loaded.items():
        if parameter.dtype != values.dtype:
            parameter.data = values

    quantized = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    created = [adapter for adapter in rounded if adapter.A not in loaded]
    if created and quantized:
        set_seed(seed)
        for adapter in created:
            device = adapter.A.device
            adapter.to("cpu", torch.float32).reset_parameters()
            adapter.to(device)


def cast_for_deepspeed(model: nn.Module, accelerator: Accelerator) -> None:
    """
    Cast adapters as DeepSpeed's engine will, with anchors that agree with the rounded weights.

    The engine also keeps float32 values of trained parameters, which are saved.

    Args:
        model (`torch.nn.Module`): The trainer's model.
        accelerator (`Accelerator`): The trainer's accelerator, with DeepSpeed enabled.
    """
    config: Any = accelerator.state.deepspeed_plugin.hf_ds_config
    dtypes = {"bf16.enabled": torch.bfloat16, "fp16.enabled": torch.float16}
    for dtype in [dtype for name, dtype in dtypes.items() if config.is_true(name)]:
        for adapter in _adapters(model):
            adapter.cast(dtype)


def _adapters(model: nn.Module) -> list[MultiHeadAdapter]:
    return [module for module in model.modules() if isinstance(module, MultiHeadAdapter)]
