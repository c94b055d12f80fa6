"""`rlora push`: what it passes on and shows. `tests/hub` runs it against a server."""

import inspect
import json

import pytest
from huggingface_hub import CommitInfo

import rlora_cli.push
import rlora_trl.publish


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


def test_push_makes_exports_on_the_base_of_the_folder(rlora, pushed, make_adapter, monkeypatch):
    checked, find_adapter = [], rlora_cli.push.find_adapter
    monkeypatch.setattr(rlora_cli.push, "find_adapter", lambda name: checked.append(name) or find_adapter(name))
    rlora("push", make_adapter(), "user/x", "--exports", "same", "--exports", "first")
    assert len(checked) == 1
    assert pushed[0]["exports"] == ["same", "first"]
    assert "default" in pushed[0]["export_from"].peft_config


def test_push_of_nothing(rlora, pushed):
    result = rlora("push", "missing", "user/x")
    assert result.exit_code == 1 and "There is no folder" in result.stderr
    assert not pushed
