"""The data of tasks without a trainer."""

import numpy as np
import pytest
from datasets import Dataset
from testing_utils import task_datasets
from trainer_utils import arguments

from rlora_trl import RLoraConfig
from rlora_trl.trainer.samplers import MixtureSampler
from rlora_trl.trainer.task_data import TaskData, name_tasks_of_adapter
from rlora_trl.trainer.task_ids import TASK_IDS


def make(tmp_path, config=None, is_new=True, **kwargs):
    config = RLoraConfig() if config is None else config
    return TaskData(arguments(tmp_path, **kwargs), config, is_new=is_new, labels_are_used=True)


def tokenize(dataset, args, packing):
    """In place of TRL's preparation."""
    return dataset.map(lambda row: {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]})


def prepared(data, joined, name="train", packing=False):
    return data.prepare(joined, name, data._args, packing, any_format=False, prepare=tokenize)


def test_tasks_are_joined_numbered_and_drawn(tmp_path):
    config = RLoraConfig()
    data = make(tmp_path, config, mixing="equal")

    joined = data.join(task_datasets(6), any_format=False)
    train, _ = data.settle(prepared(data, joined), None, came_prepared=False)

    assert data.names == ["first", "colour", "same"] == config.tasks
    assert np.bincount(train[TASK_IDS][:]).tolist() == [6, 6, 6]
    assert data.mixture.draws == {"first": 6, "colour": 6, "same": 6}
    assert isinstance(data.sampler, MixtureSampler) and len(data.sampler) == 18


def test_training_data_may_be_copied_before_they_are_prepared(tmp_path):
    """As by a subclass that filters rows in `_prepare_dataset`; evaluation data may be called "train" too."""
    data = make(tmp_path, mixing="equal")
    copied = data.join(task_datasets(6), any_format=False).select(range(15))

    train = prepared(data, copied)
    prepared(data, data.number_evaluation(task_datasets(2)["same"]))
    data.settle(train, None, came_prepared=False)
    assert data.mixture.draws == {"first": 5, "colour": 5, "same": 5}


def test_training_data_that_are_not_prepared_are_refused(tmp_path):
    """As by a TRL with another name for them: without the check the mixture would be lost."""
    data = make(tmp_path, mixing="equal")
    train = prepared(data, data.join(task_datasets(6), any_format=False), name="training")
    with pytest.raises(RuntimeError, match="did not prepare the training data under the name 'train'"):
        data.settle(train, None, came_prepared=False)


def test_evaluation_data_get_the_ids_of_training(tmp_path):
    data = make(tmp_path)
    data.join(task_datasets(4), any_format=False)

    numbered = data.number_evaluation(data.split_evaluation({"same": task_datasets(2)["same"], "other": None}))

    assert numbered["same"][TASK_IDS][:] == [2, 2] and numbered["other"] is None


def test_rows_are_sampled_from_each_task(tmp_path):
    data = make(tmp_path)
    joined = data.join(task_datasets(9), any_format=False)
    train, _ = data.settle(prepared(data, joined), None, came_prepared=False)

    assert sorted(data.sample_rows(train, 2)[TASK_IDS][:]) == [0, 0, 1, 1, 2, 2]
    assert data.sample_rows(train, 0) is None
    assert data.sample_rows(Dataset.from_list([{"text": "5"}]), 2) is None


def test_tasks_of_a_trained_adapter_come_first():
    config = RLoraConfig(tasks=["old"])
    assert name_tasks_of_adapter(config, ["new", "old"], is_new=False) == ["old", "new"]
    with pytest.raises(ValueError, match="has head weights for each of its tasks \\(old\\).*has new too"):
        name_tasks_of_adapter(RLoraConfig(tasks=["old"], router="task"), ["new"], is_new=False)
