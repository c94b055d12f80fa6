"""4-bit and 8-bit bases, on CPU: the base is never modified, and step 0 is the quantized base."""

import re
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from testing_utils import perturb, random_ids, task_datasets
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from rlora_trl import RLoraConfig, RLoraSFTConfig, RLoraSFTTrainer


pytest.importorskip("bitsandbytes")


def four_bits(**settings):
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **settings)


CONFIGS = {
    "nf4": lambda: four_bits(bnb_4bit_quant_type="nf4"),
    "nf4 double": lambda: four_bits(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": lambda: four_bits(bnb_4bit_quant_type="fp4"),
    # Packed into numbers of 16 or 32 bits, as ZeRO-3 and FSDP need them.
    "nf4 in bfloat16": lambda: four_bits(
        bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_quant_storage=torch.bfloat16
    ),
    "nf4 in float32": lambda: four_bits(bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.float32),
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
    """The stored (packed) weights of the base, as bytes: packed into floating point numbers some are NaN."""
    return {
        key.replace("base_model.model.", "").replace(".base_layer", ""): value.clone().reshape(-1).view(torch.uint8)
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
    # About the error that quantizing the base makes by itself.
    assert (logits(exchanged) - expected).norm() < 2 * base_error


@pytest.mark.parametrize("bits", CONFIGS)
def test_training_goes_on_after_inference_as_before(model_folders, tmp_path, bits):
    """On some CPUs bitsandbytes brings 4-bit weights into another order for inference, which passes no gradient on."""
    model = get_peft_model(load(model_folders, bits), RLoraConfig(task_type="CAUSAL_LM", head_dropout=0.0))
    perturb(model)

    def gradients():
        embeddings = model.get_input_embeddings()(random_ids()).detach().requires_grad_(True)
        model.train()(inputs_embeds=embeddings, labels=random_ids()).loss.backward()
        return embeddings.grad.clone()

    before = base_weights(model)
    expected = gradients()
    assert expected.norm() > 0
    first = logits(model.eval())
    assert torch.equal(gradients(), expected)
    assert torch.equal(logits(model.eval()), first)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(model.eval()), first)
    after = base_weights(model)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(gradients(), expected)


def logits_of(adapter, model_folders, bits):
    """Of an adapter's folder, loaded by PEFT together with its base."""
    model = AutoPeftModelForCausalLM.from_pretrained(
        adapter, quantization_config=CONFIGS[bits](), dtype=torch.bfloat16
    )
    assert model.get_base_model().is_quantized
    return logits(model.eval())


@pytest.mark.parametrize("bits", ["nf4 double", "8bit"])
def test_adapter_of_a_bfloat16_base_runs_on_a_quantized_one(model_folders, tmp_path, bits):
    full = AutoModelForCausalLM.from_pretrained(model_folders["llama64"], dtype=torch.bfloat16).eval()
    base = logits(full)
    base_error = (base - logits(load(model_folders, bits))).norm()
    model = get_peft_model(full, RLoraConfig(task_type="CAUSAL_LM")).eval()
    perturb(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    expected_there = logits(PeftModel.from_pretrained(load(model_folders, bits), tmp_path).eval())
    assert torch.equal(logits_of(tmp_path, model_folders, bits), expected_there)
    # About the error that quantizing the base makes by itself.
    assert (expected_there - expected).norm() < 2 * base_error


@pytest.mark.parametrize("bits", ["nf4 double", "8bit"])
def test_adapter_of_a_checkpoint_that_is_quantized_already(model_folders, tmp_path, bits):
    load(model_folders, bits).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert base.is_quantized
    model = get_peft_model(base, RLoraConfig(task_type="CAUSAL_LM")).eval()
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert again.get_base_model().is_quantized
    assert torch.equal(logits(again), logits(model))


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
    assert model.is_loaded_in_8bit if bits == "8bit" else model.is_loaded_in_4bit
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
    model = get_peft_model(load(model_folders, "nf4 double"), RLoraConfig(task_type="CAUSAL_LM"))
    perturb(model)
    values = {key: value.clone() for key, value in model.named_parameters() if "rlora_adapters" in key}
    args = RLoraSFTConfig(
        str(tmp_path), report_to="none", bf16=True, use_cpu=True, max_steps=1, gradient_checkpointing=False
    )
    trainer = RLoraSFTTrainer(model, args, train_dataset=task_datasets(8), processing_class=tokenizer)
    for key, value in values.items():
        assert torch.equal(trainer.model.get_parameter(key), value), key


def test_uniform_router_merges_into_a_quantized_base(model_folders):
    model = get_peft_model(
        load(model_folders, "nf4 double"), RLoraConfig(task_type="CAUSAL_LM", router="uniform")
    ).eval()
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


def test_example_of_the_documentation(model_folders, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "quantization.md").read_text()
    example = re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1)
    for text, here in {
        '"Qwen/Qwen2.5-0.5B"': repr(model_folders["llama64"]),
        '"adapter"': repr(str(tmp_path / "adapter")),
        "max_steps=20": "max_steps=2, use_cpu=True, gradient_checkpointing=False, report_to='none'",
    }.items():
        assert text in example
        example = example.replace(text, here)
    names = {}
    exec(example, names)
    assert names["model"].get_base_model().is_loaded_in_4bit
    assert torch.equal(logits(names["model"].eval()), logits(names["trainer"].model.eval()))
    assert names["model"].peft_config["default"].tasks == ["sums", "signs"]
