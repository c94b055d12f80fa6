"""What a run records with its adapter, and how the trainer publishes it."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from huggingface_hub import CommitInfo, HfApi, try_to_load_from_cache
from torch import nn
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from ..analysis.measuring import HeadWeights
from ..evaluation.columns import encode, task_namer
from ..files.layout import CARD_NAME, published_files
from ..files.record import (
    AdapterRecord,
    Scalar,
    TaskRecord,
    collect_versions,
    find_record,
    hub_name,
    select_hyperparameters,
)
from ..hub import push_adapter
from ..hub.card import read_card, render_card
from ..tuner import MultiHeadAdapter, RLoraConfig
from ..tuner.bnb_cpu import kept_quantized
from .callbacks import HeadUsageCallback
from .checkpoints import CheckpointTrainer
from .saving import STAGING, adapter_folder
from .task_evaluation import OptionRows
from .task_ids import TASK_IDS, ids_of, is_packed
from .tasks import values_of


logger = get_logger(__name__)

_METRICS = ("accuracy", "loss", "base_accuracy")
# Rows of a task on which it is measured what an export loses.
_MEASURED_ROWS = 200
_HUB_SOURCE = re.compile(r"(?:hf://datasets/|huggingface\.co/datasets/)([\w.-]+/[\w.-]+)")


@dataclass(frozen=True)
class TaskFacts:
    """What the training data tell of a task: the cluster it belongs to, and the data set on the Hub it comes from."""

    cluster: str | None = None
    dataset: str | None = None


def task_facts(dataset: Any, task_column: str) -> dict[str, TaskFacts]:
    """
    What map-style training data tell of their tasks.

    Args:
        dataset: What `RLoraSFTTrainer` takes as `train_dataset`.
        task_column (`str`): Column that names the task of each row.
    """
    if isinstance(dataset, Mapping):
        return {str(name): TaskFacts(_cluster_of(data), _hub_name(data)) for name, data in dataset.items()}
    if not isinstance(dataset, Dataset) or task_column not in dataset.column_names:
        return {}
    source = _hub_name(dataset)
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


def _hub_name(dataset: Any) -> str | None:
    """The repository of a data set that `load_dataset` got from the Hub."""
    if not isinstance(dataset, Dataset | IterableDataset):
        return None
    for source in dataset.info.download_checksums or ():
        match = _HUB_SOURCE.search(str(source))
        if match:
            return match.group(1)
    return None


class PublishingTrainer(CheckpointTrainer):
    """
    The part of `RLoraSFTTrainer` that records, describes and publishes an adapter.

    What needs all ranks is collected where all of them are (at the end of training, at checkpoints, in evaluation), so
    that `save_model` may be called on one rank alone where each has the whole model (not with DeepSpeed or FSDP).
    """

    _tasks: list[str]
    _loads_base: bool  # by its name, so that its revision is known
    _option_rows: dict[str, OptionRows]
    push_in_progress: PushInProgress | None
    _adapters: dict[str, MultiHeadAdapter]

    def _set_up_publishing(self, train_dataset: Any, task_column: str, loaded: RLoraConfig | None) -> None:
        self._task_facts = task_facts(train_dataset, task_column)
        self._dataset_name = _hub_name(train_dataset)
        # What is known of an adapter that goes on training.
        self._older_record = find_record(loaded) if loaded is not None else None
        # One for all, as its jobs wait for each other.
        self._hub_api = HfApi()
        # The step at which the metrics were measured.
        self._metrics_step: int | None = None
        self._seen: dict[str, dict[str, int]] = {}
        self._task_metrics: dict[str, dict[str, float]] = {}
        self._metric_rows: dict[str, int] = {}
        self._mixtures: HeadWeights | None = None

    # What is recorded

    def note_metrics(self, metrics: Mapping[str, float], datasets: Any) -> None:
        """
        Keep `eval_<task>_accuracy` and `_loss` of each task for the adapter's record, with others of the same step.

        Args:
            metrics (`Mapping[str, float]`): As `evaluate` returns them.
            datasets (`Mapping`): The data that they were measured on, by task.
        """
        if self._metrics_step != self.state.global_step:
            self._metrics_step, self._task_metrics, self._metric_rows = self.state.global_step, {}, {}
        for task in self._tasks:
            told = {name: metrics[key] for name in _METRICS if (key := f"eval_{task}_{name}") in metrics}
            if told:
                self._task_metrics.setdefault(task, {}).update(told)
                if isinstance(datasets, Mapping) and hasattr(datasets.get(task), "__len__"):
                    self._metric_rows[task] = len(datasets[task])

    def adapter_record(self) -> AdapterRecord:
        """What is known of the adapter and its training; see [`AdapterRecord`]."""
        record = self._own_record()
        return record if self._older_record is None else record.merged_with(self._older_record)

    def _own_record(self) -> AdapterRecord:
        config = self._adapter_config()
        base = config.base_model_name_or_path
        model_config = self.model.config
        dtype = getattr(model_config, "dtype", None)
        balances = self.args.balance_loss != "none"
        return AdapterRecord(
            base_model=self.args.hub_base_model or hub_name(base),
            base_model_revision=self._base_commit(config),
            base_dtype=None if dtype is None else str(dtype).removeprefix("torch."),
            quantization=describe_quantization(getattr(model_config, "quantization_config", None)),
            tasks=[self._task_record(task) for task in self._tasks],
            hyperparameters=self._hyperparameters(),
            versions=collect_versions(),
            mixtures=self._mixtures,
            balance_loss=self.args.balance_loss if balances else None,
            balance_coef=self.args.balance_coef if balances else None,
        )

    def _base_commit(self, config: RLoraConfig) -> str | None:
        """The commit of the base model, where it is known which one was loaded."""
        if self._loads_base or config.revision is not None:
            cache_dir = (self.args.model_init_kwargs or {}).get("cache_dir") if self._loads_base else None
            return _loaded_commit(config.base_model_name_or_path, config.revision, cache_dir)
        return None  # a model does not say which revision it was loaded from

    def _hyperparameters(self) -> dict[str, Scalar]:
        """The settings that the adapter was really trained with; before the first step, those that it is to be."""
        step = self.state.global_step
        if step == 0 and self._older_record is not None and self._older_record.hyperparameters:
            return dict(self._older_record.hyperparameters)
        return self._run_settings.recorded(step) if self._run_settings.parts else select_hyperparameters(self.args)

    def _task_record(self, task: str) -> TaskRecord:
        facts = self._task_facts.get(task, TaskFacts())
        seen = self._seen.get(task, {})
        total = sum(counts["rows"] for counts in self._seen.values())
        # Metrics are of the weights of their step, and of no others.
        measured = self._metrics_step == self.state.global_step
        return TaskRecord(
            task,
            cluster=facts.cluster,
            dataset=facts.dataset,
            rows=seen.get("rows"),
            tokens=seen.get("tokens"),
            share=seen["rows"] / total if total else None,
            metrics=dict(self._task_metrics.get(task, {})) if measured else {},
            metric_rows=self._metric_rows.get(task) if measured else None,
        )

    def _adapter_config(self) -> RLoraConfig:
        return self.model.peft_config[self.model.active_adapter]

    def measure_head_weights(self, rows: int | None = None) -> HeadWeights | None:
        """
        The mean weights of the heads by task, over rows of the training data. To be called on all ranks.

        They are recorded with the adapter from then on. Training ends with such a measurement.

        Args:
            rows (`int`, *optional*): Rows of each task (packed: of the data). Defaults to `args.mixture_rows`.

        Returns:
            `HeadWeights`, or `None` for an adapter without a router, or data that do not tell their tasks.
        """
        rows = self.args.mixture_rows if rows is None else rows
        data = self._rows_by_task(rows)
        if data is None or not any(adapter.router is not None for adapter in self._adapters.values()):
            return None
        counter = HeadUsageCallback(self._tasks)
        with self._evaluating() as model:
            counter.start(self.model, self.args.device)
            try:
                # Not `get_eval_dataloader`, which may hand out a loader that it keeps for evaluation. Batches are
                # those of training, which fit.
                loader = self._get_dataloader(data, "mixtures", self.args.train_batch_size, self._get_eval_sampler)
                for inputs in loader:
                    self.prediction_step(model, inputs, prediction_loss_only=True)
                usage, tokens = counter.collect()
            finally:
                counter.stop()
        named = {task: weights for task, weights in usage.items() if task != counter.unknown}
        if named and all(bool(torch.isfinite(weights).all()) for weights in named.values()):
            layers = tuple(name.removeprefix("base_model.model.") for name in counter.layers)
            self._mixtures = HeadWeights(layers, named, {task: tokens[task] for task in named})
        return self._mixtures

    def _rows_by_task(self, rows: int) -> Dataset | None:
        """Some rows of each task of the prepared training data, spread over it."""
        data = self.train_dataset
        if rows < 1 or not self._tasks or not isinstance(data, Dataset) or TASK_IDS not in data.column_names:
            return None
        if is_packed(data):  # one for each token
            return data.select(_spread(range(len(data)), rows * len(self._tasks)))
        ids = ids_of(data)
        places = [_spread(np.flatnonzero(ids == task).tolist(), rows) for task in np.unique(ids)]
        return data.select(sorted(itertools.chain(*places)))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        output = super().train(*args, **kwargs)
        self._seen = self.tasks_seen()
        best = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and best is not None:
            self._take_metrics_of(best)
        self.measure_head_weights()
        return output

    def tasks_seen(self) -> dict[str, dict[str, int]]:
        """Rows and tokens of each task that were trained on."""
        return {}

    def _take_metrics_of(self, checkpoint: str) -> None:
        """Go on with the metrics of a checkpoint whose weights were loaded."""
        record = AdapterRecord.load(self._adapter_folder(checkpoint))
        if record is not None:
            self._metrics_step = self.state.global_step
            self._task_metrics = {task.name: dict(task.metrics) for task in record.tasks}
            self._metric_rows = {task.name: task.metric_rows for task in record.tasks if task.metric_rows is not None}

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        root = Path(output_dir if output_dir is not None else self.args.output_dir)
        card = self._adapter_folder(root) / CARD_NAME
        # The card of the adapter that will be replaced, whose text written by hand stays. PEFT writes one of its own.
        existing = read_card(self._adapter_folder(_destination(root)) / CARD_NAME) if self.args.should_save else None
        with kept_quantized(self.model):
            super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save:
            record = self.adapter_record()
            record.save(card.parent)
            self._write_card(card, record, existing)

    def _adapter_folder(self, root: str | Path) -> Path:
        return adapter_folder(root, self.model.active_adapter)

    # The card, and publishing

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """
        Write the adapter's card into the output folder; text that was written into it by hand stays.

        Args:
            model_name (`str`, *optional*): Not used: a card is headed by the name of its repository.
            dataset_name (`str` or `list[str]`, *optional*): Data sets on the Hub, for the metadata.
            tags (`str` or `list[str]`, *optional*): Tags, for the metadata.
        """
        if not self.is_world_process_zero():
            return
        path = self._adapter_folder(self.args.output_dir) / CARD_NAME
        self._write_card(
            path, self.adapter_record(), read_card(path), tags=_as_list(tags), datasets=_as_list(dataset_name)
        )

    def _write_card(
        self,
        path: Path,
        record: AdapterRecord,
        existing: str | None,
        tags: Sequence[str] = (),
        datasets: Sequence[str] = (),
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        card = render_card(
            self._adapter_config(),
            record,
            repo_id=self.hub_model_id,
            num_parameters=count_trainable(self.model),
            datasets=[*datasets, *_as_list(self._dataset_name)],
            tags=[*self._tag_names, *tags],
            existing=existing,
        )
        # In one step: a disk that is full must not cost what was written by hand.
        unfinished = path.with_name(f".{path.name}.saving")
        try:
            card.save(unfinished)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future | None:
        """
        Save the adapter and publish it with its card in one commit, on `args.hub_model_id`; see [`push_adapter`].

        To be called on all ranks, as in `Trainer`. Only what makes up the adapter is uploaded.

        Args:
            commit_message (`str`, *optional*), blocking (`bool`, *optional*), token (`str`, *optional*),
            revision (`str`, *optional*), private (`bool`, *optional*):
                As in `Trainer.push_to_hub`.
            kwargs:
                `exports`, `create_pr`, `license`, `datasets`, `tags`, `base_model` as in [`push_adapter`];
                `dataset_name` as in `Trainer.create_model_card`.

        Returns:
            `CommitInfo` on the main process, a `Future` of it with `blocking=False`, `None` on others.

        Raises:
            ValueError: If `exports` are asked for where the model is divided among processes, or in the background.
        """
        if kwargs.get("exports") and (self._is_sharded() or not blocking):
            where = "of a model that is divided among processes" if self._is_sharded() else "in the background"
            raise ValueError(
                f"`exports` can't be made {where}: they run the whole model. Push without them, and afterwards, in "
                f"one process: `push_adapter({self.args.output_dir!r}, {self.args.hub_model_id!r}, exports=[...])`."
            )
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self._make_repository(token, private)
        datasets = [*_as_list(kwargs.pop("dataset_name", None)), *_as_list(kwargs.pop("datasets", None))]
        datasets += _as_list(self._dataset_name)
        tags = [*self._tag_names, *_as_list(kwargs.pop("tags", None)), *_as_list(self.model.model_tags)]
        kwargs.pop("model_name", None)  # the card is headed by the repository's
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(tags=tags, dataset_name=datasets)
        self._finish_current_push()
        options = {
            "commit_message": commit_message or "End of training",
            "revision": revision if revision is not None else self.args.hub_revision,
            "token": token if token is not None else self.args.hub_token,
            "private": private if private is not None else self.args.hub_private_repo,
            "base_model": self.args.hub_base_model,
            "tags": list(dict.fromkeys(tags)),
            "datasets": datasets,
            "export_from": None if self._is_sharded() else self.accelerator.unwrap_model(self.model),
            "export_data": self._rows_to_measure(),
            "tokenizer": self.processing_class,
            **kwargs,
        }
        folder = self._adapter_folder(self.args.output_dir)
        if blocking:
            return push_adapter(folder, self.hub_model_id, **options)
        return self._push_copy(folder, options)

    def _make_repository(self, token: str | None, private: bool | None) -> None:
        # `init_hf_repo` has a parameter `private` in transformers 5.23 and not in 5.17, the floor, with which this
        # ends (transformers#33492).
        before = self.args.hub_private_repo
        self.args.hub_private_repo = before if private is None else private
        try:
            self.init_hf_repo(token=token)
        finally:
            self.args.hub_private_repo = before

    def _rows_to_measure(self) -> dict[str, list[Any]]:
        """Evaluation rows by task that can be scored, the first of each."""
        found: dict[str, list[Any]] = {}
        for scored in self._option_rows.values():
            for task, rows in scored.by_task().items():
                found.setdefault(task, rows.select(range(min(len(rows), _MEASURED_ROWS))).to_list())
        return found

    def _is_sharded(self) -> bool:
        return self.is_fsdp_enabled or any(hasattr(parameter, "ds_id") for parameter in self.model.parameters())

    def _push_copy(self, folder: Path, options: dict[str, Any]) -> Future:
        """Push in the background what a folder has now, whatever becomes of it meanwhile."""
        copy = Path(tempfile.mkdtemp(prefix="rlora-push-"))
        for path in published_files(folder):
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / path, copy / path)

        def push() -> CommitInfo:
            try:
                return push_adapter(copy, self.hub_model_id, **options)
            except Exception as error:  # which nobody may ever ask the future for
                logger.warning(f"A push to {self.hub_model_id} in the background failed: {error}")
                raise
            finally:
                shutil.rmtree(copy, ignore_errors=True)

        return self._hub_api.run_as_future(push)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push the adapter of a checkpoint: what `hub_strategy="every_save"` asks for."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        running = self.push_in_progress
        if running is not None and running.is_done():
            running = None
        if running is not None and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        options = {
            "commit_message": f"Training in progress, step {self.state.global_step}",
            "revision": self.args.hub_revision,
            "token": self.args.hub_token,
            "base_model": self.args.hub_base_model,
            "tags": list(self._tag_names),
        }
        job = self._push_copy(self._adapter_folder(checkpoint_folder), options)
        if running is not None:
            running.jobs.append(job)
        else:
            self.push_in_progress = PushInProgress([job])


def check_publishing(args: Any, base_model: str | None) -> None:
    """
    Refuse before training what could not be published after it.

    Args:
        args ([`RLoraSFTConfig`]): The configuration.
        base_model (`str`, *optional*): Name or folder of the base model.

    Raises:
        ValueError: If checkpoints are to be pushed, which hold the state of the optimizer; or the base model is a
            local folder without a name.
    """
    if not args.push_to_hub:
        return
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise ValueError(
            f"`hub_strategy={args.hub_strategy.value!r}` uploads checkpoints with the state of the optimizer and the "
            "training arguments, which are not published with adapters. Use 'every_save' or 'end', and keep "
            "checkpoints in storage of your own."
        )
    if args.hub_base_model is None and base_model and hub_name(base_model) is None:
        raise ValueError(
            f"`push_to_hub=True`, and the base model is the local folder {base_model!r}, which nobody else can load. "
            "Set `hub_base_model` to its name on the Hub, or load it by that name."
        )


def count_trainable(model: nn.Module) -> int:
    """Parameters that train, in whole also where they are divided among processes."""
    return sum(
        parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()
        for parameter in model.parameters()
        if parameter.requires_grad
    )


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


def _loaded_commit(name: str | None, revision: str | None, cache_dir: str | None = None) -> str | None:
    """The commit that a model of the Hub was loaded from, which is where the cache has it."""
    if not name or os.path.exists(name):
        return None
    path = try_to_load_from_cache(name, "config.json", cache_dir=cache_dir, revision=revision)
    return Path(path).parent.name if isinstance(path, str) else None


def _as_list(value: Any) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def _destination(folder: Path) -> Path:
    """Where the files of a folder will lie, if a save writes them there first; see `CheckpointTrainer`."""
    if folder.parent.name != STAGING:
        return folder
    return folder.parent.parent if folder.name == "model" else folder.parent.parent / folder.name


def _spread(places: Any, count: int) -> list[int]:
    """At most `count` of the places, at even distances."""
    if len(places) <= count:
        return list(places)
    return [places[(2 * number + 1) * len(places) // (2 * count)] for number in range(count)]
