"""What the console shows of the logs, and what trackers get."""

import pytest
from testing_utils import build_tokenizer, task_datasets
from trainer_utils import arguments, make_trainer
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from rlora_trl import RLoraSFTTrainer
from rlora_trl.trainer.console import (
    TaskPrinterCallback,
    TaskProgressCallback,
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
