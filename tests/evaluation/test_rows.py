"""Rows by task, and conversations as text."""

import base64
import json

import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from sample_rows import PAIR, ROWS, TURNS, write
from testing_utils import build_tokenizer
from tokenizers import processors

from rlora_trl.evaluation.rows import is_scorable, load_task_rows, rows_by_task, text_rows


PICTURE = base64.b64decode(  # one pixel, as PNG
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


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
    backwards = data.select([4, 3, 2, 1, 0])
    assert [row["value"] for row in rows_by_task(backwards, "kind", limit=2)["yes"]] == [4, 2]
    assert list(rows_by_task(data.select([1, 0]), "kind")) == ["no", "yes"]


def test_rows_by_task_reads_only_the_rows_that_it_returns():
    features = Features({"task": Value("string"), "image": Image()})
    image = {"bytes": PICTURE, "path": None}
    broken = {"bytes": b"no picture", "path": None}
    data = Dataset.from_list([{"task": "a", "image": image}, {"task": "a", "image": broken}], features=features)
    (row,) = rows_by_task(data, "task", limit=1)["a"]
    assert row["image"].size == (1, 1)


@pytest.mark.parametrize(
    "values, message",
    [
        (
            ["a", None, " "],
            "2 rows have no task in column 'task', the first is row 2. Fill it in, or filter them out.",
        ),
        (["a", "b", ""], "1 rows have no task in column 'task', the first is row 3"),
    ],
)
def test_rows_without_a_name_of_a_task_are_refused_as_in_training(tmp_path, values, message):
    rows = [{**PAIR, "task": value} for value in values]
    with pytest.raises(ValueError, match=message):
        rows_by_task(Dataset.from_list(rows), "task")
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        load_task_rows(path)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [None, ["a"], {"a": "b"}])
def test_a_column_that_is_called_task_need_not_name_tasks(tmp_path, value):
    path = write(tmp_path / "rows.jsonl", [{**PAIR, "task": value}] * 2)
    assert {task: len(rows) for task, rows in load_task_rows(path).items()} == {"rows": 2}
    with pytest.raises(ValueError, match="can't name tasks|2 rows have no task"):
        load_task_rows(path, task_column="task")


@pytest.mark.parametrize(
    "values, reason",
    [
        ([1.5, 2.0], "has values of the type Value.'float64'."),
        ([True, False], "has values of the type Value.'bool'."),
        ([1, "a"], "has values of the type Json.*"),
        (["", " "], "has no name in any row"),
        ([f"Solve {number}" for number in range(20)], "has 20 different values in 20 rows"),
    ],
)
def test_a_column_that_seems_to_name_no_tasks_is_left_with_a_warning(tmp_path, values, reason):
    path = write(tmp_path / "rows.jsonl", [{**PAIR, "task": value} for value in values])
    with pytest.warns(UserWarning, match=f"rows.jsonl: Column 'task' {reason}: it does not look like task names"):
        assert {task: len(rows) for task, rows in load_task_rows(path).items()} == {"rows": len(values)}
    if len(values) == 2:
        with pytest.raises(ValueError, match="can't name tasks|2 rows have no task"):
            load_task_rows(path, task_column="task")


def test_rows_without_a_task_are_of_one(tmp_path):
    path = tmp_path / "words.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": row["prompt"], "completion": row["completion"]}) for row in ROWS))
    assert {task: len(rows) for task, rows in load_task_rows(str(path), limit=4).items()} == {"words": 4}
    assert list(load_task_rows(str(path), default_task="mine")) == ["mine"]
    with pytest.raises(ValueError, match="no column 'task' to name tasks; it has prompt, completion"):
        load_task_rows(str(path), task_column="task")


def test_what_can_be_scored():
    assert is_scorable(Dataset.from_list(ROWS))
    assert is_scorable(Dataset.from_list([{"prompt": "a", "completion": None}, ROWS[0]]))
    assert not is_scorable(Dataset.from_list([{"text": "a"}]))
    assert not is_scorable(Dataset.from_list([{"prompt": [{"role": "user"}], "completion": [{"role": "assistant"}]}]))
    assert not is_scorable(Dataset.from_list(ROWS).to_iterable_dataset())


def test_conversations_as_text():
    """As training writes them, without the end of the sequence, which scoring adds."""
    chat = [*TURNS, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    rows = [
        {"messages": chat, "options": ["e", "d"]},
        {"messages": [*chat, {"role": "user", "content": "c"}]},
        {"prompt": chat[:1], "completion": chat[1:2], "options": None},
        {**PAIR, "options": '[" b", "b"]'},
    ]
    texts = text_rows({"mine": rows}, build_tokenizer())["mine"]
    assert [(row["prompt"], row["completion"], row["options"]) for row in texts] == [
        ("<user> a <assistant> b <eos><user> c <assistant> ", "d ", ["e ", "d "]),
        ("<user> a <assistant> b <eos><user> c <assistant> ", "d ", []),
        ("<user> a <assistant> ", "b ", []),
        ("a", "b", [" b", "b"]),
    ]


def test_a_sequence_begins_once():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    tokenizer.bos_token = "<user>"  # any token of the vocabulary
    first = [("<user>", tokenizer.bos_token_id)]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="<user> $A", special_tokens=first)
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    (row,) = text_rows({"": [{"messages": TURNS}]}, tokenizer)[""]
    assert (row["prompt"], row["completion"]) == ("<user> a <assistant> ", "b ")


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"messages": TURNS[:1]},
            "Task 'mine', row 1, column 'messages': it has no answer .* only the roles 'user'. Add",
        ),
        ({"messages": TURNS[1:]}, "no answer of the assistant to a message before it"),
        ({**PAIR, "options": "yes, no"}, "column 'options': it is 'yes, no', and must be a list of texts"),
        ({**PAIR, "options": [1, 2]}, "column 'options': it is .1, 2., and must be a list of texts"),
    ],
)
def test_rows_without_an_answer(row, message):
    with pytest.raises(ValueError, match=message):
        text_rows({"mine": [row]}, build_tokenizer())


def test_conversations_need_a_template():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="the model's tokenizer has no chat template .* as text"):
        text_rows({"mine": [{"messages": TURNS}]}, tokenizer)


def test_rows_to_score_have_an_answer(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": "a"}])
    assert load_task_rows(path) == {"rows": [{"text": "a"}]}
    with pytest.raises(
        ValueError, match="rows.jsonl has the columns 'text'; .* no answer to score. Rename its columns"
    ):
        load_task_rows(path, answers=True)
    wrong = {**PAIR, "options": [" wrong"]}
    for named in ({"task": "a"}, {}):
        path = write(tmp_path / "options.jsonl", [{**PAIR, **named}, {**wrong, **named}])
        with pytest.raises(ValueError, match="options.jsonl, row 2 has completion .* not among its options .' wrong'"):
            load_task_rows(path, answers=True)
        assert load_task_rows(path, answers=True, limit=1)
    path = write(tmp_path / "both.jsonl", [{"conversations": "x", "text": "a"}])
    assert load_task_rows(path) == {"both": [{"text": "a"}]}
    path = write(tmp_path / "chat.jsonl", [{"conversations": [{"from": "human", "value": "a"}]}])
    assert load_task_rows(path, answers=True) == {"chat": [{"messages": [{"role": "human", "content": "a"}]}]}
