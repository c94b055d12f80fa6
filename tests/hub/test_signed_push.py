"""Signed pushes and verified pulls, against a real HTTP server."""

import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
from processes import RLORA, ROOT, WorkerError, run
from samples import BASE, save_adapter, save_base


if find_spec("model_signing") is None:
    pytest.skip("model-signing is not installed", allow_module_level=True)
pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")

REPO = "user/adapter"
PUSH = """
from rlora_trl import push_adapter
result = push_adapter(folder, repo, **options).oid
"""
PULL = """
from rlora_trl import pull_adapter
result = pull_adapter(repo, **options)
"""


def page(language):
    text = (ROOT / "docs" / "integrations" / "signatures.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)[0]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def folder(hub, base, tmp_path):
    """The adapter and a pair of keys, made by the commands of the page, in the working directory of a user."""
    hub.commit(BASE, base)
    for line in page("bash").splitlines():
        if line.startswith("openssl"):
            subprocess.run(shlex.split(line, comments=True), cwd=tmp_path, check=True, capture_output=True)
    return save_adapter(tmp_path / "adapter")


@pytest.fixture
def push(worker, folder):
    return lambda **options: worker.run(PUSH, folder=str(folder), repo=REPO, options=options)


@pytest.fixture
def pull(worker, folder):
    public = str(folder.parent / "key.pub")
    return lambda **options: worker.run(PULL, repo=REPO, options={"verify": public, **options})


def test_commands_as_written(hub, folder):
    for line in page("bash").splitlines():
        words = shlex.split(line, comments=True)
        if words[0] == "rlora":
            result = run(
                [*RLORA, *words[1:]], cwd=folder.parent, env=hub.env(PYTHONPATH=":".join([str(ROOT), *sys.path]))
            )
            assert result.returncode == 0, result.stderr
    assert "by the key in key.pub" in result.stdout
    assert "model.sig" in hub.files(REPO)


def test_signed_and_verified(hub, push, pull, folder):
    """The signature covers what was committed; text on the Hub may change; an equal push changes nothing."""
    commit = push(sign=str(folder.parent / "key.pem"))
    pulled = pull()
    assert push(sign=str(folder.parent / "key.pem")) == commit == hub.head(REPO)
    card = hub.files(REPO)["README.md"] + b"\nWritten on the Hub.\n"
    hub.commit(REPO, {**hub.files(REPO), "README.md": card})
    assert pull() != pulled
    assert pull(local_files_only=True)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "rlora_record.json"])
def test_files_replaced_on_the_hub(hub, push, pull, folder, name, tmp_path):
    """By those of another valid adapter, which all other checks pass."""
    push(sign=str(folder.parent / "key.pem"))
    other = save_adapter(tmp_path / "other", seed=5)
    files = hub.files(REPO)
    files["README.md"] = re.sub(rb"\n.*sha256.*", b"", files["README.md"])
    content = (other / name).read_bytes() if name.endswith("tensors") else files[name].replace(b"}", b" }", 1)
    assert content != files[name]
    hub.commit(REPO, {**files, name: content})
    pull(verify=None)
    with pytest.raises(WorkerError, match=f"{name}: not the contents that were signed") as caught:
        pull()
    assert caught.value.type == "AdapterCheckError"


def test_a_later_push_without_a_signature(hub, push, pull, folder):
    push(sign=str(folder.parent / "key.pem"))
    push()
    assert "model.sig" not in hub.files(REPO)
    with pytest.raises(WorkerError, match="user/adapter has no signature"):
        pull()


def test_a_signed_folder_is_signed_again(hub, push, pull, folder, tmp_path):
    """A pulled copy has a signature, which does not hold for the record of the next push."""
    push(sign=str(folder.parent / "key.pem"))
    copy = tmp_path / "copy"
    shutil.copytree(pull(), copy)
    assert (copy / "model.sig").is_file()
    push(metrics={"first": {"accuracy": 0.5}}, sign=str(folder.parent / "key.pem"))
    pull()


def test_a_wrong_key(hub, push, pull, folder, tmp_path):
    push(sign=str(folder.parent / "key.pem"))
    for words in ("ecparam -name prime256v1 -genkey -noout -out other.pem", "ec -in other.pem -pubout -out other.pub"):
        subprocess.run(["openssl", *words.split()], cwd=tmp_path, check=True, capture_output=True)
    with pytest.raises(WorkerError, match="made with another key"):
        pull(verify=str(tmp_path / "other.pub"))
    with pytest.raises(WorkerError, match="must be the private key"):
        push(sign=str(tmp_path / "other.pub"))
    with pytest.raises(WorkerError, match="can't be combined with `exports`"):
        pull(exports=True)


def test_nothing_is_created_with_a_key_that_is_missing(hub, push, folder):
    with pytest.raises(WorkerError, match="none.pem"):
        push(sign=str(folder.parent / "none.pem"))
    assert REPO not in hub.repos
