"""
What the Hub says about repositories, as JSON of which nothing is taken for granted.

`HfApi.list_models` creates a `ModelInfo` for each repository, and one card that its classes can't hold ends the whole
list. Here each entry is parsed and checked alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, urlsplit

from huggingface_hub import HfApi
from huggingface_hub.utils import build_hf_headers, http_stream_backoff, validate_repo_id

from ..files.card_text import check_metadata
from ..files.download import raise_without_body
from ..reading import MIB, AdapterCheckError, parse_json, shorten, split_json_list


# The most bytes of one answer, and of one repository in it.
_MAX_ANSWER, _MAX_ENTRY = 128 * MIB, 8 * MIB
_MAX_PAGES = 10_000
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Types of the fields that are read. Any may be missing or null, except the name.
_TYPES: Mapping[str, type] = {"downloads": int, "lastModified": str, "private": bool, "sha": str, "tags": list}


def list_entries(query: Mapping[str, Any], token: str | bool | None) -> Iterator[bytes]:
    """
    List repositories of models, page by page.

    Args:
        query (`Mapping[str, Any]`): Parameters of the Hub's list of models.
        token (`str` or `bool`, *optional*): As in `huggingface_hub.list_models`.

    Yields:
        `bytes`: One repository as JSON, for [`read_entry`].

    Raises:
        AdapterCheckError: If an answer is not a list, is too large, or the pages do not end.
        HfHubHTTPError: If the Hub refuses.
    """
    endpoint = HfApi().endpoint
    url, params = f"{endpoint}/api/models", dict(query)
    seen = {url}
    for _ in range(_MAX_PAGES):
        data, following = _get(url, token, params)
        count = 0
        for element in split_json_list(data, "The Hub's list of models"):
            count += 1
            yield element

        if following is None or not count:
            return
        if following in seen:
            break
        # The token is for the Hub only, whatever host the answer names.
        if _origin(following) != _origin(endpoint):
            token = False
        seen.add(following)
        url, params = following, {}
    raise AdapterCheckError("The Hub's list of models does not end: its pages repeat. Correct `HF_ENDPOINT`.")


def _origin(url: str) -> tuple[str, str | None, int | None]:
    try:
        parts = urlsplit(url)
        return parts.scheme, parts.hostname, parts.port
    except ValueError as error:
        raise AdapterCheckError(f"The Hub's next page has the address {shorten(url)}. Try again later.") from error


def get_entry(repo_id: str, revision: str | None, token: str | bool | None) -> bytes:
    """
    Ask for one repository.

    Raises:
        HfHubHTTPError: If it does not exist or may not be read.
    """
    url = f"{HfApi().endpoint}/api/models/{repo_id}"
    return _get(url if revision is None else f"{url}/revision/{quote(revision, safe='')}", token, {}, max_retries=0)[0]


def _get(url: str, token: str | bool | None, params: Mapping[str, Any], **options: Any) -> tuple[bytes, str | None]:
    """An answer, read up to a limit, and the address of the next page."""
    headers = build_hf_headers(token=token)
    data = bytearray()
    with http_stream_backoff("GET", url, params=params or None, headers=headers, **options) as response:
        if response.is_error:
            raise_without_body(response)
        for piece in response.iter_bytes():
            data += piece
            if len(data) > _MAX_ANSWER:
                raise AdapterCheckError(
                    f"The Hub's answer has more than {_MAX_ANSWER} bytes. Try again, or correct `HF_ENDPOINT`."
                )
        return bytes(data), response.links.get("next", {}).get("url")


def read_entry(data: bytes) -> dict[str, Any]:
    """
    Parse and check what the Hub says about one repository.

    Args:
        data (`bytes`): The JSON.

    Returns:
        `dict[str, Any]`: `id` and, if the Hub says so, `sha`, `downloads`, `lastModified`, `private`, `tags` and
        `cardData`, of the types that the Hub documents.

    Raises:
        AdapterCheckError: If a value has another type or form.
    """
    if len(data) > _MAX_ENTRY:
        raise AdapterCheckError(f"it has {len(data)} bytes, more than {_MAX_ENTRY}.")
    entry = parse_json(data, "the Hub's answer")
    if not isinstance(entry, dict):
        raise AdapterCheckError(f"the Hub's answer must be an object, got {shorten(entry)}.")

    try:
        validate_repo_id(entry.get("id") or "")  # which accepts `None`
    except ValueError as error:
        raise AdapterCheckError(f"{shorten(entry.get('id'))} is not the name of a repository.") from error
    for name, kind in _TYPES.items():
        value = entry.get(name)
        if value is not None and type(value) is not kind:
            raise AdapterCheckError(f"`{name}` must be of type {kind.__name__}, got {shorten(value)}.")
    if entry.get("sha") is not None and not _COMMIT.fullmatch(entry["sha"]):
        raise AdapterCheckError(f"{shorten(entry['sha'])} is not a commit, which has 40 hexadecimal digits.")
    if entry.get("cardData") is not None:
        check_metadata(entry["cardData"], "it")
    return entry


def name_of(data: bytes) -> str:
    """The name of a repository that can't be read otherwise, for messages."""
    match = re.search(rb'"id"\s*:\s*"([\w./-]{1,96})"', data[:_MAX_ENTRY])
    return match[1].decode() if match else "a repository without a name"
