"""What the resolver uses of vLLM, where that is not installed; where it is, `test_vllm.py` compares the two."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None


class LoRAResolver(ABC):
    @abstractmethod
    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None: ...


@dataclass
class Registry:
    resolvers: dict = field(default_factory=dict)

    def get_supported_resolvers(self):
        return self.resolvers.keys()

    def register_resolver(self, resolver_name: str, resolver: LoRAResolver) -> None:
        self.resolvers[resolver_name] = resolver

    def get_resolver(self, resolver_name: str) -> LoRAResolver:
        return self.resolvers[resolver_name]


LoRAResolverRegistry = Registry()


# What the layers of `vllm_layers` use of vLLM's: a linear layer with LoRA, and its kernels.


class Kernels:
    """Products of each token with the matrices of its slot."""

    def __init__(self, slots):
        self.token_lora_indices = slots

    def add_shrink(self, y, x, lora_a_stacked, scale):
        for part, a in zip(y, lora_a_stacked, strict=True):
            part += scale * torch.einsum("tmi,ti->tm", a[self.token_lora_indices, 0], x)

    def add_expand(self, y, x, lora_b_stacked, output_slices, offset_start=0, add_inputs=True):
        start = offset_start
        for part, b, size in zip(x, lora_b_stacked, output_slices, strict=True):
            # Tokens without an adapter get those of the last slot, as from vLLM's kernels for CPUs.
            added = torch.einsum("tom,tm->to", b[self.token_lora_indices, 0], part)
            y[:, start : start + size] = added + (y[:, start : start + size] if add_inputs else 0)
            start += size


class LinearWithLoRA:
    """A linear layer of one or more slices; `ranks` divide its inputs, and this is one of them."""

    def __init__(self, weights, tp_size=1, tp_rank=0):
        self.base_layer = SimpleNamespace(input_size=weights[0].shape[1])
        self.tp_size, self.tp_rank = tp_size, tp_rank
        self.inputs = weights[0].shape[1] // tp_size
        self.weight = torch.cat(weights)[:, self._part()]
        self.output_slices = tuple(len(weight) for weight in weights)

    def _part(self):
        return slice(self.tp_rank * self.inputs, (self.tp_rank + 1) * self.inputs)

    def create_lora_weights(self, max_loras, lora_config, model_config=None):
        width = lora_config.max_lora_rank
        self.lora_a_stacked = tuple(torch.zeros(max_loras, 1, width, self.inputs) for _ in self.output_slices)
        self.lora_b_stacked = tuple(torch.zeros(max_loras, 1, size, width) for size in self.output_slices)

    def set_mapping(self, punica_wrapper):
        self.punica_wrapper = punica_wrapper

    def reset_lora(self, index):
        for stacked in (*self.lora_a_stacked, *self.lora_b_stacked):
            stacked[index] = 0

    def set_lora(self, index, lora_a, lora_b):
        self.reset_lora(index)
        pairs = zip(*((m if isinstance(m, list) else [m]) for m in (lora_a, lora_b)), strict=True)
        for a_stacked, b_stacked, (a, b) in zip(self.lora_a_stacked, self.lora_b_stacked, pairs, strict=True):
            if a is not None:
                a_stacked[index, 0, : len(a)].copy_(a[:, self._part()])
                b_stacked[index, 0, :, : b.shape[1]].copy_(b)

    def __call__(self, x):
        x = x[:, self._part()]
        y = x @ self.weight.T
        self.punica_wrapper.add_lora_linear(y, x, self.lora_a_stacked, self.lora_b_stacked, 1.0, self.output_slices)
        return y
