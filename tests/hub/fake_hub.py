"""Repositories of the tests' Hub, and its routes: what a push, a pull and a search of the library send, and no more.

A push of `huggingface_hub` sends, in this order: `validate-yaml` (if README.md is among the files), `preupload` (which
files are large, and what is there already), `<repo>.git/info/lfs/objects/batch` (where to put the large ones; nothing
for those that the repository has), the uploads, and `commit` (one JSON object a line: header, small files in base64,
large ones by SHA-256). A download sends HEAD then GET of `resolve`; a large file is a redirect to storage on another
host, to which the token must not be sent. The client picks a class for an error by the header `X-Error-Code`.
"""

import base64
import hashlib
import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote

import yaml


LARGE = (".bin", ".gguf", ".npy", ".npz", ".pickle", ".pkl", ".png", ".pt", ".pth", ".safetensors", ".zip")
TOKENS = {"hf_test_user": "user", "hf_test_other": "other"}
MEMBERS = {"org": {"user"}}
LICENSES = "apache-2.0 cc-by-4.0 gemma llama2 llama3 llama3.1 llama3.2 llama3.3 mit openrail other".split()
REPO_ID = re.compile(r"(?:[A-Za-z0-9][\w.\-]*/)?[A-Za-z0-9][\w.\-]{0,95}")
FIELDS = "_id id likes private downloads tags pipeline_tag library_name createdAt".split()  # of a model in a list


class HubError(Exception):
    """An answer that is an error."""

    def __init__(self, status, message, code=None):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Entry:
    """A file of a commit; `sha256` if it is large, where git has only a pointer."""

    size: int
    blob_id: str
    sha256: str | None = None

    @property
    def oid(self):
        """The name of the content: what the client compares its own file with, and its ETag."""
        return self.sha256 or self.blob_id

    @property
    def lfs(self):
        """Fields of a large file in listings."""
        names = {"oid": self.sha256, "sha256": self.sha256}
        return {} if self.sha256 is None else {"lfs": {**names, "size": self.size, "pointerSize": 134}}


@dataclass(frozen=True)
class Commit:
    """A commit; `files` is the whole tree, entries by path."""

    oid: str
    parent: str | None
    title: str
    date: str
    files: dict


@dataclass
class Repo:
    """A model repository: full references to commits, and the large objects that were uploaded."""

    id: str
    created: str
    private: bool = False
    downloads: int = 0
    refs: dict = field(default_factory=dict)
    commits: dict = field(default_factory=dict)
    uploaded: set = field(default_factory=set)
    pull_requests: list = field(default_factory=list)

    @property
    def owner(self):
        return self.id.split("/")[0]

    def find_ref(self, revision):
        names = (revision, f"refs/heads/{revision}")
        return next((name for name in names if name in self.refs), None)

    def resolve(self, revision):
        """The commit of a branch, of a reference, or of a commit id."""
        oid = self.refs.get(self.find_ref(revision), revision)
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]


@dataclass
class Request:
    """`path` is still percent-encoded, `query` keeps repeated parameters; `user` is the owner of its token."""

    method: str
    path: str
    query: dict
    headers: dict
    body: bytes
    user: str | None = None

    def flag(self, name):
        return self.query.get(name, [""])[0].lower() in ("1", "true")


@dataclass
class Response:
    """An answer; a body of pieces, which may go on forever, has no announced length."""

    status: int = 200
    body: bytes | Iterable[bytes] = b""
    headers: dict = field(default_factory=dict)


def as_json(data, status=200, headers=None):
    return Response(status, json.dumps(data).encode(), {"Content-Type": "application/json", **(headers or {})})


ROUTES = []


def route(method, pattern):
    def register(function):
        ROUTES.append((method, re.compile(pattern.replace("{repo}", "(?P<repo>[^/]+/[^/]+)")), function))
        return function

    return register


def git_hash(kind, content):
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


def large_entry(sha256, size):
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    return Entry(size, git_hash("blob", pointer.encode()), sha256)


class FakeHub:
    """Repositories, contents by name, and who may see and change what."""

    def __init__(self, url, storage_url):
        self.url, self.storage_url = url, storage_url
        self.repos, self.objects = {}, {}
        self._ticks = itertools.count()

    def now(self):
        """A clock that moves at each look, so that dates sort by what happened first."""
        minutes, seconds = divmod(next(self._ticks), 60)
        return f"2026-01-01T{minutes // 60:02d}:{minutes % 60:02d}:{seconds:02d}.000Z"

    def create(self, repo_id, *, private=False):
        repo = self.repos[repo_id] = Repo(repo_id, self.now(), private=private)
        files = {".gitattributes": self.store(repo, b"*.bin filter=lfs diff=lfs merge=lfs -text\n")}
        self.add_commit(repo, "refs/heads/main", files, "initial commit")
        return repo

    def store(self, repo, content, path=""):
        """Keep a content; large where its path or a byte of zero says so."""
        if content and (path.endswith(LARGE) or b"\0" in content[:512]):
            entry = large_entry(hashlib.sha256(content).hexdigest(), len(content))
            repo.uploaded.add(entry.oid)
        else:
            entry = Entry(len(content), git_hash("blob", content))
        self.objects[entry.oid] = content
        return entry

    def add_commit(self, repo, ref, files, title):
        """Move `ref` to a new commit that has exactly `files`."""
        parent, date = repo.refs.get(ref), self.now()
        tree = "\n".join(f"{path} {entry.blob_id}" for path, entry in sorted(files.items()))
        oid = git_hash("commit", f"{tree} {parent} {date} {title}".encode())
        repo.commits[oid] = Commit(oid, parent, title, date, dict(files))
        repo.refs[ref] = oid
        return repo.commits[oid]

    # Rights

    def owns(self, user, namespace):
        return user is not None and (user == namespace or user in MEMBERS.get(namespace, ()))

    def readable(self, request, repo_id):
        """The repository, which does not exist for those who may not see it."""
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and not self.owns(request.user, repo.owner)):
            raise HubError(404 if request.user else 401, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, request, repo_id, revision="main"):
        """The repository and the full reference of a commit to be; whoever can read it may open a pull request."""
        repo = self.readable(request, repo_id)
        ref = repo.find_ref(revision)
        if ref is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if request.user is None:
            raise HubError(401, "Invalid username or password.")
        if not request.flag("create_pr") and not self.owns(request.user, repo.owner):
            raise HubError(403, "Forbidden: you don't have the rights to write to this repository")
        return repo, ref

    def handle(self, request):
        """The answer to a request; errors are answers too."""
        try:
            authorization = request.headers.get("Authorization")
            if authorization is not None:
                request.user = TOKENS.get(authorization.removeprefix("Bearer ").strip())
                if request.user is None:
                    raise HubError(401, "Invalid credentials in Authorization header")
            method = "GET" if request.method == "HEAD" else request.method
            for verb, pattern, function in ROUTES:
                match = pattern.fullmatch(request.path) if verb == method else None
                if match:
                    return function(self, request, **{k: unquote(v) for k, v in match.groupdict().items()})
            code = "RepoNotFound" if request.path.startswith("/api/datasets/") else None
            raise HubError(404, f"The Hub of the tests has no {request.method} {request.path}", code)
        except HubError as error:
            headers = {"X-Error-Message": str(error).partition("\n")[0]}
            headers |= {"X-Error-Code": error.code} if error.code else {}
            return as_json({"error": str(error)}, error.status, headers)

    # Reading

    @route("GET", "/{repo}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, request, repo, revision, path):
        commit = self.readable(request, repo).resolve(revision)
        entry = commit.files.get(path)
        if entry is None:
            headers = {"X-Repo-Commit": commit.oid, "X-Error-Code": "EntryNotFound"}
            return as_json({"error": "Entry not found"}, 404, headers)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{entry.oid}"'}
        if entry.sha256 is None:
            return Response(200, self.objects[entry.oid], headers)
        headers |= {"X-Linked-Size": str(entry.size), "X-Linked-ETag": f'"{entry.sha256}"'}
        return Response(302, b"Found", {**headers, "Location": f"{self.storage_url}/cdn/{repo}/{entry.sha256}"})

    @route("GET", "/cdn/{repo}/(?P<oid>[0-9a-f]{64})")
    def cdn(self, request, repo, oid):
        return Response(200, self.objects[oid], {"ETag": f'"{oid}"'})

    @route("GET", "/api/models/{repo}/tree/(?P<revision>[^/]+)")
    def tree(self, request, repo, revision):
        files = self.readable(request, repo).resolve(revision).files
        return as_json([path_info(path, entry) for path, entry in sorted(files.items())])

    @route("POST", "/api/models/{repo}/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, request, repo, revision):
        files = self.readable(request, repo).resolve(revision).files
        paths = parse_qs(request.body.decode()).get("paths", [])
        return as_json([path_info(path, files[path]) for path in paths if path in files])

    @route("GET", "/api/models/{repo}/revision/(?P<revision>[^/]+)")
    @route("GET", "/api/models/{repo}")
    def model_info(self, request, repo, revision="main"):
        repo = self.readable(request, repo)
        return as_json(self.describe(repo, repo.resolve(revision), blobs=request.flag("blobs")))

    @route("GET", "/api/models")
    def list_models(self, request):
        repos = [repo for repo in self.repos.values() if not repo.private or self.owns(request.user, repo.owner)]
        models = [self.describe(repo, repo.resolve("main")) for repo in repos]
        tags = {tag for value in request.query.get("filter", []) for tag in value.split(",")}
        author = request.query.get("author", [None])[0]
        models = [model for model in models if tags <= set(model["tags"]) and author in (None, model["author"])]
        sort = request.query["sort"][0]
        models.sort(key=lambda model: (model[sort], model["createdAt"]), reverse=True)
        # Only what was asked for, as on the real Hub.
        names = {"_id", "id", *request.query["expand"]} if "expand" in request.query else set(FIELDS)
        return as_json([{name: model[name] for name in names & model.keys()} for model in models])

    def describe(self, repo, commit, *, blobs=False):
        entry = commit.files.get("README.md")
        card = read_card(self.objects[entry.oid].decode(errors="replace"))[0] if entry else {}
        siblings = [
            {"rfilename": path, **({"size": item.size, "blobId": item.blob_id, **item.lfs} if blobs else {})}
            for path, item in sorted(commit.files.items())
        ]
        info = {
            "_id": repo.id,
            "id": repo.id,
            "author": repo.owner,
            "sha": commit.oid,
            "lastModified": commit.date,
            "createdAt": repo.created,
            "private": repo.private,
            "gated": False,
            "downloads": repo.downloads,
            "likes": 0,
            "tags": computed_tags(card, commit.files),
            "siblings": siblings,
        }
        return info | {"cardData": card, "library_name": card.get("library_name")} if card else info

    @route("GET", "/api/models/{repo}/discussions")
    def discussions(self, request, repo):
        rows = self.readable(request, repo).pull_requests
        return as_json({"discussions": rows, "count": len(rows), "start": 0})

    # Writing

    @route("POST", "/api/repos/create")
    def create_repo(self, request):
        data = json.loads(request.body)
        if request.user is None:
            raise HubError(401, "Invalid username or password.")
        namespace = data.get("organization") or request.user
        if not self.owns(request.user, namespace):
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        repo_id = f"{namespace}/{data['name']}"
        answer = {"url": f"{self.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.repos:
            return as_json({"error": "You already created this model repo", **answer}, 409)
        self.create(repo_id, private=bool(data.get("private")) or data.get("visibility") == "private")
        return as_json(answer)

    @route("POST", "/api/models/{repo}/branch/(?P<branch>[^/]+)")
    def create_branch(self, request, repo, branch):
        repo, _ = self.writable(request, repo)
        if repo.find_ref(branch):
            raise HubError(409, f"Reference already exists: refs/heads/{branch}")
        repo.refs[f"refs/heads/{branch}"] = repo.refs["refs/heads/main"]
        return as_json({})

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self, request):
        errors = read_card(json.loads(request.body)["content"])[1]
        return as_json({"errors": [{"message": text} for text in errors], "warnings": []}, 400 if errors else 200)

    @route("POST", "/api/models/{repo}/preupload/(?P<revision>[^/]+)")
    def preupload(self, request, repo, revision):
        repo, ref = self.writable(request, repo, revision)
        files, rows = repo.resolve(ref).files, []
        for file in json.loads(request.body)["files"]:
            path = file["path"]
            large = file["size"] and (path.endswith(LARGE) or b"\0" in base64.b64decode(file["sample"]))
            row = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            rows.append(row | ({"oid": files[path].oid} if path in files else {}))
        return as_json({"files": rows, "commitOid": repo.refs[ref]})

    @route("POST", r"/{repo}\.git/info/lfs/objects/batch")
    def lfs_batch(self, request, repo):
        uploaded, rows = self.readable(request, repo).uploaded, []
        verify = {"href": f"{self.url}/{repo}.git/info/lfs/verify"}
        for item in json.loads(request.body)["objects"]:
            row = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in uploaded:
                upload = {"href": f"{self.storage_url}/upload/{repo}/{item['oid']}"}
                row["actions"] = {"upload": upload, "verify": verify}
            rows.append(row)
        return as_json({"transfer": "basic", "objects": rows})

    @route("PUT", "/upload/{repo}/(?P<oid>[0-9a-f]{64})")
    def upload(self, request, repo, oid):
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, "The content does not have the announced SHA-256")
        self.objects[oid] = request.body
        self.repos[repo].uploaded.add(oid)
        return Response()

    @route("POST", r"/{repo}\.git/info/lfs/verify")
    def lfs_verify(self, request, repo):
        if json.loads(request.body)["oid"] not in self.readable(request, repo).uploaded:
            raise HubError(404, "Object was not uploaded")
        return Response()

    @route("POST", "/api/models/{repo}/commit/(?P<revision>[^/]+)")
    def commit(self, request, repo, revision):
        repo, ref = self.writable(request, repo, revision)
        header, *operations = map(json.loads, request.body.splitlines())
        parent = repo.resolve(ref)
        if header["value"].get("parentCommit", parent.oid) != parent.oid:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")

        # Nothing is changed before all operations are good: a commit lands as a whole.
        files = dict(parent.files)
        for operation in operations:
            self.apply(repo, files, operation["key"], operation["value"])

        title, answer = header["value"]["summary"], {"success": True, "hookOutput": ""}
        if request.flag("create_pr"):
            number = len(repo.pull_requests) + 1
            answer["pullRequestUrl"] = f"{self.url}/{repo.id}/discussions/{number}"
            repo.pull_requests.append(pull_request(repo.id, number, title, request.user, self.now()))
            repo.refs[f"refs/pr/{number}"], ref = parent.oid, f"refs/pr/{number}"
        new = self.add_commit(repo, ref, files, title)
        return as_json({**answer, "commitOid": new.oid, "commitUrl": f"{self.url}/{repo.id}/commit/{new.oid}"})

    def apply(self, repo, files, key, value):
        """One operation of a commit, to the tree `files`."""
        path = value["path"]
        if path.startswith("/") or {"..", ".", "", ".git"} & set(path.rstrip("/").split("/")):
            raise HubError(400, f"Invalid path: {path}")
        if key in ("deletedFile", "deletedFolder"):
            gone = [name for name in files if name == path or name.startswith(f"{path.rstrip('/')}/")]
            if not gone:
                raise HubError(404, f"{path} does not exist", "EntryNotFound")
            for name in gone:
                del files[name]
        elif key == "lfsFile":
            if value["oid"] not in repo.uploaded:
                raise HubError(400, f"{path} points to an object that was not uploaded: {value['oid']}")
            files[path] = large_entry(value["oid"], len(self.objects[value["oid"]]))
        else:
            content = base64.b64decode(value["content"])
            if path == "README.md" and (errors := read_card(content.decode())[1]):
                raise HubError(400, "Invalid metadata in README.md: " + "; ".join(errors))
            files[path] = self.store(repo, content)


def path_info(path, entry):
    return {"type": "file", "oid": entry.blob_id, "size": entry.size, "path": path, **entry.lfs}


def pull_request(repo_id, number, title, author, date):
    return {
        "num": number,
        "title": title,
        "author": {"name": author},
        "createdAt": date,
        "status": "open",
        "isPullRequest": True,
        "repo": {"name": repo_id, "type": "model"},
    }


# Cards


def read_card(text):
    """Metadata of a card, empty where it has none, and what the Hub refuses in it."""
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", text, re.DOTALL)
    try:
        data = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        return {}, [f"YAML metadata is not valid: {error}"]
    if not isinstance(data or {}, dict):
        return {}, ["YAML metadata must be a mapping"]
    data = data or {}
    errors = [f'"license" must be one of {LICENSES}' for name in as_list(data.get("license")) if name not in LICENSES]
    for key in ("tags", "language", "datasets", "base_model", "library_name", "pipeline_tag"):
        if not all(isinstance(value, str) for value in as_list(data.get(key))):
            errors.append(f'"{key}" must be a string or a list of strings')
    for key in ("base_model", "datasets"):
        names = [name for name in as_list(data.get(key)) if not REPO_ID.fullmatch(str(name))]
        errors += [f'"{key}" with value "{name}" is not valid. Use an id of the Hub.' for name in names]
    if data.get("base_model_relation") not in (None, "adapter", "finetune", "merge", "quantized"):
        errors.append('"base_model_relation" is not valid')
    return data, errors + check_results(data.get("model-index") or [])


def check_results(index):
    """Each result needs `task.type`, `dataset.name`, `dataset.type` and metrics that have a type and a value."""
    try:
        needed = [model["name"] for model in index]
        for result in (result for model in index for result in model["results"]):
            needed += [result["task"]["type"], result["dataset"]["name"], result["dataset"]["type"]]
            needed += [metric["type"] for metric in result["metrics"] if metric["value"] is not None]
    except (KeyError, TypeError) as error:
        return [f'"model-index" is not valid: {error!r}']
    return [] if all(isinstance(value, str) for value in needed) else ['"model-index" must have names that are text']


def computed_tags(card, files):
    """The tags by which a search finds a model."""
    relation = "adapter" if "adapter_config.json" in files else "finetune"
    bases = as_list(card.get("base_model"))
    tags = [*as_list(card.get("library_name")), *as_list(card.get("tags")), *(f"base_model:{base}" for base in bases)]
    return [*tags, *(f"base_model:{card.get('base_model_relation', relation)}:{base}" for base in bases)]


def as_list(value):
    return value if isinstance(value, list) else [] if value is None else [value]
