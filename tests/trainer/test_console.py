"""What the console shows of the logs, and what trackers get."""

import pytest
from testing_utils import task_datasets
from trainer_utils import make_trainer
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from rlora_trl.trainer.console import (
    TaskPrinterCallback,
    TaskProgressCallback,
    select_for_console,
    shorten_console_logs,
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


def test_evaluation_and_metrics_of_the_user():
    logs = {
        "eval_sst2_loss": 1.0,
        "eval_sst2_accuracy": 0.5,
        "eval_sst2_bleu": 0.3,
        "my_metric": 2,
        "eval_sst2_entropy": 3.0,
        "eval_sst2_num_tokens": 3.0,
        "eval_sst2_runtime": 0.1,
        "eval_sst2_samples_per_second": 9.0,
    }
    assert list(select_for_console(logs, ["sst2"])) == [
        "eval_sst2_loss",
        "eval_sst2_accuracy",
        "eval_sst2_bleu",
        "my_metric",
    ]


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_trackers_get_everything(model_folders, tmp_path, capsys, disable_tqdm):
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
    assert "'first_loss'" in written and "'grad_norm'" not in written and "'router_entropy'" not in written


def test_callbacks_of_the_user_stay(model_folders, tmp_path):
    class Own(ProgressCallback):
        pass

    trainer = make_trainer(model_folders, tmp_path, train=task_datasets(4))
    kinds = TaskProgressCallback | TaskPrinterCallback
    ours = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, kinds)]
    assert len(ours) == 1

    trainer.remove_callback(PrinterCallback if isinstance(ours[0], PrinterCallback) else ProgressCallback)
    assert ours[0] not in trainer.callback_handler.callbacks
    trainer.add_callback(Own())
    shorten_console_logs(trainer, list)
    assert any(type(callback) is Own for callback in trainer.callback_handler.callbacks)
