"""`adapter_names=`: each row of a batch runs its own adapter, also where layers get copies or tokens of the rows."""

import pytest
import torch
from expert_models import build
from peft import get_peft_model
from testing_utils import TINY_MODELS, perturb, random_ids
from transformers import BertConfig, BertForMultipleChoice, GenerationConfig, T5Config, T5ForConditionalGeneration

from rlora_trl import RLoraConfig


NAMES = ["other", "default", "other"]
# "sampled" takes the most likely token each time, so that it can be compared.
GENERATIONS = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "configured": {"generation_config": GenerationConfig(do_sample=False, num_beams=2, pad_token_id=0)},
    "sampled": {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
}


def t5():
    config = T5Config(vocab_size=80, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


def with_two_adapters(family):
    torch.manual_seed(0)
    builders = {"llama": TINY_MODELS["llama"], "t5": t5}
    base = builders[family]() if family in builders else build(family)
    kind = "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"
    model = get_peft_model(base, RLoraConfig(task_type=kind))
    perturb(model, scale=1.0)
    model.add_adapter("other", RLoraConfig(task_type=kind, r=2))
    model.set_adapter("other")
    perturb(model, scale=1.0, seed=1)
    return model.eval()


def alone(model, run):
    """The results of a call for each adapter alone, and of the base."""
    results = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        results[name] = run()
    with model.disable_adapter():
        results["__base__"] = run()
    assert not torch.equal(results["default"], results["other"])
    return results


@pytest.mark.parametrize("family", ["qwen2_moe", "llama4", "qwen3_moe"])
@torch.no_grad()
def test_shared_experts_see_the_tokens_of_all_rows(family):
    model, ids = with_two_adapters(family), random_ids()
    expected = alone(model, lambda: model(input_ids=ids).logits)
    names = ["other", "__base__", "default"]
    mixed = model(input_ids=ids, adapter_names=names).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], expected[name][row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", GENERATIONS)
@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "t5"])
def test_generation_repeats_rows(family, kind):
    model, ids = with_two_adapters(family), random_ids(length=5)
    settings = {"input_ids": ids, "max_new_tokens": 4, "min_new_tokens": 4, **GENERATIONS[kind]}
    expected = alone(model, lambda: model.generate(**settings))
    mixed = model.generate(**settings, adapter_names=NAMES)
    copies = len(mixed) // len(NAMES)
    for row, name in enumerate(name for name in NAMES for _ in range(copies)):
        assert torch.equal(mixed[row], expected[name][row])


def test_without_a_task_type():
    """PEFT calls `generate` of such a model in another way."""
    torch.manual_seed(0)
    model = get_peft_model(TINY_MODELS["llama"](), RLoraConfig())
    perturb(model, scale=1.0)
    settings = {"input_ids": random_ids(2), "max_new_tokens": 3, "do_sample": False, "num_beams": 2}
    expected = model.eval().generate(**settings)
    mixed = model.generate(**settings, adapter_names=["default", "__base__"])
    assert torch.equal(mixed[0], expected[0])
    with model.disable_adapter():
        assert torch.equal(mixed[1], model.generate(**settings)[1])


@torch.no_grad()
def test_choices_are_of_their_row():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = BertForMultipleChoice(BertConfig(vocab_size=80, **sizes))
    model = get_peft_model(base, RLoraConfig()).eval()
    perturb(model, scale=1.0)
    ids = random_ids(6).view(2, 3, -1)
    expected = model(input_ids=ids).logits
    mixed = model(input_ids=ids, adapter_names=["default", "__base__"]).logits
    torch.testing.assert_close(mixed[0], expected[0])
    with model.disable_adapter():
        torch.testing.assert_close(mixed[1], model(input_ids=ids).logits[1])


@pytest.mark.parametrize("names", [["other"] * 2, ["other"] * 8, []])
def test_the_names_must_be_those_of_the_rows(names):
    model, ids = with_two_adapters("llama"), random_ids(4)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=rf"one name for each of the 4 rows of the batch, got {len(names)}"):
            call(input_ids=ids, adapter_names=names)


@pytest.mark.parametrize("active", ["default", "other"])
@torch.no_grad()
def test_modules_that_one_adapter_trains(active):
    """The other uses those of the base, whichever of the two is active."""
    torch.manual_seed(0)
    saved = ["embed_tokens", "lm_head"]
    model = get_peft_model(TINY_MODELS["llama"](), RLoraConfig(task_type="CAUSAL_LM", modules_to_save=saved))
    perturb(model, scale=1.0)
    model.add_adapter("other", RLoraConfig(task_type="CAUSAL_LM", r=2))
    model.set_adapter("other")
    perturb(model, scale=1.0, seed=1)
    model.eval()
    ids = random_ids(3)
    expected = alone(model, lambda: model(input_ids=ids).logits)
    model.set_adapter(active)
    names = ["other", "__base__", "default"]
    mixed = model(input_ids=ids, adapter_names=names).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], expected[name][row], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(input_ids=ids).logits, expected[active])
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=ids, adapter_names=["__base__"] * 3).logits, expected["__base__"])
