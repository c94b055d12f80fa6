"""A callback that shows which heads each task uses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..tuner import HeadUsage, MultiHeadAdapter, find_routings


class HeadUsageCallback(TrainerCallback):
    """
    Collects in evaluation, by task and layer, the mean weight of each head.

    Works with any `Trainer`; with [`RLoraSFTTrainer`], which knows the task of each token and which tokens are
    padding, by task and without padding. With others all tokens count, as those of one task, `"(unknown)"`.

    Args:
        tasks (`Sequence[str]`, *optional*):
            Names of the tasks, in the order of the task ids; by default those of the adapter's configuration.
        path (`str` or `Path`, *optional*):
            JSON file to write after each evaluation.

    Attributes:
        usage (`dict[int, dict[str, torch.Tensor]]`):
            By step and task, the mean weights `[L, N]` of the heads of each layer.
        layers (`list[str]`): Names of the L layers.
    """

    unknown = "(unknown)"

    def __init__(self, tasks: Sequence[str] | None = None, path: str | Path | None = None) -> None:
        self.tasks = None if tasks is None else list(tasks)
        self.path = None if path is None else Path(path)
        self.usage: dict[int, dict[str, torch.Tensor]] = {}
        self.layers: list[str] = []
        self._running: HeadUsage | None = None
        self._step = -1

    def _start(self, model: torch.nn.Module, args: TrainingArguments) -> None:
        adapters = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, MultiHeadAdapter) and module.A.requires_grad | module.B.requires_grad
        }
        # An adapter loaded for inference alone does not train.
        adapters = adapters or {n: m for n, m in model.named_modules() if isinstance(m, MultiHeadAdapter)}
        if not adapters:
            raise ValueError("`HeadUsageCallback` needs a model with R-LoRA adapters, and this one has none.")
        self.layers = [name.split(".rlora_adapters.")[0] for name in adapters]
        for row, adapter in enumerate(adapters.values()):
            adapter.usage_row = row
        heads = max(adapter.num_heads for adapter in adapters.values())
        routings = find_routings(model)
        if self.tasks is None:
            self.tasks = list(next((routing.tasks for routing in routings if routing.tasks), ()))
        self._running = HeadUsage(len(self.tasks), len(adapters), heads, args.device)
        for routing in routings:
            routing.usage = self._running

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start(kwargs["model"], args)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._running is None:
            self._start(kwargs["model"], args)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._running is None:
            return
        weights, tokens = self._running.weights, self._running.tokens
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            weights, tokens = weights.clone(), tokens.clone()
            torch.distributed.all_reduce(weights)
            torch.distributed.all_reduce(tokens)
        told = self.usage.setdefault(state.global_step, {})
        for place, name in enumerate([*(self.tasks or []), self.unknown]):
            if bool((tokens[place] > 0).any()):
                told[name] = (weights[place] / tokens[place].clamp(min=1.0)[:, None]).float().cpu()
        # The next evaluation, of another task or at another step, is counted by itself.
        self._running.weights.zero_()
        self._running.tokens.zero_()
        if self.path is not None and state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """Layers, and by step and task the mean weights of the heads, as lists."""
        by_step = {
            str(step): {task: weights.tolist() for task, weights in usage.items()}
            for step, usage in self.usage.items()
        }
        return {"layers": self.layers, "usage": by_step}
