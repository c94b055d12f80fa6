"""Tiny models, a tiny tokenizer and tiny tasks, made from a config: nothing is downloaded."""

import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)


SPECIAL = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]
WORDS = SPECIAL + [f"w{i}" for i in range(60)] + ["yes", "no", "Answer:", "red", "blue", "green"]
VOCAB = 80
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<user> {{ message['content'] }} "
    "{% else %}<assistant> {% generation %}{{ message['content'] }} <eos>{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words of a small vocabulary, separated by spaces, with a chat template."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=512
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Features of order one, so that a few steps of training show.
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
TINY_MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_DECODER)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_DECODER)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=32,
            n_inner=48,
            n_layer=2,
            n_head=4,
            n_positions=128,
            initializer_range=0.2,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=1,
            # Its own dropout would draw from the generator of each device.
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    ),
    "bert": lambda: BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_labels=3,
        )
    ),
}
# bitsandbytes packs 4-bit weights on CPU in blocks of 64 inputs and 32 outputs.
TINY_MODELS["llama64"] = lambda: LlamaForCausalLM(
    LlamaConfig(**{**_DECODER, "hidden_size": 64, "intermediate_size": 128})
)
CAUSAL = ("llama", "qwen2", "gpt2")
TASK_TYPES = {"llama": "CAUSAL_LM", "qwen2": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS"}


def random_ids(batch: int = 3, length: int = 9, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCAB - 12, (batch, length), generator=generator)


def perturb(model: torch.nn.Module, scale: float = 0.3, seed: int = 0) -> None:
    """Move everything that trains away from its initial value, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.device, parameter.dtype)
                parameter += scale * noise * parameter.float().abs().mean().clamp(min=0.05).to(parameter.dtype)


def task_rows(task: str, count: int, seed: int = 0) -> list[dict]:
    """Rows of one of three learnable tasks on the tiny vocabulary."""
    draw = random.Random(f"{task}-{seed}")
    rows = []
    for _ in range(count):
        words = [f"w{draw.randrange(20)}" for _ in range(draw.randrange(2, 6))]
        answers = {
            "first": words[0],
            "colour": ("red", "blue", "green")[int(words[-1][1:]) % 3],
            "same": "yes" if words[0] == words[-1] else "no",
        }
        rows.append({"prompt": f"{' '.join(words)} Answer:", "completion": f" {answers[task]}"})
    return rows


def task_datasets(count: int = 40, seed: int = 0) -> dict[str, Dataset]:
    return {task: Dataset.from_list(task_rows(task, count, seed)) for task in ("first", "colour", "same")}


@contextmanager
def limited_files(size: int) -> Iterator[None]:
    """Files that can't grow beyond a size in bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
