"""`export_lora`: exact where it can be, refused where it is wrong, and loaded by those who lack this package."""

import json
import os
import subprocess
import sys

import pytest
import torch
from exporting import (
    DATA,
    MATRIX,
    TASKS,
    WEIGHTS,
    adapted,
    error,
    load_base,
    load_for,
    logits,
    same_state,
    state_of,
    with_export,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from testing_utils import VOCAB, perturb, random_ids
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    ViTConfig,
    ViTForImageClassification,
)

from rlora_trl import RLoraConfig
from rlora_trl.analysis.measuring import measure_head_weights
from rlora_trl.export import export_lora
from rlora_trl.tuner.bnb_cpu import kept_quantized
from rlora_trl.tuner.selection import adapted_layers, fixed_head_weights


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
    # Other head weights are another function: the comparison can fail.
    assert error(logits(model), expected) > 1e-3
    assert (report.rank, report.layers, report.exact, report.merged) == (rank, len(layers), False, False)
    assert (report.kl, report.accuracy_export) == (None, None)


def model_heads(model):
    return model.peft_config["default"].num_heads


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


def test_untrained_adapter_is_exported_as_nothing(model_folders, tmp_path):
    model = get_peft_model(load_base(model_folders, "llama"), RLoraConfig(task_type="CAUSAL_LM"))
    export_lora(model, tmp_path / "out", routing=[1 / 3] * 3)
    loaded = PeftModel.from_pretrained(load_base(model_folders, "llama"), tmp_path / "out").eval()
    assert error(logits(loaded), logits(load_base(model_folders, "llama"))) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_base(model_folders, tmp_path, dtype):
    model = adapted(model_folders, dtype=dtype, scale=0.5)
    export_lora(model, tmp_path / "out", routing=WEIGHTS)
    layers = adapted_layers(model, "default")
    with fixed_head_weights(model, "default", dict.fromkeys(layers, WEIGHTS)):
        expected = logits(model)
    loaded = PeftModel.from_pretrained(load_base(model_folders, "llama", dtype), tmp_path / "out").eval()
    # Sums in another order, rounded to 16 bits.
    assert error(logits(loaded), expected) <= 0.03
    with fixed_head_weights(model, "default", dict.fromkeys(layers, WEIGHTS[::-1])):
        assert error(logits(model), expected) > 0.1


def test_four_bit_base(model_folders, tmp_path, tokenizer):
    model = get_peft_model(load_for(model_folders, "4bit"), RLoraConfig(task_type="CAUSAL_LM")).eval()
    perturb(model, 0.5)
    before = state_of(model)
    report = export_lora(model, tmp_path / "out", task="same", data=DATA, tokenizer=tokenizer)
    same_state(model, before)
    measured = measure_head_weights(model, tokenizer, {"same": DATA["same"]})
    with fixed_head_weights(model, "default", measured.for_task("same")):
        expected = logits(model)
    loaded = PeftModel.from_pretrained(load_for(model_folders, "4bit"), tmp_path / "out").eval()
    assert error(logits(loaded), expected) <= 0.03
    assert report.kl > 0


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
        # Scales are stored in bfloat16 in between.
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
    with pytest.raises(ValueError, match="head weights for each of 'first', 'same'; got `task=None`"):
        export_lora(tasks, out)
    uniform, by_token = (adapted(model_folders, router=router, tasks=TASKS) for router in ("uniform", "softmax"))
    for model in (tasks, uniform, by_token):
        with pytest.raises(ValueError, match="tasks are 'first', 'same'; got `task='colour'`. Set `task` to one"):
            export_lora(model, out, task="colour", routing=WEIGHTS)
        with pytest.raises(ValueError, match="got `task='colour'`"):
            export_lora(model, out, task="colour")
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
    written = []
    for seed in ("1", "2"):
        out = tmp_path / seed
        arguments = [sys.executable, "-c", TWICE, str(tmp_path / "adapter"), str(out)]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        written.append({str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()})
    first, second = written
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


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("make", [BartForConditionalGeneration, BartForSequenceClassification])
def test_encoder_decoder(tmp_path, make, merge):
    torch.manual_seed(1)
    sides = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in {"layers": 2, "ffn_dim": 48, "attention_heads": 4}.items()
    }
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 1}
    sizes = {"vocab_size": VOCAB, "d_model": 32, "max_position_embeddings": 64, "num_labels": 3}
    base = make(BartConfig(forced_eos_token_id=None, **sizes, **sides, **tokens)).eval()
    config = RLoraConfig(target_modules="all-linear", router="uniform", init_weights=False)
    model = get_peft_model(base, config).eval()
    perturb(model, 0.02, seed=1)
    ids = random_ids()
    ids[:, -1] = 1  # from which BART classifies
    expected = logits(model, ids)
    with model.disable_adapter():
        assert error(logits(model, ids), expected) > 1e-3

    export_lora(model, tmp_path / "out", merge=merge)
    loaded = make.from_pretrained(tmp_path / "out") if merge else with_export(model, tmp_path / "out")
    assert error(logits(loaded.eval(), ids), expected) <= 1e-4


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
def test_models_of_images(tmp_path, make, merge):
    torch.manual_seed(0)
    base = make().eval()
    config = RLoraConfig(target_modules="all-linear", router="uniform", init_weights=False)
    model = get_peft_model(base, config).eval()
    perturb(model, 0.02)
    inputs = inputs_of(base)
    with torch.no_grad():
        expected = model(**inputs)[0]
    export_lora(model, tmp_path / "out", merge=merge)
    loaded = type(base).from_pretrained(tmp_path / "out") if merge else with_export(model, tmp_path / "out")
    with torch.no_grad():
        assert error(loaded.eval()(**inputs)[0], expected) < 1e-4
