"""
Mixtures of experts, whose weights are parameters of three dimensions: an adapter for each expert.

[`RLoraExperts`] wraps the module of a model that holds the experts. For each adapted weight it has an
[`RLoraExpertWeight`], named as the weight, with one [`ExpertsAdapter`] per adapter name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional as F

from ..kernels import rank_space
from ..kernels.grouped import (
    ExpertsProbe,
    ExpertWeights,
    GroupedCall,
    concat_experts,
    fused_grouped,
    grouped_delta,
    grouped_product,
)
from .adapter import MultiHeadAdapter
from .config import RLoraConfig
from .expert_products import ExpertProducts, ExpertRows
from .forward_pass import outside_graphs
from .initialization import init_heads_, init_router_
from .layer import RLoraLayer
from .routing import Routing


# Spreads the index of an expert over the bits of a seed.
_SPREAD = 0x9E3779B97F4A7C15
_ALIGNMENT = 16


class ReadyExperts(NamedTuple):
    """
    What the rows of one forward pass need of an adapter, so that its parameters need not be in memory any more.

    Args:
        weights ([`ExpertWeights`]): The concatenated weights.
        table (`torch.Tensor` of shape `[E, K, N]`, *optional*): Logits of the heads for each of K kinds of tokens, in
            place of routers; see [`ExpertsAdapter.row_kinds`].
        seed (`int`, *optional*): Seed of the dropout masks.
    """

    weights: ExpertWeights
    table: torch.Tensor | None
    seed: int | None


class ExpertsAdapter(MultiHeadAdapter):
    """
    The adapters of E experts: [`MultiHeadAdapter`] with tensors of one more dimension, the first.

    Each expert has its own A, heads, router and anchor, as if each were a linear layer.

    Args:
        num_experts (`int`): E. The other arguments are those of [`MultiHeadAdapter`].
    """

    # Dtype of the last products, in which inference keeps its weights.
    rows_dtype: torch.dtype | None = None

    def reset_parameters(self) -> None:
        """Draw new initial values and set the anchor to them."""
        for expert in range(self.num_experts):
            init_heads_(self.A[expert], self.B[expert], self.init_weights, self.init_gamma)
            if self.router is not None:
                init_router_(
                    self.router[expert], self.router_init if self.init_weights is not False else "kaiming_uniform"
                )
        self.reset_anchor()

    def forward(self, *args: Any, **kwargs: Any) -> ReadyExperts:  # type: ignore[override]
        """
        Prepare a forward pass.

        DeepSpeed ZeRO-3 gathers parameters for a call of their module, and all ranks must call it equally often. So it
        is called once, whatever experts the tokens are sent to.
        """
        training = self.training
        if training or torch.is_grad_enabled():
            self.routing.note_forward()
        if not training and not torch.is_grad_enabled():
            return self._inference_weights()
        return self._ready(self.draw_seed() if training and self.dropout > 0.0 else None)

    def _ready(self, seed: int | None) -> ReadyExperts:
        multiple = _ALIGNMENT if self.A.device.type == "cuda" else 1
        layout = self.layout()
        weights = concat_experts(*self.kernel_tensors(), layout, scaling=self.scaling, multiple=multiple)
        return ReadyExperts(weights, self._table(), seed)

    def _inference_weights(self) -> ReadyExperts:
        """[`_ready`], kept until a parameter changes, in the dtype of the last products."""
        if "ds_id" in vars(self.A):
            return self._ready(None)  # ZeRO-3 gathers parameters for one call
        stored = [*self._parameters.values(), *self._buffers.values()]
        tensors = [tensor for tensor in stored if tensor is not None]
        key = [torch.is_inference_mode_enabled(), id(self.fixed_logits), self.scaling, self.rows_dtype]
        key += [tensor._version for tensor in tensors] + [tensor.data_ptr() for tensor in tensors]
        kept: Any = self._cache
        if kept is None or kept[0] != key:
            ready = self._ready(None)
            if self.rows_dtype is not None:
                weights = ready.weights
                down, up = weights.down.to(self.rows_dtype), weights.up.to(self.rows_dtype)
                ready = ready._replace(weights=weights._replace(down=down, up=up))
            kept = self._cache = (key, ready, self.fixed_logits)  # type: ignore[assignment]
        return kept[1]

    def task_logits(self) -> torch.Tensor:
        """
        Logits of the heads for each of the K tasks of a task router, and last those of the mean over tasks.

        Returns:
            `torch.Tensor` of shape `[E, K + 1, N]`: In float32 or wider.
        """
        assert self.router is not None
        logits = self.router.to(torch.promote_types(self.router.dtype, torch.float32))  # [E, K, N]
        return torch.cat([logits, logits.softmax(-1).mean(1, keepdim=True).log()], dim=1)

    def _table(self) -> torch.Tensor | None:
        if self.fixed_logits is not None:
            return self.fixed_logits.reshape(-1, 1, self.num_heads).expand(self.num_experts, -1, -1)  # [E, 1, N]
        return self.task_logits() if self.router_kind == "task" else None

    def _row_logits(self, table: torch.Tensor, rows: int, of_rows: ExpertRows) -> torch.Tensor:
        """Logits `[S, N]` of rows, from a table `[E, K, N]`."""
        kinds = table.shape[1]
        places = of_rows.groups.experts(rows, table.device) * kinds + self._kinds(kinds, rows, of_rows, table.device)
        return F.embedding(places, table.reshape(-1, table.shape[2]))

    def _kinds(self, kinds: int, rows: int, of_rows: ExpertRows, device: torch.device) -> torch.Tensor:
        """Which row of a table each row has: the task of its token, or the last."""
        last = torch.full((rows,), kinds - 1, device=device)
        if self.fixed_logits is not None:
            return last
        ids = self.routing.token_task_ids(torch.Size([of_rows.num_tokens]), device)  # [T]
        if ids is None:
            self.routing.warn_of_mean_weights()
            return last
        if self.routing.batch.task_ids is None:
            return ids[:1].expand(rows)  # one task for all tokens
        if of_rows.tokens is None:
            raise RuntimeError(
                "`task_ids` need the token of each row that an expert gets, and the experts of this model do not "
                "select rows of their input. Choose one task for all rows with `set_task`."
            )
        tasks = ids[of_rows.tokens]
        return torch.where(tasks < 0, kinds - 1, tasks)

    def delta(self, ready: ReadyExperts, x: torch.Tensor, rows: ExpertRows) -> torch.Tensor:
        """
        The delta of rows.

        Args:
            ready ([`ReadyExperts`]): The result of the call of this module.
            x (`torch.Tensor` of shape `[S, d_in]`): Rows, sorted by expert.
            rows ([`ExpertRows`]): Their experts and tokens.

        Returns:
            `torch.Tensor` of shape `[S, d_out]`: In the dtype of `x`.
        """
        seed, groups = ready.seed, rows.groups
        if seed is not None and groups.expert is not None:
            # Rows are numbered within each expert.
            seed = (seed ^ ((groups.expert + 1) * _SPREAD)) & (2**63 - 1)
        logits = self._logits_and_usage(ready, x, rows)
        return grouped_delta(
            x,
            ready.weights,
            groups,
            dropout=self.dropout,
            seed=seed,
            dropout_position=self.dropout_position,
            logits=logits,
            probe=self._probe(x, rows),
        )

    def joined_product(
        self,
        ready: ReadyExperts,
        x: torch.Tensor,
        rows: ExpertRows,
        product: Callable[[torch.Tensor], torch.Tensor],
        product_backward: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """
        The product of rows with the weight of the experts, and their delta, without dropout on the input.

        Args:
            ready ([`ReadyExperts`]), x (`torch.Tensor`), rows ([`ExpertRows`]): As in [`delta`].
            product (`Callable`), product_backward (`Callable`): See [`GroupedCall`].

        Returns:
            `torch.Tensor` of shape `[S, d_out]`: In the dtype of `x`.
        """
        logits = self._logits_and_usage(ready, x, rows)
        layout, initial_A = ready.weights.layout, ready.weights.initial_A
        dropout = 0.0 if ready.seed is None else self.dropout
        probe = self._probe(x, rows)
        call = GroupedCall(rows.groups, layout, initial_A, dropout, ready.seed, product, product_backward, probe)
        return fused_grouped(x, ready.weights, logits, call)

    def _logits_and_usage(self, ready: ReadyExperts, x: torch.Tensor, rows: ExpertRows) -> torch.Tensor | None:
        """Logits of rows that replace a router's; and in an evaluation, the rows are counted."""
        if self.rows_dtype != x.dtype:
            self.rows_dtype = x.dtype
        logits = None
        if ready.table is not None:
            logits = self._row_logits(ready.table, len(x), rows)
        if not self.training and self.usage_row is not None and self.routing.batch.usage is not None:
            self._count_rows(ready, x, rows, logits)
        return logits

    def _probe(self, x: torch.Tensor, rows: ExpertRows) -> ExpertsProbe | None:
        """The probe that collects statistics in the backward pass, if the batch has a tally."""
        routing, row = self.routing, self.routing_row
        tally = routing.batch.tally
        # With reentrant checkpointing the first pass has no backward pass; the recomputation reports.
        if not self.training or not torch.is_grad_enabled() or tally is None or row is None:
            return None
        if self.router is None or self.fixed_logits is not None:
            return None

        # Rows of padding, and those that stand for tokens of other experts, don't count.
        mask = routing.mask_for(len(x) if rows.tokens is None else rows.num_tokens)
        counts = mask if mask is None or rows.tokens is None else mask[rows.tokens]
        counts = None if counts is None else counts.bool()
        if rows.sparse:
            used = (x != 0).any(-1)
            counts = used if counts is None else counts & used
        per_token = _per_token(rows, counts, mask, len(x))
        if per_token is None and tally.kind != "none":
            raise RuntimeError(
                "A balance loss needs the number of experts of each token, and the experts of this model compute one "
                "by one, without the indices of a token's experts among their arguments. Call "
                '`model.set_experts_implementation("grouped_mm")`, or set `balance_loss="none"`.'
            )
        return ExpertsProbe(tally, row, rows.groups, self.num_experts, 1 if per_token is None else per_token, counts)

    @torch.no_grad()
    def _count_rows(self, ready: ReadyExperts, x: torch.Tensor, rows: ExpertRows, logits: torch.Tensor | None) -> None:
        """Add the head weights of rows to the `HeadUsage` of the batch; a token counts once for each expert."""
        layout, batch = ready.weights.layout, self.routing.batch
        if logits is None and layout.routed:
            start = rank_space.h_columns(layout)
            routers = ready.weights.down[:, start : start + self.num_heads].to(x.dtype)
            logits = grouped_product(x, routers, rows.groups)
        if logits is None:
            logits = x.new_zeros(len(x), self.num_heads)
        weights = rank_space.routing_weights(logits, layout.top_k)

        mask = task_ids = None
        if rows.tokens is not None:
            if batch.token_mask is not None and batch.token_mask.numel() == rows.num_tokens:
                mask = batch.token_mask.reshape(-1)[rows.tokens]
            ids = self.routing.token_task_ids(torch.Size([rows.num_tokens]), x.device)
            task_ids = None if ids is None else ids[rows.tokens]
        assert batch.usage is not None and self.usage_row is not None
        batch.usage.add(self.usage_row, weights, task_ids, mask)

    def delta_weight(self) -> torch.Tensor:
        """
        The deltas as matrices.

        Returns:
            `torch.Tensor` of shape `[E, d_out, d_in]`: In float32 or wider.

        Raises:
            ValueError: If the head weights depend on the token.
        """
        if self.router is not None:
            return super().delta_weight()  # raises
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        A, B = self.A.to(dtype), self.B.to(dtype)
        delta = rank_space.mean_of_heads(B) @ A if self.share_a else (B @ A).mean(1)
        if self.A0 is not None and self.B0 is not None:
            offset = self.B0.to(dtype) @ self.A0.to(dtype)
            delta = delta - (offset if self.share_a else offset.mean(1))
        return self.scaling * delta

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, {super().extra_repr()}"


def _per_token(
    rows: ExpertRows, counts: torch.Tensor | None, mask: torch.Tensor | None, total: int
) -> int | torch.Tensor | None:
    """Experts that a token is sent to; where the model doesn't say, on average, or `None` if one expert computes."""
    if rows.per_token is not None or rows.groups.expert is not None:
        return rows.per_token
    tokens = max(rows.num_tokens, 1) if mask is None else mask.bool().sum().clamp(min=1)
    counted = torch.tensor(float(total)) if counts is None else counts.sum()
    return (counted / tokens).clamp(min=1.0 / max(total, 1))


class ExpertSizes(NamedTuple):
    """Sizes of a weight of experts, and whether it is stored as `[E, d_in, d_out]` rather than `[E, d_out, d_in]`."""

    num_experts: int
    in_features: int
    out_features: int
    transposed: bool


def expert_sizes(experts: nn.Module, name: str) -> ExpertSizes:
    """
    The sizes of a weight of experts.

    Args:
        experts (`torch.nn.Module`): The module that holds it.
        name (`str`): Its name, a parameter of three dimensions.

    Raises:
        TypeError: If it is no such parameter, or nothing says which dimension its inputs are.
    """
    parameter = experts._parameters.get(name)
    # DeepSpeed ZeRO-3 leaves an empty tensor in a parameter.
    shape = () if parameter is None else tuple(getattr(parameter, "ds_shape", parameter.shape))
    where = f"`{name}` of {type(experts).__name__}"
    if len(shape) != 3:
        quantized = "parametrizations" in experts._modules
        state = "parametrized (quantized)" if quantized else f"of shape {list(shape)}"
        raise TypeError(
            f"`target_parameters` selects {where}, which is {state}; R-LoRA adapts parameters of experts, "
            "with three dimensions, in 16 or 32 bits. For linear layers use `target_modules`."
        )

    transposed = getattr(experts, "is_transposed", None)
    if transposed is None:
        # Without transformers' decorator, by the size of the tokens.
        hidden = next((getattr(experts, n) for n in ("hidden_size", "hidden_dim") if hasattr(experts, n)), None)
        reads_tokens = "down" not in name
        sides = [axis for axis in (1, 2) if shape[axis] == hidden]
        if len(sides) != 1:
            raise TypeError(
                f"`target_parameters` selects {where} of shape {list(shape)}, and nothing says which dimension its "
                "inputs are. Set `is_transposed` of the module: True for [experts, inputs, outputs], else False."
            )
        transposed = (sides[0] == 1) == reads_tokens
    d_in, d_out = (shape[1], shape[2]) if transposed else (shape[2], shape[1])
    return ExpertSizes(shape[0], d_in, d_out, transposed)


class RLoraExpertWeight(nn.Module, RLoraLayer):
    """The adapters of one weight of experts. It does not compute the weight's product; see [`ExpertProducts`]."""

    def __init__(self, experts: nn.Module, name: str) -> None:
        super().__init__()
        sizes = expert_sizes(experts, name)
        self.num_experts, self.transposed = sizes.num_experts, sizes.transposed
        self.parameter_name = name
        # In a tuple, as the experts are a child of the wrapper already.
        self._experts = (experts,)
        self._init_state(sizes.in_features, sizes.out_features)
        self._active_adapter: str | list[str] = []

    def get_base_layer(self) -> nn.Module:
        return self._experts[0]

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        parameter = base_layer._parameters[self.parameter_name]
        assert parameter is not None
        return parameter.device, parameter.dtype

    def _new_adapter(self, *args: Any, **kwargs: Any) -> MultiHeadAdapter:
        return ExpertsAdapter(*args, num_experts=self.num_experts, **kwargs)

    def _stores_transposed_weight(self, config: RLoraConfig) -> bool:
        return self.transposed

    def forward(self, adapter_names: Sequence[str] | None = None) -> list[tuple[ExpertsAdapter, ReadyExperts]]:
        """Prepare the adapters that a forward pass runs, by default the active ones."""
        adapters: Any = self.adapters_in_use()
        if adapter_names is not None:
            names = dict.fromkeys(adapter_names)
            adapters = [self.rlora_adapters[name] for name in names if name in self.rlora_adapters]
        return [(adapter, adapter()) for adapter in adapters]

    def get_base_weight(self) -> torch.Tensor:
        return self.get_base_layer().get_parameter(self.parameter_name).data

    def set_base_weight(self, weight_data: torch.Tensor) -> None:
        self.get_base_layer().get_parameter(self.parameter_name).data = weight_data

    def extra_repr(self) -> str:
        return f"parameter_name={self.parameter_name!r}"

    def __repr__(self) -> str:
        return "rlora." + nn.Module.__repr__(self)


class _Deltas:
    """The deltas of one weight in one forward pass."""

    def __init__(
        self,
        layer: RLoraExpertWeight,
        ready: list[tuple[ExpertsAdapter, ReadyExperts]],
        adapter_names: Sequence[str] | None,
    ) -> None:
        self.in_features, self.num_experts = layer.in_features, layer.num_experts
        self.ready, self.adapter_names = ready, adapter_names
        self.names: dict[int, str] = {id(adapter): name for name, adapter in layer.rlora_adapters.items()}

    def add_delta(self, out: torch.Tensor, x: torch.Tensor, rows: ExpertRows) -> torch.Tensor:
        # Under autocast the product may have another dtype than its rows.
        x = x.to(out.dtype)
        for adapter, ready in self.ready:
            delta = adapter.delta(ready, x, rows)
            if self.adapter_names is not None:
                delta = torch.where(self._has(self.names[id(adapter)], rows, x.device), delta, 0.0)
            out = out + delta
        return out

    def joined_product(
        self,
        x: torch.Tensor,
        rows: ExpertRows,
        product: Callable[[torch.Tensor], torch.Tensor],
        product_backward: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor | None:
        if len(self.ready) != 1 or self.adapter_names is not None:
            return None
        adapter, ready = self.ready[0]
        if ready.seed is not None and adapter.dropout_position == "input":
            return None
        return adapter.joined_product(ready, x, rows, product, product_backward)

    def _has(self, name: str, rows: ExpertRows, device: torch.device) -> torch.Tensor:
        """Which rows `[S, 1]` have an adapter, by the names for the rows of the batch."""
        assert self.adapter_names is not None
        repeats, rest = divmod(rows.num_tokens, len(self.adapter_names))
        if rest or rows.tokens is None:
            raise ValueError(
                f"`adapter_names` has {len(self.adapter_names)} names, which don't fit the {rows.num_tokens} tokens "
                "that the experts get. Pass one name for each row of the batch, or run the rows of each adapter in a "
                "separate batch."
            )
        named = torch.tensor([row == name for row in self.adapter_names], device=device)
        return named.repeat_interleave(repeats)[rows.tokens].unsqueeze(1)


class RLoraExperts(nn.Module, BaseTunerLayer):
    """
    A module of experts with R-LoRA adapters on some of its weights.

    Args:
        experts (`torch.nn.Module`): The module.
    """

    # Adapters belong to the weights below.
    adapter_layer_names = ()
    other_param_names = ()

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.base_layer = experts

    @property
    def _active_adapter(self) -> str | list[str]:
        """That of the weights, which PEFT sets."""
        return next((layer._active_adapter for layer in self.weights().values()), [])

    @_active_adapter.setter
    def _active_adapter(self, names: str | list[str]) -> None:
        pass

    @property
    def _disable_adapters(self) -> bool:
        """That of the weights, which PEFT sets."""
        return any(layer._disable_adapters for layer in self.weights().values())

    @_disable_adapters.setter
    def _disable_adapters(self, disable: bool) -> None:
        pass

    @property
    def merged_adapters(self) -> list[str]:
        """The adapters that the weights have merged."""
        return list(dict.fromkeys(name for layer in self.weights().values() for name in layer.merged_adapters))

    def _get_available_adapters(self) -> set[str]:
        return {name for layer in self.weights().values() for name in layer.rlora_adapters}

    def weights(self) -> dict[str, RLoraExpertWeight]:
        """The adapted weights by name."""
        return {name: child for name, child in self.named_children() if isinstance(child, RLoraExpertWeight)}

    def add_weight(self, name: str) -> RLoraExpertWeight:
        """The adapters of a weight, created if it has none."""
        if name not in self._modules:
            self.add_module(name, RLoraExpertWeight(self.base_layer, name))
        layer = self._modules[name]
        assert isinstance(layer, RLoraExpertWeight)
        return layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # `torch.compile` (2.13) loses a `TorchFunctionMode` at graph breaks, and the counts of rows break graphs.
        return outside_graphs(RLoraExperts._forward)(self, *args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        adapter_names = kwargs.pop("adapter_names", None)
        layers = self.weights()
        for layer in layers.values():
            if layer._disable_adapters and layer.merged_adapters:
                layer.unmerge()
        if _is_expert_parallel(self.base_layer):
            raise NotImplementedError(
                "R-LoRA does not adapt experts that are distributed over processes (expert parallelism). Load the "
                "model without `enable_expert_parallel`, or leave the experts out with `target_parameters=[]`."
            )

        ready = {name: layer(adapter_names=adapter_names) for name, layer in layers.items()}
        ready = {name: adapters for name, adapters in ready.items() if adapters}
        if not ready:
            return self.base_layer(*args, **kwargs)

        tokens, *others = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        deltas = {name: _Deltas(layers[name], adapters, adapter_names) for name, adapters in ready.items()}
        with ExpertProducts(self.base_layer, deltas, tokens, _experts_per_token(tokens, others)) as products:
            output = self.base_layer(*args, **kwargs)
        products.check()
        return output

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Each adapted weight merges its adapters."""

    def unmerge(self) -> None:
        """Each adapted weight unmerges its adapters."""

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The experts without adapters, which PEFT puts in the place of this module."""
        if merge:
            for layer in self.weights().values():
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer

    def __repr__(self) -> str:
        return "rlora." + super().__repr__()


def _is_expert_parallel(experts: nn.Module) -> bool:
    """Whether a module holds the experts of one process only."""
    if getattr(experts, "_is_expert_parallel", False):
        return True
    # Transformers 5.17 only changes the number of experts of the module.
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    config, own = getattr(experts, "config", None), getattr(experts, "num_experts", None)
    totals = [total for name in names if isinstance(total := getattr(config, name, None), int)]
    return isinstance(own, int) and bool(totals) and all(own < total for total in totals)


def _experts_per_token(tokens: torch.Tensor, others: Sequence[torch.Tensor]) -> int | None:
    """The width of the indices `[T, K]` of the experts of each token, among the arguments of their module."""
    indices = (other for other in others if other.ndim == 2 and not other.is_floating_point())
    return next((index.shape[1] for index in indices if len(index) == len(tokens)), None)


def adapt_experts(
    target: nn.Module, name: str, adapter_name: str, config: RLoraConfig, *, layer_name: str, routing: Routing
) -> RLoraExperts:
    """
    Add an adapter to a weight of experts.

    Args:
        target (`torch.nn.Module`): The experts, or the wrapper that they already have.
        name (`str`): The weight's name in that module.
        adapter_name (`str`), config ([`RLoraConfig`]), layer_name (`str`), routing ([`Routing`]): See
            [`RLoraLayer.update_layer`].

    Returns:
        [`RLoraExperts`]: The wrapper, to be put in the place of `target`.

    Raises:
        TypeError: If the weight can't be adapted.
    """
    wrapper = target if isinstance(target, RLoraExperts) else RLoraExperts(target)
    layer = wrapper.add_weight(name)
    if not layer.rlora_adapters:
        layer._active_adapter = adapter_name
    layer.update_layer(adapter_name, config, layer_name=layer_name, routing=routing)
    return wrapper
