"""What the tests of exports share: tiny adapters, their outputs, and what an export must leave as it is."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from testing_utils import TASK_TYPES, perturb, random_ids, task_rows
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)

from rlora_trl import RLoraConfig


TASKS = ["first", "same"]
DATA = {task: task_rows(task, 8) for task in TASKS}
WEIGHTS = [0.2, 0.7, 0.1]
# Kind of base, fields of the configuration, rank of the export.
MATRIX = {
    "default": ("llama", {}, 8),
    "conv1d": ("gpt2", {}, 8),
    "conv1d_all": ("gpt2", {"target_modules": "all-linear"}, 8),
    "own_a": ("llama", {"share_a": False}, 24),
    "no_anchor": ("llama", {"init_weights": "zero_b", "router_init": "kaiming_uniform"}, 4),
    "zero_a": ("llama", {"init_weights": "zero_a"}, 4),
    "own_a_no_anchor": ("llama", RLoraConfig.moe_lora().to_dict() | {"peft_type": None}, 12),
    "patterns": ("llama", {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"1.mlp.up_proj": 7}}, 8),
    "alpha_over_r": ("qwen2", {"use_rslora": False, "r": 3, "num_heads": 5}, 6),
    "some_layers": ("llama", {"target_modules": ["down_proj", "q_proj"], "layers_to_transform": [1]}, 8),
    "expression": ("llama", {"target_modules": r".*\.0\.mlp\.up_proj"}, 8),
    "lm_head": ("llama", {"target_modules": ["lm_head", "v_proj"]}, 8),
    "bert": ("bert", {"modules_to_save": ["classifier"]}, 8),
}


def load_base(model_folders, name, dtype=torch.float32, **kwargs):
    auto = AutoModelForSequenceClassification if name == "bert" else AutoModelForCausalLM
    return auto.from_pretrained(model_folders[name], dtype=dtype, **kwargs).eval()


def load_for(model_folders, kind):
    if kind == "4bit":
        pytest.importorskip("bitsandbytes")
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        return load_base(model_folders, "llama64", torch.bfloat16, quantization_config=quantization)
    return load_base(model_folders, "llama64", torch.bfloat16 if kind == "bf16" else torch.float32)


def adapted(model_folders, name="llama", dtype=torch.float32, scale=1.0, **kwargs):
    kwargs.pop("peft_type", None)
    kwargs = {"task_type": TASK_TYPES.get(name, "CAUSAL_LM"), **{k: v for k, v in kwargs.items() if v is not None}}
    kwargs["task_type"] = TASK_TYPES.get(name, "CAUSAL_LM")
    model = get_peft_model(load_base(model_folders, name, dtype), RLoraConfig(**kwargs)).eval()
    perturb(model, scale)
    return model


def logits(model, ids=None):
    with torch.no_grad():
        return model(random_ids() if ids is None else ids).logits.float()


def error(got, expected):
    return float((got - expected).abs().max() / expected.abs().max())


def state_of(model):
    """Everything about a model that an export must not change."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modules": {name: id(module) for name, module in model.named_modules()},
        "training": {name: module.training for name, module in model.named_modules()},
        "trains": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "hooks": {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()},
        "config": model.config.to_dict(),
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "configs": id(model.base_model.model.peft_config) if isinstance(model, PeftModel) else None,
    }


def same_state(model, before):
    after = state_of(model)
    tensors, tensors_before = after.pop("tensors"), before.pop("tensors")
    assert tensors.keys() == tensors_before.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in tensors_before.items())
    assert after == before


def with_export(model, folder):
    """The base of a model with an export loaded by stock PEFT."""
    return PeftModel.from_pretrained(model.unload(), folder).eval()
