"""Shapes of real models, for random weights of their size: speed does not depend on what a model knows."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP


# Hidden size, MLP size, layers, attention heads, key-value heads, vocabulary, tied embeddings.
_QWEN25 = {
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-3b": (2048, 11008, 36, 16, 2, 151936, True),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064, False),
}
SHAPES = tuple(_QWEN25)


def model_config(shape: str, layers: int | None = None) -> Qwen2Config:
    """The configuration of a shape; `layers` cuts it short."""
    hidden, mlp, depth, heads, kv_heads, vocabulary, tied = _QWEN25[shape]
    return Qwen2Config(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
        use_cache=False,
    )


def mlp(hidden: int, intermediate: int, device: str, dtype: torch.dtype) -> Qwen2MLP:
    """The MLP block of these models: gate and up projection of one input, and the down projection."""
    return Qwen2MLP(Qwen2Config(hidden_size=hidden, intermediate_size=intermediate)).to(device, dtype)


def small_model(layers: int, vocabulary: int = 49152) -> torch.nn.Module:
    """A model of the shape of SmolLM2-135M with random weights, in float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
