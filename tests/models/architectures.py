"""The architectures of docs/models.md, each as a tiny model made from its configuration, with a batch to train on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import picture_models
import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
)


VOCAB, LABELS, SIZE, PATCH = 96, 4, 16, 8
# Sizes under the names that configurations give them. Each gets those that it has.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size", "encoder_hid"), 64),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff", "hidden_dim"), 128),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 128),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_decoder_layers"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "hidden_size_per_layer_input"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "rotary_dim", "state_size"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    "num_experts_per_tok": 2,
    "image_size": SIZE,
    "patch_size": PATCH,
    "num_labels": LABELS,
    # Layers that are skipped at random get no gradient.
    **dict.fromkeys(("encoder_layerdrop", "decoder_layerdrop"), 0.0),
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
    # Features of order one, so that a few steps of training show.
    "initializer_range": 0.2,
}


@dataclass(frozen=True)
class Architecture:
    """
    A row of the table.

    Args:
        name (`str`): The `model_type` of transformers.
        auto (`type`): The class of transformers that makes the model.
        task_type (`str`, *optional*): Of the adapter's configuration.
        batch (`Callable`): Makes the arguments of `forward` for a model.
        settings (`dict`): Fields of the configuration besides `SIZES`; `None` leaves out one of those.
        limits (`dict[str, tuple[str, str]]`): What doesn't work: the reason, and a part of the error's text.
    """

    name: str
    auto: Any
    task_type: str | None
    batch: Callable[[nn.Module], dict[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return self.auto.from_config(make_config(self.name, **self.settings)).eval()


def make_config(name: str, **settings: Any) -> Any:
    """The tiny configuration of an architecture."""
    cls = CONFIG_MAPPING[name]
    if name in picture_models.SETTINGS:
        return cls(**settings)
    known = {"num_labels"} | set(inspect.signature(cls).parameters) | set(getattr(cls, "attribute_map", ()))
    sizes = {key: value for key, value in SIZES.items() if key in known}
    return cls(**{key: value for key, value in {**sizes, **settings}.items() if value is not None})


def token_ids(rows: int = 4, length: int = 8) -> torch.Tensor:
    return torch.randint(5, VOCAB - 5, (rows, length), generator=torch.Generator().manual_seed(3))


def sound_to_predict(model: nn.Module) -> dict[str, Any]:
    sound = torch.randn(4, 80, 32, generator=torch.Generator().manual_seed(4))
    return {"input_features": sound, "labels": token_ids()}


def pictures(rows: int = 4) -> torch.Tensor:
    return torch.randn(rows, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(4))


def tokens_to_predict(model: nn.Module) -> dict[str, Any]:
    return {"input_ids": token_ids(), "labels": token_ids()}


def tokens_to_classify(model: nn.Module) -> dict[str, Any]:
    return {"input_ids": token_ids(), "labels": torch.arange(4) % LABELS}


def pictures_to_classify(model: nn.Module) -> dict[str, Any]:
    return {"pixel_values": pictures(), "labels": torch.arange(4) % LABELS}


_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
# What an architecture needs besides `SIZES`.
SETTINGS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "bamba": {
        "attn_layer_indices": [1],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "falcon": {"head_dim": None},
    "falcon_h1": {
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_ssm": 128,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "led": {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
    "mamba2": {"num_heads": 32, "head_dim": 4, "n_groups": 2, "chunk_size": 8},
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 64},
    "swin": {
        "embed_dim": 32,
        "depths": [1, 1],
        "num_heads": [2, 4],
        "window_size": 2,
        "patch_size": 2,
        **dict.fromkeys(("hidden_size", "num_attention_heads", "num_hidden_layers", "num_layers")),
    },
    "whisper": {"max_source_positions": 16, "max_target_positions": 64, "decoder_start_token_id": 1},
    **picture_models.SETTINGS,
}


# What doesn't work: the reason, and a part of the error's text.
LIMITS: dict[str, dict[str, tuple[str, str]]] = {
    "deberta": {
        "4-bit": (
            "its attention (transformers 5.23) computes in float32 whatever the dtype of the base, which fails in 16 "
            "bits without an adapter too",
            "same dtype",
        )
    },
    "falcon": {
        "4-bit": (
            "its linear layers have their own class, which transformers (5.23) doesn't quantize",
            "packed",
        )
    },
    **dict.fromkeys(
        "gpt_oss granitemoe mixtral olmoe phimoe qwen3_moe".split(),
        {
            "4-bit": (
                "the weights of experts are parameters, which bitsandbytes doesn't quantize: they stay in 16 bits, "
                "and default targets have no other layers",
                "no weight is packed",
            )
        },
    ),
    **dict.fromkeys(
        ("deepseek_v3", "glm4_moe"),
        {
            "exports": (
                "dense layers have the names of experts, and PEFT (0.21) takes these for experts wherever they are: "
                "train experts (`target_parameters`), attention, or both to export",
                "takes these names for fused experts",
            )
        },
    ),
}


def _rows(auto: Any, task_type: str | None, batch: Callable, names: str, **settings: Any) -> dict[str, Architecture]:
    return {
        name: Architecture(name, auto, task_type, batch, {**settings, **SETTINGS.get(name, {})}, LIMITS.get(name, {}))
        for name in names.split()
    }


_DECODERS = _rows(
    AutoModelForCausalLM,
    "CAUSAL_LM",
    tokens_to_predict,
    "apertus arcee bamba biogpt bloom codegen cohere cohere2 cwm diffllama doge ernie4_5 exaone4 falcon falcon_h1 "
    "falcon_mamba gemma gemma2 gemma3_text gemma4_text glm glm4 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese "
    "gptj granite helium hunyuan_v1_dense jais2 lfm2 llama mamba mamba2 minicpm3 ministral ministral3 mistral "
    "modernbert-decoder mpt nanochat nemotron olmo olmo2 olmo3 olmo_hybrid opt persimmon phi phi3 qwen2 qwen3 "
    "qwen3_5_text recurrent_gemma seed_oss smollm3 stablelm starcoder2 vaultgemma xglm youtu",
)
_MIXTURES = _rows(
    AutoModelForCausalLM,
    "CAUSAL_LM",
    tokens_to_predict,
    "deepseek_v3 glm4_moe gpt_oss granitemoe llama4_text mixtral olmoe phimoe qwen2_moe qwen3_moe",
)
_CLASSIFIERS = _rows(
    AutoModelForSequenceClassification,
    "SEQ_CLS",
    tokens_to_classify,
    "bert big_bird camembert data2vec-text deberta deberta-v2 distilbert electra ernie eurobert megatron-bert "
    "modernbert rembert roberta xlm-roberta xlm-roberta-xl",
)
_SEQ2SEQ = _rows(
    AutoModelForSeq2SeqLM,
    "SEQ_2_SEQ_LM",
    tokens_to_predict,
    "bart blenderbot led m2m_100 marian mbart mt5 pegasus plbart t5 umt5",
    decoder_start_token_id=1,
)
_SOUND = _rows(AutoModelForSpeechSeq2Seq, None, sound_to_predict, "whisper")
_PICTURES = {
    **_rows(AutoModelForImageClassification, None, pictures_to_classify, "beit dinov2 swin vit"),
    **_rows(AutoModel, None, picture_models.pictures_with_captions, "clip siglip"),
}
_PICTURES_AND_TEXT = _rows(
    AutoModelForImageTextToText,
    "CAUSAL_LM",
    picture_models.pictures_with_text,
    "gemma3 idefics3 internvl llava mistral3 paligemma qwen2_vl qwen2_5_vl qwen3_vl smolvlm",
)
GROUPS = {
    "Decoders": _DECODERS,
    "Mixtures of experts": _MIXTURES,
    "Encoders": _CLASSIFIERS,
    "Encoders with decoders": {**_SEQ2SEQ, **_SOUND},
    "Pictures": _PICTURES,
    "Pictures and text": _PICTURES_AND_TEXT,
}
ARCHITECTURES = {name: row for rows in GROUPS.values() for name, row in rows.items()}
