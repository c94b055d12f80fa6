"""A small Hugging Face Hub on 127.0.0.1, for the real, unpatched `huggingface_hub` client.

Two origins are served, as on the real Hub: the Hub itself (`url`) and the storage of large files (`storage_url`). What
a request means is in fake_hub.py; this file has the HTTP side: requests, their record, and the faults of tests.

    hub.commit("user/adapter", {"adapter_config.json": "{}"})                 # behind the client's back
    hub.fail("POST", r"/api/models/.*/commit/", status=500, after=True)       # it lands, yet the client sees an error
    hub.fail("GET", r"/cdn/", drop_after=1000)                                # the connection breaks in a download
    hub.before("GET", r"/cdn/", lambda: hub.commit("user/adapter", changes))  # the revision moves in between
    hub.rewrite("*", r"/resolve/", lambda answer: answer.headers.update(ETag='"../x"'))  # a hostile answer
    [(r.method, r.path, r.status) for r in hub.requests]
"""

import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from fake_hub import FakeHub, Request, Response, as_json


@dataclass
class Record:
    """A request as it went over the wire. `status` 0: the connection was cut before an answer."""

    method: str
    path: str  # decoded, without the query
    storage: bool  # sent to the storage of large files
    authorization: str | None
    received: int = 0  # bytes of the body
    sent: int = 0  # bytes of the answer's body
    status: int = 0


@dataclass
class Fault:
    """What happens to the requests that match, `times` of them (None: all), after the first `skip`."""

    method: str
    pattern: str
    times: int | None = 1
    skip: int = 0
    status: int | None = None
    drop_after: int | None = None
    delay: float = 0.0
    after: bool = False
    action: Callable[[], object] | None = None
    change: Callable[[Response], object] | None = None
    hits: int = 0

    def take(self, record: Record) -> bool:
        """Whether this request is hit; counts it."""
        matches = self.method in ("*", record.method) and re.search(self.pattern, record.path)
        if not matches or self.times == 0:
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


class HubServer:
    """The server, and what tests do with it directly. Use as a context manager."""

    token = "hf_test_user"  # of "user", who owns user/* and org/*
    other_token = "hf_test_other"  # of "other"

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._servers = [_Server(self, storage=storage) for storage in (False, True)]
        # Another host name: by it, not by the port, huggingface_hub 1.x sees that storage is not the Hub.
        self.url, self.storage_url = (
            f"http://{host}:{server.server_port}"
            for host, server in zip(("127.0.0.1", "localhost"), self._servers, strict=True)
        )
        self._threads = [threading.Thread(target=server.serve_forever, args=(0.05,)) for server in self._servers]
        self.reset()

    def __enter__(self) -> "HubServer":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join(10)

    def reset(self) -> None:
        """Forget repositories, requests and faults."""
        with self._lock:
            self.fake = FakeHub(self.url, self.storage_url)
            self.requests: list[Record] = []
            self.faults: list[Fault] = []
            self.errors: list[str] = []  # tracebacks of the server itself; the fixture fails a test that has any

    # Faults

    def fail(self, method: str, pattern: str, **how) -> Fault:
        """Make requests fail or wait. `pattern` is searched in the decoded path; `method` "*" is any.

        `status` answers that instead of serving; `drop_after` cuts the connection after so many bytes of the request's
        body (POST, PUT) or of the answer's (GET); `delay` waits so many seconds first; `after` does the work, then
        answers `status` or, with `drop_after`, nothing. A request fails once: of several failures that match, the one
        that was injected first is used up first.
        """
        with self._lock:
            self.faults.append(Fault(method, pattern, **how))
        return self.faults[-1]

    def before(self, method: str, pattern: str, action: Callable[[], object]) -> Fault:
        """Call `action` right before a request is served, once."""
        return self.fail(method, pattern, action=action)

    def rewrite(self, method: str, pattern: str, change: Callable[[Response], object]) -> Fault:
        """Let `change` alter every answer to the requests that match, in place."""
        return self.fail(method, pattern, change=change, times=None)

    def take_faults(self, record: Record) -> list[Fault]:
        """The faults that hit a request: waits and actions, and the first failure; a second one waits its turn."""
        taken: list[Fault] = []
        with self._lock:
            for fault in self.faults:
                if not (fault.fails and any(other.fails for other in taken)) and fault.take(record):
                    taken.append(fault)
        return taken

    # What went over the wire

    def count(self, method: str, pattern: str) -> int:
        """How many requests matched."""
        return sum(record.method == method and bool(re.search(pattern, record.path)) for record in self.requests)

    def uploaded_bytes(self) -> int:
        """Bytes of large files that were received; cut and repeated uploads count."""
        return sum(record.received for record in self.requests if record.method == "PUT")

    def downloaded_bytes(self) -> int:
        """Bytes of files that were sent."""
        requests = (r for r in self.requests if r.method == "GET" and re.search("/(resolve|cdn)/", r.path))
        return sum(record.sent for record in requests if record.status == 200)

    # Repositories, behind the client's back

    @property
    def repos(self) -> dict:
        return self.fake.repos

    def create(self, repo_id: str, *, private: bool = False):
        return self.fake.create(repo_id, private=private)

    def repo(self, repo_id: str):
        """The repository itself, to look into or to change (`private`, `downloads`, `refs`)."""
        return self.fake.repos[repo_id]

    def commit(
        self, repo_id: str, files: Mapping[str, bytes | str | None] | str | Path, *, revision: str = "main"
    ) -> str:
        """Commit files (None deletes one) or a folder, and return the commit's id.

        The repository and the branch are created where they are missing. Paths are not checked, so that a hostile
        repository can be built.
        """
        if not isinstance(files, Mapping):
            paths = (path for path in Path(files).rglob("*") if path.is_file())
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        with self._lock:
            repo = self.fake.repos.get(repo_id) or self.create(repo_id)
            ref = repo.find_ref(revision) or f"refs/heads/{revision}"
            repo.refs.setdefault(ref, repo.refs["refs/heads/main"])
            tree = dict(repo.resolve(ref).files)
            for path, value in files.items():
                tree.pop(path, None)
                if value is not None:
                    tree[path] = self.fake.store(repo, value.encode() if isinstance(value, str) else value, path)
            return self.fake.add_commit(repo, ref, tree, "Commit by a test").oid

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Contents by path."""
        with self._lock:
            tree = self.repo(repo_id).resolve(revision).files
            return {path: self.fake.objects[entry.oid] for path, entry in sorted(tree.items())}

    def head(self, repo_id: str, revision: str = "main") -> str:
        """The commit that a revision is at."""
        return self.repo(repo_id).resolve(revision).oid

    def commits(self, repo_id: str, revision: str = "main") -> list:
        """The commits of a revision, newest first; the last one is "initial commit", with .gitattributes."""
        repo = self.repo(repo_id)
        commits = [repo.resolve(revision)]
        while commits[-1].parent is not None:
            commits.append(repo.commits[commits[-1].parent])
        return commits

    def tamper(self, repo_id: str, path: str, content: bytes) -> None:
        """Serve another content under the names (ids, hashes, size in listings) of the present one."""
        self.fake.objects[self.repo(repo_id).resolve("main").files[path].oid] = content

    def announce_size(self, repo_id: str, path: str, size: int) -> None:
        """Let listings give a size that the file does not have."""
        files = self.repo(repo_id).resolve("main").files
        files[path] = replace(files[path], size=size)

    # Serving, called by the handler's threads

    def answer(self, request: Request):
        """Serve a request. An error of the server itself is kept for the fixture, and is no status that is retried."""
        with self._lock:
            try:
                return self.fake.handle(request)
            except Exception:
                self.errors.append(traceback.format_exc())
                return as_json({"error": self.errors[-1]}, 501)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: HubServer, *, storage: bool) -> None:
        self.hub, self.storage = hub, storage
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is part of the tests; anything else is a fault of the server."""
        if not isinstance(sys.exception(), OSError):
            self.hub.errors.append(traceback.format_exc())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 120  # seconds that an open connection may be silent
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Requests are recorded, not printed."""

    def _serve(self) -> None:
        hub, parts = self.server.hub, urlsplit(self.path)
        record = Record(self.command, unquote(parts.path), self.server.storage, self.headers.get("Authorization"))
        hub.requests.append(record)
        faults = hub.take_faults(record)
        failure = next((fault for fault in faults if fault.fails), Fault("", ""))

        # A request with a body is cut while it is read; otherwise the answer is.
        cut = failure.drop_after is not None and not failure.after and self.command in ("POST", "PUT")
        body = self._read_body(record, failure.drop_after if cut else None)
        if cut:
            return self._hang_up()
        for fault in faults:
            time.sleep(fault.delay)
            if fault.action is not None:
                fault.action()

        refusal = None if failure.status is None else as_json({"error": "Injected by a test"}, failure.status)
        if refusal is not None and not failure.after:
            return self._write(record, refusal)
        response = hub.answer(Request(self.command, parts.path, parse_qs(parts.query), self.headers, body))
        for fault in faults:
            if fault.change is not None:
                fault.change(response)
        if failure.after and refusal is None:
            return self._hang_up()
        self._write(record, refusal or response, failure.drop_after)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _read_body(self, record: Record, limit: int | None) -> bytes:
        """The body, at most `limit` bytes of it, counted in `record`."""
        body = b""
        for size in self._piece_sizes():
            piece = self.rfile.read(size if limit is None else min(size, limit - len(body)))
            body += piece
            record.received = len(body)
            if len(piece) < size and limit is None:
                raise ConnectionError("The client left in the middle of a request")
            if limit is not None and len(body) >= limit:
                break
        return body

    def _piece_sizes(self):
        """Sizes of the pieces of the body: one, or the chunks of a chunked request."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            yield int(self.headers.get("Content-Length", 0))
            return
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield size
            self.rfile.readline()
        self.rfile.readline()

    def _write(self, record: Record, response, drop_after: int | None = None) -> None:
        if not isinstance(response.body, bytes):
            return self._write_pieces(record, response)
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

    def _write_pieces(self, record: Record, response) -> None:
        """A body of unknown length, sent until the client leaves; the connection's end is its end."""
        record.status = response.status
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        for piece in response.body if self.command != "HEAD" else ():
            self.wfile.write(piece)
            record.sent += len(piece)
        self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            self.close_connection = True  # the client was faster
