"""The tuner layer: a linear layer of any kind with R-LoRA adapters, by name, beside it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from .adapter import MultiHeadAdapter
from .config import RLoraConfig
from .routing import Routing


# Where a 4-bit layer on a CPU has its scales as they were stored.
_KEPT = "_rlora_kept_scales"


def owns_output(layer: nn.Module) -> bool:
    """Whether the output of a layer is a new tensor that nothing else holds, so that it may be written over."""
    if torch.compiler.is_compiling():
        return False  # the compiler decides what is written over what
    hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    return type(layer) in (nn.Linear, Conv1D) and not hooked


def joinable_weight(layer: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """
    The weight of a layer whose product may be computed together with the delta: frozen, whole, in the products' dtype.

    Only in training on a GPU, where it saves memory traffic. `None` where the layer must be called: it has a bias or
    hooks, is quantized, sharded (DeepSpeed ZeRO-3; what FSDP2 has gathered is whole) or trained, or `torch.compile` is
    at work.
    """
    if type(layer) is not nn.Linear or not x.is_cuda or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    own = layer._parameters  # `nn.Module` looks attributes up in Python; and what is no parameter is not joined
    weight = own.get("weight")
    if type(weight) is not nn.Parameter or weight.requires_grad or own.get("bias") is not None:
        return None
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    whole = weight.dtype == dtype and weight.ndim == 2 and weight.device == x.device and "ds_id" not in vars(weight)
    return weight if whole and owns_output(layer) and not layer._backward_hooks else None


def undo_cpu_order(layer: nn.Module) -> None:
    """
    Put 4-bit weights back in the order that dequantization and the backward pass know.

    On some CPUs bitsandbytes (0.50) brings them into another order for inference, and puts them back only where the
    state dict is read: with scales rounded anew, or without double quantization left in the other order. Scales that
    [`guard_cpu_order`] kept come back as they were. (Since bitsandbytes#1804; no upstream issue as of 0.50.2, where
    bitsandbytes#2078 is about the same order in `to`.)
    """
    quant_state = getattr(getattr(layer, "weight", None), "quant_state", None)
    if getattr(quant_state, "packing_format_for_cpu", False):
        layer._save_to_state_dict({}, "", False)
        kept = vars(layer).get(_KEPT)
        if kept is not None:
            vars(quant_state).clear()
            vars(quant_state).update(kept)
    absmax = getattr(quant_state, "absmax", None)
    if quant_state is not None and absmax is not None and absmax.ndim == 2:
        quant_state.absmax = absmax.T.reshape(-1).float()


def _before_forward(layer: nn.Module, args: tuple) -> None:
    quant_state = getattr(layer.weight, "quant_state", None)
    if not getattr(quant_state, "packing_format_for_cpu", False):
        # bitsandbytes puts other tensors in their place and does not write into these.
        vars(layer)[_KEPT] = None if quant_state is None else dict(vars(quant_state))
    elif layer.training or (torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in args)):
        undo_cpu_order(layer)


def _before_state_dict(layer: nn.Module, prefix: str, keep_vars: bool) -> None:
    if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
        undo_cpu_order(layer)


def guard_cpu_order(model: nn.Module) -> None:
    """
    Make 4-bit layers on a CPU train after inference, and keep them as they were stored, bit for bit.

    In the order for inference (see [`undo_cpu_order`]) bitsandbytes passes no gradient on.
    """
    for layer in model.modules():
        if not hasattr(layer, "support_avx512bf16_for_cpu") or _before_forward in layer._forward_pre_hooks.values():
            continue
        if layer.weight.device.type == "cpu":
            vars(layer)[_KEPT] = None
            layer.register_forward_pre_hook(_before_forward)
            layer.register_state_dict_pre_hook(_before_state_dict)


def offload_hook(module: nn.Module) -> AlignDevicesHook | None:
    """The hook by which accelerate brings a module's weights to a device for a forward pass; `None` without one."""
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return next((hook for hook in hooks if isinstance(hook, AlignDevicesHook) and hook.offload), None)


def _device_of(layer: nn.Module) -> torch.device | None:
    """
    The device that a layer computes on: that of its first tensor, as HQQ and AQLM have no `weight`, which PEFT looks
    for, and where accelerate offloads the weights, the device that they are brought to.
    """
    hook = offload_hook(layer)
    if hook is not None and hook.execution_device is not None:
        return torch.device(hook.execution_device)
    tensor = next(chain(layer.parameters(), layer.buffers()), getattr(layer, "W_q", None))
    return None if tensor is None else tensor.device


class RLoraLayer(BaseTunerLayer):
    """What PEFT needs to know of a layer with R-LoRA adapters: where their parameters are and which are active."""

    adapter_layer_names = ("rlora_adapters",)
    other_param_names = ("r", "num_heads", "scaling")

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.rlora_adapters = nn.ModuleDict()  # of MultiHeadAdapter, by adapter name
        self.r: dict[str, int] = {}
        self.num_heads: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.fan_in_fan_out = False

        in_features, out_features = _get_in_out_features(self.get_base_layer())
        if in_features is None or out_features is None:
            raise TypeError(
                f"R-LoRA can't adapt a layer of type {type(self.get_base_layer()).__name__}, only linear layers. "
                "Leave it out of `target_modules`, or name it in `exclude_modules`."
            )
        self.in_features, self.out_features = in_features, out_features

    def update_layer(self, adapter_name: str, config: RLoraConfig, *, layer_name: str, routing: Routing) -> None:
        """
        Add an adapter, of the rank and the scaling that its configuration has for this layer.

        Args:
            adapter_name (`str`): Its name.
            config ([`RLoraConfig`]): Its configuration.
            layer_name (`str`): Name of this layer in the model.
            routing ([`Routing`]): What the layers of this adapter share.
        """
        r = config.rank_of(layer_name, self.in_features, self.out_features)
        scaling = config.scaling(r, config.alpha_of(layer_name))
        self.fan_in_fan_out = self._stores_transposed_weight(config)
        self.r[adapter_name] = r
        self.num_heads[adapter_name] = config.num_heads
        self.scaling[adapter_name] = scaling
        self.rlora_adapters[adapter_name] = MultiHeadAdapter(
            self.in_features,
            self.out_features,
            r,
            config.num_heads,
            scaling,
            router=config.router,
            router_top_k=config.router_top_k,
            share_a=config.share_a,
            routing=routing,
            router_init=config.router_init,
            dropout=config.head_dropout,
            dropout_position=config.dropout_position,
            init_weights=config.init_weights,
            init_gamma=config.init_gamma,
        ).train(self.training)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _stores_transposed_weight(self, config: RLoraConfig) -> bool:
        transposed = isinstance(self.get_base_layer(), Conv1D)
        if isinstance(self.get_base_layer(), nn.Linear | Conv1D) and config.fan_in_fan_out != transposed:
            if config.fan_in_fan_out:
                warnings.warn(
                    "`fan_in_fan_out=True` does not hold for `torch.nn.Linear`, whose weight is [d_out, d_in]; it is "
                    "taken as False here. Remove it from the configuration.",
                    stacklevel=2,
                )
            return transposed
        return config.fan_in_fan_out

    def _freeze_non_trainable_peft_weights(self, adapter_names: str | Sequence[str] | None = None) -> None:
        # PEFT calls this wherever it turned gradients on for all parameters of an adapter; the anchor is not one to
        # train.
        super()._freeze_non_trainable_peft_weights(adapter_names)
        for adapter in self.rlora_adapters.values():
            adapter.freeze_anchor()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's method also casts to the base layer's dtype. Rounded to 16 bits, B and its mean in the anchor would no
        # longer agree, and the model at step 0 would not be the base model.
        if device is None:
            device = _device_of(self.get_base_layer())
        # On "meta", where a base without values is, the adapter would lose its own.
        if device is None or device.type == "meta" or adapter_name not in self.rlora_adapters:
            return
        adapter = self.rlora_adapters[adapter_name]
        if not any(parameter.device.type == "meta" for parameter in adapter.parameters()):
            adapter.to(device)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones, at the scaling of their configuration."""
        super().set_adapter(adapter_names, inference_mode)
        for name in self.rlora_adapters:
            self.set_scale(name, 1.0)

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Multiply the delta of an adapter by `scale`, beyond the scaling of its configuration; 1.0 is as it was."""
        if adapter_name in self.rlora_adapters:
            adapter: Any = self.rlora_adapters[adapter_name]
            adapter.scaling = scale * self.scaling[adapter_name]

    def adapters_in_use(self) -> list[MultiHeadAdapter]:
        """The adapters that a forward pass runs: active ones, unless they are disabled or merged."""
        if self._disable_adapters or self.merged_adapters:
            return []
        # Straight from the dictionaries: `nn.Module` looks attributes up in Python, which short steps feel.
        adapters = self._modules["rlora_adapters"]._modules
        active = self._active_adapter
        if isinstance(active, str):
            return [adapters[active]] if active in adapters else []
        return [adapters[name] for name in active if name in adapters]

    def get_base_weight(self) -> torch.Tensor:
        """The weight of the base layer, dequantized where it is quantized."""
        undo_cpu_order(self.get_base_layer())
        return super().get_base_weight()

    def _check_mixed_batch(self, x: torch.Tensor, adapter_names: list[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                f"`adapter_names` needs one name for each of the {len(x)} rows of the batch, got "
                f'{len(adapter_names)}. Use "__base__" for rows without an adapter.'
            )
        if self.merged:
            raise ValueError(
                f"`adapter_names` can't be used while adapters are merged ({', '.join(self.merged_adapters)}). Call "
                "`unmerge_adapter()` first."
            )

    def _mixed_batch_delta(self, x: torch.Tensor, result: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        """Add to each row of `result` the delta of the adapter named for it."""
        rows_of: dict[str, list[int]] = {}
        for row, name in enumerate(adapter_names):
            rows_of.setdefault(name, []).append(row)
        result = result.clone()
        for name, rows in rows_of.items():
            if name in self.rlora_adapters:  # neither "__base__" nor an adapter that leaves this layer alone
                result[rows] += self.rlora_adapters[name](x[rows]).to(result.dtype)
        return result


class RLoraLinear(nn.Module, RLoraLayer):
    """A linear layer (`nn.Linear`, transformers' `Conv1D`, or quantized) with R-LoRA adapters."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: RLoraConfig,
        *,
        layer_name: str,
        routing: Routing,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        RLoraLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, layer_name=layer_name, routing=routing)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None:
            self._check_mixed_batch(x, adapter_names)
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        active = self.adapters_in_use()
        if adapter_names is None and len(active) == 1 and not (args or kwargs):
            weight = joinable_weight(self.base_layer, x)
            if weight is not None:
                return active[0](x, weight=weight)
        result = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            self._check_gradient(x, result)
        if adapter_names is not None:
            return self._mixed_batch_delta(x, result, adapter_names)
        for adapter in active:
            result = adapter(x, base=result, inplace=owns_output(self.base_layer))
        return result

    def _check_gradient(self, x: torch.Tensor, result: torch.Tensor) -> None:
        """Refuse to train where the base layer cuts the gradient, which would go unnoticed."""
        if x.requires_grad and not result.requires_grad and torch.is_grad_enabled():
            name = self.quantization_backend.backend_name
            raise RuntimeError(
                f"No gradient flows through this base, which is quantized with {name}: the layers below would be "
                "trained on a wrong one. Kernels that quantize activations too, and some made for inference, are so. "
                "Load the base with only its weights quantized, for example with torchao's `Int8WeightOnlyConfig`; "
                "for inference run the model under `torch.no_grad()`."
            )

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The adapter's delta in the layout of the base weight; see [`MultiHeadAdapter.delta_weight`]."""
        delta = self.rlora_adapters[adapter_name].delta_weight()
        return delta.T if self.fan_in_fan_out else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Add the delta of the active adapters to the base weight.

        Args:
            safe_merge (`bool`, *optional*, defaults to `False`): Check the merged weight for NaN and infinity first.
            adapter_names (`list[str]`, *optional*): The adapters to merge; by default the active ones.

        Raises:
            ValueError: If an adapter's delta depends on the token, or a merged weight would not be finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.rlora_adapters:
                continue
            merged = self._shifted_weight(name, sign=1)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(
                    f"Merging adapter {name!r} gives weights that are not finite; it seems broken. Nothing was merged "
                    "in this layer."
                )
            self.set_base_weight(merged)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take the delta of all merged adapters off the base weight again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.rlora_adapters:
                self.set_base_weight(self._shifted_weight(name, sign=-1))

    def _shifted_weight(self, adapter_name: str, sign: int) -> torch.Tensor:
        weight = self.get_base_weight()
        delta = self.get_delta_weight(adapter_name)
        # Added in the wider of the two dtypes, rounded once.
        return (weight.to(delta.dtype) + sign * delta.to(weight.device)).to(weight.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        adapter = self.rlora_adapters[adapter_name] if adapter_name in self.rlora_adapters else None
        return adapter is None or adapter.router is None

    def __repr__(self) -> str:
        return "rlora." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)
