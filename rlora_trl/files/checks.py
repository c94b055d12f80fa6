"""
Checks the files of an adapter before anything loads them.

Names come first, then the configuration and the header of the weights, then the values. Nothing is executed or
unpickled, and the amount of data that is read is bounded.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .._version import __version__
from ..reading import (
    MIB,
    AdapterCheckError,
    check_regular_file,
    first_few,
    printable,
    read_bytes,
    read_json,
    read_safetensors_header,
    shorten,
)
from ..tuner.config import RLoraConfig
from ..tuner.config_fields import CONFIG_LIMIT
from .card_text import CARD_LIMIT, check_card
from .config import read_config, read_lora_config
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
from .names import hub_name
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
# Maximum size in bytes by kind of file; files of an export count by their name.
_LIMITS = {
    FileKind.CONFIG: CONFIG_LIMIT,
    FileKind.WEIGHTS: WEIGHTS_LIMIT,
    FileKind.CARD: CARD_LIMIT,
    FileKind.RECORD: RECORD_LIMIT,
    FileKind.TOKENIZER: 64 * MIB,
    FileKind.FIGURE: 16 * MIB,
    FileKind.LICENSE: MIB,
    FileKind.SIGNATURE: MIB,
}
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class CheckedAdapter:
    """
    An adapter whose files were checked.

    Args:
        folder (`Path`): Its folder.
        config ([`RLoraConfig`]): Its configuration.
        digest (`str`): Digest of its tensors, see [`adapter_digest`].
        sha256 (`str`): SHA-256 of the weights file in hexadecimal digits, as the Hub lists it.
        num_parameters (`int`): Number of trainable values, without the anchor A0, B0.
        record ([`AdapterRecord`], *optional*): Its record of training.
        layers (`tuple[str, ...]`): Paths of the adapted layers in the base model, in the order of their names.
        base_model (`str`, *optional*), base_model_revision (`str`, *optional*): The model that it was trained on,
            according to its files.
    """

    folder: Path
    config: RLoraConfig
    digest: str
    sha256: str
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
        AdapterCheckError: If the repository has no adapter, a hostile name, or a file that is too large.
    """
    _check_names(sizes, "The repository")
    paths = sorted(path for path in sizes if classify(path) is not FileKind.OTHER)

    for path in paths:
        size, limit = sizes[path], _limit_of(path)
        if size is not None and not (isinstance(size, int) and 0 <= size <= limit):
            raise AdapterCheckError(
                f"{path} has {printable(str(size)[:80])} bytes in the repository, and at most {limit} are accepted. "
                "It is not a file of an adapter."
            )

    folded: dict[str, str] = {}
    for path in paths:
        other = folded.setdefault(path.casefold(), path)
        if other != path:
            raise AdapterCheckError(
                f"The repository has both {other} and {path}, which are one file on some systems. Rename one."
            )
    return paths


def _check_names(paths: Collection[str], where: str) -> None:
    """Refuse hostile names, and a repository or folder without an adapter."""
    if len(paths) > _MAX_FILES:
        raise AdapterCheckError(
            f"{where} has {len(paths)} files, more than {_MAX_FILES}. Name the folder or repository of an adapter."
        )
    if WEIGHTS_NAME not in paths and PICKLED_WEIGHTS_NAME in paths:
        raise AdapterCheckError(
            f"{where} has its weights only as {PICKLED_WEIGHTS_NAME}, a pickle, which can run any code when it is "
            f"read. Ask its author to save it as {WEIGHTS_NAME}, PEFT's default. Adapters of other code in a local "
            "folder are converted by `rlora convert`."
        )
    hostile = [shorten(path) for path in paths if classify(path) is FileKind.HOSTILE]
    if hostile:
        raise AdapterCheckError(
            f"{where} has {first_few(hostile)}: files that may run code when they are opened, or misleading names. "
            "Nothing was loaded. An adapter consists of safetensors, JSON, text and PNG files; use a revision without "
            "these."
        )
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if name not in paths:
            raise AdapterCheckError(
                f"{where} has no {name}: the adapter is missing or incomplete. Check the name and revision, or "
                "save the adapter again."
            )


def _limit_of(path: str) -> int:
    kind = classify(path)
    return _LIMITS[classify(path.rsplit("/", 1)[-1]) if kind is FileKind.EXPORT else kind]


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


def check_adapter(folder: str | Path, *, base_model: str | None = None, name: str | None = None) -> CheckedAdapter:
    """
    Check the files of an adapter in a local folder before anything loads them.

    Args:
        folder (`str` or `Path`): The folder.
        base_model (`str`, *optional*): Base model that the adapter is about to be loaded on. Compared if it is a name
            on the Hub, as folders may hold any model.
        name (`str`, *optional*): Name of the adapter in messages about its base model. Defaults to the folder.

    Returns:
        [`CheckedAdapter`]: The facts about the adapter.

    Raises:
        AdapterCheckError: If files are missing, hostile, damaged, inconsistent, or belong to another base model. The
            message names the file and the expected contents.
    """
    # Names and sizes, before any file is opened.
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterCheckError(f"{folder} is not a folder. Pass the one that holds {CONFIG_NAME}.")
    files = [path for path in adapter_files(folder) if not is_training_leftover(path)]
    _check_names(files, str(folder))
    for path in files:
        if classify(path) is not FileKind.OTHER:
            check_regular_file(folder / path, _limit_of(path))

    # Configuration, header of the weights, record.
    config = read_config(folder / CONFIG_NAME)
    weights = folder / WEIGHTS_NAME
    entries = read_safetensors_header(weights, limit=WEIGHTS_LIMIT)
    layers = check_tensors(weights, entries, config)
    record = _read_record(folder / RECORD_NAME) if RECORD_NAME in files else None
    _check_base(name or str(folder), config, record, base_model)
    _check_beside(folder, files)

    # The values.
    digest = file_digest(weights, entries, finite=True)
    with open(weights, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return CheckedAdapter(
        folder=folder,
        config=config,
        digest=digest,
        sha256=sha256,
        num_parameters=count_parameters(entries),
        record=record,
        layers=layers,
        base_model=config.base_model_name_or_path or (record and record.base_model) or None,
        base_model_revision=(record and record.base_model_revision) or config.revision or None,
    )


def _check_beside(folder: Path, files: list[str]) -> None:
    """Check the other files in the folder: card, figures, tokenizer and exports."""
    for path in files:
        kind = classify(path)
        if kind is FileKind.CARD or (kind is FileKind.EXPORT and path.endswith(f"/{CARD_NAME}")):
            check_card(folder / path)
        elif kind is FileKind.FIGURE and not read_bytes(folder / path, _limit_of(path)).startswith(_PNG):
            raise AdapterCheckError(f"{folder / path} is not a PNG image. Remove it, or create the figure again.")
        elif path == "tokenizer_config.json":
            _check_tokenizer(folder / path)
        elif kind is FileKind.EXPORT and path.endswith(f"/{CONFIG_NAME}"):
            _check_export(folder / path)
        elif kind is FileKind.EXPORT and f"{path.rpartition('/')[0]}/{CONFIG_NAME}" not in files:
            raise AdapterCheckError(f"{folder / path} has no {CONFIG_NAME} in its folder. Export it again.")


def _check_tokenizer(path: Path) -> None:
    data = read_json(path)
    if not isinstance(data, dict) or data.get("auto_map"):
        raise AdapterCheckError(
            f"{path} names code to load in `auto_map`, which is refused. Save the tokenizer without it."
        )


def _check_export(config_path: Path) -> None:
    config = read_lora_config(config_path)
    weights = config_path.parent / WEIGHTS_NAME
    entries = read_safetensors_header(weights, limit=WEIGHTS_LIMIT)
    ranks = {config.get("r"), *(config.get("rank_pattern") or {}).values()} - {None}
    parameters = config.get("target_parameters") or ()
    check_lora_tensors(weights, entries, ranks, config.get("modules_to_save") or (), parameters)
    file_digest(weights, entries, finite=True)


def _read_record(path: Path) -> AdapterRecord:
    data = read_json(path, limit=RECORD_LIMIT)
    try:
        record = AdapterRecord.from_dict(data)
    except ValueError as error:
        raise AdapterCheckError(f"{path} is not a record of an adapter: {shorten(str(error), 300)}") from error

    written = record.versions.get("rlora_trl", "")
    if _release(written) > _release(__version__):
        warnings.warn(
            f"{path} was written by rlora_trl {shorten(written)}, and the installed version is {__version__}. Update "
            "rlora_trl if results differ.",
            stacklevel=3,
        )
    return record


def _release(version: str) -> tuple[int, ...]:
    """Major and minor version."""
    match = re.match(r"(\d{1,6})\.(\d{1,6})", version)
    return tuple(map(int, match.groups())) if match else ()


def _check_base(name: str, config: RLoraConfig, record: AdapterRecord | None, base_model: str | None) -> None:
    """Compare the base models in configuration, record and argument, if they are names on the Hub."""
    in_config, in_record = hub_name(config.base_model_name_or_path), hub_name(record.base_model if record else None)
    if in_config and in_record and in_config != in_record:
        raise AdapterCheckError(
            f"{name} was trained on {in_config} by its {CONFIG_NAME}, and on {in_record} by its {RECORD_NAME}. "
            "The two files belong to different adapters; take both from one source."
        )
    stated, requested = in_config or in_record, hub_name(base_model)
    if stated and requested and stated != requested:
        raise AdapterCheckError(
            f"{name} was trained on {shorten(stated)}, and is being loaded on {shorten(requested)}. Load the model "
            "that it was trained on, or another adapter."
        )
