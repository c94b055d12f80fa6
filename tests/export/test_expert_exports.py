"""Adapters of experts as PEFT's LoRA on parameters."""

import json

import pytest
import torch
from expert_models import EXPERT_MODELS, build
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from testing_utils import build_tokenizer, perturb, random_ids, task_rows
from transformers import AutoModelForCausalLM

from rlora_trl import RLoraConfig, export_lora
from rlora_trl.files.checks import check_adapter
from rlora_trl.reading import AdapterCheckError


TASKS = ["first", "same"]
# float32 in both; PEFT adds the delta to the weight, which is of order one.
TOL = {"rtol": 1e-4, "atol": 1e-4}
# Families without linear layers among their MLP projections.
PLAIN = [name for name, (*_, modules) in EXPERT_MODELS.items() if not modules]
ONLY_EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def adapted(family, **settings):
    torch.manual_seed(1)
    model = get_peft_model(build(family), RLoraConfig(r=3, **settings)).eval()
    perturb(model)
    return model


def logits(model, ids=None):
    with torch.no_grad():
        return model(random_ids() if ids is None else ids).logits


@pytest.mark.parametrize("family", EXPERT_MODELS)
@pytest.mark.parametrize("settings", [{}, {"share_a": False}, {"init_weights": "zero_a"}], ids=str)
def test_a_uniform_adapter_is_exported_exactly(family, settings, tmp_path):
    model = adapted(family, router="uniform", **ONLY_EXPERTS, **settings)
    expected = logits(model)
    report = export_lora(model, tmp_path / "lora")
    assert report.exact
    torch.testing.assert_close(logits(PeftModel.from_pretrained(model.unload(), tmp_path / "lora")), expected, **TOL)


@pytest.mark.parametrize("family", EXPERT_MODELS)
def test_each_task_is_exported_exactly(family, tmp_path):
    model = adapted(family, router="task", tasks=TASKS, **ONLY_EXPERTS)
    outputs = {}
    for task in TASKS:
        model.set_task(task)
        outputs[task] = logits(model)
        export_lora(model, tmp_path / task, task=task)
    assert not torch.allclose(*outputs.values(), **TOL)
    base = model.unload()
    for task, expected in outputs.items():
        loaded = PeftModel.from_pretrained(base, tmp_path / task)
        torch.testing.assert_close(logits(loaded), expected, **TOL)
        base = loaded.unload()


@pytest.mark.parametrize("weight", ["gate_up_proj", "down_proj"])
def test_one_weight_and_attention(weight, tmp_path):
    settings = {"target_parameters": [f"experts.{weight}"], "target_modules": ["q_proj"]}
    model = adapted("qwen3_moe", router="uniform", rank_pattern={"q_proj": 2}, **settings)
    expected = logits(model)
    export_lora(model, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["target_parameters"] == [f"model.layers.{i}.mlp.experts.{weight}" for i in range(2)]
    torch.testing.assert_close(logits(PeftModel.from_pretrained(model.unload(), tmp_path / "lora")), expected, **TOL)


@pytest.mark.parametrize("family", PLAIN)
def test_a_merged_export_is_a_model(family, tmp_path):
    model = adapted(family, router="uniform")
    export_lora(model, tmp_path / "merged", merge=True, tokenizer=build_tokenizer())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), logits(model), **TOL)


def test_the_gap_of_a_task_is_measured(tmp_path):
    model = adapted("qwen3_moe", router="task", tasks=TASKS)
    report = export_lora(
        model, tmp_path / "lora", task="first", data={"first": task_rows("first", 4)}, tokenizer=build_tokenizer()
    )
    assert report.kl < 1e-6


@pytest.mark.parametrize("routing", [None, [0.5, 0.25, 0.25]])
def test_routers_of_tokens_are_refused(routing, tmp_path):
    model = adapted("qwen3_moe")
    data = {} if routing else {"data": {"first": task_rows("first", 4)}, "tokenizer": build_tokenizer()}
    with pytest.raises(ValueError, match=r"adapts experts .* whose heads have nothing in common"):
        export_lora(model, tmp_path / "lora", routing=routing, **data)
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("family", ["qwen2_moe", "llama4"])
def test_shared_experts_are_exported_beside_experts(family, tmp_path):
    model = adapted(family, router="uniform")
    expected = logits(model)
    export_lora(model, tmp_path / "lora")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(model.unload(), tmp_path / "lora")), expected, **TOL)


def test_shared_experts_that_peft_takes_for_others_are_refused(tmp_path):
    with pytest.raises(ValueError, match="takes these names for fused experts.* and attention are exported"):
        export_lora(adapted("deepseek_v3", router="uniform"), tmp_path / "lora")

    # The remedy of that error.
    targets = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": ["o_proj"]}
    model = adapted("deepseek_v3", router="uniform", **targets)
    expected = logits(model)
    export_lora(model, tmp_path / "lora")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(model.unload(), tmp_path / "lora")), expected, **TOL)


def test_files_of_experts_pass_the_checks_of_a_push(tmp_path):
    model = adapted("qwen3_moe", router="task", tasks=TASKS)
    model.save_pretrained(tmp_path / "adapter")
    export_lora(model, tmp_path / "adapter" / "exports" / "first", task="first")
    check_adapter(tmp_path / "adapter")

    # A factor of another rank, and one expert less in the adapter itself.
    path = tmp_path / "adapter" / "exports" / "first" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("experts.lora_A.weight"))
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, path)
    with pytest.raises(AdapterCheckError, match=r"experts has \{'lora_A'"):
        check_adapter(tmp_path / "adapter")
    save_file(tensors, path)

    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("down_proj.rlora_adapters.router"))
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, path)
    with pytest.raises(AdapterCheckError, match=r"down_proj.rlora_adapters.router has shape \[5, 2, 3\], expected"):
        check_adapter(tmp_path / "adapter")
