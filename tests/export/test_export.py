"""`export_lora`: exact where it can be, refused where it is wrong, and loaded by those who lack this package."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from testing_utils import TASK_TYPES, TINY_MODELS, VOCAB, perturb, random_ids, task_rows
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BitsAndBytesConfig,
    CLIPConfig,
    CLIPModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from rlora_trl import RLoraConfig
from rlora_trl.analysis.measuring import measure_head_weights
from rlora_trl.export import export as export_module
from rlora_trl.export import export_lora, verify
from rlora_trl.export.lora import lora_factors, target_names
from rlora_trl.files.record import AdapterRecord
from rlora_trl.kernels.reference import multihead_delta_reference
from rlora_trl.tuner.bnb_cpu import kept_quantized
from rlora_trl.tuner.selection import adapted_layers, fixed_head_weights


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


@pytest.mark.parametrize("option", MATRIX)
def test_given_weights_are_exact(model_folders, tmp_path, option):
    name, kwargs, rank = MATRIX[option]
    model = adapted(model_folders, name, **kwargs)
    before = state_of(model)
    report = export_lora(model, tmp_path / "out", routing=WEIGHTS[:3] if model_heads(model) == 3 else [0.2] * 5)
    same_state(model, before)
    layers = adapted_layers(model, "default")
    weights = WEIGHTS if model_heads(model) == 3 else [0.2] * 5
    with fixed_head_weights(model, "default", dict.fromkeys(layers, weights)):
        expected = logits(model)
        generated = model.generate(random_ids(2), max_new_tokens=6, do_sample=False) if name != "bert" else None
    loaded = PeftModel.from_pretrained(load_base(model_folders, name), tmp_path / "out").eval()
    assert error(logits(loaded), expected) <= 1e-5
    if generated is not None:
        assert torch.equal(loaded.generate(random_ids(2), max_new_tokens=6, do_sample=False), generated)
    # Another mixture is another function: the comparison can fail.
    assert error(logits(model), expected) > 1e-3
    assert (report.rank, report.layers, report.exact, report.merged) == (rank, len(layers), False, False)
    assert 0 < report.max_logit_error <= 1e-5
    assert (report.kl, report.accuracy_export) == (None, None)


def model_heads(model):
    return model.peft_config["default"].num_heads


@pytest.mark.parametrize("option", ["uniform", "task", "one_head", "hydra_uniform"])
def test_exact_routers(model_folders, tmp_path, tokenizer, option):
    kwargs = {
        "uniform": {"router": "uniform"},
        "task": {"router": "task", "tasks": TASKS, "router_init": "kaiming_uniform"},
        "one_head": {"num_heads": 1, "router": "softmax"},
        "hydra_uniform": {"router": "uniform", "share_a": False, "init_weights": "zero_b"},
    }[option]
    if option == "one_head":
        with pytest.warns(UserWarning, match="get no gradient"):
            model = adapted(model_folders, **kwargs)
    else:
        model = adapted(model_folders, **kwargs)
    report = export_lora(model, tmp_path / "out", task="same", data=DATA, tokenizer=tokenizer)
    if option == "task":
        model.base_model.set_task("same")
    loaded = PeftModel.from_pretrained(load_base(model_folders, "llama"), tmp_path / "out").eval()
    expected = logits(model)
    assert error(logits(loaded), expected) <= 1e-5
    assert report.exact
    assert abs(report.kl) <= 1e-9
    assert report.accuracy_dynamic == report.accuracy_export
    with model.disable_adapter():
        assert error(logits(model), expected) > 1e-3
    if option == "task":
        model.base_model.set_task("first")
        assert error(logits(model), expected) > 1e-3
    card = (tmp_path / "out" / "README.md").read_text()
    assert "the same function" in card and "anew for each token" not in card


@pytest.mark.parametrize("router", ["softmax", "top_k"])
def test_measured_mixture_of_a_task(model_folders, tmp_path, tokenizer, router):
    kwargs = {"router_top_k": 2, "router_init": "kaiming_uniform"} if router == "top_k" else {}
    model = adapted(model_folders, router=router, scale=2.0, **kwargs)
    before = state_of(model)
    report = export_lora(model, tmp_path / "out", task="same", data=DATA, tokenizer=tokenizer)
    same_state(model, before)
    mixtures = measure_head_weights(model, tokenizer, {"same": DATA["same"]})
    with fixed_head_weights(model, "default", mixtures.for_task("same")):
        expected = logits(model)
    loaded = PeftModel.from_pretrained(load_base(model_folders, "llama"), tmp_path / "out").eval()
    assert error(logits(loaded), expected) <= 1e-5
    assert not report.exact and report.kl > 1e-4
    # What is reported is what the loaded export gives, computed here row by row.
    total, count = 0.0, 0
    for row in DATA["same"]:
        start = len(tokenizer(row["prompt"])["input_ids"])
        ids = torch.tensor([tokenizer(row["prompt"] + row["completion"])["input_ids"]])
        p, q = (logits(m, ids)[0, start - 1 :].double().log_softmax(-1) for m in (model, loaded))
        total += float((p.exp() * (p - q)).sum())
        count += len(p)
    assert report.kl == pytest.approx(total / count, rel=1e-3)
    assert report.rows == 8
    # Given as `HeadWeights`, and for all tasks.
    again = export_lora(model, tmp_path / "again", task="same", routing=mixtures)
    assert "mean over the tokens of the task" in again.mixture
    pair = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("out", "again")]
    assert all(torch.equal(tensor, pair[1][name]) for name, tensor in pair[0].items())
    both = export_lora(model, tmp_path / "both", data=DATA, tokenizer=tokenizer)
    assert "plain mean over `first`, `same`" in both.mixture
    assert both.rows == 16


def test_recorded_mixture(model_folders, tmp_path, tokenizer):
    """The mixtures recorded with an adapter are found beside it, and the adapter is loaded from its folder."""
    model = adapted(model_folders, scale=2.0)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"no mean weights are known for task 'same' \(none\).*`routing=measure"):
        export_lora(str(tmp_path / "adapter"), tmp_path / "out", task="same")
    mixtures = measure_head_weights(model, tokenizer, DATA)
    AdapterRecord(mixtures=mixtures).save(tmp_path / "adapter")
    report = export_lora(tmp_path / "adapter", tmp_path / "out", task="same")
    assert "recorded with the adapter" in report.mixture
    with fixed_head_weights(model, "default", mixtures.for_task("same")):
        expected = logits(model)
    loaded = PeftModel.from_pretrained(load_base(model_folders, "llama"), tmp_path / "out").eval()
    assert error(logits(loaded), expected) <= 1e-5
    with pytest.raises(ValueError, match="'colour' .*recorded with it are mixtures of 'first', 'same'"):
        export_lora(tmp_path / "adapter", tmp_path / "other", task="colour")
    # Measured on a model of other layers.
    other = adapted(model_folders, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="all 2 layers of the adapter.*like 'model.layers.0.self_attn.q_proj'"):
        export_lora(other, tmp_path / "other", task="same", routing=mixtures)
    assert not (tmp_path / "other").exists()


WITHOUT_PACKAGE = """
import sys
sys.modules["rlora_trl"] = None
import torch
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]).eval()
try:
    import rlora_trl
except ImportError:
    with torch.no_grad():
        torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
"""


def test_loads_where_this_package_is_missing(model_folders, tmp_path):
    model = adapted(model_folders, router="uniform", modules_to_save=["lm_head"])
    export_lora(model, tmp_path / "out")
    torch.save(random_ids(), tmp_path / "ids")
    arguments = [str(tmp_path / name) for name in ("out", "ids", "logits")]
    done = subprocess.run([sys.executable, "-c", WITHOUT_PACKAGE, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert error(torch.load(tmp_path / "logits"), logits(model)) <= 1e-5


OTHERS = {
    "modules": ("llama", {"modules_to_save": ["lm_head"]}, "`modules_to_save`"),
    "own_biases": ("gpt2", {"bias": "rlora_only"}, "trained biases"),
    "all_biases": ("gpt2", {"bias": "all"}, "trained biases"),
    "tokens": ("llama", {"trainable_token_indices": [7, 9]}, "rows of embeddings"),
}


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("option", OTHERS)
def test_what_is_trained_besides(model_folders, tmp_path, option, merge):
    name, kwargs, words = OTHERS[option]
    model = adapted(model_folders, name, router="uniform", **kwargs)
    before = state_of(model)
    report = export_lora(model, tmp_path / "out", merge=merge)
    same_state(model, before)
    ids = torch.cat([random_ids(), torch.tensor([[7, 9, 7]] * 3)], dim=1)
    if merge:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        assert report.warnings == ()
    else:
        loaded = PeftModel.from_pretrained(load_base(model_folders, name), tmp_path / "out").eval()
        assert words in report.warnings[0] and "vLLM" in report.warnings[0]
        assert words in (tmp_path / "out" / "README.md").read_text()
    assert error(logits(loaded, ids), logits(model, ids)) <= 1e-5


def test_only_the_chosen_adapter(model_folders, tmp_path):
    model = adapted(model_folders, router="uniform")
    expected = logits(model)
    model.add_adapter("other", RLoraConfig(task_type="CAUSAL_LM", router="uniform", modules_to_save=["lm_head"]))
    model.set_adapter("other")
    perturb(model, 1.0, seed=3)
    other = logits(model)
    model.train()
    before = state_of(model)
    export_lora(model, tmp_path / "out")
    export_lora(model, tmp_path / "other", adapter_name="other")
    export_lora(model, tmp_path / "active", adapter_name=None)
    same_state(model, before)
    assert model.active_adapters == ["other"]
    for folder, logit in (("out", expected), ("other", other), ("active", other)):
        loaded = PeftModel.from_pretrained(load_base(model_folders, "llama"), tmp_path / folder).eval()
        assert error(logits(loaded), logit) <= 1e-5
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert not any("lm_head" in name for name in names)


def test_adapter_loaded_by_transformers(model_folders, tmp_path):
    model = adapted(model_folders, router="uniform")
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    plain = load_base(model_folders, "llama")
    plain.load_adapter(str(tmp_path / "adapter"))
    before = state_of(plain)
    for merge in (False, True):
        export_lora(plain, tmp_path / "out", merge=merge)
        same_state(plain, dict(before))
        base = load_base(model_folders, "llama")
        loaded = (
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")
            if merge
            else PeftModel.from_pretrained(base, tmp_path / "out")
        )
        assert error(logits(loaded.eval()), expected) <= 1e-5


def test_model_that_trains_with_checkpointing(model_folders, tmp_path):
    model = adapted(model_folders, router="uniform")
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    before = state_of(model)
    export_lora(model, tmp_path / "out")
    same_state(model, before)
    model(random_ids(), labels=random_ids()).loss.backward()
    assert next(layer for layer in adapted_layers(model, "default").values()).rlora_adapters["default"].B.grad.any()


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


def test_untrained_adapter_is_exported_as_nothing(model_folders, tmp_path):
    model = get_peft_model(load_base(model_folders, "llama"), RLoraConfig(task_type="CAUSAL_LM"))
    report = export_lora(model, tmp_path / "out", routing=[1 / 3] * 3)
    loaded = PeftModel.from_pretrained(load_base(model_folders, "llama"), tmp_path / "out").eval()
    assert error(logits(loaded), logits(load_base(model_folders, "llama"))) <= 1e-5
    assert report.max_logit_error <= 1e-5


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


def load_for(model_folders, kind):
    if kind == "4bit":
        pytest.importorskip("bitsandbytes")
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        return load_base(model_folders, "llama64", torch.bfloat16, quantization_config=quantization)
    return load_base(model_folders, "llama64", torch.bfloat16 if kind == "bf16" else torch.float32)


def corrupted(kind):
    """`lora_tensors` with a mistake in it."""
    real = export_module.lora_tensors

    def wrong(layers, adapter_name, mixtures):
        if kind == "head weight":
            first = next(iter(layers))
            mixtures = {**mixtures, first: torch.tensor([0.25, 0.65, 0.1])}
        tensors = real(layers, adapter_name, mixtures)
        names = list(tensors)
        if kind == "scaling":
            tensors = {name: tensor * 1.05 if "lora_B" in name else tensor for name, tensor in tensors.items()}
        elif kind == "swapped layers":
            one, two = names[1], next(name for name in names[2:] if tensors[name].shape == tensors[names[1]].shape)
            tensors[one], tensors[two] = tensors[two], tensors[one]
        elif kind == "missing layer":
            del tensors[names[0]], tensors[names[1]]
        elif kind == "nan":
            tensors[names[0]][0, 0] = float("nan")
        return tensors

    return wrong


@pytest.mark.parametrize("base", ["fp32", "bf16", "4bit"])
@pytest.mark.parametrize("mistake", ["scaling", "head weight", "swapped layers", "missing layer", "nan"])
def test_wrong_exports_are_refused(model_folders, tmp_path, monkeypatch, base, mistake):
    model = get_peft_model(load_for(model_folders, base), RLoraConfig(task_type="CAUSAL_LM")).eval()
    # About as far from the initial values as a short training goes.
    perturb(model, 0.05)
    before = state_of(model)
    monkeypatch.setattr(export_module, "lora_tensors", corrupted(mistake))
    with pytest.raises(ValueError, match="The export does not do what the adapter does"):
        export_lora(model, tmp_path / "out", routing=WEIGHTS)
    same_state(model, before)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    export_lora(model, tmp_path / "out", routing=WEIGHTS)


def test_wrong_modules_to_save_are_refused(model_folders, tmp_path, monkeypatch):
    """What the comparison of deltas can't see, that of logits does."""
    model = adapted(model_folders, router="uniform", modules_to_save=["lm_head"])
    real = export_module.other_tensors
    wrong = lambda *args: {name: tensor * 1.01 for name, tensor in real(*args).items()}  # noqa: E731
    monkeypatch.setattr(export_module, "other_tensors", wrong)
    with pytest.raises(ValueError, match="logits differ by"):
        export_lora(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["fp32", "bf16", "gpt2", "tied"])
def test_merge(model_folders, tmp_path, tokenizer, kind):
    if kind == "tied":
        torch.manual_seed(1)
        options = {**TINY_MODELS["llama"]().config.to_dict(), "tie_word_embeddings": True}
        base = LlamaForCausalLM(LlamaConfig(**options)).eval()
        model = get_peft_model(base, RLoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head", "up_proj"]))
        perturb(model, 1.0)
        model.eval()
    else:
        dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        model = adapted(model_folders, "gpt2" if kind == "gpt2" else "llama", dtype)
    before = state_of(model)
    report = export_lora(model, tmp_path / "out", routing=WEIGHTS, tokenizer=tokenizer, merge=True)
    same_state(model, before)
    with fixed_head_weights(model, "default", dict.fromkeys(adapted_layers(model, "default"), WEIGHTS)):
        expected = logits(model)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert report.merged and merged.dtype == (torch.bfloat16 if kind == "bf16" else torch.float32)
    # Rounded to 16 bits once, where the adapter's sum is not rounded at all.
    assert error(logits(merged), expected) <= (0.05 if kind == "bf16" else 1e-5)
    assert not merged.config.to_dict().get("peft_config")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    if kind == "tied":
        assert merged.lm_head.weight is not merged.model.embed_tokens.weight
        assert "two in the merged model" in report.warnings[0]
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model_relation == "finetune" and "AutoModelForCausalLM" in card.text


# Dtype of the base, whether the adapter has it too, how far training went, fields of the configuration.
SIZES = {
    "hardly_trained": (torch.float32, False, 1e-4, {}),
    "untrained": (torch.float32, False, 0.0, {}),
    "untrained_bf16": (torch.bfloat16, False, 0.0, {}),
    "own_a": (torch.float32, False, 1e-4, {"share_a": False}),
    "uniform": (torch.float32, False, 1e-4, {"router": "uniform"}),
    "many_heads": (torch.float32, False, 1e-4, {"num_heads": 10, "r": 16}),
    "large_terms": (torch.float32, False, 1e-2, {"init_gamma": 1, "lora_alpha": 256}),
    "large_terms_bf16": (torch.bfloat16, False, 1e-2, {"init_gamma": 1}),
    "adapter_in_bf16": (torch.bfloat16, True, 1e-2, {}),
    "adapter_in_fp16": (torch.float16, True, 1e-4, {"init_weights": "zero_b"}),
    "float64": (torch.float64, True, 1e-4, {"router": "uniform"}),
    "far_away": (torch.float32, False, 30.0, {}),
}


def sized(option, weights=None):
    dtype, same_dtype, scale, kwargs = SIZES[option]
    torch.manual_seed(1)
    base = TINY_MODELS["llama"]().to(dtype).eval()
    config = RLoraConfig(task_type="CAUSAL_LM", **kwargs)
    model = get_peft_model(base, config, autocast_adapter_dtype=not same_dtype).eval()
    perturb(model, scale)
    heads = config.num_heads
    return model, None if config.router == "uniform" else weights or [1 / heads] * heads


def true_delta(layer, weights):
    """The delta under fixed weights as a matrix, by the reference in float64."""
    adapter = layer.rlora_adapters["default"]
    A, B, A0, B0 = (
        None if tensor is None else tensor.detach().double()
        for tensor in (adapter.A, adapter.B, adapter.A0, adapter.B0)
    )
    units = torch.eye(adapter.in_features, dtype=torch.float64)
    logits = torch.tensor(weights, dtype=torch.float64).log().expand(adapter.in_features, -1)
    return multihead_delta_reference(units, A, B, None, A0, B0, scaling=adapter.scaling, logits=logits).T


@pytest.mark.parametrize("option", SIZES)
def test_rounding_is_no_mistake_whatever_the_sizes(tmp_path, option):
    """A delta is a small difference of large terms, and is rounded as they are."""
    model, routing = sized(option)
    weights = routing or [1 / 3] * 3
    export_lora(model, tmp_path / "lora", routing=routing)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    export_lora(model, tmp_path / "merged", routing=routing, merge=True)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, layer in adapted_layers(model, "default").items():
        delta, base = true_delta(layer, weights), layer.get_base_weight().double()
        down, up = (tensors[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        # In single precision, relative to what the export itself sums; the rest is that of the reference.
        slack = 1e-14 * delta.abs().max() + 1e-12
        assert bool(((up @ down - delta).abs() <= 2.4e-7 * (up.abs() @ down.abs()) + slack).all())
        weight, expected = merged[f"{name}.weight"].double(), base + delta
        eps = max(torch.finfo(merged[f"{name}.weight"].dtype).eps, 1.2e-7)
        assert bool(((weight - expected).abs() <= eps * (expected.abs() + delta.abs()) + 6e-8 * (eps > 1e-4)).all())


@pytest.mark.parametrize("option", SIZES)
def test_small_mistakes_are_no_rounding(tmp_path, monkeypatch, option):
    from rlora_trl.export import merge

    heads = SIZES[option][-1].get("num_heads", 3)
    model, routing = sized(option, [0.0, *[0.5**i for i in range(1, heads - 1)], 0.5 ** (heads - 2)])
    real = export_module.lora_tensors
    wrong = lambda *args: {k: t * 1.001 if "lora_B" in k else t for k, t in real(*args).items()}  # noqa: E731
    monkeypatch.setattr(export_module, "lora_tensors", wrong)
    with pytest.raises(ValueError, match="The export does not do what the adapter does: in model.layers.0.mlp"):
        export_lora(model, tmp_path / "lora", routing=routing)
    factors = merge.lora_factors
    monkeypatch.setattr(merge, "lora_factors", lambda *args: (factors(*args)[0], 2 * factors(*args)[1]))
    with pytest.raises(ValueError, match=r"The merged weight of .* differs by .*, where rounding explains"):
        export_lora(model, tmp_path / "merged", routing=routing, merge=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("base", ["bf16", "4bit"])
def test_logits_alone_refuse_a_wrong_export_of_large_weights(
    model_folders, tmp_path, monkeypatch, caplog, base, merge
):
    """Rounding of large weights explains any difference, and a quantized base has none that is known."""
    from rlora_trl.export import merge as merging
    from rlora_trl.export import verify

    torch.manual_seed(0)
    model = get_peft_model(load_for(model_folders, base), RLoraConfig(task_type="CAUSAL_LM")).eval()
    perturb(model, 30.0)
    with torch.no_grad():
        for layer in adapted_layers(model, "default").values():
            for B in (layer.rlora_adapters["default"].B, layer.rlora_adapters["default"].B0):
                B += 20.0  # which the anchor takes off again
    monkeypatch.setattr(verify, "_check_deltas", lambda *args: None)
    monkeypatch.setattr(merging, "_check_weight", lambda *args: None)

    def wrong(B):
        return B[torch.randperm(len(B), generator=torch.Generator().manual_seed(0))]

    tensors, factors = export_module.lora_tensors, merging.lora_factors
    monkeypatch.setattr(
        export_module,
        "lora_tensors",
        lambda *args: {name: wrong(t) if "lora_B" in name else t for name, t in tensors(*args).items()},
    )
    monkeypatch.setattr(merging, "lora_factors", lambda *args: (factors(*args)[0], wrong(factors(*args)[1])))
    caplog.set_level("WARNING")
    with pytest.raises(ValueError, match="logits differ by .*, and at most 0.5 is accepted"):
        export_lora(model, tmp_path / "out", routing=WEIGHTS, merge=merge)
    assert list(tmp_path.iterdir()) == []
    if not (merge and base == "4bit"):
        assert "at most 0.5 is accepted. Load the base in a wider dtype" in caplog.text


def test_an_adapter_without_finite_logits(model_folders, tmp_path):
    model = adapted(model_folders, dtype=torch.float16)
    with torch.no_grad():
        model.get_submodule("base_model.model.lm_head").weight.mul_(60000.0)
    for merge in (False, True):
        with pytest.raises(ValueError, match="gives logits that are not finite on a base in torch.float16. Load the"):
            export_lora(model, tmp_path / "out", routing=WEIGHTS, merge=merge)
    assert list(tmp_path.iterdir()) == []


def test_wrong_merge_is_refused(model_folders, tmp_path, monkeypatch):
    from rlora_trl.export import merge

    real = merge.lora_factors
    for dtype in (torch.float32, torch.bfloat16):
        model = adapted(model_folders, dtype=dtype, scale=0.1)
        monkeypatch.setattr(merge, "lora_factors", lambda *args: (real(*args)[0], 1.3 * real(*args)[1]))
        with pytest.raises(ValueError, match="The merged weight of model.layers.0.mlp.gate_proj is not the base's"):
            export_lora(model, tmp_path / "out", routing=WEIGHTS, merge=True)
        assert list(tmp_path.iterdir()) == []


def test_four_bit_base(model_folders, tmp_path, tokenizer):
    model = get_peft_model(load_for(model_folders, "4bit"), RLoraConfig(task_type="CAUSAL_LM")).eval()
    perturb(model, 0.5)
    before = state_of(model)
    report = export_lora(model, tmp_path / "out", task="same", data=DATA, tokenizer=tokenizer)
    merged_report = export_lora(model, tmp_path / "merged", routing=WEIGHTS, merge=True)
    same_state(model, before)
    mixtures = measure_head_weights(model, tokenizer, {"same": DATA["same"]})
    with fixed_head_weights(model, "default", mixtures.for_task("same")):
        expected = logits(model)
    loaded = PeftModel.from_pretrained(load_for(model_folders, "4bit"), tmp_path / "out").eval()
    assert error(logits(loaded), expected) <= 0.03
    assert report.kl > 0 and report.max_logit_error <= 0.03

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.dtype == torch.bfloat16 and not hasattr(merged.config, "quantization_config")
    with fixed_head_weights(model, "default", dict.fromkeys(adapted_layers(model, "default"), WEIGHTS)):
        expected = logits(model)
    # No weight is rounded to 4 bits again, so only activations and 16-bit weights differ.
    assert error(logits(merged), expected) <= 0.05
    assert 0 < merged_report.max_logit_error <= 0.05
    assert "dequantized to torch.bfloat16" in merged_report.warnings[0]
    assert f"{merged_report.max_logit_error:.2g}" in merged_report.warnings[1]


def test_four_bit_weights_survive_inference(model_folders):
    """bitsandbytes reorders them on some CPUs, and its way back is wrong without double quantization."""
    model = get_peft_model(load_for(model_folders, "4bit"), RLoraConfig(task_type="CAUSAL_LM")).eval()
    layers = adapted_layers(model, "default")
    before = {name: layer.get_base_weight().float() for name, layer in layers.items()}
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with kept_quantized(model):
        expected = logits(model)
        model.state_dict()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), expected)
    for name, layer in layers.items():
        # Scales are kept in bfloat16 in between.
        assert (layer.get_base_weight().float() - before[name]).norm() <= 0.005 * before[name].norm()


def test_what_is_refused(model_folders, tmp_path, tokenizer):
    out = tmp_path / "out"
    model = adapted(model_folders)
    cases = [
        ({}, "no mean weights are known"),
        ({"task": "same"}, "no mean weights are known for task 'same'"),
        ({"routing": [0.5, 0.5]}, "must be 3 numbers of at least 0 that sum to 1"),
        ({"routing": [0.9, 0.9, 0.9]}, "sum to 1"),
        ({"routing": [1.5, -0.5, 0.0]}, "at least 0"),
        ({"routing": [float("nan"), 0.5, 0.5]}, "sum to 1"),
        ({"routing": {"model.layers.0.mlp.up_proj": WEIGHTS}}, "missing: model.layers.0.mlp.down_proj"),
        ({"data": DATA}, "`data` needs the model's tokenizer"),
        (
            {"data": DATA, "tokenizer": tokenizer, "task": "colour"},
            "no rows of task 'colour', only of 'first', 'same'",
        ),
        ({"data": {"a": [{"text": "w1"}]}, "tokenizer": tokenizer}, r"`data\['a'\]` need a `prompt`.*got text"),
        ({"data": {"a": []}, "tokenizer": tokenizer}, "no rows"),
        (
            {"adapter_name": "other", "routing": WEIGHTS},
            "`adapter_name='other'` can't be exported.*'other' is unknown",
        ),
        ({"routing": [0.2, 0.3]}, r"sum to 1, got \[0.2, 0.3\]"),
    ]
    for kwargs, message in cases:
        with pytest.raises(ValueError, match=message):
            export_lora(model, out, **kwargs)
    tasks = adapted(model_folders, router="task", tasks=TASKS)
    with pytest.raises(ValueError, match="mixture for each of 'first', 'same'; got `task=None`"):
        export_lora(tasks, out)
    uniform, by_token = (adapted(model_folders, router=router, tasks=TASKS) for router in ("uniform", "softmax"))
    for given in (tasks, uniform, by_token):
        with pytest.raises(ValueError, match="tasks are 'first', 'same'; got `task='colour'`. Set `task` to one"):
            export_lora(given, out, task="colour", routing=WEIGHTS)
        with pytest.raises(ValueError, match="got `task='colour'`"):
            export_lora(given, out, task="colour")
    lora = get_peft_model(load_base(model_folders, "llama"), LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="belongs to another method"):
        export_lora(lora, out)
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="only R-LoRA adapters can be exported"):
        export_lora(str(tmp_path / "lora"), out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora"]


def test_sharded_and_offloaded_models_are_refused(model_folders, tmp_path):
    model = adapted(model_folders)
    weight = model.base_model.model.model.norm.weight
    weight.ds_id = 0
    with pytest.raises(ValueError, match="sharded.*load it in one process"):
        export_lora(model, tmp_path / "out", routing=WEIGHTS)
    del weight.ds_id
    model.base_model.model.model.norm.weight = torch.nn.Parameter(torch.empty(32, device="meta"))
    with pytest.raises(ValueError, match="norm.weight of the model is offloaded"):
        export_lora(model, tmp_path / "out", routing=WEIGHTS)


def test_folder_is_replaced_at_once_or_not_at_all(model_folders, tmp_path):
    model = adapted(model_folders, router="uniform")
    out = tmp_path / "out"
    export_lora(model, out)
    first = load_file(out / "adapter_model.safetensors")
    export_lora(model, out, merge=True)  # in place of an earlier export
    assert not (out / "adapter_config.json").exists() and (out / "config.json").is_file()
    perturb(model)
    export_lora(model, out)
    second = load_file(out / "adapter_model.safetensors")
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "file").write_text("x")
    for place in ("adapter", "file"):
        with pytest.raises(ValueError, match="`output_dir`"):
            export_lora(model, tmp_path / place)
    (tmp_path / "empty").mkdir()
    export_lora(model, tmp_path / "empty")
    export_lora(model, tmp_path / "deep" / "er")
    assert (tmp_path / "deep" / "er" / "README.md").is_file()


def test_card_and_report(model_folders, tmp_path, tokenizer):
    model = adapted(model_folders, scale=2.0)
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = "org/base", "abc"
    report = export_lora(model, tmp_path / "out", task="same", data=DATA, tokenizer=tokenizer)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "peft"
    assert (card.data.base_model, card.data.base_model_relation) == ("org/base", "adapter")
    assert "lora" in card.data.tags
    for text in (
        f"{report.kl:.2g} nats",
        f"{report.accuracy_export:.1%}",
        "vllm serve org/base --enable-lora --lora-modules name=this_folder --max-lora-rank 8",
        "convert_lora_to_gguf.py",
        "`same`",
        "PeftModel.from_pretrained(base",
    ):
        assert text in card.text, text
    saved = LoraConfig.from_pretrained(tmp_path / "out")
    assert (saved.base_model_name_or_path, saved.revision, saved.task_type) == ("org/base", "abc", "CAUSAL_LM")
    values = json.loads(json.dumps(report.to_dict()))
    assert values["rank"] == 8 and values["path"] == str(tmp_path / "out") and values["warnings"] == []
    # Where it will be published, beside its adapter.
    for merge in (False, True):
        place = ("user/x", "exports/same")
        export_lora(model, tmp_path / "out", routing=WEIGHTS, merge=merge, published_as=place)
        text = (tmp_path / "out" / "README.md").read_text()
        assert '"user/x", subfolder="exports/same")' in text and "[user/x](https://huggingface.co/user/x)" in text
        assert not re.search("this.folder|pypi|tmp", text)
        if not merge:
            assert 'hf download user/x --include "exports/same/*" --local-dir adapter\nvllm serve org/base' in text
            assert "--lora-modules same=adapter/exports/same" in text
            assert "--outfile lora.gguf adapter/exports/same" in text
    # A folder is nobody else's business.
    config.base_model_name_or_path = model_folders["llama"]
    export_lora(model, tmp_path / "out", routing=WEIGHTS)
    card = (tmp_path / "out" / "README.md").read_text()
    assert model_folders["llama"] not in card and "not measured" in card


TWICE = """
import sys
import torch
from transformers import AutoModelForCausalLM
from rlora_trl.export import export_lora
place = ("user/x", "exports/same")
for merge in (False, True):
    export_lora(sys.argv[1], f"{sys.argv[2]}/{merge}", task="same", merge=merge, published_as=place)
"""


def test_the_same_bytes_each_time(model_folders, tmp_path):
    """A push of the same adapter finds nothing new, whatever order another process has its sets in."""
    targets = ["gate_proj", "up_proj", "down_proj", "q_proj", "v_proj"]
    model = adapted(model_folders, router="uniform", target_modules=targets, modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path / "adapter")
    found = []
    for seed in ("1", "2"):
        out = tmp_path / seed
        arguments = [sys.executable, "-c", TWICE, str(tmp_path / "adapter"), str(out)]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        found.append({str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()})
    first, second = found
    assert len(first) >= 6 and first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    assert json.loads(first["False/adapter_config.json"])["target_modules"] == sorted(targets)


def test_a_changed_file_does_something_else(model_folders, tmp_path):
    """The matrix above would notice an export of another scaling."""
    model = adapted(model_folders, router="uniform")
    export_lora(model, tmp_path / "out")
    file = tmp_path / "out" / "adapter_model.safetensors"
    save_file({name: 1.01 * tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    loaded = PeftModel.from_pretrained(load_base(model_folders, "llama"), tmp_path / "out").eval()
    assert error(logits(loaded), logits(model)) > 1e-5
    assert VOCAB == load_base(model_folders, "llama").config.vocab_size


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
    with pytest.raises(ValueError, match=r"gate_proj.*DeepseekV3ForCausalLM PEFT.*fused experts.*`merge=True`"):
        export_lora(mixture_of_experts(targets), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_beside_fused_experts_other_layers_are_exported_and_all_are_merged(tmp_path):
    model = mixture_of_experts(["o_proj", "q_b_proj"])
    expected = logits(model)
    export_lora(model, tmp_path / "out")
    with_lora = PeftModel.from_pretrained(model.unload(), tmp_path / "out").eval()
    assert error(logits(with_lora), expected) < 1e-5

    model = mixture_of_experts(["gate_proj", "up_proj", "down_proj"])
    expected = logits(model)
    export_lora(model, tmp_path / "merged", merge=True)
    assert error(logits(DeepseekV3ForCausalLM.from_pretrained(tmp_path / "merged").eval()), expected) < 1e-5


@pytest.mark.parametrize("merge", [False, True])
def test_where_a_model_is_steep_one_rounding_is_not_enough(tmp_path, merge):
    """Merged, this one differs by 0.007 of the largest logit, and a single draw explains 0.002."""
    torch.manual_seed(1)
    sides = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in {"layers": 2, "ffn_dim": 48, "attention_heads": 4}.items()
    }
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 1}
    base = BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCAB, d_model=32, max_position_embeddings=64, forced_eos_token_id=None, **sides, **tokens
        )
    )
    config = RLoraConfig(task_type="SEQ_2_SEQ_LM", target_modules="all-linear", router="uniform", init_weights=False)
    model = get_peft_model(base.eval(), config).eval()
    perturb(model, 0.02, seed=1)
    report = export_lora(model, tmp_path / "out", merge=merge)
    assert 0 < report.max_logit_error < 0.05


def test_the_noise_is_the_largest_of_several_roundings(model_folders, monkeypatch):
    model = adapted(model_folders, router="uniform", init_weights=False)
    layers = adapted_layers(model, "default")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reference, drawn, noises = verify.prompt_logits(model), [], []
    measure = verify.logits_error
    monkeypatch.setattr(verify, "logits_error", lambda *logits: drawn.append(measure(*logits)) or drawn[-1])
    for draws in (1, verify.NOISE_DRAWS):
        monkeypatch.setattr(verify, "NOISE_DRAWS", draws)
        noises.append(verify.rounding_noise(model, "default", layers, reference, torch.float32))
    assert noises == [drawn[0], max(drawn[1:])]
    assert drawn[0] == drawn[1] and len(set(drawn[1:])) == 3
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


_SIDE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
_IMAGES = {**_SIDE, "image_size": 16, "patch_size": 8}


def image_model():
    return ViTForImageClassification(ViTConfig(**_IMAGES, num_labels=3))


def image_and_text_model():
    text = {**_SIDE, "vocab_size": VOCAB, "max_position_embeddings": 40, "eos_token_id": 1}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=_IMAGES, projection_dim=16))


def inputs_of(model):
    pixels = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    return pixels if isinstance(model, ViTForImageClassification) else {"input_ids": random_ids(2), **pixels}


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("make", [image_model, image_and_text_model])
def test_without_prompts_layers_are_compared(tmp_path, make, merge):
    torch.manual_seed(0)
    base = make().eval()
    config = RLoraConfig(target_modules="all-linear", router="uniform", init_weights=False)
    model = get_peft_model(base, config).eval()
    perturb(model, 0.02)
    inputs = inputs_of(base)
    with torch.no_grad():
        expected = model(**inputs)[0]
    report = export_lora(model, tmp_path / "out", merge=merge)
    assert report.max_logit_error is None and "logits were not compared" in report.warnings[-1]
    assert "the weights of each layer agree" in (tmp_path / "out" / "README.md").read_text()
    if merge:
        loaded = type(base).from_pretrained(tmp_path / "out")
    else:
        loaded = PeftModel.from_pretrained(model.unload(), tmp_path / "out")
    with torch.no_grad():
        assert error(loaded.eval()(**inputs)[0], expected) < 1e-4


def test_without_prompts_a_wrong_layer_is_refused(tmp_path, monkeypatch):
    model = get_peft_model(image_model().eval(), RLoraConfig(target_modules="all-linear", router="uniform")).eval()
    perturb(model)
    right = export_module.lora_tensors
    monkeypatch.setattr(export_module, "lora_tensors", lambda *args: {k: 1.01 * v for k, v in right(*args).items()})
    with pytest.raises(ValueError, match="its delta differs by"):
        export_lora(model, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_prompts_end_where_an_encoder_decoder_classifies(tmp_path):
    sizes = {"vocab_size": VOCAB, "d_model": 32, "max_position_embeddings": 64, "num_labels": 3}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 1}
    torch.manual_seed(0)
    base = BartForSequenceClassification(BartConfig(forced_eos_token_id=None, **sizes, **layers, **heads, **tokens))
    model = get_peft_model(base.eval(), RLoraConfig(router="uniform", init_weights=False)).eval()
    report = export_lora(model, tmp_path / "out")
    assert 0 < report.max_logit_error < 1e-4 and not report.warnings
