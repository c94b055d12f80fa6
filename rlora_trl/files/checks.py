"""Checks before use: what is wrong with the files of an adapter is found before anything loads them.

Names come first, then the configuration and the header of the weights, then the values. Nothing that is checked is
executed or unpickled, and what is read is bounded, whatever the files say of themselves.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .._version import __version__
from ..tuner.config import RLoraConfig
from .card_text import CARD_LIMIT, check_card
from .config import CONFIG_LIMIT, read_config, read_lora_config
from .layout import (
    CARD_NAME,
    CONFIG_NAME,
    PICKLED_WEIGHTS_NAME,
    RECORD_NAME,
    WEIGHTS_NAME,
    FileKind,
    adapter_files,
    classify,
    is_training_leftover,
)
from .reading import (
    MIB,
    AdapterCheckError,
    check_regular_file,
    read_bytes,
    read_json,
    read_safetensors_header,
    shorten,
)
from .record import AdapterRecord
from .tensors import check_lora_tensors, check_tensors, count_parameters, file_digest, state_dict_digest


__all__ = [
    "AdapterCheckError",
    "CheckedAdapter",
    "adapter_digest",
    "check_adapter",
    "check_card",
    "check_listing",
    "read_json",
]

WEIGHTS_LIMIT = 64 * 2**30
RECORD_LIMIT = 16 * MIB
_MAX_FILES = 5_000
# The most bytes of a file, by what it is. Of an export by its name.
_LIMITS = {
    FileKind.CONFIG: CONFIG_LIMIT,
    FileKind.WEIGHTS: WEIGHTS_LIMIT,
    FileKind.CARD: CARD_LIMIT,
    FileKind.RECORD: RECORD_LIMIT,
    FileKind.TOKENIZER: 64 * MIB,
    FileKind.FIGURE: 16 * MIB,
    FileKind.LICENSE: MIB,
}
_PNG = b"\x89PNG\r\n\x1a\n"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")
_CACHED = re.compile(r".*models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})/?")
_COMMIT = re.compile(r"[0-9a-f]{7,40}")


@dataclass(frozen=True)
class CheckedAdapter:
    """
    An adapter whose files were checked.

    Args:
        folder (`Path`): Where it lies.
        config ([`RLoraConfig`]): Its configuration.
        digest (`str`): See [`adapter_digest`].
        num_parameters (`int`): Number of values that training changes; those of the anchor, A0 and B0, are not.
        record ([`AdapterRecord`], *optional*): What training recorded of it.
        layers (`tuple[str, ...]`): Paths of the adapted layers in the base model, in the order of their names.
        base_model (`str`, *optional*), base_model_revision (`str`, *optional*): What it says that it was trained on.
    """

    folder: Path
    config: RLoraConfig
    digest: str
    num_parameters: int
    record: AdapterRecord | None
    layers: tuple[str, ...]
    base_model: str | None
    base_model_revision: str | None


def check_listing(sizes: Mapping[str, int | None]) -> list[str]:
    """
    Check the names and sizes of the files in a repository before any is downloaded.

    Args:
        sizes (`Mapping[str, int | None]`): Sizes in bytes by path, `None` where not known.

    Returns:
        `list[str]`: Sorted paths of the files that belong to the adapter; others need not be downloaded.

    Raises:
        AdapterCheckError: If there is no adapter, a name is hostile, or a size is absurd.
    """
    if len(sizes) > _MAX_FILES:
        raise AdapterCheckError(
            f"The repository has {len(sizes)} files, more than {_MAX_FILES}. It is not one of an adapter; check its "
            "name."
        )
    if WEIGHTS_NAME not in sizes and PICKLED_WEIGHTS_NAME in sizes:
        raise AdapterCheckError(
            f"The repository has its weights only as {PICKLED_WEIGHTS_NAME}, a pickle, which can run any code when it "
            f"is read. Ask its author to save it as {WEIGHTS_NAME}."
        )
    kinds = {path: classify(path) for path in sizes}
    _refuse([path for path, kind in kinds.items() if kind is FileKind.HOSTILE], "The repository")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if name not in sizes:
            raise AdapterCheckError(
                f"The repository has no {name}: it has no adapter, or an incomplete one. Check its name and revision."
            )
    wanted = sorted(path for path, kind in kinds.items() if kind is not FileKind.OTHER)
    for path in wanted:
        _check_size(path, sizes[path])
    folded: dict[str, str] = {}
    for path in wanted:
        other = folded.setdefault(path.casefold(), path)
        if other != path:
            raise AdapterCheckError(
                f"The repository has both {other} and {path}, which are one file on some systems. Rename one."
            )
    return wanted


def _refuse(paths: list[str], where: str) -> None:
    if not paths:
        return
    listed = ", ".join(shorten(path) for path in sorted(paths)[:3])
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    raise AdapterCheckError(
        f"{where} has {listed}{more}: files that may run code when they are opened, or names that pass for others. "
        "Nothing was used. An adapter consists of safetensors, JSON, text and PNG files; use a revision without these."
    )


def _limit_of(path: str) -> int:
    kind = classify(path)
    return _LIMITS[classify(path.rsplit("/", 1)[-1]) if kind is FileKind.EXPORT else kind]


def _check_size(path: str, size: int | None) -> None:
    limit = _limit_of(path)
    if size is not None and not (isinstance(size, int) and 0 <= size <= limit):
        raise AdapterCheckError(
            f"{path} has {size} bytes in the repository, and at most {limit} are accepted. It is not what an adapter "
            "holds there."
        )


def adapter_digest(source: str | Path | Mapping[str, torch.Tensor]) -> str:
    """
    Digest of the tensors of an adapter.

    It covers names, types, shapes and values, and depends neither on their order in a file nor on metadata.

    Args:
        source (`str`, `Path` or `Mapping[str, torch.Tensor]`): A folder, a safetensors file, or tensors by the names
            that they have in a file.

    Returns:
        `str`: `"sha256:"` and 64 hexadecimal digits.

    Raises:
        AdapterCheckError: If the file can't be read.
    """
    if isinstance(source, Mapping):
        return state_dict_digest(source)
    path = Path(source)
    path = path / WEIGHTS_NAME if path.is_dir() else path
    return file_digest(path, read_safetensors_header(path))


def check_adapter(
    folder: str | Path, *, base_model: str | None = None, base_model_revision: str | None = None
) -> CheckedAdapter:
    """
    Check the files of an adapter in a local folder before anything loads them.

    Args:
        folder (`str` or `Path`): The folder.
        base_model (`str`, *optional*): Base model that the adapter is about to be loaded on.
        base_model_revision (`str`, *optional*): Its revision.

    Returns:
        [`CheckedAdapter`]: What the adapter is.

    Raises:
        AdapterCheckError: If files are missing, hostile, damaged, or do not fit each other or the base model. The
            message names the file and what was expected.
    """
    folder = Path(folder)
    files = _check_files(folder)
    config = read_config(folder / CONFIG_NAME)
    weights = folder / WEIGHTS_NAME
    entries = read_safetensors_header(weights, limit=WEIGHTS_LIMIT)
    layers = check_tensors(weights, entries, config)
    record = _read_record(folder / RECORD_NAME) if RECORD_NAME in files else None
    name, revision = _check_base(folder, config, record, base_model, base_model_revision)
    _check_beside(folder, files)
    return CheckedAdapter(
        folder=folder,
        config=config,
        digest=file_digest(weights, entries, finite=True),
        num_parameters=count_parameters(entries),
        record=record,
        layers=layers,
        base_model=name,
        base_model_revision=revision,
    )


def _check_files(folder: Path) -> list[str]:
    """Names, links and sizes of the files in a folder."""
    if not folder.is_dir():
        raise AdapterCheckError(f"{folder} is not a folder. Pass the one that holds {CONFIG_NAME}.")
    files = adapter_files(folder)
    if len(files) > _MAX_FILES:
        raise AdapterCheckError(f"{folder} has {len(files)} files, more than {_MAX_FILES}. Pass the adapter's folder.")
    if WEIGHTS_NAME not in files and PICKLED_WEIGHTS_NAME in files:
        raise AdapterCheckError(
            f"{folder} has its weights only as {PICKLED_WEIGHTS_NAME}, a pickle, which can run any code when it is "
            f"read. Save it again with PEFT, which writes {WEIGHTS_NAME}."
        )
    hostile = [path for path in files if classify(path) is FileKind.HOSTILE]
    _refuse([path for path in hostile if not is_training_leftover(path)], str(folder))
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if name not in files:
            raise AdapterCheckError(
                f"{folder} has no {name}: it has no adapter, or an incomplete one. Save or download it again."
            )
    for path in files:
        if classify(path) not in (FileKind.OTHER, FileKind.HOSTILE):
            check_regular_file(folder / path, _limit_of(path))
    return files


def _check_beside(folder: Path, files: list[str]) -> None:
    """What lies beside the adapter itself: card, figures, tokenizer and exports."""
    for path in files:
        kind = classify(path)
        if kind is FileKind.CARD or (kind is FileKind.EXPORT and path.endswith(f"/{CARD_NAME}")):
            check_card(folder / path)
        elif kind is FileKind.FIGURE and not read_bytes(folder / path, _limit_of(path)).startswith(_PNG):
            raise AdapterCheckError(f"{folder / path} is not a PNG image. Remove it, or draw the figure again.")
        elif path == "tokenizer_config.json":
            _check_tokenizer(folder / path)
        elif kind is FileKind.EXPORT and path.endswith(f"/{CONFIG_NAME}"):
            _check_export(folder / path)
        elif kind is FileKind.EXPORT and f"{path.rpartition('/')[0]}/{CONFIG_NAME}" not in files:
            raise AdapterCheckError(f"{folder / path} has no {CONFIG_NAME} beside it. Export it again.")


def _check_tokenizer(path: Path) -> None:
    data = read_json(path)
    if not isinstance(data, dict) or data.get("auto_map"):
        raise AdapterCheckError(
            f"{path} names code to load in `auto_map`, which an adapter must not need. Save the tokenizer without it."
        )


def _check_export(config_path: Path) -> None:
    config = read_lora_config(config_path)
    weights = config_path.parent / WEIGHTS_NAME
    entries = read_safetensors_header(weights, limit=WEIGHTS_LIMIT)
    ranks = {config.get("r"), *(config.get("rank_pattern") or {}).values()} - {None}
    check_lora_tensors(weights, entries, ranks, config.get("modules_to_save") or ())
    file_digest(weights, entries, finite=True)


def _read_record(path: Path) -> AdapterRecord:
    data = read_json(path, limit=RECORD_LIMIT)
    if not isinstance(data, dict):
        raise AdapterCheckError(f"{path} holds a {type(data).__name__}, and a record is an object. Remove the file.")
    try:
        record = AdapterRecord.from_dict(data)
    except ValueError as error:
        raise AdapterCheckError(f"{path} is not a record of an adapter: {shorten(str(error), 300)}") from error
    written = record.versions.get("rlora_trl", "")
    if _release(written) > _release(__version__):
        warnings.warn(
            f"The adapter beside {path} was written by rlora_trl {shorten(written)}, this is {__version__}. Update "
            "rlora_trl if results differ.",
            stacklevel=3,
        )
    return record


def _release(version: str) -> tuple[int, ...]:
    """Major and minor version."""
    match = re.match(r"(\d{1,6})\.(\d{1,6})", version)
    return tuple(map(int, match.groups())) if match else ()


def _check_base(
    folder: Path, config: RLoraConfig, record: AdapterRecord | None, base_model: str | None, revision: str | None
) -> tuple[str | None, str | None]:
    """Compare what configuration and record say of the base model, with each other and with what is being loaded."""
    told = [config.base_model_name_or_path or None, record.base_model if record else None]
    names = list(dict.fromkeys(_hub_name(name) for name in told if name))
    on_hub = [name for name in names if _is_hub_name(name)]
    if len(on_hub) > 1:
        raise AdapterCheckError(
            f"{folder} was trained on {on_hub[0]} by its {CONFIG_NAME}, and on {on_hub[1]} by its {RECORD_NAME}. "
            "The two files belong to different adapters; take both from one source."
        )
    if base_model is not None:
        _check_base_name(folder, names, _hub_name(base_model))
    pinned = [record.base_model_revision if record else None, config.revision]
    revisions = [value for value in pinned if value]
    given = revision or _revision_in(base_model)
    # A branch and a commit may be the same: only two of a kind can be compared.
    comparable = [value for value in revisions if given and _is_commit(value) == _is_commit(given)]
    if given and comparable and not any(_is_same_revision(given, value) for value in comparable):
        raise AdapterCheckError(
            f"{folder} was trained on revision {shorten(comparable[0])} of its base model, and is being loaded on "
            f"{shorten(given)}. Load that revision."
        )
    return (next((name for name in told if name), None), next(iter(revisions), None))


def _check_base_name(folder: Path, names: list[str], given: str) -> None:
    # A folder may hold the model of any name: only two names, or two folders, can be compared.
    comparable = [name for name in names if _is_hub_name(name) == _is_hub_name(given)]
    if comparable and not any(_is_same(given, name) for name in comparable):
        raise AdapterCheckError(
            f"{folder} was trained on {' or '.join(map(shorten, comparable))}, and is being loaded on "
            f"{shorten(given)}. Load the model that it was trained on, or another adapter."
        )


def _is_commit(revision: str) -> bool:
    return _COMMIT.fullmatch(revision) is not None


def _is_same_revision(first: str, second: str) -> bool:
    if _is_commit(first) and _is_commit(second):
        return first.startswith(second) or second.startswith(first)
    return first == second


def _hub_name(name: str) -> str:
    """The Hub name of a model in `huggingface_hub`'s cache, else the name itself."""
    match = _CACHED.fullmatch(name.replace("\\", "/"))
    return f"{match[1]}/{match[2]}" if match else name


def _revision_in(name: str | None) -> str | None:
    match = _CACHED.fullmatch((name or "").replace("\\", "/"))
    return match[3] if match else None


def _is_hub_name(name: str) -> bool:
    return _HUB_NAME.fullmatch(name) is not None and not Path(name).is_dir()


def _is_same(first: str, second: str) -> bool:
    if first.rstrip("/") == second.rstrip("/"):
        return True
    return Path(first).is_dir() and Path(second).is_dir() and Path(first).resolve() == Path(second).resolve()
