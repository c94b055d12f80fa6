"""`pull_adapter` where the endpoint itself is hostile: names, sizes, redirects and bodies in its answers."""

import gzip
import json
import os
from pathlib import Path

import pytest
from samples import save_adapter

from rlora_trl.files.layout import published_files


REPO = "user/words"
PULL = """
import resource

from rlora_trl import pull_adapter
from rlora_trl.files import download

for name, value in constants.items():
    setattr(download, name, value)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    result = {"folder": pull_adapter(repo, **options)}
except Exception as error:
    # The names of its classes, so that a test can tell what a user would have to catch.
    result = {"error": [base.__name__ for base in type(error).__mro__], "message": str(error)}
result["grown"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
"""
GROWTH = 250_000  # KiB that a refused answer may take at most


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

    def run(constants=None, **options):
        return worker.run(PULL, repo=REPO, options=options, constants=constants or {})

    return run


def files_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() or path.is_symlink()}


def in_listing(change):
    """A change of the listing's JSON."""

    def alter(answer):
        data = json.loads(answer.body)
        changed = change(data)
        answer.body = json.dumps(data if changed is None else changed).encode()

    return alter


# Names that answers have


@pytest.mark.parametrize("header", ["ETag", "X-Linked-ETag", "X-Repo-Commit"])
@pytest.mark.parametrize("name", ["{victim}", "{relative}", "..", "", "a\\..\\b", "x" * 5000])
def test_names_in_headers_name_no_file(hub, pull, folder, tmp_path, header, name):
    """An answer can't write outside of the cache, nor choose a name in it; neither in a second download."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    storage = hub.home / "hub" / f"models--{REPO.replace('/', '--')}"
    relative = os.path.relpath(victim, storage / ("snapshots" if header == "X-Repo-Commit" else "blobs"))
    value = name.format(victim=victim, relative=relative)
    hub.rewrite("*", "/(resolve|cdn)/", lambda answer: answer.headers.update({header: f'"{value}"'.strip('"')}))

    # The same twice: the second time with a damaged file, which is downloaded again.
    local = Path(pull()["folder"])
    (local / "adapter_model.safetensors").resolve().write_bytes(b"damaged")
    local = Path(pull()["folder"])

    assert victim.read_text() == "mine" and list(tmp_path.iterdir()) == [victim]
    assert contents(local) == contents(folder)
    assert local == storage / "snapshots" / hub.head(REPO)
    names = {path.resolve() for path in local.iterdir()}
    assert {path.parent for path in names} == {storage / "blobs"}
    assert all(len(path.name) in (40, 64) and int(path.name, 16) for path in names)
    assert {"/".join(path.split("/")[:3]) for path in files_below(hub.home)} == {
        f"hub/{storage.name}/{name}" for name in ("blobs", "refs", "snapshots")
    }


def sibling(**changes):
    """The entry of the weights, with other values; a value that is a string gets the path of the victim."""

    def change(data):
        entry = next(entry for entry in data["siblings"] if entry["rfilename"] == "adapter_model.safetensors")
        entry.update(changes)

    return change


def set_value(**values):
    return lambda data: data.update(values)


LISTINGS = {
    "a commit that leads out": set_value(sha="../../x"),
    "an absolute commit": set_value(sha="/tmp/x"),
    "a commit of 41 digits": set_value(sha="a" * 41),
    "a commit with a line end": set_value(sha="a" * 40 + "\n"),
    "a commit in capitals": set_value(sha="A" * 40),
    "a number as commit": set_value(sha=5),
    "no commit": set_value(sha=None),
    "no list of files": set_value(siblings={"adapter_config.json": 1}),
    "no files": set_value(siblings=None),
    "text as a file": set_value(siblings=["adapter_config.json"]),
    "a number as name": sibling(rfilename=5),
    "a name that leads out": sibling(rfilename="../../adapter_model.safetensors"),
    "a hash that leads out": sibling(lfs={"sha256": "../../../../x", "size": 10, "pointerSize": 134}),
    "a hash of another length": sibling(lfs={"sha256": "a" * 40, "size": 10, "pointerSize": 134}),
    "no hash": sibling(lfs={"size": 10, "pointerSize": 134}),
    "text as hash": sibling(lfs="a" * 64),
    "a blob that leads out": sibling(blobId="../../x", lfs=None),
    "no blob": sibling(blobId=None, lfs=None),
    "a negative size": sibling(size=-1),
    "text as size": sibling(size="12"),
    "a truth value as size": sibling(size=True),
    "a huge size": sibling(size=10**30),
    "no size": sibling(size=None),
    "a list": lambda data: [],
    "a name": lambda data: "adapter",
    "a deep one": lambda data: json.loads("[" * 500 + "]" * 500),
}


@pytest.mark.parametrize("change", LISTINGS.values(), ids=LISTINGS.keys())
def test_listing_is_checked_before_it_is_used(hub, pull, change):
    hub.rewrite("GET", "/api/models/", in_listing(change))
    result = pull()
    assert "AdapterCheckError" in result["error"], result
    assert hub.downloaded_bytes() == 0
    assert files_below(hub.home) == set()


def test_commit_other_than_the_requested_one(hub, pull):
    first = hub.head(REPO)
    hub.rewrite("GET", "/api/models/", in_listing(set_value(sha="b" * 40)))
    result = pull(revision=first)
    assert "AdapterCheckError" in result["error"] and first in result["message"] and "b" * 40 in result["message"]


@pytest.mark.parametrize("revision", ["../../x", "/tmp/x", "a/../../b", "a\\b", ""])
def test_revision_that_is_no_name_of_one(hub, pull, revision):
    hub.rewrite("*", "/", lambda answer: None)
    result = pull(revision=revision)
    assert "ValueError" in result["error"] and "revision" in result["message"]
    assert hub.requests == [] and files_below(hub.home) == set()


# Amounts of data


def endless(piece=b"x" * 65536):
    while True:
        yield piece


def forever(answer):
    answer.body = endless()


def many_files(answer):
    """More files than a repository may have, in 30 MB."""
    entry = b'{"rfilename": "a.txt", "size": 1}'
    answer.body = b'{"sha": "' + b"a" * 40 + b'", "siblings": [' + b",".join([entry] * 10**6) + b"]}"


def bomb(answer):
    """20 MB for each 20 KB."""
    answer.headers["Content-Encoding"] = "gzip"
    answer.body = endless(gzip.compress(b" " * 20_000_000))


@pytest.mark.parametrize("change", [forever, many_files, bomb])
def test_listing_without_end(hub, pull, change):
    hub.rewrite("GET", "/api/models/", change)
    result = pull()
    assert "AdapterCheckError" in result["error"], result
    assert result["grown"] < GROWTH
    assert files_below(hub.home) == set()


@pytest.mark.parametrize("change", [forever, bomb])
@pytest.mark.parametrize("status", [403, 404, 500])
def test_refusal_without_end(hub, pull, change, status):
    hub.rewrite("GET", "/api/models/", lambda answer: (change(answer), setattr(answer, "status", status)))
    result = pull()
    assert "HfHubHTTPError" in result["error"] and str(status) in result["message"]
    assert result["grown"] < GROWTH


@pytest.mark.parametrize("body", [b"[1]", b'{"error": {"a": 1}, "errors": 5}', b"[" * 100_000, b"\xff\xfe"])
def test_refusal_that_is_no_message(hub, pull, body):
    hub.rewrite("GET", "/api/", lambda answer: (setattr(answer, "body", body), setattr(answer, "status", 403)))
    result = pull()
    assert "HfHubHTTPError" in result["error"]


@pytest.mark.parametrize("change", [forever, bomb])
@pytest.mark.parametrize("path", ["/resolve/.*/adapter_config.json", "/cdn/"])
def test_file_without_end(hub, pull, change, path):
    """No more is stored than the listing announces."""
    hub.rewrite("GET", path, change)
    result = pull()
    assert "AdapterCheckError" in result["error"], result
    assert result["grown"] < GROWTH
    assert not [path for path in files_below(hub.home) if path.endswith(".incomplete")]


def test_file_that_is_shorter_than_listed(hub, pull):
    hub.rewrite("GET", "/cdn/", lambda answer: setattr(answer, "body", answer.body[:-5]))
    assert "AdapterCheckError" in pull()["error"]


def test_huge_headers(hub, pull):
    hub.rewrite("GET", "/api/", lambda answer: answer.headers.update({"X-Long": "x" * 10**7}))
    assert {"AdapterCheckError", "HTTPError", "ConnectionError"} & set(pull()["error"])


def drip(answer, wait=0.1):
    import time

    def pieces(body):
        for start in range(len(body)):
            yield body[start : start + 1]
            time.sleep(wait)

    answer.body = pieces(answer.body)


@pytest.mark.parametrize("path", ["/api/models/", "/resolve/.*/adapter_config.json"])
def test_dripping_answers_end(hub, pull, path):
    """One byte after the other, each in time for the timeout of a single read."""
    hub.rewrite("GET", path, drip)
    result = pull(constants={"_GRACE": 1.0})
    assert "TimeoutError" in result["error"], result


def test_silent_endpoint(hub, pull):
    hub.fail("GET", "/api/models/", delay=5.0)
    source = f"from rlora_trl import pull_adapter; pull_adapter({REPO!r})"
    with pytest.raises(RuntimeError, match="can't be reached"):
        hub.run(source, HF_HUB_DOWNLOAD_TIMEOUT="1")


# Redirects


@pytest.mark.parametrize("path", ["/api/models/", "/resolve/.*/adapter_config.json"])
@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://", "//", "http://[", "{self}"]
)
def test_redirects_that_lead_nowhere(hub, pull, path, location):
    def redirect(answer):
        answer.status, answer.body = 302, b""
        answer.headers["Location"] = location.format(self=f"{hub.url}/api/models/{REPO}/resolve/x/adapter_config.json")

    hub.rewrite("GET", path, redirect)
    result = pull()
    assert {"ConnectionError", "HTTPError", "AdapterCheckError"} & set(result["error"]), result
    assert "root:" not in result["message"]


def test_no_token_on_a_redirect(hub, pull):
    """Neither of the listing nor of a file."""
    target = []

    def redirect(answer):
        if answer.status == 200:
            answer.status, answer.headers["Location"] = 302, f"{hub.storage_url}/api/models/{target[0]}"

    target.append("user/elsewhere")
    hub.rewrite("GET", "/api/models/user/words", redirect)
    pull()
    assert {r.authorization for r in hub.requests if r.storage} == {None}
    assert {r.authorization for r in hub.requests if not r.storage} == {f"Bearer {hub.token}"}


def test_contents_from_elsewhere_are_compared_with_the_listing(hub, pull, folder):
    """A redirect to another server, such as one in the user's own network, brings nothing of it into the cache."""

    def redirect(answer):
        answer.status, answer.body = 302, b""
        answer.headers["Location"] = f"{hub.storage_url}/cdn/user/inner/{secret}"

    hub.commit("user/inner", {"secret.bin": b"\0 of the inner network"})
    (secret,) = hub.repo("user/inner").uploaded
    hub.rewrite("GET", "/resolve/.*/adapter_config.json", redirect)
    result = pull()
    assert "AdapterCheckError" in result["error"] and "inner network" not in result["message"]
    assert not any("inner" in (hub.home / path).read_text(errors="ignore") for path in files_below(hub.home))


def test_pulled_adapter_is_found_by_its_name(hub, worker, pull):
    """By PEFT and `huggingface_hub`, without a network, which read the same cache."""
    local = pull()["folder"]
    source = """
    from huggingface_hub import hf_hub_download
    import peft, rlora_trl
    result = [hf_hub_download(repo, name, local_files_only=True) for name in ("adapter_config.json",)]
    result.append(peft.PeftConfig.from_pretrained(repo, local_files_only=True).peft_type)
    """
    hub.requests.clear()
    assert worker.run(source, repo=REPO) == [f"{local}/adapter_config.json", "RLORA"]
    assert hub.requests == []
    # And online, nothing is downloaded a second time.
    source = (
        "from huggingface_hub import snapshot_download; result = snapshot_download(repo, allow_patterns='adapter*')"
    )
    assert worker.run(source, repo=REPO) == local
    assert hub.downloaded_bytes() == 0
