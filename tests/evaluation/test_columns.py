"""Columns of datasets whose rows are not in the order in which they are stored."""

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value, concatenate_datasets

from rlora_trl.evaluation.columns import add_column, by_row, encode, encode_tasks


ROWS = [{"task": ("b", "a", None)[number % 3], "number": number} for number in range(12)]
ORDERS = {
    "stored": lambda data: data,
    "shuffled": lambda data: data.shuffle(seed=0),
    "filtered": lambda data: data.filter(lambda row: row["number"] != 4, keep_in_memory=True),
    "few": lambda data: data.select([7, 2]),
    "repeated": lambda data: data.select([3, 0, 3, 8, 8, 8]),
    "slice": lambda data: data.select(range(4, 9)),
    "none": lambda data: data.select([]),
    "joined": lambda data: concatenate_datasets([data.select([5, 1]), data.shuffle(seed=1)]),
    "formatted": lambda data: data.shuffle(seed=0).with_format("numpy"),
}


@pytest.fixture(params=ORDERS)
def dataset(request):
    return ORDERS[request.param](Dataset.from_list(ROWS))


def test_values_are_those_of_the_rows(dataset):
    rows = dataset.with_format(None)[:]
    assert by_row(dataset, ["number"], lambda numbers: numbers).tolist() == rows["number"]
    values, numbers = encode(dataset, "task")
    assert [values[number] for number in numbers] == rows["task"]
    assert values == list(dict.fromkeys(rows["task"]))  # in the order in which they occur


def test_a_column_is_added_in_the_order_of_the_rows(dataset):
    plain = dataset.with_format(None)
    wanted = {**plain[:], "squares": [number**2 for number in plain["number"]]}
    added = add_column(dataset, "squares", np.asarray(wanted["squares"], dtype=np.int64))
    assert added[:] == wanted and added.features == {**dataset.features, "squares": Value("int64")}
    assert added.split == dataset.split and "squares" not in dataset.column_names


def test_a_column_is_added_without_a_copy_of_the_others(monkeypatch):
    """Which takes 45 s for a million rows."""
    dataset = Dataset.from_list(ROWS).shuffle(seed=0)
    monkeypatch.delattr(Dataset, "flatten_indices")
    added = add_column(dataset, "one", np.ones(12, dtype=np.int64))
    again = add_column(dataset, "one", np.ones(12, dtype=np.int64))
    other = add_column(Dataset.from_list(ROWS).shuffle(seed=1), "one", np.ones(12, dtype=np.int64))
    # Cached results are those of the same rows in the same order.
    assert added._fingerprint == again._fingerprint != other._fingerprint != dataset._fingerprint


def test_names_of_tasks():
    features = Features({"task": ClassLabel(names=["x", "y"])})
    names, numbers = encode_tasks(Dataset.from_dict({"task": [1, 0, 1]}, features=features), "task")
    assert [names[number] for number in numbers] == ["y", "x", "y"]
    with pytest.raises(ValueError, match="2 rows have no task in column 'task'"):
        encode_tasks(Dataset.from_dict({"task": [1, -1, None]}, features=features), "task")
