"""
Serves tasks of R-LoRA adapters with vLLM, as plain LoRA, or exactly with the layers of `vllm_layers`.

vLLM asks its LoRA resolvers for a model that it does not know, such as `user/adapter:sst2`. This one pulls and checks
the adapter, exports the task into a cache, and answers with the folder. vLLM itself is imported when the resolver is
registered, so that the module can be imported without it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from .._version import __version__
from ..export.export import check_task
from ..export.folder import export_folder
from ..files.checks import CheckedAdapter
from ..files.layout import CONFIG_NAME, RECORD_NAME
from ..hub.pull import pull_checked
from ..reading import printable, shorten
from ..tuner.task_names import MAX_TASK_NAME, task_name
from .folder_cache import FolderCache
from .vllm_packing import TOKEN_ROUTERS, write_packed


if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver


# Below vLLM's own logger, so that messages have the level and the format of the server's.
logger = logging.getLogger("vllm.rlora_trl")

RESOLVER = "R-LoRA"
ADAPTERS, CACHE, CACHE_GB, MAX_KL, LAYERS = (
    f"RLORA_VLLM_{name}" for name in ("ADAPTERS", "CACHE", "CACHE_GB", "MAX_KL", "LAYERS")
)
# The first is that of `validate_repo_id`.
_MAX_REPO, _MAX_REVISION = 96, 200
# A repository, in which `*`, `?` and `[...]` stand for others, as in a shell.
_PATTERN = re.compile(r"[\w./*?!\[\]-]+", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*", re.ASCII)
# Requests of strangers must not occupy more of a server that others use.
_WORKERS = 4
# Seconds for which a check holds, and of how many adapters: it reads all weights, and a client may ask for any task.
_FRESH, _REMEMBERED = 60.0, 32


class RefusedError(ValueError):
    """The name of a model is not that of an adapter that may be served, or its export is too far from the adapter."""


class AdapterTask(NamedTuple):
    """A repository on the Hub, a branch, tag or commit of it, and a task of the adapter in it."""

    repo_id: str
    revision: str | None
    task: str


def parse_name(name: str) -> AdapterTask:
    """
    Parse the name of a model, `user/adapter:task` or `user/adapter@revision:task`.

    Args:
        name (`str`): The name, as a stranger may send it.

    Raises:
        RefusedError: If it has another form. A path, for example, is no name of a repository.
    """
    if len(name) > _MAX_REPO + _MAX_REVISION + MAX_TASK_NAME + 2:
        raise RefusedError(f"{shorten(name)} has {len(name)} characters, too many for `user/adapter:task`.")
    source, _, task = name.partition(":")
    repo_id, has_revision, revision = source.partition("@")
    try:
        validate_repo_id(repo_id)
        task_name(task)
    except (HFValidationError, ValueError) as error:
        raise RefusedError(f"{shorten(name)} is not of the form `user/adapter:task`: {error}") from error
    if "/" not in repo_id or not task.isprintable():
        raise RefusedError(f"{shorten(name)} is not of the form `user/adapter:task`, with a task in printable text.")
    if has_revision and not (len(revision) <= _MAX_REVISION and _REVISION.fullmatch(revision)):
        raise RefusedError(f"{shorten(name)} has a revision that is not the name of a branch, tag or commit.")
    return AdapterTask(repo_id, revision or None, task)


@dataclass(frozen=True)
class Settings:
    """
    What may be served, and how.

    Args:
        allowed (`tuple[str, ...]`): Repositories, or patterns such as `"org/*"`; `"*"` allows all.
        cache (`Path`): Folder of the exports.
        cache_bytes (`int`): The most bytes of exports.
        max_kl (`float`, *optional*): The largest KL(adapter || export), in nats per token, that is served. Without it
            every export is.
        layers (`bool`, *optional*, defaults to `False`): The server has the layers of `vllm_layers`, so that routers
            that decide per token are served exactly, in the packed form.
    """

    allowed: tuple[str, ...]
    cache: Path
    cache_bytes: int
    max_kl: float | None = None
    layers: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """
        The settings in environment variables; see docs/integrations/vllm.md.

        Raises:
            ValueError: If a value can't be used. The message names the variable.
        """
        allowed = tuple(filter(None, map(str.strip, environment.get(ADAPTERS, "").split(","))))
        if not allowed:
            raise ValueError(
                f"`{ADAPTERS}` must name the adapters that may be served, got {environment.get(ADAPTERS)!r}. For "
                'example "user/adapter,org/*", or "*" for every adapter on the Hub.'
            )
        for name in allowed:
            if not _PATTERN.fullmatch(name) or not set("/*?[") & set(name):
                raise ValueError(
                    f"`{ADAPTERS}` must have names of repositories, separated by commas, got {shorten(name)}. For "
                    "example user/adapter,org/* without quotes, addresses and tasks, which requests name."
                )
        gigabytes = _number(environment, CACHE_GB, 20.0)
        assert gigabytes is not None
        max_kl = _number(environment, MAX_KL, None)
        return cls(allowed, _cache_folder(environment), int(gigabytes * 1e9), max_kl, layers_wanted(environment))

    def check_allowed(self, repo_id: str) -> None:
        """Refuse a repository that is not allowed."""
        if not any(fnmatchcase(repo_id, pattern) for pattern in self.allowed):
            raise RefusedError(f"{shorten(repo_id)} is not among the adapters in `{ADAPTERS}`. Add it to serve it.")


def layers_wanted(environment: Mapping[str, str]) -> bool:
    """
    Whether `RLORA_VLLM_LAYERS` turns the experimental layers on.

    Raises:
        ValueError: If it is neither 0 nor 1.
    """
    value = environment.get(LAYERS, "").strip()
    if value not in ("", "0", "1"):
        raise ValueError(f"`{LAYERS}` must be 0 or 1, got {value!r}. Leave it unset for 0.")
    return value == "1"


def _cache_folder(environment: Mapping[str, str]) -> Path:
    """The folder of the exports, which other processes may look for from another working directory."""
    text = environment.get(CACHE, "").strip() or os.path.join(constants.HF_HOME, "rlora_trl", "vllm")
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"`{CACHE}` is {shorten(text)}: {error}. Set it to a folder that can be written.") from error


def _number(environment: Mapping[str, str], name: str, default: float | None) -> float | None:
    text = environment.get(name, "").strip()
    try:
        value = float(text) if text else default
    except ValueError:
        value = math.nan
    if value is not None and not (math.isfinite(value) and value >= 0):
        raise ValueError(f"`{name}` must be a number of at least 0, got {text!r}. Leave it unset for {default}.")
    return value


class TaskExports:
    """
    Exports of tasks of adapters on the Hub, each made once for all threads and processes that share a cache.

    Args:
        settings ([`Settings`]): What may be served.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.cache = FolderCache(settings.cache, settings.cache_bytes)
        # Adapters, and until when they count as checked.
        self._checked: dict[tuple[str, str | None, str], tuple[CheckedAdapter, float]] = {}
        self._mutex = threading.Lock()

    def find(self, name: str, base_model: str) -> Path:
        """
        The plain LoRA adapter for the name of a model.

        Args:
            name (`str`): `user/adapter:task` or `user/adapter@revision:task`.
            base_model (`str`): Name or folder of the base model that is being served.

        Returns:
            `Path`: A folder, which stays while this process runs.

        Raises:
            RefusedError: If the name, the repository or the fidelity of the export is refused.
            ValueError: If the adapter is damaged, belongs to another base model, or lacks the task.
            OSError, HTTPError: If it can't be downloaded, or the disk or the cache is full.
        """
        repo_id, revision, task = parse_name(name)
        self.settings.check_allowed(repo_id)
        if os.path.isdir(repo_id):
            raise RefusedError(
                f"{shorten(repo_id)} is also a folder in the working directory, and only adapters on the Hub are "
                "served. Start the server in another directory."
            )
        checked = self._pull(repo_id, revision, base_model)
        check_task(checked.config, task)
        if self.settings.layers and _decides_per_token(checked):
            return self.cache.get(_key(checked, None, packed=True), lambda folder: self._pack(name, checked, folder))
        self._check_fidelity(name, checked, task)

        def export(folder: Path) -> None:
            report = export_folder(checked, folder, task=task)
            logger.info(
                f"Exported {shorten(name)} with rank {report.rank}, which `--max-lora-rank` must be at least. Its "
                f"head weights are {report.mixture}."
            )

        # Equal weights for all tasks are one export.
        return self.cache.get(_key(checked, None if checked.config.router == "uniform" else task), export)

    def _pack(self, name: str, checked: CheckedAdapter, folder: Path) -> None:
        rank = write_packed(checked, folder)
        logger.info(
            f"Packed {shorten(name)}, which is served exactly, for all its tasks. `--max-lora-rank` must be at least "
            f"{rank}."
        )

    def _pull(self, repo_id: str, revision: str | None, base_model: str) -> CheckedAdapter:
        """Pull and check an adapter, unless this was done a short time ago."""
        key = (repo_id, revision, base_model)
        with self.cache.lock(f"{repo_id}@{revision}"):
            with self._mutex:
                checked, until = self._checked.get(key, (None, 0.0))
            if checked is None or time.monotonic() >= until:
                checked = pull_checked(repo_id, revision, base_model=base_model)
                with self._mutex:
                    self._checked.pop(key, None)
                    self._checked[key] = checked, time.monotonic() + _FRESH
                    while len(self._checked) > _REMEMBERED:
                        del self._checked[next(iter(self._checked))]
        return checked

    def _check_fidelity(self, name: str, checked: CheckedAdapter, task: str) -> None:
        """Log how far an export that is not exact is from the adapter, as measured by who published it; or refuse."""
        if not _decides_per_token(checked):
            return
        kl = recorded_kl(checked, task)
        if kl is None:
            text = "is unknown, as its record has none"
        else:
            text = f"is {kl:.4g} nats per token, by its record"
        kind = f"{shorten(name)} has `router={checked.config.router!r}`, so its export is an approximation, whose"

        most = self.settings.max_kl
        if most is not None and (kl is None or kl > most):
            raise RefusedError(
                f"{kind} KL(adapter || export) {text}; `{MAX_KL}` is {most:g}. Serve an adapter with "
                '`router="task"`, whose exports are exact, raise the limit, or have it published with '
                "`push_adapter(..., exports=[task], export_data={task: rows})`, which measures the KL."
            )
        logger.warning(f"{kind} KL(adapter || export) {text}.")


def recorded_kl(checked: CheckedAdapter, task: str) -> float | None:
    """
    The KL(adapter || export) of a task, in nats per token, that was measured when the adapter was published.

    Args:
        checked ([`CheckedAdapter`]): The adapter.
        task (`str`): The task.
    """
    exports: list[dict[str, Any]] = checked.record.exports if checked.record is not None else []
    measured = [export.get("kl") for export in exports if export.get("task") == task]
    return next((float(kl) for kl in measured if kl is not None and math.isfinite(kl) and kl >= 0), None)


def _decides_per_token(checked: CheckedAdapter) -> bool:
    """Whether an export as plain LoRA is an approximation."""
    return checked.config.router in TOKEN_ROUTERS and checked.config.num_heads > 1


def _key(checked: CheckedAdapter, task: str | None, *, packed: bool = False) -> str:
    """Name of an export in the cache: a hash of all that it is made from, and of the version that makes it."""
    parts = [__version__, checked.sha256, task, *(["packed"] if packed else [])]
    for name in (CONFIG_NAME, RECORD_NAME):
        path = checked.folder / name
        parts.append(hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def resolver_class() -> type[LoRAResolver]:
    """The class of the resolver, a subclass of vLLM's."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver

    class RLoraResolver(LoRAResolver):
        """
        Resolves names such as `user/adapter:sst2` to the plain LoRA adapter of a task.

        Args:
            settings ([`Settings`]): What may be served.
        """

        def __init__(self, settings: Settings) -> None:
            self.exports = TaskExports(settings)
            self._threads = ThreadPoolExecutor(_WORKERS, thread_name_prefix="rlora")

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            """
            The adapter of a name, in vLLM's terms.

            Args:
                base_model_name (`str`): Name or folder of the base model that vLLM serves.
                lora_name (`str`): Name of the model that a client has asked for.

            Returns:
                `LoRARequest`, or `None` for names of other models and adapters that can't be served: vLLM answers that
                the model does not exist, and the log says why.
            """
            if ":" not in lora_name:
                return None
            find = self.exports.find
            try:
                path = await asyncio.get_running_loop().run_in_executor(
                    self._threads, find, lora_name, base_model_name
                )
            except (ValueError, OSError, HTTPError, HfHubHTTPError) as error:
                reason = printable(str(error))
                logger.error(f"{shorten(lora_name)} is not served. {type(error).__name__}: {reason[:2000]}")
                return None
            return LoRARequest(lora_name=lora_name, lora_int_id=_adapter_id(lora_name), lora_path=str(path))

    return RLoraResolver


def _adapter_id(name: str) -> int:
    """A positive number for a name, the same in all processes; vLLM 0.33 replaces it by one of its own."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:4], "big") % (2**31 - 1) + 1


def register_resolver() -> None:
    """
    Register the resolver with vLLM, with the settings in the environment. Calling it again changes nothing.

    Raises:
        ValueError: If a setting can't be used.
    """
    from vllm.lora.resolver import LoRAResolverRegistry

    if RESOLVER in LoRAResolverRegistry.get_supported_resolvers():
        return
    settings = Settings.from_environment(os.environ)
    try:
        resolver = resolver_class()(settings)
    except OSError as error:
        raise ValueError(
            f"The cache of exports can't be written: {error}. Set `{CACHE}` to a folder that can be written."
        ) from error
    LoRAResolverRegistry.register_resolver(RESOLVER, resolver)
    logger.info(f"R-LoRA adapters are served on request: {', '.join(settings.allowed)}.")
