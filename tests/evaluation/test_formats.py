"""Checks of rows before training."""

import numpy as np
import pytest
from datasets import Dataset, Features, LargeList, List, Value, arrow_dataset
from sample_rows import PAIR, TURNS, write

from rlora_trl.evaluation.formats import check_row, check_rows
from rlora_trl.evaluation.loading import load_splits


ACCEPTED = "accepted are 'prompt' with 'completion', 'text', or 'messages'"


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
    "two_formats.jsonl": (
        [PAIR, {"messages": [{"role": "user", "content": "a"}]}],
        "row 2, column 'prompt': it is missing .* If it has 'messages' instead: rows have one format",
    ),
    "both.jsonl": (
        [{"prompt": "a", "completion": [{"role": "assistant", "content": "a"}]}],
        "one is text and the other a",
    ),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", NOT_TRAINABLE)
def test_rows_that_can_not_be_trained_on(tmp_path, name, streaming):
    content, message = NOT_TRAINABLE[name]
    splits = load_splits(write(tmp_path / name, content), streaming=streaming)
    with pytest.raises(ValueError, match=f"^{name}.*{message}"):
        list(check_rows(splits["train"], name))


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
        (np.array(["a"]), "The dataset has a format: remove it with `with_format.None.`"),
        (TURNS[0], "Put the message into a list"),
        (4, 'Write it as a list, such as .{"role": "user"'),
    ],
)
def test_the_remedy_fits_what_is_wrong(value, remedy):
    with pytest.raises(ValueError, match=f"of type {type(value).__name__}, and must be a list of messages. {remedy}"):
        check_row({"messages": value}, 0, names=("messages",), where="It", text_column="text")
