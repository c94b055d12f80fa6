"""What the commands for the Hub pass on and show. `tests/hub` runs them against a server."""

import inspect
import json
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

import rlora_trl.hub.push
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


@pytest.fixture
def pushed(monkeypatch):
    """The arguments of pushes, checked against the real function's."""
    calls = []
    signature = inspect.signature(rlora_trl.hub.push.push_adapter)

    def push(*args, **kwargs):
        calls.append(signature.bind(*args, **kwargs).arguments)
        return SimpleNamespace(oid="1" * 40, commit_url="https://hub/commit", pr_url=None)

    monkeypatch.setattr(rlora_trl.hub.push, "push_adapter", push)
    return calls


def test_push(rlora, pushed, make_adapter):
    folder = make_adapter()
    result = rlora(
        *("push", folder, "user/x", "--private", "--create-pr", "--base_model", "org/base", "--license", "mit"),
        *("--dataset", "a/b", "--dataset", "c/d", "--tag", "demo", "-m", "First", "--revision", "next", "--json"),
    )
    assert json.loads(result.stdout) == {
        "repo_id": "user/x",
        "commit": "1" * 40,
        "url": "https://hub/commit",
        "pull_request": None,
    }
    expected = {
        "adapter": str(folder),
        "repo_id": "user/x",
        "private": True,
        "create_pr": True,
        "base_model": "org/base",
        "license": "mit",
        "datasets": ["a/b", "c/d"],
        "tags": ["demo"],
        "commit_message": "First",
        "revision": "next",
    }
    assert {name: value for name, value in pushed[0].items() if value} == expected


def test_push_leaves_a_repository_as_private_as_it_is(rlora, pushed, make_adapter):
    result = rlora("push", make_adapter(), "user/x")
    assert pushed[0]["private"] is None
    assert "https://hub/commit" in result.stdout


def test_push_makes_exports_on_the_base_of_the_folder(rlora, pushed, make_adapter):
    rlora("push", make_adapter(), "user/x", "--exports", "same", "--exports", "first")
    assert pushed[0]["exports"] == ["same", "first"]
    assert "default" in pushed[0]["export_from"].peft_config


def test_push_of_nothing(rlora, pushed):
    result = rlora("push", "missing", "user/x")
    assert result.exit_code == 1 and "There is no folder" in result.stderr
    assert not pushed


def test_zoo_search(rlora, monkeypatch):
    asked = []
    signature = inspect.signature(rlora_trl.zoo.search)
    monkeypatch.setattr(rlora_trl.zoo, "search", lambda **kw: asked.append(signature.bind(**kw).arguments) or INFOS)
    result = rlora("zoo", "search", "--base-model", "b", "--task", "t", "--author", "a", "--limit", 7)
    assert asked == [{"base_model": "b", "task": "t", "author": "a", "limit": 7}]
    lines = result.stdout.splitlines()
    assert len(lines) == 3 and all(task in lines[1] for task in TASKS)  # nothing is cut in a pipe
    assert lines[1].split()[-5:] == ["50.0", "4", "3", "1,234", "2026-01-02"]
    told = json.loads(rlora("zoo", "search", "--json").stdout)
    assert [entry["repo_id"] for entry in told] == [info.repo_id for info in INFOS]
    assert rlora("zoo", "search", "--limit", 0).exit_code == 2


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
    assert lines[1].split() == ["task_0", "50.0", "%", "60.0", "%"]
    assert lines[-1].startswith("mean")
    assert json.loads(rlora("zoo", "compare", *names, "--json").stdout)["rows"][0]["task"] == "task_0"


def test_zoo_show(rlora, monkeypatch):
    monkeypatch.setattr(rlora_trl.zoo, "show", lambda repo, revision: INFOS[0])
    result = rlora("zoo", "show", "user/x")
    assert "3 heads of rank 4, router softmax" in result.stdout and "task_5" in result.stdout
    assert json.loads(rlora("zoo", "show", "user/x", "--json").stdout)["num_heads"] == 3


def test_zoo_install_without_a_manifest(rlora, tmp_path):
    result = rlora("zoo", "install", tmp_path / "zoo.yaml")
    assert result.exit_code == 1 and "There is no file or folder" in result.stderr
