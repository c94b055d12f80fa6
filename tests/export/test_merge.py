"""Merged exports: what stock PEFT makes of a copy of the base."""

import pytest
import torch
from exporting import WEIGHTS, adapted, error, load_for, logits, same_state, state_of
from huggingface_hub import ModelCard
from peft import get_peft_model
from testing_utils import TINY_MODELS, perturb, random_ids
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from rlora_trl import RLoraConfig
from rlora_trl.export import export_lora
from rlora_trl.tuner.selection import adapted_layers, fixed_head_weights


def tied_base():
    torch.manual_seed(1)
    options = {**TINY_MODELS["llama"]().config.to_dict(), "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**options)).eval()


@pytest.mark.parametrize("name, dtype", [("llama", torch.float32), ("llama", torch.bfloat16), ("gpt2", torch.float32)])
def test_merge(model_folders, tmp_path, tokenizer, name, dtype):
    model = adapted(model_folders, name, dtype)
    before = state_of(model)
    report = export_lora(model, tmp_path / "out", routing=WEIGHTS, tokenizer=tokenizer, merge=True)
    same_state(model, before)
    with fixed_head_weights(model, "default", dict.fromkeys(adapted_layers(model, "default"), WEIGHTS)):
        expected = logits(model)

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert report.merged and report.warnings == () and merged.dtype == dtype
    # Rounded to 16 bits once, where the adapter's sum is not rounded at all.
    assert error(logits(merged), expected) <= (0.05 if dtype == torch.bfloat16 else 1e-5)
    assert not merged.config.to_dict().get("peft_config")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model_relation == "finetune" and "AutoModelForCausalLM" in card.text


# Fields of the configuration, and whether the embeddings of the merged model can't be tied any more.
TIED = {
    "other_layers": ({"target_modules": ["up_proj"]}, False),
    "head": ({"target_modules": ["lm_head", "up_proj"]}, True),
    "whole_head": ({"target_modules": ["up_proj"], "modules_to_save": ["lm_head"]}, True),
    "tokens": ({"target_modules": ["up_proj"], "trainable_token_indices": [7, 9]}, False),
}


@pytest.mark.parametrize("option", TIED)
def test_tied_embeddings(tmp_path, option):
    kwargs, untied = TIED[option]
    config = RLoraConfig(task_type="CAUSAL_LM", router="uniform", **kwargs)
    model = get_peft_model(tied_base(), config).eval()
    perturb(model, 1.0)
    ids = torch.cat([random_ids(), torch.tensor([[7, 9, 7]] * 3)], dim=1)
    before, expected = state_of(model), logits(model, ids)
    report = export_lora(model, tmp_path / "out", merge=True)
    same_state(model, before)

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert error(logits(merged, ids), expected) <= 1e-5
    assert merged.config.tie_word_embeddings is not untied
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) is not untied
    assert [("separate weights in the merged model" in warning) for warning in report.warnings] == [True] * untied


def test_quantized_base_is_refused(model_folders, tmp_path):
    model = get_peft_model(load_for(model_folders, "4bit"), RLoraConfig(task_type="CAUSAL_LM")).eval()
    with pytest.raises(ValueError, match="the base is quantized. Load the adapter on the base in 16 bits"):
        export_lora(model, tmp_path / "out", routing=WEIGHTS, merge=True)
    assert list(tmp_path.iterdir()) == []
