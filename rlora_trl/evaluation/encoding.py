"""Token ids of prompts and answers: how they are cut to fit, padded, and checked against the model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging


logger = logging.get_logger(__name__)


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

    longest = max(map(len, tails))
    if limits.positions is not None and longest >= limits.positions:
        raise ValueError(
            f"A completion has {longest} tokens, and the model has {limits.positions} positions, of which the prompt "
            "needs one. Remove the row, or use a model with more positions."
        )
    head = _cut_prompt(prompt_ids[:begin], longest, limits, tokenizer)
    return [head + tail for tail in tails], len(head)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: int, limits: TokenLimits) -> list[int]:
    """
    Token ids of a prompt, cut at its beginning to leave room for an answer.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        prompt (`str`): The text.
        answer (`int`): The most tokens that the answer may have.
        limits (`TokenLimits`): How many tokens there may be in all.

    Raises:
        ValueError: If the model has no positions for such an answer.
    """
    if limits.positions is not None and answer >= limits.positions:
        raise ValueError(
            f"`max_new_tokens={answer}` is too many: the model has {limits.positions} positions, of which the prompt "
            "needs at least one. Set it to fewer."
        )
    return _cut_prompt(encode_text(tokenizer, prompt), answer, limits, tokenizer)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids without the end of the sequence, which some tokenizers add."""
    ids = list(tokenizer(text)["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token) else ids


def pad_sequences(
    tokenizer: PreTrainedTokenizerBase, sequences: Sequence[list[int]], *, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask `[B, S]` of sequences, padded on the right or on the left; padding is masked."""
    pad = padding_token(tokenizer)
    width = max(map(len, sequences))
    gaps = [width - len(ids) for ids in sequences]
    if left:
        rows = [[pad] * gap + ids for gap, ids in zip(gaps, sequences, strict=True)]
        masks = [[0] * gap + [1] * len(ids) for gap, ids in zip(gaps, sequences, strict=True)]
    else:
        rows = [ids + [pad] * gap for gap, ids in zip(gaps, sequences, strict=True)]
        masks = [[1] * len(ids) + [0] * gap for gap, ids in zip(gaps, sequences, strict=True)]
    return torch.tensor(rows), torch.tensor(masks)  # [B, S]


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token for padding, which is masked: that of the tokenizer, or any."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)


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
    room = min((limit for limit in (limits.max_length, limits.positions) if limit is not None), default=None)
    if not head:  # something must come before the first token
        return [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    if room is None or len(head) + answer <= room:
        return head
    limits.warn(room)
    length = max(room - answer, 1)
    has_bos = head[0] == tokenizer.bos_token_id and length > 1
    return [head[0], *head[len(head) - length + 1 :]] if has_bos else head[-length:]
