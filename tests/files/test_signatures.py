"""Signatures of folders: what is covered, and what is refused with which reason."""

import base64
import json
import sys
from importlib.util import find_spec

import pytest
from processes import run

from rlora_trl.files import signatures
from rlora_trl.files.checks import AdapterCheckError
from rlora_trl.files.layout import SIGNATURE_NAME


if find_spec("model_signing") is None:
    pytest.skip("model-signing is not installed", allow_module_level=True)
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa


FILES = ("adapter_config.json", "adapter_model.safetensors", "rlora_record.json", "tokenizer.json")


def write_pair(folder, name, curve=None, password=None):
    key = ec.generate_private_key(curve or ec.SECP256R1())
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    pem = serialization.Encoding.PEM
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, encryption))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def keys(tmp_path):
    return write_pair(tmp_path, "key")


@pytest.fixture
def folder(tmp_path, keys):
    """A signed folder with files that are covered and others."""
    folder = tmp_path / "adapter"
    for name in (*FILES, "README.md", "figures/a.png", "exports/sst2/adapter_config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"contents of {name}")
    signatures.sign_folder(folder, keys[0])
    return folder


def test_what_is_covered(folder, keys):
    assert signatures.read_signature(folder / SIGNATURE_NAME)[1] == set(FILES)
    signatures.verify_folder(folder, keys[1])
    for name in ("README.md", "figures/a.png", "exports/sst2/adapter_config.json"):
        (folder / name).write_text("changed")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "optimizer.pt").write_text("of a trainer, never pulled")
    signatures.verify_folder(folder, keys[1])
    assert signatures.is_signed_by(folder, keys[0])


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_other_curves(folder, tmp_path, curve):
    private, public = write_pair(tmp_path, "other", curve)
    signatures.sign_folder(folder, private)
    signatures.verify_folder(folder, public)


def test_links_into_a_cache(folder, keys, tmp_path):
    linked = tmp_path / "models--user--a" / "snapshots" / "c"
    blobs = linked.parent.parent / "blobs"
    linked.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            path.rename(blobs / path.name)
            (linked / path.name).symlink_to(blobs / path.name)
    signatures.verify_folder(linked, keys[1])
    (blobs / FILES[1]).write_text("changed")
    with pytest.raises(AdapterCheckError, match="refused: adapter_model.safetensors: not the contents"):
        signatures.verify_folder(linked, keys[1])


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_refused(folder, keys, name):
    (folder / name).write_text("changed")
    with pytest.raises(AdapterCheckError, match=f"user/a is refused: {name}: not the contents that were signed"):
        signatures.verify_folder(folder, keys[1], "user/a")
    assert not signatures.is_signed_by(folder, keys[0])


def test_a_removed_file_is_refused(folder, keys):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(AdapterCheckError, match="is refused.*tokenizer.json"):
        signatures.verify_folder(folder, keys[1])


def test_an_added_file_is_refused(folder, keys):
    (folder / "chat_template.jinja").write_text("new")
    with pytest.raises(AdapterCheckError, match="does not cover chat_template.jinja, added after"):
        signatures.verify_folder(folder, keys[1])


def test_no_signature(folder, keys):
    (folder / SIGNATURE_NAME).unlink()
    with pytest.raises(
        AdapterCheckError, match=r"user/a has no signature \(model.sig\), and one by .*key.pub is asked"
    ):
        signatures.verify_folder(folder, keys[1], "user/a")


def test_another_key(folder, tmp_path):
    with pytest.raises(AdapterCheckError, match="it was made with another key"):
        signatures.verify_folder(folder, write_pair(tmp_path, "other")[1])


def forged(bundle, key):
    """The signature with the statement changed for a file, under the hint of the given key."""
    envelope = bundle["dsseEnvelope"]
    statement = json.loads(base64.b64decode(envelope["payload"]))
    statement["predicate"]["resources"][0]["digest"] = "0" * 64
    envelope["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    return bundle


def test_a_forged_statement(folder, keys):
    path = folder / SIGNATURE_NAME
    path.write_text(json.dumps(forged(json.loads(path.read_text()), keys[0])))
    with pytest.raises(AdapterCheckError, match="not made by this key, or its statement was changed"):
        signatures.verify_folder(folder, keys[1])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b'{"dsseEnvelope": 3}',
        b'{"dsseEnvelope": {"payload": "?"}}',
        b'{"dsseEnvelope": {"payload": "e30="}}',
        b"[" * 100_000,
        b" " * (signatures.SIGNATURE_LIMIT + 1),
    ],
    ids=lambda content: content[:40].decode(errors="replace").strip() or "blank",
)
def test_what_is_no_signature(folder, keys, content):
    (folder / SIGNATURE_NAME).write_bytes(content)
    with pytest.raises(AdapterCheckError, match="model.sig"):
        signatures.verify_folder(folder, keys[1])


@pytest.mark.parametrize("place", ["bundle", "envelope"])
def test_a_second_statement_is_not_read(folder, keys, place):
    """One that covers an added file, under the other spelling of its name."""
    (folder / "chat_template.jinja").write_text("new")
    path = folder / SIGNATURE_NAME
    bundle = json.loads(path.read_text())
    envelope = bundle["dsseEnvelope"]
    statement = json.loads(base64.b64decode(envelope["payload"]))
    statement["predicate"]["resources"].append({"name": "chat_template.jinja", "digest": "0", "algorithm": "sha256"})
    payload = base64.b64encode(json.dumps(statement).encode()).decode()
    for real, other in (("dsseEnvelope", "dsse_envelope"), ("dsse_envelope", "dsseEnvelope")):
        forged = {**envelope, "payload": payload}
        if place == "bundle":
            both = {**bundle, real: envelope, other: forged}
        else:
            both = {**bundle, "dsseEnvelope": {**envelope, "Payload": payload, "pay_load": payload}}
        path.write_text(json.dumps(both))
        with pytest.raises(AdapterCheckError, match="is refused"):
            signatures.verify_folder(folder, keys[1])


def test_a_damaged_bundle(folder, keys):
    path = folder / SIGNATURE_NAME
    bundle = json.loads(path.read_text())
    bundle["verificationMaterial"] = {}
    path.write_text(json.dumps(bundle))
    with pytest.raises(AdapterCheckError, match="The signature of .* is refused"):
        signatures.verify_folder(folder, keys[1])


def test_keys_that_are_refused(folder, keys, tmp_path):
    with pytest.raises(FileNotFoundError):
        signatures.check_private_key(tmp_path / "none.pem")
    with pytest.raises(ValueError, match="not encrypted.*openssl ecparam"):
        signatures.check_private_key(write_pair(tmp_path, "locked", password=b"x")[0])
    with pytest.raises(ValueError, match="must be the private key of an elliptic curve"):
        signatures.check_private_key(keys[1])
    with pytest.raises(ValueError, match="must be the public key of an elliptic curve"):
        signatures.verify_folder(folder, keys[0])
    with pytest.raises(ValueError, match="Unsupported key"):
        signatures.check_private_key(write_pair(tmp_path, "odd", ec.SECP256K1())[0])
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "rsa.pem").write_bytes(rsa.generate_private_key(65537, 2048).private_bytes(*form))
    with pytest.raises(ValueError, match="must be the private key of an elliptic curve"):
        signatures.check_private_key(tmp_path / "rsa.pem")


def test_without_the_package(folder, keys, monkeypatch):
    monkeypatch.setattr(signatures, "find_spec", lambda name: None)
    for call in (signatures.check_private_key, lambda key: signatures.verify_folder(folder, key)):
        with pytest.raises(ImportError, match=r"pip install rlora-trl\[sign\]"):
            call(keys[0])


@pytest.mark.parametrize("change", [None, "rlora_record.json"])
def test_verified_without_this_package(folder, keys, change):
    """By the command of model-signing, as the page says."""
    if change:
        (folder / change).write_text("changed")
    words = ["verify", "key", folder, "--signature", folder / SIGNATURE_NAME, "--public_key", keys[1]]
    result = run([sys.executable, "-m", "model_signing", *map(str, words)])
    assert (result.returncode == 0) == (change is None), result.stdout + result.stderr
