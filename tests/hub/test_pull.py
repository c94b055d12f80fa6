"""`pull_adapter` against a real HTTP server: pinned, checked, cached; and what it refuses."""

import json
from pathlib import Path

import pytest
from processes import WorkerError
from samples import BASE, save_adapter

from rlora_trl.files.layout import published_files
from rlora_trl.hub import adapter_digest


REPO = "user/words"
PULL = """
from rlora_trl import pull_adapter
result = pull_adapter(repo, **options)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_adapter(tmp_path_factory.mktemp("adapter"))
    for path in folder.glob("tokenizer*"):
        path.unlink()
    return folder


def contents(folder):
    return {path: (Path(folder) / path).read_bytes() for path in published_files(folder)}


@pytest.fixture
def pull(hub, worker, folder):
    hub.commit(REPO, contents(folder))

    def run(repo=REPO, **options):
        return worker.run(PULL, repo=repo, options=options)

    return run


def test_folder_and_cache(hub, pull, folder):
    local = pull()
    assert contents(local) == contents(folder)
    hub.requests.clear()
    assert pull() == local
    assert hub.downloaded_bytes() == 0, "what is in the cache was downloaded again"


def test_only_what_is_needed_is_downloaded(hub, pull):
    hub.commit(REPO, {"runs/events.out.tfevents": "log", "notes.txt": "note", "exports/first/README.md": "x"})
    local = Path(pull())
    assert not any((local / path).exists() for path in ("runs", "notes.txt", "exports"))


def test_pinned_revision(hub, pull, tmp_path, folder):
    first = hub.head(REPO)
    newer = save_adapter(tmp_path / "newer", seed=8)
    hub.commit(REPO, {"adapter_model.safetensors": (newer / "adapter_model.safetensors").read_bytes()})
    assert adapter_digest(pull(revision=first)) == adapter_digest(folder)
    assert adapter_digest(pull()) == adapter_digest(newer)
    with pytest.raises(WorkerError) as caught:
        pull(revision="no-such-branch")
    assert caught.value.type == "RevisionNotFoundError"


def test_revision_that_moves_between_two_requests(hub, pull, tmp_path, folder):
    """All files are of one commit, whichever."""
    newer = save_adapter(tmp_path / "newer", seed=8, r=2)
    files = {path: (newer / path).read_bytes() for path in ("adapter_model.safetensors", "adapter_config.json")}
    moved = hub.before("GET", r"/resolve/.*/adapter_config.json", lambda: hub.commit(REPO, files))
    local = pull()
    assert moved.hits == 1
    config = json.loads((Path(local) / "adapter_config.json").read_text())
    old = adapter_digest(folder)
    assert adapter_digest(local) == (adapter_digest(newer) if config["r"] == 2 else old), "files of two commits"


def test_offline(hub, worker, pull):
    with pytest.raises(WorkerError) as caught:
        pull(local_files_only=True)
    assert caught.value.type in ("LocalEntryNotFoundError", "IncompleteSnapshotError")
    local = pull()
    hub.requests.clear()
    assert pull(local_files_only=True) == local
    assert hub.requests == []
    source = f"from rlora_trl import pull_adapter; print(pull_adapter({REPO!r}))"
    assert hub.run(source, HF_HUB_OFFLINE="1").strip() == local
    assert hub.requests == []


def test_private_and_missing(hub, pull):
    hub.repo(REPO).private = True
    pull()
    for token in (hub.other_token, False):
        with pytest.raises(WorkerError) as caught:
            pull(token=token)
        assert caught.value.type == "RepositoryNotFoundError"
    with pytest.raises(WorkerError) as caught:
        pull("user/nothing")
    assert caught.value.type == "RepositoryNotFoundError"


def test_base_model(pull):
    pull(base_model=BASE)
    with pytest.raises(WorkerError, match="other/model") as caught:
        pull(base_model="other/model")
    assert caught.value.type == "AdapterCheckError" and BASE in caught.value.message


def test_local_folder_is_checked_too(worker, folder, tmp_path):
    run = {"repo": str(folder), "options": {}}
    assert worker.run(PULL, **run) == str(folder)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(WorkerError) as caught:
        worker.run(PULL, repo=str(tmp_path), options={})
    assert caught.value.type == "AdapterCheckError"


HOSTILE = {
    "pickled weights": {"adapter_model.bin": b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR."},
    "a pickle beside": {"training_args.bin": b"\x80\x04"},
    "a script": {"modeling_rlora.py": "raise SystemExit"},
    "a path that leads out": {"../../evil.json": "{}"},
    "a card with a YAML bomb": {"README.md": "---\na: &a [x, x]\nb: [*a, *a]\n---\n"},
    "a JSON bomb": {"adapter_config.json": "[" * 100_000 + "]" * 100_000},
    "a huge header": {"adapter_model.safetensors": (2**62).to_bytes(8, "little") + b"{}"},
    "a foreign configuration": {"adapter_config.json": '{"peft_type": "LORA", "r": 8}'},
}


@pytest.mark.parametrize("files", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_content_is_refused(hub, pull, files, tmp_path):
    hub.commit(REPO, files)
    with pytest.raises(WorkerError) as caught:
        pull()
    assert caught.value.type == "AdapterCheckError", caught.value
    assert not (tmp_path / "pwned").exists()


def test_announced_sizes_are_checked_before_the_download(hub, pull):
    hub.announce_size(REPO, "adapter_config.json", 2**40)
    with pytest.raises(WorkerError) as caught:
        pull()
    assert caught.value.type == "AdapterCheckError"
    assert hub.downloaded_bytes() == 0


def test_swapped_weights_do_not_match_the_card(hub, worker, pull, tmp_path, folder):
    digest = adapter_digest(folder)
    hub.commit(REPO, {"README.md": f"---\ntags: [rlora]\nrlora:\n  format: 1\n  digest: '{digest}'\n---\nCard"})
    pull()
    other = save_adapter(tmp_path / "other", seed=9)
    hub.commit(REPO, {"adapter_model.safetensors": (other / "adapter_model.safetensors").read_bytes()})
    with pytest.raises(WorkerError, match="do not match its card") as caught:
        pull()
    assert caught.value.type == "AdapterCheckError"


def test_content_that_differs_from_the_listing(hub, pull, folder):
    """A byte changed on the way, at the same length: the hash tells, and nothing is returned."""
    weights = (folder / "adapter_model.safetensors").read_bytes()
    hub.tamper(REPO, "adapter_model.safetensors", weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(WorkerError, match="other contents than the Hub lists"):
        pull()


def test_damaged_cache_is_repaired(hub, pull, folder):
    local = Path(pull())
    blob = (local / "adapter_model.safetensors").resolve()
    blob.write_bytes(b"\0" * blob.stat().st_size)
    assert contents(pull()) == contents(folder)


def test_cut_and_slow_downloads(hub, pull, folder):
    hub.fail("GET", "/cdn/", drop_after=1000)
    hub.fail("GET", "/resolve/.*config", delay=0.5)
    assert contents(pull()) == contents(folder)


def test_lasting_cut_leaves_nothing_usable_and_the_retry_succeeds(hub, pull, folder):
    hub.fail("GET", "/cdn/", drop_after=1000, times=None)
    with pytest.raises(WorkerError):
        pull()
    hub.faults.clear()
    assert contents(pull()) == contents(folder)


def test_cache_serves_where_the_hub_does_not_answer(hub, pull, folder):
    with_hub = pull()
    hub.commit("user/other", contents(folder))
    hub.fail("*", "/api/", drop_after=0, times=None)
    assert pull() == with_hub
    with pytest.raises(WorkerError, match="not in the cache"):
        pull("user/other")


def test_folder_of_the_same_name(worker, folder):
    with pytest.raises(WorkerError, match="is a local folder"):
        worker.run(PULL, repo=str(folder), options={"revision": "main"})


@pytest.mark.parametrize(("status", "error"), [(401, "401"), (403, "403"), (404, "404")])
def test_refusals(hub, pull, status, error):
    hub.fail("GET", "/api/models/", status=status, times=None)
    with pytest.raises(WorkerError, match=error):
        pull()
