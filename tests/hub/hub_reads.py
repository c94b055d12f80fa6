"""Routes that only read: contents of files, listings of files and of models."""

import re
from typing import Any
from urllib.parse import parse_qs

from hub_api import HubRoutes, Request, Response, json_response, route
from hub_cards import base_models, card_metadata, computed_tags
from hub_state import Commit, Entry, HubError, Repo, folders_of, tree_id


LIST_FIELDS = "_id id modelId likes private downloads tags pipeline_tag library_name createdAt".split()
FULL_FIELDS = "author sha lastModified gated disabled siblings".split()
# Fields of the real Hub that this one leaves out, but that may be asked for.
OTHER_FIELDS = "config evalResults gguf inference inferenceProviderMapping resourceGroup safetensors spaces".split()
SORT_KEYS = {"downloads", "likes", "lastModified", "createdAt", "trendingScore"}


class HubReads(HubRoutes):
    """A private repository does not exist for strangers, and the files of a gated one are closed to them."""

    # Downloads

    @route("GET", "/{repo}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, request: Request, repo: str, revision: str, path: str) -> Response:
        found = self.state.readable(request.token, repo)
        self.state.check_gate(request.token, found)
        commit = found.resolve(revision)
        headers = {"X-Repo-Commit": commit.oid}
        entry = commit.files.get(path)
        if entry is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        if path == "adapter_config.json" and request.method == "GET":
            found.downloads += 1
        headers["ETag"] = f'"{entry.oid}"'
        if entry.sha256 is None:
            return self._ranged(request, self.state.objects[entry.oid], headers)
        headers |= {"X-Linked-Size": str(entry.size), "X-Linked-ETag": f'"{entry.sha256}"'}
        headers["Location"] = f"{self.storage_url}/cdn/{repo}/{entry.sha256}"
        return Response(302, b"Found", headers)

    @route("GET", "/cdn/{repo}/(?P<oid>[0-9a-f]{64})")
    def cdn(self, request: Request, repo: str, oid: str) -> Response:
        return self._ranged(request, self.state.objects[oid], {"ETag": f'"{oid}"'})

    def _ranged(self, request: Request, content: bytes, headers: dict[str, str]) -> Response:
        """The content, or the part of it that a `Range` header asks for."""
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if match is None:
            return Response(200, content, headers)
        start, end = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
        if start >= len(content):
            raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        return Response(206, content[start : end + 1], headers)

    # Listings of files

    @route("GET", "/api/models/{repo}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?")
    def tree(self, request: Request, repo: str, revision: str, path: str) -> Response:
        found = self.state.readable(request.token, repo)
        commit = found.resolve(revision)
        base = f"{path.rstrip('/')}/" if path else ""
        names = [name for name in commit.files if name.startswith(base)]
        if path and not names:
            raise HubError(404, f'{path} does not exist on "{revision}"', "EntryNotFound")
        names += [folder for folder in folders_of(names) if folder.startswith(base)]
        if not request.flag("recursive"):
            names = [name for name in names if "/" not in name.removeprefix(base)]
        expand = request.flag("expand")
        rows = [self._path_info(found, commit, name, expand=expand) for name in sorted(names)]
        return self._page(request, rows)

    @route("POST", "/api/models/{repo}/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, request: Request, repo: str, revision: str) -> Response:
        found = self.state.readable(request.token, repo)
        commit = found.resolve(revision)
        form = parse_qs(request.body.decode())
        known = {*commit.files, *folders_of(commit.files)}
        expand = form.get("expand", [""])[0].lower() == "true"
        paths = [path.rstrip("/") for path in form.get("paths", [])]
        return json_response([self._path_info(found, commit, path, expand=expand) for path in paths if path in known])

    def _path_info(self, repo: Repo, commit: Commit, path: str, *, expand: bool) -> dict:
        entry = commit.files.get(path)
        if entry is None:
            below = {name: item for name, item in commit.files.items() if name.startswith(f"{path}/")}
            info = {"type": "directory", "oid": tree_id(below), "size": 0, "path": path}
        else:
            info = {"type": "file", "oid": entry.blob_id, "size": entry.size, "path": path}
        if entry is not None and entry.sha256 is not None:
            info["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
        if expand:
            last = _last_change(repo, commit, path)
            info["lastCommit"] = {"id": last.oid, "title": last.title, "date": last.date}
        return info

    # Models

    @route("GET", "/api/models")
    def list_models(self, request: Request) -> Response:
        query = request.query
        infos = [
            self._model_info(repo, repo.resolve("main"))
            for repo in self.state.repos.values()
            if self.state.can_read(request.token, repo)
        ]
        wanted = {tag for value in query.get("filter", []) for tag in value.split(",")}
        infos = [info for info in infos if wanted <= set(info["tags"])]
        if author := query.get("author", [None])[0]:
            infos = [info for info in infos if info["author"] == author]
        if search := query.get("search", [""])[0].lower():
            infos = [info for info in infos if search in info["id"].lower()]
        sort = query.get("sort", ["trendingScore"])[0]
        if sort not in SORT_KEYS:
            raise HubError(400, f'"sort" must be one of [{", ".join(sorted(SORT_KEYS))}]')
        infos.sort(key=lambda info: (info[sort], info["createdAt"]), reverse=True)
        names = {*LIST_FIELDS, *(FULL_FIELDS if request.flag("full") else ())}
        names |= {"cardData"} if request.flag("cardData") else set()
        return self._page(request, [self._select(request, info, names) for info in infos])

    @route("GET", "/api/models/{repo}/revision/(?P<revision>[^/]+)")
    @route("GET", "/api/models/{repo}")
    def model_info(self, request: Request, repo: str, revision: str = "main") -> Response:
        found = self.state.readable(request.token, repo)
        info = self._model_info(found, found.resolve(revision), blobs=request.flag("blobs"))
        return json_response(self._select(request, info, set(info)))

    def _select(self, request: Request, info: dict, names: set[str]) -> dict:
        """The fields `names`, or those that `expand` asks for."""
        expand = request.query.get("expand", []) + request.query.get("expand[]", [])
        if expand:
            known = {*info, *OTHER_FIELDS}
            if unknown := set(expand) - known:
                raise HubError(400, f'"expand" must be one of {sorted(known)}, got {sorted(unknown)}')
            names = {"_id", "id", *expand}
        return {name: value for name, value in info.items() if name in names and value is not None}

    def _model_info(self, repo: Repo, commit: Commit, *, blobs: bool = False) -> dict:
        text = self.state.read(commit, "README.md").decode(errors="replace")
        card = card_metadata(text)
        relation, bases = base_models(card, commit.files)
        return {
            "_id": repo.id,
            "id": repo.id,
            "modelId": repo.id,
            "author": repo.owner,
            "sha": commit.oid,
            "lastModified": commit.date,
            "createdAt": repo.created_at,
            "private": repo.private,
            "gated": repo.gated and "auto",
            "disabled": False,
            "downloads": repo.downloads,
            "downloadsAllTime": repo.downloads,
            "likes": repo.likes,
            "trendingScore": 0,
            "library_name": card.get("library_name"),
            "pipeline_tag": card.get("pipeline_tag"),
            "tags": computed_tags(card, commit.files, text),
            "cardData": card or None,
            "model-index": card.get("model-index"),
            "baseModels": {"relation": relation, "models": [{"_id": name, "id": name} for name in bases]}
            if bases
            else None,
            "siblings": [_sibling(path, commit.files[path], blobs=blobs) for path in sorted(commit.files)],
            "usedStorage": sum(entry.size for entry in commit.files.values()),
        }


def _last_change(repo: Repo, commit: Commit, path: str) -> Commit:
    """The newest commit, from `commit` back, that changed a file or anything in a folder."""

    def content(of: Commit) -> dict[str, str]:
        files = of.files.items()
        return {name: entry.oid for name, entry in files if name == path or name.startswith(f"{path}/")}

    while commit.parent is not None and content(repo.commits[commit.parent]) == content(commit):
        commit = repo.commits[commit.parent]
    return commit


def _sibling(path: str, entry: Entry, *, blobs: bool) -> dict:
    row: dict[str, Any] = {"rfilename": path}
    if blobs:
        row |= {"size": entry.size, "blobId": entry.blob_id}
    if blobs and entry.sha256 is not None:
        row["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
    return row
