"""Bad models, bad targets, bad files: one clear error each, before anything is changed."""

import json
import os

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from testing_utils import _DECODER, perturb
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rlora_trl import RLoraConfig


@pytest.fixture
def base(model_folders):
    return AutoModelForCausalLM.from_pretrained(model_folders["llama"])


@pytest.fixture
def saved(model_folders, tmp_path):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folders["llama"]), RLoraConfig(task_type="CAUSAL_LM")
    )
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def rewrite(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_adapter_of_another_base(saved):
    wider = LlamaForCausalLM(LlamaConfig(**{**_DECODER, "intermediate_size": 64}))
    with pytest.raises(ValueError, match=r"belongs to another base.*is \[.*48.*the model needs \[.*64"):
        PeftModel.from_pretrained(wider, saved)


def test_adapter_of_a_deeper_base(saved):
    shallower = LlamaForCausalLM(LlamaConfig(**{**_DECODER, "num_hidden_layers": 1}))
    with pytest.raises(ValueError, match="does not fit the model.*no place for"):
        PeftModel.from_pretrained(shallower, saved)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_truncated_file(base, saved, share):
    path = saved / "adapter_model.safetensors"
    os.truncate(path, int(share * path.stat().st_size))
    for load in (
        lambda: PeftModel.from_pretrained(base, saved),
        lambda: AutoPeftModelForCausalLM.from_pretrained(saved),
    ):
        with pytest.raises(ValueError, match="adapter_model.safetensors is truncated.*again"):
            load()


def test_file_that_is_not_safetensors(base, saved):
    path = saved / "adapter_model.safetensors"
    path.write_bytes((20).to_bytes(8, "little") + b"not a json header at all" + bytes(100))
    with pytest.raises(ValueError, match="not a safetensors file"):
        PeftModel.from_pretrained(base, saved)


def test_missing_tensor(base, saved):
    rewrite(saved, lambda tensors: tensors.pop(next(key for key in tensors if key.endswith("B0"))))
    with pytest.raises(ValueError, match="its file lacks .*B0.*incomplete"):
        PeftModel.from_pretrained(base, saved)


def test_renamed_tensor(base, saved):
    def change(tensors):
        key = next(key for key in tensors if key.endswith(".router"))
        tensors[key + "_x"] = tensors.pop(key)

    rewrite(saved, change)
    with pytest.raises(ValueError, match="lacks .*router.*and has .*router_x"):
        PeftModel.from_pretrained(base, saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(base, saved, value):
    rewrite(saved, lambda tensors: next(iter(tensors.values())).fill_(value))
    with pytest.raises(ValueError, match="NaN or infinity"):
        PeftModel.from_pretrained(base, saved)


def test_config_of_another_adapter(base, saved):
    path = saved / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_heads": 4}))
    with pytest.raises(ValueError, match=r"\[3, .*the model needs \[4, "):
        PeftModel.from_pretrained(base, saved)


def test_newer_config_loads_with_a_warning(base, saved):
    path = saved / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "from_the_future": True}))
    with pytest.warns(UserWarning, match="from_the_future"):
        PeftModel.from_pretrained(base, saved)


def test_a_loaded_adapter_is_untouched_by_a_failed_load(base, saved):
    model = PeftModel.from_pretrained(base, saved)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rewrite(saved, lambda tensors: tensors.pop(next(iter(tensors))))
    with pytest.raises(ValueError, match="lacks"):
        model.load_adapter(saved, "second")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_base_of_another_name(model_folders, saved, caplog):
    """Of the same shapes, so that nothing else would tell."""
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/one"}))
    for name, warns in (("org/one", False), ("org/other", True), (model_folders["llama"], False)):
        caplog.clear()
        model = AutoModelForCausalLM.from_pretrained(model_folders["llama"])
        model.config._name_or_path = name
        PeftModel.from_pretrained(model, saved)
        assert ("trained on org/one but is loaded on org/other" in caplog.text) == warns, name
