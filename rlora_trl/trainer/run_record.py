"""Collects the facts of a run that go into the adapter's record."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from huggingface_hub import try_to_load_from_cache
from torch import nn

from ..evaluation.columns import encode, task_namer
from ..files.head_weights import HeadWeights
from ..files.names import hub_name
from ..files.record import AdapterRecord, Scalar, TaskRecord, collect_versions, find_record
from ..tuner import RLoraConfig
from .config import RLoraSFTConfig
from .tasks import values_of


_METRICS = ("accuracy", "loss", "base_accuracy")
_HUB_SOURCE = re.compile(r"(?:hf://datasets/|huggingface\.co/datasets/)([\w.-]+/[\w.-]+)")


@dataclass(frozen=True)
class TaskFacts:
    """Facts about a task from the training data: its cluster, and its dataset on the Hub."""

    cluster: str | None = None
    dataset: str | None = None


class RunRecord:
    """
    The facts of a run for the record of its adapter.

    Args:
        train_dataset: What [`RLoraSFTTrainer`] takes.
        task_column (`str`): Column that names the task of each row.
        trained_before ([`RLoraConfig`], *optional*): Configuration of an adapter that was trained before, whose record
            is continued.

    Attributes:
        seen (`dict[str, dict[str, int]]`): Rows and tokens of each task that the run was trained on. They are
            collected on all ranks, at checkpoints and at the end of training, so that a save on one rank has them.
        head_weights ([`HeadWeights`], *optional*): Mean head weights by task, as measured last.
        dataset_name (`str`, *optional*): The dataset on the Hub, if all training data come from one.
    """

    def __init__(self, train_dataset: Any, task_column: str, trained_before: RLoraConfig | None = None) -> None:
        self.seen: dict[str, dict[str, int]] = {}
        self.head_weights: HeadWeights | None = None
        self.dataset_name = _hub_dataset(train_dataset)
        self._facts = task_facts(train_dataset, task_column)
        self._older = None if trained_before is None else find_record(trained_before)
        # Metrics describe the weights of one step.
        self._metrics_step: int | None = None
        self._metrics: dict[str, dict[str, float]] = {}
        self._metric_rows: dict[str, int] = {}

    def note_metrics(self, step: int, metrics: Mapping[str, float], tasks: list[str], datasets: Any) -> None:
        """
        Store the metrics of each task, together with earlier ones of the same step.

        Args:
            step (`int`): The step whose weights were evaluated.
            metrics (`Mapping[str, float]`): As `evaluate` returns them.
            tasks (`list[str]`): The adapter's tasks.
            datasets (`Mapping`): The data that was evaluated, by task.
        """
        if self._metrics_step != step:
            self._metrics_step, self._metrics, self._metric_rows = step, {}, {}
        for task in tasks:
            measured = {name: metrics[key] for name in _METRICS if (key := f"eval_{task}_{name}") in metrics}
            if measured:
                self._metrics.setdefault(task, {}).update(measured)
                if isinstance(datasets, Mapping) and hasattr(datasets.get(task), "__len__"):
                    self._metric_rows[task] = len(datasets[task])

    def take_metrics(self, step: int, record: AdapterRecord | None) -> None:
        """Use the metrics of a checkpoint, after its weights were loaded at this step."""
        if record is not None:
            self._metrics_step = step
            self._metrics = {task.name: dict(task.metrics) for task in record.tasks}
            self._metric_rows = {task.name: task.metric_rows for task in record.tasks if task.metric_rows is not None}

    def forget_metrics(self) -> None:
        """Drop the metrics when training restarts."""
        self._metrics_step = None

    def build(
        self,
        args: RLoraSFTConfig,
        config: RLoraConfig,
        model: nn.Module,
        tasks: list[str],
        *,
        step: int,
        hyperparameters: Mapping[str, Scalar],
        base_commit: str | None,
    ) -> AdapterRecord:
        """
        Build the adapter's record at a step. For an adapter that was trained before, it continues the older record.

        Args:
            args ([`RLoraSFTConfig`]): Configuration of the run.
            config ([`RLoraConfig`]): Configuration of the adapter.
            model (`torch.nn.Module`): The model. Its configuration has the dtype and quantization of the base.
            tasks (`list[str]`): The adapter's tasks.
            step (`int`): Steps trained.
            hyperparameters (`Mapping`): Settings of the run. Before the first step those of the older record are
                kept.
            base_commit (`str`, *optional*): Commit of the base model, if known.
        """
        if step == 0 and self._older is not None and self._older.hyperparameters:
            hyperparameters = self._older.hyperparameters
        dtype = getattr(model.config, "dtype", None)
        balances = args.balance_loss != "none"
        record = AdapterRecord(
            base_model=args.hub_base_model or hub_name(config.base_model_name_or_path),
            base_model_revision=base_commit,
            base_dtype=None if dtype is None else str(dtype).removeprefix("torch."),
            quantization=describe_quantization(getattr(model.config, "quantization_config", None)),
            tasks=[self._task_record(task, step) for task in tasks],
            hyperparameters=dict(hyperparameters),
            versions=collect_versions(),
            mixtures=self.head_weights,
            balance_loss=args.balance_loss if balances else None,
            balance_coef=args.balance_coef if balances else None,
        )
        return record if self._older is None else record.merged_with(self._older)

    def _task_record(self, task: str, step: int) -> TaskRecord:
        facts = self._facts.get(task, TaskFacts())
        seen = self.seen.get(task, {})
        total = sum(counts["rows"] for counts in self.seen.values())
        measured = self._metrics_step == step
        return TaskRecord(
            task,
            cluster=facts.cluster,
            dataset=facts.dataset,
            rows=seen.get("rows"),
            tokens=seen.get("tokens"),
            share=seen["rows"] / total if total else None,
            metrics=dict(self._metrics.get(task, {})) if measured else {},
            metric_rows=self._metric_rows.get(task) if measured else None,
        )


def task_facts(dataset: Any, task_column: str) -> dict[str, TaskFacts]:
    """
    Facts about the tasks of map-style training data.

    Args:
        dataset: What [`RLoraSFTTrainer`] takes as `train_dataset`.
        task_column (`str`): Column that names the task of each row.
    """
    if isinstance(dataset, Mapping):
        return {str(name): TaskFacts(_cluster_of(data), _hub_dataset(data)) for name, data in dataset.items()}
    if not isinstance(dataset, Dataset) or task_column not in dataset.column_names:
        return {}
    source = _hub_dataset(dataset)
    name_of = task_namer(dataset, task_column)
    if "cluster" not in dataset.column_names:
        values = encode(dataset, task_column)[0] if source is not None else ()
        return {name: TaskFacts(None, source) for value in values if (name := name_of(value))}
    pairs = dict(zip(values_of(dataset, task_column), values_of(dataset, "cluster"), strict=True))
    return {name: TaskFacts(_text(cluster), source) for value, cluster in pairs.items() if (name := name_of(value))}


def _cluster_of(dataset: Any) -> str | None:
    if isinstance(dataset, Dataset) and "cluster" in dataset.column_names and len(dataset):
        return _text(dataset.with_format(None).select_columns(["cluster"])[0]["cluster"])
    return None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _hub_dataset(dataset: Any) -> str | None:
    """The repository of a dataset that `load_dataset` got from the Hub."""
    if not isinstance(dataset, Dataset | IterableDataset):
        return None
    for source in dataset.info.download_checksums or ():
        match = _HUB_SOURCE.search(str(source))
        if match:
            return match.group(1)
    return None


def loaded_commit(name: str | None, revision: str | None, cache_dir: str | None = None) -> str | None:
    """The commit that a model of the Hub was loaded from: the one that the cache has for this revision."""
    if not name or os.path.exists(name):
        return None
    path = try_to_load_from_cache(name, "config.json", cache_dir=cache_dir, revision=revision)
    return Path(path).parent.name if isinstance(path, str) else None


def describe_quantization(config: Any) -> str | None:
    """A base model's quantization in words, such as "bitsandbytes 4-bit nf4, double quantization"."""
    if config is None:
        return None
    settings = config if isinstance(config, Mapping) else config.to_dict()
    method = str(getattr(settings.get("quant_method"), "value", settings.get("quant_method")))
    if settings.get("load_in_4bit"):
        double = ", double quantization" if settings.get("bnb_4bit_use_double_quant") else ""
        return f"bitsandbytes 4-bit {settings.get('bnb_4bit_quant_type')}{double}"
    if settings.get("load_in_8bit"):
        return "bitsandbytes 8-bit"
    bits = settings.get("bits") or settings.get("nbits")
    return f"{method} {bits}-bit" if bits else method
