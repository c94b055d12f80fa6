"""Pulls an adapter: checks the listing before the download, and the files before anything is loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
from transformers.utils import logging

from ..files.card_text import check_card
from ..files.checks import AdapterCheckError, CheckedAdapter, check_adapter, check_listing
from ..files.download import cached_file, download, has_hash, list_files
from ..files.layout import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME, FileKind, classify, published_files
from ..files.signatures import verify_folder
from ..reading import first_few
from .card_reading import read_card_info


logger = logging.get_logger(__name__)

# Names of blobs in the cache are hashes: SHA-256, or that of Git.
_BLOB = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")


def pull_adapter(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    base_model: str | None = None,
    exports: bool = False,
    local_files_only: bool = False,
    verify: str | os.PathLike | None = None,
) -> str:
    """
    Download an adapter and check it before use; nothing in it is executed.

    The revision is pinned to a commit first. Only the files of an adapter are downloaded, compared with the hashes of
    that commit, and checked against each other: names, shapes and dtypes against the configuration, finite values, the
    digest in the card. Files in the cache are not downloaded again.

    Args:
        repo_id (`str`):
            Repository on the Hub, or a local folder, which is checked where it is.
        revision (`str`, *optional*):
            Branch, tag or commit. Defaults to the main branch.
        token (`str` or `bool`, *optional*):
            As in `huggingface_hub.snapshot_download`.
        cache_dir (`str`, *optional*):
            Cache of `huggingface_hub`. Defaults to its own.
        base_model (`str`, *optional*):
            Name on the Hub of the base model to load the adapter on; an adapter of another base model is an error.
        exports (`bool`, *optional*, defaults to `False`):
            Download the plain-LoRA exports too.
        local_files_only (`bool`, *optional*, defaults to `False`):
            Use only the cache, as with `HF_HUB_OFFLINE=1`.
        verify (`str`, *optional*):
            File with the author's public key (PEM); an adapter without a signature by it is an error. Needs the extra
            `sign`.

    Returns:
        `str`: The folder, for `from_pretrained`.

    Raises:
        AdapterCheckError: If the adapter is damaged, incomplete, hostile, belongs to another base model, or is not
            signed as `verify` asks.
        ValueError: If `verify` is not a public key, or is combined with `exports`, which signatures don't cover.
        HfHubHTTPError: If the repository or revision does not exist, or may not be read.
        ConnectionError: If the Hub can't be reached, and the adapter is not in the cache.
        TimeoutError: If an answer of the Hub comes too slowly, below 1 KiB/s after a minute.
        LocalEntryNotFoundError: If only the cache may be used, and the adapter is not in it.
    """
    checked = pull_checked(
        repo_id,
        revision,
        base_model=base_model,
        exports=exports,
        local_files_only=local_files_only,
        verify=verify,
        token=token,
        cache_dir=cache_dir,
    )
    return str(checked.folder)


def pull_checked(
    repo_id: str,
    revision: str | None = None,
    *,
    base_model: str | None = None,
    exports: bool = False,
    local_files_only: bool = False,
    verify: str | os.PathLike | None = None,
    **options: Any,
) -> CheckedAdapter:
    """[`pull_adapter`], returning what the checks found; `options` are `token` and `cache_dir`."""
    if verify is not None and exports:
        raise ValueError(
            "`verify` can't be combined with `exports`: a signature covers the adapter and not its exports. Pull "
            "without exports, and make them from the verified adapter with `export_lora`."
        )
    if os.path.isdir(repo_id):
        if revision is not None:
            raise ValueError(
                f"`revision={revision!r}` needs a repository on the Hub, and {repo_id!r} is a local folder. Leave it "
                "out, or run in another directory to pull the repository of that name."
            )
        return _check(Path(repo_id), base_model, repo_id, verify)

    # List, check and download, unless only the cache is allowed or reachable.
    if local_files_only or constants.HF_HUB_OFFLINE:
        return _check(_cached(repo_id, revision, options), base_model, repo_id, verify)
    try:
        listing = list_files(repo_id, revision, token=options.get("token"))
        paths = check_listing({path: file.size for path, file in listing.files.items()})
        paths = [path for path in paths if exports or classify(path) is not FileKind.EXPORT]
        folder = download(listing, paths, revision=revision, **options)
    except HTTPError as error:
        if getattr(error, "response", None) is not None:
            raise  # the Hub answered
        folder = _cached(repo_id, revision, options, error)
    return _check(folder, base_model, repo_id, verify)


def _cached(repo_id: str, revision: str | None, options: Mapping[str, Any], reason: Exception | None = None) -> Path:
    """The folder in the cache, if the Hub may not be used or, with a `reason`, can't be reached."""
    cache_dir = options.get("cache_dir")
    names = (CONFIG_NAME, WEIGHTS_NAME)
    files = [cached_file(repo_id, name, revision=revision, cache_dir=cache_dir) for name in names]
    if None in files:
        where = repo_id if revision is None else f"{repo_id} at {revision}"
        if reason is None:
            raise LocalEntryNotFoundError(
                f"{where} is not in the cache, and the Hub may not be used because of `local_files_only=True` or "
                "HF_HUB_OFFLINE=1. Pull it once without."
            )
        raise ConnectionError(
            f"The Hub can't be reached ({reason}), and {where} is not in the cache. Try again later."
        ) from reason
    if reason is not None:
        logger.warning(f"The Hub can't be reached ({reason}); using {repo_id} from the cache.")

    folder = Path(str(files[0])).parent
    damaged = [path for path in published_files(folder) if not _has_cached_contents(folder / path)]
    if damaged:
        raise AdapterCheckError(
            f"{first_few(damaged)} of {repo_id} are damaged in the cache: their contents are not those that the Hub "
            "listed. Pull it again with a connection to the Hub."
        )
    return folder


def _has_cached_contents(path: Path) -> bool:
    """Whether a file is as it was listed, by the name of its blob. A cache without links has no such names."""
    if not path.is_symlink():
        return True
    name = os.path.basename(os.readlink(path))
    return _BLOB.fullmatch(name) is None or has_hash(path, name)


def _check(folder: Path, base_model: str | None, name: str, verify: str | os.PathLike | None) -> CheckedAdapter:
    if verify is not None:
        verify_folder(folder, verify, name)
    checked = check_adapter(folder, base_model=base_model, name=name)
    card = folder / CARD_NAME
    if card.is_file():
        digest = read_card_info(check_card(card)).get("digest")
        if digest is not None and digest != checked.digest:
            raise AdapterCheckError(
                f"The weights of {name} do not match its card: their digest is {checked.digest}, the card has "
                f"{digest}. One of the two was replaced. Use another revision, or ask the author to push the "
                "adapter again."
            )
    return checked
