"""What may name a task: the same in dictionaries, columns, configurations and task ids. Splits are no tasks."""

import enum
import re
from datetime import datetime

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, Json, Value
from peft import AutoPeftModelForCausalLM, get_peft_model
from testing_utils import TINY_MODELS, random_ids, task_datasets, task_rows
from trainer_utils import collect, make_trainer

from rlora_trl import RLoraConfig, mix_tasks
from rlora_trl.files.checks import check_adapter
from rlora_trl.trainer.task_evaluation import split_by_task
from rlora_trl.trainer.task_ids import TASK_IDS
from rlora_trl.trainer.tasks import join_tasks, label_tasks, tasks_in
from rlora_trl.tuner.task_names import MAX_TASK_NAME, task_name


class Kind(enum.StrEnum):
    QA = "qa"


# Keys that name no task: the kind of the error and what it says.
REFUSED = {
    "empty": ("", ValueError, "it is blank"),
    "blank": (" \t", ValueError, "it is blank"),
    "none": (None, TypeError, "None \\(NoneType\\) can't name a task"),
    "tuple": (("glue", "rte"), TypeError, "\\('glue', 'rte'\\) \\(tuple\\) can't name a task"),
    "true": (True, TypeError, "True \\(bool\\)"),
    "numpy_true": (np.bool_(True), TypeError, "can't name a task"),
    "float": (1.0, TypeError, "1.0 \\(float\\)"),
    "nan": (float("nan"), TypeError, "nan \\(float\\)"),
    "bytes": (b"rte", TypeError, "b'rte' \\(bytes\\)"),
    "surrogate": ("rte\ud800", ValueError, "half a character"),
    "long": ("x" * (MAX_TASK_NAME + 1), ValueError, "513 characters.*at most 512"),
}
ACCEPTED = {
    "int": (3, "3"),
    "numpy_int": (np.int64(3), "3"),
    "numpy_text": (np.str_("rte"), "rte"),
    "enum": (Kind.QA, "qa"),
    "slash": ("super/glue/../rte", "super/glue/../rte"),
    "line_break": ("two\nlines\t", "two\nlines\t"),
    "other_script": ("情感 é", "情感 é"),
    "longest": ("x" * MAX_TASK_NAME, "x" * MAX_TASK_NAME),
}


def rows(count=8):
    return Dataset.from_list(task_rows("first", count))


@pytest.mark.parametrize("case", REFUSED)
def test_keys_that_name_no_task(model_folders, tmp_path, case):
    key, kind, message = REFUSED[case]
    with pytest.raises(kind, match=f"`train_dataset` has a key that can't be used.*{message}"):
        make_trainer(model_folders, tmp_path, train={"a": rows(), key: rows()})
    for join in (join_tasks, label_tasks, mix_tasks):
        with pytest.raises(kind, match=message):
            join({"a": rows(), key: rows()})
    with pytest.raises(kind, match=f"`eval_dataset` has a key.*{message}"):
        split_by_task({key: rows()}, "task")
    streams = {"a": rows().to_iterable_dataset(), key: rows().to_iterable_dataset()}
    with pytest.raises(kind, match=message):
        make_trainer(model_folders, tmp_path, train=streams, mixing="equal")
    with pytest.raises((TypeError, ValueError), match="`tasks` "):
        RLoraConfig(tasks=["a", key])


@pytest.mark.parametrize("case", ACCEPTED)
def test_keys_become_their_text(case):
    key, name = ACCEPTED[case]
    assert task_name(key) == name and type(task_name(key)) is str
    assert {row["task"] for row in join_tasks({key: rows(1)})} == {name}
    assert list(split_by_task({key: rows(1)}, "task")) == [name]


def test_what_trains_loads_again(model_folders, tmp_path):
    names = [name for case, (_, name) in ACCEPTED.items() if case != "numpy_int"]
    keys = [key for case, (key, _) in ACCEPTED.items() if case != "numpy_int"]
    trainer = make_trainer(
        model_folders,
        tmp_path,
        train={key: rows(4) for key in keys},
        evaluate={key: rows(2) for key in keys},
        peft_config=RLoraConfig(router="task"),
        max_steps=-1,
        num_train_epochs=1,
    )
    trainer.train()
    assert trainer.tasks_seen().keys() == set(names)
    assert {counts["rows"] for counts in trainer.tasks_seen().values()} == {4}
    assert {f"eval_{name}_loss" for name in names} <= set(trainer.evaluate())
    trainer.save_model()
    trainer.create_model_card(model_name="tiny")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.peft_config["default"].tasks == names == check_adapter(tmp_path).config.tasks
    for name in names:
        loaded.set_task(name)


def with_tasks(values, feature=None):
    features = Features({"text": Value("string"), "task": feature}) if feature else None
    return Dataset.from_dict({"text": ["x"] * len(values), "task": values}, features=features)


@pytest.mark.parametrize(
    ("values", "feature"), [(["a", None], None), (["a", " "], None), ([0, -1], ClassLabel(names=["a", "b"]))]
)
def test_rows_without_a_task_among_others_that_have_one(values, feature):
    dataset = with_tasks(values, feature)
    for use in (collect, lambda data: split_by_task(data, "task")):
        with pytest.raises(ValueError, match="1 rows have no task in column 'task', the first is row 2"):
            use(dataset)


NO_TASKS = {
    "truth": ([True, False], None, "has values of the type Value\\('bool'\\)"),
    "float": ([1.0, float("nan")], None, "has values of the type Value\\('float64'\\)"),
    "time": ([datetime(2020, 1, 1)] * 2, None, "has values of the type Value\\('timestamp"),
    "bytes": ([b"a", b"b"], None, "has values of the type Value\\('binary'\\)"),
    "mixed": ([1, "a"], Json(), "has values of the type Json"),
    "blank": (["", " "], None, "has no name in any row"),
    "unlabeled": ([-1, -1], ClassLabel(names=["a", "b"]), "has no name in any row"),
    "many": ([f"n{i // 2}" for i in range(20_002)], None, "has 10001 different values in 20002 rows, and an adapter"),
}


@pytest.mark.parametrize("case", NO_TASKS)
def test_columns_that_name_no_tasks(case, caplog):
    """By chance called like the default: `SFTTrainer` trains on them. One that is asked for must name tasks."""
    caplog.set_level("WARNING")
    values, feature, reason = NO_TASKS[case]
    dataset = with_tasks(values, feature)
    assert collect(dataset) == (dataset, None)
    assert re.search(f"Column 'task' {reason}.*: it does not look like task names.* rename the column", caplog.text)
    assert split_by_task(dataset, "task") is dataset
    with pytest.raises(ValueError, match="which can't name tasks|rows have no task|names 10001 tasks"):
        collect(dataset.rename_column("task", "kind"), task_column="kind")


@pytest.mark.parametrize("values", [[None, None], [["a"], ["b"]], [{"a": 1}, {"a": 2}]])
def test_lists_structs_and_nulls_are_ignored_without_a_warning(values, caplog):
    caplog.set_level("WARNING")
    dataset = with_tasks(values)
    assert collect(dataset) == (dataset, None) and not caplog.records


@pytest.mark.parametrize(
    "value", [1.5, float("nan"), ["x"], {"x": 1}, True, "", None, datetime(2020, 1, 1)], ids=lambda value: str(value)
)
def test_odd_columns_of_evaluation_data_are_those_of_their_key(model_folders, tmp_path, value):
    """Training has tasks, and a column of evaluation data happens to be called like theirs."""
    odd = Dataset.from_list([{**row, "options": [row["completion"], "w9"], "task": value} for row in rows(2)])
    trainer = make_trainer(model_folders, tmp_path, evaluate={"same": odd, "new": odd}, max_steps=1)
    assert [trainer.eval_dataset[name][TASK_IDS][:] for name in ("same",)] == [
        [trainer._task_data.names.index("same")] * 2
    ]
    assert TASK_IDS not in trainer.eval_dataset["new"].column_names
    assert {"eval_same_loss", "eval_same_accuracy"} <= set(trainer.evaluate())
    assert "eval_loss" in trainer.evaluate(odd)


def test_training_data_with_an_odd_column_train_an_adapter_with_tasks(model_folders, tmp_path):
    odd = Dataset.from_list([{**row, "task": 0.5} for row in rows(4)])
    trainer = make_trainer(model_folders, tmp_path, train=odd, peft_config=RLoraConfig(tasks=["a"]), max_steps=1)
    assert trainer.train().global_step == 1


def test_long_texts_of_a_column_do_not_name_tasks(caplog):
    caplog.set_level("WARNING")
    dataset = Dataset.from_dict({"text": ["x", "y"], "task": ["a", "b" * 600]})
    assert collect(dataset) == (dataset, None)
    assert "some longer than 512 characters: it does not look like task names" in caplog.text
    with pytest.raises(ValueError, match="Column 'kind' has a value that can't be used.*600 characters"):
        tasks_in(dataset.rename_column("task", "kind"), "kind", required=True)


def test_a_missing_name_is_not_the_task_none(model_folders, tmp_path):
    data = [{**row, "task": task} for row, task in zip(task_rows("first", 8), ["a", None] * 4, strict=True)]
    stream = IterableDataset.from_generator(lambda: iter(data))
    trainer = make_trainer(
        model_folders, tmp_path, train=stream, peft_config=RLoraConfig(tasks=["a", "None"]), max_steps=1
    )
    trainer.train()
    assert [counts["rows"] for counts in trainer.tasks_seen().values()] == [4, 0]


def test_two_keys_of_one_name_in_evaluation_data():
    with pytest.raises(ValueError, match="`eval_dataset` has '1' more than once"):
        split_by_task({1: rows(), "1": rows()}, "task")
    with pytest.raises(ValueError, match="`sizes` has '1' more than once"):
        mix_tasks({"1": rows().to_iterable_dataset()}, cap=5, sizes={1: 8, "1": 8})


@pytest.mark.parametrize("tasks", [5, {"a", "b"}, b"ab"])
def test_configurations_take_a_list(tasks):
    with pytest.raises(TypeError, match="`tasks` must be a list of names"):
        RLoraConfig(tasks=tasks)


def test_configurations_keep_plain_texts():
    config = RLoraConfig(tasks=(np.str_("a"), Kind.QA))
    assert config.tasks == ["a", "qa"] and {type(task) for task in config.tasks} == {str}
    with pytest.raises(ValueError, match="names 10001 tasks, and an adapter has at most 10000"):
        RLoraConfig(tasks=[str(number) for number in range(10_001)])


def test_task_ids_of_numpy_are_numbers():
    model = get_peft_model(
        TINY_MODELS["llama"](), RLoraConfig(router="task", tasks=["a", "b"], init_weights=False)
    ).eval()
    ids = random_ids(2)
    with torch.no_grad():
        wanted = model(input_ids=ids, task_ids=["b", "a"]).logits
        for given in (np.array([1, 0]), [np.int32(1), np.str_("a")], np.array(["b", "a"])):
            assert torch.equal(model(input_ids=ids, task_ids=given).logits, wanted)
    model.set_task(np.int64(1))
    for given in ([True, False], [1.0, 0.0], [None, "a"], [("b",), "a"], [np.bool_(True), "a"]):
        with pytest.raises(ValueError, match="The adapter has no task"):
            model(input_ids=ids, task_ids=given)


# Splits


SPLITS = {
    "train_val": ("train", "val"),
    "with_unsupervised": ("train", "test", "unsupervised"),
    "tasks": ("sst2", "rte"),
}


@pytest.mark.parametrize("kind", [DatasetDict, IterableDatasetDict])
@pytest.mark.parametrize("keys", SPLITS)
def test_splits_are_no_tasks(model_folders, tmp_path, kind, keys):
    def make(key):
        return rows() if kind is DatasetDict else rows().to_iterable_dataset()

    splits = kind({key: make(key) for key in SPLITS[keys]})
    message = (
        f"Got a {kind.__name__} of the splits {', '.join(SPLITS[keys])}, which are not tasks. Pass one of them, such "
        f'as dataset\\["{SPLITS[keys][0]}"\\], or, .* a plain dictionary: dict\\(dataset\\)'
    )
    for options in ({}, {"mixing": "equal"}):
        with pytest.raises(ValueError, match=message):
            make_trainer(model_folders, tmp_path, train=splits, **options)
    for join in (join_tasks, label_tasks, mix_tasks):
        with pytest.raises(ValueError, match=message):
            join(splits)
    assert {row["task"] for row in join_tasks(dict(splits))} == set(SPLITS[keys])


def test_splits_are_evaluated_one_by_one(model_folders, tmp_path):
    """As `SFTTrainer` does."""
    splits = DatasetDict({"validation": rows(), "test": task_datasets(6)["same"]})
    trainer = make_trainer(model_folders, tmp_path, evaluate=splits, max_steps=1)
    assert {"eval_validation_loss", "eval_test_loss"} <= set(trainer.evaluate())
