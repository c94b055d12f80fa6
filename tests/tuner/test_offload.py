"""Bases whose weights accelerate offloads: adapters stay where the base computes, as on any base."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import PeftConfig, PeftModel, get_peft_model
from testing_utils import TINY_MODELS, perturb, random_ids
from transformers import AutoModelForCausalLM

from rlora_trl import RLoraConfig


CPU = torch.device("cpu")
DEVICE_MAP = {
    **dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "model.layers.0"], "cpu"),
    "model.layers.1": "disk",
}
OFFLOADED = {
    "cpu": lambda model, folder: cpu_offload(model, execution_device=CPU),
    "disk": lambda model, folder: disk_offload(model, folder, execution_device=CPU),
    "map": lambda model, folder: dispatch_model(model, DEVICE_MAP, main_device="cpu", offload_dir=folder),
}


def load(model_folders):
    return AutoModelForCausalLM.from_pretrained(model_folders["llama"]).eval()


@pytest.fixture(params=OFFLOADED)
def offloaded(request, model_folders, tmp_path):
    return OFFLOADED[request.param](load(model_folders), str(tmp_path / "offloaded"))


def adapt(base, **kwargs):
    torch.manual_seed(4)
    return get_peft_model(base, RLoraConfig(task_type="CAUSAL_LM", head_dropout=0.0, **kwargs))


def logits(model):
    with torch.no_grad():
        return model(input_ids=random_ids()).logits


def train(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    losses = []
    for _ in range(3):
        loss = model(input_ids=random_ids(), labels=random_ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_starts_trains_and_unloads_as_on_any_base(model_folders, offloaded):
    plain = load(model_folders)
    expected = logits(plain)
    model = adapt(offloaded).eval()
    assert {p.device for name, p in model.named_parameters() if "rlora" in name} == {CPU}
    assert any(p.device.type == "meta" for p in model.parameters())
    assert torch.equal(logits(model), expected)
    assert train(model) == train(adapt(plain))
    assert torch.equal(logits(model.unload()), expected)


def test_saves_and_loads(model_folders, offloaded, tmp_path):
    model = adapt(load(model_folders))
    perturb(model)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(offloaded, tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), expected)
    loaded.load_adapter(tmp_path / "adapter", "second", low_cpu_mem_usage=True)
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "again", selected_adapters=["default"])
    assert torch.equal(logits(PeftModel.from_pretrained(load(model_folders), tmp_path / "again").eval()), expected)


def test_merges(model_folders, offloaded):
    model = adapt(offloaded, router="uniform", init_weights=False).eval()
    expected = logits(adapt(load(model_folders), router="uniform", init_weights=False).eval())
    assert torch.equal(logits(model), expected)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"modules_to_save": ["layers.0.self_attn"]}, "model.layers.0.self_attn.k_proj"),
        ({"trainable_token_indices": [3]}, "model.embed_tokens"),
        ({"trainable_token_indices": {"embed_tokens": [3]}}, "model.embed_tokens"),
    ],
)
def test_weights_of_the_base_that_would_train_are_refused(model_folders, config, named):
    base = cpu_offload(load(model_folders), execution_device=CPU)
    with pytest.raises(ValueError, match=f"`{next(iter(config))}=.*trains weights of {named}.*offloads"):
        adapt(base, **config)
    assert not any("rlora" in name for name, _ in base.named_modules())


def test_biases_that_would_train_are_refused():
    base = cpu_offload(TINY_MODELS["gpt2"](), execution_device=CPU)
    with pytest.raises(ValueError, match="`bias='rlora_only'` trains weights of transformer.h.0.mlp.c_fc"):
        adapt(base, bias="rlora_only")


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU PEFT dispatches such a base again")
def test_a_base_that_peft_can_not_dispatch_again(model_folders, tmp_path):
    adapt(load(model_folders)).save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(
        model_folders["llama"], device_map=DEVICE_MAP, offload_folder=str(tmp_path / "offloaded")
    )
    with pytest.raises(ValueError, match='layers on "disk".*accelerate.disk_offload'):
        PeftModel.from_pretrained(base, tmp_path / "adapter")


LOADS = {
    "load_adapter": lambda base, adapter: base.load_adapter(adapter),
    "load_adapter to train": lambda base, adapter: base.load_adapter(adapter, is_trainable=True),
    "given configuration": lambda base, adapter: base.load_adapter(
        adapter, peft_config=PeftConfig.from_pretrained(adapter)
    ),
}


@pytest.mark.parametrize("load_by", LOADS)
def test_loading_by_transformers_is_refused(model_folders, offloaded, tmp_path, load_by):
    """It would leave random values in the adapter, or none."""
    adapter = str(tmp_path / "adapter")
    adapt(load(model_folders)).save_pretrained(adapter)
    with pytest.raises(ValueError, match=r"load_adapter.*model\.layers\..*PeftModel\.from_pretrained\(base"):
        LOADS[load_by](offloaded, adapter)
    assert not any("rlora" in name for name, _ in offloaded.named_modules())


def test_loading_by_the_name_of_the_adapter_is_refused(model_folders, tmp_path):
    adapter = str(tmp_path / "adapter")
    adapt(load(model_folders)).save_pretrained(adapter)
    with pytest.raises(ValueError, match="accelerate.cpu_offload"):
        AutoModelForCausalLM.from_pretrained(adapter, device_map={"": "disk"}, offload_folder=str(tmp_path / "disk"))


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("trains", [False, True])
def test_the_remedy_works_with_a_given_configuration_too(model_folders, tmp_path, offload, trains):
    model = adapt(load(model_folders), init_weights=False).eval()
    model.save_pretrained(tmp_path / "adapter")
    base = OFFLOADED[offload](load(model_folders), str(tmp_path / "offloaded"))
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", config=config, is_trainable=trains).eval()
    assert torch.equal(logits(loaded), logits(model))


def test_transformers_loads_and_adds_where_adapted_layers_are_in_memory(model_folders, tmp_path):
    model = adapt(load(model_folders), init_weights=False).eval()
    model.save_pretrained(tmp_path / "adapter")
    device_map = {**DEVICE_MAP, "model.layers.1": "cpu", "lm_head": "disk"}
    base = dispatch_model(load(model_folders), device_map, main_device="cpu", offload_dir=str(tmp_path / "disk"))
    base.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(base), logits(model))


def test_transformers_adds_a_new_adapter(model_folders, offloaded):
    expected = logits(offloaded)
    offloaded.add_adapter(RLoraConfig(head_dropout=0.0))
    assert torch.equal(logits(offloaded), expected)
