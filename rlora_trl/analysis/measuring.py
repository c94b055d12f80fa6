"""Which heads each task uses: the mean weights of the heads, measured by task and layer."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation.scoring import position_limit
from ..files.reading import shorten
from ..tuner import HeadUsage
from ..tuner.bnb_cpu import kept_quantized
from ..tuner.layer import RLoraLayer
from ..tuner.selection import (
    SUM_TOLERANCE,
    adapted_layers,
    adapter_config,
    adapter_of,
    core_model,
    only_adapter,
)


@dataclass(frozen=True)
class HeadWeights:
    """
    Mean weights of the heads by task.

    Args:
        layers (`tuple[str, ...]`):
            Names of the L adapted layers in the base model, e.g. "model.layers.0.mlp.gate_proj".
        weights (`dict[str, torch.Tensor]`): By task the weights `[L, N]` in float32; rows sum to one.
        tokens (`dict[str, int]`): By task the number of tokens that they are means over.

    Raises:
        ValueError: If sizes do not agree, or a row is not made of weights.
    """

    layers: tuple[str, ...]
    weights: dict[str, torch.Tensor]
    tokens: dict[str, int]

    def __post_init__(self) -> None:
        if set(self.weights) != set(self.tokens):
            raise ValueError(
                f"Mixtures have weights of tasks {sorted(self.weights)} and numbers of tokens of "
                f"{sorted(self.tokens)}. Give both for the same tasks."
            )
        shapes = {tuple(weights.shape) for weights in self.weights.values()}
        if any(len(shape) != 2 or shape[0] != len(self.layers) or shape[1] < 1 for shape in shapes) or len(shapes) > 1:
            raise ValueError(
                f"The weights of each task must be of one shape [{len(self.layers)}, N], a row for each layer; got "
                f"{sorted(shapes)}. Measure them on one adapter."
            )
        for task, weights in self.weights.items():
            off = (weights.sum(-1) - 1.0).abs()
            # Written so that NaN fails.
            if not bool((weights >= 0).all()) or not bool((off <= SUM_TOLERANCE).all()):
                raise ValueError(
                    f"The weights of task {task!r} must be numbers of at least 0 that sum to 1 in each layer; the "
                    f"smallest is {float(weights.min()):g}, sums differ from 1 by up to {float(off.max()):g}. Measure "
                    "them again."
                )

    def for_task(self, task: str) -> dict[str, torch.Tensor]:
        """
        The weights `[N]` of a task by layer.

        Raises:
            ValueError: If the task was not measured.
        """
        if task not in self.weights:
            known = ", ".join(map(repr, self.weights)) or "none"
            raise ValueError(
                f"Task {task!r} was not measured; there are mixtures of {known}. Name one of these, or measure it."
            )
        return dict(zip(self.layers, self.weights[task], strict=True))

    def mean(self) -> dict[str, torch.Tensor]:
        """The mean over tasks, each counting the same, of the weights `[N]` by layer."""
        if not self.weights:
            raise ValueError("There are no mixtures to take the mean of. Measure at least one task.")
        return dict(zip(self.layers, torch.stack(list(self.weights.values())).mean(0), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Lists and numbers for JSON, weights with six digits after the point."""
        weights = {task: [[round(w, 6) for w in row] for row in rows.tolist()] for task, rows in self.weights.items()}
        return {"layers": list(self.layers), "weights": weights, "tokens": dict(self.tokens)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HeadWeights:
        """
        The inverse of [`HeadWeights.to_dict`], for content that may come from strangers.

        Raises:
            ValueError: If a key is missing, or a value is of another kind or size.
        """
        layers, weights, tokens = (_entry(values, key) for key in ("layers", "weights", "tokens"))
        if not isinstance(layers, list) or not all(isinstance(name, str) for name in layers):
            raise ValueError(f"`layers` of mixtures must be a list of names, got {shorten(layers)}.")
        if not isinstance(tokens, dict) or not all(type(count) is int and count >= 0 for count in tokens.values()):
            raise ValueError(f"`tokens` of mixtures must be numbers by task, got {shorten(tokens)}.")
        if not isinstance(weights, dict):
            raise ValueError(f"`weights` of mixtures must be lists by task, got {shorten(weights)}.")
        table = {task: torch.tensor(_rows(task, rows), dtype=torch.float32) for task, rows in weights.items()}
        return cls(tuple(layers), table, dict(tokens))


def _entry(values: Mapping[str, Any], key: str) -> Any:
    if not isinstance(values, Mapping) or key not in values:
        raise ValueError(f"Mixtures must be a dictionary with {key!r}, got {shorten(values)}.")
    return values[key]


def _rows(task: str, rows: Any) -> list[list[float]]:
    def is_weight(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    good = isinstance(rows, list) and all(isinstance(row, list) and all(map(is_weight, row)) for row in rows)
    if not good or not rows or len({len(row) for row in rows}) != 1:
        raise ValueError(f"Weights of task {task!r} must be lists of numbers, all of one length, got {shorten(rows)}.")
    return rows


def measure_head_weights(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    adapter_name: str | None = None,
    batch_size: int = 16,
    max_rows: int | None = 64,
    max_length: int = 2048,
) -> HeadWeights:
    """
    Measure the mean weight of each head of an adapter, by task and layer, in eval mode.

    Every token but padding counts, those of the prompt too. Adapters with `router="task"` or "uniform" weigh all
    tokens of a task alike: their weights are given as they are, without running the model.

    Args:
        model (`torch.nn.Module`): A `PeftModel`, or a transformers model with the adapter loaded. All of its state is
            restored.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        tasks (`Mapping[str, Sequence[Mapping]]`): Rows by task: with `prompt` and `completion`, `text` or `messages`.
        adapter_name (`str`, *optional*): The adapter; needed if there are several.
        batch_size (`int`, *optional*, defaults to `16`): Sequences in one forward pass.
        max_rows (`int`, *optional*, defaults to `64`): Rows of each task, taken evenly over all; `None` for all.
        max_length (`int`, *optional*, defaults to `2048`): Tokens of a row that count, at most as many as the
            model has positions.

    Returns:
        [`HeadWeights`]: With the tasks in the order of `tasks`.

    Raises:
        ValueError: If a task has no rows, a row is of an unknown format, the adapter is not known, or a task is not
            one of those that `router="task"` has a mixture for.
    """
    adapter_name, config = adapter_config(model, adapter_name)
    layers = adapted_layers(model, adapter_name)
    longest = min(max_length, position_limit(core_model(model)) or max_length)
    sequences = {
        task: [_tokenize(tokenizer, row, f"Row {index} of task {task!r}")[:longest] for index, row in chosen]
        for task, chosen in ((task, _choose(task, rows, max_rows)) for task, rows in tasks.items())
    }
    tokens = {task: sum(map(len, rows)) for task, rows in sequences.items()}
    if config.router in ("task", "uniform"):
        weights = {task: fixed_weights(layers, adapter_name, task) for task in tasks}
        return HeadWeights(tuple(layers), weights, tokens)
    weights = {}
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    with only_adapter(model, adapter_name), kept_quantized(model):
        for task, rows in sequences.items():
            batches = _padded_batches(rows, batch_size, pad_id)
            weights[task] = _measure(model, layers, adapter_name, batches)
    return HeadWeights(tuple(layers), weights, tokens)


def fixed_weights(layers: Mapping[str, RLoraLayer], adapter_name: str, task: str | None) -> torch.Tensor:
    """
    The weights `[L, N]` of adapters that weigh all tokens of a task alike; without a task the mean over tasks.

    Raises:
        ValueError: If the adapter's router is "task" and does not know the task.
    """
    rows = []
    for layer in layers.values():
        adapter = adapter_of(layer, adapter_name)
        if adapter.router_kind == "uniform":
            rows.append(torch.full((adapter.num_heads,), 1.0 / adapter.num_heads))
        else:
            place = -1 if task is None else adapter.routing.index_of(task)
            rows.append(adapter.task_logits()[place].detach().softmax(-1).float().cpu())
    return torch.stack(rows)


def _choose(task: str, rows: Sequence[Mapping[str, Any]], max_rows: int | None) -> list[tuple[int, Mapping[str, Any]]]:
    """At most `max_rows` rows with their places, evenly over all: data may be sorted."""
    total = len(rows)
    if total == 0:
        raise ValueError(f"Task {task!r} has no rows to measure. Remove it, or check its split.")
    count = total if max_rows is None else min(total, max_rows)
    if count < 1:
        raise ValueError(f"`max_rows` must be at least 1, or None for all rows, got {max_rows!r}.")
    return [(place, rows[place]) for place in (i * total // count for i in range(count))]


def _tokenize(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], where: str) -> list[int]:
    """The token ids of a row as in training: chats by the template, other text with the end of the sequence."""
    messages = row.get("messages")
    if messages is None and isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        messages = [*row["prompt"], *row["completion"]]
    if messages is not None:
        return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"])
    text = row.get("text")
    if text is None and isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        text = row["prompt"] + row["completion"]
    if not isinstance(text, str):
        raise ValueError(
            f"{where} has the columns {', '.join(map(repr, row))}; accepted are 'prompt' with 'completion', 'text', "
            "or 'messages'. Rename its columns."
        )
    ids = list(tokenizer(text)["input_ids"])
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _padded_batches(
    sequences: Sequence[list[int]], batch_size: int, pad_id: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and attention masks `[B, S]`, sequences of about one length together."""
    ordered = sorted(sequences, key=len)
    batches = []
    for start in range(0, len(ordered), batch_size):
        chosen = ordered[start : start + batch_size]
        width = len(chosen[-1])
        ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in chosen])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in chosen])
        batches.append((ids, mask))
    return batches


@torch.no_grad()
def _measure(
    model: nn.Module,
    layers: Mapping[str, RLoraLayer],
    adapter_name: str,
    batches: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """Mean weights `[L, N]` over the tokens of all batches."""
    core = core_model(model)
    # Without the projection onto the vocabulary, unless it has an adapter itself.
    backbone = getattr(core, "base_model", core)
    inside = {id(module) for module in backbone.modules()}
    if not all(id(layer) in inside for layer in layers.values()):
        backbone = core
    device = input_device(core)
    heads = max(layer.num_heads[adapter_name] for layer in layers.values())
    usage = HeadUsage(0, len(layers), heads, device)
    with _counting(layers, adapter_name, usage) as routing:
        for ids, mask in batches:
            with routing.using(token_mask=mask.to(device)):
                backbone(input_ids=ids.to(device), attention_mask=mask.to(device))
    return (usage.weights[0] / usage.tokens[0].clamp(min=1.0)[:, None]).cpu()


def input_device(core: PreTrainedModel) -> torch.device:
    """Where the inputs of a model go; the hooks of an offloaded one move them on."""
    device = next(core.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


@contextmanager
def _counting(layers: Mapping[str, RLoraLayer], adapter_name: str, usage: HeadUsage) -> Generator[Any, None, None]:
    """Have the layers of an adapter report to `usage`; afterwards to where they did before."""
    adapters = [adapter_of(layer, adapter_name) for layer in layers.values()]
    routing = adapters[0].routing
    rows = [adapter.usage_row for adapter in adapters]
    try:
        for row, adapter in enumerate(adapters):
            adapter.usage_row = row
        with routing.using(usage=usage, task_ids=None, task=None):
            yield routing
    finally:
        for adapter, row_before in zip(adapters, rows, strict=True):
            adapter.usage_row = row_before
