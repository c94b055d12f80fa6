"""The files of an adapter: the kind of each file by its name, and which files are never read."""

from __future__ import annotations

import hashlib
import os
import re
from enum import StrEnum
from pathlib import Path

from ..reading import AdapterCheckError, shorten


RECORD_NAME = "rlora_record.json"
CARD_NAME = "README.md"
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_WEIGHTS_NAME = "adapter_model.bin"
SIGNATURE_NAME = "model.sig"
FIGURES = "figures"
EXPORTS = "exports"


class FileKind(StrEnum):
    """
    Kinds of files in the folder of an adapter.

    `OTHER` is harmless and ignored: neither published nor downloaded. `HOSTILE` is a file that a program may execute
    or unpickle when it opens it, or a name that leads out of the folder or differs from another only in case.
    """

    CONFIG = "config"
    WEIGHTS = "weights"
    CARD = "card"
    RECORD = "record"
    TOKENIZER = "tokenizer"
    FIGURE = "figure"
    EXPORT = "export"
    LICENSE = "license"
    SIGNATURE = "signature"
    OTHER = "other"
    HOSTILE = "hostile"


_KINDS = {
    CONFIG_NAME: FileKind.CONFIG,
    WEIGHTS_NAME: FileKind.WEIGHTS,
    CARD_NAME: FileKind.CARD,
    RECORD_NAME: FileKind.RECORD,
    SIGNATURE_NAME: FileKind.SIGNATURE,
    **dict.fromkeys(("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE"), FileKind.LICENSE),
    **dict.fromkeys(
        (
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
            "vocab.json",
            "vocab.txt",
            "merges.txt",
            "tokenizer.model",
            "spiece.model",
            "sentencepiece.bpe.model",
            "chat_template.jinja",
        ),
        FileKind.TOKENIZER,
    ),
}
_CHAT_TEMPLATES = "additional_chat_templates"  # transformers' name
_FOLDERS = (FIGURES, EXPORTS, _CHAT_TEMPLATES)
_EXPORT_FILES = (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME)
# The right spelling of names that file systems without letter case would confuse.
_SPELLINGS = {name.casefold(): name for name in (*_KINDS, *_FOLDERS)}
_HOSTILE_SUFFIXES = frozenset(
    # Pickles, or containers that may hold one; NumPy's own two among them.
    ".bin .pt .pth .pkl .pickle .ckpt .joblib .dill .cloudpickle .npy .npz .mar .pt2 .pte "
    # Programs, libraries and what an interpreter or a desktop starts.
    ".py .pyc .pyo .pyd .pyw .pyz .pth .ipynb .so .dylib .dll .exe .com .msi .scr .sh .bash .zsh .bat .cmd .ps1 .vbs "
    ".js .mjs .cjs .wasm .jar .class .rb .pl .php .lua .whl .egg .desktop .lnk .app .hta".split()
)
# Pickles that a Trainer leaves in its output folder: hostile in a repository, ignored in a local folder.
_TRAINING_LEFTOVERS = re.compile(r"training_args\.bin|(optimizer|scheduler|scaler|rng_state(_\d+)?)\.(pt|pth|bin)")
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # devices on Windows
_SLUG = re.compile(r"[a-z0-9_][a-z0-9._-]*")
_FIGURE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.png")
_TEMPLATE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.jinja")
_HASHED = re.compile(r"-[0-9a-f]{8}$")
_MAX_PATH, _MAX_COMPONENT, _MAX_SLUG = 1024, 255, 64


def classify(path: str) -> FileKind:
    """
    The kind of a file, by its name.

    Args:
        path (`str`): Path inside the folder or repository, separated by "/".
    """
    if _is_misleading(path):
        return FileKind.HOSTILE
    parts = path.split("/")
    if os.path.splitext(parts[-1])[1].lower() in _HOSTILE_SUFFIXES:
        return FileKind.HOSTILE
    if len(parts) == 1:
        return _KINDS.get(path, FileKind.OTHER)
    if parts[0] == _CHAT_TEMPLATES and len(parts) == 2 and _TEMPLATE.fullmatch(parts[1]):
        return FileKind.TOKENIZER
    if parts[0] == FIGURES and len(parts) == 2 and _FIGURE.fullmatch(parts[1]):
        return FileKind.FIGURE
    if parts[0] == EXPORTS and len(parts) == 3 and _SLUG.fullmatch(parts[1]) and parts[2] in _EXPORT_FILES:
        return FileKind.EXPORT
    return FileKind.OTHER


def _is_misleading(path: str) -> bool:
    """Whether a name leads out of the folder, is not portable, or differs from another only in case."""
    if not path or len(path) > _MAX_PATH or not path.isprintable() or "\\" in path or ":" in path:
        return True

    parts = path.split("/")
    for part in parts:
        # "" also stands for a path that starts at the root. Windows drops dots and spaces at the end of a name.
        if not part or part.rstrip(". ") != part or len(part.encode("utf-8")) > _MAX_COMPONENT:
            return True
        if _RESERVED.fullmatch(part) or part.casefold() == ".git":
            return True

    named = (parts[0], parts[-1]) if parts[0] == EXPORTS else parts[:1]
    return any(_SPELLINGS.get(part.casefold(), part) != part for part in named)


def is_training_leftover(path: str) -> bool:
    """Whether a file is a pickle that a `Trainer` writes into its output folder, such as `training_args.bin`."""
    return _TRAINING_LEFTOVERS.fullmatch(path.rsplit("/", 1)[-1]) is not None


def task_slug(task: str) -> str:
    """
    Name of the folder in `exports` for a task.

    Lower-case letters, digits, ".", "_" and "-". Where that changes the name, a hash of it is appended, so that tasks
    do not share a folder.

    Args:
        task (`str`): Name of the task.

    Raises:
        ValueError: If the name is empty.
    """
    if not task:
        raise ValueError("A task must have a name, got ''. Name it as in the `tasks` of the adapter.")
    slug = re.sub(r"[^a-z0-9._-]+", "-", task.lower())[:_MAX_SLUG].strip("-.") or "task"
    # A name that ends like a hash could be the slug of another task.
    if slug == task and not _HASHED.search(task) and not _RESERVED.fullmatch(task):
        return slug
    if _RESERVED.fullmatch(slug):
        slug = slug.replace(".", "-")
    return f"{slug}-{hashlib.sha256(task.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def adapter_files(folder: str | Path) -> list[str]:
    """
    Paths of all files in a folder that may belong to an adapter: those in it and in the subfolders of an adapter.

    Other folders, such as a trainer's checkpoints, are not entered.

    Args:
        folder (`str` or `Path`): The folder.

    Returns:
        `list[str]`: Sorted paths in it, separated by "/".

    Raises:
        AdapterCheckError: If one of them is a link that leads out of the folder. Links of `huggingface_hub`'s cache,
            which lead to its blobs, are followed.
    """
    root = Path(folder)
    paths: list[str] = []
    for directory, folders, names in os.walk(root):
        relative = Path(directory).relative_to(root)
        is_root = relative == Path(".")
        folders[:] = sorted(name for name in folders if not is_root or name in _FOLDERS)
        for name in [*folders, *names]:
            if os.path.islink(os.path.join(directory, name)):
                _check_link(root, (relative / name).as_posix(), is_folder=name in folders)
        paths += [(relative / name).as_posix() for name in names]
    return sorted(paths)


def _check_link(folder: Path, path: str, is_folder: bool) -> None:
    # Unlike `Path.resolve`, this does not fail where links form a loop.
    target = Path(os.path.realpath(folder / path))
    for parent in folder.resolve().parents:
        # Blobs of the repository, and those that repositories share.
        blobs = (parent.parent / "blobs", parent.parent.parent / "blobs" / target.parent.name)
        if parent.name == "snapshots" and target.parent in blobs:
            return
    if classify(path) is FileKind.OTHER and not is_folder:
        return  # never opened
    raise AdapterCheckError(
        f"{shorten(path)} in {folder} is a link to {target}, outside the adapter. Replace the link by the file."
    )


def published_files(folder: str | Path) -> list[str]:
    """
    Files of a local folder that belong to the adapter; all others are not published.

    Args:
        folder (`str` or `Path`): The folder.

    Returns:
        `list[str]`: Sorted paths in it, separated by "/".

    Raises:
        AdapterCheckError: If one of them is a link that leads out of the folder.
    """
    return [path for path in adapter_files(folder) if classify(path) not in (FileKind.OTHER, FileKind.HOSTILE)]
