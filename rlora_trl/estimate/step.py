"""
The memory of one forward and backward pass, traced on tensors that have shapes and no data.

Each storage is counted from its creation to its end, and the largest sum is the peak. So everything that a layer saves
for its backward pass counts as it is: inputs in 16 bits, the float32 copies of a norm, what R-LoRA saves, layers that
gradient checkpointing recomputes. Weights and gradients of parameters are not counted here.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..tuner import MultiHeadAdapter, base_product, find_routings
from .settings import TrainingSettings


# Tokens and vocabulary entries in a tile of logits of TRL's loss (`trl.kernels.chunked_logprob`).
LOSS_TOKENS = 4096
LOSS_VOCABULARY = 32768
# Models whose layers are all alike are run with these numbers of layers; each further layer adds the same.
_DEPTHS = (2, 3)


class StepMemory(NamedTuple):
    """Bytes at the peak: what the layers hold, and what the head and the loss hold."""

    activations: int
    loss: int


class _Meter(TorchDispatchMode):
    """Counts the bytes of live storages, by the part of the step that created them."""

    def __init__(self, ignored: set[int]) -> None:
        super().__init__()
        self.part = "activations"
        self.live = {"activations": 0, "loss": 0}
        self.peak = StepMemory(0, 0)
        self._known: dict[int, tuple[str, int]] = {}
        self._ignored = ignored

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or key in self._ignored:
            return
        self._known[key] = (self.part, storage.nbytes())
        self.live[self.part] += storage.nbytes()
        weakref.finalize(storage, self._end, key)
        if sum(self.live.values()) > sum(self.peak):
            self.peak = StepMemory(**self.live)

    def _end(self, key: int) -> None:
        part, size = self._known.pop(key)
        self.live[part] -= size


class _TiledLoss(torch.autograd.Function):
    """The memory of TRL's loss, which computes logits tile by tile, and again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, vocabulary: int, dtype: torch.dtype) -> torch.Tensor:
        ctx.save_for_backward(hidden)
        ctx.tile = (min(len(hidden), LOSS_TOKENS), min(vocabulary, LOSS_VOCABULARY))
        ctx.dtype = dtype
        _tile = hidden.new_empty(ctx.tile, dtype=dtype)
        _chunk = hidden[:LOSS_TOKENS].to(dtype)
        return hidden.new_empty(len(hidden), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (hidden,) = ctx.saved_tensors
        wide = torch.empty_like(hidden, dtype=torch.float32)
        _tile = hidden.new_empty(ctx.tile, dtype=ctx.dtype)
        _chunk = hidden[:LOSS_TOKENS].to(ctx.dtype)
        return wide.to(hidden.dtype), None, None


def trace_step(model: nn.Module, run: TrainingSettings, *, joins: bool, reentrant: bool) -> StepMemory:
    """
    The memory that a forward and a backward pass hold at their peak.

    Args:
        model (`torch.nn.Module`): A `PeftModel` on the meta device with trainable weights.
        run ([`TrainingSettings`]): Batch, loss, mixed precision and checkpointing.
        joins (`bool`): Whether weights are whole on the device, so that R-LoRA computes the base product where it can.
        reentrant (`bool`): Use reentrant gradient checkpointing.

    Returns:
        [`StepMemory`]: Bytes.

    Raises:
        NotImplementedError: If the model's forward pass depends on values.
    """
    alike = _alike_layers(model)
    if alike is None:
        return _run(model, run, joins, reentrant)

    parent, name, layers = alike
    peaks = []
    for depth in _DEPTHS:
        setattr(parent, name, nn.ModuleList(list(layers)[:depth]))
        try:
            peaks.append(_run(model, run, joins, reentrant))
        finally:
            setattr(parent, name, layers)

    more, steps = len(layers) - _DEPTHS[1], _DEPTHS[1] - _DEPTHS[0]
    return StepMemory(*(second + (second - first) * more // steps for first, second in zip(*peaks, strict=True)))


def decoder_layers(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList] | None:
    """The largest list of a model's layers, after its parent module and its name there; `None` if there is none."""
    lists = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child)
    ]
    return max(lists, key=lambda entry: sum(p.numel() for p in entry[2].parameters()), default=None)


def _alike_layers(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList] | None:
    """The model's layers if they are many and all alike."""
    layers = decoder_layers(model)
    if layers is None or len(layers[2]) <= _DEPTHS[-1] + 1:
        return None
    signatures = {
        (type(layer), tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters()))
        for layer in layers[2]
    }
    return layers if len(signatures) == 1 else None


def _run(model: Any, run: TrainingSettings, joins: bool, reentrant: bool) -> StepMemory:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")

        # Tensors without data, and nothing that would read values.
        for routing in find_routings(model):
            stack.enter_context(routing.using(seed=0))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        weights = stack.enter_context(_fake_weights(model))
        stack.enter_context(_as_on_gpu(model, joins=joins, autocast=run.autocast))

        # The state of training.
        model.train()
        if run.gradient_checkpointing:
            # The older name warns where there is another (transformers 5.23), and 5.17 has no other.
            name = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
            enable = getattr(base, f"{name}_checkpointing_enable")
            enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": reentrant}})
            stack.callback(getattr(base, f"{name}_checkpointing_disable"))
        base.enable_input_require_grads()
        stack.callback(base.disable_input_require_grads)

        try:
            return _measure(base, weights, run)
        except Exception as error:
            raise NotImplementedError(
                f"The forward pass of {type(base).__name__} can't be run without values ({type(error).__name__}: "
                f"{str(error).splitlines()[0]}), so its activations can't be counted."
            ) from error


def _measure(base: Any, weights: set[int], run: TrainingSettings) -> StepMemory:
    """Run a forward and a backward pass under the meter; storages of `weights` are not counted."""
    meter = _Meter(weights)
    ids = torch.empty(run.per_device_train_batch_size, run.max_length, dtype=torch.long)

    def enter_loss(module: Any, args: Any, output: Any) -> None:
        # The head and the loss begin where the backbone returns, and end when its gradient arrives.
        hidden = output[0] if not isinstance(output, torch.Tensor) else output
        meter.part = "loss"
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: setattr(meter, "part", "activations"))

    backbone: Any = getattr(base, base.base_model_prefix, None)
    has_backbone = backbone is not None and backbone is not base
    with backbone.register_forward_hook(enter_loss) if has_backbone else nullcontext(), meter:
        with torch.autocast("cpu", run.autocast or torch.bfloat16, enabled=run.autocast is not None):
            if has_backbone and run.loss == "chunked":
                loss = _chunked(base, backbone, ids, run.autocast)
            else:
                loss = base(input_ids=ids, labels=ids, use_cache=False).loss
        meter.part = "loss"
        loss.backward()
    return meter.peak


def _chunked(base: Any, backbone: Any, ids: torch.Tensor, autocast: torch.dtype | None) -> torch.Tensor:
    head = base.get_output_embeddings()
    hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    # On a GPU TRL selects the tokens that count, which makes a copy.
    taken = hidden.reshape(-1, hidden.shape[-1]).clone()
    losses: torch.Tensor = _TiledLoss.apply(taken, head.weight.shape[0], autocast or hidden.dtype)
    return losses.sum()


@contextmanager
def _fake_weights(model: nn.Module) -> Iterator[set[int]]:
    """Replace parameters and buffers on the meta device by fake tensors on the CPU; yields their storages."""
    slots: list[tuple[dict[str, Any], str, torch.Tensor]] = [
        (tensors, name, tensor)
        for module in model.modules()
        for tensors in (cast(dict[str, Any], module._parameters), cast(dict[str, Any], module._buffers))
        for name, tensor in tensors.items()
        if tensor is not None
    ]
    fakes: dict[int, torch.Tensor] = {}  # by the tensor, which modules may share
    for tensors, name, tensor in slots:
        if id(tensor) not in fakes:
            fakes[id(tensor)] = _fake_weight(tensor)
        tensors[name] = fakes[id(tensor)]
    try:
        yield {fake.untyped_storage()._cdata for fake in fakes.values()}
    finally:
        for tensors, name, tensor in slots:
            tensors[name] = tensor


def _fake_weight(tensor: torch.Tensor) -> torch.Tensor:
    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
    if not isinstance(tensor, nn.Parameter):
        return fake
    fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
    if tensor.requires_grad:
        # Gradients are counted apart, all of them at once.
        fake.register_post_accumulate_grad_hook(_drop_gradient)
    return fake


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


@contextmanager
def _as_on_gpu(model: nn.Module, *, joins: bool, autocast: torch.dtype | None) -> Iterator[None]:
    """Run layers as they run on a GPU: base products that R-LoRA computes, and masks of dropout."""
    adapters = [module for module in model.modules() if isinstance(module, MultiHeadAdapter)]
    if joins:
        base_product.JOINED_DEVICES.add("cpu")
        base_product.JOINED_TYPES.add(FakeTensor)
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    probabilities = [adapter.dropout for adapter in adapters]

    # Masks of head dropout are made in the kernels and never stored.
    for adapter in adapters:
        if adapter.dropout_position == "head":
            adapter.dropout = 0.0
    for dropout in dropouts:
        dropout.forward = partial(_dropout, dropout)  # type: ignore[method-assign]

    try:
        yield
    finally:
        for adapter, probability in zip(adapters, probabilities, strict=True):
            adapter.dropout = probability
        for module in dropouts:
            module.__dict__.pop("forward", None)
        base_product.JOINED_DEVICES.discard("cpu")
        base_product.JOINED_TYPES.discard(FakeTensor)


def _dropout(module: nn.Dropout, x: torch.Tensor) -> torch.Tensor:
    """Dropout as on a GPU, where it saves a mask of one byte per element. On a CPU the mask has the dtype of `x`."""
    if not module.training or module.p == 0.0:
        return x
    return torch.native_dropout(x, module.p, True)[0]
