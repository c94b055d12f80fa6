"""Small tensors under DeepSpeed ZeRO-3: anchors are not sharded."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn

from ..tuner import MultiHeadAdapter


def keep_anchors_whole(model: nn.Module, accelerator: Accelerator) -> None:
    """
    Keep anchors out of ZeRO-3, which would gather each of them after each step although they never change.

    To be called on all ranks, before DeepSpeed prepares the model and after anchors have their dtype. Other stages of
    ZeRO gather no frozen parameters, and other strategies are left as they are: DistributedDataParallel, for one,
    broadcasts buffers before each forward pass.

    Args:
        model (`torch.nn.Module`): The trainer's model.
        accelerator (`Accelerator`): The trainer's accelerator, with DeepSpeed enabled.
    """
    plugin: Any = accelerator.state.deepspeed_plugin
    if plugin.zero_stage != 3:
        return

    # DeepSpeed does not move the buffers of a model that was loaded in shards.
    moves = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    for adapter in [module for module in model.modules() if isinstance(module, MultiHeadAdapter)]:
        if adapter.A.is_meta:
            continue
        adapter.hold_anchor_in_buffers()
        for name, anchor in list(adapter.named_buffers(recurse=False)):
            # DeepSpeed takes the parameters of the first rank, and an anchor must agree with its A and B.
            value = broadcast(anchor.to(accelerator.device))
            setattr(adapter, name, value if moves else value.to(anchor.device))
