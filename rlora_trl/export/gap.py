"""Measures the gap between an export and its routed adapter."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..analysis.measuring import input_device
from ..evaluation.encoding import TokenLimits, encode_row, pad_sequences, position_limit
from ..evaluation.scoring import score_tasks
from ..tuner.routing import find_routings, using_all
from ..tuner.selection import core_model, fixed_head_weights, only_adapter


_BATCH_SIZE = 16
# Positions per comparison in float64: 400 MB of logits for a vocabulary of 50,000, for each of the two models.
_POSITIONS = 1024


@dataclass(frozen=True)
class ExportGap:
    """How far the export is from the routed adapter: mean KL and accuracy of both, averaged over tasks."""

    kl: float
    accuracy_dynamic: float
    accuracy_export: float
    rows: int


def measure_export_gap(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    adapter_name: str,
    tasks: Mapping[str, Sequence[Mapping[str, Any]]],
    head_weights: Mapping[str, torch.Tensor],
    *,
    known_task: str | None = None,
) -> ExportGap:
    """
    Compare an adapter under fixed head weights, the function of its export, with the routed adapter.

    Args:
        model (`torch.nn.Module`), tokenizer (`PreTrainedTokenizerBase`), adapter_name (`str`): The adapter.
        tasks (`Mapping[str, Sequence[Mapping]]`): Rows by task, as for [`score_tasks`].
        head_weights (`Mapping[str, torch.Tensor]`): Head weights `[N]` by layer.
        known_task (`str`, *optional*): The task that `router="task"` uses for unknown tasks.

    Returns:
        [`ExportGap`]: Plain means over tasks. The KL divergence of a task is in nats, a mean over the tokens of its
        completions.
    """
    divergences, dynamic, fixed = [], [], []
    for task, rows in tasks.items():
        with only_adapter(model, adapter_name), _using_task(model, task, known_task):
            dynamic.append(score_tasks(model, tokenizer, {task: rows})[task].accuracy)
            divergences.append(_mean_kl(model, tokenizer, adapter_name, rows, head_weights))
            with fixed_head_weights(model, adapter_name, head_weights):
                fixed.append(score_tasks(model, tokenizer, {task: rows})[task].accuracy)
    kl, accuracy_dynamic, accuracy_export = (sum(values) / len(values) for values in (divergences, dynamic, fixed))
    return ExportGap(kl, accuracy_dynamic, accuracy_export, rows=sum(len(rows) for rows in tasks.values()))


@contextmanager
def _using_task(model: nn.Module, task: str, known_task: str | None) -> Generator[None, None, None]:
    """Route all rows as rows of one task, and keep them out of the statistics of adapters."""
    values = {"task_ids": None, "token_mask": None, "usage": None}
    with using_all([(r, {"task": r.find_task(task, known_task), **values}) for r in find_routings(model)]):
        yield


@torch.no_grad()
def _mean_kl(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    adapter_name: str,
    rows: Sequence[Mapping[str, Any]],
    head_weights: Mapping[str, torch.Tensor],
) -> float:
    """Mean KL(adapter || fixed head weights) in nats over the positions that predict a completion or its end."""
    device = input_device(core_model(model))
    limits = TokenLimits(positions=position_limit(core_model(model)))

    # Token ids of each row without its end, and where its completion begins.
    encoded = (encode_row(tokenizer, row["prompt"], [row["completion"]], limits) for row in rows)
    sequences = sorted(((ids, begin) for (ids,), begin in encoded), key=lambda entry: len(entry[0]))

    total, count = 0.0, 0
    for start in range(0, len(sequences), _BATCH_SIZE):
        batch = sequences[start : start + _BATCH_SIZE]
        ids, mask = (tensor.to(device) for tensor in pad_sequences(tokenizer, [ids for ids, _ in batch]))  # [B, S]

        # Only positions from the first completion on are projected onto the vocabulary.
        first = min(begin for _, begin in batch) - 1
        positions = torch.arange(first, ids.shape[1], device=device)
        begins = torch.tensor([begin for _, begin in batch], device=device)
        counted = mask[:, first:].bool() & (positions >= begins[:, None] - 1)  # [B, S - first]

        inputs = {"input_ids": ids, "attention_mask": mask, "logits_to_keep": positions}
        p = model(**inputs).logits[counted]  # [T, vocabulary]
        with fixed_head_weights(model, adapter_name, head_weights):
            q = model(**inputs).logits[counted]

        for p_part, q_part in zip(p.split(_POSITIONS), q.split(_POSITIONS), strict=True):
            log_p, log_q = p_part.double().log_softmax(-1), q_part.double().log_softmax(-1)
            total += float((log_p.exp() * (log_p - log_q)).sum())
        count += len(p)
    return total / max(count, 1)
