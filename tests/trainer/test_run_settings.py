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


# Settings, and the values of the checkpoint and of the resumed run.
REFUSED = {
    "learning_rate": (0.01, 0.02),
    "router_learning_rate": (None, 0.1),
    "seed": (42, 7),
    "data_seed": (42, 7),
    "mixing": ("proportional", "temperature"),
    "mixing_cap": (None, 10),
    "packing": (False, True),
    "weight_decay": (0.0, 0.1),
    "optim": ("adamw_torch", "adafactor"),
    "optim_args": (None, "a=1"),
}
OTHER_DATA = {
    "length that cuts rows": ({"max_length": 5}, r"this run has \d+ rows"),
    "a stream": ({"train": streams()}, "this run has a stream"),
    "rows": ({"train": task_datasets(20)}, r"this run has 60 rows"),
    "values": ({"train": task_datasets(40, seed=1)}, r"this run has 120 rows"),
}


def test_what_the_checkpoint_decides_is_refused(model_folders, folder):
    with pytest.raises(ValueError, match="was trained with other settings:\n") as raised:
        resume(model_folders, folder, **{name: other for name, (_, other) in REFUSED.items()})
    text = str(raised.value)
    for name, (saved, other) in REFUSED.items():
        assert f"\n  {name}: checkpoint has {saved!r}, this run has {other!r}\n" in text
    assert "Resume with the settings of the checkpoint." in text and "is_trainable=True" in text


@pytest.mark.parametrize("what", OTHER_DATA)
def test_other_data_are_refused(model_folders, folder, what):
    changes, text = OTHER_DATA[what]
    checkpoint = r"training data: checkpoint has 120 rows \(digest \w+\)"
    with pytest.raises(ValueError, match=f"was trained with other settings:\n  {checkpoint}, {text}"):
        resume(model_folders, folder, **changes)


def test_what_makes_no_difference_is_no_difference(model_folders, folder):
    changes = {"max_length": 128, "data_seed": 42, "packing_strategy": "wrapped", "dataset_num_proc": 1}
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


# Settings, and the values of the checkpoint and of the resumed run.
CHANGED = {
    "max_steps": (2, 3),
    "warmup_steps": (0, 2),
    "lr_scheduler_type": ("constant", "polynomial"),
    "lr_scheduler_kwargs": (None, {"power": 2.0}),
    "max_grad_norm": (1.0, 0.5),
    "per_device_train_batch_size": (8, 4),
}


def test_other_changes_are_warned_of_and_recorded(model_folders, folder, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = resume(model_folders, folder, **{name: other for name, (_, other) in CHANGED.items()})
    assert "is resumed from step 2 with changed settings" in caplog.text
    record, card = recorded(trainer), (Path(folder) / "README.md").read_text()
    for name, (saved, other) in CHANGED.items():
        assert f"{name}: checkpoint has {saved!r}, this run has {other!r}" in caplog.text
        if name != "lr_scheduler_kwargs":  # which is not published
            assert record[name] == f"{saved} until step 2, then {other}" and record[name] in card


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
