"""
Lists and downloads files of a model repository into the cache of `huggingface_hub`.

`huggingface_hub` names files of its cache after headers of answers, `ETag` and `X-Repo-Commit`, without a check (as of
version 2.4): an endpoint could write outside of the cache. Here every name comes from one listing, which is checked:
the commit and the hashes are hexadecimal digits. A file gets into the cache only if it has the listed hash, and no
answer is read beyond its limit. Other libraries find the files, since the layout of the cache is documented:
https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import constants, get_session, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.file_download import are_symlinks_supported, repo_folder_name
from huggingface_hub.hf_api import BlobLfsInfo, RepoFile, RepoSibling
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, tqdm, validate_repo_id
from transformers.utils import logging

from .._version import __version__
from ..reading import MIB, AdapterCheckError, first_few, parse_json, shorten
from ..writing import write_text


logger = logging.get_logger(__name__)

# A file takes about 300 bytes of a listing: more than the 5,000 files that a repository of an adapter may have.
_LISTING_LIMIT = 8 * MIB
_COMMIT, _SHA256 = re.compile("[0-9a-f]{40}"), re.compile("[0-9a-f]{64}")

# An answer may take this many seconds, and then another one for each so many bytes.
_GRACE, _MIN_BYTES_PER_SECOND = 60.0, 1024
# Failures in a row without this many bytes in between.
_ATTEMPTS, _PROGRESS = 5, MIB
_ERROR_HEADERS = ("x-error-", "x-request-id", "x-amz")
_TRANSIENT = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Listing:
    """
    The files of a repository at one commit. Names of files are as the endpoint lists them.

    Args:
        repo_id (`str`): The repository.
        commit (`str`): The commit, 40 hexadecimal digits.
        files (`Mapping[str, RepoSibling]`): Size in bytes and hash of each file, by its path.
    """

    repo_id: str
    commit: str
    files: Mapping[str, RepoSibling]

    def check_size(self, path: str, limit: int) -> None:
        """
        Refuse a file of more than `limit` bytes before it is downloaded.

        Raises:
            AdapterCheckError: If it is larger.
        """
        size = self.files[path].size or 0
        if size > limit:
            raise AdapterCheckError(
                f"{path} of {self.repo_id} has {size} bytes, more than {limit}. It is not a file of an adapter."
            )


def list_files(repo_id: str, revision: str | None = None, *, token: str | bool | None = None) -> Listing:
    """
    List the files of a repository, at the commit that a revision names now.

    Args:
        repo_id (`str`): Repository on the Hub.
        revision (`str`, *optional*): Branch, tag or commit. Defaults to the main branch.
        token (`str` or `bool`, *optional*): As in `huggingface_hub.model_info`.

    Raises:
        ValueError: If `revision` can't be the name of a revision.
        AdapterCheckError: If the answer is not a listing of files with hashes.
        HfHubHTTPError: If the Hub refuses. Other errors of its base class `HTTPError`: if it can't be reached.
        TimeoutError: If the answer does not end.
    """
    # The revision becomes the name of a file in the cache.
    validate_repo_id(repo_id)
    if revision is not None and not _is_ref_name(revision):
        raise ValueError(f"`revision={revision!r}` is not the name of a revision. Pass a branch, a tag or a commit.")

    url = f"{constants.ENDPOINT}/api/models/{repo_id}"
    if revision is not None:
        url += f"/revision/{quote(revision, safe='')}"
    source = f"The listing of {repo_id}"
    with _open(f"{url}?blobs=true", token) as response:
        data = parse_json(b"".join(_pieces(response, _LISTING_LIMIT, source)), source)
    try:
        listing = _read_listing(repo_id, data)
    except ValueError as error:
        raise AdapterCheckError(
            f"{source} has {error}. The endpoint is not a Hub, or a proxy altered its answer. Set `HF_ENDPOINT` to a "
            "Hub that you trust."
        ) from error
    if revision is not None and _COMMIT.fullmatch(revision) and listing.commit != revision:
        raise AdapterCheckError(
            f"{source} at {revision} is one of {listing.commit}. Set `HF_ENDPOINT` to another Hub."
        )
    return listing


def _is_ref_name(name: str) -> bool:
    return name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(name.split("/"))


def _read_listing(repo_id: str, data: Any) -> Listing:
    """Check the values that will be used. Raises `ValueError` with what is wrong."""
    if not isinstance(data, dict) or not isinstance(data.get("siblings"), list):
        raise ValueError("no list of files")
    if not _is_hash(data.get("sha"), _COMMIT):
        raise ValueError(f"{shorten(data.get('sha'))} in place of a commit")

    files: dict[str, RepoSibling] = {}
    for entry in data["siblings"]:
        if not isinstance(entry, dict) or not isinstance(entry.get("rfilename"), str):
            raise ValueError(f"{shorten(entry)} in place of a file")
        path: str = entry["rfilename"]
        size, blob, lfs = (entry.get(key) for key in ("size", "blobId", "lfs"))
        if type(size) is not int or size < 0:
            raise ValueError(f"{shorten(size)} as the size of {shorten(path)}")
        sha256 = lfs.get("sha256") if isinstance(lfs, dict) else None
        if not (_is_hash(blob, _COMMIT) if lfs is None else _is_hash(sha256, _SHA256)):
            raise ValueError(f"no hash of {shorten(path)}, but {shorten(blob if lfs is None else lfs)}")
        files[path] = RepoSibling(path, size, blob, None if sha256 is None else BlobLfsInfo(size, sha256, 0))
    return Listing(repo_id, data["sha"], files)


def _is_hash(value: Any, pattern: re.Pattern[str]) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def download(
    listing: Listing,
    paths: Collection[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Path:
    """
    Download listed files into the cache, unless they are there and whole.

    Args:
        listing ([`Listing`]): The commit and its files.
        paths (`Collection[str]`): Which of them.
        revision (`str`, *optional*): Name by which the cache knows the commit without a network, see [`list_files`].
        token (`str` or `bool`, *optional*), cache_dir (`str`, *optional*): As in `huggingface_hub.snapshot_download`.

    Returns:
        `Path`: The folder in the cache. It may have other files of the same commit.

    Raises:
        AdapterCheckError: If a content differs from the listing, or a path leads out of the folder.
        HfHubHTTPError, HTTPError, TimeoutError: As in [`list_files`].
        OSError: If it can't be written, as on a full disk.
    """
    cache = Path(constants.HF_HUB_CACHE if cache_dir is None else cache_dir).expanduser()
    storage = (cache / repo_folder_name(repo_id=listing.repo_id, repo_type="model")).resolve()
    folder = storage / "snapshots" / listing.commit
    _check_inside(folder)

    for path in paths:
        if folder not in Path(os.path.abspath(folder / path)).parents:
            raise AdapterCheckError(f"{shorten(path)} of {listing.repo_id} leads out of its folder. Nothing was read.")

    missing = [path for path in paths if not is_same_file(folder / path, listing.files[path])]
    damaged = [path for path in missing if (folder / path).exists()]
    if damaged:
        logger.warning(f"{first_few(damaged)} of {listing.repo_id} are damaged in the cache and are downloaded again.")

    sizes = [listing.files[path].size or 0 for path in missing]
    with tqdm(total=sum(sizes), desc=listing.repo_id, unit="B", unit_scale=True, disable=not missing or None) as bar:
        for path in missing:
            _place(listing, path, storage, token, bar.update)

    # Last, so that the name never leads to a commit that is not complete.
    name = revision or constants.DEFAULT_REVISION
    if name != listing.commit:
        _write_ref(storage / "refs" / name, listing.commit)
    return folder


def _check_inside(folder: Path) -> None:
    """Refuse a link in place of a folder in the cache."""
    target = folder.resolve()
    if target != folder.parent.resolve() / folder.name:
        raise AdapterCheckError(f"{folder} is a link to {target}, outside of the cache. Remove the link.")


def _write_ref(path: Path, commit: str) -> None:
    try:
        if not path.is_file() or path.read_text() != commit:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, commit)
    except OSError as error:  # a cache that may only be read
        logger.warning(f"The cache does not know {path.name} without a network: {error}")


def _place(
    listing: Listing, path: str, storage: Path, token: str | bool | None, progress: Callable[[int], object]
) -> None:
    """Download a file to its place in the cache: a link to a blob, which has the name of its hash; or the file."""
    listed = listing.files[path]
    blob = storage / "blobs" / str(listed.lfs.sha256 if listed.lfs else listed.blob_id)
    pointer = storage / "snapshots" / listing.commit / path
    temporary = blob.with_name(f"{blob.name}.{uuid.uuid4().hex[:8]}.incomplete")
    for place in (blob.parent, pointer.parent):
        place.mkdir(parents=True, exist_ok=True)
        _check_inside(place)

    links = are_symlinks_supported(storage)
    try:
        if not is_same_file(blob, listed):
            fetch(listing, path, temporary, token=token, progress=progress)
            if links:
                os.replace(temporary, blob)
        elif not links:
            shutil.copyfile(blob, temporary)
        if links:
            temporary.symlink_to(os.path.relpath(blob, pointer.parent))
        os.replace(temporary, pointer)
    finally:
        temporary.unlink(missing_ok=True)


def fetch(
    listing: Listing,
    path: str,
    target: Path,
    *,
    token: str | bool | None = None,
    progress: Callable[[int], object] = lambda size: None,
) -> None:
    """
    Download a listed file. A broken connection is resumed.

    Args:
        listing ([`Listing`]): The commit and its files.
        path (`str`): Which of them.
        target (`Path`): Where to write it. On an error it has a part or a wrong content.
        token (`str` or `bool`, *optional*): As in `huggingface_hub.hf_hub_download`.
        progress (`Callable`, *optional*): Called with the number of bytes of each piece.

    Raises:
        AdapterCheckError: If the content differs from the listing.
        HfHubHTTPError, HTTPError, TimeoutError: As in [`list_files`].
        OSError: If it can't be written, as on a full disk.
    """
    url, size = hf_hub_url(listing.repo_id, path, revision=listing.commit), listing.files[path].size or 0
    failures = most = 0

    # Without a buffer, which would be written once more, and fail once more, when the file is closed.
    with open(target, "wb", buffering=0) as file:
        while file.tell() < size:
            try:
                with _open(url, token, start=file.tell()) as response:
                    if response.status_code != 206:  # the whole file, also where a part was asked for
                        file.seek(0)
                        file.truncate()
                    for piece in _pieces(response, size - file.tell(), f"{path} of {listing.repo_id}"):
                        _write(file, piece)
                        progress(len(piece))
                break
            except HTTPError as error:
                status = getattr(getattr(error, "response", None), "status_code", None)
                # Beyond what any attempt had reached: an answer may begin anew each time.
                failures = failures + 1 if file.tell() < most + _PROGRESS else 1
                if status not in (None, *_TRANSIENT) or failures == _ATTEMPTS:
                    raise
                logger.warning(f"The download of {path} of {listing.repo_id} broke ({error}), and is resumed.")
                most = max(most, file.tell())
                time.sleep(failures)

    if not is_same_file(target, listing.files[path]):
        raise AdapterCheckError(
            f"{path} of {listing.repo_id} at {listing.commit} arrived with other contents than the Hub lists: a "
            "proxy may alter downloads. Try again from another network."
        )


def _write(file: FileIO, piece: bytes) -> None:
    left = memoryview(piece)
    try:
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        folder = os.path.dirname(str(file.name))
        raise OSError(
            error.errno,
            f"A download can't be stored in {folder}: {error.strerror}. What was downloaded of the file is removed. "
            "Make room, or use a cache on another disk (`HF_HOME`)",
        ) from error


@contextmanager
def _open(url: str, token: str | bool | None, *, start: int = 0) -> Iterator[Any]:
    """The answer to a request. The client does not send the token to other hosts that it is redirected to."""
    # Compressed, an answer could be of any size when it is read.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    headers |= build_hf_headers(token=token, library_name="rlora_trl", library_version=__version__)
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=timeout) as response:
        if response.is_error:
            raise_without_body(response)
        yield response


def raise_without_body(response: Any) -> None:
    """Raise for the status of an answer, whose body may be of any size and form. The message is in a header, too."""
    headers = response.headers.items()
    kept = {name: value[:500] for name, value in headers if name.startswith(_ERROR_HEADERS)}
    hf_raise_for_status(type(response)(response.status_code, headers=kept, request=response.request))


def _pieces(response: Any, limit: int, what: str) -> Iterator[bytes]:
    """
    The body of an answer.

    Raises:
        AdapterCheckError: If it has more than `limit` bytes, or is compressed.
        TimeoutError: If it comes too slowly.
    """
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise AdapterCheckError(f"{what} was sent as {shorten(encoding)}, which was not asked for, as by a proxy.")
    received, began = 0, time.monotonic()
    for piece in response.iter_raw():
        received += len(piece)
        if received > limit:
            raise AdapterCheckError(f"{what} has more than {limit} bytes, which is the most that is read of it.")
        if time.monotonic() - began > _GRACE + received / _MIN_BYTES_PER_SECOND:
            raise TimeoutError(f"{what} comes too slowly: {received} bytes in {_GRACE:.0f} s. Try again later.")
        yield piece


def find_file(
    repo_id: str,
    path: str,
    *,
    limit: int,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Path | None:
    """
    A file of a repository: downloaded, or from the cache where the Hub may not be used or can't be reached.

    Args:
        repo_id (`str`): Repository on the Hub.
        path (`str`): Path in it, separated by "/".
        limit (`int`): The most bytes that it may have.
        revision (`str`, *optional*), token (`str` or `bool`, *optional*): As in [`list_files`].

    Returns:
        `Path`, or `None` if there is no such repository, revision or file.

    Raises:
        AdapterCheckError: If the file is larger, or the endpoint can't be trusted.
        HfHubHTTPError: If the Hub refuses.
    """
    try:
        if constants.HF_HUB_OFFLINE:
            return cached_file(repo_id, path, revision=revision)
        listing = list_files(repo_id, revision, token=token)
        if path not in listing.files:
            return None
        listing.check_size(path, limit)
        return download(listing, [path], revision=revision, token=token) / path
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError):
        return None
    except HTTPError as error:
        if getattr(error, "response", None) is not None:
            raise
        return cached_file(repo_id, path, revision=revision)


def cached_file(
    repo_id: str, path: str, *, revision: str | None = None, cache_dir: str | os.PathLike | None = None
) -> Path | None:
    """
    A file in the cache, without a request.

    Args:
        repo_id (`str`), path (`str`), revision (`str`, *optional*): See [`find_file`].
        cache_dir (`str`, *optional*): Cache of `huggingface_hub`. Defaults to its own.

    Raises:
        AdapterCheckError: If the folder in the cache leads out of it.
    """
    cache = None if cache_dir is None else os.fspath(cache_dir)
    found = try_to_load_from_cache(repo_id, path, cache_dir=cache, revision=revision)
    if not isinstance(found, str):
        return None
    _check_inside(Path(found).parents[path.count("/")])
    return Path(found)


def is_same_file(path: Path, listed: RepoFile | RepoSibling) -> bool:
    """
    Whether a file has the hash that a commit lists: SHA-256 for large files, else Git's blob hash.

    Args:
        path (`Path`): The local file.
        listed (`RepoFile` or `RepoSibling`): Its entry in the listing of the Hub.
    """
    if not path.is_file() or (listed.size is not None and path.stat().st_size != listed.size):
        return False
    name = listed.lfs.sha256 if listed.lfs is not None else listed.blob_id
    return name is None or has_hash(path, name)


def has_hash(path: Path, name: str) -> bool:
    """
    Whether a file has the contents that a blob's name promises.

    Args:
        path (`Path`): The local file.
        name (`str`): SHA-256 in 64 hexadecimal digits, or the 40 of the hash that Git has for the content.
    """
    is_sha256 = len(name) == 64
    state = hashlib.sha256() if is_sha256 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: state).hexdigest() == name
