"""What a save writes, for models that train rows of an embedding or whole modules besides the adapters."""

import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from testing_utils import _DECODER, VOCAB, perturb, random_ids, task_datasets
from trainer_utils import make_trainer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rlora_trl import RLoraConfig
from rlora_trl.files.checks import check_adapter
from rlora_trl.trainer.saving import FullTensors, check_saved


OPTIONS = {
    "tokens": {"trainable_token_indices": [VOCAB]},
    "by_name": {"trainable_token_indices": {"embed_tokens": [VOCAB, 7]}},
    "both": {"trainable_token_indices": {"embed_tokens": [VOCAB, 7], "lm_head": [VOCAB, 8, 9]}},
    "saved_mlp": {"trainable_token_indices": [VOCAB], "modules_to_save": ["o_proj"]},
    "saved_head": {"trainable_token_indices": [VOCAB], "modules_to_save": ["lm_head"]},
    "saved_embedding": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of bases whose embeddings are tied, or not."""
    folders = {}
    for tied in (False, True):
        torch.manual_seed(2)
        folders[tied] = tmp_path_factory.mktemp(f"tied_{tied}")
        LlamaForCausalLM(LlamaConfig(**_DECODER, tie_word_embeddings=tied)).save_pretrained(folders[tied])
    return folders


def load(folder, added=1):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(folder)
    if added:
        model.resize_token_embeddings(VOCAB + added, mean_resizing=False)
    return model


def logits(model):
    ids = random_ids()
    ids[:, 3], ids[:, 5] = VOCAB, 7
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def others(path):
    """Tensors besides those of adapters: shapes by name."""
    tensors = load_file(path / "adapter_model.safetensors")
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if "lora_" not in name}


# PEFT (0.21) can't run a tied head in `modules_to_save` whose embedding has trainable tokens.
CASES = [(name, tied) for name in OPTIONS for tied in (False, True) if (name, tied) != ("saved_head", True)]


@pytest.mark.parametrize(("name", "tied"), CASES)
def test_resized_embeddings_save_and_reload_as_with_lora(bases, tmp_path, name, tied):
    model = get_peft_model(load(bases[tied]), RLoraConfig(task_type="CAUSAL_LM", **OPTIONS[name]))
    perturb(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    check_saved(tmp_path, FullTensors(model), "one process")
    check_adapter(tmp_path)
    # Another row for the new token: the file must bring it.
    reloaded = load(bases[tied])
    with torch.no_grad():
        reloaded.get_input_embeddings().weight[VOCAB] += 1.0
    assert torch.equal(logits(PeftModel.from_pretrained(reloaded, tmp_path)), expected)

    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["up_proj"], **OPTIONS[name])
    get_peft_model(load(bases[tied]), config).save_pretrained(tmp_path / "lora")
    assert others(tmp_path) == others(tmp_path / "lora")


def test_several_adapters(bases, tmp_path):
    model = get_peft_model(load(bases[False]), RLoraConfig(task_type="CAUSAL_LM", trainable_token_indices=[VOCAB]))
    model.add_adapter("second", RLoraConfig(task_type="CAUSAL_LM", trainable_token_indices=[VOCAB, 7]))
    expected = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        perturb(model)
        expected[name] = logits(model)
    model.save_pretrained(tmp_path)
    check_saved(tmp_path, FullTensors(model), "one process")
    for name, folder in (("default", tmp_path), ("second", tmp_path / "second")):
        assert torch.equal(logits(PeftModel.from_pretrained(load(bases[False]), folder)), expected[name])


def test_tokens_of_a_vocabulary_that_was_not_resized(bases, tmp_path):
    model = get_peft_model(load(bases[False], 0), RLoraConfig(task_type="CAUSAL_LM", trainable_token_indices=[7]))
    model.save_pretrained(tmp_path)
    check_saved(tmp_path, FullTensors(model), "one process")
    assert others(tmp_path) == {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": (1, 32)}


def test_trainer_saves_checkpoints_and_the_adapter(bases, tmp_path):
    """Not of a tied base: TRL's loss (1.16) reads the head's bias, which PEFT's wrapper of a tied head lacks."""
    config = RLoraConfig(trainable_token_indices=[VOCAB, 7])
    trainer = make_trainer(
        None,
        tmp_path,
        model=load(bases[False]),
        train=task_datasets(8),
        peft_config=config,
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
    )
    trainer.train()
    trainer.save_model()
    expected = logits(trainer.model)
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        check_adapter(folder)
        assert torch.equal(logits(PeftModel.from_pretrained(load(bases[False]), folder)), expected)


def test_trainer_on_an_offloaded_base(bases, tmp_path):
    """It trains and saves what it does on a base in memory."""
    parts = ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "model.layers.0"]
    device_map = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}
    saved = []
    for offload in (False, True):
        base = load(bases[False], 0)
        if offload:
            base = dispatch_model(base, device_map, main_device="cpu", offload_dir=tmp_path / "offloaded")
        torch.manual_seed(4)
        folder = tmp_path / str(offload)
        trainer = make_trainer(None, folder, model=base, train=task_datasets(8), max_steps=2)
        trainer.train()
        trainer.save_model()
        saved.append(load_file(folder / "adapter_model.safetensors"))
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
