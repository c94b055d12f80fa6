"""Where results go, and their forms: tables, facts, JSON."""

import json
import re
from functools import partial

from rich.console import Console

from rlora_cli import output
from rlora_cli.output import plain, print_facts, print_json, print_table, results_only


def test_tables_in_a_pipe_are_plain_and_whole(capsys):
    long = "user/" + "x" * 150
    print_table(["repository", "rows", "accuracy, %"], [[long, 12345, "7.1"], ["mean", None, "10.0"]], title="Title")
    print_facts({"Name": long, "Left out": None, "Rows": 3})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Title"
    assert lines[1].split() == ["repository", "rows", "accuracy,", "%"]
    assert lines[2].split() == [long, "12,345", "7.1"]
    assert lines[2].index("7.1") == lines[3].index("10.0") + 1  # numbers end below each other
    assert lines[4:] == [f"Name  {long}", "Rows  3"]
    assert not any("\x1b" in line or line != line.rstrip() for line in lines)


def test_tables_in_a_narrow_terminal(capsys, monkeypatch):
    # Not through the environment, of which earlier tests may leave variables that rich looks at first.
    narrow = partial(Console, force_terminal=True, color_system="standard", width=40)
    monkeypatch.setattr(output, "Console", narrow)
    long = "user/" + "x" * 50
    print_table(["task", "rows"], [["same", 7]])
    print_table(["repository", "tasks", "r"], [[long, "one, two", 4], ["user/short", "one", 5]])
    print_facts({"Folder": "/" + "y" * 60, "Tasks": "sst2, " * 10})
    text = capsys.readouterr().out
    assert "\x1b[1mtasks       \x1b[0mone, two\n" in text, "only labels are bold"
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    assert lines[:3] == ["task   rows", "───────────", "same      7"]
    # Too wide for a table: the facts of each row, and what may be copied stays whole.
    assert lines[3:6] == [f"repository  {long}", "tasks       one, two", "r           4"]
    assert lines[6:10] == ["", "repository  user/short", "tasks       one", "r           5"]
    assert lines[10:] == ["Folder  /" + "y" * 60, f"Tasks   {'sst2, ' * 10}"], "wrapped by the terminal alone"


def test_only_results_go_to_stdout(capsys):
    with results_only():
        print("what a library prints")
    print_json({"value": 1})
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"value": 1}
    assert captured.err == "what a library prints\n"


def test_values_as_json():
    import torch

    assert plain({"a": float("nan"), "b": torch.ones(2), "c": ("x",), 4: None}) == {
        **{"a": None, "b": [1.0, 1.0], "c": ["x"], "4": None}
    }
