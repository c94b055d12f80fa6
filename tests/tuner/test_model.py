"""The matrix: tiny models and options, through every behavior that PEFT promises of a method."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from testing_utils import CAUSAL, TASK_TYPES, perturb, random_ids
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlora_trl import MultiHeadAdapter, RLoraConfig
from rlora_trl.tuner import RLoraLinear


def _fields(preset):
    """What a preset sets."""
    return {name: value for name, value in vars(preset).items() if value != getattr(RLoraConfig(), name)}


MODELS = tuple(TASK_TYPES)
OPTIONS = {
    "default": {},
    "one_head": {"num_heads": 1},
    "eight_heads_odd_rank": {"num_heads": 8, "r": 3},
    "uniform": {"router": "uniform"},
    "zero_a": {"init_weights": "zero_a"},
    "hydra": {"init_weights": "zero_b", "router_init": "kaiming_uniform", "dropout_position": "input"},
    "all_linear": {"target_modules": "all-linear"},
    "alpha_over_r": {"use_rslora": False},
    "own_a": {"share_a": False},
    "own_a_uniform": {"share_a": False, "router": "uniform"},
    "task": {"router": "task", "tasks": ["first", "colour"]},
    "multi_lora": dict(_fields(RLoraConfig.multi_lora())),
    "moe_lora": dict(_fields(RLoraConfig.moe_lora())),
    "mtl_lora": dict(_fields(RLoraConfig.mtl_lora()), tasks=["first", "colour"]),
}
MATRIX = [(model, "default") for model in MODELS] + [("llama", option) for option in OPTIONS if option != "default"]
MATRIX += [("gpt2", "uniform"), ("gpt2", "all_linear")]


def load_base(model_folders, name, dtype=torch.float32):
    auto = AutoModelForSequenceClassification if name == "bert" else AutoModelForCausalLM
    return auto.from_pretrained(model_folders[name], dtype=dtype).eval()


def adapted(model_folders, name, dtype=torch.float32, adapter_name="default", **kwargs):
    config = RLoraConfig(task_type=TASK_TYPES[name], **kwargs)
    return get_peft_model(load_base(model_folders, name, dtype), config, adapter_name=adapter_name).eval()


def logits(model, ids=None, **kwargs):
    with torch.no_grad():
        return model(random_ids() if ids is None else ids, **kwargs).logits


@pytest.mark.parametrize(("name", "option"), MATRIX)
def test_step_zero_is_the_base_model(model_folders, name, option):
    kwargs = OPTIONS[option]
    model = adapted(model_folders, name, **kwargs)
    base = logits(load_base(model_folders, name))
    assert (logits(model) - base).abs().max() <= 1e-5 * base.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_step_zero_is_the_base_model_in_bf16(model_folders, name):
    base = logits(load_base(model_folders, name, torch.bfloat16))
    assert torch.equal(logits(adapted(model_folders, name, torch.bfloat16)), base)


def test_kaiming_router_is_only_close_to_the_base_model(model_folders):
    model = adapted(model_folders, "llama", router_init="kaiming_uniform")
    base = logits(load_base(model_folders, "llama"))
    assert 0 < (logits(model) - base).abs().max() < 0.5 * base.abs().max()


@pytest.mark.parametrize(("name", "option"), MATRIX)
def test_training_changes_the_adapter_and_nothing_else(model_folders, name, option):
    model = adapted(model_folders, name, **OPTIONS[option]).train()
    before = {key: value.clone() for key, value in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    ids = random_ids()
    labels = torch.tensor([0, 1, 2]) if name == "bert" else ids
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    for key, value in model.named_parameters():
        trains = "rlora_adapters" in key and key.rsplit(".", 1)[-1] not in ("A0", "B0")
        if "classifier" in key and "modules_to_save" in key:
            trains = True
        assert value.requires_grad == trains, key
        if trains and not key.endswith("router"):
            # Not by weight decay alone.
            assert value.grad.abs().sum() > 0, key
        single_router = OPTIONS[option].get("num_heads") == 1 and key.endswith("router")
        if not single_router:
            assert torch.equal(value, before[key]) != trains, key


@pytest.mark.parametrize(("name", "option"), MATRIX)
def test_disable_adapter_is_the_base_model(model_folders, name, option):
    model = adapted(model_folders, name, **OPTIONS[option])
    perturb(model)
    base = logits(load_base(model_folders, name))
    changed = logits(model)
    assert not torch.allclose(changed, base, atol=1e-4)
    if name != "bert":  # the classification head trains beside the adapter
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
        unloaded = model.unload()
        assert torch.equal(logits(unloaded), base)
        assert not any(isinstance(module, RLoraLinear) for module in unloaded.modules())


@pytest.mark.parametrize("name", CAUSAL)
def test_disable_adapter_in_bf16_is_bit_equal(model_folders, name):
    model = adapted(model_folders, name, torch.bfloat16)
    perturb(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(load_base(model_folders, name, torch.bfloat16)))
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("name", "option"), MATRIX)
def test_save_and_load(model_folders, tmp_path, name, option):
    model = adapted(model_folders, name, **OPTIONS[option])
    perturb(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert not list(tmp_path.glob("*.bin"))
    loaded = PeftModel.from_pretrained(load_base(model_folders, name), tmp_path).eval()
    assert torch.equal(logits(loaded), expected)
    assert not any(p.requires_grad for p in loaded.parameters() if p.dtype == torch.float32 and p.ndim == 3)


@pytest.mark.parametrize("name", CAUSAL)
def test_four_ways_to_load(model_folders, tmp_path, name):
    model = adapted(model_folders, name)
    perturb(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)

    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), expected)
    transformers_model = load_base(model_folders, name)
    transformers_model.load_adapter(str(tmp_path))
    assert torch.equal(logits(transformers_model), expected)
    base = load_base(model_folders, name)
    other = PeftModel.from_pretrained(base, tmp_path, adapter_name="first").eval()
    other.load_adapter(tmp_path, "second")
    other.set_adapter("second")
    assert torch.equal(logits(other), expected)
    lean = PeftModel.from_pretrained(load_base(model_folders, name), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(logits(lean), expected)
    # A trained adapter that is rounded to the base's dtype keeps its own anchor.
    for lean_loading in (True, False):
        rounded = PeftModel.from_pretrained(
            load_base(model_folders, name, torch.bfloat16),
            tmp_path,
            autocast_adapter_dtype=False,
            low_cpu_mem_usage=lean_loading,
        ).eval()
        in_float32 = PeftModel.from_pretrained(load_base(model_folders, name, torch.bfloat16), tmp_path).eval()
        with rounded.disable_adapter():
            change = (logits(in_float32) - logits(rounded)).float().norm()
        assert (logits(rounded) - logits(in_float32)).float().norm() < 0.1 * change


def test_save_in_one_process_and_load_in_another(model_folders, tmp_path):
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1])\n"
        "from testing_utils import perturb, random_ids\n"
        "from transformers import AutoModelForCausalLM\n"
        "from peft import get_peft_model\n"
        "from rlora_trl import RLoraConfig\n"
        "base = AutoModelForCausalLM.from_pretrained(sys.argv[2])\n"
        "model = get_peft_model(base, RLoraConfig(task_type='CAUSAL_LM'))\n"
        "perturb(model); model.eval(); model.save_pretrained(sys.argv[3])\n"
        "with torch.no_grad(): torch.save(model(random_ids()).logits, sys.argv[3] + '/logits.pt')\n"
    )
    arguments = [str(Path(__file__).parents[1]), model_folders["llama"], str(tmp_path)]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)
    expected = torch.load(tmp_path / "logits.pt")
    torch.manual_seed(99)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()), expected)


def test_adapter_in_half_precision_starts_at_the_base_model(model_folders):
    """`autocast_adapter_dtype=False`: adapters in the base's dtype, with the anchor taken from the rounded heads."""
    config = RLoraConfig(task_type="CAUSAL_LM")
    base = load_base(model_folders, "llama", torch.bfloat16)
    expected = logits(base)
    model = get_peft_model(base, config, autocast_adapter_dtype=False).eval()
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert torch.equal(logits(model), expected)


def test_two_adapters_do_not_disturb_each_other(model_folders, tmp_path):
    model = adapted(model_folders, "llama")
    perturb(model)
    first = logits(model)
    model.add_adapter("other", RLoraConfig(task_type="CAUSAL_LM", r=2, num_heads=5, target_modules=["down_proj"]))
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    trained = [key for key, value in model.named_parameters() if value.requires_grad]
    assert trained and all(".other." in key and "down_proj" in key for key in trained)
    assert not any(key.endswith((".A0", ".B0")) for key in trained)
    perturb(model, seed=1)
    second = logits(model)
    assert not torch.allclose(first, second)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load_base(model_folders, "llama"), tmp_path).eval()
    loaded.load_adapter(tmp_path / "other", "other")
    assert torch.equal(logits(loaded), first)
    loaded.set_adapter("other")
    assert torch.equal(logits(loaded), second)
    loaded.base_model.set_adapter(["default", "other"])
    assert not torch.allclose(logits(loaded), first)
    loaded.set_adapter("default")
    loaded.delete_adapter("other")
    assert torch.equal(logits(loaded), first)
    assert not any(".other." in key for key in loaded.state_dict())


def test_mixed_batches(model_folders):
    model = adapted(model_folders, "llama")
    perturb(model)
    model.add_adapter("other", RLoraConfig(task_type="CAUSAL_LM", num_heads=2))
    model.set_adapter("other")
    perturb(model, seed=1)
    model.eval()
    ids = random_ids(4)
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = logits(model, ids)
    with model.disable_adapter():
        expected["__base__"] = logits(model, ids)
    names = ["other", "__base__", "default", "other"]
    mixed = logits(model, ids, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], expected[name][row], rtol=1e-5, atol=1e-5)
    # Generation passes the names on, with and without beams.
    for beams in (1, 2):
        generated = model.generate(
            input_ids=ids, adapter_names=names, max_new_tokens=2, num_beams=beams, do_sample=False
        )
        assert generated.shape[0] == 4
    with pytest.raises(ValueError, match="unknown adapters: third"):
        model(ids, adapter_names=["third"] * 4)
    with pytest.raises(ValueError, match="4 rows of the batch, got 2"):
        model(ids, adapter_names=["other"] * 2)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        model(ids, adapter_names=names)


def test_a_row_does_not_depend_on_its_batch(model_folders):
    model = adapted(model_folders, "llama")
    perturb(model)
    ids = random_ids(4)
    together = logits(model, ids)
    for row in range(4):
        torch.testing.assert_close(logits(model, ids[row : row + 1])[0], together[row], rtol=1e-5, atol=1e-5)


def test_state_dict_keys_do_not_depend_on_the_adapter_name(model_folders):
    keys = {
        name: set(get_peft_model_state_dict(adapted(model_folders, "llama", adapter_name=name), adapter_name=name))
        for name in ("default", "A_b", "lora_A", "model")
    }
    assert len({frozenset(value) for value in keys.values()}) == 1
    prefix = "base_model.model.model.layers.0.mlp.down_proj.rlora_adapters."
    assert {key.removeprefix(prefix) for key in keys["default"] if key.startswith(prefix)} == {
        "A",
        "B",
        "router",
        "A0",
        "B0",
    }
    # Filters in other libraries look for this.
    assert all("lora_" in key for key in keys["default"])


@pytest.mark.parametrize("name", [*MultiHeadAdapter.tensor_names, "sst.2"])
def test_adapter_names_that_can_not_be_told_apart_are_refused(model_folders, name):
    with pytest.raises(ValueError, match="can't be named"):
        adapted(model_folders, "llama", adapter_name=name)


def test_patterns_and_layer_selection(model_folders):
    model = adapted(
        model_folders,
        "llama",
        target_modules=["gate_proj", "up_proj", "down_proj"],
        exclude_modules=["up_proj"],
        layers_to_transform=[1],
        rank_pattern={"down_proj": 2},
        alpha_pattern={"gate_proj": 8},
    )
    adapters = {
        key.split(".mlp.")[-1].split(".")[0]: module
        for key, module in model.named_modules()
        if isinstance(module, MultiHeadAdapter)
    }
    assert set(adapters) == {"gate_proj", "down_proj"}
    assert all(".layers.1." in key for key, module in model.named_modules() if isinstance(module, MultiHeadAdapter))
    assert (adapters["down_proj"].r, adapters["gate_proj"].r) == (2, 4)
    assert adapters["gate_proj"].scaling == 8 / 2
    assert adapters["down_proj"].scaling == pytest.approx(32 / 2**0.5)


def test_modules_to_save_and_trainable_tokens(model_folders, tmp_path):
    model = adapted(model_folders, "qwen2", modules_to_save=["lm_head"], trainable_token_indices=[3, 4])
    perturb(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load_base(model_folders, "qwen2"), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), expected)


@pytest.mark.parametrize("bias", ["all", "rlora_only"])
def test_bias(model_folders, tmp_path, bias):
    model = adapted(model_folders, "gpt2", bias=bias)
    trained = {key for key, value in model.named_parameters() if value.requires_grad and key.endswith(".bias")}
    assert trained
    assert all("mlp" in key for key in trained) == (bias == "rlora_only")
    perturb(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load_base(model_folders, "gpt2"), tmp_path).eval()), expected)


def test_enabling_gradients_leaves_the_anchor_frozen(model_folders):
    model = adapted(model_folders, "llama")

    def anchors():
        return [p for key, p in model.named_parameters() if key.endswith((".A0", ".B0"))]

    assert anchors()
    for enable in (
        lambda: model.set_adapter("default"),
        lambda: model.base_model.enable_adapter_layers(),
        lambda: model.set_requires_grad("default"),
        lambda: [m.requires_grad_(True) for m in model.modules() if isinstance(m, MultiHeadAdapter)],
    ):
        enable()
        assert not any(p.requires_grad for p in anchors())
    # And even where someone turns on all that is named "lora_", they get no gradient.
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in key)
    model.train()(input_ids=random_ids(), labels=random_ids()).loss.backward()
    assert all(p.grad is None for p in anchors())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(model_folders, use_reentrant):
    """Also with dropout: the recomputation draws the masks of the first pass."""

    def gradients(checkpointing):
        torch.manual_seed(5)
        model = adapted(model_folders, "llama", head_dropout=0.5)
        perturb(model)
        model.train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        torch.manual_seed(9)
        model(input_ids=random_ids(), labels=random_ids()).loss.backward()
        return {key: value.grad for key, value in model.named_parameters() if value.grad is not None}

    expected, actual = gradients(False), gradients(True)
    assert set(expected) == set(actual)
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-5, atol=1e-7)


def test_dropout_acts_in_training_only_and_follows_the_seed(model_folders):
    model = adapted(model_folders, "llama", head_dropout=0.5)
    perturb(model)
    assert torch.equal(logits(model), logits(model))
    model.train()
    torch.manual_seed(1)
    first = logits(model)
    assert not torch.equal(logits(model), first)
    torch.manual_seed(1)
    assert torch.equal(logits(model), first)


def test_autocast(model_folders):
    model = adapted(model_folders, "llama")
    perturb(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = logits(model)
    assert (low.float() - logits(model)).norm() / logits(model).norm() < 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_whole_model_in_half_precision(model_folders, dtype):
    model = adapted(model_folders, "llama")
    perturb(model)
    expected = logits(model)
    actual = logits(model.to(dtype))
    assert actual.dtype == dtype
    assert (actual.float() - expected).norm() / expected.norm() < 0.05


def test_inference_sees_changed_weights(model_folders):
    """What inference keeps of the weights is made again when they change, in whatever way."""
    model = adapted(model_folders, "llama")
    seen = [logits(model)]
    perturb(model, seed=1)
    seen.append(logits(model))
    changed = {key: value + 0.05 for key, value in model.state_dict().items() if key.endswith(".B")}
    model.load_state_dict(changed, strict=False)
    seen.append(logits(model))
    model.train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(0.5)  # leaves no trace on the parameter
    model.eval()
    seen.append(logits(model))
    for i in range(len(seen)):
        for j in range(i):
            assert not torch.allclose(seen[i], seen[j])
    with torch.inference_mode():
        inference = model(random_ids()).logits
    torch.testing.assert_close(inference, seen[-1])
    model(input_ids=random_ids(), labels=random_ids()).loss.backward()  # and gradients in eval mode still work


@pytest.mark.parametrize(
    ("method", "remedy"), [("add_weighted_adapter", "export_lora"), ("subtract_mutated_init", "")]
)
def test_methods_of_plain_lora(model_folders, method, remedy):
    model = adapted(model_folders, "llama")
    with pytest.raises(NotImplementedError, match=f"{method}.*{remedy}"):
        getattr(model, method)(["default", "default"], [0.5, 0.5], "both", combination_type="linear")
