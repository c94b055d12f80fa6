"""A callback for trainers that know nothing of R-LoRA, such as TRL's `DPOTrainer` and `GRPOTrainer`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..tuner import MultiHeadAdapter, Routing
from ..tuner.batch import IN_TRAINERS
from ..tuner.routing import find_routings
from .monitor import RoutingMonitor, head_similarity
from .optimizer import TASK_ROUTER_RATE
from .trainer import RLoraSFTTrainer


logger = get_logger(__name__)


class RLoraCallback(TrainerCallback):
    """
    What [`RLoraSFTTrainer`] does for R-LoRA adapters beyond their training, for another trainer.

    ```python
    trainer = GRPOTrainer(model, reward_funcs, peft_config=RLoraConfig(), ...)
    trainer.add_callback(RLoraCallback(trainer))
    ```

    - It logs `router_entropy`, `head_load_max`, `head_load_cv` and `head_similarity` (docs/routing-report.md) over the
      forward passes that are trained; rollouts and reference models don't count.
    - `disable_dropout=True` of the trainer's arguments, which knows modules of PyTorch only, ends head dropout too.
    - Adapters on a quantized base, which TRL (1.16) casts to bfloat16, are trained in float32. A new adapter gets an
      anchor that agrees with its rounded values, so that step 0 is the base model.
    - An adapter with `router="task"` must have a task in each trained forward pass.

    The second and third are done when the callback is created, as training has no such moment before the optimizer.
    Balance losses need [`RLoraSFTTrainer`].

    Args:
        trainer (`transformers.Trainer`): The trainer, with R-LoRA adapters in its model.

    Raises:
        TypeError: If the trainer is an [`RLoraSFTTrainer`], which does all this itself.
        ValueError: If no R-LoRA adapter trains, or rollouts with vLLM would need weights that can't be merged.
    """

    def __init__(self, trainer: Trainer) -> None:
        if isinstance(trainer, RLoraSFTTrainer):
            raise TypeError(
                "`RLoraCallback` is for other trainers: `RLoraSFTTrainer` does itself what it adds. Remove it."
            )
        self.trainer = trainer
        modules = dict(trainer.model.named_modules())
        adapters = {name: module for name, module in modules.items() if isinstance(module, MultiHeadAdapter)}
        self.adapters = {name: adapter for name, adapter in adapters.items() if adapter.trains}
        if not self.adapters:
            raise ValueError(
                f"`RLoraCallback` needs a model with R-LoRA adapters that train, and that of {type(trainer).__name__} "
                "has none. Pass `peft_config=RLoraConfig()` to the trainer, or a `PeftModel` whose adapter was loaded "
                "with `is_trainable=True`."
            )
        _check_rollouts(trainer.args, self.adapters)
        if _casts_adapters(trainer):
            for adapter in self.adapters.values():
                _restore_float32(adapter)
        if getattr(trainer.args, "disable_dropout", False):
            for adapter in adapters.values():
                adapter.dropout = 0.0

        routed = [adapter for adapter in self.adapters.values() if adapter.router is not None]
        self.monitor = RoutingMonitor(routed, "none", 0.0, False, trainer.args.device) if routed else None
        self._routings: list[Routing] = []
        self._hook: Any = None

    def _reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        accelerator = self.trainer.accelerator
        return accelerator.reduce(tensor, "sum") if accelerator.num_processes > 1 else tensor

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Trackers get the logs from callbacks that stand before those of users.
        callbacks = self.trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)
        self._routings = find_routings(self.trainer.model)
        self._remove_hook()
        self._hook = self.trainer.model.register_forward_pre_hook(self._before_forward, prepend=True, with_kwargs=True)
        if kwargs.get("optimizer") is not None:
            _tell_of_slow_routers(kwargs["optimizer"], self.adapters, args.learning_rate)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.monitor is None:
            return
        self.monitor.begin_step(torch.zeros(()), 1, lambda tensor: tensor)
        tally = self.monitor.tally(1, 0)
        for routing in self._routings:
            routing.update(tally=tally)

    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: which tokens count, and whether a task router has its task."""
        trains = model.training and torch.is_grad_enabled()
        if trains and kwargs.get("task_ids") is None:
            _check_has_task(self._routings, type(self.trainer).__name__)
        mask = kwargs.get("attention_mask") if trains else None
        for routing in self._routings:
            routing.update(token_mask=mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for routing in self._routings:
            routing.forget_batch()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:  # of an evaluation, or the last of a run
            return
        figures = self.monitor.summary(self._reduce) if self.monitor is not None else {}
        similarity = head_similarity(list(self.adapters.values()))
        if similarity is not None:
            figures["head_similarity"] = similarity
        logs.update(figures)
        state.log_history[-1].update(figures)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._remove_hook()
        for routing in self._routings:
            routing.forget_batch()

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def _tell_of_slow_routers(
    optimizer: torch.optim.Optimizer, adapters: Mapping[str, MultiHeadAdapter], learning_rate: float
) -> None:
    """Warn if routers by task learn at the rate of all else, at which they hardly leave zero."""
    rates = {p: group.get("initial_lr", group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    routers = [adapter.router for adapter in adapters.values() if adapter.router_kind == "task"]
    # An engine may hold other tensors than those of the model: of these nothing is known.
    slow = [rates[p] for p in routers if p is not None and p in rates and rates[p] <= learning_rate]
    if slow and max(slow) < TASK_ROUTER_RATE:
        logger.warning(
            f"Routers by task train at {max(slow):g}, as all else does, and their head weights may stay nearly equal "
            f"for all tasks. Pass an optimizer in `optimizers` that has them in a parameter group with about "
            f"{TASK_ROUTER_RATE:g}, as `RLoraSFTTrainer` does itself."
        )


def _check_rollouts(args: TrainingArguments, adapters: Mapping[str, MultiHeadAdapter]) -> None:
    kinds = {adapter.router_kind for adapter in adapters.values()} - {"uniform"}
    if getattr(args, "use_vllm", False) and kinds:
        raise ValueError(
            "`use_vllm=True` needs the adapter merged into the weights that vLLM gets, and with "
            f"`router={kinds.pop()!r}` no weight represents it. Set `use_vllm=False`, or train with "
            '`RLoraConfig(router="uniform")`.'
        )


def _check_has_task(routings: list[Routing], trainer: str) -> None:
    missing = next((routing for routing in routings if routing.kind == "task" and routing.batch.task is None), None)
    if missing is not None:
        raise ValueError(
            f'{trainer} trains an adapter with `router="task"` and passed no task: the head weights of all its tasks '
            f"({', '.join(missing.tasks)}) would be trained alike. After creating the trainer call "
            f"`trainer.model.set_task({missing.tasks[0]!r})` for a run of one task, or pass `task_ids` with each "
            f"batch ({IN_TRAINERS}), or use another router."
        )


def _casts_adapters(trainer: Trainer) -> bool:
    """Whether TRL has cast the adapters, and no engine needs them so."""
    model = trainer.model
    quantized = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    return quantized and not trainer.is_deepspeed_enabled


def _restore_float32(adapter: MultiHeadAdapter) -> None:
    """
    Undo the cast of trained parameters to bfloat16 (peft#2889; `DPOTrainer` and others as of trl 1.16).

    The lost digits don't return, so a new adapter gets an anchor of the rounded values.
    """
    is_new = adapter.A0 is not None and torch.equal(adapter.A0.to(adapter.A.dtype), adapter.A)
    for parameter in adapter.parameters():
        parameter.data = parameter.data.float()
    if is_new:
        adapter.reset_anchor()
