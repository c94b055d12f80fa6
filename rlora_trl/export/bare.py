"""The base model by itself for a while, without a copy: what adapters put around its layers is taken off and put back.

Stock PEFT can then be tried on the very base that an adapter belongs to, however large or quantized.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from ..tuner.layer import RLoraLayer


# What marks a transformers model as one with adapters, or has PEFT take off and renew the hooks of accelerate.
_MARKS = ("peft_config", "_hf_peft_config_loaded", "hf_device_map")


class _Snapshot:
    """The attributes of objects, and the members of their dictionaries and sets, to be put back."""

    def __init__(self, objects: Iterable[Any]) -> None:
        self.states = [(entry, dict(vars(entry))) for entry in objects]
        # The same dictionaries must be put back: handles of hooks refer to them.
        self.members = [
            (value, type(value)(value))
            for _, state in self.states
            for value in state.values()
            if type(value) in _CONTAINERS
        ]

    def restore(self) -> None:
        for entry, state in self.states:
            vars(entry).clear()
            vars(entry).update(state)
        for value, members in self.members:
            value.clear()
            value.update(members)


_CONTAINERS = (dict, set, type(nn.Module()._forward_hooks))


def original_of(module: nn.Module, keep_trained: str | None = None) -> nn.Module:
    """What the base model had in a module's place, or the copy of it that an adapter trained in full."""
    while isinstance(module, RLoraLayer | AuxiliaryTrainingWrapper):
        if isinstance(module, RLoraLayer):
            module = module.base_layer
        elif isinstance(module, ModulesToSaveWrapper) and keep_trained in module.modules_to_save:
            module = module.modules_to_save[keep_trained]
        else:
            module = module.original_module
    return module


@contextmanager
def bare_base(core: PreTrainedModel, keep_trained: str | None = None) -> Generator[PreTrainedModel, None, None]:
    """
    The model without adapters; afterwards it is exactly as before, whatever happened to it in between.

    Args:
        core (`torch.nn.Module`): The model that adapters were put into.
        keep_trained (`str`, *optional*): An adapter whose `modules_to_save` take the place of the originals.
    """
    modules = list(core.modules())
    config = getattr(core, "config", None)
    snapshot = _Snapshot([*modules, *([] if config is None else [config])])
    requires_grad = [(parameter, parameter.requires_grad) for parameter in core.parameters()]
    try:
        for module in modules:
            for name, child in module._modules.items():
                if child is not None:
                    module._modules[name] = original_of(child, keep_trained)
        for mark in _MARKS:
            vars(core).pop(mark, None)
        # What loading an adapter writes to: biases, and embeddings that were enlarged.
        written = {name: tensor for name, tensor in core.named_parameters() if _may_be_written(name)}
        before = {name: tensor.detach().clone() for name, tensor in written.items()}
        try:
            yield core
        finally:
            with torch.no_grad():
                for name, tensor in written.items():
                    if not torch.equal(tensor, before[name]):
                        tensor.copy_(before[name])
    finally:
        snapshot.restore()
        for parameter, required in requires_grad:
            parameter.requires_grad_(required)


def _may_be_written(name: str) -> bool:
    return name.rsplit(".", 1)[-1] == "bias"
