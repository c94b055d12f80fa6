"""What one forward and backward pass holds in memory: it is run on tensors that have shapes and no memory.

Each storage that comes into being is counted until it goes, and the largest sum is the peak. So whatever a layer
keeps for its backward pass counts as it is: inputs in 16 bits, the float32 copies of a norm, what R-LoRA saves,
recomputed layers with gradient checkpointing. Weights and gradients of parameters are not counted here.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..tuner import RLoraLayer
from ..tuner import adapter as adapter_module


# Tokens and entries of the vocabulary in a tile of logits of TRL's loss (`trl.kernels.chunked_logprob`).
LOSS_TOKENS = 4096
LOSS_VOCABULARY = 32768
# Of models whose layers are all alike so many are run; each further layer adds as much as the last.
_DEPTHS = (2, 3)


class StepMemory(NamedTuple):
    """Bytes at the peak: what the layers hold, and what the head and the loss hold."""

    activations: int
    loss: int


class _Meter(TorchDispatchMode):
    """Counts the bytes of storages between their making and their end, by what was running when they were made."""

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
    """The memory of TRL's loss, which makes logits tile by tile, and again in the backward pass."""

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


def trace_step(
    model: nn.Module,
    *,
    batch: int,
    length: int,
    checkpointing: bool,
    reentrant: bool = False,
    autocast: torch.dtype | None = torch.bfloat16,
    loss: str = "chunked",
    joins: bool = True,
) -> StepMemory:
    """
    What a forward and a backward pass hold at their peak.

    Args:
        model (`torch.nn.Module`): A `PeftModel` on the meta device, in which something trains.
        batch (`int`), length (`int`): Rows, and tokens of each.
        checkpointing (`bool`), reentrant (`bool`, *optional*, defaults to `False`): Gradient checkpointing.
        autocast (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): Of mixed precision; `None` for none.
        loss (`str`, *optional*, defaults to `"chunked"`): `"chunked"`: TRL's. `"full"`: the model's own, with all
            logits at once.
        joins (`bool`, *optional*, defaults to `True`): Whether weights are whole on the device, so that R-LoRA
            computes the base product itself where it can.

    Raises:
        NotImplementedError: If the model's forward pass depends on values.
    """
    run = partial(
        _run,
        model,
        batch=batch,
        length=length,
        checkpointing=checkpointing,
        reentrant=reentrant,
        autocast=autocast,
        loss=loss,
        joins=joins,
    )
    found = _alike_layers(model)
    if found is None:
        return run()
    parent, name, layers = found
    peaks = []
    for depth in _DEPTHS:
        setattr(parent, name, nn.ModuleList(list(layers)[:depth]))
        try:
            peaks.append(run())
        finally:
            setattr(parent, name, layers)
    more, steps = len(layers) - _DEPTHS[1], _DEPTHS[1] - _DEPTHS[0]
    first, second = peaks
    return StepMemory(*(b + (b - a) * more // steps for a, b in zip(first, second, strict=True)))


def decoder_layers(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList] | None:
    """The list of a model's layers, by the module that has it and its name there; `None` if there is none."""
    lists = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child)
    ]
    return max(lists, key=lambda entry: _numel(entry[2]), default=None)


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _alike_layers(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList] | None:
    """The model's layers if they are many and all alike."""
    found = decoder_layers(model)
    if found is None or len(found[2]) <= _DEPTHS[-1] + 1:
        return None
    signatures = {
        (type(layer), tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters()))
        for layer in found[2]
    }
    return found if len(signatures) == 1 else None


def _run(model: Any, *, checkpointing: bool, reentrant: bool, **options: Any) -> StepMemory:
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        ignored = stack.enter_context(_with_shapes(model))
        stack.enter_context(_without_values(model, joins=options.pop("joins"), autocast=options["autocast"]))
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        model.train()
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            stack.callback(base.gradient_checkpointing_disable)
        base.enable_input_require_grads()
        stack.callback(base.disable_input_require_grads)
        try:
            return _measure(base, ignored, **options)
        except Exception as error:
            raise NotImplementedError(
                f"The forward pass of {type(base).__name__} can't be run without values ({type(error).__name__}: "
                f"{str(error).splitlines()[0]}), so its activations can't be counted."
            ) from error


def _measure(
    base: Any, ignored: set[int], *, batch: int, length: int, autocast: torch.dtype | None, loss: str
) -> StepMemory:
    meter = _Meter(ignored)
    ids = torch.empty(batch, length, dtype=torch.long)

    def enter(part: str) -> Callable[..., None]:
        def hook(*args: Any) -> None:
            meter.part = part

        return hook

    def reached(module: Any, args: Any, output: Any) -> None:
        hidden = output[0] if not isinstance(output, torch.Tensor) else output
        meter.part = "loss"
        if hidden.requires_grad:
            hidden.register_hook(enter("activations"))

    backbone = getattr(base, base.base_model_prefix, None)
    if backbone is None or backbone is base:
        loss, handle = "full", None
    else:
        handle = backbone.register_forward_hook(reached)
    try:
        with meter:
            with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                value = _chunked(base, backbone, ids, autocast) if loss == "chunked" else _full(base, ids)
            meter.part = "loss"
            value.backward()
    finally:
        if handle is not None:
            handle.remove()
    return meter.peak


def _full(base: Any, ids: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = base(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def _chunked(base: Any, backbone: Any, ids: torch.Tensor, autocast: torch.dtype | None) -> torch.Tensor:
    head = base.get_output_embeddings()
    hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    # On a GPU TRL takes the tokens that count out of it, which is a copy.
    taken = hidden.reshape(-1, hidden.shape[-1]).clone()
    losses: torch.Tensor = _TiledLoss.apply(taken, head.weight.shape[0], autocast or hidden.dtype)
    return losses.sum()


@contextmanager
def _with_shapes(model: nn.Module) -> Iterator[set[int]]:
    """Have tensors of shapes on the CPU in place of parameters and buffers on the meta device; their storages."""
    places: list[tuple[dict[str, Any], str]] = [
        (tensors, name)
        for module in model.modules()
        for tensors in (cast(dict[str, Any], module._parameters), module._buffers)
        for name in tensors
        if tensors[name] is not None
    ]
    before = [tensors[name] for tensors, name in places]
    made: dict[int, Any] = {}
    ignored = set()
    for old in before:
        assert old is not None
        if id(old) in made:
            continue
        new = torch.empty(old.shape, dtype=old.dtype)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
            if old.requires_grad:
                # Gradients are counted apart, all of them at once.
                new.register_post_accumulate_grad_hook(_drop_gradient)
        made[id(old)] = new
        ignored.add(new.untyped_storage()._cdata)
    for (tensors, name), old in zip(places, before, strict=True):
        tensors[name] = made[id(old)]
    try:
        yield ignored
    finally:
        for (tensors, name), old in zip(places, before, strict=True):
            tensors[name] = old


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


@contextmanager
def _without_values(model: nn.Module, *, joins: bool, autocast: torch.dtype | None) -> Iterator[None]:
    """Leave out what depends on values, and do what R-LoRA does on a GPU."""
    adapters = [module for module in model.modules() if isinstance(module, adapter_module.MultiHeadAdapter)]
    layers = [module for module in model.modules() if isinstance(module, RLoraLayer)]
    dropouts = [adapter.dropout for adapter in adapters]
    draw_seed = adapter_module.draw_seed
    adapter_module.draw_seed = lambda: 0
    for adapter in adapters:
        if adapter.dropout_position == "head":
            adapter.dropout = 0.0  # its masks are made in the kernels and never stored
    for layer in layers:
        weight: Any = getattr(layer.base_layer, "weight", None)
        plain = type(layer.base_layer) is nn.Linear and layer.base_layer.bias is None
        if joins and plain and not weight.requires_grad and weight.dtype == (autocast or weight.dtype):
            layer.forward = partial(_joined, layer)
    masking = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    for module in masking:
        module.forward = partial(_dropout, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        adapter_module.draw_seed = draw_seed
        for adapter, dropout in zip(adapters, dropouts, strict=True):
            adapter.dropout = dropout
        for changed in (*layers, *masking):
            changed.__dict__.pop("forward", None)


def _joined(layer: Any, x: torch.Tensor) -> torch.Tensor:
    (adapter,) = layer.adapters_in_use()
    joined: torch.Tensor = adapter(x, weight=layer.base_layer.weight)
    return joined


def _dropout(module: nn.Dropout, x: torch.Tensor) -> torch.Tensor:
    """As on a GPU: it keeps a mask of a byte for each element. On a CPU it would keep one in the dtype of `x`."""
    if not module.training or module.p == 0.0:
        return x
    return torch.native_dropout(x, module.p, True)[0]
