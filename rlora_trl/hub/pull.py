"""Pulls an adapter: checks the listing before the download, and the files before anything is loaded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
from huggingface_hub.hf_api import RepoFile, RepoSibling
from transformers.utils import logging

from ..files.card_text import check_card
from ..files.checks import AdapterCheckError, CheckedAdapter, check_adapter, check_listing
from ..files.layout import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME, FileKind, classify
from ..reading import first_few
from .card_reading import read_card_info


logger = logging.get_logger(__name__)

_ATTEMPTS = 3


def pull_adapter(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    base_model: str | None = None,
    exports: bool = False,
    local_files_only: bool = False,
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

    Returns:
        `str`: The folder, for `from_pretrained`.

    Raises:
        AdapterCheckError: If the adapter is damaged, incomplete, hostile, or belongs to another base model.
        HfHubHTTPError: If the repository or revision does not exist, or may not be read.
        LocalEntryNotFoundError: If only the cache may be used, and the adapter is not in it.
    """
    checked = pull_checked(
        repo_id,
        revision,
        base_model=base_model,
        exports=exports,
        local_files_only=local_files_only,
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
    **options: Any,
) -> CheckedAdapter:
    """[`pull_adapter`], returning what the checks found; `options` are `token` and `cache_dir`."""
    if os.path.isdir(repo_id):
        if revision is not None:
            raise ValueError(
                f"`revision={revision!r}` needs a repository on the Hub, and {repo_id!r} is a local folder. Leave it "
                "out, or run in another directory to pull the repository of that name."
            )
        return _check(Path(repo_id), base_model)

    # List, check and download, unless only the cache is allowed or reachable.
    if local_files_only or constants.HF_HUB_OFFLINE:
        return _check(_cached(repo_id, revision, options), base_model)
    try:
        listing, folder = _download_listed(HfApi(token=options.get("token")), repo_id, revision, exports, options)
    except HTTPError as error:
        if getattr(error, "response", None) is not None:
            raise  # the Hub answered
        return _check(_cached(repo_id, revision, options, error), base_model)

    # Files in the cache may be damaged on disk. Download those again.
    damaged = [path for path in listing.files if not is_same_file(Path(folder, path), listing.files[path])]
    if damaged:
        logger.warning(f"{first_few(damaged)} of {repo_id} are damaged in the cache and are downloaded again.")
        folder = _download(listing, listing.commit, {**options, "force_download": True}, damaged)
        damaged = [path for path in damaged if not is_same_file(Path(folder, path), listing.files[path])]
    if damaged:
        raise AdapterCheckError(
            f"{first_few(damaged)} of {repo_id} at {listing.commit} arrived with other contents than the Hub lists: a "
            "proxy may alter downloads. Try again from another network."
        )
    return _check(Path(folder), base_model)


def _cached(repo_id: str, revision: str | None, options: Mapping[str, Any], reason: Exception | None = None) -> Path:
    """The folder in the cache, if the Hub may not be used or, with a `reason`, can't be reached."""
    # Not `snapshot_download`, which would also expect the files that were not downloaded on purpose.
    offline: dict[str, Any] = {"revision": revision, "local_files_only": True, **options}
    try:
        paths = [hf_hub_download(repo_id, name, **offline) for name in (CONFIG_NAME, WEIGHTS_NAME)]
    except LocalEntryNotFoundError:
        if reason is None:
            raise
        raise ConnectionError(
            f"The Hub can't be reached ({reason}), and {repo_id} is not in the cache. Try again later."
        ) from reason
    if reason is not None:
        logger.warning(f"The Hub can't be reached ({reason}); using {repo_id} from the cache.")
    return Path(str(paths[0])).parent


@dataclass(frozen=True)
class _Listing:
    repo_id: str
    commit: str
    files: Mapping[str, RepoSibling]


def _list(api: HfApi, repo_id: str, revision: str | None, exports: bool) -> _Listing:
    """The commit that a revision names now, and its files to download."""
    info = api.model_info(repo_id, revision=revision, files_metadata=True)
    assert info.sha is not None  # only listings of many repositories leave it out
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    paths = check_listing({path: sibling.size for path, sibling in siblings.items()})
    files = {path: siblings[path] for path in paths if exports or classify(path) is not FileKind.EXPORT}
    return _Listing(repo_id, info.sha, files)


def _download_listed(
    api: HfApi, repo_id: str, revision: str | None, exports: bool, options: Mapping[str, Any]
) -> tuple[_Listing, str]:
    """List, check and download; repeat if the revision has moved in between."""
    for _ in range(_ATTEMPTS):
        listing = _list(api, repo_id, revision, exports)
        # By the revision's name, so that the cache knows its commit when there is no network.
        folder = _download(listing, revision, options)
        if Path(folder).name == listing.commit:
            return listing, folder
        logger.info(f"{revision or 'The main branch'} of {repo_id} changed during the download; starting over.")
    raise AdapterCheckError(
        f"{revision or 'The main branch'} of {repo_id} changed during each of {_ATTEMPTS} downloads. Pass a commit as "
        "`revision`."
    )


def _download(
    listing: _Listing, revision: str | None, options: Mapping[str, Any], paths: Iterable[str] | None = None
) -> str:
    # Names were checked: none has a wildcard.
    patterns = list(listing.files if paths is None else paths)
    return snapshot_download(listing.repo_id, revision=revision, allow_patterns=patterns, **options)


def is_same_file(path: Path, listed: RepoFile | RepoSibling) -> bool:
    """
    Whether a file has the hash that a commit lists: SHA-256 for large files, else Git's blob hash.

    Args:
        path (`Path`): The local file.
        listed (`RepoFile` or `RepoSibling`): Its entry in the listing of the Hub.
    """
    if not path.is_file() or (listed.size is not None and path.stat().st_size != listed.size):
        return False
    if listed.lfs is not None:
        return _hash(path, hashlib.sha256()) == listed.lfs.sha256
    if listed.blob_id is None:
        return True
    return _hash(path, hashlib.sha1(b"blob %d\0" % path.stat().st_size)) == listed.blob_id


def _hash(path: Path, state: hashlib._Hash) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: state).hexdigest()


def _check(folder: Path, base_model: str | None) -> CheckedAdapter:
    checked = check_adapter(folder, base_model=base_model)
    card = folder / CARD_NAME
    if card.is_file():
        digest = read_card_info(check_card(card)).get("digest")
        if digest is not None and digest != checked.digest:
            raise AdapterCheckError(
                f"The weights in {folder} do not match its card: their digest is {checked.digest}, the card has "
                f"{digest}. One of the two was replaced. Use another revision, or ask the author to push the "
                "adapter again."
            )
    return checked
