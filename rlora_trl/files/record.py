"""
The record of an adapter's training: tasks, scores, settings, versions. A JSON file in the adapter's folder.

The file may be missing. It never changes what the adapter computes, which PEFT's configuration defines.
"""

# Without `from __future__ import annotations`: `strict` checks annotations, and would skip strings.
import importlib.metadata
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, TypeAlias, TypeGuard, TypeVar

from huggingface_hub.dataclasses import strict, validated_field
from huggingface_hub.errors import StrictDataclassError
from transformers.utils import logging

from .._version import __version__
from ..reading import JSON_LIMIT, AdapterCheckError, first_few, parse_json, read_json, shorten
from ..tuner.config import RLoraConfig
from ..tuner.task_names import MAX_TASKS, task_name
from ..writing import write_text
from .download import find_file
from .head_weights import HeadWeights
from .layout import RECORD_NAME


logger = logging.get_logger(__name__)

RECORD_FORMAT = 1
BASE_ACCURACY = "base_accuracy"  # the metric of a task that holds the accuracy of the base model without the adapter
Scalar: TypeAlias = str | int | float | bool

# The most entries of a field in a file, which may be hostile, and the most characters of a text or key in it.
_MAX_ENTRIES = {"tasks": MAX_TASKS, "exports": MAX_TASKS}
_MAX_OTHER_ENTRIES = 1_000
_MAX_TEXT = 4096

# Packages whose versions matter for repeating a training run, by their names in the package index.
_PACKAGES = ("peft", "trl", "transformers", "torch", "datasets", "accelerate", "bitsandbytes", "deepspeed")

# The training arguments that are recorded. Others may hold paths, tokens and names of machines, and TRL adds new ones.
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
# Fields that have an effect only if another field has, or does not have, a value.
_ONLY_WITH = {"mixing_temperature": ("mixing", "temperature")}
_NOT_WITH = {
    "balance_coef": ("balance_loss", "none"),
    "balance_scope": ("balance_loss", "none"),
    "mixing_unit": ("mixing", "proportional"),
    "max_steps": ("max_steps", -1),
}
# Neither a path nor a name with a host in it.
_PLAIN_TEXT = re.compile(r"[\w .,+!-]{1,64}")


def _check_number(value: int | float | None) -> None:
    if value is not None and not 0 <= value <= sys.float_info.max:
        raise ValueError("a finite number of at least 0")


def _check_share(value: int | float | None) -> None:
    if value is not None and not 0 <= value <= 1:
        raise ValueError("a number from 0 to 1")


def _check_metrics(metrics: dict[str, int | float]) -> None:
    # NaN and infinity are left out when the record is written; larger integers can't be compared with them.
    if any(isinstance(value, int) and not abs(value) <= sys.float_info.max for value in metrics.values()):
        raise ValueError("finite numbers")


def _check_intervals(intervals: dict[str, list[int | float]]) -> None:
    for bounds in intervals.values():
        if len(bounds) != 2 or not -sys.float_info.max <= bounds[0] <= bounds[1] <= sys.float_info.max:
            raise ValueError("two finite numbers for each metric, the lower one first")


@strict
@dataclass
class TaskRecord:
    """
    One task of an adapter.

    Args:
        name (`str`): Its name, as in `RLoraConfig.tasks`.
        cluster (`str`, *optional*): Kind of task, for example `"sentiment"`.
        dataset (`str`, *optional*): Name of the dataset on the Hub.
        license (`str`, *optional*): License of the data.
        rows (`int`, *optional*), tokens (`int`, *optional*): Numbers seen in training, including repetitions.
        share (`float`, *optional*): Share of the task mixture, a ratio in `[0, 1]`.
        metrics (`dict[str, float]`, *optional*): Values by name: `"accuracy"`, a ratio in `[0, 1]`;
            `"base_accuracy"`, that of the base model without the adapter; `"loss"`; others, such as `"f1"`.
        metric_rows (`int`, *optional*): Rows that the metrics were measured on.
        intervals (`dict[str, list[float]]`, *optional*): Bounds of the 95 % intervals of metrics by name.
    """

    name: str
    cluster: str | None = None
    dataset: str | None = None
    license: str | None = None
    rows: int | None = validated_field(_check_number, default=None)
    tokens: int | None = validated_field(_check_number, default=None)
    share: int | float | None = validated_field(_check_share, default=None)
    metrics: dict[str, int | float] = validated_field(_check_metrics, default_factory=dict)
    metric_rows: int | None = validated_field(_check_number, default=None)
    intervals: dict[str, list[int | float]] = validated_field(_check_intervals, default_factory=dict)

    def merged_with(self, older: "TaskRecord") -> "TaskRecord":
        """
        The record of a task that is trained in a second run.

        Rows and tokens are summed. Older metrics are kept unless the task was trained again; the score of the base
        model is always kept. [`AdapterRecord.merged_with`] computes the shares.

        Args:
            older ([`TaskRecord`]): The record of the run before.
        """
        metrics, metric_rows, intervals = dict(self.metrics), self.metric_rows, dict(self.intervals)
        if not metrics and not self.rows:
            metrics, metric_rows, intervals = dict(older.metrics), older.metric_rows, dict(older.intervals)
        elif BASE_ACCURACY in older.metrics:
            metrics.setdefault(BASE_ACCURACY, older.metrics[BASE_ACCURACY])
            if BASE_ACCURACY in older.intervals and BASE_ACCURACY not in self.metrics:
                intervals[BASE_ACCURACY] = older.intervals[BASE_ACCURACY]
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
            intervals=intervals,
        )

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON, without unknown ones and metrics that are not finite."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values["metrics"] = {name: float(value) for name, value in self.metrics.items() if math.isfinite(value)}
        values["intervals"] = {
            name: [float(bound) for bound in bounds]
            for name, bounds in self.intervals.items()
            if name in values["metrics"]
        }
        return _without_empty(values)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "task") -> "TaskRecord":
        """
        The opposite of [`TaskRecord.to_dict`]. Unknown keys are ignored.

        Raises:
            ValueError: If a value has another type or range; the message names the key.
        """
        _check_object(data, where)
        if not data.get("name"):
            raise ValueError(f"`{where}.name` is missing. Each task needs a name.")
        try:
            task_name(data["name"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"`{where}.name` must be of type str, the name of a task. {error}") from error
        return _fill(cls(name=""), data, f"{where}.")


@strict
@dataclass
class _Export:
    """The known fields of an export; other fields are kept unchanged."""

    path: str = ""
    task: str | None = None
    rank: int | None = validated_field(_check_number, default=None)
    rows: int | None = validated_field(_check_number, default=None)
    kl: int | float | None = validated_field(_check_number, default=None)
    accuracy: int | float | None = validated_field(_check_number, default=None)
    accuracy_dynamic: int | float | None = validated_field(_check_number, default=None)

    @classmethod
    def from_dict(cls, data: Any, where: str) -> dict[str, Any]:
        _check_object(data, where)
        if data.get("path") is None:
            raise ValueError(f"`{where}.path` is missing. It is the folder of the export inside the repository.")
        _check_size(where, data)
        others = {key: value for key, value in data.items() if _is_scalar(value)}
        return _without_empty({**others, **vars(_fill(cls(), data, f"{where}."))})


@strict
@dataclass
class AdapterRecord:
    """
    The record of an adapter's training. Every field may be unknown.

    Args:
        base_model (`str`, *optional*), base_model_revision (`str`, *optional*): Name on the Hub, and commit.
        base_model_license (`str`, *optional*): License of the base model.
        base_dtype (`str`, *optional*): Dtype of the base model in training, for example `"bfloat16"`.
        quantization (`str`, *optional*): Quantization of the base in training, for example `"bitsandbytes nf4"`.
        tasks (`list[TaskRecord]`, *optional*): The tasks.
        hyperparameters (`dict`, *optional*): Numbers and short strings, see [`select_hyperparameters`].
        versions (`dict[str, str]`, *optional*): Versions by package, see [`collect_versions`].
        mixtures ([`HeadWeights`], *optional*): Mean weights of the heads by task and layer.
        balance_loss (`str`, *optional*), balance_coef (`float`, *optional*): Balance loss and its coefficient.
        exports (`list[dict]`, *optional*): Plain-LoRA exports: `task`, `path`, `rank`, and measured values: `kl`,
            `accuracy` and `accuracy_dynamic`, on a number of `rows`.
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
    balance_coef: int | float | None = validated_field(_check_number, default=None)
    exports: list[dict[str, Any]] = field(default_factory=list)

    def task(self, name: str) -> TaskRecord:
        """
        The record of a task.

        Raises:
            ValueError: If it has no task of that name.
        """
        for task in self.tasks:
            if task.name == name:
                return task
        names = first_few((repr(task.name) for task in self.tasks), 10) or "none"
        raise ValueError(f"The record has no task {shorten(name)}; it has {names}. Use one of these names.")

    def merged_with(self, older: "AdapterRecord") -> "AdapterRecord":
        """
        The record of an adapter that is trained in a second run.

        Settings, versions and exports come from this record: older exports have older weights. Missing tasks and head
        weights come from the older record, and shares are computed from the rows of both.

        Args:
            older ([`AdapterRecord`]): The record of the run before. Neither record is changed.

        Returns:
            `AdapterRecord`: With the older tasks first.
        """
        # Tasks, and their shares of all rows.
        before = {task.name: task for task in older.tasks}
        now = {task.name: task for task in self.tasks}
        tasks = [now[name].merged_with(task) if name in now else replace(task) for name, task in before.items()]
        tasks += [replace(task) for name, task in now.items() if name not in before]
        total = sum(task.rows or 0 for task in tasks)
        if total:
            tasks = [replace(task, share=None if task.rows is None else task.rows / total) for task in tasks]

        # Another base model has another commit and license.
        same_base = self.base_model in (None, older.base_model)
        return replace(
            self,
            base_model=self.base_model or older.base_model,
            base_model_revision=self.base_model_revision or (older.base_model_revision if same_base else None),
            base_model_license=self.base_model_license or (older.base_model_license if same_base else None),
            tasks=tasks,
            mixtures=_merge_head_weights(self.mixtures, older.mixtures),
        )

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON, without unknown ones."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values["tasks"] = [task.to_dict() for task in self.tasks]
        values["mixtures"] = None if self.mixtures is None else self.mixtures.to_dict()
        values["exports"] = [_without_empty(dict(export)) for export in self.exports]
        return {"format": RECORD_FORMAT, **_without_empty(values)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "AdapterRecord":
        """
        The opposite of [`AdapterRecord.to_dict`]. Unknown keys are ignored.

        Raises:
            ValueError: If a value has another type or range, or the format is a newer one; the message names the key.
        """
        _check_object(data, "record")
        version = data.get("format", RECORD_FORMAT)
        if type(version) is not int or not 0 <= version <= RECORD_FORMAT:
            raise ValueError(
                f"`format` is {shorten(version)}, and this version of rlora_trl ({__version__}) reads up to "
                f"{RECORD_FORMAT}. Install a newer rlora_trl."
            )

        # Parts that are objects themselves.
        values = dict(data)
        for key, read in (("tasks", TaskRecord.from_dict), ("exports", _Export.from_dict)):
            entries = data.get(key) or []
            if not isinstance(entries, list):
                raise ValueError(f"`{key}` must be a list of objects, got {shorten(entries)}. Correct it.")
            _check_size(key, entries)
            values[key] = [read(entry, f"{key}[{index}]") for index, entry in enumerate(entries)]
        if data.get("mixtures") is not None:
            try:
                values["mixtures"] = HeadWeights.from_dict(data["mixtures"])
            except ValueError as error:
                raise ValueError(f"`mixtures` can't be read: {error}") from error

        counts = Counter(task.name for task in values["tasks"])
        twice = sorted(repr(name) for name, count in counts.items() if count > 1)
        if twice:
            raise ValueError(f"`tasks` names {first_few(twice)} more than once. Give each task one name.")
        return _fill(cls(), values)

    def save(self, folder: str | Path) -> Path:
        """
        Write the record into a folder, atomically: a reader sees the old file or the new one.

        Head weights of so many tasks, layers and heads that the file could not be read are left out, the last tasks
        first, with a warning.

        Args:
            folder (`str` or `Path`): Created if missing.

        Returns:
            `Path`: The file.
        """
        path = Path(folder) / RECORD_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        values = self.to_dict()
        text = _to_json(values)

        # Head weights grow with tasks times layers times heads, and can be measured again.
        kept = every = len(self.mixtures.weights) if self.mixtures is not None else 0
        while kept and not _is_readable(text):
            kept = kept * 3 // 4
            values["mixtures"] = _first_tasks(values["mixtures"], kept)
            text = _to_json(_without_empty(values))
        write_text(path, text)

        if kept < every:
            logger.warning(
                f"{path} has the head weights of the first {kept:,} of {every:,} tasks: with those of all, it would "
                "exceed the size that is read. `measure_head_weights` measures the others."
            )
        return path

    @classmethod
    def load(cls, folder: str | Path) -> "AdapterRecord | None":
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


_Strict = TypeVar("_Strict", TaskRecord, _Export, AdapterRecord)


def _check_object(data: Any, where: str) -> None:
    if not isinstance(data, Mapping):
        raise ValueError(f"`{where}` must be an object with named values, got {shorten(data)}. Correct it.")


def _check_size(name: str, value: Any, where: str = "") -> None:
    """Refuse what is too large for a field of a record, in a file that may be hostile, before work with it."""
    if isinstance(value, Mapping | list):
        most = _MAX_ENTRIES.get(name, _MAX_OTHER_ENTRIES)
        if len(value) > most:
            raise ValueError(f"`{where}{name}` has {len(value)} entries, and at most {most} are read. Correct it.")
        texts = [*value, *value.values()] if isinstance(value, Mapping) else []
    else:
        texts = [value]

    for text in texts:
        if isinstance(text, str) and len(text) > _MAX_TEXT:
            raise ValueError(
                f"`{where}{name}` has a text of {len(text)} characters ({shorten(text, 20)}), and at most {_MAX_TEXT} "
                "are read. Correct it."
            )


def _to_json(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
    # Lists of numbers on one line each: head weights are most of a large record. Texts have no raw line ends.
    return re.sub(r"\[\n\s+([-+.\de,\s]+?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text) + "\n"


def _is_readable(text: str) -> bool:
    data = text.encode("utf-8")
    try:
        parse_json(data, RECORD_NAME)
    except AdapterCheckError:
        return False
    return len(data) <= JSON_LIMIT


def _first_tasks(mixtures: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The head weights of the first tasks, in the form for JSON; nothing without tasks."""
    tasks = list(mixtures["weights"])[:count]
    parts = {key: {task: mixtures[key][task] for task in tasks} for key in ("weights", "tokens")}
    return {**mixtures, **parts} if tasks else {}


def _fill(record: _Strict, data: Mapping[str, Any], where: str = "") -> _Strict:
    """Set the fields that JSON has; `strict` checks each. Other keys, which a newer version may write, are ignored."""
    for entry in fields(record):
        value = data.get(entry.name)
        if value is None:
            continue
        _check_size(entry.name, value, where)
        try:
            setattr(record, entry.name, value)
        except StrictDataclassError as error:
            # Unions have a name since Python 3.14, "Union".
            is_union = isinstance(entry.type, UnionType)
            kind = str(entry.type).removesuffix(" | None") if is_union else getattr(entry.type, "__name__", entry.type)
            accepted = error.__cause__ if isinstance(error.__cause__, ValueError) else f"of type {kind}"
            raise ValueError(
                f"`{where}{entry.name}` must be {accepted}, got {shorten(value)}. Correct it, or leave it out."
            ) from error
    return record


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
    numbers = [count for count in counts if count is not None]
    return sum(numbers) if numbers else None


def _merge_head_weights(newer: HeadWeights | None, older: HeadWeights | None) -> HeadWeights | None:
    """Head weights for the tasks of both, if layers and number of heads are the same; else the newer ones."""
    if newer is None or older is None:
        return newer or older
    shapes = {weights.shape for measured in (newer, older) for weights in measured.weights.values()}
    if newer.layers != older.layers or len(shapes) > 1:
        return newer
    weights, tokens = {**older.weights, **newer.weights}, {**older.tokens, **newer.tokens}
    return replace(newer, weights=weights, tokens=tokens)


def find_record(config: RLoraConfig, token: str | bool | None = None) -> AdapterRecord | None:
    """
    The record in the folder or repository that a configuration was loaded from.

    Args:
        config ([`RLoraConfig`]): The configuration. Where its `source` is a repository, the record is read from the
            cache or downloaded.
        token (`str` or `bool`, *optional*): For the Hub, as in `huggingface_hub.hf_hub_download`.

    Returns:
        `AdapterRecord`, or `None` if the adapter has none, or the configuration was not loaded.

    Raises:
        ValueError: If the record can't be read.
    """
    source = config.source
    if source is None:
        return None
    name, revision, subfolder = source
    if os.path.isdir(name):
        return AdapterRecord.load(Path(name, subfolder or ""))
    path = f"{subfolder}/{RECORD_NAME}" if subfolder else RECORD_NAME
    file = find_file(name, path, limit=JSON_LIMIT, revision=revision, token=token)
    return None if file is None else AdapterRecord.load(file.parent)


def select_hyperparameters(args: Any) -> dict[str, Scalar]:
    """
    The fields of training arguments that may be published: a fixed list of numbers, choices and short names.

    Args:
        args (`RLoraSFTConfig`, or any object with the fields of `TrainingArguments`): The arguments.

    Returns:
        `dict`: Values by field, in the order of the list, without fields that are not set or have no effect.
    """
    selected: dict[str, Scalar] = {}
    for name in _HYPERPARAMETERS:
        value = getattr(args, name, None)
        value = value.value if isinstance(value, Enum) else value
        if is_plain(value):
            selected[name] = value

    # Settings without effect.
    for name, (other, needed) in _ONLY_WITH.items():
        if selected.get(other) != needed:
            selected.pop(name, None)
    for name, (other, excluded) in _NOT_WITH.items():
        if selected.get(other) == excluded:
            selected.pop(name, None)
    if "max_steps" in selected:  # which takes precedence
        selected.pop("num_train_epochs", None)
    return selected


def is_plain(value: Any) -> TypeGuard[Scalar]:
    """Whether a value may be published: a number, a boolean, or a short string that is not a path."""
    return _is_scalar(value) and (not isinstance(value, str) or _PLAIN_TEXT.fullmatch(value) is not None)


def collect_versions() -> dict[str, str]:
    """Versions of this package and of the installed ones that training uses, read without importing them."""
    versions = {"rlora_trl": __version__}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
