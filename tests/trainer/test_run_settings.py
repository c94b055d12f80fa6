"""A resumed run is trained as its checkpoint says, or names what changes; its record has what was really the case."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, IterableDataset, List, Value
from testing_utils import task_datasets, task_rows
from trainer_utils import make_trainer

from rlora_trl import RLoraConfig, RLoraSFTConfig
from rlora_trl.trainer.run_settings import RunSettings, describe_data
from rlora_trl.trainer.task_ids import TASK_IDS


STEPS = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "mixture_rows": 0, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def run(model_folders, tmp_path_factory):
    """A folder with checkpoints of two steps."""
    folder = tmp_path_factory.mktemp("run")
    make_trainer(model_folders, folder, **STEPS).train()
    return folder


@pytest.fixture
def folder(run, tmp_path):
    return shutil.copytree(run, tmp_path / "out")


def resume(model_folders, folder, checkpoint=2, **changes):
    trainer = make_trainer(model_folders, folder, **{**STEPS, **changes})
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{checkpoint}"))
    return trainer


def recorded(trainer):
    trainer.save_model()
    return json.loads((Path(trainer.args.output_dir) / "rlora_record.json").read_text())["hyperparameters"]


def streams():
    return {name: data.to_iterable_dataset() for name, data in task_datasets().items()}


OTHER_DATA = {
    "rows": task_datasets(20),
    "values": task_datasets(40, seed=1),
}
DATA = r"training data: checkpoint has 120 rows \(digest \w+\)"
REFUSED = {
    "learning_rate": ({"learning_rate": 0.02}, "learning_rate: checkpoint has 0.01, this run has 0.02"),
    "seed": ({"seed": 7}, "seed: checkpoint has 42, this run has 7"),
    "data_seed": ({"data_seed": 7}, "data_seed: checkpoint has 42, this run has 7"),
    "mixing": ({"mixing": "equal"}, "mixing: checkpoint has 'proportional', this run has 'equal'"),
    "mixing_cap": ({"mixing_cap": 10}, "mixing_cap: checkpoint has None, this run has 10"),
    "weight_decay": ({"weight_decay": 0.1}, "weight_decay: checkpoint has 0.0, this run has 0.1"),
    "optim": ({"optim": "adafactor"}, "optim: checkpoint has 'adamw_torch.*', this run has 'adafactor'"),
    "router": ({"router_learning_rate": 0.1}, "router_learning_rate: checkpoint has None, this run has 0.1"),
    "packing": ({"packing": True}, "packing: checkpoint has False, this run has True"),
    "length that cuts rows": (
        {"max_length": 5},
        r"training data: checkpoint has \d+ rows \(digest \w+\), this run has \d+",
    ),
    "optim_args": ({"optim_args": "a=1"}, "optim_args: checkpoint has None, this run has 'a=1'"),
    "a stream": (
        {"train": streams()},
        r"training data: checkpoint has 120 rows \(digest \w+\), this run has a stream",
    ),
    **{f"data: {name}": ({"train": data}, f"{DATA}, this run has \\d+") for name, data in OTHER_DATA.items()},
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_checkpoint_decides_is_refused(model_folders, folder, what):
    changes, text = REFUSED[what]
    with pytest.raises(ValueError, match=f"was trained with other settings:\n(.*\n)*  {text}"):
        resume(model_folders, folder, **changes)


def test_all_differences_are_named_and_what_to_do(model_folders, folder):
    with pytest.raises(ValueError) as raised:
        resume(model_folders, folder, learning_rate=0.02, seed=7, mixing="equal")
    text = str(raised.value)
    assert all(name in text for name in ("learning_rate:", "seed:", "mixing:"))
    assert "Resume with the settings of the checkpoint." in text and "is_trainable=True" in text


SAME = [{"max_length": 128}, {"data_seed": 42}, {"packing_strategy": "wrapped"}, {"dataset_num_proc": 1}]


@pytest.mark.parametrize("changes", SAME)
def test_what_makes_no_difference_is_no_difference(model_folders, folder, changes):
    assert resume(model_folders, folder, **changes).state.global_step == 2


def test_other_tasks_of_the_same_rows_are_refused(model_folders, tmp_path):
    rows = [row for task in ("first", "same") for row in task_rows(task, 12)]
    options = {**STEPS, "peft_config": RLoraConfig(router="task", tasks=["a", "b"])}
    for names in ("ab", "ba"):
        data = Dataset.from_list([{**row, "task": names[i % 2]} for i, row in enumerate(rows)])
        trainer = make_trainer(model_folders, tmp_path, train=data, **options)
        if names == "ab":
            trainer.train()
    with pytest.raises(ValueError, match="training data: checkpoint has 24 rows"):
        trainer.train(resume_from_checkpoint=True)


CHANGED = {
    "lr_scheduler_kwargs": (
        {"max_steps": 3, "lr_scheduler_kwargs": {"power": 2.0}, "lr_scheduler_type": "polynomial"},
        "lr_scheduler_kwargs: checkpoint has None, this run has {'power': 2.0}",
        None,
    ),
    "max_steps": ({"max_steps": 3}, "max_steps: checkpoint has 2, this run has 3", "2 until step 2, then 3"),
    "warmup_steps": ({"max_steps": 3, "warmup_steps": 2}, "warmup_steps: checkpoint has 0", "0 until step 2, then 2"),
    "lr_scheduler_type": (
        {"max_steps": 3, "lr_scheduler_type": "linear"},
        "lr_scheduler_type: checkpoint has 'constant', this run has 'linear'",
        "constant until step 2, then linear",
    ),
    "max_grad_norm": (
        {"max_steps": 3, "max_grad_norm": 0.5},
        "max_grad_norm: checkpoint has 1.0",
        "1.0 until step 2, then 0.5",
    ),
    "per_device_train_batch_size": (
        {"max_steps": 3, "per_device_train_batch_size": 4},
        "per_device_train_batch_size: checkpoint has 8, this run has 4",
        "8 until step 2, then 4",
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_other_changes_are_warned_of_and_recorded(model_folders, folder, caplog, name):
    changes, text, record = CHANGED[name]
    with caplog.at_level(logging.WARNING):
        trainer = resume(model_folders, folder, **changes)
    assert "is resumed from step 2 with other settings" in caplog.text and text in caplog.text
    if record is None:  # not one that is published
        return
    assert recorded(trainer)[name] == record
    assert record in (Path(folder) / "README.md").read_text()


def test_a_change_without_a_step_leaves_the_record_alone(model_folders, folder, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = resume(model_folders, folder, max_grad_norm=0.5)
    assert trainer.state.global_step == 2 and "max_grad_norm" in caplog.text
    assert recorded(trainer)["max_grad_norm"] == 1.0


def test_two_changes(model_folders, folder):
    resume(model_folders, folder, max_steps=3, max_grad_norm=0.5)
    trainer = resume(model_folders, folder, checkpoint=3, max_steps=4, max_grad_norm=0.25)
    assert recorded(trainer)["max_grad_norm"] == "1.0 until step 2, then 0.5 until step 3, then 0.25"
    # And back to where it branched off.
    shutil.rmtree(folder / "checkpoint-4")
    trainer = resume(model_folders, folder, checkpoint=1, max_steps=2)
    assert recorded(trainer)["max_grad_norm"] == 1.0


def test_the_same_run_is_silent(model_folders, folder, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = resume(model_folders, folder, checkpoint=1)
    assert "other settings" not in caplog.text
    assert recorded(trainer)["learning_rate"] == 0.01


def test_more_epochs_of_packed_mixtures_are_the_same_data(model_folders, tmp_path, caplog):
    options = {
        "packing": True,
        "mixing": "equal",
        "max_steps": -1,
        "max_length": 32,
        "save_strategy": "epoch",
    }
    make_trainer(model_folders, tmp_path, **{**STEPS, **options, "num_train_epochs": 1}).train()
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    step = int(checkpoint.name.rpartition("-")[2])
    with caplog.at_level(logging.WARNING):
        trainer = resume(model_folders, tmp_path, step, **options, num_train_epochs=2)
    assert trainer.state.global_step > step and "num_train_epochs: checkpoint has 1, this run has 2" in caplog.text


def test_checkpoints_of_earlier_versions_are_not_compared(model_folders, folder):
    path = folder / "checkpoint-2" / "rlora_state.json"
    state = json.loads(path.read_text())
    del state["runs"]
    path.write_text(json.dumps(state))
    trainer = resume(model_folders, folder, max_steps=3, learning_rate=0.02)
    assert trainer.state.global_step == 3


def test_an_adapter_that_is_not_trained_further_keeps_its_settings(model_folders, folder):
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(folder / "checkpoint-2", is_trainable=True)
    trainer = make_trainer(
        model_folders, folder / "new", model=model, **{**STEPS, "learning_rate": 0.5, "max_steps": 1}
    )
    assert recorded(trainer)["learning_rate"] == 0.01
    trainer.train()
    assert recorded(trainer)["learning_rate"] == 0.5


def test_values_over_time():
    settings = RunSettings()
    for step, seed in ((0, 1), (5, 1), (7, 2), (9, 1)):
        args = RLoraSFTConfig("out", seed=seed, bf16=False, report_to="none")
        settings.begin(step, args, None, settings.parts)
    assert settings.recorded(12)["seed"] == "1 until step 7, then 2 until step 9, then 1"
    assert settings.recorded(9)["seed"] == "1 until step 7, then 2"
    assert settings.recorded(5)["seed"] == 1
    for step in range(13, 60, 3):
        args = RLoraSFTConfig("out", seed=step, bf16=False, report_to="none")
        settings.begin(step, args, None, settings.parts)
    assert settings.recorded(60)["seed"] == "58 since step 58, others before"


def test_description_of_data():
    rows = [{"input_ids": [i, 2], "labels": [i, 2], "note": str(i)} for i in range(100)]
    data = Dataset.from_list(rows)
    same = describe_data(data)
    assert same["rows"] == 100 and describe_data(Dataset.from_list(rows)) == same
    assert describe_data(data.with_format("torch")) == same
    assert describe_data(data.map(lambda row: {"note": "other"})) == same  # what is not trained on
    assert describe_data(data.select(range(99))) != same
    assert describe_data(data.select(np.arange(99, -1, -1))) != same
    assert describe_data(data, 50)["rows"] == 50
    changed = Dataset.from_list([*rows[:37], {**rows[37], "labels": [1, 2]}, *rows[38:]])
    assert describe_data(changed) != same
    tasks = [data.add_column(TASK_IDS, np.arange(100) % 2), data.add_column(TASK_IDS, np.arange(1, 101) % 2)]
    assert describe_data(tasks[0]) != describe_data(tasks[1])
    assert describe_data(data.cast_column("input_ids", List(Value("int32")))) == same
    assert describe_data(data.shuffle(seed=0).flatten_indices()) == describe_data(data.shuffle(seed=0))
    assert describe_data(data.with_transform(lambda batch: batch)) is None
    assert describe_data(IterableDataset.from_generator(lambda: iter(rows))) is None
    assert describe_data(Dataset.from_list([{"text": "a"}]))["rows"] == 1
