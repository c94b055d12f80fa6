"""`auto_find_batch_size`: what attempts counted that were given up is not counted."""

import pytest
import torch
from trainer_utils import make_trainer

from rlora_trl import RLoraSFTTrainer


class SmallMemory(RLoraSFTTrainer):
    """Runs out of memory in its third step with more than four rows, after it has counted them."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.batches = [*getattr(self, "batches", []), inputs["attention_mask"].clone()]
        loss = super().training_step(model, inputs, *args, **kwargs)
        if len(inputs["labels"]) > 4 and self.state.global_step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        return loss


@pytest.fixture
def trainer(model_folders, tmp_path):
    options = {"auto_find_batch_size": True, "per_device_train_batch_size": 16, "max_steps": 4, "logging_steps": 4}
    trainer = make_trainer(model_folders, tmp_path, balance_loss="switch", **options)
    trainer.__class__ = SmallMemory
    return trainer


def test_rows_and_tokens_are_those_of_the_run(trainer):
    trainer.train()
    assert len(trainer.batches) > 4 and trainer.state.global_step == 4
    rows = sum(len(mask) for mask in trainer.batches[-4:])
    tokens = sum(int(mask.sum()) for mask in trainer.batches[-4:])
    seen = trainer.tasks_seen()
    assert sum(task["rows"] for task in seen.values()) == rows <= 16
    assert sum(task["tokens"] for task in seen.values()) == tokens
    assert trainer.adapter_record().hyperparameters["per_device_train_batch_size"] == rows // 4
    assert {task.name: task.rows for task in trainer.adapter_record().tasks} == {
        name: task["rows"] for name, task in seen.items()
    }
    monitor = trainer._observer.monitor
    assert int(monitor.step.tokens[0] + monitor.unlogged.tokens[0]) == 0  # all of it was logged
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert log["num_tokens"] == tokens
    assert 0 < log["router_entropy"] <= 1.1 and 1 / 3 <= log["head_load_max"] <= 1


def test_skipped_steps_of_an_attempt_are_not_counted(trainer):
    trainer._observer.nan_guard.skipped = trainer._observer.nan_guard._in_a_row = 5
    trainer.train()
    assert trainer._observer.nan_guard.skipped == 0


def test_a_second_run_counts_from_the_beginning(model_folders, tmp_path):
    trainer = make_trainer(model_folders, tmp_path, max_steps=2, per_device_train_batch_size=4)
    for _ in range(2):
        trainer.train()
        assert sum(task["rows"] for task in trainer.tasks_seen().values()) == 8
