"""What a fixed mixture loses against routing token by token."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..analysis.measuring import input_device
from ..evaluation.scoring import TokenLimits, encode_row, position_limit, score_tasks
from ..tuner.routing import find_routings, using_all
from ..tuner.selection import core_model, fixed_head_weights, only_adapter


_BATCH_SIZE = 16
# Rows of logits that are compared at once, in float32: 200 MB for a vocabulary of 50,000, for each of two.
_POSITIONS = 1024


@dataclass(frozen=True)
class ExportGap:
    """Of a fixed mixture against dynamic routing; means over tasks."""

    kl: float
    accuracy_dynamic: float
    accuracy_export: float
    rows: int


def measure_export_gap(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    adapter_name: str,
    tasks: Mapping[str, Sequence[Mapping[str, Any]]],
    mixtures: Mapping[str, torch.Tensor],
    *,
    known_task: str | None = None,
) -> ExportGap:
    """
    Compare an adapter under a fixed mixture, which is what its export does, with the adapter as it is.

    Args:
        model (`torch.nn.Module`), tokenizer (`PreTrainedTokenizerBase`), adapter_name (`str`): The adapter.
        tasks (`Mapping[str, Sequence[Mapping]]`): Rows by task, as for [`score_tasks`].
        mixtures (`Mapping[str, torch.Tensor]`): The weights of the heads by layer.
        known_task (`str`, *optional*): The task that adapters with `router="task"` are told where a task of `tasks` is
            none of theirs.

    Returns:
        [`ExportGap`]: Plain means over tasks. The KL divergence is a mean over the tokens of a task's completions.
    """
    kls, dynamic, fixed = [], [], []
    for task, rows in tasks.items():
        with only_adapter(model, adapter_name), _told(model, adapter_name, task, known_task):
            dynamic.append(score_tasks(model, tokenizer, {task: rows})[task].accuracy)
            kls.append(_mean_kl(model, tokenizer, adapter_name, rows, mixtures))
            with fixed_head_weights(model, adapter_name, mixtures):
                fixed.append(score_tasks(model, tokenizer, {task: rows})[task].accuracy)
    total = sum(len(rows) for rows in tasks.values())
    return ExportGap(_mean(kls), _mean(dynamic), _mean(fixed), total)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@contextmanager
def _told(model: nn.Module, adapter_name: str, task: str, known_task: str | None) -> Generator[None, None, None]:
    """Tell the adapters the task of all rows, and keep their statistics out of it."""
    values = {"task_ids": None, "token_mask": None, "usage": None}
    with using_all([(r, {"task": r.find_task(task, known_task), **values}) for r in find_routings(model)]):
        yield


@torch.no_grad()
def _mean_kl(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    adapter_name: str,
    rows: Sequence[Mapping[str, Any]],
    mixtures: Mapping[str, torch.Tensor],
) -> float:
    """Mean KL(adapter || fixed mixture) in nats over the positions that predict a token of a completion or its end."""
    device = input_device(core_model(model))
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    limits = TokenLimits(positions=position_limit(core_model(model)))
    sequences = sorted((_sequence(tokenizer, row, limits) for row in rows), key=lambda entry: len(entry[0]))
    total, count = 0.0, 0
    for start in range(0, len(sequences), _BATCH_SIZE):
        chosen = sequences[start : start + _BATCH_SIZE]
        width = len(chosen[-1][0])
        ids = torch.tensor([ids + [pad_id] * (width - len(ids)) for ids, _ in chosen], device=device)
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in chosen], device=device)
        first = min(begin for _, begin in chosen) - 1
        kept = torch.arange(first, width, device=device)
        counted = torch.zeros(len(chosen), width, dtype=torch.bool, device=device)
        for place, (row_ids, begin) in enumerate(chosen):
            counted[place, begin - 1 : len(row_ids)] = True
        inputs = {"input_ids": ids, "attention_mask": mask, "logits_to_keep": kept}
        p = model(**inputs).logits[counted[:, first:]]
        with fixed_head_weights(model, adapter_name, mixtures):
            q = model(**inputs).logits[counted[:, first:]]
        for p_part, q_part in zip(p.split(_POSITIONS), q.split(_POSITIONS), strict=True):
            log_p, log_q = p_part.double().log_softmax(-1), q_part.double().log_softmax(-1)
            total += float((log_p.exp() * (log_p - log_q)).sum())
        count += int(counted.sum())
    return total / max(count, 1)


def _sequence(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], limits: TokenLimits
) -> tuple[list[int], int]:
    """Token ids of a row without its end, and where its completion begins, as in scoring."""
    (ids,), begin = encode_row(tokenizer, row["prompt"], [row["completion"]], limits)
    return ids, begin
