"""The tuner: adds adapters to the layers of a model, and passes the tasks of each batch to them."""

from __future__ import annotations

import os
import weakref
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import is_compiled_module
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, get_quantization_kwargs
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers.utils import logging
from typing_extensions import override

from ..reading import shorten
from .adapter import MultiHeadAdapter
from .batch import BatchShape, TaskIds, check_task_ids, describe_batch, resolve_task_ids
from .bnb_cpu import guard_cpu_order
from .config import RLoraConfig
from .expert_targets import (
    describe_targets,
    patterns_of_modules,
    select_parameters,
    settle_experts,
    unmatched_parameters,
)
from .experts import RLoraExperts, adapt_experts
from .forward_pass import ForwardPass, outside_graphs
from .layer import RLoraLayer, RLoraLinear
from .loading import check_adapter_tensors, check_on_first_use, settle_loaded, without_wrappers
from .offload import refuse_offloaded
from .patterns import make_portable
from .pictures import PictureLayers
from .prefetch import WeightPrefetch
from .routing import Routing, find_routings, set_task, using_all
from .shared_inputs import SharedInputs
from .targets import (
    MLP_TARGET_MODULES,
    ignored_indices,
    ignored_names,
    is_linear,
    leave_out_bypassed,
    narrow_layers,
    warn_once,
)
from .task_heads import TaskHeads, find_task_heads, save_task_heads


logger = logging.get_logger(__name__)


def _rows_of_call(args: tuple, kwargs: dict) -> BatchShape | None:
    """Sizes of the batch that `generate` calls a model with; a decoder gets its own tokens."""
    if kwargs.get("input_ids") is None and isinstance(kwargs.get("decoder_input_ids"), torch.Tensor):
        kwargs = {**kwargs, "input_ids": kwargs["decoder_input_ids"]}
    return describe_batch(args, kwargs)


class _NamedRows:
    """
    The adapter of each row of a batch, for layers that get these rows, several copies of each, or their tokens.

    Args:
        adapter_names (`list[str]`): One name for each row that the caller passes.
        batch ([`BatchShape`], *optional*): Sizes of these rows.
    """

    def __init__(self, adapter_names: list[str], batch: BatchShape | None) -> None:
        self.given = self.current = list(adapter_names)
        self.lengths = () if batch is None else batch.lengths
        self.rows_repeat = batch is not None and batch.rows_repeat

    def begin(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the model: `generate` repeats rows, for beams and for several answers."""
        batch = _rows_of_call(args, kwargs)
        if batch is not None and batch.rows and batch.rows % len(self.given) == 0:
            self.current = [name for name in self.given for _ in range(batch.rows // len(self.given))]
            self.lengths = batch.lengths

    def pass_on(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Forward pre-hook of a layer."""
        x = args[0] if args else None
        names = self.current  # experts compare them with all tokens
        if isinstance(x, torch.Tensor) and x.ndim and not isinstance(module, RLoraExperts):
            names = self._for_input(x)
        if isinstance(module, AuxiliaryTrainingWrapper):
            # Adapters that don't train the module use that of the base.
            names = [name if name in module._adapters else "__base__" for name in names]
        kwargs["adapter_names"] = names
        return args, kwargs

    def _for_input(self, x: torch.Tensor) -> list[str]:
        # An encoder sees the rows before they are repeated.
        for names in (self.current, self.given):
            if len(x) == len(names):
                return names
        # Each choice of a multiple choice is a row to the layers.
        copies, rest = divmod(len(x), len(self.given))
        if self.rows_repeat and not rest:
            return [name for name in self.given for _ in range(copies)]
        # Shared experts see all tokens in one dimension.
        for length in self.lengths:
            if x.ndim == 2 and len(x) == len(self.current) * length:
                return [name for name in self.current for _ in range(length)]
        return self.current  # the layer refuses them


def _take_task_ids(peft_model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """
    Forward pre-hook of a `PeftModel`: passes `task_ids`, and the sizes of a batch with `adapter_names`, to the tuner.

    `PeftModelForCausalLM.forward` has a parameter of that name, for prompt tuning, and drops it otherwise (no upstream
    issue as of peft 0.21.2).
    """
    task_ids = kwargs.pop("task_ids", None)
    if isinstance(peft_model.base_model, RLoraModel):
        # Some classes of PEFT enter the hooks of the tuner without the tensors of the batch.
        names = kwargs.get("adapter_names")
        peft_model.base_model._pending_rows = None if names is None else describe_batch(args, kwargs)
        peft_model.base_model._pending_tasks = None if task_ids is None else (task_ids, describe_batch(args, kwargs))
        # Here, as a disabled adapter leaves the heads of the base in use.
        peft_model.base_model._heads_in_use = [] if task_ids is None else peft_model.base_model.task_heads()
        for head in peft_model.base_model._heads_in_use:
            head.begin(task_ids)
    return args, kwargs


def _drop_task_ids(peft_model: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook of a `PeftModel`: drops task ids, also those that the tuner did not use (disabled adapters)."""
    if isinstance(peft_model.base_model, RLoraModel):
        peft_model.base_model._pending_tasks = peft_model.base_model._pending_rows = None
        for head in peft_model.base_model._heads_in_use:
            head.end()


class _OnRegistration:
    """
    Hooks the `PeftModel` of a tuner when it registers the tuner: PEFT gives a tuner no reference to it (no upstream
    issue as of peft 0.21.2).
    """

    def __init__(self, tuner: nn.Module) -> None:
        self.tuner = weakref.ref(tuner)
        self.handle = register_module_module_registration_hook(self)

    def __call__(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        # `PeftModel.__init__` registers the tuner right after creating it. If another module comes first, there is no
        # `PeftModel` (transformers loads the adapter).
        self.handle.remove()
        if isinstance(parent, PeftModel) and child is not None and child is self.tuner():
            # A class without a task type passes other arguments on to `generate` of the model, which refuses them.
            parent.special_peft_forward_args.add("task_ids")
            parent.register_forward_pre_hook(_take_task_ids, with_kwargs=True)
            parent.register_forward_hook(_drop_task_ids, always_call=True)


def _check_adapter(adapter_name: str, config: RLoraConfig, model: nn.Module) -> None:
    """
    Check what an adapter needs, before any layer is touched.

    Raises:
        ValueError: If its name clashes with parameter names, a task router has no tasks, or PEFT would not find the
            modules of a compiled model.
    """
    if adapter_name in MultiHeadAdapter.tensor_names or "." in adapter_name:
        # PEFT recognizes adapters by their names within parameter names, which PyTorch separates by dots.
        raise ValueError(
            f"An adapter can't be named {adapter_name!r}: names must not contain dots, nor be one of "
            f"{', '.join(MultiHeadAdapter.tensor_names)}, the tensors of R-LoRA's adapters. Choose another."
        )
    if config.router == "task" and not config.tasks:
        raise ValueError(
            f"`router='task'` learns head weights for each task and needs the names of the tasks, but `tasks` is "
            f"{config.tasks!r}. Set `RLoraConfig(tasks=[...])`, or let `RLoraSFTTrainer` create the adapter from "
            "a dictionary of datasets or a task column."
        )
    if (config.modules_to_save or config.trainable_token_indices) and any(map(is_compiled_module, model.modules())):
        raise ValueError(
            "`modules_to_save` and `trainable_token_indices` can't be used on a model that was compiled with "
            "`torch.compile`: PEFT does not find them under its names. Pass the original model "
            "(`model._orig_mod`), and compile it in place (`model.compile()`) or afterwards."
        )


def _warn_of_another_base(config: RLoraConfig, model: nn.Module) -> None:
    """Warn if a loaded adapter was trained on a model of another name, whose shapes may be the same."""
    trained_on = config.base_model_name_or_path
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if config.source is None or not trained_on or not name or trained_on == name:
        return
    # A local folder may hold the same model.
    if not os.path.exists(name) and not os.path.exists(trained_on):
        logger.warning(
            f"The adapter from {config.source.name} was trained on {trained_on} but is loaded on {name}. Load it on "
            "the former; ignore this if the two are the same model."
        )


def _adapted_layers(model: nn.Module, adapter_name: str) -> dict[str, RLoraLayer]:
    """The layers that have an adapter, by their names in files."""
    return {
        without_wrappers(name): layer
        for name, layer in model.named_modules()
        if isinstance(layer, RLoraLayer) and adapter_name in layer.rlora_adapters
    }


def _check_same_tasks(heads: list[TaskHeads], routings: list[Routing]) -> None:
    """Refuse heads whose tasks are not those of the task router: an index would mean two tasks."""
    for head in heads[:1]:
        for routing in routings:
            if routing.tasks != head.tasks:
                raise ValueError(
                    f"The heads of the model are for the tasks {shorten(list(head.tasks), 200)}, and `tasks` of the "
                    f"adapter are {shorten(list(routing.tasks), 200)}. Name the same tasks in the same order in "
                    "`add_task_heads` and `RLoraConfig(tasks=...)`."
                )


class RLoraModel(BaseTuner):
    """
    A model with R-LoRA adapters on its linear layers ([paper](https://huggingface.co/papers/2502.15455)).

    Created by `peft.get_peft_model(model, RLoraConfig(...))`, and used through the `PeftModel` that it returns.

    Args:
        model (`torch.nn.Module`): The model to adapt.
        config ([`RLoraConfig`]): The configuration.
        adapter_name (`str`): The adapter's name.
    """

    prefix: str = "rlora_"
    tuner_layer_cls = RLoraLayer
    target_module_mapping = MLP_TARGET_MODULES

    def __init__(self, model: nn.Module, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        # A `PeftModel` passes a dictionary; `inject_adapter_in_model`, which transformers calls, a configuration.
        self._in_peft_model = isinstance(peft_config, dict)
        super().__init__(model, peft_config, *args, **kwargs)
        # Task ids of a running call of the `PeftModel`, with the sizes of its batch.
        self._pending_tasks: tuple[TaskIds, BatchShape | None] | None = None
        self._pending_rows: BatchShape | None = None
        # They are there before the adapters. A search in each forward pass would take a millisecond in large models.
        self._has_heads = bool(find_task_heads(model))
        self._heads_in_use: list[TaskHeads] = []
        self._prefetch, self._shared_inputs = WeightPrefetch(), SharedInputs()
        _OnRegistration(self)

    @override
    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        if config.loaded:
            self._budget = settle_loaded(config, model)
        _check_adapter(adapter_name, config, model)
        save_task_heads(config, model)
        _warn_of_another_base(config, model)
        if config.base_model_name_or_path is None:
            # PEFT sets it for the first adapter only, and for others when it has saved them, although it decides by
            # this name whether to save a resized embedding (no upstream issue as of peft 0.21.2).
            config.base_model_name_or_path = vars(model).get("name_or_path") or None

        settle_experts(config, model)
        # Before PEFT fills in the default of the architecture.
        targets = config.target_modules
        self._user_targets = () if targets is None or isinstance(targets, str) else targets
        self._ignored: list[str] = []
        self._new_routing = Routing(config.tasks, config.router)

        try:
            with patterns_of_modules(config, model) as self._with_patterns:
                super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            raise NoMatchingPeftModuleError(f"{error} {describe_targets(model)}") from error

        self._warn_of_ignored(model, adapter_name)
        if not config.loaded:
            make_portable(config, list(_adapted_layers(model, adapter_name)))
        elif not self._in_peft_model:
            check_on_first_use(model, config, adapter_name)
        guard_cpu_order(model)
        # Collected once, as a model has thousands of modules.
        self._adapted = [module for module in model.modules() if isinstance(module, RLoraLayer)]
        self._picture_layers = PictureLayers(model)

    @override
    def _prepare_adapter_config(self, peft_config: RLoraConfig, model_config: dict) -> RLoraConfig:
        if peft_config.target_modules is None and model_config.get("model_type") not in self.target_module_mapping:
            raise ValueError(
                f"`target_modules` has no default for models of type {model_config.get('model_type')!r}. "
                f"{describe_targets(self.model)}"
            )
        prepared = super()._prepare_adapter_config(peft_config, model_config)
        # The default of some architectures is an expression, which excludes `layers_to_transform`.
        prepared._check_layers()
        return prepared

    @override
    def _prepare_model(self, peft_config: RLoraConfig, model: nn.Module) -> None:
        """Compare the configuration with the model, before any layer is touched."""
        super()._prepare_model(peft_config, model)
        refuse_offloaded(peft_config, model, self._in_peft_model)
        leave_out_bypassed(peft_config, model)

        default = self.target_module_mapping.get(self.get_model_config(model).get("model_type", ""))
        # PEFT may have filled in the default for an earlier model.
        targets = () if isinstance(default, list) and set(default) == set(self._user_targets) else self._user_targets
        self._ignored = list(ignored_names(peft_config, targets, [name for name, _ in model.named_modules() if name]))

    def _warn_of_ignored(self, model: nn.Module, adapter_name: str) -> None:
        """Warn about settings without effect. A loaded adapter is checked against its file instead."""
        config = self.peft_config[adapter_name]
        if config.loaded:
            return
        layers = _adapted_layers(model, adapter_name)
        for message in (
            *self._ignored,
            *ignored_indices(config, layers),
            *narrow_layers(config, adapter_name, layers),
        ):
            warn_once(message)

    def _create_and_replace(
        self,
        peft_config: RLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        options: dict[str, Any] = {"layer_name": current_key, "routing": self._new_routing}
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if peft_config.loaded:
            self._budget.take(peft_config, current_key, base)
        if isinstance(target, RLoraLayer):
            target.update_layer(adapter_name, peft_config, **options)
            return
        if not is_linear(base):
            raise TypeError(
                f"`target_modules` matches {current_key!r}, a {type(base).__name__}; R-LoRA adapts linear layers "
                "(torch.nn.Linear, transformers' Conv1D, or quantized). Name it in `exclude_modules`."
            )
        new_module = RLoraLinear(target, adapter_name, peft_config, **options, **get_quantization_kwargs(self.model))
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    @override
    def _inject_parameters(
        self, peft_config: RLoraConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """
        Adapt the weights of experts in `target_parameters`.

        PEFT would nest a wrapper for each weight; here one wrapper holds the adapters of all.
        """
        selected = select_parameters(peft_config, model)
        self._ignored += unmatched_parameters(peft_config, selected)
        for name in selected:
            if peft_config.loaded:
                experts, _, weight = name.rpartition(".")
                self._budget.take_experts(self._with_patterns, name, model.get_submodule(experts), weight)
        for name in selected:
            module_name, _, weight = name.rpartition(".")
            target = model.get_submodule(module_name)
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                wrapper = adapt_experts(
                    target, weight, adapter_name, self._with_patterns, layer_name=name, routing=self._new_routing
                )
            if adapter_name not in self.active_adapters:
                wrapper.get_submodule(weight).requires_grad_(False)
            if wrapper is not target:
                parent, _, child = module_name.rpartition(".")
                self._replace_module(model.get_submodule(parent), child, wrapper, target)
        return selected

    @override
    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """
        Replace a module, as `LoraModel` does.

        When adapters are unloaded, PEFT's default copies `weight` onto the original module, which a classification
        head in `modules_to_save` lacks. It also moves adapters to the device of the base weight, which is "meta" if
        accelerate offloads it; [`RLoraLayer`] has moved them already. (peft#3114, open as of 0.21.2.)
        """
        setattr(parent, child_name, new_module)

    @override
    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """
        Adapters are created in float32; with `autocast_adapter_dtype=False` they take the base layer's dtype.

        An adapter at its initial values gets an anchor of the rounded values, so that its delta stays zero.
        """
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        for layer in self.model.modules():
            if not isinstance(layer, RLoraLayer) or adapter_name not in layer.rlora_adapters:
                continue
            _, dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
            adapter = layer.rlora_adapters[adapter_name]
            if dtype is not None and dtype.is_floating_point and adapter.A.dtype != dtype:
                adapter.cast(dtype)

    @override
    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_mergeable(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    @override
    def _unload_and_optionally_merge(
        self, merge: bool = True, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        if merge:
            self._check_mergeable(adapter_names)
        unloaded = super()._unload_and_optionally_merge(merge, *args, adapter_names=adapter_names, **kwargs)
        self._forget_layers()
        self._adapted = []
        self._picture_layers.layers = {}
        return unloaded

    @override
    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._forget_layers()

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not available for R-LoRA; the error names the alternatives."""
        raise NotImplementedError(
            "R-LoRA adapters can't be combined by `add_weighted_adapter`: each has a router for its own heads, "
            "and a sum has no router for all of them. To run several adapters with weights, use `rlora_trl.zoo.mix`; "
            "for one combined adapter, export each as plain LoRA with `rlora_trl.export_lora`, load the exports with "
            "`PeftModel` and combine those."
        )

    def subtract_mutated_init(self, *args: Any, **kwargs: Any) -> None:
        """Not needed for R-LoRA; the error names the alternatives."""
        raise NotImplementedError(
            "R-LoRA adapters have no `subtract_mutated_init`, which converts adapters that change the base weights "
            "(PiSSA, OLoRA): R-LoRA does not change the base, and saves its initial values with the adapter. Use "
            "`save_pretrained`, or `rlora_trl.export_lora` for a plain LoRA adapter."
        )

    def _check_mergeable(self, adapter_names: list[str] | None) -> None:
        """Refuse before any layer is touched."""
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name not in self.peft_config:
                raise ValueError(
                    f"There is no adapter {name!r} to merge; loaded are {', '.join(sorted(self.peft_config))}. Use "
                    "these names."
                )
            router = self.peft_config[name].router
            if router != "uniform":
                raise ValueError(
                    f"Adapter {name!r} can't be merged: with `router={router!r}` its delta depends on the token, so "
                    "no single weight represents it. Use it unmerged in the `PeftModel`, or call `unload()` to get "
                    'the base model. Adapters with `router="uniform"` can be merged.'
                )

        for layer in self.model.modules():
            backend = getattr(layer, "quantization_backend", None) if isinstance(layer, RLoraLayer) else None
            if backend is not None and not backend.supports_merge:
                raise ValueError(
                    f"Adapters can't be merged into this base, which is quantized with {backend.backend_name}: PEFT "
                    "can't write to its weights. Load the base in 16 bits and merge there."
                )

    def task_heads(self) -> list[TaskHeads]:
        """The classification heads of tasks, of the base and of adapters; see [`add_task_heads`]."""
        return find_task_heads(self) if self._has_heads else []

    def set_task(self, task: str | int | None) -> None:
        """
        Choose the task of all following batches, for adapters with `router="task"` and heads of tasks.

        Args:
            task (`str` or `int`): Name of a task in the adapter's `tasks`, or its index; `None` for the mean over
                tasks.

        Raises:
            ValueError: If no adapter has a task router and there are no heads of tasks, or they lack the task.
        """
        set_task(self, task)

    @override
    def forward(self, *args: Any, task_ids: TaskIds | None = None, **kwargs: Any) -> Any:
        # Still here are those of a call of the tuner itself, and of a `PeftModel` around an MPT, for which PEFT enters
        # no hooks (no upstream issue as of peft 0.21.2).
        if task_ids is not None:
            self._pending_tasks = (task_ids, describe_batch(args, kwargs))
        if self._pending_tasks is None and kwargs.get("adapter_names") is None:
            return super().forward(*args, **kwargs)
        with self._enable_peft_forward_hooks(*args, **kwargs):
            kwargs.pop("adapter_names", None)
            return super().forward(*args, **kwargs)

    def generate(self, *args: Any, task_ids: TaskIds | None = None, **kwargs: Any) -> Any:
        """`generate` of the model."""
        with self._with_tasks(task_ids, describe_batch(args, kwargs, True), generates=True):
            return self.model.generate(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Generator[None, None, None]:
        """Pass `task_ids` and `adapter_names`, one per row of the batch, to all layers for one forward pass."""
        pending, self._pending_tasks = self._pending_tasks, None
        task_ids, batch = pending or (None, None)
        # `forward` leaves its task ids in `_pending_tasks`; `generate` passes them here.
        generates = "task_ids" in kwargs
        if generates:
            task_ids, batch = kwargs.pop("task_ids"), describe_batch(args, kwargs, True)

        if task_ids is not None and kwargs.get("adapter_names") is not None:
            raise ValueError(
                "`task_ids` and `adapter_names` can't be passed together: task ids belong to one adapter. Run the "
                "rows of each adapter in a separate batch."
            )
        with (
            self._with_tasks(task_ids, batch, generates),
            self._mixed_adapters(*args, **kwargs),
            self._prefetched_weights(),
        ):
            yield

    @contextmanager
    def _prefetched_weights(self) -> Generator[None, None, None]:
        """Concatenate the weights of all adapters for a forward pass of training."""
        # `torch.compile` plans the concatenation itself, inference caches concatenated weights in the layers, and a
        # captured CUDA graph would read addresses that a later pass may free.
        capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        if torch.compiler.is_compiling() or capturing or not (self.training and torch.is_grad_enabled()):
            yield
            return
        forward_pass, failed = ForwardPass(self._adapted, self._prefetch, self._shared_inputs), True
        try:
            outside_graphs(ForwardPass.begin)(forward_pass)
            yield
            failed = False
        finally:
            outside_graphs(ForwardPass.finish)(forward_pass, failed)

    def _forget_layers(self) -> None:
        """Drop what holds layers and tensors."""
        self._prefetch, self._shared_inputs = WeightPrefetch(), SharedInputs()
        for layer in self._adapted:
            layer.__dict__.pop("joined", None)

    @contextmanager
    def _with_tasks(
        self, task_ids: TaskIds | None, batch: BatchShape | None, generates: bool = False
    ) -> Generator[None, None, None]:
        """Pass the tasks of a batch to the layers."""
        if task_ids is None:
            yield
            return

        # Without a task router or heads of tasks, `resolve` raises.
        heads, routings = self.task_heads(), find_routings(self)
        routings = [routing for routing in routings if routing.kind == "task"] or ([] if heads else routings)
        _check_same_tasks(heads, routings)
        resolved = [routing.resolve(task_ids) for routing in routings]
        resolved += [resolve_task_ids(task_ids, head.tasks) for head in heads[:1]]
        sizes: dict[str, Any] = {"rows_repeat": generates}
        if batch is not None:
            check_task_ids(resolved[0], batch, generates)
            self.check_picture_tasks(batch, resolved[0])
            sizes = {"rows_repeat": batch.rows_repeat, "lengths": batch.lengths}

        if generates:
            sizes["copies"] = 1
        contexts = [(routing, {"task_ids": ids, **sizes}) for routing, ids in zip(routings, resolved, strict=False)]
        with using_all(contexts), self._counted_copies(routings, len(resolved[0])) if generates else nullcontext():
            yield

    @contextmanager
    def _counted_copies(self, routings: list[Routing], rows: int) -> Generator[None, None, None]:
        """Tell layers how often `generate` repeats each of the rows that it got, in each call of the model."""

        def count(model: nn.Module, args: tuple, kwargs: dict) -> None:
            present = _rows_of_call(args, kwargs)
            if present is not None and rows and present.rows % rows == 0:
                for routing in routings:
                    routing.update(copies=present.rows // rows)

        handle = self.model.register_forward_pre_hook(count, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def check_picture_tasks(self, batch: BatchShape | None, task_ids: torch.Tensor) -> None:
        """
        Check that layers which see pictures know the row of each.

        Args:
            batch ([`BatchShape`], *optional*): The batch.
            task_ids (`torch.Tensor` of shape `[B]` or `[B, S]`): Its tasks.

        Raises:
            ValueError: If they don't; see [`PictureLayers.check`].
        """
        if self._picture_layers.layers and task_ids.ndim == 1:
            # One task for each token would be refused by the layers.
            adapters = [name for name, config in self.peft_config.items() if config.router == "task"]
            if adapters:
                self._picture_layers.check(batch, task_ids.tolist(), "task_ids", adapters)

    @contextmanager
    def _mixed_adapters(self, *args: Any, **kwargs: Any) -> Generator[None, None, None]:
        """Run each row of a batch with its own adapter."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        pending, self._pending_rows = self._pending_rows, None
        batch = pending or describe_batch(args, kwargs)
        self._check_adapter_names(adapter_names, batch)
        rows = _NamedRows(adapter_names, batch)
        handles = [self.model.register_forward_pre_hook(rows.begin, with_kwargs=True)]
        wrappers = [module for module in self.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        before = [(wrapper, wrapper._active_adapter, wrapper._disable_adapters) for wrapper in wrappers]
        disabled = any(layer._disable_adapters for layer in self._adapted)
        try:
            for wrapper in wrappers:
                # PEFT runs the module of the base for all rows if the active adapter doesn't train it (no upstream
                # issue as of peft 0.21.2).
                if not disabled and wrapper._adapters:
                    wrapper._active_adapter, wrapper._disable_adapters = [sorted(wrapper._adapters)[0]], False
            for module in self.modules():
                if isinstance(module, RLoraLayer | RLoraExperts | AuxiliaryTrainingWrapper):
                    handles.append(module.register_forward_pre_hook(rows.pass_on, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for wrapper, active, disables in before:
                wrapper._active_adapter, wrapper._disable_adapters = active, disables

    def _check_adapter_names(self, adapter_names: list[str], batch: BatchShape | None) -> None:
        if self.training:
            raise ValueError(
                "`adapter_names` mixes adapters in one batch for inference, but the model is in training mode. Call "
                "`model.eval()` first."
            )
        unknown = sorted({name for name in adapter_names if name != "__base__"} - set(self.peft_config))
        if unknown:
            raise ValueError(
                f"`adapter_names` has unknown adapters: {', '.join(unknown)}. Loaded are "
                f'{", ".join(sorted(self.peft_config))}; use "__base__" for rows without an adapter.'
            )
        if not adapter_names or (batch is not None and batch.rows != len(adapter_names)):
            rows = "each row" if batch is None else f"each of the {batch.rows} rows"
            raise ValueError(
                f"`adapter_names` needs one name for {rows} of the batch, got {len(adapter_names)}. Use "
                '"__base__" for rows without an adapter.'
            )
        self._picture_layers.check(batch, adapter_names, "adapter_names", self.peft_config)

    @classmethod
    @override
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """
        Also remove the name prefixes that checkpointing and compiling add to layers (no upstream issue as of peft
        0.21.2).
        """
        return super()._remove_adapter_name_from_key(without_wrappers(key), adapter_name)

    @classmethod
    @override
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        names = [name for name, _ in chain(model.named_parameters(), model.named_buffers())]
        wrapped = {plain: name for name in names if (plain := without_wrappers(name)) != name}
        remapped = {wrapped.get(name, name): tensor for name, tensor in remapped.items()}
        check_adapter_tensors(model, config, adapter_name, remapped)
        return remapped
