"""The protocol of the Hub as the tests' server speaks it: requests, answers, and how a route is found for a request.

A push of `huggingface_hub` sends, in this order: `validate-yaml` (if README.md is among the files), `preupload` (which
files are large, and what is there already), `<repo>.git/info/lfs/objects/batch` (where to put the large ones; nothing
for those that the repository has), the uploads, and `commit` (one JSON object a line: header, small files in base64,
large ones by SHA-256). A download sends HEAD then GET of `resolve`; a large file is a redirect to storage on another
host, to which the token must not be sent. Errors are told apart by the header `X-Error-Code`.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlencode

from hub_state import HubError, HubState, Token


REPO = r"(?P<repo>[^/]+(?:/[^/]+)?)"
# A file that has to fit into the commit request; larger ones must go through large file storage.
REGULAR_LIMIT = 10_000_000


@dataclass
class Request:
    """What was asked: `path` is still percent-encoded, `query` keeps repeated parameters."""

    method: str
    path: str
    query: dict[str, list[str]] = field(default_factory=dict)
    headers: Any = field(default_factory=dict)
    body: bytes = b""
    token: Token | None = None

    def json(self) -> Any:
        try:
            return json.loads(self.body or b"null")
        except ValueError as error:
            raise HubError(400, f"Invalid JSON: {error}") from error

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("1", "true")


@dataclass
class Response:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


ROUTES: list[tuple[str, re.Pattern[str], Callable]] = []


def route(method: str, pattern: str) -> Callable:
    """Register a method of the class below or of one derived from it; the first whole match of the path answers."""

    def register(function: Callable) -> Callable:
        ROUTES.append((method, re.compile(pattern.replace("{repo}", REPO)), function))
        return function

    return register


def json_response(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    headers = {"Content-Type": "application/json", **(headers or {})}
    return Response(status, json.dumps(data, default=str).encode(), headers)


class HubRoutes:
    """Answers requests from the state. Sizes are attributes, so that a test can make "large" small."""

    def __init__(self, url: str, storage_url: str) -> None:
        self.url = url
        self.storage_url = storage_url
        self.reset()

    def reset(self) -> None:
        """Forget all repositories and go back to the default sizes."""
        self.state = HubState()
        self.lfs_threshold = REGULAR_LIMIT  # bytes; larger files are uploaded as large objects
        self.part_size = 16_000_000  # bytes; larger objects are uploaded in parts of this size
        self.page_size = 1000  # rows of a listing in one answer
        self._parts: dict[str, dict[int, bytes]] = {}

    def handle(self, request: Request) -> Response:
        """The answer to a request; errors are answers too."""
        try:
            request.token = self.state.authenticate(request.headers.get("Authorization"))
            method = "GET" if request.method == "HEAD" else request.method
            for verb, pattern, function in ROUTES:
                match = pattern.fullmatch(request.path) if verb == method else None
                if match:
                    return function(self, request, **{k: unquote(v or "") for k, v in match.groupdict().items()})
            code = "RepoNotFound" if re.match(r"/api/(datasets|spaces)/", request.path) else None
            raise HubError(404, f"The Hub of the tests has no {request.method} {request.path}", code)
        except HubError as error:
            headers = {"X-Error-Code": error.code} if error.code else {}
            message = error.message.partition("\n")[0].encode("ascii", "replace").decode()
            return json_response(
                {"error": error.message}, error.status, {"X-Error-Message": message, **headers, **error.headers}
            )

    def _page(self, request: Request, rows: list) -> Response:
        """One page of rows, with a `Link` header where more follow."""
        size = min(int(request.query.get("limit", [self.page_size])[0]), self.page_size)
        start = int(request.query.get("cursor", ["0"])[0])
        headers = {"X-Total-Count": str(len(rows))}
        if start + size < len(rows):
            query = {**request.query, "cursor": [str(start + size)]}
            headers["Link"] = f'<{self.url}{request.path}?{urlencode(query, doseq=True)}>; rel="next"'
        return json_response(rows[start : start + size], headers=headers)
