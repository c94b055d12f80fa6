"""Tiny mixtures of experts of all families, made from a config, and a loop over experts as reference."""

from functools import partial

import torch
from testing_utils import VOCAB
from torch.nn import functional as F
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from rlora_trl.kernels.reference import multihead_delta_reference
from rlora_trl.tuner.experts import RLoraExperts


_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
_HEADS = {"head_dim": 8}
_QWEN = {"num_experts": 6, "moe_intermediate_size": 24}
_LATENT = {"q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
_GROUPS = {"n_routed_experts": 6, "moe_intermediate_size": 24, "n_group": 2, "topk_group": 1}

# Constructor, configuration, and the linear layers that are adapted by default.
EXPERT_MODELS = {
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {**_QWEN, **_HEADS}, set()),
    "qwen2_moe": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig,
        {**_QWEN, "shared_expert_intermediate_size": 16},
        {"gate_proj", "up_proj", "down_proj"},
    ),
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 5}, set()),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig, {"num_experts": 5}, set()),
    "gpt_oss": (GptOssForCausalLM, GptOssConfig, {"num_local_experts": 5, **_HEADS}, set()),
    "granitemoe": (GraniteMoeForCausalLM, GraniteMoeConfig, {"num_local_experts": 5}, set()),
    "deepseek_v3": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        {**_LATENT, **_GROUPS, "num_key_value_heads": 4, "first_k_dense_replace": 1},
        {"gate_proj", "up_proj", "down_proj"},
    ),
    "llama4": (
        Llama4ForCausalLM,
        Llama4TextConfig,
        {"num_local_experts": 5, "intermediate_size_mlp": 16, **_HEADS},
        {"gate_proj", "up_proj", "down_proj"},
    ),
}


def build(family: str, seed: int = 0, **changes):
    """A tiny model of a family, in eval mode."""
    model_class, config_class, settings, _ = EXPERT_MODELS[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**_COMMON, **settings, **changes}))
    # Some families leave weights of experts or routers at zero or uninitialized.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or "router" in name or "gate.weight" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def wrappers(model) -> dict[str, RLoraExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, RLoraExperts)}


def _product(experts, name, e, x, adapters, masks, logits):
    """`x` times the weight of expert `e`, with bias and delta."""
    weight = getattr(experts, name)[e]
    transposed = getattr(experts, "is_transposed", True)
    y = x @ (weight if transposed else weight.T)
    bias = getattr(experts, f"{name}_bias", None)
    y = y if bias is None else y + bias[e]
    for adapter in adapters.get(name, ()):
        tensors = [None if t is None else t[e] for t in (adapter.A, adapter.B, adapter.router, adapter.A0, adapter.B0)]
        if adapter.router_kind == "task":
            tensors[2] = None
        y = y + multihead_delta_reference(
            x,
            *tensors,
            scaling=adapter.scaling,
            dropout=adapter.dropout if masks is not None else 0.0,
            head_masks=None if masks is None else masks(adapter, e, len(x)),
            logits=None if logits is None else logits(adapter, e),
            top_k=adapter.top_k,
        )
    return y


def expert_loop(experts, adapters, masks, task_logits, hidden, index=None, weights=None):
    """The forward pass of experts, one by one: `adapters` are lists by the name of the weight."""
    count = experts.gate_up_proj.shape[0]
    if index is None:  # Llama 4: each expert gets all tokens
        rows = hidden.reshape(count, -1, hidden.shape[-1])
        pairs = [(e, torch.arange(rows.shape[1]), rows[e], None) for e in range(count)]
    else:
        pairs = []
        for e in range(count):
            slot, token = torch.where(index.T == e)  # the order of rows in transformers' loop
            pairs.append((e, token, hidden[token], weights[token, slot, None]))

    out = torch.zeros_like(hidden)
    parts = []
    for e, token, x, scale in pairs:
        logits = None if task_logits is None else partial(task_logits, token)
        gate_up = _product(experts, "gate_up_proj", e, x, adapters, masks, logits)
        if hasattr(experts, "_apply_gate"):
            inner = experts._apply_gate(gate_up)
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            inner = up * experts.act_fn(gate)
        y = _product(experts, "down_proj", e, inner, adapters, masks, logits)
        if scale is None:
            parts.append(y)
        else:
            out = out.index_add(0, token, y * scale)
    return torch.cat(parts) if parts else out


def with_loops(model, adapter_names=("default",), masks=None, task_logits=None):
    """Replace the forward pass of all wrapped experts of a model by [`expert_loop`], with the same parameters."""
    for wrapper in wrappers(model).values():
        adapters = {
            name: [layer.rlora_adapters[key] for key in adapter_names if key in layer.rlora_adapters]
            for name, layer in wrapper.weights().items()
        }
        wrapper.forward = partial(expert_loop, wrapper.base_layer, adapters, masks, task_logits)
    return model


def mean_loss(logits, ids):
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
