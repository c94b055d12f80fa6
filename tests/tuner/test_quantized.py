"""4-bit and 8-bit bases, on CPU: the base is never modified, and step 0 is the quantised base."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from testing_utils import perturb, random_ids, task_datasets
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from rlora_trl import RLoraConfig, RLoraSFTConfig, RLoraSFTTrainer


pytest.importorskip("bitsandbytes")

CONFIGS = {
    "4bit": lambda: BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
    "8bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
}


def load(model_folders, bits):
    return AutoModelForCausalLM.from_pretrained(
        model_folders["llama64"], quantization_config=CONFIGS[bits](), dtype=torch.bfloat16
    ).eval()


def logits(model):
    with torch.no_grad():
        return model(random_ids()).logits.float()


def base_weights(model):
    """The stored (packed) weights of the base."""
    return {
        key.replace("base_model.model.", "").replace(".base_layer", ""): value.clone()
        for key, value in model.state_dict().items()
        if "rlora_adapters" not in key
    }


@pytest.mark.parametrize("bits", CONFIGS)
def test_step_zero_is_the_quantized_base(model_folders, bits):
    expected = logits(load(model_folders, bits))
    model = get_peft_model(load(model_folders, bits), RLoraConfig(task_type="CAUSAL_LM")).eval()
    # The delta is exactly zero, and both go through the same kernel.
    assert torch.equal(logits(model), expected)
    perturb(model)
    assert not torch.allclose(logits(model), expected, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("bits", CONFIGS)
def test_save_load_and_exchange_with_a_full_precision_base(model_folders, tmp_path, bits):
    model = get_peft_model(load(model_folders, bits), RLoraConfig(task_type="CAUSAL_LM")).eval()
    perturb(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load(model_folders, bits), tmp_path).eval()), expected)
    full = AutoModelForCausalLM.from_pretrained(model_folders["llama64"]).eval()
    base_error = (logits(full) - logits(load(model_folders, bits))).norm()
    exchanged = PeftModel.from_pretrained(full, tmp_path).eval()
    # About the error that quantising the base makes by itself.
    assert (logits(exchanged) - expected).norm() < 2 * base_error


@pytest.mark.parametrize("bits", CONFIGS)
def test_training_leaves_the_base_alone(model_folders, tmp_path, bits):
    args = RLoraSFTConfig(
        str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        logging_steps=1,
        lr_scheduler_type="constant",
        report_to="none",
        save_strategy="no",
        bf16=True,
        use_cpu=True,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    trainer = RLoraSFTTrainer(
        model_folders["llama64"], args, train_dataset=task_datasets(), quantization_config=CONFIGS[bits]()
    )
    model = trainer.model
    assert getattr(model, f"is_loaded_in_{bits}")
    # Not rounded to bfloat16, and the anchor agrees with the heads bit for bit.
    for key, parameter in model.named_parameters():
        if "rlora_adapters" in key:
            assert parameter.dtype == torch.float32, key
    for key, parameter in model.named_parameters():
        if key.endswith(".A0"):
            assert torch.equal(parameter, model.get_parameter(key.removesuffix("0")))
        if key.endswith(".B0"):
            assert torch.equal(parameter, model.get_parameter(key.removesuffix("0")).mean(0))
    before = base_weights(model)
    trainer.train()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(history[-3:]) < 0.9 * sum(history[:3])
    after = base_weights(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_adapter_loaded_before_training_keeps_its_float32_values(model_folders, tmp_path, tokenizer):
    model = get_peft_model(load(model_folders, "4bit"), RLoraConfig(task_type="CAUSAL_LM"))
    perturb(model)
    values = {key: value.clone() for key, value in model.named_parameters() if "rlora_adapters" in key}
    args = RLoraSFTConfig(
        str(tmp_path), report_to="none", bf16=True, use_cpu=True, max_steps=1, gradient_checkpointing=False
    )
    trainer = RLoraSFTTrainer(model, args, train_dataset=task_datasets(8), processing_class=tokenizer)
    for key, value in values.items():
        assert torch.equal(trainer.model.get_parameter(key), value), key


def test_uniform_router_merges_into_a_quantized_base(model_folders):
    model = get_peft_model(load(model_folders, "4bit"), RLoraConfig(task_type="CAUSAL_LM", router="uniform")).eval()
    perturb(model)
    expected = logits(model)
    with model.disable_adapter():
        base = logits(model)
    full = AutoModelForCausalLM.from_pretrained(model_folders["llama64"]).eval()
    base_error = (logits(full) - base).norm()
    merged = logits(model.merge_and_unload())
    # The merged weight is rounded to 4 bits again, which makes about the error that rounding the base made.
    assert (merged - expected).norm() < 2 * base_error
    assert (merged - expected).norm() < 0.7 * (expected - base).norm()
