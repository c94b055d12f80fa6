"""Unloading, merging and deleting adapters of models that train more than adapters: as with plain LoRA."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import AuxiliaryTrainingWrapper
from testing_utils import TINY_MODELS, VOCAB, perturb, random_ids
from transformers import RobertaConfig, RobertaForSequenceClassification

from rlora_trl import RLoraConfig
from rlora_trl.tuner import RLoraLayer


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
