"""Joining the datasets of tasks, and finding the tasks in one."""

import pytest
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value
from testing_utils import task_datasets
from trainer_utils import collect

from rlora_trl.trainer.tasks import join_tasks


def test_dictionary_is_joined_and_shuffled():
    tasks = task_datasets(20)
    joined, names = collect(tasks)
    assert names == ["first", "colour", "same"]
    assert len(joined) == 60
    assert set(joined.column_names) == {"prompt", "completion", "task"}
    assert len(set(joined[:20]["task"])) == 3  # shuffled
    for name, dataset in tasks.items():
        rows = sorted(row["prompt"] for row in joined if row["task"] == name)
        assert rows == sorted(dataset["prompt"])
    again, _ = collect(tasks)
    assert again["prompt"] == joined["prompt"]
    other, _ = collect(tasks, seed=1)
    assert other["prompt"] != joined["prompt"]


def test_column_names_the_tasks():
    joined, _ = collect(task_datasets(5))
    same, names = collect(joined)
    assert same is joined
    assert names == ["colour", "first", "same"]


def test_any_other_data_set_is_left_as_it_is():
    plain = Dataset.from_dict({"text": ["a", "b"]})
    assert collect(plain) == (plain, None)
    assert collect(None) == (None, None)


def test_missing_column():
    plain = Dataset.from_dict({"text": ["a", "b"], "kind": ["x", "y"]})
    with pytest.raises(ValueError, match="`task_column='cluster'` is not a column.*text, kind.*dictionary"):
        collect(plain, task_column="cluster")
    assert collect(plain, task_column="kind")[1] == ["x", "y"]


def test_empty_task():
    tasks = task_datasets(5)
    tasks["empty"] = tasks["first"].select([])
    with pytest.raises(ValueError, match="Task 'empty' has no rows"):
        collect(tasks)
    with pytest.raises(ValueError, match="dictionary without tasks"):
        collect({})


def test_formats_must_agree():
    tasks = {**task_datasets(5), "text": Dataset.from_dict({"text": ["a"]})}
    with pytest.raises(ValueError, match="different formats.*text: text"):
        collect(tasks)
    with pytest.raises(ValueError, match="Task 'odd' has the columns 'question'; accepted are 'prompt' with"):
        collect({"odd": Dataset.from_dict({"question": ["a"]})})


def test_kinds_of_task_columns():
    text = {"text": ["a", "b"]}
    assert collect(Dataset.from_dict({**text, "task": [0, 1]}))[1] == ["0", "1"]
    features = Features({"text": Value("string"), "task": ClassLabel(names=["no", "yes"])})
    assert collect(Dataset.from_dict({**text, "task": [0, 1]}, features=features))[1] == ["no", "yes"]
    with pytest.raises(ValueError, match="can't name tasks"):
        collect(Dataset.from_dict({**text, "kind": [["x"], ["y"]]}), task_column="kind")


def test_masks_are_not_dropped_in_silence():
    tasks = task_datasets(5)
    tasks["first"] = tasks["first"].add_column("completion_mask", [[1]] * 5)
    with pytest.raises(ValueError, match="Task 'first' has a column 'completion_mask' and task 'colour' has not"):
        collect(tasks)


def test_types_are_aligned_or_named():
    tasks = task_datasets(5)
    tasks["same"] = tasks["same"].cast(Features({"prompt": Value("large_string"), "completion": Value("string")}))
    assert len(collect(tasks)[0]) == 15
    chat = [{"role": "user", "content": "hi"}]
    tasks["chat"] = Dataset.from_dict({"prompt": [chat], "completion": [[{"role": "assistant", "content": "x"}]]})
    with pytest.raises(ValueError, match="Tasks 'first' and 'chat' can't be joined"):
        collect(tasks)
    with pytest.raises(ValueError, match="`task_column='prompt'` is a column of the data itself"):
        collect(task_datasets(3), task_column="prompt")


def test_columns_of_tasks_may_differ():
    """`options` of one task must not stop another from joining."""
    tasks = task_datasets(5)
    tasks["first"] = tasks["first"].add_column("options", [["a"]] * 5)
    joined, _ = collect(tasks)
    assert set(joined.column_names) == {"prompt", "completion", "task"}


def test_messages_and_custom_text_column():
    chat = Dataset.from_dict({"messages": [[{"role": "user", "content": "hi"}]]})
    assert "messages" in join_tasks({"a": chat, "b": chat}).column_names
    text = Dataset.from_dict({"body": ["x"]})
    assert "body" in join_tasks({"a": text}, text_column="body").column_names


def test_streams_are_interleaved():
    tasks = {name: dataset.to_iterable_dataset() for name, dataset in task_datasets(6).items()}
    tasks["same"] = tasks["same"].take(3)
    joined, names = collect(tasks)
    assert isinstance(joined, IterableDataset)
    assert names == ["first", "colour", "same"]
    seen = [row["task"] for row in joined]
    assert {name: seen.count(name) for name in names} == {"first": 6, "colour": 6, "same": 3}
    assert set(seen[:3]) == set(names)
    with pytest.raises(TypeError, match="mix streamed and map-style"):
        collect({**task_datasets(3), "stream": tasks["first"]})


def test_wrong_types():
    with pytest.raises(TypeError, match="Task 'a' is a list.*from_list"):
        collect({"a": [{"text": "x"}]})
