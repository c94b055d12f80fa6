"""What training recorded of an adapter: tasks, scores, settings, versions. It lies beside the adapter as JSON.

PEFT's configuration holds what defines the adapter's function. This file holds what is known about it besides; it may
be missing, and nothing in it changes what the adapter computes.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .._version import __version__
from .layout import RECORD_NAME
from .reading import read_json, shorten


if TYPE_CHECKING:
    from ..analysis.measuring import HeadWeights
    from ..tuner.config import RLoraConfig


RECORD_FORMAT = 1
BASE_ACCURACY = "base_accuracy"  # the metric of a task that tells the accuracy of the base model by itself
Scalar: TypeAlias = str | int | float | bool

# Packages whose versions matter to whoever wants to repeat a training run, by the names that pip knows.
_PACKAGES = ("peft", "trl", "transformers", "torch", "datasets", "accelerate", "bitsandbytes", "deepspeed")

# Fields of training arguments that are recorded. A list of what is allowed, not of what is not: arguments hold paths,
# tokens and names of machines too, and new ones are added in each version.
_HYPERPARAMETERS = (
    *("learning_rate", "router_learning_rate", "loraplus_lr_ratio", "train_a", "lr_scheduler_type"),
    *("warmup_steps", "num_train_epochs", "max_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "max_length", "packing"),
    *("packing_strategy", "padding_free", "completion_only_loss", "assistant_only_loss", "loss_type"),
    *("optim", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm", "label_smoothing_factor"),
    *("neftune_noise_alpha", "bf16", "fp16", "tf32", "seed", "data_seed"),
    *("mixing", "mixing_temperature", "mixing_cap", "mixing_unit"),
    *("balance_loss", "balance_coef", "balance_scope"),
)
# Fields that say nothing unless another one has, or has not, a value.
_ONLY_WITH = {"mixing_temperature": ("mixing", "temperature")}
_NOT_WITH = {
    "balance_coef": ("balance_loss", "none"),
    "balance_scope": ("balance_loss", "none"),
    "mixing_unit": ("mixing", "proportional"),
    "max_steps": ("max_steps", -1),
}
# Neither a path nor a name with a host in it.
_PLAIN_TEXT = re.compile(r"[\w .,+!-]{1,64}")


@dataclass
class TaskRecord:
    """
    One task of an adapter.

    Args:
        name (`str`): Its name, as in `RLoraConfig.tasks`.
        cluster (`str`, *optional*): Kind of task, for example `"sentiment"`.
        dataset (`str`, *optional*): Name on the Hub of the data set.
        license (`str`, *optional*): License of the data.
        rows (`int`, *optional*), tokens (`int`, *optional*): What training has seen of it, repetitions counted.
        share (`float`, *optional*): Share in the mixture, a ratio in `[0, 1]`.
        metrics (`dict[str, float]`, *optional*): Values by name: `"accuracy"`, a ratio in `[0, 1]`;
            `"base_accuracy"`, that of the base model without the adapter; `"loss"`; others.
        metric_rows (`int`, *optional*): Rows that the metrics were measured on.
    """

    name: str
    cluster: str | None = None
    dataset: str | None = None
    license: str | None = None
    rows: int | None = None
    tokens: int | None = None
    share: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    metric_rows: int | None = None

    def merged_with(self, older: TaskRecord) -> TaskRecord:
        """
        The record of a task that was trained before, and is again; its share stays to be computed.

        Rows and tokens are added. What was measured before is kept while the task is not trained again; the score of
        the base model is kept in any case.

        Args:
            older ([`TaskRecord`]): What was recorded before.
        """
        metrics, metric_rows = dict(self.metrics), self.metric_rows
        if not metrics and not self.rows:
            metrics, metric_rows = dict(older.metrics), older.metric_rows
        elif BASE_ACCURACY in older.metrics:
            metrics.setdefault(BASE_ACCURACY, older.metrics[BASE_ACCURACY])
        return replace(
            self,
            cluster=self.cluster or older.cluster,
            dataset=self.dataset or older.dataset,
            license=self.license or older.license,
            rows=_sum_of_known(older.rows, self.rows),
            tokens=_sum_of_known(older.tokens, self.tokens),
            share=older.share if self.share is None else self.share,
            metrics=metrics,
            metric_rows=metric_rows,
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it: what is not known is left out, metrics that are not finite too."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values["metrics"] = {name: float(value) for name, value in self.metrics.items() if math.isfinite(value)}
        return _without_empty(values)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "task") -> TaskRecord:
        """
        The opposite of [`TaskRecord.to_dict`]. Unknown keys are ignored.

        Raises:
            ValueError: If a value has another type or range; the message names the key.
        """
        read = _Reader(data, where)
        name = read.text("name")
        if not name:
            raise ValueError(f"`{where}.name` is missing. Each task needs a name.")
        metrics = read.mapping("metrics", "numbers", _is_number)
        return cls(
            name=name,
            cluster=read.text("cluster"),
            dataset=read.text("dataset"),
            license=read.text("license"),
            rows=read.count("rows"),
            tokens=read.count("tokens"),
            share=read.number("share", upper=1.0),
            metrics={key: float(value) for key, value in metrics.items()},
            metric_rows=read.count("metric_rows"),
        )


@dataclass
class AdapterRecord:
    """
    What training recorded of an adapter. All of it may be unknown.

    Args:
        base_model (`str`, *optional*), base_model_revision (`str`, *optional*): Name on the Hub, and commit.
        base_model_license (`str`, *optional*): Its license.
        base_dtype (`str`, *optional*): In which dtype it ran in training, for example `"bfloat16"`.
        quantization (`str`, *optional*): How the base was quantized in training, for example `"bitsandbytes nf4"`.
        tasks (`list[TaskRecord]`, *optional*): The tasks.
        hyperparameters (`dict`, *optional*): Numbers and short texts, see [`select_hyperparameters`].
        versions (`dict[str, str]`, *optional*): Versions by package, see [`collect_versions`].
        mixtures ([`HeadWeights`], *optional*): Mean weights of the heads by task and layer.
        balance_loss (`str`, *optional*), balance_coef (`float`, *optional*): Balance loss and its coefficient.
        exports (`list[dict]`, *optional*): Plain-LoRA exports: `task`, `path`, `rank`, and where they were measured
            `kl`, `accuracy` and `accuracy_dynamic`, and the `rows` measured on.
    """

    base_model: str | None = None
    base_model_revision: str | None = None
    base_model_license: str | None = None
    base_dtype: str | None = None
    quantization: str | None = None
    tasks: list[TaskRecord] = field(default_factory=list)
    hyperparameters: dict[str, Scalar] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    mixtures: HeadWeights | None = None
    balance_loss: str | None = None
    balance_coef: float | None = None
    exports: list[dict[str, Any]] = field(default_factory=list)

    def task(self, name: str) -> TaskRecord:
        """
        The record of a task.

        Raises:
            ValueError: If there is none of that name.
        """
        for task in self.tasks:
            if task.name == name:
                return task
        listed = ", ".join(repr(task.name) for task in self.tasks) or "none"
        raise ValueError(f"The record has no task {name!r}; it has {listed}. Use one of these names.")

    def merged_with(self, older: AdapterRecord) -> AdapterRecord:
        """
        The record of an adapter that was trained before, and is again.

        Settings, versions and exports are those of this record: older exports were made of other weights. Tasks and
        mixtures that it lacks are kept, and shares are computed anew from the rows of both.

        Args:
            older ([`AdapterRecord`]): What was recorded before. Neither record is changed.

        Returns:
            `AdapterRecord`: With the older tasks first.
        """
        before = {task.name: task for task in older.tasks}
        now = {task.name: task for task in self.tasks}
        tasks = [now[name].merged_with(task) if name in now else replace(task) for name, task in before.items()]
        tasks += [replace(task) for name, task in now.items() if name not in before]
        total = sum(task.rows or 0 for task in tasks)
        if total:
            tasks = [replace(task, share=None if task.rows is None else task.rows / total) for task in tasks]
        same_base = self.base_model in (None, older.base_model)
        return replace(
            self,
            base_model=self.base_model or older.base_model,
            base_model_revision=self.base_model_revision or (older.base_model_revision if same_base else None),
            base_model_license=self.base_model_license or (older.base_model_license if same_base else None),
            tasks=tasks,
            mixtures=_merge_mixtures(self.mixtures, older.mixtures),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it: what is not known is left out."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values["tasks"] = [task.to_dict() for task in self.tasks]
        values["mixtures"] = None if self.mixtures is None else self.mixtures.to_dict()
        values["exports"] = [_without_empty(dict(export)) for export in self.exports]
        return {"format": RECORD_FORMAT, **_without_empty(values)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AdapterRecord:
        """
        The opposite of [`AdapterRecord.to_dict`]. Unknown keys are ignored.

        Raises:
            ValueError: If a value has another type or range, or the format is a newer one; the message names the key.
        """
        read = _Reader(data, "record")
        _check_format(read)
        tasks = [TaskRecord.from_dict(entry, f"tasks[{i}]") for i, entry in enumerate(read.mappings("tasks"))]
        names = [task.name for task in tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"`tasks` names {', '.join(map(repr, twice))} more than once. Give each task one name.")
        return cls(
            base_model=read.text("base_model"),
            base_model_revision=read.text("base_model_revision"),
            base_model_license=read.text("base_model_license"),
            base_dtype=read.text("base_dtype"),
            quantization=read.text("quantization"),
            tasks=tasks,
            hyperparameters=read.mapping("hyperparameters", "numbers, texts or booleans", _is_scalar),
            versions=read.mapping("versions", "texts", lambda value: isinstance(value, str)),
            mixtures=_read_mixtures(read),
            balance_loss=read.text("balance_loss"),
            balance_coef=read.number("balance_coef"),
            exports=[_read_export(entry, f"exports[{i}]") for i, entry in enumerate(read.mappings("exports"))],
        )

    def save(self, folder: str | Path) -> Path:
        """
        Write the record into a folder, all at once: a reader sees the old file or the new one.

        Args:
            folder (`str` or `Path`): Made if it is not there.

        Returns:
            `Path`: The file.
        """
        path = Path(folder) / RECORD_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        text = _dump(self.to_dict())
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{RECORD_NAME}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
            os.chmod(temporary, 0o666 & ~_umask())  # `mkstemp` makes files that only their owner reads
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        return path

    @classmethod
    def load(cls, folder: str | Path) -> AdapterRecord | None:
        """
        Read the record of a folder.

        Returns:
            `AdapterRecord`, or `None` if the folder has none.

        Raises:
            ValueError: If the file is not a record; the message names the file and the key.
        """
        path = Path(folder) / RECORD_NAME
        if not path.is_file():
            return None
        data = read_json(path)
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{path} is not a record of an adapter: {error}") from error


class _Reader:
    """Typed access to a dictionary read from JSON."""

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, Mapping):
            raise ValueError(f"`{where}` must be an object with named values, got {shorten(data)}.")
        self.data, self.where = data, where

    def _fail(self, key: str, accepted: str) -> ValueError:
        name = key if self.where == "record" else f"{self.where}.{key}"
        return ValueError(f"`{name}` must be {accepted}, got {shorten(self.data[key])}. Correct it, or leave it out.")

    def text(self, key: str) -> str | None:
        value = self.data.get(key)
        if value is not None and not isinstance(value, str):
            raise self._fail(key, "a text")
        return value

    def count(self, key: str) -> int | None:
        value = self.data.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise self._fail(key, "an integer of at least 0")
        return value

    def number(self, key: str, upper: float = math.inf) -> float | None:
        value = self.data.get(key)
        if value is None:
            return None
        if not _is_number(value) or not 0.0 <= value <= upper:
            raise self._fail(key, "a number of at least 0" if upper == math.inf else f"a number from 0 to {upper:g}")
        return float(value)

    def mapping(self, key: str, accepted: str, is_valid: Any) -> dict[str, Any]:
        value = self.data.get(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping) or not all(isinstance(k, str) and is_valid(v) for k, v in value.items()):
            raise self._fail(key, f"an object of {accepted} by name")
        return dict(value)

    def mappings(self, key: str) -> list[Any]:
        value = self.data.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self._fail(key, "a list of objects")
        return value


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond the range of a float
        return False


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | bool) or _is_number(value)


def _without_empty(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None and value != {} and value != []}


def _sum_of_known(*counts: int | None) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _merge_mixtures(newer: HeadWeights | None, older: HeadWeights | None) -> HeadWeights | None:
    """Mixtures of the tasks of both, if they are of the same layers and number of heads; else the newer ones."""
    if newer is None or older is None:
        return newer or older
    shapes = {weights.shape for mixtures in (newer, older) for weights in mixtures.weights.values()}
    if newer.layers != older.layers or len(shapes) > 1:
        return newer
    weights, tokens = {**older.weights, **newer.weights}, {**older.tokens, **newer.tokens}
    return replace(newer, weights=weights, tokens=tokens)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _dump(values: Mapping[str, Any]) -> str:
    """JSON that reads well, but for the mixtures, whose thousands of numbers share a line."""
    lines = []
    for key, value in values.items():
        indent = None if key == "mixtures" else 2
        text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False).replace("\n", "\n  ")
        lines.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _check_format(read: _Reader) -> None:
    version = read.count("format")
    if version is not None and version > RECORD_FORMAT:
        raise ValueError(
            f"`format` is {version}, and this version of rlora_trl ({__version__}) reads up to {RECORD_FORMAT}. "
            "Install a newer rlora_trl."
        )


def _read_mixtures(read: _Reader) -> HeadWeights | None:
    if read.data.get("mixtures") is None:
        return None
    # Imported where it is needed: most readers of a record want its tasks.
    from ..analysis.measuring import HeadWeights

    try:
        return HeadWeights.from_dict(read.data["mixtures"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"`mixtures` can't be read: {error}") from error


def _read_export(data: Any, where: str) -> dict[str, Any]:
    read = _Reader(data, where)
    if read.text("path") is None:
        raise ValueError(f"`{where}.path` is missing. It is the folder of the export inside the repository.")
    texts = {key: read.text(key) for key in ("task", "path")}
    numbers = {key: read.number(key) for key in ("kl", "accuracy", "accuracy_dynamic")}
    others = {key: value for key, value in data.items() if isinstance(key, str) and _is_scalar(value)}
    return _without_empty({**others, **texts, "rank": read.count("rank"), **numbers, "rows": read.count("rows")})


def find_record(config: RLoraConfig, token: str | bool | None = None) -> AdapterRecord | None:
    """
    The record that lies beside the place that a configuration was loaded from.

    Args:
        config ([`RLoraConfig`]): Its `source` is a folder, or a repository: then the record is read from the cache
            or downloaded.
        token (`str` or `bool`, *optional*): For the Hub, as in `huggingface_hub.hf_hub_download`.

    Returns:
        `AdapterRecord`, or `None` if there is none, or the configuration was not loaded from anywhere.

    Raises:
        ValueError: If there is one that can't be read.
    """
    source = config.source
    if source is None:
        return None
    name, revision, subfolder = source
    if os.path.isdir(name):
        return AdapterRecord.load(Path(name, subfolder or ""))
    try:
        path = hf_hub_download(name, RECORD_NAME, revision=revision, subfolder=subfolder, token=token)
    except (EntryNotFoundError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError):
        return None
    return AdapterRecord.load(Path(path).parent)


def select_hyperparameters(args: Any) -> dict[str, Scalar]:
    """
    The fields of training arguments that may be published: numbers, choices and short names of a fixed list.

    Args:
        args (`RLoraSFTConfig`, or any object with the fields of `TrainingArguments`): The arguments.

    Returns:
        `dict`: Values by field, in the order of the list; fields that are not set are left out.
    """
    selected: dict[str, Scalar] = {}
    for name in _HYPERPARAMETERS:
        value = getattr(args, name, None)
        value = value.value if isinstance(value, Enum) else value
        if is_plain(value):
            selected[name] = value
    for name, (other, needed) in _ONLY_WITH.items():
        if selected.get(other) != needed:
            selected.pop(name, None)
    for name, (other, excluded) in _NOT_WITH.items():
        if selected.get(other) == excluded:
            selected.pop(name, None)
    if "max_steps" in selected:  # it decides then
        selected.pop("num_train_epochs", None)
    return selected


def is_plain(value: Any) -> TypeGuard[Scalar]:
    """Whether a value may be published: a number, a boolean, or a short text that is no path."""
    return _is_scalar(value) and (not isinstance(value, str) or _PLAIN_TEXT.fullmatch(value) is not None)


def collect_versions() -> dict[str, str]:
    """Versions of this package and of the installed ones that training runs on, none of which is imported."""
    versions = {"rlora_trl": __version__}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
