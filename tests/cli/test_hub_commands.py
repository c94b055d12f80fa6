"""What the commands for the Hub pass on and show. `tests/hub` runs them against a server."""

import inspect
import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from huggingface_hub import CommitInfo

import rlora_cli.push
import rlora_trl.publish
import rlora_trl.zoo
from rlora_trl.zoo import AdapterInfo, Comparison, Manifest, PinnedAdapter


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


URL = f"https://huggingface.co/user/x/commit/{'1' * 40}"


@pytest.fixture
def pushed(monkeypatch):
    """The arguments of pushes, checked against the real function's."""
    calls = []
    signature = inspect.signature(rlora_trl.publish.push_adapter)

    def push(*args, **kwargs):
        calls.append(signature.bind(*args, **kwargs).arguments)
        return CommitInfo(commit_url=URL, commit_message="", commit_description="", oid="1" * 40)

    monkeypatch.setattr(rlora_trl.publish, "push_adapter", push)
    monkeypatch.setattr(rlora_cli.push, "head_of", lambda repo, revision: None)
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
        "url": URL,
        "pull_request": None,
        "unchanged": False,
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
    assert URL in result.stdout


def test_push_tells_the_whole_name(rlora, pushed, make_adapter):
    result = rlora("push", make_adapter(), "x")
    assert result.stdout.splitlines()[0].split() == ["Published", "user/x"]


def test_push_of_what_is_there(rlora, pushed, make_adapter, monkeypatch):
    monkeypatch.setattr(rlora_cli.push, "head_of", lambda repo, revision: "1" * 40)
    result = rlora("push", make_adapter(), "user/x")
    assert result.stdout.splitlines()[0] == f"Unchanged  user/x, already at {'1' * 40}"
    assert json.loads(rlora("push", make_adapter("again"), "user/x", "--json").stdout)["unchanged"] is True


def test_push_refuses_exports_of_unknown_tasks(rlora, pushed, make_adapter):
    result = rlora("push", make_adapter(), "user/x", "--exports", "sam")
    assert result.exit_code == 1 and not pushed
    assert "There is no task 'sam'; the adapter has 'same', 'colour', 'first'. Did you mean 'same'?" in result.stderr


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
    assert asked == [{"base_model": "b", "task": "t", "author": "a", "limit": 7, "sort": "downloads"}]
    lines = result.stdout.splitlines()
    assert len(lines) == 3 and all(task in lines[1] for task in TASKS)  # nothing is cut in a pipe
    assert lines[1].split()[-5:] == ["50.0", "4", "3", "1,234", "2026-01-02"]
    told = json.loads(rlora("zoo", "search", "--json").stdout)
    assert [entry["repo_id"] for entry in told] == [info.repo_id for info in INFOS]
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
    assert lines[1].split() == ["task_0", "50.0", "%", "60.0", "%"]
    assert lines[-1].startswith("mean")
    assert json.loads(rlora("zoo", "compare", *names, "--json").stdout)["rows"][0]["task"] == "task_0"


def test_zoo_shows_gains(rlora, monkeypatch):
    metrics = {"same": {"accuracy": 0.75, "base_accuracy": 0.5}, "first": {"accuracy": 0.25}}
    info = AdapterInfo("user/x", tasks=("same", "first"), metrics=metrics)
    monkeypatch.setattr(rlora_trl.zoo, "show", lambda repo, revision: info)
    lines = rlora("zoo", "show", "user/x").stdout.splitlines()
    assert [line.split() for line in lines[-2:]] == [
        ["same", "75.0", "%", "50.0", "%", "+25.0"],
        ["first", "25.0", "%", "-", "-"],
    ]
    monkeypatch.setattr(rlora_trl.zoo, "compare", lambda repos, metric: Comparison((info,), ("same", "first")))
    assert "75.0 % (+25.0)" in rlora("zoo", "compare", "user/x").stdout


def test_zoo_pin(rlora, monkeypatch, tmp_path):
    asked = []

    def pin(repos, *, base_model):
        asked.append((repos, base_model))
        return Manifest(tuple(PinnedAdapter(repo, "1" * 40) for repo in repos), base_model)

    monkeypatch.setattr(Manifest, "pin", pin)
    words = ["user/x", "org/y", "--base-model", "org/base", "--output", tmp_path / "own.yaml"]
    result = rlora("zoo", "pin", *words)
    assert asked == [(["user/x", "org/y"], "org/base")]
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["adapter", "x", "y"]
    assert Manifest.load(tmp_path / "own.yaml").base_model == "org/base"
    assert json.loads(rlora("zoo", "pin", *words, "--json").stdout)["adapters"][1]["repo_id"] == "org/y"


def test_zoo_show(rlora, monkeypatch):
    monkeypatch.setattr(rlora_trl.zoo, "show", lambda repo, revision: INFOS[0])
    result = rlora("zoo", "show", "user/x")
    assert "3 heads of rank 4, router softmax" in result.stdout and "task_5" in result.stdout
    assert json.loads(rlora("zoo", "show", "user/x", "--json").stdout)["num_heads"] == 3


def test_zoo_install_without_a_manifest(rlora, tmp_path):
    result = rlora("zoo", "install", tmp_path / "zoo.yaml")
    assert result.exit_code == 1 and "There is no file or folder" in result.stderr
