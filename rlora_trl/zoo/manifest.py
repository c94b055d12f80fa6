"""A curated set of adapters in a file, each pinned to a commit and to the digest of its tensors."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi

from ..files.checks import AdapterCheckError
from ..files.names import hub_name
from ..hub.pull import pull_checked
from .names import adapter_name, is_adapter_name, split_revision


MANIFEST_NAME = "zoo.yaml"
_FORMAT = 1
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class PinnedAdapter:
    """
    One adapter of a manifest.

    Attributes:
        repo_id (`str`): Its repository.
        revision (`str`): Its commit, 40 hexadecimal digits: branches move.
        digest (`str`, *optional*): Digest of its tensors, `"sha256:..."`.
        name (`str`): What to call it on a model: letters, digits, `_` and `-`. Defaults to the repository's name,
            with `_` for other characters.
    """

    repo_id: str
    revision: str
    digest: str | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.revision, str) or not _COMMIT.fullmatch(self.revision):
            raise ValueError(
                f"`revision` of {self.repo_id} must be a commit of 40 hexadecimal digits, got {self.revision!r}. "
                "Branches and tags can move; `Manifest.pin` looks their commits up."
            )
        if self.digest is not None and not _DIGEST.fullmatch(str(self.digest)):
            raise ValueError(f"`digest` of {self.repo_id} must be `sha256:` and 64 digits, got {self.digest!r}.")
        if not self.name:
            object.__setattr__(self, "name", adapter_name(self.repo_id))
        if not is_adapter_name(self.name):
            raise ValueError(
                f"`name` of {self.repo_id} must consist of letters, digits, `_` and `-`, got {self.name!r}. Choose "
                "another: adapters of a model are called by it."
            )


@dataclass(frozen=True)
class Manifest:
    """
    A set of adapters, read from and written to `zoo.yaml`:

        format: 1
        base_model: Qwen/Qwen2.5-0.5B
        adapters:
          - repo_id: user/adapter
            revision: 5d1f0b1e6a0f4f3e9a3ad7b1bb3a5b0a2a3c4d5e
            digest: sha256:...

    Attributes:
        adapters (`tuple[PinnedAdapter, ...]`): The set.
        base_model (`str`, *optional*): The base model of all of them.

    Raises:
        ValueError: If two adapters have one name.
    """

    adapters: tuple[PinnedAdapter, ...] = field(default_factory=tuple)
    base_model: str | None = None

    def __post_init__(self) -> None:
        names = [adapter.name for adapter in self.adapters]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"The manifest has more than one adapter named {', '.join(twice)}. Give each a `name`.")

    @classmethod
    def load(cls, path: str | os.PathLike = MANIFEST_NAME) -> Manifest:
        """
        Read a manifest.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is not one; the message names the entry.
        """
        path = Path(path)
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is no YAML: {error}") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"{path} must be a mapping with `format: {_FORMAT}`, found {found!r}.")
        entries = content.get("adapters")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"`adapters` in {path} must be a list of mappings with `repo_id` and `revision`.")
        base_model = content.get("base_model")
        if base_model is not None and not isinstance(base_model, str):
            raise ValueError(f"`base_model` in {path} must be a name, got {base_model!r}.")
        adapters = tuple(_pinned(entry, path) for entry in entries)
        try:
            return cls(adapters, base_model)
        except ValueError as error:
            raise ValueError(f"{path} can't be used: {error}") from error

    @classmethod
    def pin(
        cls, repo_ids: Iterable[str], *, base_model: str | None = None, token: str | bool | None = None
    ) -> Manifest:
        """
        A manifest of what repositories have now: each is pulled, checked and pinned.

        Args:
            repo_ids (`Iterable[str]`): Repositories; `"user/name@revision"` names a revision.
            base_model (`str`, *optional*): The base model that all must have. Defaults to the one that they share, if
                they do.
            token (`str` or `bool`, *optional*): As in [`pull_adapter`].

        Raises:
            AdapterCheckError: If one is damaged, hostile, or of another base model than `base_model`.
            HfHubHTTPError: If a repository or revision is not there, or may not be read.
        """
        pinned: dict[str, PinnedAdapter] = {}
        bases = set()
        for place in repo_ids:
            repo_id, revision = split_revision(place)
            info = HfApi(token=token).model_info(repo_id, revision=revision)
            assert info.sha is not None  # only listings leave it out
            checked = pull_checked(info.id, revision=info.sha, token=token, base_model=base_model)
            name = adapter_name(info.id, pinned)
            pinned[name] = PinnedAdapter(info.id, info.sha, checked.digest, name)
            bases.add(hub_name(checked.base_model))
        if base_model is None and len(bases) == 1:
            base_model = bases.pop()
        return cls(tuple(pinned.values()), base_model)

    def save(self, path: str | os.PathLike = MANIFEST_NAME) -> Path:
        """Write the manifest."""
        content: dict[str, Any] = {"format": _FORMAT}
        if self.base_model is not None:
            content["base_model"] = self.base_model
        content["adapters"] = [
            {
                "repo_id": adapter.repo_id,
                "revision": adapter.revision,
                **({"digest": adapter.digest} if adapter.digest else {}),
                **({"name": adapter.name} if adapter.name != adapter_name(adapter.repo_id) else {}),
            }
            for adapter in self.adapters
        ]
        path = Path(path)
        path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
        return path

    def install(
        self,
        *,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
    ) -> dict[str, str]:
        """
        Pull and check all adapters, each at its commit.

        Args:
            token (`str` or `bool`, *optional*), cache_dir (`str`, *optional*), local_files_only (`bool`, *optional*):
                As in [`pull_adapter`].

        Returns:
            `dict[str, str]`: Folders by name, as [`zoo.load`] takes them.

        Raises:
            AdapterCheckError: If one is damaged, hostile, of another base model, or not the one that was pinned.
        """
        folders = {}
        for adapter in self.adapters:
            checked = pull_checked(
                adapter.repo_id,
                revision=adapter.revision,
                token=token,
                cache_dir=cache_dir,
                base_model=self.base_model,
                local_files_only=local_files_only,
            )
            if adapter.digest is not None and checked.digest != adapter.digest:
                raise AdapterCheckError(
                    f"{adapter.repo_id} at {adapter.revision} has tensors with the digest {checked.digest}, the "
                    f"manifest says {adapter.digest}. Do not use it before you know why."
                )
            folders[adapter.name] = str(checked.folder)
        return folders


def _pinned(entry: dict[str, Any], path: Path) -> PinnedAdapter:
    unknown = set(entry) - {"repo_id", "revision", "digest", "name"}
    repo_id = entry.get("repo_id")
    if unknown or not isinstance(repo_id, str):
        raise ValueError(
            f"An adapter in {path} must have `repo_id` and `revision`, and may have `digest` and `name`; got "
            f"{entry!r}."
        )
    return PinnedAdapter(repo_id, entry.get("revision", ""), entry.get("digest"), entry.get("name") or "")
