"""Memory of a training run by strategy: weights counted one by one, the step as `step.py` runs it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import PretrainedConfig

from ..tuner import RLoraConfig
from .shapes import QuantizedLinear, build_model, load_config, quantized_bytes, stored_bits
from .step import StepMemory, decoder_layers, trace_step


STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "zero3-offload", "fsdp2")
# What CUDA, cuBLAS and the kernels take beside PyTorch's allocator, whatever the model; not part of an estimate.
CUDA_CONTEXT = 512 * 2**20

# As in `deepspeed_configs/`: elements that ZeRO-3 keeps between the forward and the backward pass, and those of the
# largest weight that stays whole; and what "auto" stands for, as a multiple of the hidden size squared.
ZERO3_REUSE = 5e8
ZERO3_PERSISTENT = 1e6
_PREFETCH_SQUARES = 0.9
# A master copy of what trains, and gradients that are added up, in float32.
_WIDE = 4
# FSDP gathers a layer while another is at work.
_FSDP_LAYERS = 2


@dataclass(frozen=True)
class MemoryEstimate:
    """
    Memory of training on one GPU, in bytes.

    Args:
        strategy (`str`): One of `STRATEGIES`.
        num_gpus (`int`): GPUs of the run.
        parameters (`int`), trainable (`int`): Numbers of the base's weights, and of weights that train.
        base (`int`): Weights of the base, with the scales of quantized ones.
        adapter (`int`): Weights of the adapter, its anchor included, and copies of modules that train.
        gradients (`int`): Gradients of what trains.
        optimizer (`int`): States of the optimizer, and DeepSpeed's float32 copy of what trains.
        activations (`int`): What layers keep for the backward pass and work with, at the peak of a step.
        loss (`int`): What the head and the loss hold at that moment.
        buffers (`int`): Buckets of gradients and gathered weights, of the strategy.
        host (`int`): Memory of the host for what is offloaded, of all its GPUs together.
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
        return {entry.name: getattr(self, entry.name) for entry in fields(self)} | {"total": self.total}


# What adds up to the total, in the order in which it is shown.
PARTS = ("base", "adapter", "gradients", "optimizer", "activations", "loss", "buffers")


def estimate_memory(
    model: str | os.PathLike[str] | PretrainedConfig,
    config: PeftConfig | None = None,
    *,
    strategy: str = "single",
    num_gpus: int = 1,
    dtype: str | torch.dtype = "bfloat16",
    mixed_precision: str | torch.dtype | None = "bfloat16",
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    double_quant: bool = False,
    per_device_train_batch_size: int = 8,
    max_length: int = 1024,
    gradient_checkpointing: bool = True,
    loss: str = "chunked",
    optimizer_states: float = 2,
) -> MemoryEstimate:
    """
    Memory of training an adapter, from the configuration of its base model: no weights are read or downloaded.

    Batches are taken to be full: each of `per_device_train_batch_size` rows has `max_length` tokens that all count.

    Args:
        model (`str`, path or `PretrainedConfig`):
            Base model: a folder, a `config.json`, a name on the Hub, or its configuration.
        config (`PeftConfig`, *optional*):
            The adapter. Defaults to `RLoraConfig()`.
        strategy (`str`, *optional*, defaults to `"single"`):
            `"single"`, `"ddp"`, `"zero1"`, `"zero2"`, `"zero3"`, `"zero3-offload"` or `"fsdp2"`, with the settings in
            `deepspeed_configs/`.
        num_gpus (`int`, *optional*, defaults to `1`):
            GPUs, of all nodes.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"bfloat16"`):
            Dtype in which the base is loaded. DeepSpeed casts it to `mixed_precision`.
        mixed_precision (`str` or `torch.dtype`, *optional*, defaults to `"bfloat16"`):
            Of training (`bf16=True`, TRL's default); `None` for none. A base in float32 without it, whose queries are
            grouped, takes more than is estimated: PyTorch has no fused attention for it on a GPU.
        load_in_4bit (`bool`, *optional*, defaults to `False`), load_in_8bit (`bool`, *optional*, defaults to `False`):
            Quantize the base with bitsandbytes.
        double_quant (`bool`, *optional*, defaults to `False`):
            Quantize the scales of 4-bit weights too (`bnb_4bit_use_double_quant`).
        per_device_train_batch_size (`int`, *optional*, defaults to `8`), max_length (`int`, *optional*, defaults to
            `1024`): Rows of a micro-batch, and tokens of a row.
        gradient_checkpointing (`bool`, *optional*, defaults to `True`):
            As in TRL.
        loss (`str`, *optional*, defaults to `"chunked"`):
            `"chunked"`: TRL's loss, which never has all logits at once. `"full"`: the model's own, which has.
        optimizer_states (`float`, *optional*, defaults to `2`):
            Float32 values that the optimizer keeps for each trained weight: 2 for AdamW, 0 for plain SGD.

    Returns:
        [`MemoryEstimate`]: The parts, in bytes.

    Raises:
        NotImplementedError: If the forward pass of the model depends on values, as that of some mixtures of experts.
        ValueError: If an argument has a value outside its range, or arguments do not go together.
    """
    (found,) = estimate_strategies(
        model,
        config,
        strategies=[strategy],
        num_gpus=num_gpus,
        dtype=dtype,
        mixed_precision=mixed_precision,
        load_in_4bit=load_in_4bit,
        load_in_8bit=load_in_8bit,
        double_quant=double_quant,
        per_device_train_batch_size=per_device_train_batch_size,
        max_length=max_length,
        gradient_checkpointing=gradient_checkpointing,
        loss=loss,
        optimizer_states=optimizer_states,
    )
    return found


def estimate_strategies(
    model: str | os.PathLike[str] | PretrainedConfig,
    config: PeftConfig | None = None,
    *,
    strategies: Sequence[str],
    num_gpus: int = 1,
    dtype: str | torch.dtype = "bfloat16",
    mixed_precision: str | torch.dtype | None = "bfloat16",
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    double_quant: bool = False,
    per_device_train_batch_size: int = 8,
    max_length: int = 1024,
    gradient_checkpointing: bool = True,
    loss: str = "chunked",
    optimizer_states: float = 2,
) -> list[MemoryEstimate]:
    """[`estimate_memory`] for several strategies, without doing again what they have in common."""
    _check_choice("loss", loss, ("chunked", "full"))
    for strategy in strategies:
        _check_choice("strategy", strategy, STRATEGIES)
        if strategy == "single" and num_gpus != 1:
            raise ValueError(
                f'`strategy="single"` is for one GPU, got `num_gpus={num_gpus}`. Choose another strategy: '
                f"{', '.join(STRATEGIES[1:])}."
            )
    sizes = {"num_gpus": num_gpus, "per_device_train_batch_size": per_device_train_batch_size}
    for name, value in {**sizes, "max_length": max_length}.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if load_in_4bit and load_in_8bit:
        raise ValueError("`load_in_4bit` and `load_in_8bit` are both set. Choose one of them.")
    loaded = load_config(model)
    bits = 4 if load_in_4bit else 8 if load_in_8bit else stored_bits(loaded)
    stored, mixed = _as_dtype("dtype", dtype), None
    if mixed_precision is not None:
        mixed = _as_dtype("mixed_precision", mixed_precision)

    @cache
    def shape(used: torch.dtype) -> _Shape:
        return _Shape(build_model(load_config(loaded), used, bits, used), config, double_quant)

    @cache
    def step(used: torch.dtype, whole: bool, reentrant: bool) -> StepMemory:
        return trace_step(
            shape(used).model,
            batch=per_device_train_batch_size,
            length=max_length,
            checkpointing=gradient_checkpointing,
            reentrant=reentrant,
            autocast=mixed,
            loss=loss,
            joins=whole,
        )

    estimates = []
    for strategy in strategies:
        # DeepSpeed casts a model to the dtype of training, FSDP what it gathers; else autocast does, as it computes.
        used = stored if strategy in ("single", "ddp") or mixed is None else mixed
        zero3 = strategy.startswith("zero3")
        held = step(used, not zero3 and strategy != "fsdp2", zero3 and gradient_checkpointing)
        found = shape(used)
        parts = found.parts(strategy, num_gpus, optimizer_states, stored)
        estimates.append(
            MemoryEstimate(
                strategy=strategy,
                num_gpus=num_gpus,
                parameters=found.parameters,
                trainable=found.trainable,
                activations=held.activations,
                loss=held.loss,
                **parts,
            )
        )
    return estimates


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")


def _as_dtype(name: str, value: str | torch.dtype) -> torch.dtype:
    if isinstance(value, torch.dtype):
        return value
    _check_choice(name, value, ("bfloat16", "float16", "float32"))
    found: torch.dtype = getattr(torch, value)
    return found


@dataclass(frozen=True)
class _Weight:
    """A weight of the base: its elements, bytes that can be divided among GPUs, bytes of scales that can't."""

    numel: int
    size: int
    scales: int
    floating: bool


class _Shape:
    """A model with its adapter, and the bytes of both."""

    def __init__(self, model: Any, config: PeftConfig | None, double_quant: bool) -> None:
        found = decoder_layers(model)
        layers = list(found[2]) if found is not None else []
        self.hidden = int(getattr(model.config.get_text_config(), "hidden_size", 0))
        self.weights = {id(p): weight for p, weight in _weights(model, double_quant)}
        in_layers = [{id(p) for p in layer.parameters()} for layer in layers]
        self.layer_bytes = max((self._bytes(keys) for keys in in_layers), default=0)
        head = model.get_output_embeddings()
        self.head_bytes = 0 if head is None else self._bytes({id(p) for p in head.parameters()})
        self.parameters = sum(weight.numel for weight in self.weights.values())
        self.model = _adapted(model, config)
        own = {id(p): p for p in self.model.parameters() if id(p) not in self.weights}
        self.own = list(own.values())
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.trainable = sum(p.numel() for p in self.trained)

    def _bytes(self, keys: set[int]) -> int:
        return sum(self.weights[key].size for key in keys)

    def parts(self, strategy: str, gpus: int, states: float, stored: torch.dtype) -> dict[str, int]:
        """All parts of the estimate but those of the step."""
        base = sum(weight.size for weight in self.weights.values())
        scales = sum(weight.scales for weight in self.weights.values())
        adapter = sum(p.numel() * p.element_size() for p in self.own)
        trained = sum(p.numel() * p.element_size() for p in self.trained)
        if strategy in ("single", "ddp"):
            optimizer = int(states * trained)
            buckets = trained if strategy == "ddp" else 0
            return _whole(base=base + scales, adapter=adapter, gradients=trained, optimizer=optimizer, buffers=buckets)
        if strategy == "fsdp2":
            # Stored as loaded, trained weights in float32; gathered in the dtype of training.
            wide = stored.itemsize / max(self._itemsize(), 1)
            own = sum(p.numel() * _WIDE for p in self.own)
            trained = self.trainable * _WIDE
            kept = int((self._floating() * wide + base - self._floating()) / gpus) + scales
            return _whole(
                base=kept,
                adapter=own // gpus,
                gradients=trained // gpus,
                optimizer=int(states * trained / gpus),
                # Alone, a GPU has a copy of the layer at work and nothing to gather.
                buffers=max(_FSDP_LAYERS * self.layer_bytes, self.head_bytes) if gpus > 1 else self.layer_bytes,
            )
        return self._deepspeed(strategy, gpus, states, base=base, scales=scales, adapter=self._cast_bytes())

    def _deepspeed(
        self, strategy: str, gpus: int, states: float, *, base: int, scales: int, adapter: int
    ) -> dict[str, int]:
        masters = int(self.trainable * _WIDE * (1 + states))
        summed = self.trainable * _WIDE
        bucket = self.hidden**2 * self._itemsize()
        if strategy in ("zero1", "zero2"):
            return _whole(
                base=base + scales,
                adapter=adapter,
                gradients=summed if strategy == "zero1" else summed // gpus,
                optimizer=masters // gpus,
                # Two buckets of gradients: one is filled while the other is on its way.
                buffers=2 * bucket,
            )
        buffers = 2 * bucket
        if gpus > 1 or strategy == "zero3-offload":
            buffers += self._gathered()
        if strategy == "zero3":
            return _whole(
                base=base // gpus + scales,
                adapter=adapter // gpus,
                gradients=summed // gpus,
                optimizer=masters // gpus,
                buffers=buffers,
            )
        host = base + adapter + summed + masters
        return _whole(base=scales, adapter=0, gradients=0, optimizer=0, buffers=buffers, host=host)

    def _gathered(self) -> int:
        """Bytes of weights that ZeRO-3 has whole at the peak: small ones, those to be used again soon, and more."""
        item = self._itemsize()
        limit = ZERO3_PERSISTENT
        small = sum(weight.size for weight in self.weights.values() if weight.numel <= limit)
        small += sum(p.numel() * item for p in self.own if p.numel() <= limit)
        # A weight waits for its backward pass if what comes between, forward and backward, is less than the limit.
        reused = min(int(ZERO3_REUSE / 2) * item, self.layer_bytes * len(self._layers()))
        at_work = max(self.head_bytes, self.layer_bytes + int(_PREFETCH_SQUARES * self.hidden**2 * item))
        return small + reused + at_work

    def _layers(self) -> Sequence[nn.Module]:
        found = decoder_layers(self.model)
        return [] if found is None else list(found[2])

    def _floating(self) -> int:
        return sum(weight.size for weight in self.weights.values() if weight.floating)

    def _itemsize(self) -> int:
        """Bytes of an element of the base that is not quantized."""
        return max((w.size // w.numel for w in self.weights.values() if w.floating), default=0)

    def _cast_bytes(self) -> int:
        """Bytes of the adapter as DeepSpeed casts it."""
        return sum(p.numel() * self._itemsize() for p in self.own)


def _whole(**parts: int) -> dict[str, int]:
    return parts


def _adapted(model: Any, config: PeftConfig | None) -> Any:
    if config is None:
        config = RLoraConfig(task_type="CAUSAL_LM")
    with torch.device("meta"):
        return get_peft_model(model, config)


def _weights(model: nn.Module, double_quant: bool) -> list[tuple[nn.Parameter, _Weight]]:
    """Each weight of the base once, however many modules share it."""
    quantized = {module.weight: module for module in model.modules() if isinstance(module, QuantizedLinear)}
    entries = []
    for parameter in model.parameters():
        numel = parameter.numel()
        if parameter not in quantized:
            entries.append((parameter, _Weight(numel, numel * parameter.element_size(), 0, True)))
            continue
        bits, rows = quantized[parameter].bits, parameter.shape[0]
        size, scales = quantized_bytes(numel, rows, bits=bits, double_quant=double_quant)
        entries.append((parameter, _Weight(numel, size, scales, False)))
    return entries
