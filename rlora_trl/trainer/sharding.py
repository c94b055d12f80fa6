"""Adapters under FSDP2: gathered and reduced in float32, as with DDP."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..tuner import MultiHeadAdapter


logger = get_logger(__name__)


def keep_outputs_wide(accelerator: Accelerator) -> None:
    """
    Keep the dtype of the model's outputs, losses among them, under FSDP2.

    By default accelerate casts them to the dtype of mixed precision, and a loss in bfloat16 has three digits (no
    upstream issue as of accelerate 1.15). To be called before the model is prepared; without FSDP2, or without mixed
    precision, it does nothing.
    """
    policy = _policy(accelerator)
    if policy is not None:
        accelerator.state.fsdp_plugin.mixed_precision_policy = replace(policy, output_dtype=None)


def _policy(accelerator: Accelerator) -> Any:
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.fsdp_version != 2:
        return None
    return plugin.mixed_precision_policy


def wait_for_backward(device: torch.device) -> None:
    """
    Wait for the device after each micro-batch but the last of a step.

    FSDP2 gathers weights for the next micro-batch while the backward pass of this one is running, and sometimes gets
    zeros for part of the final norm and the head, which accelerate gathers together
    (https://github.com/huggingface/accelerate/pull/4015). This happens with small models on two GPUs, with stock LoRA
    and `SFTTrainer` too, and never if the host waits (torch 2.11, accelerate 1.15; no upstream issue as of these). The
    first micro-batch of a step follows the optimizer and the logs, and was never affected.

    Args:
        device (`torch.device`): The device of this process.
    """
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def keep_adapters_wide(model: nn.Module) -> None:
    """
    Make FSDP2 gather adapters in float32, and the layers around them in 16 bits.

    Gradients of adapters are then computed and reduced in float32. Rounded to 16 bits one by one, the heads would no
    longer agree with their mean in the anchor, and small updates would be lost. The cost is small, as adapters are.

    Call it after the model is prepared and before its first forward pass. PyTorch has one dtype policy for all
    parameters that it gathers together; this overrides the dtypes that it derives for each parameter. If other
    parameters train in the same group (`modules_to_save` inside a block), their gradients would have another dtype,
    and adapters are not changed.

    A PyTorch with a policy per parameter ends the need for this (pytorch#156784; pytorch#196626 is open as of 2.13).

    Args:
        model (`torch.nn.Module`): The prepared model. Without FSDP2 nothing changes.
    """
    try:
        _keep_wide(model)
    except AttributeError as error:
        logger.warning(
            "FSDP2 rounds adapters to 16 bits for their products: this version of PyTorch "
            f"({torch.__version__}) keeps its dtypes elsewhere ({error})."
        )


def _keep_wide(model: nn.Module) -> None:
    adapters = {module for module in model.modules() if isinstance(module, MultiHeadAdapter)}
    for group in _groups(model):
        ours = [entry for entry in group.fsdp_params if entry._module_info.module in adapters]
        if not ours or group.mp_policy.param_dtype is None:
            continue
        others = [entry.sharded_param for entry in group.fsdp_params if entry not in ours]
        if any(parameter.requires_grad for parameter in others):
            logger.warning_once(
                "FSDP2 rounds adapters to 16 bits for their products, because other parameters train in the same "
                "blocks (`modules_to_save`, `bias`)."
            )
            continue
        # Nothing is cast. (A `reduce_dtype` for all would break accumulation where a module is not called itself, such
        # as the head with TRL's fused loss: PyTorch 2.13 looks for its gradients all the same; no upstream issue.)
        wide = replace(group.mp_policy, param_dtype=None, reduce_dtype=None)
        for entry in ours:
            # FSDP2 calls it with the policy of the group when the model is first run.
            entry.init_dtype_attrs = partial(_init_wide, entry.init_dtype_attrs, wide)


def _init_wide(init_dtype_attrs: Any, wide: Any, policy: Any) -> None:
    init_dtype_attrs(wide)


def _groups(model: nn.Module) -> list[Any]:
    """The groups of parameters that FSDP2 gathers together."""
    states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
    groups: list[Any] = []
    for state in states:
        several = getattr(state, "_fsdp_param_groups", None)  # in newer versions of PyTorch
        groups += [state._fsdp_param_group] if several is None else several
    return list({id(group): group for group in groups if group is not None}.values())
