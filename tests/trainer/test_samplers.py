"""The rows that an epoch draws, and data loaders that draw them."""

from collections import Counter

import numpy as np
import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from datasets.arrow_dataset import Column
from torch.utils.data import DataLoader
from trainer_utils import rows_of

from rlora_trl.trainer import samplers
from rlora_trl.trainer.samplers import MixtureSampler


# Tasks of 2, 5 and 11 rows, out of order. Of one epoch, task 0 gets more than its rows, 1 as many, and 2 fewer.
TASK_OF_ROW = [2, 0, 1, 2, 2, 1, 2, 2, 0, 2, 2, 1, 2, 1, 2, 2, 1, 2]
DRAWS = [5, 5, 4]


def order(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


def test_each_epoch_draws_what_it_should():
    sampler = MixtureSampler(TASK_OF_ROW, DRAWS, seed=3)
    assert len(sampler) == 14
    for epoch in range(5):
        drawn = order(sampler, epoch)
        assert Counter(TASK_OF_ROW[row] for row in drawn) == {0: 5, 1: 5, 2: 4}
    # Task 1 draws as many rows as it has: all of them, each once.
    assert sorted(row for row in drawn if TASK_OF_ROW[row] == 1) == [2, 5, 11, 13, 16]


def test_rows_are_used_evenly_over_epochs():
    sampler = MixtureSampler(TASK_OF_ROW, DRAWS, seed=0)
    used = np.zeros(len(TASK_OF_ROW), dtype=int)
    for epoch in range(24):
        np.add.at(used, order(sampler, epoch), 1)
        for task, draws in enumerate(DRAWS):
            counts = used[np.array(TASK_OF_ROW) == task]
            assert counts.sum() == (epoch + 1) * draws
            assert counts.max() - counts.min() <= 1


def test_tasks_are_shuffled_among_each_other():
    """Runs of one task are as short as in a random order, in which half of all neighbors differ."""
    drawn = order(MixtureSampler([0] * 500 + [1] * 500, [500, 500], seed=0), 0)
    changes = sum((a < 500) != (b < 500) for a, b in zip(drawn, drawn[1:], strict=False))
    assert 420 < changes < 580  # 5 standard deviations


def test_draws_depend_on_seed_and_epoch_alone():
    sampler = MixtureSampler(TASK_OF_ROW, DRAWS, seed=7)
    epochs = [order(sampler, epoch) for epoch in range(4)]
    torch.manual_seed(5)
    np.random.seed(5)
    again = MixtureSampler(np.array(TASK_OF_ROW), DRAWS, seed=7)
    assert [order(again, epoch) for epoch in (3, 1, 0, 2)] == [epochs[epoch] for epoch in (3, 1, 0, 2)]
    assert len(set(map(tuple, epochs))) == 4
    assert order(MixtureSampler(TASK_OF_ROW, DRAWS, seed=8), 0) != epochs[0]
    # Neither does drawing move the global generators.
    assert torch.initial_seed() == 5
    assert np.random.get_state()[1][0] == 5 and np.random.get_state()[2] == 624


def test_without_set_epoch_it_stays_in_epoch_0():
    sampler = MixtureSampler(TASK_OF_ROW, DRAWS)
    assert list(sampler) == list(sampler) == order(sampler, 0)


def test_epochs_are_reached_without_replaying(monkeypatch):
    """Epoch 10 million of a task that draws all 1000 rows makes one permutation of its rows, not 10 million."""
    sampler = MixtureSampler([0] * 1000, [1000])
    made = []
    generator = samplers._generator
    monkeypatch.setattr(samplers, "_generator", lambda seed, *key: made.append(key) or generator(seed, *key))
    assert sorted(order(sampler, 10_000_000)) == list(range(1000))
    assert made == [(0, 0, 10_000_000), (1, 10_000_000)]


def test_task_that_is_not_drawn():
    sampler = MixtureSampler([0, 1, 0], [2, 0, 0])
    assert sorted(sampler) == [0, 2]


def test_arguments_of_the_sampler_are_checked():
    with pytest.raises(ValueError, match="`task_of_row` has task 3, and `draws` has 3 tasks"):
        MixtureSampler([0, 3], [1, 1, 1])
    with pytest.raises(ValueError, match="`task_of_row` has task -1"):
        MixtureSampler([-1], [1])
    with pytest.raises(ValueError, match="`draws\\[1\\]` is 2, and the task has 0 rows"):
        MixtureSampler([0, 0], [1, 2])
    with pytest.raises(ValueError, match="`draws\\[0\\]` is -1, and the task has 1 rows. Draw 0 or more"):
        MixtureSampler([0], [-1])
    with pytest.raises(ValueError, match="`draws` is all zeros; at least one task must be sampled"):
        MixtureSampler([0], [0])
    with pytest.raises(ValueError, match="`seed` must be 0 or more, got -1"):
        MixtureSampler([0], [1], seed=-1)
    with pytest.raises(ValueError, match="`epoch` must be 0 or more, got -2"):
        MixtureSampler([0], [1]).set_epoch(-2)


# Data loaders


def loader(sampler):
    return DataLoader(torch.arange(len(TASK_OF_ROW)), batch_size=2, sampler=sampler)


def test_accelerate_sets_the_epoch():
    sampler = MixtureSampler(TASK_OF_ROW, DRAWS)
    expected = [order(sampler, epoch) for epoch in range(3)]
    sampler.set_epoch(0)
    prepared = Accelerator(cpu=True).prepare(loader(sampler))
    assert [rows_of(prepared, epoch) for epoch in (2, 0, 1)] == [expected[2], expected[0], expected[1]]
    # Without `set_epoch`, it counts its iterations.
    assert [row for batch in prepared for row in batch.tolist()] == expected[2]


def test_resume_takes_the_rest_of_the_epoch():
    sampler = MixtureSampler(TASK_OF_ROW, DRAWS)
    expected = order(sampler, 2)
    prepared = Accelerator(cpu=True).prepare(loader(MixtureSampler(TASK_OF_ROW, DRAWS)))
    # The order of transformers.Trainer: skip, then set the epoch.
    assert rows_of(skip_first_batches(prepared, 3), 2) == expected[6:]


def test_processes_share_an_epoch():
    Accelerator(cpu=True)
    expected = order(MixtureSampler(TASK_OF_ROW, DRAWS), 1)
    batches = [expected[i : i + 2] for i in range(0, 14, 2)]
    for index in range(2):
        sampler = MixtureSampler(TASK_OF_ROW, DRAWS)
        prepared = prepare_data_loader(loader(sampler), num_processes=2, process_index=index, even_batches=False)
        own = batches[index:6:2] + (batches[6:] if index == 0 else [])
        assert rows_of(prepared, 1) == sum(own, [])
        # What the note of `MixtureSampler` asks for; without it this is epoch 0.
        sampler.set_epoch(0)
        prepared.set_sampler(sampler)
        assert rows_of(skip_first_batches(prepared, 2), 1) == sum(own[2:], [])


def test_a_column_is_not_read_row_by_row(monkeypatch):
    """Which takes 14 s for a million rows."""
    column = Dataset.from_dict({"task": [0, 1] * 20}).shuffle(seed=0)["task"]
    wanted = list(MixtureSampler(list(column), [5, 10]))
    monkeypatch.delattr(Column, "__iter__")
    assert list(MixtureSampler(column, [5, 10])) == wanted
