"""Small tensors under DeepSpeed ZeRO-3: anchors are not sharded, and all small parameters are gathered at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from peft import PeftModel
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


def require_input_gradients(model: nn.Module, accelerator: Accelerator) -> None:
    """
    Let gradients flow to the inputs of a model with adapters of experts, under ZeRO-3.

    DeepSpeed takes blocks of experts as wholes (its "leaf modules"), and reduces their gradients when that of their
    input is there. A block without one, such as that of the first layer, would be reduced before any gradient of its
    adapters (`reduce_leaf_module_grads`; no upstream issue as of deepspeed 0.19).

    Args:
        model (`torch.nn.Module`): The trainer's model.
        accelerator (`Accelerator`): The trainer's accelerator, with DeepSpeed enabled.
    """
    plugin: Any = accelerator.state.deepspeed_plugin
    experts = any(isinstance(module, MultiHeadAdapter) and module.num_experts for module in model.modules())
    if plugin.zero_stage == 3 and experts:
        core: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        core.enable_input_require_grads()


class _GatherTogether:
    """
    `all_gather` of a parameter, with one collective for all parameters of a dtype.

    DeepSpeed's own launches one for each parameter (`_allgather_params_coalesced`; no upstream issue as of deepspeed
    0.19), which takes a third of a millisecond of host time. `all_gather_coalesced`, with which it fetches the
    parameters of a layer, launches one for all.

    Args:
        one_by_one (`Callable`): The method that is replaced.
    """

    def __init__(self, one_by_one: Callable[..., Any]) -> None:
        self.one_by_one = one_by_one

    @torch.no_grad()
    def __call__(self, param_list: Sequence[Any] | None = None, async_op: bool = False, hierarchy: int = 0) -> Any:
        if param_list is None or async_op or any(map(_has_other_copies, param_list)):
            return self.one_by_one(param_list, async_op=async_op, hierarchy=hierarchy)
        missing: dict[str, list[Any]] = {}
        for parameter in param_list:
            if parameter.ds_status.name == "NOT_AVAILABLE":
                missing.setdefault(str(parameter.ds_tensor.dtype), []).append(parameter)
        for dtype in sorted(missing):  # in one order on all ranks
            missing[dtype][0].all_gather_coalesced(missing[dtype]).wait()
        return None


def _has_other_copies(parameter: Any) -> bool:
    """Whether a parameter is gathered from quantized shards, or from those of a group of ranks (hpZ)."""
    secondary = getattr(parameter, "ds_secondary_tensor", None)
    return secondary is not None or hasattr(parameter.ds_tensor, "ds_quant_scale")


def gather_together(engine: Any) -> None:
    """
    Gather the parameters that ZeRO-3 keeps whole between steps (`stage3_param_persistence_threshold`) at once.

    DeepSpeed does so after each step and each checkpoint, through the first of them. For a base of 7 billion weights
    there are hundreds: norms, biases and adapters. Their values are in memory twice while they are gathered.

    Args:
        engine: The prepared model. If it is not an engine of ZeRO-3, nothing changes.
    """
    persistent = getattr(getattr(engine, "optimizer", None), "persistent_parameters", None)
    if not persistent or not hasattr(persistent[0], "all_gather_coalesced"):
        return
    first: Any = persistent[0]
    if not isinstance(first.all_gather, _GatherTogether):
        first.all_gather = _GatherTogether(first.all_gather)
