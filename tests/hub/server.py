"""A small Hugging Face Hub on 127.0.0.1, for the real, unpatched `huggingface_hub` client.

Two origins are served, as on the real Hub: the Hub itself (`url`) and the storage of large files (`storage_url`).
What each request means is in hub_writes.py and hub_reads.py, what is stored in hub_state.py. This file has the HTTP
side: reading requests, recording them, and the faults that tests inject.

    hub.commit("user/adapter", {"adapter_config.json": "{}"})                 # behind the client's back
    hub.fail("POST", r"/api/models/.*/commit/", status=500, after=True)       # it lands, yet the client sees an error
    hub.fail("GET", r"/cdn/", drop_after=1000)                                # the connection breaks in a download
    hub.before("GET", r"/cdn/", lambda: hub.commit("user/adapter", changes))  # the revision moves in between
    [(r.method, r.path, r.status) for r in hub.requests]
"""

import json
import re
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from hub_api import Request, Response, json_response
from hub_reads import HubReads
from hub_state import Commit, Repo, Token, as_content
from hub_writes import HubWrites


READ_SIZE = 65536
IDLE_TIMEOUT = 120  # seconds that an open connection may be silent


@dataclass
class Record:
    """A request as it went over the wire. `status` 0: the connection was cut before an answer."""

    method: str
    path: str  # decoded, without the query
    query: dict[str, list[str]]
    storage: bool  # sent to the storage of large files
    authorization: str | None
    body: bytes = b""
    received: int = 0  # bytes of the body, which is kept when all of it has come
    sent: int = 0  # bytes of the answer's body
    status: int = 0


@dataclass
class Fault:
    """What happens to the requests that match, `times` of them (None: all), after the first `skip`."""

    method: str
    pattern: re.Pattern[str]
    times: int | None
    skip: int = 0
    status: int | None = None
    message: str = "Injected by a test"
    headers: Mapping[str, str] = field(default_factory=dict)
    drop_after: int | None = None
    delay: float = 0.0
    after: bool = False
    action: Callable[[], object] | None = None
    hits: int = 0

    def take(self, method: str, path: str) -> bool:
        """Whether this request is hit; counts it."""
        if self.method not in ("*", method) or not self.pattern.search(path) or self.times == 0:
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.hits += 1
        self.times = None if self.times is None else self.times - 1
        return True

    @property
    def fails(self) -> bool:
        return self.status is not None or self.drop_after is not None

    def cuts_request(self, method: str) -> bool:
        """A request with a body is cut while it is read; otherwise the answer is."""
        return self.drop_after is not None and not self.after and method in ("POST", "PUT")

    def response(self) -> Response:
        return json_response({"error": self.message}, self.status or 500, dict(self.headers))


class HubApi(HubWrites, HubReads):
    """All routes."""


class HubServer:
    """The server, and what tests do with it directly. Use as a context manager."""

    token = "hf_test_user"  # of "user", who owns user/* and is an admin of org/*
    read_token = "hf_test_read"  # of "user", without the right to write
    other_token = "hf_test_other"  # of "other"

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._stopped = threading.Event()
        self._servers = [_Server(self, storage=False), _Server(self, storage=True)]
        hub, storage = self._servers
        self.url = f"http://127.0.0.1:{hub.server_port}"
        # Another host name: by it, not by the port, huggingface_hub 1.x sees that storage is not the Hub.
        self.storage_url = f"http://localhost:{storage.server_port}"
        self.api = HubApi(self.url, self.storage_url)
        self._threads = [threading.Thread(target=server.serve_forever, args=(0.05,)) for server in self._servers]
        self.reset()

    def __enter__(self) -> "HubServer":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stopped.set()
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join(10)

    def reset(self) -> None:
        """Forget repositories, requests and faults."""
        with self._lock:
            self.api.reset()
            self.requests: list[Record] = []
            self.faults: list[Fault] = []
            self.errors: list[str] = []  # tracebacks of the server itself; the fixture fails a test that has any

    # Faults

    def fail(
        self,
        method: str,
        pattern: str,
        *,
        status: int | None = None,
        times: int | None = 1,
        skip: int = 0,
        message: str = "Injected by a test",
        headers: Mapping[str, str] | None = None,
        drop_after: int | None = None,
        delay: float = 0.0,
        after: bool = False,
    ) -> Fault:
        """Make requests fail or wait. `pattern` is searched in the decoded path; `method` "*" is any.

        `status` answers that instead of serving; `drop_after` cuts the connection after so many bytes of the request's
        body (POST, PUT) or of the answer's (GET); `delay` waits so many seconds first; `after` does the work, then
        answers `status` or, with `drop_after`, nothing. A request fails once: of several failures that match, the one
        given first is used up first.
        """
        options = {"status": status, "times": times, "skip": skip, "message": message, "headers": headers or {}}
        fault = Fault(method, re.compile(pattern), drop_after=drop_after, delay=delay, after=after, **options)
        with self._lock:
            self.faults.append(fault)
        return fault

    def before(self, method: str, pattern: str, action: Callable[[], object], *, times: int | None = 1) -> Fault:
        """Call `action` right before a request is served."""
        fault = Fault(method, re.compile(pattern), times, action=action)
        with self._lock:
            self.faults.append(fault)
        return fault

    # What went over the wire

    def count(self, method: str, pattern: str) -> int:
        """How many requests matched so far."""
        return len(self._matching(method, pattern))

    def uploaded_bytes(self, sha256: str = "") -> int:
        """Bytes of large files that were received, of one object or of all; cut and repeated uploads count."""
        return sum(record.received for record in self._matching("PUT", f"/upload/.*{sha256}"))

    def downloaded_bytes(self, pattern: str = "/(resolve|cdn)/") -> int:
        """Bytes of files that were sent; a large file is sent from /cdn/<repo>/<sha256>."""
        return sum(record.sent for record in self._matching("GET", pattern) if record.status in (200, 206))

    def _matching(self, method: str, pattern: str) -> list[Record]:
        with self._lock:
            return [r for r in self.requests if method in ("*", r.method) and re.search(pattern, r.path)]

    # Repositories, behind the client's back

    def create(self, repo_id: str, *, private: bool = False, gated: bool = False) -> Repo:
        with self._lock:
            repo = self.api.state.create_repo(repo_id, private=private)
            repo.gated = gated
            return repo

    def repo(self, repo_id: str) -> Repo:
        """The repository itself, to look into or to change (`private`, `gated`, `granted`, `downloads`, `refs`)."""
        return self.api.state.repos[repo_id]

    def add_user(self, name: str, *, role: str = "write") -> str:
        """The token of a new user."""
        self.api.state.tokens[f"hf_test_{name}"] = Token(name, role)
        return f"hf_test_{name}"

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes | str | None] | str | Path,
        *,
        revision: str = "main",
        message: str = "Commit by a test",
        author: str | None = None,
    ) -> str:
        """Commit files (None deletes one) or a folder, and return the commit's id.

        The repository and the branch are created where they are missing. Paths are not checked, so that a hostile
        repository can be built.
        """
        if not isinstance(files, Mapping):
            files = _read_folder(Path(files))
        with self._lock:
            state = self.api.state
            repo = state.repos.get(repo_id) or self.create(repo_id)
            ref = repo.find_ref(revision) or f"refs/heads/{revision}"
            repo.refs.setdefault(ref, repo.refs["refs/heads/main"])
            tree = dict(repo.resolve(ref).files)
            attributes = state.read(repo.resolve(ref), ".gitattributes")
            for path, value in files.items():
                tree.pop(path, None)
                if value is not None:
                    content = as_content(value)
                    mode = state.upload_mode(path, len(content), content[:512], attributes, self.api.lfs_threshold)
                    tree[path] = state.store(path, content, repo, lfs=mode == "lfs" and len(content) > 0)
            return state.add_commit(repo, ref, tree, message, author=author or repo.owner).oid

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Contents by path."""
        with self._lock:
            commit = self.repo(repo_id).resolve(revision)
            return {path: self.api.state.read(commit, path) for path in sorted(commit.files)}

    def head(self, repo_id: str, revision: str = "main") -> str:
        """The commit that a revision is at."""
        return self.repo(repo_id).resolve(revision).oid

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """The commits of a revision, newest first; the last one is "initial commit", with .gitattributes."""
        return self.repo(repo_id).history(revision)

    def tamper(self, repo_id: str, path: str, content: bytes, *, revision: str = "main") -> None:
        """Serve another content under the names (ids, hashes, size in listings) of the present one."""
        entry = self.repo(repo_id).resolve(revision).files[path]
        self.api.state.objects[entry.oid] = content

    def announce_size(self, repo_id: str, path: str, size: int, *, revision: str = "main") -> None:
        """Let listings and HEAD give a size that the file does not have."""
        commit = self.repo(repo_id).resolve(revision)
        files = {**commit.files, path: replace(commit.files[path], size=size)}
        self.repo(repo_id).commits[commit.oid] = replace(commit, files=files)

    # Serving, called by the handler's threads

    def take_faults(self, method: str, path: str) -> list[Fault]:
        """The faults that hit a request: waits and actions, and the first failure; a second one waits its turn."""
        taken: list[Fault] = []
        with self._lock:
            for fault in self.faults:
                if fault.fails and any(other.fails for other in taken):
                    continue
                if fault.take(method, path):
                    taken.append(fault)
        return taken

    def answer(self, request: Request) -> Response:
        """Serve a request. An error of the server itself is kept for the fixture, and is no status that is retried."""
        with self._lock:
            try:
                return self.api.handle(request)
            except Exception:
                self.errors.append(traceback.format_exc())
                return json_response({"error": self.errors[-1]}, 501)

    def wait(self, seconds: float) -> None:
        self._stopped.wait(seconds)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: HubServer, *, storage: bool) -> None:
        self.hub = hub
        self.storage = storage
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is part of the tests; anything else is a fault of the server."""
        if not isinstance(sys.exception(), OSError):
            self.hub.errors.append(traceback.format_exc())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = IDLE_TIMEOUT
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Requests are recorded, not printed."""

    def _serve(self) -> None:
        hub = self.server.hub
        parts = urlsplit(self.path)
        query = parse_qs(parts.query)
        authorization = self.headers.get("Authorization")
        record = Record(self.command, unquote(parts.path), query, self.server.storage, authorization)
        hub.requests.append(record)
        faults = hub.take_faults(self.command, record.path)
        failure = next((fault for fault in faults if fault.fails), None)
        cut = failure is not None and failure.cuts_request(self.command)
        body = b"".join(self._read_body(record, failure.drop_after if cut else None))
        if cut:
            return self._hang_up()
        record.body = body
        for fault in faults:
            hub.wait(fault.delay)
            if fault.action is not None:
                fault.action()
        refused = failure is not None and failure.status is not None
        if refused and not failure.after:
            return self._write(record, failure.response())
        response = hub.answer(Request(self.command, parts.path, query, self.headers, body))
        if failure is not None and failure.after and not refused:
            return self._hang_up()
        self._write(record, failure.response() if refused else response, failure.drop_after if failure else None)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _read_body(self, record: Record, limit: int | None) -> Iterator[bytes]:
        """The body in pieces, at most `limit` bytes of it, counted in `record`."""
        for size in self._piece_sizes():
            left = size if limit is None else min(size, limit - record.received)
            while left > 0:
                data = self.rfile.read1(min(left, READ_SIZE))
                if not data:
                    raise ConnectionError("The client left in the middle of a request")
                record.received += len(data)
                left -= len(data)
                yield data
            if limit is not None and record.received >= limit:
                return

    def _piece_sizes(self) -> Iterator[int]:
        """Sizes of the pieces of the body: one, or the chunks of a chunked request."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            yield int(self.headers.get("Content-Length", 0))
            return
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield size
            self.rfile.readline()
        self.rfile.readline()

    def _write(self, record: Record, response: Response, drop_after: int | None = None) -> None:
        body = b"" if self.command == "HEAD" else response.body[:drop_after]
        record.status, record.sent = response.status, len(body)
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(response.body)))
        self._headers_buffer.append(b"\r\n" + body)
        self.flush_headers()
        if drop_after is not None:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            self.close_connection = True  # the client was faster


def _read_folder(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def main() -> None:
    """Serve until interrupted, to try things by hand: HF_ENDPOINT=<url> HF_TOKEN=hf_test_user hf ..."""
    with HubServer() as hub:
        print(json.dumps({"url": hub.url, "token": hub.token}), flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
