"""Accuracy by task: options are ranked by likelihood, free answers must be what greedy decoding gives.

Neither needs generation. An option's log-likelihood is the sum over its tokens. Greedy decoding writes an answer
exactly if, with the answer fed in, each of its tokens (and the end of the sequence after it) is the most likely one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase


# Logits of one batch, in float32: 1 GB.
_MAX_LOGITS = 2**28


@dataclass(frozen=True)
class TaskScore:
    """Score of one task: `correct` of `total` rows."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Share of correct rows, a ratio in `[0, 1]`."""
        return self.correct / self.total


@dataclass
class _Candidate:
    """One prompt with one possible completion, tokenised."""

    row: int
    option: int
    input_ids: list[int]
    prompt_length: int
    log_likelihood: float = 0.0
    is_greedy: bool = False


def _tokenize(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], index: int) -> list[_Candidate]:
    prompt_ids = tokenizer(row["prompt"])["input_ids"]
    options = list(row.get("options") or [])
    if options and row["completion"] not in options:
        raise ValueError(
            f"Row {index} has completion {row['completion']!r}, which is not among its options {options}."
        )
    candidates = []
    for i, completion in enumerate(options or [row["completion"]]):
        ids = tokenizer(row["prompt"] + completion)["input_ids"]
        # Tokens may merge across the boundary: the completion starts where the two part.
        shared = next((k for k, (a, b) in enumerate(zip(prompt_ids, ids, strict=False)) if a != b), len(prompt_ids))
        eos = [] if options else [tokenizer.eos_token_id]
        candidates.append(_Candidate(index, i, ids + eos, max(1, min(shared, len(ids) - 1))))
    return candidates


def _batches(ordered: list[_Candidate], batch_size: int, vocabulary: int) -> list[list[_Candidate]]:
    """Batches of at most `batch_size`, fewer where their logits would be more than `_MAX_LOGITS`."""
    batches: list[list[_Candidate]] = [[]]
    for candidate in ordered:
        batch = [*batches[-1], candidate]
        span = max(len(c.input_ids) for c in batch) - min(c.prompt_length for c in batch) + 1
        if batches[-1] and (len(batch) > batch_size or len(batch) * span * vocabulary > _MAX_LOGITS):
            batches.append([candidate])
        else:
            batches[-1].append(candidate)
    return batches


@torch.no_grad()
def _score_batch(model: torch.nn.Module, batch: list[_Candidate], pad_id: int, device: torch.device) -> None:
    width = max(len(candidate.input_ids) for candidate in batch)
    input_ids = torch.full((len(batch), width), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for i, candidate in enumerate(batch):
        input_ids[i, : len(candidate.input_ids)] = torch.tensor(candidate.input_ids)
        attention_mask[i, : len(candidate.input_ids)] = 1
    # Only the positions that predict a completion are projected onto the vocabulary. They are given as indices: a
    # slice would be a strided view, which PyTorch multiplies with a frozen weight by copying the weight for each row.
    first = min(candidate.prompt_length for candidate in batch) - 1
    kept = torch.arange(first, width - 1, device=device)
    logits = model(
        input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), logits_to_keep=kept
    ).logits.float()
    for i, candidate in enumerate(batch):
        start, end = candidate.prompt_length, len(candidate.input_ids)
        rows = logits[i, start - 1 - first : end - 1 - first]
        targets = input_ids[i, start:end].to(device)
        candidate.log_likelihood = -F.cross_entropy(rows, targets, reduction="sum").item()
        candidate.is_greedy = bool((rows.argmax(-1) == targets).all())


def score_tasks(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    batch_size: int = 32,
    description: str | None = None,
) -> dict[str, TaskScore]:
    """
    Score a causal language model on several tasks, in eval mode.

    Args:
        model (`torch.nn.Module`):
            Causal language model of transformers, with or without adapters.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        tasks (`Mapping[str, Sequence[Mapping]]`):
            Rows by task. A row has `prompt`, `completion` and, where the task has them, `options` (which contain the
            completion). With options a row is correct if the completion is the most likely one; without, if greedy
            decoding of the prompt gives the completion and then the end of the sequence.
        batch_size (`int`, *optional*, defaults to `32`):
            Sequences in one forward pass.
        description (`str`, *optional*):
            Shows a progress bar with this text.

    Returns:
        `dict[str, TaskScore]`: Scores by task, in the order of `tasks`.

    Raises:
        ValueError: If a task has no rows, or a completion is not among its options.
    """
    candidates: dict[str, list[_Candidate]] = {}
    for task, rows in tasks.items():
        if len(rows) == 0:
            raise ValueError(f"Task {task!r} has no rows to score. Remove it, or check its split.")
        candidates[task] = [entry for index, row in enumerate(rows) for entry in _tokenize(tokenizer, row, index)]
    # Sequences of about one length share a batch, whatever their task: less padding.
    ordered = sorted((entry for entries in candidates.values() for entry in entries), key=lambda e: len(e.input_ids))
    device = next(model.parameters()).device
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    was_training = model.training
    model.eval()
    try:
        batches = _batches(ordered, batch_size, len(tokenizer))
        for batch in tqdm(batches, desc=description, disable=description is None):
            _score_batch(model, batch, pad_id, device)
    finally:
        model.train(was_training)
    return {task: _count_correct(tasks[task], entries) for task, entries in candidates.items()}


def _count_correct(rows: Sequence[Mapping[str, Any]], candidates: list[_Candidate]) -> TaskScore:
    by_row: dict[int, list[_Candidate]] = {}
    for candidate in candidates:
        by_row.setdefault(candidate.row, []).append(candidate)
    correct = 0
    for index, entries in by_row.items():
        options = list(rows[index].get("options") or [])
        if options:
            best = max(entries, key=lambda entry: entry.log_likelihood)
            correct += options[best.option] == rows[index]["completion"]
        else:
            correct += entries[0].is_greedy
    return TaskScore(correct, len(by_row))
