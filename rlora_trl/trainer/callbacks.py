"""A callback that records which heads each task uses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..files.head_weights import HeadWeights
from ..tuner import HeadUsage, MultiHeadAdapter, Routing


class HeadUsageCallback(TrainerCallback):
    """
    Measures the mean weight of each head in evaluation, by task and layer.

    [`RLoraSFTTrainer`] provides the task of each row and the padding. Other trainers provide neither: then all tokens
    of forward passes in eval mode count, including padding and passes between evaluations, under the task
    `"(unknown)"`.

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
        self._names: list[str] = []
        self._running: HeadUsage | None = None
        self._routings: list[Routing] = []

    def start(self, model: torch.nn.Module, device: torch.device) -> None:
        """Start counting from zero."""
        adapters = {name: module for name, module in model.named_modules() if isinstance(module, MultiHeadAdapter)}
        # Only adapters in training, or all adapters if none trains.
        adapters = {n: a for n, a in adapters.items() if a.trains} or adapters
        if not adapters:
            raise ValueError("`HeadUsageCallback` needs a model with R-LoRA adapters, and this one has none.")
        self.layers = [name.split(".rlora_adapters.")[0] for name in adapters]
        self._routings = list({id(adapter.routing): adapter.routing for adapter in adapters.values()}.values())
        names = self.tasks if self.tasks is not None else next((r.tasks for r in self._routings if r.tasks), ())
        self._names = [*names, self.unknown]
        heads = max(adapter.num_heads for adapter in adapters.values())
        self._running = HeadUsage(len(names), len(adapters), heads, device)
        for row, adapter in enumerate(adapters.values()):
            adapter.usage_row = row
        for routing in self._routings:
            routing.update(usage=self._running)

    def stop(self) -> None:
        """Stop counting."""
        for routing in self._routings:
            routing.update(usage=None)
        self._running, self._routings = None, []

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.start(kwargs["model"], args.device)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_evaluate:
            self.start(kwargs["model"], args.device)

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        if self._running is not None:
            self.start(kwargs["model"], args.device)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._running is None:
            return
        usage, _ = self.collect()
        self.usage.setdefault(state.global_step, {}).update(usage)
        if self.path is not None and state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.to_dict()))

    def collect(self) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        """
        Mean head weights `[L, N]` and number of tokens by task since the last call, over all ranks.

        Resets the counts for the next evaluation.
        """
        assert self._running is not None
        weights, tokens = self._running.weights.clone(), self._running.tokens.clone()
        self._running.weights.zero_()
        self._running.tokens.zero_()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(weights)
            torch.distributed.all_reduce(tokens)
        seen = {name: place for place, name in enumerate(self._names) if bool((tokens[place] > 0).any())}
        means = {n: (weights[p] / tokens[p].clamp(min=1.0)[:, None]).cpu() for n, p in seen.items()}
        return means, {name: int(tokens[place].max()) for name, place in seen.items()}

    def head_weights(self) -> HeadWeights | None:
        """
        The mean head weights of each known task since the last call, on all ranks.

        Returns:
            [`HeadWeights`], or `None` if no task was seen, or weights are not finite.
        """
        usage, tokens = self.collect()
        named = {task: weights for task, weights in usage.items() if task != self.unknown}
        if not named or not all(bool(torch.isfinite(weights).all()) for weights in named.values()):
            return None
        layers = tuple(name.removeprefix("base_model.model.") for name in self.layers)
        return HeadWeights(layers, named, {task: tokens[task] for task in named})

    def to_dict(self) -> dict[str, Any]:
        """The names of layers, and the mean head weights by step and task, as lists."""
        by_step = {
            str(step): {task: weights.tolist() for task, weights in usage.items()}
            for step, usage in self.usage.items()
        }
        return {"layers": self.layers, "usage": by_step}
