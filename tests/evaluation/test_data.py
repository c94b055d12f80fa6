"""Data sets by file, folder and split, and their rows by task."""

import base64
import gzip
import json
import re
from unittest import mock

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, LargeList, List, Value, arrow_dataset
from testing_utils import build_tokenizer
from tokenizers import processors

from rlora_trl.evaluation import data
from rlora_trl.evaluation.data import check_rows, is_scorable, load_splits, load_task_rows, rows_by_task, text_rows


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
    with pytest.warns(UserWarning, match=f"rows.jsonl: Column 'task' {reason}: they don't seem to be names of tasks"):
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


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/no/such/folder"])
def test_paths_to_nothing(name):
    with pytest.raises(FileNotFoundError, match="There is no data at"):
        load_splits(name)


PICTURE = base64.b64decode(  # one pixel, as PNG
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def test_what_can_be_scored():
    assert is_scorable(Dataset.from_list(ROWS))
    assert is_scorable(Dataset.from_list([{"prompt": "a", "completion": None}, ROWS[0]]))
    assert not is_scorable(Dataset.from_list([{"text": "a"}]))
    assert not is_scorable(Dataset.from_list([{"prompt": [{"role": "user"}], "completion": [{"role": "assistant"}]}]))
    assert not is_scorable(Dataset.from_list(ROWS).to_iterable_dataset())


PAIR = {"prompt": "a", "completion": "b"}
ACCEPTED = "accepted are 'prompt' with 'completion', 'text', or 'messages'"
# Text of a file, or rows of a JSON-lines file; what the message must say.
UNREADABLE = {
    "empty.jsonl": ("", " is empty. Give a file with at least one row."),
    "blank.jsonl": ("\n\n", " is empty. Give a file"),
    "empty.csv": ("", " is empty. Give a file"),
    "header.csv": ("prompt,completion\n", " has a header and no rows. Give a file"),
    "broken.jsonl": (
        '{"prompt":"a","completion":"b"}\n\n{"prompt":"a" "completion":"b"}\n',
        ", line 3: Expecting ',' del",
    ),
    "cut_off.jsonl": ('{"prompt":"a","completion":"b"}\n{"prompt":"a","comp', ", line 2: Unterminated string"),
    "lists.jsonl": (
        '{"prompt":"a","completion":"b"}\n[1, 2]\n',
        ", line 2: the line is a list. Each line must be one JSON",
    ),
    "latin.csv": (b"prompt,completion\ncaf\xe9,b\n", " is not UTF-8 text: .* byte 0xe9. Save it in UTF-8."),
    "ragged.csv": ("prompt,completion\na,b\nc,d,e\n", ", line 3: 3 cells, and the first line names 2 columns. Put"),
    "longer.csv": ("prompt,completion\n1,a,b\n2,c,d\n", ", line 2: 3 cells, and the first line names 2 columns. Put"),
    "trailing.csv": ("prompt,completion\na,b,\nc,d,\n", ", line 2: 3 cells, and the first line names 2 columns"),
    "commas.csv": ("prompt;completion\na, b, c;d\ne;f\n", " names its columns 'prompt;completion'. Separate .* ';'"),
    "quote.csv": ('prompt,completion\na,b\nc,"d\ne,f\n', ", line 3: unexpected end of data. Close each double quote"),
    "long.csv": (f"prompt,completion\n{'a' * 200_000},b\nc,d,e\n", ", line 3: 3 cells"),
    "no_rows.json": ("[]", " has no rows. Give a file with at least one row"),
    "no_fields.json": ("{}", " has no rows. Give a file with at least one row"),
    "no_fields.jsonl": ("{}\n{}\n", " has no rows with a field. Give a file"),
    "rows.tsv": (
        "prompt\tcompletion\na\tb\n",
        " is a file of another kind; accepted .* .ndjson, .* Write",
    ),
    "rows.txt": ("a\n", " is a file of another kind"),
    "rows": ("a\n", " is a file of another kind"),
    "x.jsonl.gz": ("a", " is no gzip file, or it was cut off. Write or download"),
    "x.parquet": ("a,b\n", " is no Parquet file, or it was cut off"),
}
NOT_TRAINABLE = {
    "null.jsonl": ([PAIR, {"prompt": "a", "completion": None}], ", row 2, column 'completion': it is missing or null"),
    "absent.jsonl": (
        [PAIR, PAIR, {"prompt": "a"}],
        ", row 3, column 'completion': it is missing or null, and must be text",
    ),
    "all_null.jsonl": ([{"prompt": "a", "completion": None}], ", row 1, column 'completion': it is missing or null"),
    "number.jsonl": (
        [{"prompt": "a", "completion": 4}],
        ", row 1, column 'completion': it is 4, of type int, .* as \"4\".",
    ),
    "mixed.jsonl": (
        [PAIR, {"prompt": "a", "completion": 0.5}],
        ", row 2, column 'completion': it is 0.5, of type float",
    ),
    "truth.jsonl": ([{"text": True}], ", row 1, column 'text': it is True, of type bool, and must be text"),
    "empty_cell.csv": ("prompt,completion\na,b\nc,\n", ", row 2, column 'completion': it is missing or null"),
    "semicolons.csv": (
        "prompt;completion\na;b\n",
        f" has the columns 'prompt;completion'; {ACCEPTED}. Separate .* ';'",
    ),
    "tabs.csv": ("prompt\tcompletion\na\tb\n", "Separate them by commas instead of '.t'"),
    "other.jsonl": ([{"question": "a", "answer": "b"}], f" has the columns 'question', 'answer'; {ACCEPTED}. Rename"),
    "half.jsonl": ([{"prompt": "a", "text": "b"}], "with a 'prompt' and no 'completion'; .* to train on 'text'"),
    "half_chat.jsonl": ([{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}], "to train on 'messages'"),
    "text_as_messages.jsonl": (
        [{"messages": "a"}],
        "row 1, column 'messages': it is text, and must be a list of messages",
    ),
    "no_messages.jsonl": ([{"messages": []}], "row 1, column 'messages': it is an empty list"),
    "no_roles.jsonl": (
        [{"messages": [{"from": "human", "value": "a"}]}],
        "messages must have 'role' and 'content'. Correct",
    ),
    "conversations.jsonl": (
        [{"conversations": [{"role": "user", "content": "a"}]}],
        "Rename the column to 'messages'",
    ),
    "both.jsonl": (
        [{"prompt": "a", "completion": [{"role": "assistant", "content": "a"}]}],
        "one is text and the other a",
    ),
}


def write(path, content):
    if isinstance(content, list):
        content = "\n".join(map(json.dumps, content))
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize("name", UNREADABLE)
def test_files_that_can_not_be_read(tmp_path, name):
    content, message = UNREADABLE[name]
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / name))}{message}"):
        load_splits(write(tmp_path / name, content))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["x.JSONL", "x.ndjson", "x.jsonl.gz", "x.CSV", "x.csv.gz", "x.Json"])
def test_names_of_files_end_in_other_ways(tmp_path, name, streaming):
    text = "prompt,completion\na,b\n" if "csv" in name.lower() else json.dumps(PAIR)
    content = gzip.compress(text.encode()) if name.endswith(".gz") else text
    assert list(load_splits(write(tmp_path / name, content), streaming=streaming)["train"]) == [PAIR]


def test_cells_that_begin_with_a_quote_are_read_as_before(tmp_path):
    path = write(tmp_path / "x.csv", 'prompt,completion\n"a",""\n"b ""c""",d\n')
    assert load_splits(path)["train"].to_list() == [
        {"prompt": "a", "completion": None},
        {"prompt": 'b "c"', "completion": "d"},
    ]


def test_a_broken_file_of_a_folder_is_named(folder):
    (folder / "train.jsonl").write_text('{"prompt": "a"')
    with pytest.raises(ValueError, match=r"train\.jsonl, line 1: Expecting ',' delimiter at column 15"):
        load_splits(str(folder))


def test_splits_of_different_columns(folder):
    (folder / "test.jsonl").write_text('{"question": "a", "answer": "b"}')
    with pytest.raises(
        ValueError, match=r"have different columns \(test.jsonl: question, answer; train.jsonl: prompt, "
    ):
        load_splits(str(folder))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", NOT_TRAINABLE)
def test_rows_that_can_not_be_trained_on(tmp_path, name, streaming):
    content, message = NOT_TRAINABLE[name]
    splits = load_splits(write(tmp_path / name, content), streaming=streaming)
    with pytest.raises(ValueError, match=f"^{name}.*{message}"):
        list(check_rows(splits["train"], name))


TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {"text": "a"},
        {"prompt": "", "completion": ""},
        {"messages": TURNS},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": []}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"conversations": [{"role": "user", "content": "a"}], "text": "a"},
        {"messages": "[json]", "conversations": None, "text": "a"},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"input_ids": [1, 2], "prompt": None},
    ],
    ids=lambda row: "+".join(row),
)
def test_rows_that_can_be_trained_on(row, streaming):
    dataset = Dataset.from_list([{**row, "other": None}] * 3)
    dataset = dataset.to_iterable_dataset() if streaming else dataset
    assert list(check_rows(dataset, "The data")) == list(dataset)


def test_checked_rows_are_those_of_a_selection():
    dataset = Dataset.from_list([PAIR, {"prompt": "a", "completion": None}, PAIR])
    check_rows(dataset.select([0, 2]), "It")
    with pytest.raises(ValueError, match="It, row 2, column 'completion'"):
        check_rows(dataset.select([2, 1]), "It")
    with pytest.raises(ValueError, match="It has no rows"):
        check_rows(dataset.select([]), "It")
    check_rows(Dataset.from_list([{"body": "a"}]), "It", text_column="body")


def test_text_is_not_read_to_find_missing_values(monkeypatch):
    """Of shuffled data that takes 7 s for a million rows, and the memory of all their text."""
    dataset = Dataset.from_list([PAIR, {"prompt": "a", "completion": None}] * 500).shuffle(seed=0)
    missing = dataset["completion"][:].index(None)
    complete = dataset.filter(lambda row: row["completion"])
    query = arrow_dataset.query_table
    read = []

    def note(table, key, indices=None):
        read.append(key)
        return query(table, key, indices=indices)

    monkeypatch.setattr(arrow_dataset, "query_table", note)
    with pytest.raises(ValueError, match=f"It, row {missing + 1}, column 'completion': it is missing"):
        check_rows(dataset, "It")
    check_rows(complete, "It")
    assert len(read) <= 4 and all(isinstance(key, int) for key in read)


@pytest.mark.parametrize("kind", [List, LargeList])
@pytest.mark.parametrize("lacking, problem", [([], "it is an empty list"), (None, "it is missing or null")])
def test_messages_beyond_the_first_row(kind, lacking, problem):
    features = Features({"messages": kind({"role": Value("string"), "content": Value("string")})})
    rows = [{"messages": messages} for messages in (TURNS, TURNS, lacking, TURNS, [])]
    dataset = Dataset.from_list(rows, features=features)
    with pytest.raises(ValueError, match=f"It, row 3, column 'messages': {problem}"):
        check_rows(dataset, "It")
    with pytest.raises(ValueError, match=f"It, row 2, column 'messages': {problem}"):
        check_rows(dataset.select([3, 2, 0]), "It")
    check_rows(dataset.select([3, 1, 0]), "It")


CALL = {"role": "assistant", "content": None, "tool_calls": []}
TEXT_CONTENT = {"role": "user", "content": "a"}
GPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
# Rows, the second of which must be refused; what the message must say.
LATER_ROWS = {
    "empty": ([{"messages": TURNS}, {"messages": []}], "column 'messages': it is an empty list"),
    "null_message": ([{"messages": TURNS}, {"messages": [TURNS[0], None]}], "column 'messages': it has None"),
    "no_role": (
        [{"messages": TURNS}, {"messages": [{"content": "a"}]}],
        "column 'messages': it has .*, and messages must have 'role' and 'content'",
    ),
    "sharegpt_among_openai": (
        [{"messages": TURNS}, {"messages": GPT}],
        "column 'messages': it has .* must have 'role'",
    ),
    "openai_among_sharegpt": (
        [{"conversations": GPT}, {"conversations": TURNS}],
        "column 'conversations': it has .* must have 'from' and 'value'",
    ),
    "empty_prompt": (
        [{"prompt": TURNS[:1], "completion": TURNS[1:]}, {"prompt": [], "completion": TURNS[1:]}],
        "column 'prompt': it is an empty list",
    ),
    "list_among_texts": (
        [PAIR, {"prompt": TURNS[:1], "completion": TURNS[1:]}],
        "column 'prompt': it is a list, and row 1 has text",
    ),
    "mixed_pair": (
        [{"prompt": TURNS[:1], "completion": TURNS[1:]}, {"prompt": "a", "completion": TURNS[1:]}],
        "of 'prompt' and 'completion' one is text",
    ),
    "json_fields": (
        [{"messages": [TEXT_CONTENT]}, {"messages": [{"content": [{"type": "text"}]}]}],
        "column 'messages': it has .* must have 'role'",
    ),
    "template": (
        [{**PAIR, "chat_template_kwargs": {"a": 1}}, {**PAIR, "chat_template_kwargs": None}],
        "column 'chat_template_kwargs': it is missing or null, and must be a dictionary, empty for none",
    ),
    "tools": (
        [{"messages": TURNS, "tools": "[]"}, {"messages": TURNS, "tools": "not json"}],
        "column 'tools': it is 'not json', and must be null, a list of tools, or such a list in JSON",
    ),
    "text_beside_a_pair": ([{**PAIR, "text": "a"}, {**PAIR, "text": None}], "column 'text': it is missing or null"),
    "null_tokens": (
        [{"input_ids": [1]}, {"input_ids": None}],
        "column 'input_ids': it is missing or null, and must be",
    ),
}


@pytest.mark.parametrize("order", ["stored", "shuffled", "slice"])
@pytest.mark.parametrize("case", LATER_ROWS)
def test_rows_beyond_the_first(case, order):
    (good, bad), message = LATER_ROWS[case]
    dataset = Dataset.from_list([bad, good, good, good, good, bad, bad], on_mixed_types="use_json")
    rows = {"stored": range(1, 7), "shuffled": [2, 1, 3, 4, 5], "slice": range(2, 6)}[order]
    place = list(rows).index(5) + 1
    with pytest.raises(ValueError, match=f"^It, row {place}[,:] {message}"):
        check_rows(dataset.select(rows), "It")
    check_rows(dataset.select(range(1, 5)), "It")
    if case != "null_tokens" and order == "stored":  # streams of tokens are not read
        stream = dataset.select(rows).to_iterable_dataset()
        with pytest.raises(ValueError, match=f"^It, row {place}[,:] {message}"):
            list(check_rows(stream, "It"))


@pytest.mark.parametrize(
    "rows",
    [
        [{"messages": [*TURNS, CALL]}, {"messages": TURNS}],
        [{"prompt": TURNS[:1], "completion": TURNS[1:], "text": None}] * 2,
        [{"messages": TURNS, "tools": None}, {"messages": TURNS, "tools": '[{"name": "f"}]'}],
        [{"prompt": TURNS[:1], "completion": TURNS[1:]}, PAIR],
        [{"input_ids": []}, {"input_ids": [1]}],
        [{"conversations": [{**turn, "weight": None} for turn in GPT]}, {"conversations": GPT}],
    ],
)
def test_rows_that_differ_and_can_be_trained_on(rows):
    dataset = Dataset.from_list(rows, on_mixed_types="use_json")
    assert list(check_rows(dataset, "It")) == list(dataset)


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"conversations": [{"from": "human"}]},
            "column 'conversations': it has .*, and messages must have 'from' and",
        ),
        ({"input_ids": "1 2"}, "column 'input_ids': it is '1 2', and must be a list of the numbers of tokens"),
        (
            {**PAIR, "chat_template_kwargs": "{}"},
            "column 'chat_template_kwargs': it is '{}', and must be a dictionary",
        ),
    ],
)
def test_first_rows_of_another_kind(row, message):
    with pytest.raises(ValueError, match=f"^It, row 1, {message}"):
        check_rows(Dataset.from_list([row]), "It")


def test_half_a_pair_that_is_called_text():
    with pytest.raises(
        ValueError, match="It has the columns 'prompt', .*no 'completion'; .* Rename the column 'prompt'"
    ):
        check_rows(Dataset.from_list([{"prompt": "a"}]), "It", text_column="prompt")
    check_rows(Dataset.from_list([{"completion": "a"}]), "It", text_column="completion")


@pytest.mark.parametrize("name", ["numpy", "torch", "pandas", "arrow"])
def test_formats_do_not_change_what_is_checked(name):
    dataset = Dataset.from_list([{"messages": TURNS}] * 2).with_format(name)
    assert list(check_rows(dataset, "It")) == [{"messages": TURNS}] * 2
    empty = Dataset.from_list([{"messages": TURNS}, {"messages": []}]).with_format(name)
    with pytest.raises(ValueError, match="It, row 2, column 'messages': it is an empty list"):
        check_rows(empty, "It")


@pytest.mark.parametrize(
    "value, remedy",
    [
        (np.array(["a"]), "It comes from a format of the data set: remove that with `with_format.None.`"),
        (TURNS[0], "Put the message into a list"),
        (4, 'Write it as a list, such as .{"role": "user"'),
    ],
)
def test_the_remedy_fits_what_is_wrong(value, remedy):
    with pytest.raises(ValueError, match=f"of type {type(value).__name__}, and must be a list of messages. {remedy}"):
        data._check_values({"messages": value}, 0, names=("messages",), where="It", text_column="text")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("where", ["file", "folder"])
def test_cells_are_text(tmp_path, where, streaming):
    """pandas reads NA, null and the like as missing values, and digits as numbers."""
    words = ["NA", "null", "None", "nan", "007", " 4", "1e5", "True", '"x, y"', ""]
    path = tmp_path / "train.csv"
    path.write_text("task,completion\n" + "".join(f"{number},{word}\n" for number, word in enumerate(words)))
    rows = list(load_splits(str(path if where == "file" else tmp_path), streaming=streaming)["train"])
    assert [row["completion"] for row in rows] == [*words[:-2], "x, y", None]
    assert [row["task"] for row in rows] == [str(number) for number in range(len(words))]


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
    path = write(tmp_path / "both.jsonl", [{"conversations": "x", "text": "a"}])
    assert load_task_rows(path) == {"both": [{"text": "a"}]}
    path = write(tmp_path / "chat.jsonl", [{"conversations": [{"from": "human", "value": "a"}]}])
    assert load_task_rows(path, answers=True) == {"chat": [{"messages": [{"role": "human", "content": "a"}]}]}
