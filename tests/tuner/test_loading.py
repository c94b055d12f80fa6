"""Bad models, bad targets, bad files: one clear error each, before anything is changed."""

import json
import os
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from testing_utils import _DECODER, perturb
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rlora_trl import RLoraConfig
from rlora_trl.tuner.layer import RLoraLayer


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


def test_tensors_of_integers(base, saved):
    rewrite(saved, lambda tensors: tensors.update({key: value.long() for key, value in tensors.items()}))
    with pytest.raises(ValueError, match="of type torch.int64, and tensors of adapters must be"):
        PeftModel.from_pretrained(base, saved)


# Weights of the base in the file of an adapter


def add(folder, **tensors):
    rewrite(folder, lambda stored: stored.update({f"base_model.model.{k}": v for k, v in tensors.items()}))


UNANNOUNCED = {
    "embedding": {"model.embed_tokens.weight": torch.zeros(80, 32)},
    "norm": {"model.norm.weight": torch.zeros(32)},
    "base layer": {"model.layers.0.mlp.up_proj.base_layer.weight": torch.zeros(48, 32)},
    "layer": {"model.layers.1.self_attn.q_proj.weight": torch.zeros(32, 32)},
}


@pytest.mark.parametrize("name", UNANNOUNCED)
def test_an_adapter_overwrites_nothing(base, saved, tmp_path, name):
    before = {key: value.clone() for key, value in base.state_dict().items()}
    model = PeftModel.from_pretrained(base, saved)
    bad = shutil.copytree(saved, tmp_path / "bad")
    add(bad, **UNANNOUNCED[name])
    with pytest.raises(ValueError, match="does not announce.*would overwrite weights of the base"):
        model.load_adapter(bad, "second")
    after = {key.replace(".base_layer", ""): value for key, value in model.base_model.model.state_dict().items()}
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    with pytest.raises(ValueError, match="would overwrite"):
        AutoPeftModelForCausalLM.from_pretrained(bad)


@pytest.mark.parametrize("name", [name for name in UNANNOUNCED if name != "base layer"])
@pytest.mark.parametrize("way", ["load_adapter", "AutoModel"])
def test_transformers_overwrites_with_an_error(base, saved, way, name):
    add(saved, **UNANNOUNCED[name])
    with pytest.raises(ValueError, match="has overwritten .* does not announce. Load the base model again"):
        base.load_adapter(str(saved)) if way == "load_adapter" else AutoModelForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_by_transformers(base, saved, value):
    rewrite(saved, lambda tensors: next(iter(tensors.values())).fill_(value))
    with pytest.raises(ValueError, match="'default' holds NaN or infinity in"):
        AutoModelForCausalLM.from_pretrained(saved)
    with pytest.raises(ValueError, match="holds NaN or infinity in"):
        base.load_adapter(str(saved))


def test_values_that_are_not_finite_by_transformers_for_training(base, saved):
    rewrite(saved, lambda tensors: next(iter(tensors.values())).fill_(float("nan")))
    base.load_adapter(str(saved), "other", is_trainable=True)
    with pytest.raises(ValueError, match="'other' holds NaN or infinity in"):
        base(input_ids=torch.tensor([[1, 2]]))
    base.delete_adapter("other")
    base(input_ids=torch.tensor([[1, 2]]))


def test_checks_of_a_first_use_leave_nothing_behind(base, saved):
    base.load_adapter(str(saved), is_trainable=True)
    base(input_ids=torch.tensor([[1, 2]]))
    layers = [module for module in base.modules() if isinstance(module, RLoraLayer)]
    assert layers and not any(layer._forward_pre_hooks for layer in layers)
    assert all(adapter.first_use is None for layer in layers for adapter in layer.rlora_adapters.values())


def test_announced_embeddings_load(base, saved):
    """As PEFT saves them if the vocabulary was resized."""
    zeros = torch.zeros(80, 32)
    add(saved, **{"model.embed_tokens.weight": zeros})
    path = saved / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "saved_embeddings": ["model.embed_tokens"]}))
    assert torch.equal(PeftModel.from_pretrained(base, saved).get_input_embeddings().weight, zeros)
    by_transformers = AutoModelForCausalLM.from_pretrained(saved)
    assert torch.equal(by_transformers.get_input_embeddings().weight, zeros)


def test_announced_modules_must_be_there(base, saved):
    path = saved / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "modules_to_save": ["lm_head"]}))
    with pytest.raises(ValueError, match="lacks lm_head.weight, which `modules_to_save` of its configuration"):
        PeftModel.from_pretrained(base, saved)


def test_modules_that_transformers_leaves_are_named(base, saved, monkeypatch):
    """transformers 5.17 does not know modules in `modules_to_save`; later versions ask these for their names."""
    add(saved, **{"lm_head.weight": torch.full((80, 32), 0.5)})
    path = saved / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "modules_to_save": ["lm_head"]}))
    monkeypatch.setattr(AuxiliaryTrainingWrapper, "adapter_state_dict_load_map", lambda self, name: {})
    monkeypatch.setattr(ModulesToSaveWrapper, "adapter_state_dict_load_map", lambda self, name: {})
    with pytest.raises(ValueError, match=r"^transformers 5\S+ has not loaded lm_head.* `peft.PeftModel.from_pretra"):
        AutoModelForCausalLM.from_pretrained(saved)
    monkeypatch.undo()
    model = PeftModel.from_pretrained(base, saved)
    assert (model.get_output_embeddings().modules_to_save["default"].weight == 0.5).all()


def test_announced_weights_must_be_finite_by_transformers(base, saved):
    add(saved, **{"lm_head.weight": torch.full((80, 32), float("nan"))})
    path = saved / "adapter_config.json"
    for announced in ({"saved_embeddings": ["lm_head"]}, {"modules_to_save": ["lm_head"], "saved_embeddings": None}):
        path.write_text(json.dumps({**json.loads(path.read_text()), **announced}))
        with pytest.raises(ValueError, match="holds NaN or infinity in .*lm_head"):
            AutoModelForCausalLM.from_pretrained(saved)


def test_a_wrapped_weight_of_the_base_is_not_announced(model_folders, base, tmp_path):
    """Saving a module does not announce the base's own weight of it."""
    config = {"task_type": "CAUSAL_LM", "modules_to_save": ["lm_head"]}
    other = AutoModelForCausalLM.from_pretrained(model_folders["llama"])
    get_peft_model(other, RLoraConfig(**config)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["saved_embeddings"] is None
    model = PeftModel.from_pretrained(base, tmp_path)
    add(tmp_path, **{"lm_head.original_module.weight": torch.zeros(80, 32)})
    with pytest.raises(ValueError, match="does not announce"):
        model.load_adapter(tmp_path, "second")


def test_tensors_of_eight_bits(base, saved):
    rewrite(saved, lambda tensors: tensors.update({k: v.to(torch.float8_e4m3fn) for k, v in tensors.items()}))
    with pytest.raises(ValueError, match="of type torch.float8_e4m3fn, and tensors of adapters must be"):
        PeftModel.from_pretrained(base, saved)
