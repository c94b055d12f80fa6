"""Shapes of large models, as numbers alone: nothing heavy is imported to count with them."""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Shape:
    """
    Sizes of a decoder: the name of its configuration's class, features, those of the MLP, layers, attention heads,
    key-value heads, and vocabulary. Embeddings are not tied.
    """

    family: str
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    def config(self, length: int) -> Any:
        """The configuration of a model of this shape, for rows of `length` tokens."""
        import transformers

        # Qwen2's head size is always this; Mistral's would be another, with a window.
        options: dict[str, Any] = {}
        if self.family == "MistralConfig":
            options = {"head_dim": self.hidden // self.heads, "sliding_window": None}
        return getattr(transformers, self.family)(
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            tie_word_embeddings=False,
            max_position_embeddings=max(4096, length),
            use_cache=False,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=0,
            **options,
        )

    def with_layers(self, layers: int | None) -> "Shape":
        """The same shape with another number of layers; `None` leaves it."""
        return replace(self, layers=layers) if layers else self

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's linear modules, which are what is quantized."""
        key_value = self.kv_heads * (self.hidden // self.heads)
        return self.hidden * (2 * self.hidden + 2 * key_value) + 3 * self.hidden * self.mlp

    @property
    def parameters(self) -> int:
        """Weights of the whole model, without biases and norms."""
        return self.layers * self.layer_weights + 2 * self.vocabulary * self.hidden

    def adapter_parameters(self, r: int, num_heads: int) -> int:
        """What R-LoRA trains on gate, up and down projections: A, the heads' B, and the router."""
        inputs, outputs = 2 * self.hidden + self.mlp, 2 * self.mlp + self.hidden
        return self.layers * ((r + num_heads) * inputs + r * num_heads * outputs)

    def lora_rank(self, r: int, num_heads: int) -> int:
        """The rank with which LoRA trains as many parameters on the same modules, to the nearest."""
        return round(self.adapter_parameters(r, num_heads) / (3 * self.layers * (self.hidden + self.mlp)))


SHAPES = {
    "tiny": Shape("LlamaConfig", 64, 128, 2, 4, 2, 512),
    "qwen2.5-7b": Shape("Qwen2Config", 3584, 18944, 28, 28, 4, 152064),
    "qwen2.5-32b": Shape("Qwen2Config", 5120, 27648, 64, 40, 8, 152064),
    "llama-3.1-70b": Shape("LlamaConfig", 8192, 28672, 80, 64, 8, 128256),
    "qwen2.5-72b": Shape("Qwen2Config", 8192, 29568, 80, 64, 8, 152064),
    "mistral-large-123b": Shape("MistralConfig", 12288, 28672, 88, 96, 8, 32768),
}
