"""Search of the Hub by what cards say: base model, tasks, author."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from itertools import islice
from typing import Any, Literal, get_args

from huggingface_hub import ModelInfo
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import parse_datetime, validate_repo_id
from transformers.utils import logging

from ..hub.card_reading import read_card_info
from ..reading import AdapterCheckError, first_few, shorten
from .listing import get_entry, list_entries, name_of, read_entry


logger = logging.get_logger(__name__)

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
        """Create it from a `ModelInfo` of huggingface_hub."""
        fields = {name: getattr(info, name) for name in ("sha", "downloads", "last_modified", "private")}
        return cls._create(info.id, info.card_data or {}, **fields)

    @classmethod
    def from_json(cls, data: bytes) -> AdapterInfo:
        """
        Create it from what the Hub answers about a repository.

        Args:
            data (`bytes`): The JSON.

        Raises:
            AdapterCheckError: If a value has an unexpected type or form, or huggingface_hub could not hold the card.
        """
        entry = read_entry(data)
        modified = entry.get("lastModified")
        try:
            last_modified = parse_datetime(modified) if modified else None
        except ValueError as error:
            raise AdapterCheckError(f"`lastModified` must be a time, got {shorten(modified)}.") from error
        fields = {name: entry.get(name) for name in ("sha", "downloads", "private")}
        return cls._create(entry["id"], entry.get("cardData") or {}, last_modified=last_modified, **fields)

    @classmethod
    def _create(cls, repo_id: str, metadata: Any, *, private: bool | None, **fields: Any) -> AdapterInfo:
        card = read_card_info(metadata)
        return cls(
            repo_id,
            base_model=card.get("base_model"),
            tasks=tuple(card["tasks"]),
            metrics=card["metrics"],
            r=card.get("r"),
            num_heads=card.get("num_heads"),
            router=card.get("router"),
            digest=card.get("digest"),
            exports=card["exports"],
            private=bool(private),
            **fields,
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

    Adapters whose cards or entries on the Hub can't be read are skipped, and counted in a warning.

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
        AdapterCheckError: If the Hub does not answer with a list.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1, got {limit}. Leave it out for all adapters.")
    if sort not in get_args(Order):
        raise ValueError(f"`sort` must be one of {', '.join(get_args(Order))}, got {sort!r}.")

    listed = _Listed(_query(base_model, task, author, sort), token)
    matches: Iterable[AdapterInfo] = (info for info in listed if _matches(info, base_model, task))
    if sort == "accuracy":  # the Hub can't sort by it
        matches = sorted(matches, key=lambda info: info.mean() or 0.0, reverse=True)
    results = list(islice(matches, limit))
    listed.warn()
    return results


def _query(base_model: str | None, task: str | None, author: str | None, sort: Order) -> dict[str, Any]:
    """Parameters of the Hub's list of models."""
    tags = ["rlora"]
    if base_model is not None:
        tags.append(f"base_model:adapter:{base_model}")
    if task is not None:
        tags.append(f"task:{_one_line(task)}")
    by_author = {"author": author} if author else {}
    order = "lastModified" if sort == "updated" else "downloads"
    return {"filter": tags, **by_author, "sort": order, "expand": _FIELDS}


class _Listed:
    """The adapters in a list of the Hub, without those that can't be read, which are counted."""

    def __init__(self, query: Mapping[str, Any], token: str | bool | None) -> None:
        self.query, self.token = query, token
        self.count, self.skipped = 0, list[str]()

    def __iter__(self) -> Iterator[AdapterInfo]:
        for data in list_entries(self.query, self.token):
            self.count += 1
            try:
                info = AdapterInfo.from_json(data)
            except AdapterCheckError as error:
                self.skipped.append(name_of(data))
                logger.debug(f"{self.skipped[-1]} is skipped: {error}")
                continue
            yield info

    def warn(self) -> None:
        if self.skipped:
            were = "adapter was" if self.count == 1 else "adapters were"
            logger.warning(
                f"{len(self.skipped)} of {self.count} listed {were} skipped because their cards can't be read: "
                f"{first_few(self.skipped, 2)}."
            )


def _matches(info: AdapterInfo, base_model: str | None, task: str | None) -> bool:
    # Tags are free text: a card may have a tag and describe something else.
    has_task = task is None or _one_line(task) in map(_one_line, info.tasks)
    return base_model in (None, info.base_model) and has_task


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
        ValueError: If this is not the name of a repository, or the repository is not tagged as an R-LoRA adapter.
        AdapterCheckError: If its card can't be read.
        HfHubHTTPError: If it does not exist or may not be read.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        kind = "a folder, and not" if os.path.isdir(repo_id) else "not"
        raise ValueError(
            f"{shorten(repo_id)} is {kind} the name of a repository. The zoo reads the cards of published adapters: "
            "name one as user/name or user/name@revision, or push the folder with `push_adapter`."
        ) from error

    data = get_entry(repo_id, revision, token)
    try:
        info, tags = AdapterInfo.from_json(data), read_entry(data).get("tags")
    except AdapterCheckError as error:
        raise AdapterCheckError(
            f"{repo_id} can't be shown, as its card or its entry on the Hub can't be read: {error} Use another "
            "revision, or ask its author to correct the card."
        ) from error
    if "rlora" not in (tags or ()):
        raise ValueError(
            f"{repo_id} is not an R-LoRA adapter: its card does not have the tag `rlora`. Search for some with "
            "`zoo.search()`."
        )
    return info


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
