"""What the Hub of the tests stores: users, tokens, and repositories with commits, references and file contents."""

import fnmatch
import hashlib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any


GIT_ATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n"
    for pattern in "*.7z *.arrow *.bin *.ckpt *.gguf *.gz *.h5 *.npy *.npz *.onnx *.parquet *.pickle *.pkl *.png *.pt "
    "*.pth *.safetensors *.tar *.zip".split()
)


class HubError(Exception):
    """An answer of the Hub that is an error. `code` goes into `X-Error-Code`, by which the client picks a class."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = dict(headers or {})


@dataclass(frozen=True)
class Token:
    """An access token: whose it is, and whether it may write."""

    user: str
    role: str = "write"


@dataclass(frozen=True)
class Entry:
    """A file of a commit. `sha256` is set for files in large file storage, where git keeps a pointer only."""

    size: int
    blob_id: str
    sha256: str | None = None
    pointer_size: int = 0

    @property
    def oid(self) -> str:
        """The name of the content: what the client compares its own file with, and its ETag."""
        return self.sha256 or self.blob_id


@dataclass(frozen=True)
class Commit:
    """A commit; `files` is the whole tree by path."""

    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: Mapping[str, Entry]


@dataclass
class Discussion:
    """A discussion or a pull request, whose commits are on `refs/pr/<num>`."""

    num: int
    title: str
    author: str
    created_at: str
    is_pull_request: bool
    base: str = "refs/heads/main"

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.num}"


@dataclass
class Repo:
    """A model repository. `refs` maps full references to commits; `uploaded` are the large objects that it has."""

    id: str
    created_at: str
    private: bool = False
    gated: bool = False
    granted: set[str] = field(default_factory=set)
    downloads: int = 0
    likes: int = 0
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    discussions: list[Discussion] = field(default_factory=list)
    uploaded: set[str] = field(default_factory=set)

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    def find_ref(self, revision: str) -> str | None:
        """The full reference that `revision` names: a branch, a tag, or `refs/...` itself."""
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), None)

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, tag, reference, or (shortened) commit id."""
        ref = self.find_ref(revision)
        if ref is not None:
            return self.commits[self.refs[ref]]
        if len(revision) >= 7:
            found = [commit for oid, commit in self.commits.items() if oid.startswith(revision)]
            if len(found) == 1:
                return found[0]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def history(self, revision: str) -> list[Commit]:
        """The commits of a revision, newest first."""
        commits = [self.resolve(revision)]
        while commits[-1].parent is not None:
            commits.append(self.commits[commits[-1].parent])
        return commits

    def names(self, prefix: str) -> dict[str, str]:
        """Short names and commits of the references below `prefix`, such as "refs/heads/"."""
        return {ref.removeprefix(prefix): oid for ref, oid in self.refs.items() if ref.startswith(prefix)}


class HubState:
    """Users, repositories and contents, and the rules who may see and change what."""

    def __init__(self) -> None:
        self.tokens = {
            "hf_test_user": Token("user"),
            "hf_test_read": Token("user", role="read"),
            "hf_test_other": Token("other"),
        }
        self.organizations = {"org": {"user"}}
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self._ticks = itertools.count()

    def now(self) -> str:
        """A clock that moves one second at each look, so that dates differ and sort by what happened first."""
        moment = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=next(self._ticks))
        return moment.strftime("%Y-%m-%dT%H:%M:%S.000Z")

    def authenticate(self, authorization: str | None) -> Token | None:
        """The token of a request, None for anonymous ones. A token that nobody has is an error on every route."""
        if authorization is None:
            return None
        token = self.tokens.get(authorization.removeprefix("Bearer ").strip())
        if token is None:
            message = "Invalid credentials in Authorization header"
            raise HubError(401, message, headers={"X-Error-Message": message})
        return token

    def owns(self, token: Token | None, namespace: str) -> bool:
        return token is not None and (
            token.user == namespace or token.user in self.organizations.get(namespace, frozenset())
        )

    def can_write(self, token: Token | None, repo: Repo) -> bool:
        return token is not None and token.role == "write" and self.owns(token, repo.owner)

    def can_read(self, token: Token | None, repo: Repo) -> bool:
        return not repo.private or self.owns(token, repo.owner)

    def readable(self, token: Token | None, repo_id: str) -> Repo:
        """The repository, which does not exist for those who may not see it."""
        repo = self.repos.get(repo_id)
        if repo is None or not self.can_read(token, repo):
            raise HubError(404 if token else 401, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, token: Token | None, repo_id: str, *, ref: str | None = None) -> Repo:
        """The repository, for writers; a pull request (`ref`) may also be changed by its author."""
        repo = self.readable(token, repo_id)
        if token is None:
            raise HubError(401, "Invalid username or password.")
        author = next((item.author for item in repo.discussions if item.ref == ref), None)
        if token.role == "write" and author == token.user:
            return repo
        if not self.can_write(token, repo):
            raise HubError(403, "Forbidden: you don't have the rights to write to this repository")
        return repo

    def check_gate(self, token: Token | None, repo: Repo) -> None:
        """Files of a gated repository are for its owners and for who was granted access; the rest is public."""
        if not repo.gated or self.owns(token, repo.owner) or (token is not None and token.user in repo.granted):
            return
        message = f"Access to model {repo.id} is restricted and you are not in the authorized list."
        raise HubError(403 if token else 401, message, "GatedRepo", {"X-Error-Message": message})

    def create_repo(self, repo_id: str, *, private: bool = False, author: str | None = None) -> Repo:
        """A new repository whose first commit holds `.gitattributes`."""
        repo = Repo(repo_id, self.now(), private=private)
        self.repos[repo_id] = repo
        files = {".gitattributes": self.store(".gitattributes", GIT_ATTRIBUTES.encode(), repo)}
        self.add_commit(repo, "refs/heads/main", files, "initial commit", author=author or repo.owner)
        return repo

    def upload_mode(self, path: str, size: int, sample: bytes, attributes: bytes, threshold: int) -> str:
        """ "lfs" for the patterns of `.gitattributes`, for files above `threshold` bytes, and for binary ones."""
        patterns = [line.split()[0] for line in attributes.decode().splitlines() if "filter=lfs" in line]
        by_name = any(fnmatch.fnmatch(path.rsplit("/", 1)[-1], pattern) for pattern in patterns)
        return "lfs" if by_name or size > threshold or b"\0" in sample else "regular"

    def store(self, path: str, content: bytes, repo: Repo, *, lfs: bool = False) -> Entry:
        """Keep a content and return the file that refers to it."""
        if lfs:
            sha256 = hashlib.sha256(content).hexdigest()
            self.objects[sha256] = content
            repo.uploaded.add(sha256)
            return pointer_entry(sha256, len(content))
        blob_id = git_hash("blob", content)
        self.objects[blob_id] = content
        return Entry(len(content), blob_id)

    def add_commit(
        self, repo: Repo, ref: str, files: Mapping[str, Entry], title: str, *, author: str, message: str = ""
    ) -> Commit:
        """Move `ref` to a new commit that has exactly `files`."""
        parent = repo.refs.get(ref)
        date = self.now()
        oid = git_hash("commit", f"{tree_id(files)} {parent} {author} {date} {title} {message}".encode())
        commit = Commit(oid, parent, title, message, author, date, dict(files))
        repo.commits[oid] = commit
        repo.refs[ref] = oid
        return commit

    def read(self, commit: Commit, path: str) -> bytes:
        """Content of a file of a commit, empty if there is none."""
        entry = commit.files.get(path)
        return b"" if entry is None else self.objects[entry.oid]


def git_hash(kind: str, content: bytes) -> str:
    """Name of an object in git."""
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


def tree_id(files: Mapping[str, Entry]) -> str:
    listing = "\n".join(f"{path} {entry.blob_id}" for path, entry in sorted(files.items()))
    return git_hash("tree", listing.encode())


def pointer_entry(sha256: str, size: int) -> Entry:
    """The file of a large object: git stores a pointer of three lines, and its hash is the blob's id."""
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    return Entry(size, git_hash("blob", pointer), sha256, len(pointer))


def folders_of(paths: Iterable[str]) -> set[str]:
    """Every folder that holds one of the files, at any depth."""
    return {"/".join(path.split("/")[:depth]) for path in paths for depth in range(1, path.count("/") + 1)}


def as_content(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()
