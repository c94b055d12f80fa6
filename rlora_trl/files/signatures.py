"""
Signatures of adapters, in OpenSSF's format for models (https://github.com/ossf/model-signing-spec), with key pairs.

A signature (`model.sig`) is a statement of the names and SHA-256 hashes of files, signed by an elliptic-curve key. It
covers configuration, weights, record, tokenizer and license. The card is left out, as its text is edited on the Hub,
and so are figures and exports, which may come from different pushes. No service is asked: who verifies needs the
author's public key. The package `model-signing` (extra `sign`) does the cryptography.
"""

from __future__ import annotations

import base64
import json
import os
import re
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..reading import MIB, AdapterCheckError, first_few, parse_json, printable, read_json, shorten
from .layout import CARD_NAME, EXPORTS, FIGURES, SIGNATURE_NAME, FileKind, classify, published_files


SIGNATURE_LIMIT = MIB
_NOT_COVERED = (FileKind.CARD, FileKind.FIGURE, FileKind.EXPORT, FileKind.SIGNATURE)
_IGNORED_PATHS = (CARD_NAME, FIGURES, EXPORTS, SIGNATURE_NAME)
# In a message of model-signing, which is the representation of a list of messages.
_CHANGED = re.compile(r"Hash mismatch for \\?'(.+?)\\?':")
_MAKE_KEY = "`openssl ecparam -name prime256v1 -genkey -noout -out key.pem`"


def check_private_key(path: str | os.PathLike) -> None:
    """
    Check that adapters can be signed with a key, before anything is published.

    Args:
        path (`str`): A PEM file with an elliptic-curve key (P-256, P-384 or P-521), not encrypted.

    Raises:
        ImportError: If `model-signing` is not installed.
        FileNotFoundError: If there is no such file.
        ValueError: If it is not such a key.
    """
    _signer(path)


def sign_folder(folder: Path, private_key: str | os.PathLike) -> None:
    """
    Write the signature of the adapter in a folder that has no other files.

    Args:
        folder (`Path`): The folder.
        private_key (`str`): See [`check_private_key`].
    """
    hashed = _hashing().set_ignored_paths(paths=_IGNORED_PATHS)
    _signer(private_key).set_hashing_config(hashed).sign(folder, folder / SIGNATURE_NAME)


def is_signed_by(folder: Path, private_key: str | os.PathLike) -> bool:
    """Whether a folder has a signature by this key of the files that are in it now."""
    from cryptography.hazmat.primitives import serialization

    check_private_key(private_key)
    key = serialization.load_pem_private_key(Path(private_key).read_bytes(), None)
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    with TemporaryDirectory(prefix="rlora-key-") as scratch:
        public_key = Path(scratch, "key.pub")
        public_key.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, form))
        try:
            verify_folder(folder, public_key)
        except AdapterCheckError:
            return False
    return True


def verify_folder(folder: Path, public_key: str | os.PathLike, name: str | None = None) -> None:
    """
    Verify that the files of an adapter are those that the owner of a key has signed.

    Args:
        folder (`Path`): The folder of the adapter.
        public_key (`str`): A PEM file with the public key.
        name (`str`, *optional*): Name of the adapter for messages. Defaults to the folder.

    Raises:
        AdapterCheckError: If there is no signature, it was made with another key, it can't be read, or files differ
            from those that were signed, are missing, or were added.
        ImportError: If `model-signing` is not installed.
        FileNotFoundError: If there is no file with the public key.
        ValueError: If it is not such a key.
    """
    name = name or str(folder)
    verifier = _verifier(public_key)
    path = folder / SIGNATURE_NAME
    if not path.is_file():
        raise AdapterCheckError(
            f"{name} has no signature ({SIGNATURE_NAME}), and one by {public_key} is asked for. Ask its author to "
            "push it with `sign=`, or pull it without `verify`."
        )

    bundle, signed = read_signature(path)
    # Files in the cache of the Hub are links, which `check_adapter` checks.
    verifier.set_hashing_config(_hashing().set_allow_symlinks(True)).set_ignore_unsigned_files(True)
    with TemporaryDirectory(prefix="rlora-verify-") as scratch:
        Path(scratch, SIGNATURE_NAME).write_text(json.dumps(bundle), encoding="utf-8")
        try:
            verifier.verify(folder, Path(scratch, SIGNATURE_NAME))
        # Besides its own errors, it raises those of its parsers and of the files that the statement names.
        except Exception as error:
            raise AdapterCheckError(f"The signature of {name} is refused: {_reason(error)}.") from error
    added = [file for file in published_files(folder) if classify(file) not in _NOT_COVERED and file not in signed]
    if added:
        raise AdapterCheckError(
            f"The signature of {name} is refused: it does not cover {first_few(added)}, added after it was made. Use "
            "another revision, or ask the author to push the adapter again."
        )


def read_signature(path: Path) -> tuple[dict[str, Any], set[str]]:
    """
    Read a signature with bounds, which model-signing has none of. Nothing is verified.

    Args:
        path (`Path`): The signature.

    Returns:
        `tuple[dict, set[str]]`: The bundle, with the fields that are verified and no others, in which another reader
        could find another statement; and the names of files in its statement.

    Raises:
        AdapterCheckError: If it is too large or has no such statement.
    """
    try:
        found = read_json(path, limit=SIGNATURE_LIMIT)
        bundle = {key: found[key] for key in ("mediaType", "verificationMaterial", "dsseEnvelope")}
        bundle["dsseEnvelope"] = {key: bundle["dsseEnvelope"][key] for key in ("payload", "payloadType", "signatures")}
        payload = base64.b64decode(bundle["dsseEnvelope"]["payload"], validate=True)
        statement = parse_json(payload, f"The statement in {path}")
        return bundle, {str(resource["name"]) for resource in statement["predicate"]["resources"]}
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, AdapterCheckError):
            raise
        raise AdapterCheckError(
            f"{path} is not a signature of model-signing with a key ({type(error).__name__}: {shorten(str(error))}). "
            "Ask the author to push the adapter again."
        ) from error


def _reason(error: Exception) -> str:
    text = printable(" ".join(str(error).split()))
    if type(error).__name__ == "InvalidSignature":
        return "it was not made by this key, or its statement was changed"
    if text.startswith("Key mismatch"):
        return "it was made with another key. Check with the author which key is theirs"
    if text.startswith("Signature mismatch"):
        changed = _CHANGED.findall(text)
        return f"{first_few(changed) if changed else shorten(text, 300)}: not the contents that were signed"
    return f"{type(error).__name__}: {shorten(text, 300)}"


def _signer(private_key: str | os.PathLike) -> Any:
    _require_package()
    from model_signing import signing

    return _with_key(signing.Config().use_elliptic_key_signer, private_key=private_key)


def _verifier(public_key: str | os.PathLike) -> Any:
    _require_package()
    from model_signing import verifying

    return _with_key(verifying.Config().use_elliptic_key_verifier, public_key=public_key)


def _hashing() -> Any:
    from model_signing import hashing

    return hashing.Config()


def _with_key(configure: Any, **key: str | os.PathLike) -> Any:
    """Load a key. What cryptography raises depends on what is in the file."""
    ((kind, path),) = key.items()
    Path(path).read_bytes()  # errors of the file itself
    try:
        return configure(**{kind: path})
    except Exception as error:
        what = kind.replace("_", " ")
        raise ValueError(
            f"{path} must be the {what} of an elliptic curve (P-256, P-384 or P-521) as PEM, not encrypted: "
            f"{type(error).__name__}: {shorten(str(error), 200)}. {_MAKE_KEY} makes a private key, and `openssl ec "
            "-in key.pem -pubout -out key.pub` writes its public key."
        ) from error


def _require_package() -> None:
    # model-signing 1.1.1 imports pyOpenSSL and does not require it.
    missing = [name for name in ("model_signing", "OpenSSL") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"Signatures need the packages model-signing and pyOpenSSL, and {first_few(missing)} is not installed. "
            "Install them with `pip install rlora-trl[sign]`."
        )
