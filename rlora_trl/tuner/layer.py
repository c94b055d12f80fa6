"""The tuner layer: a linear layer of any kind with R-LoRA adapters, each under its name."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from .adapter import MultiHeadAdapter
from .base_product import may_join, owns_output
from .bnb_cpu import undo_cpu_order
from .config import RLoraConfig
from .joined import JoinedLayers, ReadyOutput
from .offload import compute_device
from .routing import Routing
from .shared_inputs import join, take_ready


class RLoraLayer(BaseTunerLayer):
    """What PEFT expects of a layer with R-LoRA adapters: where their parameters are and which are active."""

    adapter_layer_names = ("rlora_adapters",)
    other_param_names = ("r", "num_heads", "scaling")
    # Number of experts whose weights the layer adapts; 0 for a linear layer.
    num_experts = 0

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        in_features, out_features = _get_in_out_features(self.get_base_layer())
        if in_features is None or out_features is None:
            raise TypeError(
                f"R-LoRA can't adapt a layer of type {type(self.get_base_layer()).__name__}, only linear layers. "
                "Leave it out of `target_modules`, or name it in `exclude_modules`."
            )
        self._init_state(in_features, out_features)
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )

    def _init_state(self, in_features: int, out_features: int) -> None:
        """Set the attributes that PEFT and this package read, for a layer without adapters."""
        self.in_features, self.out_features = in_features, out_features
        self.quantization_backend = None
        self.rlora_adapters = nn.ModuleDict()  # of MultiHeadAdapter, by adapter name
        self.r: dict[str, int] = {}
        self.num_heads: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.fan_in_fan_out = False

    def update_layer(self, adapter_name: str, config: RLoraConfig, *, layer_name: str, routing: Routing) -> None:
        """
        Add an adapter with the rank and scaling that its configuration sets for this layer.

        Args:
            adapter_name (`str`): Its name.
            config ([`RLoraConfig`]): Its configuration.
            layer_name (`str`): Name of this layer in the model.
            routing ([`Routing`]): State that the layers of this adapter share.
        """
        r = config.rank_of(layer_name, self.in_features, self.out_features)
        scaling = config.scaling(r, config.alpha_of(layer_name))
        self.fan_in_fan_out = self._stores_transposed_weight(config)
        self.r[adapter_name] = r
        self.num_heads[adapter_name] = config.num_heads
        self.scaling[adapter_name] = scaling
        self.rlora_adapters[adapter_name] = self._new_adapter(
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

    def _new_adapter(self, *args: Any, **kwargs: Any) -> MultiHeadAdapter:
        """An adapter for this kind of layer, by the arguments of [`MultiHeadAdapter`]."""
        return MultiHeadAdapter(*args, **kwargs)

    def _stores_transposed_weight(self, config: RLoraConfig) -> bool:
        transposed = isinstance(self.get_base_layer(), Conv1D)
        if isinstance(self.get_base_layer(), nn.Linear | Conv1D) and config.fan_in_fan_out != transposed:
            if config.fan_in_fan_out:
                warnings.warn(
                    "`fan_in_fan_out=True` does not apply to `torch.nn.Linear`, which stores its weight as "
                    "[d_out, d_in]; False is used here. Remove it from the configuration.",
                    stacklevel=2,
                )
            return transposed
        return config.fan_in_fan_out

    def _freeze_non_trainable_peft_weights(self, adapter_names: str | Sequence[str] | None = None) -> None:
        # PEFT calls this after it turned gradients on for all parameters of an adapter. The anchor stays frozen.
        super()._freeze_non_trainable_peft_weights(adapter_names)
        for adapter in self.rlora_adapters.values():
            adapter.freeze_anchor()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's method also casts to the dtype of the base layer. In 16 bits the mean of B would differ from the
        # anchor, and the model at step 0 from the base model.
        if device is None:
            device = compute_device(self.get_base_layer())
        # On "meta" the adapter would lose its values.
        if device is None or device.type == "meta" or adapter_name not in self.rlora_adapters:
            return
        adapter = self.rlora_adapters[adapter_name]
        if not any(parameter.device.type == "meta" for parameter in adapter.parameters()):
            adapter.to(device)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters, at the scaling of their configuration."""
        super().set_adapter(adapter_names, inference_mode)
        for name in self.rlora_adapters:
            self.set_scale(name, 1.0)

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Multiply the delta of an adapter by `scale`, on top of the scaling of its configuration."""
        if adapter_name in self.rlora_adapters:
            adapter: Any = self.rlora_adapters[adapter_name]
            adapter.scaling = scale * self.scaling[adapter_name]

    def adapters_in_use(self) -> list[MultiHeadAdapter]:
        """The adapters that a forward pass runs: the active ones, unless they are disabled or merged."""
        if self._disable_adapters or self.merged_adapters:
            return []
        # From the dictionaries, as `nn.Module.__getattr__` is slow and short steps are limited by the host.
        adapters = self._modules["rlora_adapters"]._modules
        active = self._active_adapter
        if isinstance(active, str):
            return [adapters[active]] if active in adapters else []
        return [adapters[name] for name in active if name in adapters]

    def get_base_weight(self) -> torch.Tensor:
        """The weight of the base layer, dequantized if it is quantized."""
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
        """Add to each row of `result` the delta of its adapter."""
        rows_by_adapter: dict[str, list[int]] = {}
        for row, name in enumerate(adapter_names):
            rows_by_adapter.setdefault(name, []).append(row)

        result = result.clone()
        for name, rows in rows_by_adapter.items():
            if name in self.rlora_adapters:  # neither "__base__" nor an adapter without this layer
                result[rows] += self.rlora_adapters[name](x[rows]).to(result.dtype)
        return result

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The adapter's delta in the layout of the base weight; see [`MultiHeadAdapter.delta_weight`]."""
        delta = self.rlora_adapters[adapter_name].delta_weight()
        return delta.mT if self.fan_in_fan_out else delta

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
                    f"Merging adapter {name!r} gives weights that are not finite: the adapter is damaged. Nothing was "
                    "merged in this layer; load an earlier adapter."
                )
            self.set_base_weight(merged)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract the delta of all merged adapters from the base weight."""
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
        # Add in the wider of the two dtypes and round once.
        return (weight.to(delta.dtype) + sign * delta.to(weight.device)).to(weight.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        adapter = self.rlora_adapters[adapter_name] if adapter_name in self.rlora_adapters else None
        return adapter is None or adapter.router is None


class RLoraLinear(nn.Module, RLoraLayer):
    """A linear layer (`nn.Linear`, transformers' `Conv1D`, or quantized) with R-LoRA adapters."""

    # The group that this layer begins, and its output from the first layer of its group; see `shared_inputs`.
    joined: JoinedLayers | None = None
    ready: ReadyOutput | None = None

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

        # One adapter on a plain layer computes both products, here or in an earlier layer with the same input.
        active = self.adapters_in_use()
        if len(active) == 1 and adapter_names is None and not (args or kwargs):
            output = self._join(active[0], x)
            if output is not None:
                return output

        result = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            self._check_gradient(x, result)

        if adapter_names is not None:
            return self._mixed_batch_delta(x, result, adapter_names)
        for adapter in active:
            result = adapter(x, base=result, inplace=owns_output(self.base_layer))
        return result

    def _join(self, adapter: MultiHeadAdapter, x: torch.Tensor) -> torch.Tensor | None:
        """The output together with the delta; `None` if the base layer must be called."""
        if torch.compiler.is_compiling():
            return None  # a graph would depend on groups, and the compiler plans products itself
        if not torch.is_grad_enabled():
            return None
        batch = adapter.routing.batch
        groups = batch.groups
        if groups is not None and groups.observes:
            groups.observe(self, x)
        if not may_join(x) or (batch.usage is not None and not adapter.training):
            return None  # the adapter counts the use of its heads
        output = take_ready(self, adapter, x) if self.ready is not None else None
        return join(self, adapter, x, batch) if output is None else output

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out groups, which belong to the layers of one model."""
        return {**self.__dict__, "joined": None, "ready": None}

    def _check_gradient(self, x: torch.Tensor, result: torch.Tensor) -> None:
        """Raise if the base layer cuts the gradient, which would go unnoticed."""
        if x.requires_grad and not result.requires_grad and torch.is_grad_enabled():
            name = self.quantization_backend.backend_name
            raise RuntimeError(
                f"No gradient flows through this base, which is quantized with {name}, so the layers below would get "
                "wrong gradients. Kernels that also quantize activations cut it, and some inference kernels do. To "
                "train, load a base with quantized weights only, for example torchao's `Int8WeightOnlyConfig`; for "
                "inference run the model under `torch.no_grad()`."
            )

    def __repr__(self) -> str:
        return "rlora." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)
