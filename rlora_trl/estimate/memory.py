"""Memory of a training run by strategy: the weights are counted one by one, the step is traced by `step.py`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import PretrainedConfig

from ..tuner import MultiHeadAdapter, RLoraConfig
from .settings import TrainingSettings, check_choice
from .shapes import QuantizedLinear, build_model, load_config, quantized_bytes, stored_bits
from .step import StepMemory, decoder_layers, trace_step


# What each strategy divides among the GPUs.
_ALL = ("base", "adapter", "gradients", "optimizer")
_DIVIDED: dict[str, tuple[str, ...]] = {
    "single": (),
    "ddp": (),
    "zero1": ("optimizer",),
    "zero2": ("gradients", "optimizer"),
    "zero3": _ALL,
    "zero3-offload": _ALL,
    "fsdp2": _ALL,
}
STRATEGIES = tuple(_DIVIDED)
# Bytes that CUDA, cuBLAS and the kernels take outside PyTorch's allocator, for any model; not part of an estimate.
CUDA_CONTEXT = 512 * 2**20

# As in `deepspeed_configs/`: elements that ZeRO-3 keeps between the forward and the backward pass, and those of the
# largest weight that stays whole; and what "auto" stands for, as a multiple of the hidden size squared.
ZERO3_REUSE = 5e8
ZERO3_PERSISTENT = 1e6
_PREFETCH_SQUARES = 0.9
# Bytes of a float32, in which DeepSpeed and FSDP keep master copies and accumulated gradients.
_FLOAT32 = 4
# FSDP gathers a layer while another one computes.
_FSDP_LAYERS = 2


@dataclass(frozen=True)
class MemoryEstimate:
    """
    Memory of training on one GPU, in bytes.

    Args:
        strategy (`str`): One of `STRATEGIES`.
        num_gpus (`int`): GPUs of the run.
        parameters (`int`), trainable (`int`): Numbers of weights of the base, and of trained weights.
        base (`int`): Weights of the base, including the scales of quantized ones.
        adapter (`int`): Weights of the adapter including its anchor, and copies of modules that train.
        gradients (`int`): Gradients of the trained weights.
        optimizer (`int`): States of the optimizer, and DeepSpeed's float32 copy of the trained weights.
        activations (`int`): What layers save for the backward pass and allocate, at the peak of a step.
        loss (`int`): What the head and the loss hold at that moment.
        buffers (`int`): Gradient buckets and gathered weights of the strategy.
        host (`int`): Offloaded memory on the host, for all its GPUs together.
    """

    strategy: str
    num_gpus: int
    parameters: int
    trainable: int
    base: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    buffers: int
    host: int = 0

    @property
    def total(self) -> int:
        """Bytes on each GPU, as `torch.cuda.max_memory_allocated` counts them: without `CUDA_CONTEXT`."""
        return sum(getattr(self, name) for name in PARTS)

    def to_dict(self) -> dict[str, Any]:
        """All fields, and the total."""
        return asdict(self) | {"total": self.total}


# The parts that add up to the total, in the order in which they are shown.
PARTS = ("base", "adapter", "gradients", "optimizer", "activations", "loss", "buffers")


def estimate_memory(
    model: str | os.PathLike[str] | PretrainedConfig,
    config: PeftConfig | None = None,
    *,
    strategy: str = "single",
    **settings: Any,
) -> MemoryEstimate:
    """
    Memory of training an adapter, from the configuration of its base model: no weights are read or downloaded.

    Args:
        model (`str`, path or `PretrainedConfig`):
            Base model: a folder, a `config.json`, a name on the Hub, or its configuration.
        config (`PeftConfig`, *optional*):
            The adapter. Defaults to `RLoraConfig()`.
        strategy (`str`, *optional*, defaults to `"single"`):
            `"single"`, `"ddp"`, `"zero1"`, `"zero2"`, `"zero3"`, `"zero3-offload"` or `"fsdp2"`, with the settings in
            `deepspeed_configs/`.
        settings:
            Fields of [`TrainingSettings`]: `num_gpus`, `dtype`, `mixed_precision`, `load_in_4bit`, `load_in_8bit`,
            `double_quant`, `per_device_train_batch_size`, `max_length`, `gradient_checkpointing`, `loss` and
            `optimizer_states`.

    Returns:
        [`MemoryEstimate`]: The parts, in bytes.

    Raises:
        NotImplementedError: If the forward pass of the model depends on values, as in some mixtures of experts.
        ValueError: If an argument has a value outside its range, or arguments do not go together.
    """
    (estimate,) = estimate_strategies(model, config, strategies=[strategy], **settings)
    return estimate


def estimate_strategies(
    model: str | os.PathLike[str] | PretrainedConfig,
    config: PeftConfig | None = None,
    *,
    strategies: Sequence[str],
    **settings: Any,
) -> list[MemoryEstimate]:
    """[`estimate_memory`] for several strategies, which share what they have in common."""
    names = [entry.name for entry in fields(TrainingSettings)]
    unknown = sorted(set(settings) - set(names))
    if unknown:
        raise TypeError(
            f"`estimate_memory` has no argument {', '.join(map(repr, unknown))}. It takes `strategy` and "
            f"{', '.join(names)}."
        )
    run = TrainingSettings(**settings)
    for strategy in strategies:
        check_choice("strategy", strategy, STRATEGIES)
        if strategy == "single" and run.num_gpus != 1:
            raise ValueError(
                f'`strategy="single"` is for one GPU, got `num_gpus={run.num_gpus}`. Choose another strategy: '
                f"{', '.join(STRATEGIES[1:])}."
            )
    loaded = load_config(model)
    bits = run.bits or stored_bits(loaded)

    @cache
    def sized(dtype: torch.dtype) -> _SizedModel:
        return _SizedModel(build_model(load_config(loaded), dtype, bits), config, run.double_quant)

    @cache
    def traced(dtype: torch.dtype, joins: bool, reentrant: bool) -> StepMemory:
        return trace_step(sized(dtype).model, run, joins=joins, reentrant=reentrant)

    estimates = []
    for strategy in strategies:
        # DeepSpeed casts the model to the dtype of training, FSDP what it gathers. Autocast casts in each operation.
        dtype = run.stored if strategy in ("single", "ddp") else run.autocast or run.stored
        zero3 = strategy.startswith("zero3")
        weights = sized(dtype)
        step = traced(dtype, not zero3 and strategy != "fsdp2", zero3 and run.gradient_checkpointing)
        estimates.append(
            MemoryEstimate(
                strategy,
                run.num_gpus,
                weights.parameters,
                weights.trainable,
                activations=step.activations,
                loss=step.loss,
                **weights.parts(strategy, run),
            )
        )
    return estimates


@dataclass(frozen=True)
class _Weight:
    """A weight of the base: its elements, its bytes, and the bytes of its scales, which are not divided among GPUs."""

    numel: int
    size: int
    scales: int
    floating: bool


class _SizedModel:
    """A model with its adapter, and the bytes of both."""

    def __init__(self, model: Any, config: PeftConfig | None, double_quant: bool) -> None:
        # The base, as adapting it replaces modules.
        self.weights = _weights(model, double_quant)
        layers = decoder_layers(model)
        layer_sizes = [self._bytes_of(layer) for layer in layers[2]] if layers is not None else []
        self.num_layers, self.layer_bytes = len(layer_sizes), max(layer_sizes, default=0)
        head = model.get_output_embeddings()
        self.head_bytes = 0 if head is None else self._bytes_of(head)
        self.hidden = int(getattr(model.config.get_text_config(), "hidden_size", 0))

        base = self.weights.values()
        self.parameters = sum(weight.numel for weight in base)
        self.base = sum(weight.size for weight in base)
        self.scales = sum(weight.scales for weight in base)
        self.floating = sum(weight.size for weight in base if weight.floating)
        self.itemsize = max(
            (weight.size // weight.numel for weight in base if weight.floating and weight.numel), default=0
        )

        # The adapter.
        with torch.device("meta"):
            self.model = get_peft_model(model, config or RLoraConfig(task_type="CAUSAL_LM"))
        parameters = list(self.model.parameters())
        self.added = [p for p in parameters if id(p) not in self.weights]
        adapters = [module for module in self.model.modules() if isinstance(module, MultiHeadAdapter)]
        self.anchors = [p for adapter in adapters for p in (adapter.A0, adapter.B0) if p is not None]
        self.trained = [p for p in parameters if p.requires_grad]
        self.trainable = sum(p.numel() for p in self.trained)

    def _bytes_of(self, module: nn.Module) -> int:
        return sum(self.weights[id(p)].size for p in module.parameters())

    def parts(self, strategy: str, run: TrainingSettings) -> dict[str, int]:
        """All parts of an estimate but those of the step, in bytes."""
        whole, host = self._whole(strategy, run), 0
        # With ZeRO-3 the trainer holds anchors in buffers, which are neither divided nor offloaded.
        kept = sum(p.numel() for p in self.anchors) * self.itemsize if strategy.startswith("zero3") else 0
        whole["adapter"] -= kept
        parts = {
            name: size // run.num_gpus if name in _DIVIDED[strategy] else size  # of each GPU
            for name, size in whole.items()
        }
        if strategy == "zero3-offload":
            parts, host = dict.fromkeys(whole, 0), sum(whole.values())
        parts["base"] += self.scales
        parts["adapter"] += kept
        return {**parts, "buffers": self._buffers(strategy, run.num_gpus), "host": host}

    def _whole(self, strategy: str, run: TrainingSettings) -> dict[str, int]:
        """The bytes of weights, gradients and states, before a strategy divides them."""
        base, added = self.base, sum(p.numel() for p in self.added)
        if strategy in ("single", "ddp"):
            adapter, gradients = _bytes(self.added), _bytes(self.trained)
            optimizer = run.optimizer_states * gradients
        elif strategy == "fsdp2":
            # Stored as loaded, the adapter in float32.
            base += int(self.floating * (run.stored.itemsize / max(self.itemsize, 1) - 1))
            adapter, gradients = added * _FLOAT32, self.trainable * _FLOAT32
            optimizer = run.optimizer_states * gradients
        else:
            # DeepSpeed casts the adapter like the base, and keeps a float32 copy beside the states.
            adapter, gradients = added * self.itemsize, self.trainable * _FLOAT32
            optimizer = (1 + run.optimizer_states) * gradients
        return {"base": base, "adapter": adapter, "gradients": gradients, "optimizer": int(optimizer)}

    def _buffers(self, strategy: str, gpus: int) -> int:
        """Bytes of gradient buckets and gathered weights."""
        if strategy == "single":
            return 0
        if strategy == "ddp":
            return _bytes(self.trained)
        if strategy == "fsdp2":
            # A single GPU copies the layer that computes, and has nothing to gather.
            return max(_FSDP_LAYERS * self.layer_bytes, self.head_bytes) if gpus > 1 else self.layer_bytes
        # Two buckets of gradients: one fills while the other is sent.
        buckets = 2 * self.hidden**2 * self.itemsize
        gathers = strategy == "zero3-offload" or (strategy == "zero3" and gpus > 1)
        return buckets + (self._gathered() if gathers else 0)

    def _gathered(self) -> int:
        """Bytes of weights that ZeRO-3 holds whole at the peak: small ones, those reused soon, and prefetched ones."""
        item = self.itemsize
        small = sum(weight.size for weight in self.weights.values() if weight.numel <= ZERO3_PERSISTENT)
        anchors = {id(p) for p in self.anchors}
        small += sum(p.numel() * item for p in self.added if p.numel() <= ZERO3_PERSISTENT and id(p) not in anchors)
        # A weight stays for its backward pass if what comes between, forward and backward, is below the limit.
        reused = min(int(ZERO3_REUSE / 2) * item, self.layer_bytes * self.num_layers)
        current = max(self.head_bytes, self.layer_bytes + int(_PREFETCH_SQUARES * self.hidden**2 * item))
        return small + reused + current


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _weights(model: nn.Module, double_quant: bool) -> dict[int, _Weight]:
    """Each weight of the base once, by the `id` of its parameter, however many modules share it."""
    quantized = {id(module.weight): module for module in model.modules() if isinstance(module, QuantizedLinear)}
    weights = {}
    for parameter in model.parameters():
        numel, size, scales = parameter.numel(), _bytes([parameter]), 0
        layer = quantized.get(id(parameter))
        if layer is not None:
            size, scales = quantized_bytes(numel, len(parameter), bits=layer.bits, double_quant=double_quant)
        weights[id(parameter)] = _Weight(numel, size, scales, layer is None)
    return weights
