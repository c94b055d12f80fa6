"""`RLoraSFTTrainer` on tiny models: what it adds, and all that `SFTTrainer` does still working."""

import json

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file
from testing_utils import build_tokenizer, task_datasets, task_rows
from trainer_utils import adapter_state, arguments, losses, make_trainer
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from rlora_trl import MultiHeadAdapter, RLoraConfig, RLoraSFTConfig, RLoraSFTTrainer


def assert_trains(trainer):
    before = adapter_state(trainer)
    base = {k: v.detach().clone() for k, v in trainer.model.named_parameters() if "rlora_adapters" not in k}
    trainer.train()
    after = adapter_state(trainer)
    for key, value in after.items():
        assert torch.isfinite(value).all(), key
        if not key.endswith((".A0", ".B0")):
            assert not torch.equal(value, before[key]), key
        else:
            assert torch.equal(value, before[key]), key
    for key, value in trainer.model.named_parameters():
        if key in base:
            assert torch.equal(value, base[key]), key
    return losses(trainer)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_thirty_steps_on_three_tasks_lower_the_loss(model_folders, tmp_path, name):
    trainer = make_trainer(model_folders, tmp_path, name)
    history = assert_trains(trainer)
    assert len(history) == 30
    assert sum(history[-5:]) / 5 < 0.75 * sum(history[:5]) / 5


def test_tasks_are_saved_with_the_adapter(model_folders, tmp_path):
    trainer = make_trainer(model_folders, tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["tasks"] == ["first", "colour", "same"]
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == model_folders["llama"]
    assert not list(tmp_path.glob("adapter_model*.bin"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.peft_config["default"].tasks == ["first", "colour", "same"]
    trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "README.md").read_text()
    assert "rlora" in card and "2502.15455" in card


def test_task_column(model_folders, tmp_path):
    rows = [{**row, "kind": task} for task in ("first", "same") for row in task_rows(task, 20)]
    trainer = make_trainer(model_folders, tmp_path, train=Dataset.from_list(rows), task_column="kind", max_steps=2)
    assert trainer.model.peft_config["default"].tasks == ["first", "same"]
    trainer.train()
    with pytest.raises(ValueError, match="not a column"):
        make_trainer(model_folders, tmp_path, train=Dataset.from_list(rows), task_column="missing")


def test_default_configuration_and_argument_types(model_folders, tmp_path):
    plain = SFTConfig(str(tmp_path), bf16=False, report_to="none", max_steps=1, gradient_checkpointing=False)
    trainer = RLoraSFTTrainer(model_folders["llama"], plain, None, task_datasets(8)["first"])
    assert isinstance(trainer.args, RLoraSFTConfig)
    assert trainer.args.eos_token is None and trainer.args.max_steps == 1
    config = trainer.model.peft_config["default"]
    assert isinstance(config, RLoraConfig) and config.tasks is None
    given = RLoraConfig(r=2)
    trainer = make_trainer(model_folders, tmp_path, peft_config=given)
    assert given.tasks is None and given.task_type is None  # copied
    with pytest.raises(TypeError, match="LoraConfig.*trl.SFTTrainer"):
        make_trainer(model_folders, tmp_path, peft_config=LoraConfig())
    lora = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folders["llama"]), LoraConfig(task_type="CAUSAL_LM")
    )
    with pytest.raises(TypeError, match="active adapter is a LoraConfig"):
        make_trainer(model_folders, tmp_path, model=lora)


def test_an_adapter_is_not_replaced_in_silence(model_folders, tmp_path):
    trainer = make_trainer(model_folders, tmp_path, max_steps=1)
    trainer.save_model()
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="loaded through transformers.*is_trainable=True"):
        make_trainer(model_folders, tmp_path / "new", model=by_transformers)
    with pytest.raises(ValueError, match="is an adapter, not a model.*is_trainable=True"):
        make_trainer(model_folders, tmp_path / "new", model=str(tmp_path))
    going_on = AutoPeftModelForCausalLM.from_pretrained(tmp_path, is_trainable=True)
    assert_trains(make_trainer(model_folders, tmp_path / "new", model=going_on, max_steps=2))


def test_given_peft_model_goes_on_training(model_folders, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(model_folders["llama"])
    model = get_peft_model(base, RLoraConfig(task_type="CAUSAL_LM", num_heads=2, tasks=["old"]))
    trainer = RLoraSFTTrainer(
        model,
        arguments(tmp_path, max_steps=3),
        None,
        task_datasets(),
        None,
        build_tokenizer(),
    )
    assert_trains(trainer)
    assert trainer.model.peft_config["default"].tasks == ["old", "first", "colour", "same"]


def test_completion_only_loss(model_folders, tmp_path):
    labels = {}
    for value in (True, False):
        trainer = make_trainer(model_folders, tmp_path, completion_only_loss=value)
        batch = next(iter(trainer.get_train_dataloader()))
        labels[value] = (batch["labels"] != -100).sum().item()
    assert 0 < labels[True] < labels[False]


def chat_rows(count):
    return [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"].strip()},
            ]
        }
        for row in task_rows("first", count)
    ]


def test_assistant_only_loss(model_folders, tmp_path):
    trainer = make_trainer(
        model_folders,
        tmp_path,
        train={"chat": Dataset.from_list(chat_rows(40))},
        assistant_only_loss=True,
        max_steps=3,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    share = (batch["labels"] != -100).float().mean().item()
    assert 0 < share < 0.5
    assert_trains(trainer)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"packing": True, "packing_strategy": "wrapped", "max_length": 16},
        {"packing": True, "packing_strategy": "bfd", "max_length": 16},
        {"padding_free": True, "max_length": None},
        {"shuffle_dataset": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"bf16": True, "use_cpu": True},
        {"neftune_noise_alpha": 5.0},
        {"loss_type": "dft"},
    ],
    ids=lambda kwargs: "-".join(f"{k}={v}" for k, v in kwargs.items())[:60],
)
def test_what_sft_trainer_does(model_folders, tmp_path, kwargs):
    assert_trains(make_trainer(model_folders, tmp_path, max_steps=3, **kwargs))


def test_streaming(model_folders, tmp_path):
    tasks = {name: dataset.to_iterable_dataset() for name, dataset in task_datasets().items()}
    trainer = make_trainer(model_folders, tmp_path, train=tasks, max_steps=3)
    assert_trains(trainer)
    assert trainer.model.peft_config["default"].tasks == ["first", "colour", "same"]


def test_evaluation_by_task(model_folders, tmp_path):
    trainer = make_trainer(
        model_folders, tmp_path, evaluate=task_datasets(6, seed=9), max_steps=4, eval_strategy="steps", eval_steps=2
    )
    trainer.train()
    keys = {key for entry in trainer.state.log_history for key in entry}
    assert {"eval_first_loss", "eval_colour_loss", "eval_same_loss"} <= keys
    assert set(trainer.evaluate(task_datasets(4, seed=3)["first"])) >= {"eval_loss"}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_losses(model_folders, tmp_path, use_reentrant):
    histories = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            model_folders,
            tmp_path,
            max_steps=6,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
        )
        trainer.train()
        histories.append(losses(trainer))
    assert histories[0] == pytest.approx(histories[1], rel=1e-4)


def test_accumulation_gives_the_same_trajectory(model_folders, tmp_path):
    """1 x 8 and 8 x 1, without dropout, whose masks depend on the shape of the batch."""
    states, histories = [], []
    for size, steps in ((8, 1), (1, 8)):
        trainer = make_trainer(
            model_folders,
            tmp_path,
            peft_config=RLoraConfig(head_dropout=0.0),
            max_steps=6,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            learning_rate=1e-3,
        )
        trainer.train()
        histories.append(losses(trainer))
        states.append(adapter_state(trainer))
    assert histories[0] == pytest.approx(histories[1], rel=1e-3)
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-3, atol=1e-4)


def test_same_seed_same_run(model_folders, tmp_path):
    histories = []
    for seed in (1, 1, 2):
        trainer = make_trainer(model_folders, tmp_path, max_steps=4, seed=seed)
        trainer.train()
        histories.append(losses(trainer))
    assert histories[0] == histories[1] != histories[2]


def test_resume_continues_the_trajectory(model_folders, tmp_path):
    full = make_trainer(model_folders, tmp_path / "full", max_steps=8, save_strategy="steps", save_steps=4)
    full.train()
    assert (tmp_path / "full" / "checkpoint-4" / "adapter_model.safetensors").is_file()
    resumed = make_trainer(model_folders, tmp_path / "resumed", max_steps=8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "full" / "checkpoint-4"))
    assert losses(resumed) == losses(full)
    expected = load_file(tmp_path / "full" / "checkpoint-8" / "adapter_model.safetensors")
    resumed.save_model(str(tmp_path / "end"))
    actual = load_file(tmp_path / "end" / "adapter_model.safetensors")
    assert all(torch.equal(actual[key], value) for key, value in expected.items())


def test_bf16_base_keeps_a_float32_adapter(model_folders, tmp_path):
    trainer = make_trainer(model_folders, tmp_path, max_steps=3, model_init_kwargs={"dtype": "bfloat16"})
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    assert_trains(trainer)
    assert any(isinstance(module, MultiHeadAdapter) for module in trainer.model.modules())
