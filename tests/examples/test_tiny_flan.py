"""Tests of the embedded dataset in examples/tiny_flan.py; no model is needed."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest


MODULE_PATH = Path(__file__).resolve().parents[2] / "examples" / "tiny_flan.py"

CLUSTERS = {
    "struct_to_text",
    "translation",
    "commonsense",
    "sentiment",
    "paraphrase",
    "coreference",
    "reading_comprehension",
    "reading_comprehension_commonsense",
    "natural_language_inference",
    "closed_book_qa",
}
FREE_TEXT_CLUSTERS = {"struct_to_text", "translation", "closed_book_qa"}
SEEDS = (0, 1, 2)


def import_tiny_flan() -> ModuleType:
    """Import the module from the examples folder, which is no package."""
    spec = importlib.util.spec_from_file_location("tiny_flan", MODULE_PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


tiny_flan = import_tiny_flan()
TASK_NAMES = tuple(tiny_flan.TASKS)


@pytest.fixture(scope="module")
def data() -> dict[tuple[str, int], dict[str, list[dict]]]:
    return {(split, seed): tiny_flan.load_tiny_flan(split, seed=seed) for split in ("train", "test") for seed in SEEDS}


def prompts(rows: list[dict]) -> list[str]:
    return [row["prompt"] for row in rows]


def test_one_task_per_cluster():
    assert len(TASK_NAMES) == 10
    assert {task.cluster for task in tiny_flan.TASKS.values()} == CLUSTERS


@pytest.mark.parametrize("seed", SEEDS)
def test_default_counts(data, seed):
    for split, at_least in (("train", 320), ("test", 60)):
        tasks = data[split, seed]
        assert tuple(tasks) == TASK_NAMES
        assert all(len(rows) >= at_least for rows in tasks.values())


def test_rows_per_task_takes_the_first_rows(data):
    few = tiny_flan.load_tiny_flan("train", seed=1, rows_per_task=37)
    assert few == {task: rows[:37] for task, rows in data["train", 1].items()}


def test_same_seed_same_rows(data):
    for split in ("train", "test"):
        assert tiny_flan.load_tiny_flan(split, seed=2) == data[split, 2]


@pytest.mark.parametrize("task", TASK_NAMES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_seeds_differ(data, split, task):
    assert data[split, 0][task] != data[split, 1][task]


def test_rows_of_a_task_do_not_depend_on_the_others(data, monkeypatch):
    last = TASK_NAMES[-1]
    monkeypatch.setattr(tiny_flan, "TASKS", {last: tiny_flan.TASKS[last]})
    assert tiny_flan.load_tiny_flan("train", seed=0) == {last: data["train", 0][last]}


@pytest.mark.parametrize("task", TASK_NAMES)
def test_no_prompt_twice_in_a_split(data, task):
    for tasks in data.values():
        assert len(set(prompts(tasks[task]))) == len(tasks[task])


@pytest.mark.parametrize("task", TASK_NAMES)
def test_splits_share_no_prompt_under_any_seeds(data, task):
    seen = {split: {p for seed in SEEDS for p in prompts(data[split, seed][task])} for split in ("train", "test")}
    assert not seen["train"] & seen["test"]


@pytest.mark.parametrize("task", TASK_NAMES)
def test_a_prompt_has_one_answer(data, task):
    answers: dict[str, str] = {}
    for tasks in data.values():
        for row in tasks[task]:
            assert answers.setdefault(row["prompt"], row["completion"]) == row["completion"]


@pytest.mark.parametrize("task", TASK_NAMES)
def test_fields_and_format(data, task):
    for tasks in data.values():
        for row in tasks[task]:
            assert list(row) == ["task", "cluster", "prompt", "completion", "options"]
            assert all(isinstance(row[field], str) for field in ("task", "cluster", "prompt", "completion"))
            assert row["task"] == task and row["cluster"] == tiny_flan.TASKS[task].cluster
            assert row["prompt"].endswith("\nAnswer:")
            assert "{" not in row["prompt"] + row["completion"]
            for text in (row["completion"], *row["options"]):
                assert isinstance(text, str) and text.startswith(" ") and text == f" {text.strip()}" and len(text) > 1


@pytest.mark.parametrize("task", TASK_NAMES)
def test_rows_are_short(data, task):
    for tasks in data.values():
        # A rough bound on tokens that needs no tokenizer: 48 tokens of English are more than 140 characters.
        assert all(len(row["prompt"] + row["completion"]) <= 140 for row in tasks[task])


@pytest.mark.parametrize("task", TASK_NAMES)
def test_options(data, task):
    for tasks in data.values():
        for row in tasks[task]:
            if row["cluster"] in FREE_TEXT_CLUSTERS:
                assert row["options"] == []
            else:
                assert len(row["options"]) >= 3 and len(set(row["options"])) == len(row["options"])
                assert row["options"].count(row["completion"]) == 1


OPTION_TASKS = tuple(name for name in TASK_NAMES if tiny_flan.TASKS[name].cluster not in FREE_TEXT_CLUSTERS)
# These tasks have the same options in every row.
LABEL_TASKS = tuple(name for name in OPTION_TASKS if name != "coreference_pronoun")


@pytest.mark.parametrize("task", LABEL_TASKS)
@pytest.mark.parametrize("rows_per_task", [None, 50])
def test_labels_are_balanced(task, rows_per_task):
    for split in ("train", "test"):
        rows = tiny_flan.load_tiny_flan(split, seed=0, rows_per_task=rows_per_task)[task]
        counts = Counter(row["completion"] for row in rows)
        assert set(counts) == set(rows[0]["options"])
        assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("task", LABEL_TASKS)
def test_option_order_is_the_same_in_every_row(data, task):
    assert len({tuple(row["options"]) for tasks in data.values() for row in tasks[task]}) == 1


def test_coreference_balances_both_and_the_place_of_the_name(data):
    for (_, seed), tasks in data.items():
        rows = tasks["coreference_pronoun"]
        places = Counter(row["options"].index(row["completion"]) for row in rows)
        assert abs(places[2] - len(rows) / 3) <= 1, seed
        # Neither the order of the options nor the order of the sentence tells which of the two names is meant.
        assert 0.3 < places[0] / (places[0] + places[1]) < 0.7
        named = [row for row in rows if row["completion"] != " both"]
        starts = sum(row["prompt"].startswith(row["completion"].strip()) for row in named)
        assert 0.3 < starts / len(named) < 0.7


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="split"):
        tiny_flan.load_tiny_flan("validation")
    with pytest.raises(ValueError, match="positive"):
        tiny_flan.load_tiny_flan("train", rows_per_task=0)
    with pytest.raises(ValueError, match="too few prompts"):
        tiny_flan.load_tiny_flan("test", rows_per_task=5000)
