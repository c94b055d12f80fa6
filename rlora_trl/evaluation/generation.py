"""Greedy decoding of many prompts, in batches of similar length."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from ..tuner.selection import core_model
from .encoding import TokenLimits, encode_prompt, pad_sequences, padding_token, refuse_unknown_tokens


# The last tokens of an answer, in which a text to stop at is looked for.
_TAIL = 32


@torch.no_grad()
def generate_answers(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    limits: TokenLimits,
    stop: Sequence[str] = (),
    batch_size: int = 32,
    description: str | None = None,
) -> list[str]:
    """
    What a model in eval mode writes after each prompt, by greedy decoding.

    Args:
        model (`torch.nn.Module`):
            Causal language model of transformers, with or without adapters. Its own generation config has no effect,
            except for the tokens that end a sequence.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        prompts (`Sequence[str]`):
            Texts.
        max_new_tokens (`int`):
            The most tokens of an answer.
        limits ([`TokenLimits`]):
            How many tokens a prompt and its answer may have. A prompt loses its beginning, with a warning.
        stop (`Sequence[str]`, *optional*):
            Texts at which an answer ends; it does not contain them.
        batch_size (`int`, *optional*, defaults to `32`):
            Prompts in one batch.
        description (`str`, *optional*):
            Shows a progress bar with this text.

    Returns:
        `list[str]`: The answers, without special tokens.

    Raises:
        ValueError: If the model has no positions for answers of this length, or lacks tokens of the tokenizer.
    """
    encoded = [encode_prompt(tokenizer, prompt, max_new_tokens, limits) for prompt in prompts]
    refuse_unknown_tokens(model, tokenizer, encoded)
    # The longest first: what is too large for the memory fails at once.
    order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    answers = [""] * len(encoded)
    device = next(model.parameters()).device
    with _plain_decoding(model, tokenizer, max_new_tokens) as ends:
        for batch in tqdm(batches, desc=description, disable=description is None):
            input_ids, mask = pad_sequences(tokenizer, [encoded[index] for index in batch], left=True)  # [B, S]
            begin = input_ids.shape[1]
            criteria = StoppingCriteriaList([_StopAtText(tokenizer, stop, begin)] if stop else [])
            generate: Any = model.generate  # of transformers, or of PEFT
            written = generate(
                input_ids=input_ids.to(device), attention_mask=mask.to(device), stopping_criteria=criteria
            )  # [B, S + new]
            for index, ids in zip(batch, written[:, begin:].tolist(), strict=True):
                answers[index] = _cut_at(tokenizer.decode(_before(ids, ends), skip_special_tokens=True), stop)
    return answers


@contextmanager
def _plain_decoding(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> Generator[set[int], None, None]:
    """
    Let a model decode greedily; gives the tokens that end a sequence.

    `generate` takes from the model's own generation config whatever a call does not set: sampling, beams, penalties.
    """
    core = core_model(model)
    own = core.generation_config
    ends = {tokenizer.eos_token_id, *_as_list(getattr(own, "eos_token_id", None))} - {None}
    core.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=padding_token(tokenizer),
    )
    try:
        yield ends
    finally:
        core.generation_config = own


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple | set) else [value]


def _before(ids: list[int], ends: set[int]) -> list[int]:
    """The tokens before the first that ends a sequence; padding follows it."""
    return ids[: next((index for index, token in enumerate(ids) if token in ends), len(ids))]


def _cut_at(text: str, stop: Sequence[str]) -> str:
    places = [place for mark in stop if (place := text.find(mark)) >= 0]
    return text[: min(places)] if places else text


class _StopAtText(StoppingCriteria):
    """Ends each sequence that has one of some texts after its prompt."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], begin: int) -> None:
        self.tokenizer, self.stop, self.begin = tokenizer, stop, begin

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        tails = input_ids[:, max(self.begin, input_ids.shape[1] - _TAIL) :].tolist()
        texts = self.tokenizer.batch_decode(tails, skip_special_tokens=True)
        ended = [any(mark in text for mark in self.stop) for text in texts]
        return torch.tensor(ended, device=input_ids.device)  # [B]
