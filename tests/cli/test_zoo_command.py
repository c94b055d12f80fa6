"""`rlora zoo`: what it passes on and shows. `tests/hub` runs it against a server."""

import inspect
import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest

import rlora_trl.zoo
from rlora_trl.zoo import AdapterInfo, Comparison


TASKS = tuple(f"task_{number}" for number in range(6))


INFOS = [
    AdapterInfo(
        repo_id=f"someone/a-rather-long-name-{number}",
        base_model="Qwen/Qwen2.5-0.5B",
        tasks=TASKS,
        metrics={task: {"accuracy": 0.5 + 0.1 * number} for task in TASKS},
        r=4,
        num_heads=3,
        router="softmax",
        sha="0" * 40,
        downloads=1234,
        last_modified=datetime(2026, 1, 2, tzinfo=UTC),
    )
    for number in range(2)
]


def test_zoo_search(rlora, monkeypatch):
    asked = []
    signature = inspect.signature(rlora_trl.zoo.search)
    monkeypatch.setattr(rlora_trl.zoo, "search", lambda **kw: asked.append(signature.bind(**kw).arguments) or INFOS)
    result = rlora("zoo", "search", "--base-model", "b", "--task", "t", "--author", "a", "--limit", 7)
    assert asked == [{"base_model": "b", "task": "t", "author": "a", "limit": 7, "sort": "downloads"}]
    lines = result.stdout.splitlines()
    assert len(lines) == 3 and all(task in lines[1] for task in TASKS)  # nothing is cut in a pipe
    assert lines[1].split()[-5:] == ["50.0", "4", "3", "1,234", "2026-01-02"]
    shown = json.loads(rlora("zoo", "search", "--json").stdout)
    assert [entry["repo_id"] for entry in shown] == [info.repo_id for info in INFOS]
    assert rlora("zoo", "search", "--limit", 0).exit_code == 2
    rlora("zoo", "search", "--sort", "updated")
    assert asked[-1]["sort"] == "updated"


def test_zoo_search_marks_private_ones(rlora, monkeypatch):
    found = [INFOS[0], replace(INFOS[1], private=True)]
    monkeypatch.setattr(rlora_trl.zoo, "search", lambda **kwargs: found)
    lines = rlora("zoo", "search").stdout.splitlines()
    assert [line.split()[-1] for line in lines] == ["to", "all", "owners"]


def test_zoo_search_without_a_find(rlora, monkeypatch):
    monkeypatch.setattr(rlora_trl.zoo, "search", lambda **kwargs: [])
    result = rlora("zoo", "search")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "No adapter was found" in result.stderr
    assert rlora("zoo", "search", "--json").stdout == "[]\n"


def test_zoo_compare(rlora, monkeypatch):
    def compare(repos, metric):
        return Comparison(tuple(info for info in INFOS if info.repo_id in repos), TASKS, metric)

    monkeypatch.setattr(rlora_trl.zoo, "compare", compare)
    names = [info.repo_id for info in INFOS]
    result = rlora("zoo", "compare", *names)
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["accuracy", *names]
    assert lines[1].split() == ["task_0", "50.0%", "60.0%"]
    assert lines[-1].startswith("mean")
    assert json.loads(rlora("zoo", "compare", *names, "--json").stdout)["rows"][0]["task"] == "task_0"


def test_zoo_shows_gains(rlora, monkeypatch):
    metrics = {"same": {"accuracy": 0.75, "base_accuracy": 0.5}, "first": {"accuracy": 0.25}}
    info = AdapterInfo("user/x", tasks=("same", "first"), metrics=metrics)
    monkeypatch.setattr(rlora_trl.zoo, "show", lambda repo, revision: info)
    lines = rlora("zoo", "show", "user/x").stdout.splitlines()
    assert [line.split() for line in lines[-2:]] == [
        ["same", "75.0%", "50.0%", "+25.0"],
        ["first", "25.0%", "-", "-"],
    ]
    monkeypatch.setattr(rlora_trl.zoo, "compare", lambda repos, metric: Comparison((info,), ("same", "first")))
    assert "75.0% (+25.0)" in rlora("zoo", "compare", "user/x").stdout


def test_zoo_show(rlora, monkeypatch):
    monkeypatch.setattr(rlora_trl.zoo, "show", lambda repo, revision: INFOS[0])
    result = rlora("zoo", "show", "user/x")
    assert "3 heads of rank 4, router softmax" in result.stdout and "task_5" in result.stdout
    assert json.loads(rlora("zoo", "show", "user/x", "--json").stdout)["num_heads"] == 3


@pytest.mark.parametrize("command", ["pin", "install"])
def test_commands_that_are_gone_name_what_replaces_them(rlora, command):
    result = rlora("zoo", command, "user/x")
    assert (result.exit_code, result.stdout) == (2, "")
    text = " ".join(result.stderr.replace("│", " ").split())
    assert f"`rlora zoo {command}` is gone" in text and "`rlora pull REPO --revision SHA`" in text
    assert rlora("zoo", "pine").exit_code == 2
