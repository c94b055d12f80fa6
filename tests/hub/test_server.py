"""The Hub of the tests, driven by the real client: what other tests rely on when they count what was transferred."""

import hashlib
import json
import time
from importlib.metadata import version

import pytest
from worker import WorkerError


REPO = "user/adapter"
CARD = """---
base_model: user/base
datasets: [user/data]
library_name: peft
license: mit
model-index:
- name: adapter
  results:
  - task: {type: text-generation}
    dataset: {name: sums, type: sums}
    metrics: [{type: accuracy, value: 0.5}]
tags: [rlora]
---
See https://arxiv.org/abs/2502.15455
"""
CONFIG = b'{"peft_type": "RLORA"}'
WEIGHTS = bytes(range(256)) * 40
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
FILES = {"README.md": CARD, "adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS}
UPLOAD = """
from huggingface_hub import HfApi

commit = HfApi().upload_folder(repo_id=repo, folder_path=folder, **options)
result = {"oid": commit.oid, "url": commit.commit_url, "pr": commit.pr_num}
"""
DOWNLOAD = """
from pathlib import Path
from huggingface_hub import hf_hub_download

result = Path(hf_hub_download(repo, path, **options)).read_bytes().hex()
"""
CALL = """
from huggingface_hub import HfApi

result = getattr(HfApi(), name)(*arguments, **keywords)
result = None if result is None else str(result)
"""


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "folder", FILES)


def write(folder, files):
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.fixture
def upload(hub, worker, folder):
    hub.create(REPO)

    def run(**options):
        return worker.run(UPLOAD, repo=REPO, folder=folder, options=options)

    return run


@pytest.fixture
def download(worker):
    def run(path, **options):
        return bytes.fromhex(worker.run(DOWNLOAD, repo=REPO, path=path, options=options))

    return run


@pytest.fixture
def api(worker):
    """Call a method of `HfApi`; what it returns comes back as text."""

    def call(name, *arguments, **keywords):
        return worker.run(CALL, name=name, arguments=arguments, keywords=keywords)

    return call


class TestUploads:
    def test_round_trip(self, hub, upload, worker):
        commit = upload()
        assert commit["oid"] == hub.head(REPO) and commit["url"] == f"{hub.url}/{REPO}/commit/{commit['oid']}"
        assert [item.title for item in hub.commits(REPO)] == ["Upload folder using huggingface_hub", "initial commit"]
        source = "from huggingface_hub import snapshot_download as download; result = download('user/adapter')"
        snapshot = hub.home / "hub" / "models--user--adapter" / "snapshots" / commit["oid"]
        assert worker.run(source) == str(snapshot)
        stored = {name: (snapshot / name).read_bytes() for name in FILES}
        assert stored == {name: hub.files(REPO)[name] for name in FILES} == {**FILES, "README.md": CARD.encode()}
        assert (snapshot / "adapter_model.safetensors").resolve().name == SHA256

    def test_token_stays_with_the_hub(self, hub, upload, download):
        upload()
        download("adapter_model.safetensors")
        requests = {storage: [r for r in hub.requests if r.storage is storage] for storage in (False, True)}
        assert {r.authorization for r in requests[False]} == {f"Bearer {hub.token}"}
        assert {r.method for r in requests[True]} == {"PUT", "GET"}
        assert {r.authorization for r in requests[True]} == {None}

    def test_unchanged_files_are_not_sent_again(self, hub, upload, folder):
        first = upload()
        assert hub.uploaded_bytes() == hub.uploaded_bytes(SHA256) == len(WEIGHTS)
        assert upload()["oid"] == first["oid"] and len(hub.commits(REPO)) == 2
        (folder / "adapter_config.json").write_bytes(b"{}")
        assert upload()["oid"] == hub.head(REPO) != first["oid"]
        assert hub.files(REPO)["adapter_config.json"] == b"{}"
        assert hub.count("POST", "/commit/") == 2 and hub.uploaded_bytes() == len(WEIGHTS)

    @pytest.mark.parametrize("fault", [{"drop_after": 700}, {"status": 503}])
    def test_only_the_failed_part_is_sent_again(self, hub, upload, fault):
        hub.api.part_size = 3000
        hub.fail("PUT", f"/upload/{REPO}/{SHA256}/2", **fault)
        upload()
        parts = [(r.path.rsplit("/", 1)[1], r.status) for r in hub.requests if r.method == "PUT"]
        assert parts == [("1", 200), ("2", fault.get("status", 0)), ("2", 200), ("3", 200), ("4", 200)]
        assert hub.files(REPO)["adapter_model.safetensors"] == WEIGHTS

    def test_a_second_try_sends_what_is_missing(self, hub, upload, folder):
        other = b"\0" * 5000
        (folder / "other.bin").write_bytes(other)
        fault = hub.fail("PUT", hashlib.sha256(other).hexdigest(), status=403, times=None)
        with pytest.raises(WorkerError, match="RuntimeError: Error while uploading 'other.bin'"):
            upload()
        assert len(hub.commits(REPO)) == 1 and hub.uploaded_bytes(SHA256) == len(WEIGHTS)
        fault.times = 0
        upload()
        assert hub.files(REPO)["other.bin"] == other and hub.uploaded_bytes(SHA256) == len(WEIGHTS)

    def test_pull_request(self, hub, upload, worker, api):
        head = hub.head(REPO)
        assert upload(create_pr=True, token=hub.other_token)["pr"] == 1
        assert hub.head(REPO) == head and set(hub.files(REPO)) == {".gitattributes"}
        assert hub.files(REPO, "refs/pr/1")["adapter_model.safetensors"] == WEIGHTS
        change = {"path_or_fileobj": "b", "path_in_repo": "c.txt", "repo_id": REPO, "revision": "refs/pr/1"}
        source = "from huggingface_hub import upload_file; upload_file(**{**change, 'path_or_fileobj': b'more'})"
        worker.run(source, change={**change, "token": hub.other_token})
        assert len(hub.commits(REPO, "refs/pr/1")) == 3 and hub.head(REPO) == head
        details = api("get_discussion_details", REPO, 1)
        assert "is_pull_request=True" in details and "author='other'" in details
        assert "refs/pr/1" in api("list_repo_refs", REPO, include_pull_requests=True)
        with pytest.raises(WorkerError, match="403 Forbidden"):
            upload(token=hub.other_token)

    def test_a_commit_in_between_is_a_conflict(self, hub, upload):
        parent = hub.head(REPO)
        hub.before("POST", "/commit/main", lambda: hub.commit(REPO, {"notes.txt": "first"}))
        with pytest.raises(WorkerError, match="412 Precondition Failed"):
            upload(parent_commit=parent)
        assert set(hub.files(REPO)) == {".gitattributes", "notes.txt"}
        upload(parent_commit=hub.head(REPO))
        assert set(hub.files(REPO)) == {".gitattributes", "notes.txt", *FILES}

    def test_ignored_files(self, hub, upload, folder):
        write(folder, {".gitignore": "*.log\nruns\n", "a.log": "a", "runs/b.bin": b"\0", "c.txt": "c"})
        upload()
        assert set(hub.files(REPO)) == {".gitattributes", ".gitignore", "c.txt", *FILES}
        assert hub.uploaded_bytes() == len(WEIGHTS)

    def test_what_was_sent(self, hub, upload):
        upload(commit_message="mine")
        commit = next(r for r in hub.requests if "/commit/" in r.path)
        lines = [json.loads(line) for line in commit.body.splitlines()]
        assert lines[0]["value"]["summary"] == "mine"
        assert {(line["key"], line["value"]["path"]) for line in lines[1:]} == {
            ("file", "README.md"),
            ("file", "adapter_config.json"),
            ("lfsFile", "adapter_model.safetensors"),
        }

    def test_deletions(self, hub, upload, worker, folder):
        write(folder, {"exports/a/x.bin": b"\0", "exports/b/y.bin": b"\1"})
        upload()
        source = "from huggingface_hub import HfApi; HfApi().delete_{}('{}', 'user/adapter')"
        worker.run(source.format("folder", "exports/a"))
        worker.run(source.format("file", "adapter_config.json"))
        assert set(hub.files(REPO)) == {".gitattributes", "README.md", "adapter_model.safetensors", "exports/b/y.bin"}
        with pytest.raises(WorkerError, match="EntryNotFoundError"):
            worker.run(source.format("file", "adapter_config.json"))

    def test_an_object_that_was_never_uploaded_cannot_be_committed(self, hub, upload, worker):
        hub.fail("PUT", "/upload/", status=200)
        hub.fail("POST", "/lfs/verify", status=200)
        with pytest.raises(WorkerError, match="points to an object that was not uploaded"):
            upload()
        assert len(hub.commits(REPO)) == 1


class TestRepositories:
    def test_create_and_delete(self, hub, api):
        assert api("create_repo", "user/new", private=True) == f"{hub.url}/user/new"
        assert hub.repo("user/new").private
        with pytest.raises(WorkerError, match="409"):
            api("create_repo", "user/new")
        assert api("create_repo", "user/new", exist_ok=True) == f"{hub.url}/user/new"
        api("update_repo_settings", "user/new", private=False)
        assert not hub.repo("user/new").private
        assert api("create_repo", "org/new") == f"{hub.url}/org/new"
        assert api("create_repo", "own") == f"{hub.url}/user/own"
        api("delete_repo", "user/new")
        with pytest.raises(WorkerError, match="RepositoryNotFoundError"):
            api("delete_repo", "user/new")

    @pytest.mark.parametrize(
        ("token", "name", "arguments", "error"),
        [
            ("other_token", "model_info", ["user/private"], "RepositoryNotFoundError: 404"),
            (False, "model_info", ["user/private"], "RepositoryNotFoundError: 401"),
            ("token", "model_info", ["user/missing"], "RepositoryNotFoundError: 404"),
            ("other_token", "create_branch", ["user/private"], "RepositoryNotFoundError: 404"),
            ("other_token", "create_branch", ["user/public"], "HfHubHTTPError: 403"),
            ("read_token", "create_branch", ["user/public"], "HfHubHTTPError: 403"),
            (False, "create_branch", ["user/public"], "HfHubHTTPError: .*401"),
            ("other_token", "create_repo", ["user/new"], "HfHubHTTPError: 403"),
            ("read_token", "create_repo", ["user/new"], "HfHubHTTPError: 403"),
            ("hf_test_unknown", "model_info", ["user/public"], "HfHubHTTPError: .*401"),
            ("hf_test_unknown", "whoami", [], "HfHubHTTPError: Invalid user token"),
            ("token", "dataset_info", ["user/data"], "RepositoryNotFoundError: 404"),
        ],
    )
    def test_errors_of_access(self, hub, api, token, name, arguments, error):
        hub.create("user/public")
        hub.create("user/private", private=True)
        options = {"branch": "new"} if name == "create_branch" else {}
        with pytest.raises(WorkerError, match=error):
            api(name, *arguments, token=getattr(hub, token, token) if token else False, **options)

    def test_gated(self, hub, download):
        hub.commit(REPO, FILES)
        hub.repo(REPO).gated = True
        assert download("adapter_config.json") == CONFIG
        with pytest.raises(WorkerError, match="GatedRepoError: 403"):
            download("README.md", token=hub.other_token)
        with pytest.raises(WorkerError, match="GatedRepoError: 401"):
            download("README.md", token=False)
        hub.repo(REPO).granted.add("other")
        assert download("README.md", token=hub.other_token) == CARD.encode()

    def test_private_files_are_for_the_owner(self, hub, download):
        hub.commit(REPO, FILES)
        hub.repo(REPO).private = True
        assert download("adapter_config.json", token=hub.read_token) == CONFIG
        hub.wipe()
        with pytest.raises(WorkerError) as error:
            download("adapter_config.json", token=hub.other_token)
        assert error.value.type == "RepositoryNotFoundError" and "HfHubHTTPError" in error.value.bases

    def test_branches_and_tags(self, hub, api, upload):
        first = hub.head(REPO)
        api("create_branch", REPO, branch="trial/1")
        api("create_branch", REPO, branch="trial/1", exist_ok=True)
        commit = upload(revision="trial/1")
        assert (hub.head(REPO), hub.head(REPO, "trial/1")) == (first, commit["oid"])
        api("create_tag", REPO, tag="v1", revision="trial/1")
        with pytest.raises(WorkerError, match="409"):
            api("create_tag", REPO, tag="v1")
        refs = api("list_repo_refs", REPO)
        assert "ref='refs/heads/trial/1'" in refs and "ref='refs/tags/v1'" in refs and commit["oid"] in refs
        api("delete_branch", REPO, branch="trial/1")
        assert hub.head(REPO, "v1") == commit["oid"]
        api("delete_tag", REPO, tag="v1")
        for name in ("trial/1", "v1"):
            with pytest.raises(WorkerError, match="RevisionNotFoundError"):
                api("model_info", REPO, revision=name)
        with pytest.raises(WorkerError, match="RevisionNotFoundError"):
            upload(revision="missing")

    def test_history(self, hub, worker):
        oids = [hub.commit(REPO, {"a.txt": text}, message=f"set {text}") for text in "xyz"]
        hub.api.page_size = 2
        source = """
        from huggingface_hub import HfApi
        result = [[c.commit_id, c.title, c.authors] for c in HfApi().list_repo_commits("user/adapter")]
        """
        rows = worker.run(source)
        assert rows[:3] == [[oid, f"set {text}", ["user"]] for oid, text in zip(oids[::-1], "zyx", strict=True)]
        assert rows[3][1] == "initial commit" and hub.count("GET", "/commits/") == 2


class TestDownloads:
    def test_revisions(self, hub, download, api):
        first = hub.commit(REPO, FILES)
        hub.commit(REPO, {"adapter_config.json": "{}"}, revision="trial")
        api("create_tag", REPO, tag="v1", revision=first)
        hub.commit(REPO, {"adapter_config.json": "[]"})
        expected = {"main": b"[]", "trial": b"{}", "v1": CONFIG, first: CONFIG, first[:8]: CONFIG}
        assert {name: download("adapter_config.json", revision=name) for name in expected} == expected

    def test_missing_file_and_revision(self, hub, download, api):
        oid = hub.commit(REPO, FILES)
        with pytest.raises(WorkerError) as error:
            download("missing.json")
        assert error.value.type == "RemoteEntryNotFoundError" and "EntryNotFoundError" in error.value.bases
        assert (hub.home / "hub" / "models--user--adapter" / ".no_exist" / oid / "missing.json").exists()
        assert [api("file_exists", REPO, path) for path in ("missing.json", "README.md")] == ["False", "True"]
        with pytest.raises(WorkerError, match="RevisionNotFoundError"):
            download("README.md", revision="missing")

    def test_tree(self, hub, worker):
        hub.commit(REPO, {**FILES, "exports/a/x.bin": b"\0" * 10})
        last = hub.commit(REPO, {"exports/b.txt": "b"}, message="add b")
        hub.api.page_size = 2
        source = """
        from huggingface_hub import HfApi
        rows = HfApi().list_repo_tree("user/adapter", **options)
        sha256 = lambda row: row.lfs.sha256 if getattr(row, "lfs", None) else None
        result = [[row.path, sha256(row), row.last_commit and row.last_commit.oid] for row in rows]
        """
        flat = [row[0] for row in worker.run(source, options={})]
        assert flat == [".gitattributes", *sorted(FILES), "exports"] and hub.count("GET", "/tree/") == 3
        deep = {row[0]: row[1] for row in worker.run(source, options={"recursive": True})}
        assert deep["adapter_model.safetensors"] == SHA256
        assert set(deep) == {*flat, "exports/a", "exports/a/x.bin", "exports/b.txt"} and deep["README.md"] is None
        below = worker.run(source, options={"path_in_repo": "exports", "expand": True})
        assert [row[0] for row in below] == ["exports/a", "exports/b.txt"]
        assert below[1][2] == last != below[0][2]
        with pytest.raises(WorkerError, match="RemoteEntryNotFoundError"):
            worker.run(source, options={"path_in_repo": "missing"})

    def test_paths_info(self, hub, worker):
        hub.commit(REPO, {**FILES, "exports/a.txt": "a"})
        source = """
        from huggingface_hub import HfApi
        rows = HfApi().get_paths_info("user/adapter", ["README.md", "exports", "missing"])
        result = [[row.path, getattr(row, "size", None)] for row in rows]
        """
        assert worker.run(source) == [["README.md", len(CARD)], ["exports", None]]


class TestModels:
    def test_info(self, hub, worker, download):
        hub.commit(REPO, FILES)
        download("adapter_config.json")
        source = """
        from huggingface_hub import HfApi
        info = HfApi().model_info("user/adapter", files_metadata=True)
        data = info.card_data
        result = {
            "sha": info.sha, "author": info.author, "downloads": info.downloads, "library": info.library_name,
            "tags": info.tags, "private": info.private, "modified": info.last_modified,
            "card": [data.base_model, data.license, data.eval_results[0].metric_value],
            "files": {s.rfilename: [s.size, s.lfs and s.lfs.sha256] for s in info.siblings},
        }
        """
        info = worker.run(source)
        expected_tags = ["rlora", "base_model:user/base", "base_model:adapter:user/base", "license:mit"]
        assert {*expected_tags, "peft", "safetensors", "dataset:user/data", "arxiv:2502.15455"} < set(info["tags"])
        assert info["card"] == ["user/base", "mit", 0.5] and info["library"] == "peft"
        assert info["files"]["adapter_model.safetensors"] == [len(WEIGHTS), SHA256]
        assert info["files"]["adapter_config.json"] == [len(CONFIG), None]
        assert (info["sha"], info["author"], info["private"], info["downloads"]) == (hub.head(REPO), "user", False, 1)
        assert info["modified"].startswith("2026-01-01 00:00:")

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"filter": "rlora"}, ["org/c", "user/b", "user/a"]),
            ({"filter": ["rlora", "base_model:adapter:user/base"]}, ["user/b", "user/a"]),
            ({"filter": "base_model:user/other"}, ["org/c"]),
            ({"author": "org"}, ["org/c"]),
            ({"search": "/A"}, ["user/a"]),
            ({"limit": 2}, ["user/plain", "org/c"]),
            ({"filter": "rlora", "sort": "downloads"}, ["user/a", "org/c", "user/b"]),
            ({"filter": "rlora", "sort": "last_modified", "limit": 1}, ["user/b"]),
            ({"author": "user", "token": False}, ["user/plain", "user/a"]),
        ],
    )
    @pytest.mark.parametrize("page_size", [1, 1000])
    def test_list(self, hub, worker, options, expected, page_size):
        for repo_id, base in (("user/a", "user/base"), ("user/b", "user/base"), ("org/c", "user/other")):
            hub.commit(repo_id, {**FILES, "README.md": CARD.replace("user/base", base)})
        hub.commit("user/plain", {"README.md": "No metadata"})
        hub.commit("user/b", {"README.md": CARD + "changed"})
        hub.repo("user/b").private = True
        hub.repo("user/a").downloads = 5
        hub.api.page_size = page_size
        source = "from huggingface_hub import HfApi; result = [m.id for m in HfApi().list_models(**options)]"
        assert worker.run(source, options=options) == expected

    def test_fields_of_a_list(self, hub, worker):
        hub.commit(REPO, FILES)
        source = """
        from huggingface_hub import HfApi
        model = next(iter(HfApi().list_models(**options)))
        result = [name for name in ("sha", "tags", "card_data", "siblings", "base_models", "downloads")
                  if getattr(model, name) is not None]
        """
        fields = {
            "{}": ["tags", "downloads"],
            "full": ["sha", "tags", "siblings", "downloads"],
            "cardData": ["tags", "card_data", "downloads"],
            "expand": ["sha", "base_models"],
        }
        options = {"{}": {}, "full": {"full": True}, "cardData": {"cardData": True}}
        options["expand"] = {"expand": ["sha", "baseModels"]}
        assert {name: worker.run(source, options=options[name]) for name in fields} == fields

    @pytest.mark.parametrize(
        ("change", "error"),
        [
            (("license: mit", "license: mine"), '"license" must be one of'),
            (("base_model: user/base", "base_model: /home/me/model"), '"base_model" with value "/home/me/model"'),
            (("datasets: [user/data]", "datasets: [a b]"), '"datasets" with value "a b" is not valid'),
            (("dataset: {name: sums, type: sums}", "dataset: {type: sums}"), "dataset.name"),
            (("metrics: [{type: accuracy, value: 0.5}]", "metrics: [{type: accuracy}]"), "metrics"),
            (("tags: [rlora]", "tags: [1]"), '"tags" must be'),
            (("tags: [rlora]", "tags: ["), "YAML"),
        ],
    )
    def test_invalid_card(self, hub, upload, folder, change, error):
        text = CARD.replace(*change)
        assert text != CARD
        (folder / "README.md").write_text(text)
        with pytest.raises(WorkerError, match=error) as caught:
            upload()
        assert caught.value.type == "ValueError" and len(hub.commits(REPO)) == 1

    @pytest.mark.skipif(version("huggingface_hub") < "2", reason="1.x asks huggingface.co whatever HF_ENDPOINT is")
    def test_validate(self, hub, worker):
        source = "from huggingface_hub import ModelCard; ModelCard(text).validate()"
        worker.run(source, text=CARD)
        with pytest.raises(WorkerError, match="license"):
            worker.run(source, text=CARD.replace("license: mit", "license: mine"))
        assert hub.count("POST", "/api/validate-yaml") == 2


class TestFaults:
    def test_status_is_retried_before_the_commit_only(self, hub, upload):
        batch = hub.fail("POST", "/objects/batch", status=500)
        upload()
        assert batch.hits == 1 and hub.count("POST", "/objects/batch") == 2
        commit = hub.fail("POST", "/commit/", status=500)
        with pytest.raises(WorkerError, match="500 Internal Server Error"):
            upload(delete_patterns="*.json", allow_patterns="*.md", commit_message="second")
        assert commit.hits == 1 and len(hub.commits(REPO)) == 2

    @pytest.mark.parametrize("fault", [{"status": 502}, {"drop_after": 0}])
    def test_a_commit_may_land_although_the_client_sees_an_error(self, hub, upload, fault):
        hub.fail("POST", "/commit/", after=True, **fault)
        with pytest.raises(WorkerError, match="502|disconnected"):
            upload()
        assert hub.files(REPO)["adapter_model.safetensors"] == WEIGHTS
        assert upload()["oid"] == hub.head(REPO) and len(hub.commits(REPO)) == 2

    def test_cut_upload_of_a_commit(self, hub, upload):
        fault = hub.fail("POST", "/commit/", drop_after=100)
        with pytest.raises(WorkerError):
            upload()
        last = hub.requests[-1]
        assert fault.hits == 1 and len(hub.commits(REPO)) == 1 and (last.received, last.body) == (100, b"")

    @pytest.mark.parametrize(("path", "where"), [("adapter_model.safetensors", "/cdn/"), ("README.md", "/resolve/")])
    def test_cut_download_is_tried_again(self, hub, download, path, where):
        """The client keeps pieces of 10 MiB: what came of the first one is lost, and it starts from the beginning."""
        hub.commit(REPO, FILES)
        hub.fail("GET", where, drop_after=100)
        content = hub.files(REPO)[path]
        assert download(path) == content
        assert hub.downloaded_bytes(where) == 100 + len(content)
        assert [r.status for r in hub.requests if r.method == "GET" and where in r.path] == [200, 200]

    def test_cut_download_is_resumed(self, hub, worker):
        piece = 10 * 1024**2
        hub.commit(REPO, {"adapter_model.safetensors": bytes(piece) + WEIGHTS})
        hub.fail("GET", "/cdn/", drop_after=piece + 100)
        source = """
        from hashlib import sha256
        from pathlib import Path
        from huggingface_hub import hf_hub_download
        result = sha256(Path(hf_hub_download("user/adapter", "adapter_model.safetensors")).read_bytes()).hexdigest()
        """
        assert worker.run(source) == hub.repo(REPO).resolve("main").files["adapter_model.safetensors"].sha256
        sent = [(r.status, r.sent) for r in hub.requests if r.method == "GET" and r.storage]
        assert sent == [(200, piece + 100), (206, len(WEIGHTS))]

    def test_failures_take_turns(self, hub, api):
        hub.create(REPO)
        for status in (400, 418, 403):
            hub.fail("GET", REPO, status=status)
        hub.before("GET", REPO, lambda: hub.commit(REPO, {"a.txt": "a"}), times=None)
        for status in (400, 418, 403):
            with pytest.raises(WorkerError):
                api("model_info", REPO)
            assert hub.requests[-1].status == status
        api("model_info", REPO)
        assert len(hub.commits(REPO)) == 5

    def test_delay_and_skip(self, hub, download):
        hub.commit(REPO, FILES)
        fault = hub.fail("HEAD", "/resolve/", delay=0.5, skip=1)
        start = time.monotonic()
        download("README.md")
        assert fault.hits == 0 and time.monotonic() - start < 0.5
        download("adapter_config.json")
        assert fault.hits == 1 and time.monotonic() - start >= 0.5

    def test_headers_of_a_fault(self, hub, api):
        hub.create(REPO)
        hub.fail("GET", "/api/models/", status=404, headers={"X-Error-Code": "RevisionNotFound"}, times=None)
        for _ in range(2):
            with pytest.raises(WorkerError, match="RevisionNotFoundError"):
                api("model_info", REPO)

    def test_a_revision_that_moves(self, hub, worker):
        first = hub.commit(REPO, FILES)
        hub.before("GET", "/api/models/.*/tree/", lambda: hub.commit(REPO, {"adapter_config.json": "{}"}))
        source = "from huggingface_hub import snapshot_download as download; result = download('user/adapter')"
        assert worker.run(source).endswith(first) and hub.head(REPO) != first

    def test_a_hub_that_is_down_leaves_what_is_cached(self, hub, download):
        hub.commit(REPO, FILES)
        assert download("README.md") == CARD.encode()
        hub.fail("*", "", status=503, times=1)
        assert download("README.md") == CARD.encode()
        assert hub.requests[-1].status == 503, "a cached file is not asked for twice"
        hub.wipe()
        hub.fail("*", "", status=501, times=None)  # not 503, which is tried six times in 23 s when nothing is cached
        with pytest.raises(WorkerError, match="LocalEntryNotFoundError"):
            download("README.md")

    def test_other_contents_and_sizes(self, hub, download):
        """The client trusts what it gets: only a size that differs from the announced one is an error."""
        hub.commit(REPO, FILES)
        hub.tamper(REPO, "adapter_model.safetensors", b"\1" * len(WEIGHTS))
        assert download("adapter_model.safetensors") == b"\1" * len(WEIGHTS)
        hub.announce_size(REPO, "README.md", 10**15)
        assert hub.repo(REPO).resolve("main").files["README.md"].size == 10**15
        hub.tamper(REPO, "adapter_model.safetensors", b"short")
        hub.wipe()
        with pytest.raises(WorkerError, match="Consistency check failed"):
            download("adapter_model.safetensors")


class TestWorker:
    def test_calls_are_separate(self, worker):
        source = "import os; os.environ['HF_TOKEN'] = 'changed'; leftover = 1; print('not an answer')"
        assert worker.run(source) is None
        assert worker.run("import os; result = [os.environ['HF_TOKEN'], 'leftover' in globals()]") == [
            "hf_test_user",
            False,
        ]

    def test_errors(self, worker):
        with pytest.raises(WorkerError) as error:
            worker.run("{}['key']")
        assert (error.value.type, error.value.message) == ("KeyError", "'key'")
        assert "{}['key']" in error.value.traceback and "LookupError" in error.value.bases
        with pytest.raises(WorkerError, match="`result` must be JSON, got a set"):
            worker.run("result = {1}")
        with pytest.raises(WorkerError, match="SystemExit"):
            worker.run("raise SystemExit(2)")

    def test_a_dead_or_silent_worker_is_replaced(self, worker, monkeypatch):
        with pytest.raises(RuntimeError, match="exit code 7"):
            worker.run("import os; os._exit(7)")
        monkeypatch.setattr(worker, "timeout", 1.0)
        with pytest.raises(TimeoutError, match="no answer in 1.0 s"):
            worker.run("import time; time.sleep(60)")
        monkeypatch.undo()
        assert worker.run("result = 1 + 1") == 2

    def test_fresh_process_and_call(self, hub):
        source = "from huggingface_hub import constants; print(constants.ENDPOINT, constants.HF_HUB_OFFLINE)"
        assert hub.run(source).split() == [hub.url, "False"]
        assert hub.run(source, HF_HUB_OFFLINE="1").split() == [hub.url, "True"]
        assert hub.call("json:dumps", [1], indent=None) == "[1]"
