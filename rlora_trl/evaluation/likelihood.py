"""
Correct answers without generation: the most likely option, or what greedy decoding would give.

An option's log-likelihood is the sum over its tokens, and over the end of the sequence after them wherever the tokens
of one option of the row are a prefix of another's. Greedy decoding gives an answer exactly if, with the answer as
input, each of its tokens (and the end of the sequence after it) is the most likely one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .encoding import TokenLimits, encode_row, pad_sequences, refuse_unknown_tokens


# Logits of one batch, in float32: 1 GB.
_MAX_LOGITS = 2**28


@dataclass
class _Candidate:
    """One prompt with one possible completion, tokenized."""

    row: int
    option: int
    input_ids: list[int]
    prompt_length: int
    log_likelihood: float = 0.0
    is_greedy: bool = False


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], index: int, limits: TokenLimits
) -> list[_Candidate]:
    options = list(row.get("options") or [])
    if options and row["completion"] not in options:
        raise ValueError(
            f"Row {index + 1} has completion {row['completion']!r}, which is not among its options {options}. Write "
            "it exactly as one of them, spaces included."
        )
    sequences, begin = encode_row(tokenizer, row["prompt"], options or [row["completion"]], limits, end=not options)
    return [_Candidate(index, i, ids, begin) for i, ids in enumerate(sequences)]


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
def _score_batch(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, batch: list[_Candidate], device: torch.device
) -> None:
    input_ids, attention_mask = pad_sequences(tokenizer, [candidate.input_ids for candidate in batch])  # [B, S]

    # Only the positions that predict a completion are projected onto the vocabulary. As indices: a slice would be a
    # strided view, which PyTorch multiplies with a frozen weight by copying the weight for each row.
    first = min(candidate.prompt_length for candidate in batch) - 1
    positions = torch.arange(first, input_ids.shape[1] - 1, device=device)
    logits = model(
        input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), logits_to_keep=positions
    ).logits.float()  # [B, positions, vocabulary]

    for i, candidate in enumerate(batch):
        start, end = candidate.prompt_length, len(candidate.input_ids)
        rows = logits[i, start - 1 - first : end - 1 - first]
        targets = input_ids[i, start:end].to(device)
        candidate.log_likelihood = -F.cross_entropy(rows, targets, reduction="sum").item()
        candidate.is_greedy = bool((rows.argmax(-1) == targets).all())


def score_likely(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    limits: TokenLimits,
    batch_size: int,
    description: str | None = None,
) -> dict[str, list[float]]:
    """
    Whether the model, in eval mode, gives the completion of each row: 1 or 0, by task.

    See [`score_tasks`] for rows and arguments.
    """
    candidates = {
        task: [entry for index, row in enumerate(rows) for entry in _tokenize(tokenizer, row, index, limits)]
        for task, rows in tasks.items()
    }
    everything = [entry for entries in candidates.values() for entry in entries]
    refuse_unknown_tokens(model, tokenizer, (entry.input_ids for entry in everything))

    # Sequences of similar length share a batch, whatever their task: less padding.
    ordered = sorted(everything, key=lambda entry: len(entry.input_ids))
    device = next(model.parameters()).device
    batches = _batches(ordered, batch_size, len(tokenizer))
    for batch in tqdm(batches, desc=description, disable=description is None):
        _score_batch(model, tokenizer, batch, device)
    return {task: _correct_rows(tasks[task], entries) for task, entries in candidates.items()}


def _correct_rows(rows: Sequence[Mapping[str, Any]], candidates: list[_Candidate]) -> list[float]:
    by_row: dict[int, list[_Candidate]] = {}
    for candidate in candidates:
        by_row.setdefault(candidate.row, []).append(candidate)
    correct = []
    for index, entries in by_row.items():
        options = list(rows[index].get("options") or [])
        if options:
            best = max(entries, key=lambda entry: entry.log_likelihood)
            # By tokens: options may differ in spaces that a tokenizer drops.
            is_correct = best.input_ids == entries[options.index(rows[index]["completion"])].input_ids
        else:
            is_correct = entries[0].is_greedy
        correct.append(float(is_correct))
    return correct
