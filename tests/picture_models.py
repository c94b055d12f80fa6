"""Tiny models of pictures and text: settings, and batches with a picture in each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


VOCAB, SIZE, PATCH = 96, 16, 4
IMAGE_TOKEN, VISION_START, VISION_END, VIDEO_TOKEN = 90, 91, 92, 93
# Tokens of a picture: (SIZE / PATCH)^2 patches, and a fourth of them where a model merges two by two.
PATCHES = (SIZE // PATCH) ** 2

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
}
VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": PATCH,
    "num_channels": 3,
}
_QWEN = {"depth": 2, "num_heads": 4, "patch_size": PATCH, "temporal_patch_size": 2, "spatial_merge_size": 2}
_QWEN_TOKENS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": VIDEO_TOKEN,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}

# Fields of each configuration.
SETTINGS: dict[str, dict[str, Any]] = {
    "clip": {"text_config": {**TEXT, "eos_token_id": 2}, "vision_config": VISION, "projection_dim": 32},
    "siglip": {"text_config": {**TEXT, "projection_size": 64}, "vision_config": VISION},
    "gemma3": {
        "text_config": {**TEXT, "model_type": "gemma3_text", "sliding_window": 64},
        "vision_config": {**VISION, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE_TOKEN,
        "boi_token_index": VISION_START,
        "eoi_token_index": VISION_END,
    },
    "idefics3": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": VISION,
        "scale_factor": 2,
        "image_token_id": IMAGE_TOKEN,
    },
    "internvl": {
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {**VISION, "image_size": [SIZE, SIZE], "patch_size": [PATCH, PATCH]},
        "image_token_id": IMAGE_TOKEN,
        "downsample_ratio": 0.5,
    },
    "llava": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**VISION, "model_type": "clip_vision_model"},
        "image_token_index": IMAGE_TOKEN,
    },
    "mistral3": {
        "text_config": {**TEXT, "model_type": "mistral"},
        "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 16},
        "image_token_index": IMAGE_TOKEN,
        "spatial_merge_size": 2,
        "vision_feature_layer": -1,
    },
    "paligemma": {
        "text_config": {**TEXT, "model_type": "gemma", "num_image_tokens": PATCHES},
        "vision_config": {
            **VISION,
            "model_type": "siglip_vision_model",
            "projection_dim": 64,
            "vision_use_head": False,
        },
        "image_token_index": IMAGE_TOKEN,
        "projection_dim": 64,
    },
    "qwen2_vl": {
        "text_config": {**TEXT, "rope_parameters": _ROPE},
        "vision_config": {**_QWEN, "embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2},
        **_QWEN_TOKENS,
    },
    "qwen2_5_vl": {
        "text_config": {**TEXT, "rope_parameters": _ROPE},
        "vision_config": {
            **_QWEN,
            "hidden_size": 64,
            "intermediate_size": 128,
            "out_hidden_size": 64,
            "window_size": 8,
            "fullatt_block_indexes": [1],
        },
        **_QWEN_TOKENS,
    },
    "qwen3_vl": {
        "text_config": {**TEXT, "rope_parameters": _ROPE},
        "vision_config": {
            **_QWEN,
            "hidden_size": 64,
            "intermediate_size": 128,
            "out_hidden_size": 64,
            "num_position_embeddings": PATCHES,
            "deepstack_visual_indexes": [0],
        },
        **_QWEN_TOKENS,
    },
    "smolvlm": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": VISION,
        "scale_factor": 2,
        "image_token_id": IMAGE_TOKEN,
    },
}
# How pixels come: [B, 3, H, W], a list of pictures for each row [B, 1, 3, H, W], or patches [B P, 6 H W / P].
_MERGED = ("gemma3", "idefics3", "internvl", "mistral3", "smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def pictures(rows: int = 4) -> torch.Tensor:
    return torch.randn(rows, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(4))


def picture_inputs(model_type: str, rows: int = 4) -> dict[str, torch.Tensor]:
    """The pictures of a batch as a model takes them."""
    pixels = pictures(rows)
    if model_type in ("idefics3", "smolvlm"):
        return {"pixel_values": pixels[:, None]}
    if model_type.startswith("qwen"):
        side = SIZE // PATCH
        generator = torch.Generator().manual_seed(4)
        patches = torch.randn(rows * PATCHES, 3 * 2 * PATCH * PATCH, generator=generator)
        return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, side, side]] * rows)}
    if model_type == "mistral3":
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[SIZE, SIZE]] * rows)}
    return {"pixel_values": pixels}


def pictures_with_text(model: nn.Module, rows: int = 4) -> dict[str, Any]:
    """A picture before the text of each row, and the tokens to predict."""
    model_type = model.config.model_type
    tokens = PATCHES // 4 if model_type in _MERGED else PATCHES
    text = torch.randint(5, 80, (rows, 6), generator=torch.Generator().manual_seed(3))
    image = torch.tensor([[VISION_START] + [IMAGE_TOKEN] * tokens + [VISION_END]] * rows)
    input_ids = torch.cat([image, text], 1)
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": torch.where(input_ids < IMAGE_TOKEN, input_ids, -100),
        **picture_inputs(model_type, rows),
    }
    if model_type.startswith(("qwen", "gemma3", "paligemma")):
        kind = "mm_token_type_ids" if model_type.startswith("qwen") else "token_type_ids"
        batch[kind] = (input_ids == IMAGE_TOKEN).long()
    return batch


def pictures_with_captions(model: nn.Module, rows: int = 4) -> dict[str, Any]:
    """Pairs for a contrastive loss."""
    text = torch.randint(5, 80, (rows, 6), generator=torch.Generator().manual_seed(3))
    return {"input_ids": text, "pixel_values": pictures(rows), "return_loss": True}
