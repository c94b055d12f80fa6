"""Search of the Hub by what cards say: base model, tasks, author."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from itertools import islice
from typing import Any, Literal, get_args

from huggingface_hub import HfApi, ModelInfo

from ..hub.card_reading import read_card_info


Order = Literal["downloads", "updated", "accuracy"]

# Fields to request for each repository.
_FIELDS: list[Any] = ["author", "cardData", "downloads", "lastModified", "private", "sha", "tags"]


@dataclass(frozen=True)
class AdapterInfo:
    """
    A published adapter as its card describes it, without downloading it.

    Attributes:
        repo_id (`str`): Its repository.
        base_model (`str`, *optional*): The model it was trained on.
        tasks (`tuple[str, ...]`): Names of its tasks.
        metrics (`dict[str, dict[str, float]]`): By task, metrics by name; `accuracy` is a ratio in `[0, 1]`.
        r (`int`, *optional*), num_heads (`int`, *optional*), router (`str`, *optional*): As in [`RLoraConfig`].
        sha (`str`, *optional*): Commit hash.
        downloads (`int`, *optional*): Number in the last 30 days.
        last_modified (`datetime`, *optional*): Time of the last commit.
        digest (`str`, *optional*): Digest of its tensors.
        exports (`dict[str, str]`): Folders with plain LoRA adapters, by task.
        private (`bool`): Whether only its owners can see it.
    """

    repo_id: str
    base_model: str | None = None
    tasks: tuple[str, ...] = ()
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    r: int | None = None
    num_heads: int | None = None
    sha: str | None = None
    downloads: int | None = None
    last_modified: datetime | None = None
    router: str | None = None
    digest: str | None = None
    exports: Mapping[str, str] = field(default_factory=dict)
    private: bool = False

    @classmethod
    def from_model_info(cls, info: ModelInfo) -> AdapterInfo:
        """Create it from what the Hub returns for a repository."""
        card = read_card_info(info.card_data or {})
        return cls(
            repo_id=info.id,
            base_model=card.get("base_model"),
            tasks=tuple(card.get("tasks", ())),
            metrics=card.get("metrics", {}),
            r=card.get("r"),
            num_heads=card.get("num_heads"),
            sha=info.sha,
            downloads=info.downloads,
            last_modified=info.last_modified,
            router=card.get("router"),
            digest=card.get("digest"),
            exports=card.get("exports", {}),
            private=bool(info.private),
        )

    def mean(self, metric: str = "accuracy") -> float | None:
        """The plain mean of a metric over the tasks that have it."""
        values = [values[metric] for values in self.metrics.values() if metric in values]
        return sum(values) / len(values) if values else None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        modified = self.last_modified.isoformat() if self.last_modified else None
        return {**asdict(self), "tasks": list(self.tasks), "last_modified": modified}


def search(
    base_model: str | None = None,
    task: str | None = None,
    author: str | None = None,
    limit: int | None = None,
    *,
    sort: Order = "downloads",
    token: str | bool | None = None,
) -> list[AdapterInfo]:
    """
    Search the Hub for R-LoRA adapters.

    Args:
        base_model (`str`, *optional*): Only adapters of this base model.
        task (`str`, *optional*): Only adapters trained on a task of this name.
        author (`str`, *optional*): Only adapters of this user or organization.
        limit (`int`, *optional*): Maximum number of results. Defaults to all.
        sort (`str`, *optional*, defaults to `"downloads"`): Order of the results, highest first: `"downloads"`,
            `"updated"` (time of the last commit) or `"accuracy"` (mean over the tasks of each card).
        token (`str` or `bool`, *optional*): As in `huggingface_hub.list_models`; includes private ones.

    Returns:
        `list[AdapterInfo]`: The adapters as their cards describe them.

    Raises:
        ValueError: If `limit` is not positive, or `sort` is unknown.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1, got {limit}. Leave it out for all adapters.")
    if sort not in get_args(Order):
        raise ValueError(f"`sort` must be one of {', '.join(get_args(Order))}, got {sort!r}.")
    matches = _matching(base_model, task, author, sort, token)
    if sort == "accuracy":  # the Hub can't sort by it
        matches = iter(sorted(matches, key=lambda info: info.mean() or 0.0, reverse=True))
    return list(islice(matches, limit))


def _matching(
    base_model: str | None, task: str | None, author: str | None, sort: Order, token: str | bool | None
) -> Iterator[AdapterInfo]:
    tags = ["rlora"]
    if base_model is not None:
        tags.append(f"base_model:adapter:{base_model}")
    if task is not None:
        tags.append(f"task:{_one_line(task)}")
    order: Any = "last_modified" if sort == "updated" else "downloads"
    for info in HfApi(token=token).list_models(filter=tags, author=author, sort=order, expand=_FIELDS):
        adapter = AdapterInfo.from_model_info(info)
        # Tags are free text: a card may have a tag and describe something else.
        has_task = task is None or _one_line(task) in map(_one_line, adapter.tasks)
        if base_model in (None, adapter.base_model) and has_task:
            yield adapter


def _one_line(task: str) -> str:
    """The name of a task as tags spell it."""
    return " ".join(task.split())


def show(repo_id: str, *, revision: str | None = None, token: str | bool | None = None) -> AdapterInfo:
    """
    Read the card of one adapter.

    Args:
        repo_id (`str`): Its repository.
        revision (`str`, *optional*): Branch, tag or commit.
        token (`str` or `bool`, *optional*): As in `huggingface_hub.model_info`.

    Raises:
        ValueError: If the repository is not tagged as an R-LoRA adapter.
        HfHubHTTPError: If it does not exist or may not be read.
    """
    info = HfApi(token=token).model_info(repo_id, revision=revision)
    if "rlora" not in (info.tags or ()):
        raise ValueError(
            f"{repo_id} is not an R-LoRA adapter: its card does not have the tag `rlora`. Search for some with "
            "`zoo.search()`."
        )
    return AdapterInfo.from_model_info(info)


def split_revision(name: str) -> tuple[str, str | None]:
    """
    Split `"user/name@revision"`.

    Args:
        name (`str`): A repository, with or without a revision, or a folder, whose name may contain the character.

    Returns:
        `tuple[str, str | None]`: The repository or folder, and the revision if there is one.
    """
    if os.path.isdir(name):
        return name, None
    repo_id, _, revision = name.partition("@")
    return repo_id, revision or None
