"""Measures which heads each task uses: mean head weights by task and layer."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation.encoding import encode_text, pad_sequences, position_limit, refuse_unknown_tokens
from ..files.head_weights import HeadWeights
from ..foreign import explain_failure
from ..tuner import HeadUsage
from ..tuner.bnb_cpu import kept_quantized
from ..tuner.layer import RLoraLayer
from ..tuner.routing import Routing
from ..tuner.selection import adapted_layers, adapter_config, adapter_of, core_model, only_adapter


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

    All tokens but padding count, those of prompts included. With `router="task"` or `"uniform"` head weights don't
    depend on the token: they are read from the adapter without running the model.

    Args:
        model (`torch.nn.Module`): A `PeftModel`, or a transformers model with the adapter loaded. Its state is
            restored.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        tasks (`Mapping[str, Sequence[Mapping]]`): Rows by task: with `prompt` and `completion`, `text` or `messages`.
        adapter_name (`str`, *optional*): The adapter; required if there are several.
        batch_size (`int`, *optional*, defaults to `16`): Sequences per forward pass.
        max_rows (`int`, *optional*, defaults to `64`): Maximum number of rows per task, spread evenly over all rows;
            `None` for all.
        max_length (`int`, *optional*, defaults to `2048`): Maximum number of tokens per row, further limited by the
            positions of the model.

    Returns:
        [`HeadWeights`]: With the tasks in the order of `tasks`.

    Raises:
        ValueError: If a task has no rows, a row has an unknown format, the adapter is unknown, or `router="task"` does
            not know a task.
    """
    adapter_name, config = adapter_config(model, adapter_name)
    layers = adapted_layers(model, adapter_name)

    # Tokenize the rows as in training.
    longest = min(max_length, position_limit(core_model(model)) or max_length)
    sequences = {
        task: [
            _tokenize(tokenizer, rows[index], f"Row {index} of task {task!r}")[:longest]
            for index in _spread(task, len(rows), max_rows)
        ]
        for task, rows in tasks.items()
    }
    refuse_unknown_tokens(core_model(model), tokenizer, (ids for rows in sequences.values() for ids in rows))
    tokens = {task: sum(map(len, rows)) for task, rows in sequences.items()}

    if config.router in ("task", "uniform"):
        weights = {task: constant_head_weights(layers, adapter_name, task) for task in tasks}
        return HeadWeights(tuple(layers), weights, tokens)
    with only_adapter(model, adapter_name), kept_quantized(model):
        weights = {
            task: _measure(model, tokenizer, layers, adapter_name, rows, batch_size)
            for task, rows in sequences.items()
        }
    return HeadWeights(tuple(layers), weights, tokens)


def constant_head_weights(layers: Mapping[str, RLoraLayer], adapter_name: str, task: str | None) -> torch.Tensor:
    """
    The head weights `[L, N]` of an adapter whose router ignores the token; without a task the mean over tasks.

    The row of a weight of experts is the mean over experts.

    Raises:
        ValueError: If the adapter's router is "task" and does not know the task.
    """
    weights = head_weights_by_layer(layers, adapter_name, task)
    return torch.stack([rows.reshape(-1, rows.shape[-1]).mean(0) for rows in weights.values()])


def head_weights_by_layer(
    layers: Mapping[str, RLoraLayer], adapter_name: str, task: str | None
) -> dict[str, torch.Tensor]:
    """
    [`constant_head_weights`] by layer, `[N]`, or `[E, N]` for the weights of experts.

    Raises:
        ValueError: If the adapter's router is "task" and does not know the task.
    """
    weights = {}
    for name, layer in layers.items():
        adapter = adapter_of(layer, adapter_name)
        if adapter.router_kind == "uniform":
            weights[name] = torch.full((adapter.num_heads,), 1.0 / adapter.num_heads)
        else:
            index = -1 if task is None else adapter.routing.index_of(task)
            weights[name] = adapter.task_logits()[..., index, :].detach().softmax(-1).float().cpu()
    return weights


def _spread(task: str, total: int, max_rows: int | None) -> list[int]:
    """Indices of at most `max_rows` rows, evenly spaced, as data may be sorted."""
    if total == 0:
        raise ValueError(f"Task {task!r} has no rows to measure. Remove it, or check its split.")
    count = total if max_rows is None else min(total, max_rows)
    if count < 1:
        raise ValueError(f"`max_rows` must be at least 1, or None for all rows, got {max_rows!r}.")
    return [i * total // count for i in range(count)]


def _tokenize(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], where: str) -> list[int]:
    """Token ids of a row as in training: chats by the template, other text with the end of the sequence."""
    messages = row.get("messages")
    if messages is None and isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        messages = [*row["prompt"], *row["completion"]]
    if messages is not None:
        with explain_failure(f"{where} is not written by the tokenizer's chat template", "Correct the row."):
            return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"])

    text = row.get("text")
    if text is None and isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        text = row["prompt"] + row["completion"]
    if not isinstance(text, str):
        raise ValueError(
            f"{where} has the columns {', '.join(map(repr, row))}; accepted are 'prompt' with 'completion', 'text', "
            "or 'messages'. Rename its columns."
        )
    ids, end = encode_text(tokenizer, text), tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


@torch.no_grad()
def _measure(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    layers: Mapping[str, RLoraLayer],
    adapter_name: str,
    sequences: Sequence[list[int]],
    batch_size: int,
) -> torch.Tensor:
    """Mean head weights `[L, N]` over the tokens of all sequences."""
    core = core_model(model)
    # Skip the projection onto the vocabulary, unless it has an adapter itself.
    backbone = getattr(core, "base_model", core)
    inside = {id(module) for module in backbone.modules()}
    if not all(id(layer) in inside for layer in layers.values()):
        backbone = core

    device = input_device(core)
    heads = max(layer.num_heads[adapter_name] for layer in layers.values())
    usage = HeadUsage(0, len(layers), heads, device)
    ordered = sorted(sequences, key=len)  # sequences of similar length share a batch: less padding
    with _counting(layers, adapter_name, usage) as routing:
        for start in range(0, len(ordered), batch_size):
            batch = pad_sequences(tokenizer, ordered[start : start + batch_size])
            ids, mask = (tensor.to(device) for tensor in batch)  # [B, S]
            with routing.using(token_mask=mask):
                backbone(input_ids=ids, attention_mask=mask)
    return (usage.weights[0] / usage.tokens[0].clamp(min=1.0)[:, None]).cpu()  # [L, N]


def input_device(core: PreTrainedModel) -> torch.device:
    """The device for the inputs of a model. Offloading moves the inputs to other devices."""
    device = next(core.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


@contextmanager
def _counting(layers: Mapping[str, RLoraLayer], adapter_name: str, usage: HeadUsage) -> Generator[Routing, None, None]:
    """Collect the head weights of an adapter's layers in `usage`, without a task, and restore the layers on exit."""
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
