"""What the console shows of the logs, and what trackers get."""

import pytest
from testing_utils import build_tokenizer, task_datasets
from trainer_utils import arguments, make_trainer
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from rlora_trl import RLoraSFTTrainer
from rlora_trl.trainer.console import (
    TaskPrinterCallback,
    TaskProgressCallback,
    describe_log,
    select_for_console,
)


TRAINING = {
    "loss": 3.9,
    "grad_norm": 3.1,
    "learning_rate": 0.05,
    "balance_loss": 1.0,
    "router_entropy": 1.1,
    "head_load_max": 0.33,
    "head_load_cv": 0.0,
    "head_similarity": 0.4,
    "grad_norm_A": 1.4,
    "entropy": 4.2,
    "mean_token_accuracy": 0.25,
    "num_tokens": 26,
    "first_loss": 4.7,
    "epoch": 0.08,
}


def test_a_step_in_training():
    shown = select_for_console(TRAINING, ["first", "same"])
    assert list(shown) == ["loss", "learning_rate", "head_load_max", "first_loss", "epoch"]


def test_many_tasks_show_those_with_the_highest_losses():
    losses = {f"t{index}_loss": float(index) for index in range(10)}
    shown = select_for_console({"loss": 1.0, **losses}, [f"t{index}" for index in range(10)])
    assert list(shown) == ["loss", *(f"t{index}_loss" for index in range(4, 10))]


def test_losses_of_tasks_with_names_like_other_entries():
    logs = {"loss": 1.0, "balance_loss": 2.0, "aux_loss": 3.0, "entropy": 4.0}
    assert list(select_for_console(logs, ["balance", "aux"])) == ["loss", "balance_loss", "aux_loss"]
    logs = {"eval_balance_loss": 1.0, "eval_balance_runtime": 0.1, "eval_entropy": 2.0}
    assert list(select_for_console(logs, ["balance"])) == ["eval_balance_loss"]


@pytest.mark.parametrize("prefix", ["eval_sst2", "test_sst2", "eval"])
def test_evaluation_and_metrics_of_the_user(prefix):
    own = ("loss", "accuracy", "bleu", "label_entropy", "bleu_runtime")
    speeds = ("runtime", "samples_per_second", "steps_per_second")
    logs = {f"{prefix}_{name}": 0.5 for name in (*own, *speeds)}
    shown = select_for_console({**logs, "my_metric": 2, "eval_entropy": 3.0, "eval_num_tokens": 3}, ["sst2"])
    assert list(shown) == [*(f"{prefix}_{name}" for name in own), "my_metric"]


def test_a_step_is_a_line():
    """Losses by task come last, the highest first, as many as the terminal has room for."""
    tasks = [f"task_{index}" for index in range(6)]
    logs = {"loss": 4.36912, "learning_rate": 1.985e-3, "head_load_max": 0.37142, "epoch": 0.1}
    logs |= {f"{task}_loss": 6.0 - index for index, task in enumerate(tasks)}
    begin = "step 10/60  loss 4.369  lr 0.001985  head_load_max 0.3714  epoch 0.1"
    everything = f"{begin}  by task: " + "  ".join(f"{task} {6 - index}" for index, task in enumerate(tasks))
    assert describe_log(logs, tasks, step=10, max_steps=60, width=200) == everything
    cut = describe_log(logs, tasks, step=10, max_steps=60, width=110)
    assert cut == f"{begin}  by task: task_0 6  task_1 5  +4 tasks" and len(cut) <= 110
    # Not a single task fits.
    assert describe_log(logs, tasks, step=10, max_steps=60, width=75) == begin
    assert describe_log({"loss": 1.0}, (), step=3, max_steps=0, width=85) == "step 3  loss 1"


def test_many_tasks_are_counted():
    tasks = [f"t{index}" for index in range(10)]
    logs = {"loss": 1.0, **{f"{task}_loss": float(index) for index, task in enumerate(tasks)}}
    line = describe_log(logs, tasks, step=1, max_steps=2, width=120)
    assert line == "step 1/2  loss 1  by task: t9 9  t8 8  t7 7  t6 6  t5 5  t4 4  +4 tasks"


def test_losses_of_tasks_in_evaluation_and_long_entries():
    """What is not a loss of a task in training is never left out: it goes to further lines."""
    logs = {f"eval_metric_number_{index}": index / 3 for index in range(8)} | {"note": "a\x1b[2Jb", "skipped_steps": 2}
    lines = describe_log(logs, ["sst2"], step=10, max_steps=60, width=80).splitlines()
    assert lines[0].startswith("step 10/60  eval_metric_number_0 0  eval_metric_number_1 0.3333")
    assert all(len(line) <= 80 for line in lines) and all(line.startswith("  ") for line in lines[1:])
    words = " ".join(lines).split()
    assert words[-4:] == ["note", "a\\x1b[2Jb", "skipped_steps", "2"] and len(words) == 2 * 11


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_trackers_get_everything(model_folders, tmp_path, capsys, monkeypatch, disable_tqdm):
    monkeypatch.setenv("COLUMNS", "160")  # pytest-xdist gives its workers 80

    class Tracker(TrainerCallback):
        logs = None

        def on_log(self, args, state, control, logs=None, **kwargs):
            Tracker.logs = Tracker.logs or dict(logs)

    trainer = make_trainer(
        model_folders, tmp_path, train=task_datasets(8), max_steps=1, logging_steps=1, disable_tqdm=disable_tqdm
    )
    trainer.add_callback(Tracker())
    trainer.train()

    written = "".join(capsys.readouterr())
    assert {"grad_norm", "router_entropy", "first_loss"} <= set(Tracker.logs)
    line = next(line for line in written.replace("\r", "\n").splitlines() if " lr " in line)
    assert line.strip().startswith("step 1/1  loss ") and len(line.strip()) <= 160
    assert "by task: " in line and "first " in line and "grad_norm" not in written and "router_entropy" not in written
    assert "train_loss" in written and "{" not in written


def test_callbacks_of_the_user_stay(model_folders, tmp_path):
    own = ProgressCallback(max_str_len=7)
    trainer = RLoraSFTTrainer(
        model=model_folders["llama"],
        args=arguments(tmp_path, disable_tqdm=False),
        train_dataset=task_datasets(4),
        processing_class=build_tokenizer(),
        callbacks=[own],
    )
    callbacks = trainer.callback_handler.callbacks
    assert any(callback is own for callback in callbacks)
    assert sum(isinstance(callback, TaskProgressCallback) for callback in callbacks) == 1


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_the_callback_is_removed_by_its_class(model_folders, tmp_path, disable_tqdm):
    trainer = make_trainer(model_folders, tmp_path, train=task_datasets(4), disable_tqdm=disable_tqdm)
    trainer.remove_callback(PrinterCallback if disable_tqdm else ProgressCallback)
    kinds = TaskProgressCallback | TaskPrinterCallback
    assert not any(isinstance(callback, kinds) for callback in trainer.callback_handler.callbacks)
