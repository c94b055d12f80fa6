"""Routes that change something: repositories, references, pull requests, uploads and commits."""

import base64
import binascii
import fnmatch
import json
from collections.abc import Iterable

from hub_api import REGULAR_LIMIT, HubRoutes, Request, Response, json_response, route
from hub_cards import validate_card
from hub_state import Commit, Discussion, Entry, HubError, Repo, pointer_entry


class HubWrites(HubRoutes):
    """See hub_api.py for the order in which the client sends these."""

    # Users and repositories

    @route("GET", "/api/whoami-v2")
    def whoami(self, request: Request) -> Response:
        if request.token is None:
            raise HubError(401, "Invalid username or password.")
        name, role = request.token.user, request.token.role
        orgs = [name_ for name_, members in self.state.organizations.items() if name in members]
        return json_response(
            {
                "type": "user",
                "id": name,
                "name": name,
                "fullname": name,
                "email": f"{name}@example.com",
                "orgs": [{"type": "org", "name": org, "roleInOrg": "admin"} for org in orgs],
                "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": role}},
            }
        )

    @route("POST", "/api/repos/create")
    def create_repo(self, request: Request) -> Response:
        data = request.json()
        if request.token is None:
            raise HubError(401, "Invalid username or password.")
        namespace = data.get("organization") or request.token.user
        if request.token.role != "write" or not self.state.owns(request.token, namespace):
            message = f'You don\'t have the rights to create a model under the namespace "{namespace}"'
            raise HubError(403, message)
        repo_id = f"{namespace}/{data['name']}"
        answer = {"url": f"{self.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.state.repos:
            return json_response({"error": "You already created this model repo", **answer}, 409)
        private = bool(data.get("private")) or data.get("visibility") == "private"
        self.state.create_repo(repo_id, private=private, author=request.token.user)
        return json_response(answer)

    @route("DELETE", "/api/repos/delete")
    def delete_repo(self, request: Request) -> Response:
        data = request.json()
        namespace = data.get("organization") or (request.token.user if request.token else "")
        repo = self.state.writable(request.token, f"{namespace}/{data['name']}")
        del self.state.repos[repo.id]
        return Response()

    @route("PUT", "/api/models/{repo}/settings")
    def settings(self, request: Request, repo: str) -> Response:
        found, data = self.state.writable(request.token, repo), request.json()
        if "visibility" in data:
            found.private = data["visibility"] == "private"
        found.private = data.get("private", found.private)
        found.gated = data.get("gated", found.gated)
        return json_response({"private": found.private, "gated": found.gated})

    @route("GET", "/api/models/{repo}/auth-check(?P<write>/write)?")
    def auth_check(self, request: Request, repo: str, write: str) -> Response:
        found = self.state.readable(request.token, repo)
        self.state.check_gate(request.token, found)
        if write:
            self.state.writable(request.token, repo)
        return Response()

    # References and history

    @route("GET", "/api/models/{repo}/refs")
    def refs(self, request: Request, repo: str) -> Response:
        found = self.state.readable(request.token, repo)

        def rows(prefix: str) -> list[dict]:
            names = found.names(prefix).items()
            return [{"name": name, "ref": prefix + name, "targetCommit": oid} for name, oid in names]

        answer = {"branches": rows("refs/heads/"), "tags": rows("refs/tags/"), "converts": []}
        if request.flag("include_prs"):
            answer["pullRequests"] = rows("refs/pr/")
        return json_response(answer)

    @route("POST", "/api/models/{repo}/branch/(?P<branch>[^/]+)")
    def create_branch(self, request: Request, repo: str, branch: str) -> Response:
        found = self.state.writable(request.token, repo)
        if f"refs/heads/{branch}" in found.refs:
            raise HubError(409, f"Reference already exists: refs/heads/{branch}")
        start = (request.json() or {}).get("startingPoint", "main")
        found.refs[f"refs/heads/{branch}"] = found.resolve(start).oid
        return json_response({})

    @route("DELETE", "/api/models/{repo}/branch/(?P<name>[^/]+)")
    def delete_branch(self, request: Request, repo: str, name: str) -> Response:
        if name == "main":
            raise HubError(403, "Cannot delete the default branch")
        return self._delete_ref(self.state.writable(request.token, repo), f"refs/heads/{name}")

    @route("POST", "/api/models/{repo}/tag/(?P<revision>[^/]+)")
    def create_tag(self, request: Request, repo: str, revision: str) -> Response:
        found, tag = self.state.writable(request.token, repo), request.json()["tag"]
        if f"refs/tags/{tag}" in found.refs:
            raise HubError(409, f"Tag reference exists already: {tag}")
        found.refs[f"refs/tags/{tag}"] = found.resolve(revision).oid
        return json_response({})

    @route("DELETE", "/api/models/{repo}/tag/(?P<name>[^/]+)")
    def delete_tag(self, request: Request, repo: str, name: str) -> Response:
        return self._delete_ref(self.state.writable(request.token, repo), f"refs/tags/{name}")

    def _delete_ref(self, repo: Repo, ref: str) -> Response:
        if repo.refs.pop(ref, None) is None:
            raise HubError(404, f"Invalid rev id: {ref}", "RevisionNotFound")
        return Response()

    @route("GET", "/api/models/{repo}/commits/(?P<revision>[^/]+)")
    def commits(self, request: Request, repo: str, revision: str) -> Response:
        history = self.state.readable(request.token, repo).history(revision)
        rows = [
            {
                "id": commit.oid,
                "title": commit.title,
                "message": commit.message,
                "authors": [{"user": commit.author}],
                "date": commit.date,
            }
            for commit in history
        ]
        return self._page(request, rows)

    # Discussions and pull requests

    @route("GET", "/api/models/{repo}/discussions")
    def discussions(self, request: Request, repo: str) -> Response:
        found = self.state.readable(request.token, repo)
        rows = [self._discussion(found, item) for item in found.discussions]
        return json_response({"discussions": rows, "count": len(rows), "start": 0})

    @route("POST", "/api/models/{repo}/discussions")
    def create_discussion(self, request: Request, repo: str) -> Response:
        found, data = self._contributable(request, repo), request.json()
        item = self._open_discussion(found, request, data["title"], is_pull_request=data["pullRequest"])
        if item.is_pull_request:
            found.refs[item.ref] = found.resolve("main").oid
        return json_response({"num": item.num})

    @route("GET", r"/api/models/{repo}/discussions/(?P<num>\d+)")
    def discussion(self, request: Request, repo: str, num: str) -> Response:
        found = self.state.readable(request.token, repo)
        item = next((item for item in found.discussions if item.num == int(num)), None)
        if item is None:
            raise HubError(404, f"Discussion {num} not found")
        return json_response(self._discussion(found, item))

    def _discussion(self, repo: Repo, item: Discussion) -> dict:
        data = {
            "num": item.num,
            "title": item.title,
            "author": {"name": item.author},
            "createdAt": item.created_at,
            "status": "open",
            "isPullRequest": item.is_pull_request,
            "repo": {"name": repo.id, "type": "model"},
            "events": [],
        }
        if item.is_pull_request:
            data |= {"changes": {"base": item.base}, "filesWithConflicts": [], "diff": ""}
        return data

    def _open_discussion(
        self, repo: Repo, request: Request, title: str, *, is_pull_request: bool, base: str = "refs/heads/main"
    ) -> Discussion:
        num = len(repo.discussions) + 1
        item = Discussion(num, title, request.token.user, self.state.now(), is_pull_request, base)
        repo.discussions.append(item)
        return item

    def _contributable(self, request: Request, repo: str) -> Repo:
        """The repository, for those who may open a pull request: whoever can read it and has a write token."""
        found = self.state.readable(request.token, repo)
        if request.token is None:
            raise HubError(401, "Invalid username or password.")
        if request.token.role != "write":
            raise HubError(403, "Forbidden: this token can only read")
        return found

    # Uploads and commits

    def _target(self, request: Request, repo: str, revision: str) -> tuple[Repo, str]:
        """The repository and full reference of a commit to be, checked for the rights to make it."""
        found = self.state.readable(request.token, repo)
        ref = found.find_ref(revision)
        if ref is None or ref.startswith("refs/tags/"):
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if request.flag("create_pr"):
            return self._contributable(request, repo), ref
        return self.state.writable(request.token, repo, ref=ref), ref

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self, request: Request) -> Response:
        errors, warnings = validate_card(request.json()["content"])
        answer = {
            "errors": [{"message": message} for message in errors],
            "warnings": [{"message": message} for message in warnings],
        }
        return json_response(answer, 400 if errors else 200)

    @route("POST", "/api/models/{repo}/preupload/(?P<revision>[^/]+)")
    def preupload(self, request: Request, repo: str, revision: str) -> Response:
        found, ref = self._target(request, repo, revision)
        commit = found.resolve(ref)
        attributes = self.state.read(commit, ".gitattributes")
        data = request.json()
        ignored = (data.get("gitIgnore") or self.state.read(commit, ".gitignore").decode()).split()
        rows = []
        for file in data["files"]:
            sample = base64.b64decode(file["sample"])
            mode = self.state.upload_mode(file["path"], file["size"], sample, attributes, self.lfs_threshold)
            row = {"path": file["path"], "uploadMode": mode, "shouldIgnore": _is_ignored(file["path"], ignored)}
            if file["path"] in commit.files:
                row["oid"] = commit.files[file["path"]].oid
            rows.append(row)
        return json_response({"files": rows, "commitOid": commit.oid})

    @route("POST", r"/{repo}\.git/info/lfs/objects/batch")
    def lfs_batch(self, request: Request, repo: str) -> Response:
        data = request.json()
        found = self._contributable(request, repo)
        rows = []
        for item in data["objects"]:
            row = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in found.uploaded:
                row["actions"] = self._upload_actions(found, item["oid"], item["size"], data["transfers"])
            rows.append(row)
        transfer = "multipart" if any("chunk_size" in str(row) for row in rows) else "basic"
        return json_response({"transfer": transfer, "objects": rows})

    def _upload_actions(self, repo: Repo, oid: str, size: int, transfers: list[str]) -> dict:
        verify = {"href": f"{self.url}/{repo.id}.git/info/lfs/verify"}
        upload = {"href": f"{self.storage_url}/upload/{repo.id}/{oid}"}
        if size > self.part_size and "multipart" in transfers:
            count = -(-size // self.part_size)
            parts = {f"{n:05d}": f"{upload['href']}/{n}" for n in range(1, count + 1)}
            complete = f"{self.url}/api/complete_multipart/{repo.id}/{oid}"
            upload = {"href": complete, "header": {"chunk_size": str(self.part_size), **parts}}
        return {"upload": upload, "verify": verify}

    @route("PUT", r"/upload/{repo}/(?P<oid>[0-9a-f]{64})(?:/(?P<part>\d+))?")
    def upload(self, request: Request, repo: str, oid: str, part: str) -> Response:
        content = request.body
        if part:
            self._parts.setdefault(oid, {})[int(part)] = content
        else:
            self._keep_object(repo, oid, content)
        return Response(200, headers={"ETag": f'"{binascii.crc32(content):08x}"'})

    @route("POST", "/api/complete_multipart/{repo}/(?P<oid>[0-9a-f]{64})")
    def complete_multipart(self, request: Request, repo: str, oid: str) -> Response:
        parts = self._parts.get(oid, {})
        if sorted(parts) != [part["partNumber"] for part in request.json()["parts"]]:
            raise HubError(400, "Some parts of the upload are missing")
        self._keep_object(repo, oid, b"".join(parts[number] for number in sorted(parts)))
        return json_response({})

    def _keep_object(self, repo: str, oid: str, content: bytes) -> None:
        found = self.state.repos.get(repo)
        if found is None or self.state.store("", content, found, lfs=True).sha256 != oid:
            raise HubError(400, "The content does not have the announced SHA-256")

    @route("POST", r"/{repo}\.git/info/lfs/verify")
    def lfs_verify(self, request: Request, repo: str) -> Response:
        data = request.json()
        found = self.state.readable(request.token, repo)
        if data["oid"] not in found.uploaded or len(self.state.objects[data["oid"]]) != data["size"]:
            raise HubError(404, "Object was not uploaded")
        return Response()

    @route("POST", "/api/models/{repo}/commit/(?P<revision>[^/]+)")
    def commit(self, request: Request, repo: str, revision: str) -> Response:
        found, ref = self._target(request, repo, revision)
        lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        parent = self._parent(found, ref, header, is_pull_request=request.flag("create_pr"))
        files = self._changed(found, dict(parent.files), [line for line in lines if line["key"] != "header"])
        answer = {"success": True, "hookOutput": ""}
        title = header["summary"]
        if request.flag("create_pr"):
            item = self._open_discussion(found, request, title, is_pull_request=True, base=ref)
            found.refs[item.ref] = parent.oid
            ref = item.ref
            answer["pullRequestUrl"] = f"{self.url}/{repo}/discussions/{item.num}"
        new = self.state.add_commit(
            found, ref, files, title, author=request.token.user, message=header.get("description", "")
        )
        answer |= {"commitOid": new.oid, "commitUrl": f"{self.url}/{repo}/commit/{new.oid}"}
        return json_response(answer)

    def _parent(self, repo: Repo, ref: str, header: dict, *, is_pull_request: bool) -> Commit:
        head = repo.resolve(ref)
        wanted = header.get("parentCommit")
        if wanted is None or head.oid.startswith(wanted):
            return head
        if is_pull_request:
            return repo.resolve(wanted)
        raise HubError(412, "A commit has happened since. Please refresh and try again.")

    def _changed(self, repo: Repo, files: dict[str, Entry], operations: Iterable[dict]) -> dict[str, Entry]:
        """The tree after all operations. Nothing is changed in the repository, so that a commit lands as a whole."""
        for operation in operations:
            value = operation["value"]
            path = value["path"]
            if operation["key"] in ("deletedFile", "deletedFolder"):
                folder = path.rstrip("/") + "/"
                gone = [name for name in files if name == path or name.startswith(folder)]
                if not gone:
                    raise HubError(404, f"{path} does not exist", "EntryNotFound")
                for name in gone:
                    del files[name]
                continue
            if path.startswith("/") or {"..", ".", "", ".git"} & set(path.split("/")):
                raise HubError(400, f"Invalid path: {path}")
            files[path] = self._large_file(repo, value) if operation["key"] == "lfsFile" else self._file(repo, value)
        return files

    def _file(self, repo: Repo, value: dict) -> Entry:
        content = base64.b64decode(value["content"])
        if len(content) > REGULAR_LIMIT:
            raise HubError(400, f"{value['path']} is too large to be committed without large file storage")
        if value["path"] == "README.md":
            errors, _ = validate_card(content.decode())
            if errors:
                raise HubError(400, "Invalid metadata in README.md: " + "; ".join(errors))
        return self.state.store(value["path"], content, repo)

    def _large_file(self, repo: Repo, value: dict) -> Entry:
        if value["oid"] not in repo.uploaded:
            raise HubError(400, f"{value['path']} points to an object that was not uploaded: {value['oid']}")
        return pointer_entry(value["oid"], len(self.state.objects[value["oid"]]))


def _is_ignored(path: str, patterns: list[str]) -> bool:
    """Whether the file or a folder that holds it has one of the names; the rest of git's syntax is not needed here."""
    return any(fnmatch.fnmatch(part, pattern) for part in path.split("/") for pattern in patterns)
