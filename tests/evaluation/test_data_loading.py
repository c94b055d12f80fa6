"""Datasets by file, folder and split."""

import gzip
import json
import re
from unittest import mock

import pytest
from datasets import Dataset
from sample_rows import PAIR, ROWS, write

from rlora_trl.evaluation import loading
from rlora_trl.evaluation.loading import load_splits


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_files_are_one_split(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    getattr(Dataset.from_list(ROWS), {"jsonl": "to_json"}.get(kind, f"to_{kind}"))(path)
    splits = load_splits(str(path), file_split="mine")
    assert {name: data.to_list() for name, data in splits.items()} == {"mine": ROWS}


def test_missing_data(monkeypatch):
    # Without a network the library raises an error of the connection.
    monkeypatch.setattr(loading, "load_dataset", mock.Mock(side_effect=ConnectionError("can't be reached")))
    with pytest.raises(FileNotFoundError, match="There is no file or folder words here, .* can't be reached"):
        load_splits("words")


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/no/such/folder"])
def test_paths_to_nothing(name):
    with pytest.raises(FileNotFoundError, match="There is no data at"):
        load_splits(name)


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
@pytest.mark.parametrize("where", ["file", "folder"])
def test_cells_are_text(tmp_path, where, streaming):
    """pandas reads NA, null and the like as missing values, and digits as numbers."""
    words = ["NA", "null", "None", "nan", "007", " 4", "1e5", "True", '"x, y"', ""]
    path = tmp_path / "train.csv"
    path.write_text("task,completion\n" + "".join(f"{number},{word}\n" for number, word in enumerate(words)))
    rows = list(load_splits(str(path if where == "file" else tmp_path), streaming=streaming)["train"])
    assert [row["completion"] for row in rows] == [*words[:-2], "x, y", None]
    assert [row["task"] for row in rows] == [str(number) for number in range(len(words))]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_deep_nesting_is_refused_before_arrow_overflows_the_stack(tmp_path, name):
    opener = gzip.open if name.endswith(".gz") else open
    with opener(tmp_path / name, "wt") as file:
        file.write('{"a": "[[[["}\n{"a": ' + '{"b": ' * 600 + "1" + "}" * 601 + "\n")
    with pytest.raises(ValueError, match="line 2: it is nested more than 500 deep"):
        load_splits(str(tmp_path / name))
    with pytest.raises(ValueError, match="line 2: it is nested more than 500 deep"):
        load_splits(str(tmp_path))


def test_brackets_in_text_are_not_nesting(tmp_path):
    text = r"\"[{" * 1000
    (tmp_path / "rows.jsonl").write_text(f'{{"text": "{text}", "n": [[1], [2]]}}\n')
    assert load_splits(str(tmp_path / "rows.jsonl"))["train"][0]["text"] == '"[{' * 1000


def test_nesting_is_found_in_linear_time():
    for text in ('"' + r"\"[" * 300_000, "[]" * 300_000):
        assert not loading._is_deep(text.encode())


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.csv.gz", "rows.ndjson.gz"])
def test_a_row_that_fills_the_memory_is_refused(tmp_path, name):
    opener = gzip.open if name.endswith(".gz") else open
    with opener(tmp_path / name, "wb") as file:
        for _ in range(65):
            file.write(b" " * 2**20)
    with pytest.raises(ValueError, match="line 1: it has more than 67108864 bytes"):
        load_splits(str(tmp_path / name))
