"""
Accuracy by task: options are ranked by likelihood, free answers must be what greedy decoding gives.

Neither needs generation. An option's log-likelihood is the sum over its tokens, and over the end of the sequence after
them wherever the tokens of one option of the row are a prefix of another's. Greedy decoding gives an answer exactly
if, with the answer as input, each of its tokens (and the end of the sequence after it) is the most likely one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging


logger = logging.get_logger(__name__)


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
    """One prompt with one possible completion, tokenized."""

    row: int
    option: int
    input_ids: list[int]
    prompt_length: int
    log_likelihood: float = 0.0
    is_greedy: bool = False


class TokenLimits(NamedTuple):
    """How many tokens a sequence may have: by `max_length`, and by the positions of the model."""

    max_length: int | None = None
    positions: int | None = None

    def warn(self, room: int) -> None:
        """Warn once, on one process, that prompts are cut."""
        if os.environ.get("RANK", "0") != "0":
            return
        logger.warning_once(
            f"Some prompts and their completions have more than {room} tokens "
            f"({'`max_length`' if room == self.max_length else 'the positions of the model'}): these prompts are "
            "scored without their beginning. Shorten them, or raise the limit where the model allows it."
        )


def position_limit(model: torch.nn.Module) -> int | None:
    """The number of positions of a model, if its configuration has it."""
    config = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    config = config if get_text_config is None else get_text_config()
    # `attribute_map` resolves other names such as `n_positions`; MPT has its own.
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    # RoBERTa and its relatives count positions from `padding_idx` + 1.
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    padding = next((table.padding_idx for table in tables if getattr(table, "padding_idx", None) is not None), None)
    return limit if padding is None else limit - padding - 1


def encode_row(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    completions: Sequence[str],
    limits: TokenLimits,
    *,
    end: bool = False,
) -> tuple[list[list[int]], int]:
    """
    Token ids of a prompt with each of its possible completions, cut to fit.

    Each completion gets the end of the sequence if the tokens of one are a prefix of another's, or one has no tokens:
    generation produces it, and without it the shorter completion could never be less likely.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        prompt (`str`), completions (`Sequence[str]`): A row of data.
        limits (`TokenLimits`): How many tokens there may be. A prompt loses its beginning, a completion nothing.
        end (`bool`, *optional*, defaults to `False`): Each completion gets the end of the sequence in any case.

    Returns:
        `tuple[list[list[int]], int]`: Token ids for each completion, and the index at which the completions begin,
        the same for all: with some completions only, tokens may merge across the boundary.

    Raises:
        ValueError: If a completion has no tokens, or more than the model has positions.
    """
    prompt_ids = encode_text(tokenizer, prompt)
    sequences = [encode_text(tokenizer, prompt + completion) for completion in completions]
    begin = min(len(os.path.commonprefix([prompt_ids, ids])) for ids in sequences)
    tails = [ids[begin:] for ids in sequences]

    if (end or _has_prefix_pair(tails)) and tokenizer.eos_token_id is not None:
        eos = [tokenizer.eos_token_id]
        tails = [tail if tail[-1:] == eos else tail + eos for tail in tails]
    if not all(tails):
        raise ValueError(
            f"The completion {completions[tails.index([])]!r} of prompt {prompt[-40:]!r} has no tokens, and the "
            "tokenizer has no end of the sequence. Set `eos_token`, or give it a text."
        )

    head = _cut_prompt(prompt_ids[:begin], max(map(len, tails)), limits, tokenizer)
    return [head + tail for tail in tails], len(head)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids without the end of the sequence, which some tokenizers add."""
    ids = list(tokenizer(text)["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token) else ids


def pad_sequences(
    tokenizer: PreTrainedTokenizerBase, sequences: Sequence[list[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask `[B, S]` of sequences, padded on the right; padding is masked."""
    pad_ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad_id = next(pad_id for pad_id in pad_ids if pad_id is not None)
    width = max(map(len, sequences))
    input_ids = torch.tensor([ids + [pad_id] * (width - len(ids)) for ids in sequences])  # [B, S]
    attention_mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in sequences])
    return input_ids, attention_mask


def refuse_unknown_tokens(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, sequences: Iterable[Sequence[int]]
) -> None:
    """
    Refuse tokens that a model does not have, on which it would fail without a reason, on a GPU for good.

    Args:
        model (`torch.nn.Module`): The model.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer, whose padding counts too.
        sequences (`Iterable[Sequence[int]]`): Token ids.

    Raises:
        ValueError: If the tokenizer has more tokens than the model, and uses one of these.
    """
    # Wrappers for several processes do not show it.
    get_embeddings: Any = getattr(model, "get_input_embeddings", None)
    size = None if get_embeddings is None else getattr(get_embeddings(), "num_embeddings", None)
    largest = max((max(ids, default=0) for ids in sequences), default=0)
    largest = max(largest, tokenizer.pad_token_id or 0)
    if size is not None and largest >= size:
        raise ValueError(
            f"The tokenizer gives token {largest}, and the model has {size} tokens, counted from 0. Use the tokenizer "
            "that belongs to the model."
        )


def _has_prefix_pair(tails: Sequence[list[int]]) -> bool:
    """Whether one is a proper prefix of another, or one is empty."""
    ordered = sorted(tails)  # a prefix comes right before one of the longer ones
    pairs = zip(ordered, ordered[1:], strict=False)
    return not all(tails) or any(a != b and b[: len(a)] == a for a, b in pairs)


def _cut_prompt(head: list[int], answer: int, limits: TokenLimits, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end of a prompt that leaves room for the longest answer, after the beginning of the sequence."""
    if limits.positions is not None and answer >= limits.positions:
        raise ValueError(
            f"A completion has {answer} tokens, and the model has {limits.positions} positions, of which the prompt "
            "needs one. Remove the row, or use a model with more positions."
        )
    room = min((limit for limit in (limits.max_length, limits.positions) if limit is not None), default=None)
    if not head:  # something must come before the first token
        return [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    if room is None or len(head) + answer <= room:
        return head
    limits.warn(room)
    length = max(room - answer, 1)
    has_bos = head[0] == tokenizer.bos_token_id and length > 1
    return [head[0], *head[len(head) - length + 1 :]] if has_bos else head[-length:]


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], index: int, limits: TokenLimits
) -> list[_Candidate]:
    options = list(row.get("options") or [])
    if options and row["completion"] not in options:
        raise ValueError(
            f"Row {index} has completion {row['completion']!r}, which is not among its options {options}."
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


def score_tasks(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    batch_size: int = 32,
    description: str | None = None,
    max_length: int | None = None,
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
            completion). With options a row is correct if the completion is the most likely one, the end of the
            sequence included wherever the tokens of one option are a prefix of another's; without, if greedy decoding
            of the prompt gives the completion and then the end of the sequence.
        batch_size (`int`, *optional*, defaults to `32`):
            Sequences in one forward pass.
        description (`str`, *optional*):
            Shows a progress bar with this text.
        max_length (`int`, *optional*):
            Maximum number of tokens of a prompt with its completion; longer prompts lose their beginning, with a
            warning. Defaults to the positions of the model.

    Returns:
        `dict[str, TaskScore]`: Scores by task, in the order of `tasks`.

    Raises:
        ValueError: If a task has no rows, or a completion is not among its options or longer than the model allows.
    """
    # Tokenize all rows.
    limits = TokenLimits(max_length, position_limit(model))
    candidates: dict[str, list[_Candidate]] = {}
    for task, rows in tasks.items():
        if len(rows) == 0:
            raise ValueError(f"Task {task!r} has no rows to score. Remove it, or check its split.")
        candidates[task] = [
            entry for index, row in enumerate(rows) for entry in _tokenize(tokenizer, row, index, limits)
        ]

    refuse_unknown_tokens(model, tokenizer, (entry.input_ids for entries in candidates.values() for entry in entries))

    # Sequences of similar length share a batch, whatever their task: less padding.
    ordered = sorted((entry for entries in candidates.values() for entry in entries), key=lambda e: len(e.input_ids))
    device = next(model.parameters()).device

    was_training = model.training
    model.eval()
    try:
        batches = _batches(ordered, batch_size, len(tokenizer))
        for batch in tqdm(batches, desc=description, disable=description is None):
            _score_batch(model, tokenizer, batch, device)
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
            # By tokens: options may differ in spaces that a tokenizer drops.
            correct += best.input_ids == entries[options.index(rows[index]["completion"])].input_ids
        else:
            correct += entries[0].is_greedy
    return TaskScore(correct, len(by_row))
