"""What a trainer may be given as its model, and what may not change between its runs: nothing trains in vain."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from testing_utils import random_ids
from trainer_utils import adapter_state, make_trainer
from transformers import AutoModelForCausalLM

from rlora_trl import RLoraConfig
from rlora_trl.trainer.run_record import loaded_commit as _loaded_commit


def base_model(model_folders):
    return AutoModelForCausalLM.from_pretrained(model_folders["llama"])


@pytest.fixture
def saved(model_folders, tmp_path):
    trainer = make_trainer(model_folders, tmp_path / "saved", max_steps=2)
    trainer.train()
    trainer.save_model()
    return str(tmp_path / "saved")


def moved(before, after):
    """Which adapters have changed."""
    return {name.split(".rlora_adapters.")[1].split(".")[0] for name in before if not before[name].equal(after[name])}


# Loading


def test_an_adapter_loaded_for_inference_is_refused(model_folders, tmp_path, saved):
    model = PeftModel.from_pretrained(base_model(model_folders), saved)
    with pytest.raises(ValueError, match="'default' was loaded for inference.*`is_trainable=True`"):
        make_trainer(model_folders, tmp_path, model=model)
    trainer = make_trainer(
        model_folders,
        tmp_path,
        model=PeftModel.from_pretrained(base_model(model_folders), saved, is_trainable=True),
        max_steps=1,
    )
    before = adapter_state(trainer)
    trainer.train()
    assert moved(before, adapter_state(trainer)) == {"default"}


@pytest.mark.parametrize("how", ["frozen", "disabled", "second adapter"])
def test_an_adapter_that_does_not_train_is_refused(model_folders, tmp_path, saved, how):
    model = get_peft_model(base_model(model_folders), RLoraConfig(task_type="CAUSAL_LM"))
    if how == "frozen":
        model.requires_grad_(False)
    elif how == "disabled":
        model.base_model.disable_adapter_layers()
    else:
        model.load_adapter(saved, "other")  # for inference
        model.set_adapter("other", inference_mode=True)
    with pytest.raises(ValueError, match="No parameter of adapter|was loaded for inference"):
        make_trainer(model_folders, tmp_path, model=model)


def test_a_frozen_a_still_trains(model_folders, tmp_path, saved):
    """Some parameters are enough."""
    model = PeftModel.from_pretrained(base_model(model_folders), saved, is_trainable=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(".B"))
    trainer = make_trainer(model_folders, tmp_path, model=model, max_steps=1)
    before = adapter_state(trainer)
    trainer.train()
    assert {name[-2:] for name, value in adapter_state(trainer).items() if not value.equal(before[name])} == {".B"}


# Other adapters between runs


def two_adapters(model_folders):
    model = get_peft_model(base_model(model_folders), RLoraConfig(task_type="CAUSAL_LM"), adapter_name="a")
    model.add_adapter("b", RLoraConfig(task_type="CAUSAL_LM"))
    return model


@pytest.mark.parametrize("trained_before", [True, False])
def test_another_adapter_needs_another_trainer(model_folders, tmp_path, trained_before):
    model = two_adapters(model_folders)
    trainer = make_trainer(model_folders, tmp_path, model=model, max_steps=1)
    if trained_before:
        trainer.train()
    model.set_adapter("b")
    with pytest.raises(ValueError, match="created for adapter 'a'.*now adapter 'b' is active.*Create a new trainer"):
        trainer.train()
    model.set_adapter("a")
    before = adapter_state(trainer)
    trainer.train()
    assert moved(before, adapter_state(trainer)) == {"a"}
    model.set_adapter("b")
    other = make_trainer(model_folders, tmp_path, model=model, max_steps=1)
    before = adapter_state(other)
    other.train()
    assert moved(before, adapter_state(other)) == {"b"}


@pytest.mark.parametrize("how", ["frozen", "disabled"])
def test_an_adapter_frozen_between_runs_is_refused(model_folders, tmp_path, how):
    model = two_adapters(model_folders)
    trainer = make_trainer(model_folders, tmp_path, model=model, max_steps=1)
    trainer.train()
    if how == "frozen":
        model.requires_grad_(False)
    else:
        model.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match="created for adapter 'a'.*it is frozen or disabled"):
        trainer.train()


def test_a_second_run_trains_the_same_adapter(model_folders, tmp_path):
    trainer = make_trainer(model_folders, tmp_path, max_steps=1)
    for _ in range(2):
        before = adapter_state(trainer)
        trainer.train()
        assert moved(before, adapter_state(trainer)) == {"default"}


@pytest.mark.parametrize("how", ["replaced", "unloaded"])
def test_an_adapter_that_was_taken_out_is_refused(model_folders, tmp_path, how):
    model = get_peft_model(base_model(model_folders), RLoraConfig(task_type="CAUSAL_LM"))
    trainer = make_trainer(model_folders, tmp_path, model=model, max_steps=1)
    trainer.train()
    if how == "replaced":
        model.add_adapter("b", RLoraConfig(task_type="CAUSAL_LM"))
        model.delete_adapter("default")
        model.add_adapter("default", RLoraConfig(task_type="CAUSAL_LM"))
        model.set_adapter("default")
    else:
        model.unload()
    with pytest.raises(ValueError, match="it was removed from the model: nothing would train. Create a new trainer"):
        trainer.train()


def test_a_merged_adapter_is_refused(model_folders, tmp_path):
    model = get_peft_model(base_model(model_folders), RLoraConfig(task_type="CAUSAL_LM", router="uniform"))
    model.merge_adapter()
    with pytest.raises(ValueError, match="Adapters are merged into the base.*`model.unmerge_adapter..`"):
        make_trainer(model_folders, tmp_path, model=model)


def test_routers_alone_learn_from_tasks(model_folders, tmp_path, caplog):
    config = RLoraConfig(task_type="CAUSAL_LM", router="task", tasks=["first", "colour", "same"])
    model = get_peft_model(base_model(model_folders), config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(".router"))
    trainer = make_trainer(model_folders, tmp_path, model=model, max_steps=2)
    trainer.train()
    routers = [p for name, p in model.named_parameters() if name.endswith(".router")]
    assert all(bool((router != 0).all()) for router in routers)  # a mixture for each task
    assert "runs without the task" not in caplog.text


# Bases that have adapters


@pytest.mark.parametrize("config", [RLoraConfig(task_type="CAUSAL_LM"), LoraConfig(task_type="CAUSAL_LM")])
def test_a_base_that_an_earlier_call_has_adapted(model_folders, tmp_path, config):
    base = base_model(model_folders)
    model = get_peft_model(base, config)
    with pytest.raises(TypeError, match="an earlier trainer or `get_peft_model`.*`peft_model.unload.."):
        make_trainer(model_folders, tmp_path, model=base)
    make_trainer(model_folders, tmp_path, model=model.unload(), max_steps=1).train()


def test_a_second_trainer_on_the_same_base(model_folders, tmp_path):
    base = base_model(model_folders)
    first = make_trainer(model_folders, tmp_path, model=base, max_steps=1)
    with pytest.raises(TypeError, match="To train them further, pass the `PeftModel` .`trainer.model`"):
        make_trainer(model_folders, tmp_path, model=base)
    make_trainer(model_folders, tmp_path, model=first.model, max_steps=1).train()
    make_trainer(model_folders, tmp_path, model=first.model.unload(), max_steps=1).train()


def test_adapters_loaded_through_transformers(model_folders, tmp_path, saved):
    with pytest.raises(TypeError, match="loaded through transformers.*is_trainable=True"):
        make_trainer(model_folders, tmp_path, model=AutoModelForCausalLM.from_pretrained(saved))


# Compiled models


def test_compiled_models_are_refused(model_folders, tmp_path):
    base = base_model(model_folders)
    model = get_peft_model(base_model(model_folders), RLoraConfig(task_type="CAUSAL_LM"))
    for compiled in (torch.compile(base), torch.compile(model)):
        with pytest.raises(ValueError, match=r"compiled with `torch.compile`.*`model._orig_mod`.*torch_compile=True"):
            make_trainer(model_folders, tmp_path, model=compiled)
        make_trainer(model_folders, tmp_path, model=compiled._orig_mod)


def test_compiled_layers(model_folders, tmp_path):
    base = base_model(model_folders)
    base.model.layers[1] = torch.compile(base.model.layers[1])
    with pytest.raises(ValueError, match="'model.layers.1' of `model` was replaced.*Compile it in place"):
        make_trainer(model_folders, tmp_path, model=base)
    in_place = base_model(model_folders)
    in_place.model.layers[1].compile(backend="eager")
    trainer = make_trainer(model_folders, tmp_path, model=in_place, max_steps=1)
    assert not any("_orig_mod" in name for name, _ in trainer.model.named_parameters())


WHOLE_MODELS_COMPILE = pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="torch 2.6 can't compile a whole model of transformers 5 (NameError)"
)


@pytest.mark.parametrize(
    "part",
    [
        pytest.param("model", marks=WHOLE_MODELS_COMPILE),
        "layers",
        pytest.param("PeftModel", marks=WHOLE_MODELS_COMPILE),
    ],
)
def test_adapters_of_compiled_models_load_on_the_model_itself(model_folders, tmp_path, part):
    """And the other way round."""
    ids = random_ids()

    def compiled_base():
        base = base_model(model_folders)
        if part == "layers":
            for index, layer in enumerate(base.model.layers):
                base.model.layers[index] = torch.compile(layer, backend="eager")
        return torch.compile(base, backend="eager") if part == "model" else base

    config = RLoraConfig(init_weights=False, target_modules=["gate_proj", "up_proj", "down_proj"])
    model = get_peft_model(compiled_base(), config).eval()
    if part == "PeftModel":
        model = torch.compile(model, backend="eager")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        plain = PeftModel.from_pretrained(base_model(model_folders), tmp_path).eval()
        torch.testing.assert_close(plain(input_ids=ids).logits, expected)
        again = PeftModel.from_pretrained(compiled_base(), tmp_path).eval()
        torch.testing.assert_close(again(input_ids=ids).logits, expected)


def test_other_modules_of_a_compiled_model_are_refused(model_folders):
    compiled = torch.compile(base_model(model_folders), backend="eager")
    for options in ({"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3]}):
        with pytest.raises(ValueError, match="can't be used on a model that was compiled.*`model._orig_mod`"):
            get_peft_model(compiled, RLoraConfig(target_modules=["up_proj"], **options))


def test_the_commit_of_a_base_is_that_of_its_own_cache(tmp_path):
    """`model_init_kwargs` may name another cache, which may have another commit."""
    for folder, commit in (("default", "a" * 40), ("own", "c" * 40)):
        repository = tmp_path / folder / "models--user--base"
        for path, text in (("refs/main", commit), (f"snapshots/{commit}/config.json", "{}")):
            (repository / path).parent.mkdir(parents=True, exist_ok=True)
            (repository / path).write_text(text)
        assert _loaded_commit("user/base", None, str(tmp_path / folder)) == commit
    assert _loaded_commit("user/base", "v2", str(tmp_path / "own")) is None
    assert _loaded_commit(str(tmp_path), None, str(tmp_path / "own")) is None  # a folder has no commit
