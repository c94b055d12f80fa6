"""Merging, unloading and deleting adapters, also of models that train more than adapters."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import AuxiliaryTrainingWrapper
from testing_utils import TASK_TYPES, TINY_MODELS, VOCAB, perturb, random_ids
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from rlora_trl import RLoraConfig
from rlora_trl.tuner import RLoraLayer, RLoraLinear


TARGETS = r".*\.layer\.\d+\.(intermediate|output)\.dense"


def roberta():
    """Its head is a module of several layers."""
    config = RobertaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=3,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    return RobertaForSequenceClassification(config)


MODELS = {
    "roberta": (roberta, {"task_type": "SEQ_CLS", "target_modules": TARGETS}),
    "bert": (TINY_MODELS["bert"], {"task_type": "SEQ_CLS", "target_modules": TARGETS}),
    "llama": (TINY_MODELS["llama"], {"task_type": "CAUSAL_LM", "target_modules": ["down_proj"]}),
    "saved MLP": (
        TINY_MODELS["llama"],
        {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
    ),
}
OPTIONS = {"plain": {}, "tokens": {"trainable_token_indices": [5, 6]}}


def build(name, kind, options):
    torch.manual_seed(0)
    make, config = MODELS[name]
    base = make().eval()
    expected = logits(base)
    if kind == "rlora":
        config = RLoraConfig(**config, **options, router="uniform", init_weights=False, head_dropout=0.0)
    else:
        config = LoraConfig(**config, **options, init_lora_weights=False)
    model = get_peft_model(base, config)
    # What both train besides adapters, in one way; then the adapters.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in parameter_name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval(), expected


def logits(model):
    with torch.no_grad():
        return model(input_ids=random_ids()).logits


def assert_bare(model):
    assert not any(isinstance(module, RLoraLayer | AuxiliaryTrainingWrapper) for module in model.modules())
    assert not any("lora" in name or "modules_to_save" in name for name in model.state_dict())


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_unload(name, options):
    model, base = build(name, "rlora", OPTIONS[options])
    lora, _ = build(name, "lora", OPTIONS[options])
    expected = logits(lora.unload())  # PEFT keeps what `modules_to_save` has trained
    unloaded = model.unload()
    assert_bare(unloaded)
    assert torch.equal(logits(unloaded), expected)
    assert torch.equal(expected, base) == (name == "llama")


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_merge_and_unload(name, options):
    model, base = build(name, "rlora", OPTIONS[options])
    expected = logits(model)
    assert (expected - base).abs().max() > 1e-3
    merged = model.merge_and_unload()
    assert_bare(merged)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_delete_adapter(name, options):
    model, base = build(name, "rlora", OPTIONS[options])
    expected = logits(model)
    config = MODELS[name][1] | OPTIONS[options]
    model.add_adapter("second", RLoraConfig(**config, init_weights=False))
    model.set_adapter("second")
    perturb(model)
    model.eval()
    assert not torch.equal(logits(model), expected)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)
    model.delete_adapter("default")
    unloaded = model.unload()
    assert_bare(unloaded)
    assert torch.equal(logits(unloaded), base)


def adapted(model_folders, name, **kwargs):
    torch.manual_seed(0)
    auto = AutoModelForSequenceClassification if name == "bert" else AutoModelForCausalLM
    base = auto.from_pretrained(model_folders[name]).eval()
    return get_peft_model(base, RLoraConfig(task_type=TASK_TYPES[name], **kwargs)).eval()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_uniform_router_merges_exactly(model_folders, name):
    model = adapted(model_folders, name, router="uniform")
    perturb(model)
    expected = logits(model)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    assert not any(isinstance(module, RLoraLinear) for module in merged.modules())


@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
def test_softmax_router_refuses_to_merge_before_touching_anything(model_folders, method):
    model = adapted(model_folders, "llama")
    perturb(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="depends on the token.*unload\\(\\)"):
        getattr(model, method)()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert any(isinstance(module, RLoraLinear) for module in model.modules())


def test_merging_checks_the_adapters_that_are_named(model_folders):
    model = adapted(model_folders, "llama", router="uniform")
    perturb(model)
    model.add_adapter("soft", RLoraConfig(task_type="CAUSAL_LM"))
    before = copy.deepcopy(model.state_dict())
    for method in ("merge_adapter", "merge_and_unload"):
        with pytest.raises(ValueError, match="'soft' can't be merged"):
            getattr(model, method)(adapter_names=["default", "soft"])
        with pytest.raises(ValueError, match="no adapter 'other' to merge"):
            getattr(model, method)(adapter_names=["other"])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.set_adapter("soft")
    model.merge_and_unload(adapter_names=["default"])


def test_safe_merge_refuses_broken_weights(model_folders):
    model = adapted(model_folders, "llama", router="uniform")
    with torch.no_grad():
        next(p for key, p in model.named_parameters() if key.endswith("default.A")).fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)


def test_a_uniform_router_with_an_a_for_each_head_merges(model_folders):
    model = adapted(model_folders, "llama", share_a=False, router="uniform")
    perturb(model, scale=2.0)
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)
