"""The LoRA adapter that is written: its factors, the names of its layers, and the rules of vLLM and llama.cpp."""

import copy
import json
import re
import time

import pytest
import torch
from exporting import MATRIX, WEIGHTS, adapted, error, load_base, logits, with_export
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from testing_utils import VOCAB, perturb
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from rlora_trl import RLoraConfig
from rlora_trl.export import export_lora
from rlora_trl.export.lora import lora_factors, target_names
from rlora_trl.tuner.selection import adapted_layers


def test_rounded_to_16_bits_what_training_changed_is_kept(model_folders):
    """The factors hold what changed, not the large terms that cancel: those, rounded, would hide it."""
    model = adapted(model_folders, scale=0.02)
    adapter = next(iter(adapted_layers(model, "default").values())).rlora_adapters["default"]
    weights = torch.full((3,), 1 / 3)
    down, up = lora_factors(adapter, weights)
    A, B, A0, B0 = (t.detach().double() for t in (adapter.A, adapter.B, adapter.A0, adapter.B0))
    terms = [torch.cat([A, A0]), adapter.scaling * torch.cat([B.mean(0), -B0], dim=1)]
    exact = terms[1] @ terms[0]
    assert (up @ down - exact).norm() <= 1e-6 * exact.norm()

    def rounded(up, down):
        return ((up.bfloat16().double() @ down.bfloat16().double()) - exact).norm() / exact.norm()

    assert rounded(up, down) < 0.01
    assert rounded(terms[1], terms[0]) > 5 * rounded(up, down)


# vLLM 0.33: `PEFTHelper` (vllm/lora/peft_helper.py), `LoRAModel.from_local_checkpoint` (lora_model.py),
# `parse_fine_tuned_lora_name` (utils.py) and `LoRAConfig.max_lora_rank` (vllm/config/lora.py).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@pytest.mark.parametrize("option", ["default", "patterns", "own_a", "expression", "some_layers"])
def test_rules_of_vllm(model_folders, tmp_path, option):
    name, kwargs, _ = MATRIX[option]
    model = adapted(model_folders, name, **kwargs)
    export_lora(model, tmp_path / "out", routing=WEIGHTS)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    card = (tmp_path / "out" / "README.md").read_text()
    offered = int(re.search(r"--max-lora-rank (\d+)", card).group(1))
    assert offered in VLLM_RANKS and 0 < config["r"] <= offered
    assert isinstance(config["target_modules"], list)
    assert config["bias"] == "none" and not config["modules_to_save"]
    refused = ("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
    assert not any(config.get(key) for key in refused)
    assert config["init_lora_weights"] is True
    # One rank and one scaling for all.
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)
    assert config["lora_alpha"] / config["r"] == 1.0

    expected_modules = {"gate_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj"}
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    pairs = {}
    for key, tensor in tensors.items():
        assert key.startswith("base_model.model.")
        module, matrix, last = key.removeprefix("base_model.model.").rsplit(".", 2)
        assert last == "weight" and matrix in ("lora_A", "lora_B")
        assert module.rsplit(".", 1)[-1] in expected_modules
        assert tensor.dtype == torch.float32 and tensor.is_contiguous()
        pairs.setdefault(module, {})[matrix] = tensor
    base = load_base(model_folders, name)
    assert set(pairs) == set(adapted_layers(model, "default"))
    for module, pair in pairs.items():
        out_features, in_features = base.get_submodule(module).weight.shape
        assert pair["lora_A"].shape == (config["r"], in_features)
        assert pair["lora_B"].shape == (out_features, config["r"])


def test_rules_of_llama_cpp(model_folders, tmp_path):
    """`convert_lora_to_gguf.py` takes nothing but pairs of A and B, reads `lora_alpha`, and divides it by A's rows."""
    model = adapted(model_folders, rank_pattern={"down_proj": 2})
    export_lora(model, tmp_path / "out", routing=WEIGHTS)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for key, tensor in tensors.items():
        assert key.endswith((".lora_A.weight", ".lora_B.weight"))
        rank = tensor.shape[0] if ".lora_A." in key else tensor.shape[1]
        assert config["lora_alpha"] / rank == 1.0
        assert key.replace("lora_A", "lora_B") in tensors and key.replace("lora_B", "lora_A") in tensors


def test_target_names():
    modules = ["", "h", "h.0.attn.c_proj", "h.0.mlp.c_proj", "h.1.attn.c_proj", "h.1.mlp.c_proj", "xc_proj"]
    assert target_names(["h.0.mlp.c_proj", "h.1.mlp.c_proj"], modules) == ["mlp.c_proj"]
    assert target_names(["h.1.mlp.c_proj"], modules) == ["1.mlp.c_proj"]
    assert target_names([name for name in modules if name.endswith(".c_proj")], modules) == ["c_proj"]
    assert target_names(["xc_proj"], modules) == ["xc_proj"]


def test_target_names_of_many_layers():
    """Names that share no suffix, as where layers are chosen one by one."""
    modules = [f"model.layers.{i}.mlp.{kind}_proj" for i in range(10_000) for kind in ("gate", "up", "down")]
    chosen = modules[::2]
    start = time.process_time()
    assert target_names(chosen, modules) == sorted(f"{i}.mlp.{name}" for i, name in _depths(chosen))
    assert time.process_time() - start < 10, "takes about 0.3 s"


def _depths(names):
    return [(name.split(".")[2], name.split(".")[4]) for name in names]


def test_export_of_many_layers(tmp_path):
    """500 layers, each with its own rank and scaling; PEFT reads the export without a pattern for each."""
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=VOCAB, num_hidden_layers=167, **sizes)
    base = LlamaForCausalLM(config)
    model = get_peft_model(copy.deepcopy(base), RLoraConfig(task_type="CAUSAL_LM")).eval()
    perturb(model)
    start = time.process_time()
    report = export_lora(model, tmp_path / "export", routing=[0.2, 0.3, 0.5])
    assert report.layers == 501 and time.process_time() - start < 20, "takes about 0.5 s"
    saved = json.loads((tmp_path / "export" / "adapter_config.json").read_text())
    assert saved["target_modules"] == ["down_proj", "gate_proj", "up_proj"]
    assert saved["rank_pattern"] == saved["alpha_pattern"] == {}
    start = time.process_time()
    PeftModel.from_pretrained(base, tmp_path / "export")
    assert time.process_time() - start < 20, "takes about 1 s"


def mixture_of_experts(targets):
    torch.manual_seed(0)
    sizes = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1}
    base = DeepseekV3ForCausalLM(
        DeepseekV3Config(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            initializer_range=0.2,
            **sizes,
            **experts,
        )
    )
    config = RLoraConfig(task_type="CAUSAL_LM", target_modules=targets, router="uniform", init_weights=False)
    model = get_peft_model(base, config).eval()
    perturb(model, 0.02)
    return model


@pytest.mark.parametrize("targets", ["all-linear", ["gate_proj", "up_proj", "down_proj"], ["gate_proj"]])
def test_layers_that_peft_takes_for_fused_experts_are_refused(tmp_path, targets):
    with pytest.raises(
        ValueError, match=r"gate_proj.*DeepseekV3ForCausalLM PEFT.*fused experts.*do not include `gate_proj`"
    ):
        export_lora(mixture_of_experts(targets), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_beside_fused_experts_other_layers_are_exported(tmp_path):
    model = mixture_of_experts(["o_proj", "q_b_proj"])
    expected = logits(model)
    export_lora(model, tmp_path / "out")
    export_lora(model, tmp_path / "merged", merge=True)
    assert error(logits(with_export(model, tmp_path / "out")), expected) < 1e-5
    assert error(logits(DeepseekV3ForCausalLM.from_pretrained(tmp_path / "merged").eval()), expected) < 1e-5
