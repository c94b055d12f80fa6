"""`RLoraSFTTrainer`: TRL's `SFTTrainer` for R-LoRA adapters and datasets of several tasks."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Generator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.logging import get_logger
from datasets import IterableDataset
from huggingface_hub import CommitInfo, HfApi
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerControl, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback
from transformers.trainer_utils import HubStrategy, IntervalStrategy
from transformers.utils import PushInProgress

from ..evaluation.columns import AnyDataset
from ..evaluation.formats import check_pictures
from ..files.head_weights import HeadWeights
from ..files.layout import CARD_NAME
from ..files.record import AdapterRecord, select_hyperparameters
from ..hub.card_reading import read_card
from ..kernels import RoutingTally, capture_loss_grad, draw_seed
from ..publish import push_adapter
from ..tuner import MultiHeadAdapter, RLoraConfig, RLoraLayer, RLoraModel, Routing
from ..tuner.batch import describe_batch
from ..tuner.bnb_cpu import kept_quantized
from ..tuner.routing import using_all
from ..tuner.targets import refuse_token_rows_of_head
from .callbacks import HeadUsageCallback
from .checkpoints import KeptState, StagedCheckpoints
from .config import RLoraSFTConfig
from .console import shorten_console_logs
from .cores import slow_precision
from .early_stopping import EarlyStopping
from .given_model import active_config, choose_peft_config, how_to_train, name_revision
from .lost_rows import warn_of_unseen_tasks
from .mixing import TaskMixture
from .nan_policy import check_deepspeed_settings
from .observer import StepObserver
from .optimizer import check_deepspeed_optimizer, set_learning_rates
from .precision import cast_for_deepspeed, undo_bf16_cast
from .publishing import as_list, check_publishing, count_trainable, is_sharded, push_copy, rows_to_measure, write_card
from .run_record import RunRecord, loaded_commit
from .setup import (
    as_rlora_config,
    check_balance,
    check_devices,
    check_optimizer,
    check_packages,
    check_parallelism,
    warn_of_decay,
)
from .sharding import keep_outputs_wide, wait_for_backward
from .task_collator import TaskCollator
from .task_data import TaskData
from .task_evaluation import OptionRows, count_correct_options, find_option_rows, mean_over_tasks, split_by_task
from .task_ids import ROW_STARTS, TASK_IDS, TOKEN_MASK, token_mask_of
from .zero3 import keep_anchors_whole, require_input_gradients


logger = get_logger(__name__)


class _Evaluated(NamedTuple):
    """The running evaluation: the name of its dataset, and the rows with options."""

    name: str
    option_rows: OptionRows | None


class RLoraSFTTrainer(StagedCheckpoints):
    """
    Supervised fine-tuning of one model on many tasks with an R-LoRA adapter.

    All features of `trl.SFTTrainer` work as documented there. The differences:

    - `train_dataset` may also be a dictionary of datasets by task, which are joined and mixed (`args.mixing`), or a
      dataset with a column (`args.task_column`) that names the task of each row. The tasks' names are saved with the
      adapter, and the task of each row reaches the layers (`RLoraConfig(router="task")`), whatever the packing.
    - `peft_config` defaults to `RLoraConfig()`.
    - `args.balance_loss` adds a loss that keeps all heads in use. The evaluation loss does not include it.
    - Logs contain `balance_loss`, `router_entropy`, `head_load_max`, `head_load_cv`, `head_similarity`, the norms
      `grad_norm_A`, `grad_norm_B`, `grad_norm_router`, and for each task `<task>_loss`.
    - Evaluation by task gives `eval_<task>_loss`, and `eval_<task>_accuracy` where rows have `options` (the completion
      must be the most likely of them), with their means over tasks as `eval_loss` and `eval_accuracy`.
    - Adapters train in float32 on a quantized base too, where `SFTTrainer` casts trained parameters to bfloat16:
      updates can be smaller than the resolution of bfloat16, and the anchor must agree with the initial weights.
      (`modules_to_save` and other trained parameters keep the dtype that `SFTTrainer` casts them to.)

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`):
            As in `SFTTrainer`. A `PeftModel` must have an R-LoRA adapter.
        args ([`RLoraSFTConfig`] or `SFTConfig`, *optional*):
            Configuration. Defaults to `RLoraSFTConfig("<model>-R-LoRA")`.
        data_collator (`DataCollator`, *optional*):
            As in `SFTTrainer`.
        train_dataset (`Dataset`, `IterableDataset` or `dict[str, Dataset | IterableDataset]`):
            Training data. A `DatasetDict` holds splits, not tasks, and is refused.
        eval_dataset (`Dataset`, `IterableDataset` or `dict[str, Dataset | IterableDataset]`, *optional*):
            Evaluation data. A dictionary, or a dataset with the task column, gives metrics for each task.
        quantization_config (`BitsAndBytesConfig`, *optional*):
            As in `SFTTrainer`: how to quantize a model given by name.
        peft_config ([`RLoraConfig`], *optional*):
            Configuration of a new adapter, for a `model` without one. It is copied, not changed.
        kwargs:
            All other arguments of `SFTTrainer`.

    Raises:
        TypeError: If the adapter is not an R-LoRA adapter.
        ImportError: If bitsandbytes is needed to quantize the base or for the optimizer, and is not installed.
        ValueError: If a task is empty, formats of tasks differ, the task column is missing, or preparation removes all
            rows (with `router="task"`, all rows of one task).
    """

    train_dataset: Any
    eval_dataset: Any
    push_in_progress: PushInProgress | None

    _tag_names = ["trl", "sft", "rlora"]
    _name = "R-LoRA"
    _paper = {
        "title": "R-LoRA: Randomized Multi-Head LoRA for Efficient Multi-Task Learning",
        "id": "2502.15455",
        # docstyle-ignore
        "citation": (
            "@article{liu2025rlora,\n"
            "  title   = {{R-LoRA: Randomized Multi-Head LoRA for Efficient Multi-Task Learning}},\n"
            "  author  = {Jinda Liu and Yi Chang and Yuan Wu},\n"
            "  journal = {arXiv preprint arXiv:2502.15455},\n"
            "  year    = 2025\n"
            "}"
        ),
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: RLoraSFTConfig | TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: AnyDataset | Mapping[str, AnyDataset] | None = None,
        eval_dataset: AnyDataset | Mapping[str, AnyDataset] | None = None,
        *positional: Any,
        quantization_config: Any = None,
        peft_config: RLoraConfig | None = None,
        **kwargs: Any,
    ) -> None:
        # Adapter and configuration
        args = as_rlora_config(args, model)
        self._loads_base = isinstance(model, str)  # then its revision is known
        peft_config = choose_peft_config(model, peft_config)
        self._is_new_adapter = peft_config is not None
        if self._loads_base and peft_config is not None:
            name_revision(peft_config, args.model_init_kwargs)
        config = peft_config if peft_config is not None else active_config(model)
        check_devices(args)
        check_packages(args, quantization_config)
        check_publishing(args, model if isinstance(model, str) else getattr(model.config, "_name_or_path", None))
        check_balance(args, config)

        # The data, by task
        self._run_record = RunRecord(train_dataset, args.task_column, None if self._is_new_adapter else config)
        self._task_data = TaskData(args, config, is_new=self._is_new_adapter, labels_are_used=data_collator is None)
        train_dataset = self._task_data.join(train_dataset, any_format=kwargs.get("formatting_func") is not None)
        eval_dataset = self._task_data.split_evaluation(eval_dataset)
        self._option_rows = find_option_rows(eval_dataset, args.task_column)
        self._evaluated: _Evaluated | None = None
        self._micro_batch: ExitStack | None = None  # contexts that last through a forward and backward pass
        if not self._is_new_adapter:
            self._propagate_task_names(model)

        loaded = {p: p.data for p in model.parameters()} if isinstance(model, PeftModel) else {}
        super().__init__(
            model,
            args,
            data_collator,
            train_dataset,
            self._task_data.number_evaluation(eval_dataset),
            *positional,
            quantization_config=quantization_config,
            peft_config=peft_config,
            **kwargs,
        )

        # The model and data as `SFTTrainer` has prepared them
        refuse_token_rows_of_head(self.model)
        if self._is_vision_dataset and data_collator is None:
            self._check_pictures()
        self.train_dataset, self.eval_dataset = self._task_data.settle(
            self.train_dataset, self.eval_dataset, came_prepared=self._skip_prepare_dataset
        )
        self._adapter_config().tasks = list(self._task_data.names) or None
        self._propagate_task_names(self.model)
        undo_bf16_cast(self.model, loaded, args.seed)
        if self.is_deepspeed_enabled:
            cast_for_deepspeed(self.model, self.accelerator)
            keep_anchors_whole(self.model, self.accelerator)
            require_input_gradients(self.model, self.accelerator)
        keep_outputs_wide(self.accelerator)
        self._base_commit = self._find_base_commit()
        self._watch_adapters()
        slow = slow_precision(args, self.model)
        if slow is not None:
            logger.warning(slow)
        shorten_console_logs(self, lambda: self._task_data.names)
        # Pushes wait for each other in the queue of one client.
        self._hub_api = HfApi()

    def _watch_adapters(self) -> None:
        """Find the adapters in training, and set up their observer."""
        self._adapters = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, MultiHeadAdapter) and module.trains
        }
        self._trained_names = list(self.model.active_adapters)
        self._routings: list[Routing] = list({id(a.routing): a.routing for a in self._adapters.values()}.values())
        if not self.args.train_a:
            for adapter in self._adapters.values():
                adapter.A.requires_grad_(False)
        check_parallelism(self.args, self.accelerator.parallelism_config)
        check_optimizer(self.args, self.optimizer)
        warn_of_decay(self.args, self._adapters.values())
        if self.is_deepspeed_enabled:
            engine_config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            check_deepspeed_settings(engine_config, self.args.nan_policy)
            check_deepspeed_optimizer(engine_config, self.args, list(self._adapters.values()))

        tasks = self._task_data.names
        self._observer = StepObserver(self._adapters, tasks, self.args, self.model, lambda: self.accelerator)
        self.kept_states["tasks"] = KeptState(self._note_tasks_seen, self._observer.load_tasks_seen)
        self.kept_states["head_sums"] = KeptState(self._observer.head_sums, self._observer.load_head_sums)
        if tasks:
            logger.info(f"Training on {len(tasks)} tasks: {', '.join(tasks)}")

    @property
    def mixture(self) -> TaskMixture | None:
        """The rows that an epoch draws from each task; `None` if they are unknown before training (streams)."""
        return self._task_data.mixture

    def _adapter_config(self) -> RLoraConfig:
        return self.model.peft_config[self.model.active_adapter]

    def _propagate_task_names(self, model: PeftModel) -> None:
        """Pass the names of the tasks to the layers of the adapter."""
        for module in model.modules():
            if isinstance(module, RLoraLayer) and model.active_adapter in module.rlora_adapters:
                adapter: Any = module.rlora_adapters[model.active_adapter]
                adapter.routing.tasks = tuple(self._task_data.names)

    def _check_pictures(self) -> None:
        """Check data with images, which TRL does not prepare."""
        evaluation = self.eval_dataset if isinstance(self.eval_dataset, Mapping) else {"eval": self.eval_dataset}
        text = self.args.dataset_text_field
        self._set_signature_columns_if_needed()
        is_removed = self.args.remove_unused_columns and text not in self._signature_columns
        for name, dataset in {"train": self.train_dataset, **evaluation}.items():
            if dataset is not None:
                check_pictures(dataset, f"The dataset {name!r}", text_column=None if is_removed else text)

    # The task of each row, from the data to the batch

    def _prepare_dataset(
        self,
        dataset: AnyDataset,
        processing_class: Any,
        args: RLoraSFTConfig,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> AnyDataset:
        name = dataset_name if self._evaluated is None else self._evaluated.name or dataset_name

        def prepare(dataset: AnyDataset, args: RLoraSFTConfig, packing: bool) -> AnyDataset:
            return super(RLoraSFTTrainer, self)._prepare_dataset(
                dataset, processing_class, args, packing, formatting_func, name
            )

        return self._task_data.prepare(
            dataset, name, args, packing, any_format=formatting_func is not None, prepare=prepare
        )

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = self._task_data.sampler
        return super()._get_train_sampler(*args, **kwargs) if sampler is None else sampler

    def get_train_dataloader(self) -> DataLoader:
        dataloader = super().get_train_dataloader()
        if self._task_data.sampler is not None and hasattr(dataloader, "set_sampler"):
            # In several processes accelerate's `set_epoch` does not find the sampler of a loader that skips batches
            # (resuming), because it searches one level too few (accelerate#3556; no issue for this case as of 1.15).
            dataloader.set_sampler(self._task_data.sampler)
        return dataloader

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        # Only while the loader is created: elsewhere TRL checks the class of the collator.
        collator: Any = self.data_collator  # type: ignore[has-type]
        self.data_collator = TaskCollator(collator, required=self._task_data.routes_by_task)
        try:
            return super()._get_dataloader(*args, **kwargs)
        finally:
            self.data_collator = collator

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns  # type: ignore[has-type]
        if TASK_IDS not in columns:
            self._signature_columns = [*columns, TASK_IDS]

    def _describe_data(self) -> Any:
        return self._task_data.describe(self.train_dataset)

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        self._check_same_adapters()
        if self.mixture is not None and self.is_world_process_zero():
            self._show(self.mixture.table())
        is_fresh = self._is_new_adapter and not resume_from_checkpoint and self.state.global_step == 0
        with self._observer.watching_first_step(is_fresh=is_fresh):
            output = super().train(resume_from_checkpoint, *args, **kwargs)

        seen = self._note_tasks_seen()
        if isinstance(self.train_dataset, IterableDataset):
            # Tasks that the adapter was trained on before need no rows in this run.
            earlier = self._task_data.earlier
            warn_of_unseen_tasks({task: counts for task, counts in seen.items() if task not in earlier})
        best = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and best is not None:
            self._run_record.take_metrics(self.state.global_step, AdapterRecord.load(self._adapter_folder(best)))
        self.measure_head_weights()
        return output

    def _begin_attempt(self) -> None:
        super()._begin_attempt()
        self._run_record.forget_metrics()
        self._observer.restart()
        # TRL counts tokens over attempts (1.16; no upstream issue).
        self._total_train_tokens = 0
        self._metrics["train"].clear()

    def _check_same_adapters(self) -> None:
        """
        Check that the adapters in training are those that the trainer was created with.

        The optimizer, the counts and the record belong to these adapters.

        Raises:
            ValueError: If other adapters are active, or these were removed, frozen or disabled.
        """
        active = list(self._peft_model().active_adapters)
        present = {id(module) for module in self.model.modules()}
        replaced = any(id(adapter) not in present for adapter in self._adapters.values())
        trains = any(adapter.trains for adapter in self._adapters.values()) or not self._adapters
        if active == self._trained_names and trains and not replaced:
            return
        made_for, now = (", ".join(map(repr, names)) for names in (self._trained_names, active))
        state = "it was removed from the model" if replaced else "it is frozen or disabled"
        state = state if active == self._trained_names else f"adapter {now} is active"
        raise ValueError(
            f"The trainer was created for adapter {made_for}, and its optimizer holds those parameters, but now "
            f"{state}: nothing would train. Create a new trainer, or {how_to_train(self._trained_names)}."
        )

    def _show(self, text: str) -> None:
        if self.args.disable_tqdm:
            logger.info(text)
        else:
            tqdm.write(text)

    def _will_log(self) -> bool:
        """Whether the running step will be logged."""
        step = self.state.global_step + 1
        # `DefaultFlowCallback` decides at the end of a step, but for this strategy at the end of an epoch.
        if self.args.logging_strategy == IntervalStrategy.EPOCH:
            epochs = max(1, self.state.num_train_epochs or 1)
            at_end = step % max(1, self.state.max_steps // epochs) == 0 or step == self.state.max_steps
            return at_end or (step == 1 and self.args.logging_first_step)
        state = copy.copy(self.state)
        state.global_step = step
        return DefaultFlowCallback().on_step_end(self.args, state, TrainerControl()).should_log

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        will_log = self._observer.monitor is not None and self._will_log()
        self._observer.begin_step(batches, will_log=will_log, ranks_alike=self.get_tp_size())
        return batches, num_items

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch = {name: value for name, value in inputs.items() if name not in (TASK_IDS, ROW_STARTS, TOKEN_MASK)}
        options = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        if not self.model.training:
            with self._batch_context(inputs):
                return super().compute_loss(model, batch, **options)

        tally = None
        if self._observer.records_step:
            # A loss that is not divided by the tokens of the step is divided by the number of micro-batches.
            undivided = num_items_in_batch is not None or self.compute_loss_func is not None
            tally = self._observer.tally(inputs, 1 if undivided else self.current_gradient_accumulation_steps)
        base_model = self.model.get_base_model()
        with ExitStack() as forward:
            # Until the backward pass of the step has ended: compiled layers that are recomputed read it again.
            (self._micro_batch or forward).enter_context(self._batch_context(inputs, tally))
            forward.enter_context(self._observer.reading_outputs(base_model, inputs))
            result = super().compute_loss(model, batch, **options)
        if tally is None:
            return result
        if return_outputs:
            return capture_loss_grad(result[0], tally), result[1]
        return capture_loss_grad(result, tally)

    @contextmanager
    def _batch_context(self, inputs: dict[str, Any], tally: RoutingTally | None = None) -> Generator[None, None, None]:
        """Give the layers the tasks and the padding of a batch."""
        mask, batch = token_mask_of(inputs), describe_batch((), inputs)
        tuner, task_ids = self.model.base_model, inputs.get(TASK_IDS)
        if task_ids is not None and isinstance(tuner, RLoraModel):
            tuner.check_picture_tasks(batch, task_ids)
        draws_seed = self.model.training and self._recomputes_with_other_seeds
        values = {
            "task_ids": task_ids,
            "token_mask": None if mask is None else mask.to(torch.uint8),
            "tally": tally,
            "lengths": () if batch is None else batch.lengths,
        }
        seeds = [draw_seed() if draws_seed else None for _ in self._routings]
        with using_all([(r, {**values, "seed": seed}) for r, seed in zip(self._routings, seeds, strict=True)]):
            yield

    @property
    def _recomputes_with_other_seeds(self) -> bool:
        """
        Whether recomputed layers would draw other dropout masks: accelerate's checkpointing does not restore the state
        of random numbers (no upstream issue as of 1.15).
        """
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        return plugin is not None and bool(plugin.activation_checkpointing)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        try:
            with ExitStack() as self._micro_batch:
                loss = super().training_step(*args, **kwargs)
            if self.is_fsdp_enabled and not self.accelerator.sync_gradients:
                wait_for_backward(self.args.device)
        finally:
            self._micro_batch = None
            for routing in self._routings:
                routing.forget_batch()
        if not self.accelerator.sync_gradients:
            return loss

        self._observer.end_step(is_skipped=self._skips_step(), will_log=self._will_log())
        return loss

    def _skips_step(self) -> bool:
        """Whether the step is skipped because its gradients are not finite."""
        step = self.state.global_step + 1
        if not self.is_deepspeed_enabled:
            # The gradient scaler (fp16) skips such steps itself.
            return self.accelerator.scaler is None and self._observer.nan_guard.look(step)
        if self.model_wrapped.fp16_enabled():
            return False
        return self._observer.nan_guard.look(step, skipped_by_engine=self.accelerator.optimizer_step_was_skipped)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if fresh:
            self._task_router_rate = set_learning_rates(optimizer, list(self._adapters.values()), self.args)
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.model.training and "loss" in logs:
            self._observer.extend_logs(logs)
        super().log(logs, *args, **kwargs)

    # Evaluation by task

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        is_own = eval_dataset is None or isinstance(eval_dataset, str)
        option_rows = self._option_rows
        if not is_own:
            eval_dataset = split_by_task(eval_dataset, self.args.task_column)
            option_rows = find_option_rows(eval_dataset, self.args.task_column)
            eval_dataset = self._task_data.number_evaluation(eval_dataset)
        datasets = self.eval_dataset if eval_dataset is None else eval_dataset
        tasks = list(datasets) if isinstance(datasets, Mapping) else []
        stopping = EarlyStopping(self.callback_handler, self.args, tasks, metric_key_prefix)
        try:
            if not isinstance(datasets, Mapping):
                evaluated = _Evaluated("", option_rows.get(eval_dataset if isinstance(eval_dataset, str) else ""))
                # Only the regular evaluation may stop training.
                waiting = nullcontext() if metric_key_prefix == "eval" else stopping.at_task(metric_key_prefix)
                with waiting:
                    return self._evaluate_one(evaluated, eval_dataset, ignore_keys, metric_key_prefix)

            metrics: dict[str, float] = {}
            for task, dataset in datasets.items():
                prefix = f"{metric_key_prefix}_{task}"
                evaluated = _Evaluated(task, option_rows.get(task))
                with stopping.at_task(prefix):
                    metrics |= self._evaluate_one(evaluated, task if is_own else dataset, ignore_keys, prefix)
            self.note_metrics(metrics, datasets)
            return self._add_means(metrics, tasks, metric_key_prefix, stopping)
        finally:
            self._task_data.report_lost_rows()

    def note_metrics(self, metrics: Mapping[str, float], datasets: Any) -> None:
        """
        Record metrics of the current weights for the adapter's record. `evaluate` calls it with its metrics.

        Args:
            metrics (`Mapping[str, float]`): `eval_<task>_accuracy`, `eval_<task>_loss` or `eval_<task>_base_accuracy`.
            datasets (`Mapping`): The data that was evaluated, by task.
        """
        self._run_record.note_metrics(self.state.global_step, metrics, self._task_data.names, datasets)

    def _evaluate_one(
        self, evaluated: _Evaluated, dataset: Any, ignore_keys: list[str] | None, prefix: str
    ) -> dict[str, float]:
        before, self._evaluated = self._evaluated, evaluated
        try:
            with self._counting_heads():
                return super().evaluate(dataset, ignore_keys, prefix)
        finally:
            self._evaluated = before

    def _add_means(
        self, metrics: dict[str, float], tasks: list[str], prefix: str, stopping: EarlyStopping
    ) -> dict[str, float]:
        means = mean_over_tasks(metrics, tasks, prefix)
        if means:
            self.log(dict(means))
            # For callbacks that use the mean over tasks, such as `EarlyStoppingCallback`.
            control: Any = self.control  # type: ignore[has-type]
            with stopping.at_means(metrics, means):
                self.control = self.callback_handler.on_evaluate(self.args, self.state, control, dict(means))
        return {**metrics, **means}

    @contextmanager
    def _counting_heads(self) -> Generator[None, None, None]:
        callbacks = [cb for cb in self.callback_handler.callbacks if isinstance(cb, HeadUsageCallback)]
        for callback in callbacks:
            callback.start(self.model, self.args.device)
        try:
            yield
        finally:
            for callback in callbacks:
                callback.stop()

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._evaluated is not None and self._evaluated.option_rows is not None:
            output.metrics[f"{metric_key_prefix}_accuracy"] = self._accuracy(self._evaluated.option_rows)
        return output

    def _accuracy(self, scored: OptionRows) -> float:
        """The share of rows whose completion is the most likely of its options. On all ranks."""
        # With DeepSpeed and FSDP a forward pass needs all ranks, so each rank scores every row.
        share_rows = not self._is_deepspeed_or_fsdp
        with self._raise_on_all_ranks():  # a row that can't be scored belongs to one rank
            counts = count_correct_options(
                self.model_wrapped if self.is_fsdp_enabled else self.model,
                self.processing_class,
                scored,
                batch_size=self.args.eval_batch_size,
                accelerator=self.accelerator,
                share_rows=share_rows,
                routings=self._routings,
                max_length=self.args.max_length,
            )
        total = torch.tensor(counts, device=self.args.device)
        correct, rows = (self._observer.reduce(total) if share_rows else total).tolist()
        return correct / rows

    def measure_head_weights(self, rows: int | None = None) -> HeadWeights | None:
        """
        Measure the mean head weights of each task on rows of the training data. Call it on all ranks.

        Later saves record the result. Training ends with such a measurement.

        Args:
            rows (`int`, *optional*): Rows of each task (with packing: packed rows per task). Defaults to
                `args.mixture_rows`.

        Returns:
            [`HeadWeights`], or `None` for an adapter without a router, or data without tasks.
        """
        data = self._task_data.sample_rows(self.train_dataset, self.args.mixture_rows if rows is None else rows)
        if data is None or not any(adapter.router is not None for adapter in self._adapters.values()):
            return None
        callback = HeadUsageCallback(self._task_data.names)
        with self._in_eval_mode() as model:
            callback.start(self.model, self.args.device)
            try:
                # Not `get_eval_dataloader`, which may return a loader that is kept for evaluation. Batches are as
                # large as in training, where they fit.
                loader = self._get_dataloader(data, "head weights", self.args.train_batch_size, self._get_eval_sampler)
                for inputs in loader:
                    self.prediction_step(model, inputs, prediction_loss_only=True)
                measured = callback.head_weights()
            finally:
                callback.stop()
        if measured is not None:
            self._run_record.head_weights = measured
        return self._run_record.head_weights

    def measure_mixtures(self, rows: int | None = None) -> HeadWeights | None:
        """Deprecated name of [`measure_head_weights`]."""
        warnings.warn(
            "`measure_mixtures` is now `measure_head_weights`, and the old name will be removed in 0.2.",
            FutureWarning,
            stacklevel=2,
        )
        return self.measure_head_weights(rows)

    @contextmanager
    def _in_eval_mode(self) -> Generator[nn.Module, None, None]:
        """The model in eval mode, for passes that leave no trace in the metrics or the base weights."""
        model, was_training = self.model_wrapped, self.model.training
        metrics, self._metrics["eval"] = self._metrics["eval"], defaultdict(list)
        model.eval()
        try:
            with kept_quantized(self.model):
                yield model
        finally:
            self._metrics["eval"] = metrics
            model.train(was_training)

    # What checkpoints keep

    def tasks_seen(self) -> dict[str, dict[str, int]]:
        """
        Rows and tokens of each task since training began, including the part before a resume.

        Call it on all ranks.
        """
        return self._observer.tasks_seen()

    def _note_tasks_seen(self) -> dict[str, dict[str, int]]:
        self._run_record.seen = self.tasks_seen()
        return self._run_record.seen

    # Record, card, publishing

    def adapter_record(self) -> AdapterRecord:
        """The record of the adapter and its training; see [`AdapterRecord`]."""
        step, settings = self.state.global_step, self._run_settings
        return self._run_record.build(
            self.args,
            self._adapter_config(),
            self.model,
            self._task_data.names,
            step=step,
            hyperparameters=settings.recorded(step) if settings.parts else select_hyperparameters(self.args),
            base_commit=self._base_commit,
        )

    def _find_base_commit(self) -> str | None:
        config = self._adapter_config()
        if not self._loads_base and config.revision is None:
            return None  # a loaded model does not record its revision
        cache_dir = (self.args.model_init_kwargs or {}).get("cache_dir") if self._loads_base else None
        return loaded_commit(config.base_model_name_or_path, config.revision, cache_dir)

    def _write_beside(self, folder: Path, destination: Path) -> None:
        record = self.adapter_record()
        record.save(self._adapter_folder(folder))
        # PEFT has written its card into the folder. Hand-written text is in the card at the destination.
        self._write_card(
            self._adapter_folder(folder), record, read_card(self._adapter_folder(destination) / CARD_NAME)
        )

    def _write_card(
        self, folder: Path, record: AdapterRecord, existing: str | None, tags: Any = None, datasets: Any = None
    ) -> None:
        write_card(
            folder / CARD_NAME,
            self._adapter_config(),
            record,
            repo_id=self.hub_model_id,
            num_parameters=count_trainable(self.model),
            datasets=[*as_list(datasets), *as_list(self._run_record.dataset_name)],
            tags=[*self._tag_names, *as_list(tags)],
            existing=existing,
        )

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """
        Write the adapter's card into the output folder. Hand-written text in it stays.

        Args:
            model_name (`str`, *optional*): Not used: the title of a card is the name of its repository.
            dataset_name (`str` or `list[str]`, *optional*): Datasets on the Hub, for the metadata.
            tags (`str` or `list[str]`, *optional*): Tags, for the metadata.
        """
        if self.is_world_process_zero():
            folder = self._adapter_folder(self.args.output_dir)
            self._write_card(folder, self.adapter_record(), read_card(folder / CARD_NAME), tags, dataset_name)

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

        Call it on all ranks, as in `Trainer`. Only the files of the adapter are uploaded.

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
            ValueError: If `exports` is set, and the model is sharded or the push runs in the background.
        """
        sharded = is_sharded(self.model, self.is_fsdp_enabled)
        if kwargs.get("exports") and (sharded or not blocking):
            where = "for a model that is sharded over processes" if sharded else "in the background"
            raise ValueError(
                f"`exports` can't be made {where}: an export runs the full model. Push without `exports`, then call "
                f"`push_adapter({self.args.output_dir!r}, {self.args.hub_model_id!r}, exports=[...])` in one process."
            )
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self._make_repository(token, private)

        # Metadata of the card; its title is always the name of the repository
        kwargs.pop("model_name", None)
        datasets = [*as_list(kwargs.pop("dataset_name", None)), *as_list(kwargs.pop("datasets", None))]
        tags = [*self._tag_names, *as_list(kwargs.pop("tags", None)), *as_list(self.model.model_tags)]

        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        options = {
            "commit_message": commit_message or "End of training",
            "revision": revision if revision is not None else self.args.hub_revision,
            "token": token if token is not None else self.args.hub_token,
            "private": private if private is not None else self.args.hub_private_repo,
            "base_model": self.args.hub_base_model,
            "tags": list(dict.fromkeys(tags)),
            "datasets": [*datasets, *as_list(self._run_record.dataset_name)],
            "export_from": None if sharded else self.accelerator.unwrap_model(self.model),
            "export_data": rows_to_measure(self._option_rows),
            "tokenizer": self.processing_class,
            **kwargs,
        }
        folder = self._adapter_folder(self.args.output_dir)
        if blocking:
            return push_adapter(folder, self.hub_model_id, **options)
        return push_copy(self._hub_api, folder, self.hub_model_id, options)

    def _make_repository(self, token: str | None, private: bool | None) -> None:
        # `init_hf_repo` has a parameter `private` in transformers 5.23 and not in 5.17, the floor, with which this
        # ends (transformers#33492).
        before = self.args.hub_private_repo
        self.args.hub_private_repo = before if private is None else private
        try:
            self.init_hf_repo(token=token)
        finally:
            self.args.hub_private_repo = before

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push the adapter of a checkpoint (`hub_strategy="every_save"`)."""
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
        job = push_copy(self._hub_api, self._adapter_folder(checkpoint_folder), self.hub_model_id, options)
        if running is not None:
            running.jobs.append(job)
        else:
            self.push_in_progress = PushInProgress([job])
