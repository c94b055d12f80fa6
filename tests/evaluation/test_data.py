"""Data sets by file, folder and split, and their rows by task."""

import json
from unittest import mock

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from rlora_trl.evaluation import data
from rlora_trl.evaluation.data import is_scorable, load_splits, load_task_rows, rows_by_task


ROWS = [{"prompt": f"p{i}", "completion": f" c{i}", "task": ("b", "a")[i % 2]} for i in range(6)]


@pytest.fixture
def folder(tmp_path):
    for split, rows in (("train", ROWS), ("test", ROWS[:2])):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_files_are_one_split(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    getattr(Dataset.from_list(ROWS), {"jsonl": "to_json"}.get(kind, f"to_{kind}"))(path)
    splits = load_splits(str(path), file_split="mine")
    assert {name: data.to_list() for name, data in splits.items()} == {"mine": ROWS}


def test_data_that_are_nowhere(monkeypatch):
    # Without a network the library raises an error of the connection.
    monkeypatch.setattr(data, "load_dataset", mock.Mock(side_effect=ConnectionError("can't be reached")))
    with pytest.raises(FileNotFoundError, match="There is no file or folder words here, .* can't be reached"):
        load_splits("words")


def test_split_of_a_folder(folder):
    assert load_task_rows(str(folder)) == {"b": [ROWS[0]], "a": [ROWS[1]]}
    assert len(load_task_rows(str(folder), split="train")["a"]) == 3
    (folder / "test.jsonl").unlink()
    assert len(load_task_rows(str(folder))["a"]) == 3


def test_which_split_must_be_clear(folder):
    (folder / "test.jsonl").rename(folder / "validation.jsonl")
    with pytest.raises(ValueError, match='has no split "test"; it has train, validation. Name one'):
        load_task_rows(str(folder))


def test_rows_by_task_names_classes_and_counts():
    features = Features({"kind": ClassLabel(names=["yes", "no"]), "value": Value("int64")})
    data = Dataset.from_list([{"kind": i % 2, "value": i} for i in range(5)], features=features)
    rows = rows_by_task(data, "kind", limit=2)
    assert {task: [row["value"] for row in rows] for task, rows in rows.items()} == {"yes": [0, 2], "no": [1, 3]}
    assert list(rows_by_task(data, "value")) == ["0", "1", "2", "3", "4"]


def test_rows_without_a_task_are_of_one(tmp_path):
    path = tmp_path / "words.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": row["prompt"], "completion": row["completion"]}) for row in ROWS))
    assert {task: len(rows) for task, rows in load_task_rows(str(path), limit=4).items()} == {"words": 4}
    assert list(load_task_rows(str(path), default_task="mine")) == ["mine"]
    with pytest.raises(ValueError, match="no column 'task' to name tasks; it has prompt, completion"):
        load_task_rows(str(path), task_column="task")


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/no/such/folder"])
def test_paths_to_nothing(name):
    with pytest.raises(FileNotFoundError, match="There is no data at"):
        load_splits(name)


def test_what_can_be_scored():
    assert is_scorable(Dataset.from_list(ROWS))
    assert not is_scorable(Dataset.from_list([{"text": "a"}]))
    assert not is_scorable(Dataset.from_list([{"prompt": [{"role": "user"}], "completion": [{"role": "assistant"}]}]))
    assert not is_scorable(Dataset.from_list(ROWS).to_iterable_dataset())
