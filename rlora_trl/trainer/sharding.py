"""Adapters under FSDP2: float32 where they are packed for products and in what is summed over ranks, as with DDP."""

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
    Have FSDP2 leave the outputs of the model, losses among them, in the dtype that they have.

    By default accelerate casts them to that of mixed precision, and a loss in bfloat16 has three digits (no upstream
    issue as of accelerate 1.15). To be called before the model is prepared; without FSDP2, or without mixed precision,
    it does nothing.
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
    Wait for the device after a micro-batch whose gradients are not summed over ranks yet.

    FSDP2 gathers weights for the next micro-batch while the backward pass of this one is running, and sometimes gets
    zeros for a part of them: of the final norm and the head, which accelerate gathers together
    (https://github.com/huggingface/accelerate/pull/4015). Seen with small models on two GPUs, with stock LoRA and
    `SFTTrainer` too, and never where the host waits (torch 2.11, accelerate 1.15; no upstream issue as of these). The
    first micro-batch of a step follows the optimizer and the logs, and was never wrong.

    Args:
        device (`torch.device`): The device of this process.
    """
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def keep_adapters_wide(model: nn.Module) -> None:
    """
    Have FSDP2 gather adapters in float32, as they are kept, where it gathers what is around them in 16 bits.

    Their gradients are in float32 then, and are summed over ranks so.
    Rounded to 16 bits one by one, the heads and their mean in the anchor would no longer agree, and small updates
    would not show in products. Weights of adapters are few, so that this costs little.

    To be called after the model is prepared and before it is first run. PyTorch's policy of dtypes is one for all
    parameters that it gathers together, so that this sets what it derives from that for each of them. Where others
    train among these (`modules_to_save` inside of a block), whose gradients are then of another dtype, adapters are
    left as they are.

    It ends with a PyTorch whose policy can be set for each parameter (pytorch#156784; pytorch#196626 is open as of
    2.13).

    Args:
        model (`torch.nn.Module`): The prepared model; without FSDP2 nothing is done.
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
        own = [entry for entry in group.fsdp_params if entry._module_info.module in adapters]
        if not own or group.mp_policy.param_dtype is None:
            continue
        others = [entry.sharded_param for entry in group.fsdp_params if entry not in own]
        if any(parameter.requires_grad for parameter in others):
            logger.warning_once(
                "FSDP2 rounds adapters to 16 bits for their products, because other parameters train in the same "
                "blocks (`modules_to_save`, `bias`)."
            )
            continue
        # Nothing is cast. (A `reduce_dtype` for all would break accumulation where a module is not called itself, such
        # as the head with TRL's fused loss: PyTorch 2.13 looks for its gradients all the same; no upstream issue.)
        wide = replace(group.mp_policy, param_dtype=None, reduce_dtype=None)
        for entry in own:
            # It is called, with the policy of the group, when the model is first run.
            entry.init_dtype_attrs = partial(_init_wide, entry.init_dtype_attrs, wide)


def _init_wide(init_dtype_attrs: Any, wide: Any, policy: Any) -> None:
    init_dtype_attrs(wide)


def _groups(model: nn.Module) -> list[Any]:
    """What FSDP2 gathers together, each with its parameters."""
    states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
    groups: list[Any] = []
    for state in states:
        found = getattr(state, "_fsdp_param_groups", None)  # newer PyTorch has several of them
        groups += [state._fsdp_param_group] if found is None else found
    return list({id(group): group for group in groups if group is not None}.values())
