"""`RLoraSFTTrainer`: TRL's `SFTTrainer` for R-LoRA adapters and data sets of several tasks."""

from __future__ import annotations

import copy
import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset, concatenate_datasets
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainingArguments, set_seed
from transformers.trainer_utils import IntervalStrategy
from trl import pack_dataset

from ..evaluation.columns import tells_tasks
from ..evaluation.data import check_pictures, check_rows
from ..kernels import RoutingTally, capture_loss_grad, draw_seed
from ..tuner import MultiHeadAdapter, RLoraConfig, RLoraLayer, Routing
from ..tuner.batch import describe_batch
from ..tuner.targets import refuse_token_rows_of_head
from .callbacks import HeadUsageCallback
from .config import RLoraSFTConfig
from .early_stopping import EarlyStopping
from .given_model import active_config, choose_peft_config, how_to_train, name_revision
from .gradients import FirstGradients, gradient_norms
from .ledger import TaskLedger
from .lost_rows import LostRows, rows_of_tasks, warn_of_unseen_tasks
from .mixing import MixtureSampler, PartSampler, TaskMixture, count_tasks, mix_streams
from .monitor import RoutingMonitor, head_similarity
from .nan_policy import NanGuard, check_deepspeed_settings
from .optimizer import set_learning_rates
from .publishing import PublishingTrainer, check_publishing
from .run_settings import describe_data
from .sharding import keep_adapters_wide, keep_outputs_wide, wait_for_backward
from .task_evaluation import OptionRows, count_correct_options, find_option_rows, mean_over_tasks, split_by_task
from .task_ids import (
    ROW_STARTS,
    TASK_IDS,
    TOKEN_MASK,
    TaskCollator,
    count_tokens,
    ids_of,
    is_packed,
    number_alike,
    number_tasks,
    spread_over_tokens,
    token_mask_of,
)
from .tasks import AnyDataset, collect_tasks, columns_of, has_transform, task_names


logger = get_logger(__name__)

# Epochs whose draws are packed ahead.
_PACKED_EPOCHS = 16


class RLoraSFTTrainer(PublishingTrainer):
    """
    Supervised fine-tuning of one model on many tasks with an R-LoRA adapter.

    Everything that `trl.SFTTrainer` does works as it does there. What differs:

    - `train_dataset` may also be a dictionary of data sets by task, which are joined and mixed (`args.mixing`), or a
      data set with a column (`args.task_column`) that names the task of each row. The tasks' names are saved with the
      adapter, and the task of each row reaches the layers (`RLoraConfig(router="task")`), whatever the packing.
    - `peft_config` defaults to `RLoraConfig()`.
    - `args.balance_loss` adds a loss that keeps all heads in use; the evaluation loss does not have it.
    - Logs have `balance_loss`, `router_entropy`, `head_load_max`, `head_load_cv`, `head_similarity`, the norms
      `grad_norm_A`, `grad_norm_B`, `grad_norm_router`, and for each task `<task>_loss`.
    - Evaluation by task gives `eval_<task>_loss`, and `eval_<task>_accuracy` where rows have `options` (the completion
      must be the most likely of them), with their means over tasks as `eval_loss` and `eval_accuracy`.
    - Adapters train in float32 on a quantized base too, where `SFTTrainer` casts what trains to bfloat16: the
      update of a weight can be smaller than bfloat16 resolves, and R-LoRA's anchor must agree with its initial
      weights. (`modules_to_save` and other trained parameters are left as `SFTTrainer` casts them.)

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
            Evaluation data. A dictionary, or a data set with the task column, gives metrics for each task.
        quantization_config (`BitsAndBytesConfig`, *optional*):
            As in `SFTTrainer`: how to quantize a model given by name.
        peft_config ([`RLoraConfig`], *optional*):
            The adapter, for a `model` that has none. It is copied, not changed.
        kwargs:
            All other arguments of `SFTTrainer`.

    Raises:
        TypeError: If the adapter is not an R-LoRA adapter.
        ValueError: If a task is empty, formats of tasks differ, the task column is missing, or preparation leaves no
            row of all tasks or, with `router="task"`, of one.
    """

    train_dataset: Any
    eval_dataset: Any

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
        args = _as_rlora_config(args, model)
        peft_config = choose_peft_config(model, peft_config)
        self._loads_base = isinstance(model, str)
        if self._loads_base and peft_config is not None:
            name_revision(peft_config, args.model_init_kwargs)
        _check_devices(args)
        check_publishing(args, model if isinstance(model, str) else getattr(model.config, "_name_or_path", None))
        self._set_up_publishing(train_dataset, args.task_column, None if peft_config else active_config(model))
        tasks: list[str] | None
        # `collect_tasks` checks rows that are not streamed, and names them by their task.
        self._rows_are_checked = isinstance(train_dataset, Mapping) and not any(
            isinstance(dataset, IterableDataset) for dataset in train_dataset.values()
        )
        any_format = kwargs.get("formatting_func") is not None
        mixed = mix_streams(train_dataset, args, any_format=any_format)
        if mixed is not train_dataset:
            train_dataset, tasks = mixed, task_names(train_dataset)
        else:
            train_dataset, tasks = collect_tasks(
                train_dataset,
                task_column=args.task_column,
                text_column=args.dataset_text_field,
                seed=args.seed,
                any_format=any_format,
            )
        config = peft_config if peft_config is not None else active_config(model)
        _check_balance(args, config)
        # Tasks that were trained on before stay recorded, whatever this run has of them.
        self._earlier_tasks = frozenset() if peft_config is not None else frozenset(config.tasks or ())
        self._tasks = _name_tasks(config, tasks, is_new=peft_config is not None)
        config.tasks = list(self._tasks) or None
        if peft_config is None:
            self._tell_adapters_their_tasks(model)
        self._is_new_adapter = peft_config is not None
        self._task_column = args.task_column
        self.mixture: TaskMixture | None = None
        self._mixture_sampler: MixtureSampler | PartSampler | None = None
        eval_dataset = split_by_task(eval_dataset, args.task_column)
        _check_eval_tasks(eval_dataset, tasks)
        self._option_rows = find_option_rows(eval_dataset, args.task_column)
        self._given_rows: dict[str, OptionRows] | None = None
        self._scored: OptionRows | None = None
        self._stopping: EarlyStopping | None = None
        is_stream = isinstance(train_dataset, IterableDataset)  # whose names come with its rows
        if tasks is not None or is_stream or config.router == "task":
            train_dataset = self._with_task_ids(train_dataset, required=config.router == "task")
        # How `_prepare_dataset`, which is told a name alone, knows it from evaluation data named "train".
        self._training_data: Any = train_dataset
        self._routes_by_task = config.router == "task"
        self._lost_rows = LostRows(
            args.max_length, labels_are_used=data_collator is None, routes_by_task=self._routes_by_task
        )
        loaded = {p: p.data for p in model.parameters()} if isinstance(model, PeftModel) else {}

        super().__init__(
            model,
            args,
            data_collator,
            train_dataset,
            self._number_eval(eval_dataset),
            *positional,
            quantization_config=quantization_config,
            peft_config=peft_config,
            **kwargs,
        )
        refuse_token_rows_of_head(self.model)
        self._training_data = None
        if self._is_vision_dataset and data_collator is None:
            self._check_pictures()
        self._settle_lost_rows()
        self._set_up_checkpoints()
        self._undo_bf16_cast(loaded)
        self._set_up_adapters()
        self._set_up_tasks()

    def _set_up_adapters(self) -> None:
        """Find what trains, and what is recorded of it."""
        self._adapters = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, MultiHeadAdapter) and module.trains
        }
        if not self.args.train_a:
            for adapter in self._adapters.values():
                adapter.A.requires_grad_(False)
        self._trained_adapters = list(self.model.active_adapters)
        routers = [adapter for adapter in self._adapters.values() if adapter.router is not None]
        self._routings: list[Routing] = list({id(a.routing): a.routing for a in self._adapters.values()}.values())
        self._monitor = None
        if routers:
            self._monitor = RoutingMonitor(
                routers,
                self.args.balance_loss,
                self.args.balance_coef,
                self.args.balance_scope == "global",
                self.args.device,
            )
        parallelism = self.accelerator.parallelism_config
        if self._balances and parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            raise NotImplementedError(
                f"`balance_loss={self.args.balance_loss!r}` does not count tokens under context or sequence "
                'parallelism yet. Set `balance_loss="none"`, or use data parallelism.'
            )
        if self.optimizer is not None and (self.args.router_learning_rate or self.args.loraplus_lr_ratio):
            raise ValueError(
                "`router_learning_rate` and `loraplus_lr_ratio` set up the optimizer, and one was passed ready-made "
                "in `optimizers`. Give it parameter groups of your own, or choose it by `optim`."
            )
        if self.is_deepspeed_enabled:
            check_deepspeed_settings(self.accelerator.state.deepspeed_plugin.deepspeed_config, self.args.nan_policy)
        self._nan_guard = NanGuard(self.args.nan_policy, self.model)
        self._records_step = False
        self._extra_logs: dict[str, float] = {}
        self._first_gradients: FirstGradients | None = None

    def _set_up_tasks(self) -> None:
        """Names of tasks in the adapter, counts by task, and the mixture that an epoch draws."""
        if self._tasks:
            logger.info(f"Training on {len(self._tasks)} tasks: {', '.join(self._tasks)}")
        self._ledger = TaskLedger(self._tasks, self.args.device) if self._tasks else None
        self._fused_outputs: Any = None
        numbered = isinstance(self.train_dataset, Dataset) and TASK_IDS in self.train_dataset.column_names
        if numbered and not self.args.packing and self.mixture is None:
            self.mixture = self._plan_mixture(self.train_dataset)
            if self.args.mixes_tasks:
                self._check_sampling(self.args)
                self._mixture_sampler = self._sample_mixture(self.train_dataset, self.args)
        if self.args.mixes_tasks and self.mixture is None and isinstance(self.train_dataset, Dataset):
            raise ValueError(
                f"`mixing={self.args.mixing!r}` mixes tasks, and the training data has no column of tasks. Pass a "
                "dictionary of data sets by task, or set `task_column` to the column that names them."
            )

    def _tell_adapters_their_tasks(self, model: PeftModel) -> None:
        """Give the layers of a loaded adapter the names of the tasks that this run adds."""
        for module in model.modules():
            if isinstance(module, RLoraLayer) and model.active_adapter in module.rlora_adapters:
                adapter: Any = module.rlora_adapters[model.active_adapter]
                adapter.routing.tasks = tuple(self._tasks)

    @property
    def _balances(self) -> bool:
        return self.args.balance_loss != "none" and self.args.balance_coef > 0

    def _undo_bf16_cast(self, loaded: dict[nn.Parameter, torch.Tensor]) -> None:
        """
        Give adapters on a quantized base the float32 values back that `SFTTrainer.__init__` rounded to bfloat16.

        Values that were there before come from `loaded`; an adapter created in between is drawn anew from the seed, on
        the CPU, so that it is the same one under every strategy.

        TRL casts what trains on a quantized base (peft#2889) and leaves out DoRA's magnitudes, which bfloat16 freezes
        (trl#7268); other adapters can't ask for that as of trl 1.16.
        """
        adapters = [module for module in self.model.modules() if isinstance(module, MultiHeadAdapter)]
        rounded = [adapter for adapter in adapters if adapter.A.dtype == torch.bfloat16]
        for parameter, data in loaded.items():
            if parameter.dtype != data.dtype:
                parameter.data = data
        quantized = getattr(self.model, "is_loaded_in_4bit", False) or getattr(self.model, "is_loaded_in_8bit", False)
        fresh = [adapter for adapter in rounded if adapter.A not in loaded]
        if fresh and quantized:
            set_seed(self.args.seed)
            for adapter in fresh:
                device = adapter.A.device
                adapter.to("cpu", torch.float32).reset_parameters()
                adapter.to(device)
        if self.is_deepspeed_enabled:
            self._cast_for_deepspeed(adapters)

    def _cast_for_deepspeed(self, adapters: list[MultiHeadAdapter]) -> None:
        """
        Cast adapters as DeepSpeed's engine will, which knows nothing of anchors.

        The engine keeps float32 values of what trains beside them, which are what is saved.
        """
        config = self.accelerator.state.deepspeed_plugin.hf_ds_config
        dtypes = {"bf16.enabled": torch.bfloat16, "fp16.enabled": torch.float16}
        for dtype in [dtype for name, dtype in dtypes.items() if config.is_true(name)]:
            for adapter in adapters:
                adapter.cast(dtype)

    # Data: the task of each row

    def _with_task_ids(self, dataset: Any, *, required: bool) -> Any:
        """The training data with the place of each row's task among the adapter's, where it tells the task."""
        told = self._tells_tasks(dataset)
        if self._tasks and told:
            # Only the stream of another router may have tasks that are not known: all others were asked for theirs.
            return number_tasks(dataset, self._tasks, self._task_column, unknown_allowed=not required)
        if required and dataset is not None:
            raise ValueError(
                '`router="task"` learns from the task of each row, and the training data has no column of tasks. Pass '
                "a dictionary of data sets by task, or a data set with a column (`task_column`) and, for a stream, "
                "`RLoraConfig(tasks=[...])`."
            )
        return dataset

    def _tells_tasks(self, dataset: Any) -> bool:
        is_data = isinstance(dataset, Dataset | IterableDataset)
        return is_data and self._task_column in columns_of(dataset) and tells_tasks(dataset, self._task_column)

    def _number_eval(self, dataset: Any) -> Any:
        """Evaluation data with the tasks of their rows, where they tell them: by a column, or by their key."""
        if isinstance(dataset, Mapping):
            return {name: self._number_one(data, name) for name, data in dataset.items()}
        return self._number_one(dataset, "")

    def _number_one(self, dataset: Any, name: str) -> Any:
        if not self._tasks or not isinstance(dataset, Dataset | IterableDataset) or TASK_IDS in columns_of(dataset):
            return dataset
        if self._tells_tasks(dataset):
            return number_tasks(dataset, self._tasks, self._task_column, unknown_allowed=True)
        return number_alike(dataset, self._tasks.index(name)) if name in self._tasks else dataset

    def _prepare_dataset(
        self,
        dataset: AnyDataset,
        processing_class: Any,
        args: RLoraSFTConfig,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> AnyDataset:
        is_training = dataset is self._training_data
        if is_packed(dataset):
            return dataset
        if formatting_func is None and not (is_training and self._rows_are_checked):
            dataset = check_rows(dataset, f"The data set {dataset_name!r}", text_column=args.dataset_text_field)
        dataset = self._lost_rows.renumber(dataset)
        # `evaluate` prepares its data once more for each data set of a dictionary.
        is_new = isinstance(dataset, Dataset) and not self._lost_rows.is_known(dataset)
        given = rows_of_tasks(dataset, len(self._tasks)) if is_new else None
        if not packing or TASK_IDS not in columns_of(dataset):
            dataset = super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
            return dataset if packing else self._drop_lost_rows(dataset, given, dataset_name, is_training)
        # TRL's packing keeps the tokens and their labels alone; so tasks are packed here, after all else.
        if args.max_length is None:
            raise ValueError("`packing=True` needs `max_length`, which is None. Set it to the length of a packed row.")
        unpacked = copy.copy(args)
        unpacked.max_length, unpacked.shuffle_dataset = None, False
        dataset = super()._prepare_dataset(dataset, processing_class, unpacked, False, formatting_func, dataset_name)
        cut_at = args.max_length if args.packing_strategy == "bfd" else None
        dataset = self._drop_lost_rows(dataset, given, dataset_name, is_training, cut_at)
        return self._pack(dataset, args, dataset_name, is_training)

    def _check_pictures(self) -> None:
        """Check data with pictures, which are not prepared."""
        evaluation = self.eval_dataset if isinstance(self.eval_dataset, Mapping) else {"eval": self.eval_dataset}
        text = self.args.dataset_text_field
        self._set_signature_columns_if_needed()
        is_removed = self.args.remove_unused_columns and text not in self._signature_columns
        for name, dataset in {"train": self.train_dataset, **evaluation}.items():
            if dataset is not None:
                check_pictures(dataset, f"The data set {name!r}", text_column=None if is_removed else text)

    def _drop_lost_rows(
        self, dataset: AnyDataset, given: Any, dataset_name: str, is_training: bool, cut_at: int | None = None
    ) -> AnyDataset:
        """Prepared data without the tasks of which nothing is left; rows that are lost are noted, for one warning."""
        if given is None or not isinstance(dataset, Dataset):
            return dataset
        if not is_training:
            return self._lost_rows.note_evaluation(dataset_name, dataset, given, self._tasks, cut_at)
        gone = self._lost_rows.note_training(dataset, given, self._tasks, cut_at)
        if not gone:
            return dataset
        self._tasks = self._lost_rows.forget(gone, self._tasks, self._earlier_tasks)
        numbered = self._lost_rows.renumber(dataset)
        # Where nothing is cut, rows without a label are still there.
        return numbered.select(np.flatnonzero(ids_of(numbered) >= 0))

    def _settle_lost_rows(self) -> None:
        """Warn of rows that preparation lost, and record the tasks that are left."""
        data, evaluation = self.train_dataset, self.eval_dataset
        is_ready = self._skip_prepare_dataset and isinstance(data, Dataset) and not has_transform(data)
        if is_ready and {TASK_IDS, "labels"} <= set(data.column_names):
            given = rows_of_tasks(data, len(self._tasks))
            self.train_dataset = self._drop_lost_rows(data, given, "train", is_training=True)
            if isinstance(evaluation, dict):
                self.eval_dataset = {name: self._lost_rows.renumber(part) for name, part in evaluation.items()}
            else:
                self.eval_dataset = self._lost_rows.renumber(evaluation)
        if self._lost_rows.places is not None:
            self._adapter_config().tasks = list(self._tasks) or None
            self._tell_adapters_their_tasks(self.model)
            self._lost_rows.places = None  # all that was numbered before has its new numbers
        self._lost_rows.tell()

    def _pack(self, dataset: AnyDataset, args: RLoraSFTConfig, dataset_name: str, is_training: bool) -> AnyDataset:
        """
        The last steps of `SFTTrainer._prepare_dataset`, with the task of each token beside the tokens, which TRL's
        packing drops (no upstream issue as of trl 1.16).
        """
        map_kwargs: dict[str, Any] = {}
        if isinstance(dataset, Dataset):
            map_kwargs = {"num_proc": args.dataset_num_proc, "desc": f"Packing {dataset_name} dataset"}
        with PartialState().main_process_first():
            if is_training and isinstance(dataset, Dataset):
                self.mixture = self._plan_mixture(dataset, args)
                if args.mixes_tasks:
                    return self._pack_epochs(dataset, args, map_kwargs)
            return _pack_rows(dataset, args, map_kwargs)

    def _pack_epochs(self, dataset: Dataset, args: RLoraSFTConfig, map_kwargs: dict[str, Any]) -> Dataset:
        """What each epoch draws, packed by itself, one after the other; the sampler goes through one in each epoch."""
        self._check_sampling(args)
        sampler = self._sample_mixture(dataset, args)

        def packed(epoch: int) -> Dataset:
            sampler.set_epoch(epoch)
            return _pack_rows(dataset.select(list(sampler)), args, map_kwargs)

        parts = [packed(0)]
        epochs = math.ceil(args.num_train_epochs)
        if args.max_steps > 0:
            rows = args.max_steps * args.gradient_accumulation_steps * args.train_batch_size
            epochs = math.ceil(rows * PartialState().num_processes / len(parts[0]))
        # Epochs beyond begin again with the first: the packed draws are all on disk.
        parts += [packed(epoch) for epoch in range(1, min(epochs, _PACKED_EPOCHS))]
        self._mixture_sampler = PartSampler([len(part) for part in parts], args.seed)
        return concatenate_datasets(parts)

    def _describe_data(self) -> Any:
        sampler = self._mixture_sampler
        # There is a part for each epoch, and a resumed run may have more of them.
        return describe_data(self.train_dataset, sampler.lengths[0] if isinstance(sampler, PartSampler) else None)

    def _sample_mixture(self, dataset: Dataset, args: RLoraSFTConfig) -> MixtureSampler:
        assert self.mixture is not None
        draws = [self.mixture.draws.get(task, 0) for task in self._tasks]
        return MixtureSampler(ids_of(dataset), draws, args.seed)

    def _plan_mixture(self, dataset: Dataset, args: RLoraSFTConfig | None = None) -> TaskMixture:
        args = self.args if args is None else args
        if "input_ids" in dataset.column_names:
            rows, tokens = count_tasks(dataset, len(self._tasks), TASK_IDS)
        elif args.mixing_unit == "tokens":
            raise ValueError(
                "`mixing_unit='tokens'` counts the column 'input_ids', and the training data has "
                f"{', '.join(name for name in dataset.column_names if name != TASK_IDS)}: rows with pictures, or with "
                "a transform, get their tokens when a batch is made. Set `mixing_unit='rows'`."
            )
        else:
            rows, tokens = rows_of_tasks(dataset, len(self._tasks))[:-1].tolist(), None
        present = [place for place, count in enumerate(rows) if count]
        return TaskMixture(
            {self._tasks[place]: rows[place] for place in present},
            tokens=None if tokens is None else {self._tasks[place]: tokens[place] for place in present},
            mixing=args.mixing,
            temperature=args.mixing_temperature,
            cap=args.mixing_cap,
            unit=args.mixing_unit,
        )

    def _check_sampling(self, args: RLoraSFTConfig) -> None:
        strategy = args.train_sampling_strategy
        if strategy != "random":
            raise ValueError(
                f"`mixing={args.mixing!r}` draws rows itself and can't go with "
                f"`train_sampling_strategy={strategy!r}`. Leave that at 'random'."
            )

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return self._mixture_sampler or super()._get_train_sampler(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        dataloader = super().get_train_dataloader()
        if self._mixture_sampler is not None and hasattr(dataloader, "set_sampler"):
            # accelerate's `set_epoch` does not find the sampler of a loader that skips batches (resuming) in several
            # processes, unless it is told: it looks one level less deep (accelerate#3556; no issue of this one as of
            # 1.15).
            dataloader.set_sampler(self._mixture_sampler)
        return dataloader

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        collator: Any = self.data_collator  # type: ignore[has-type]
        self.data_collator = TaskCollator(collator, required=self._routes_by_task)
        try:
            return super()._get_dataloader(*args, **kwargs)
        finally:
            self.data_collator = collator

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns  # type: ignore[has-type]
        if TASK_IDS not in columns:
            self._signature_columns = [*columns, TASK_IDS]

    # Training: what layers are told of a batch, and what they record

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        self._check_same_adapters()
        if self.mixture is not None and self.is_world_process_zero():
            self._show(self.mixture.table())
        self._is_first_run = self._is_new_adapter and not resume_from_checkpoint and self.state.global_step == 0
        self._watch_first_gradients()
        try:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._end_first_gradients(tell=False)
        if isinstance(self.train_dataset, IterableDataset):
            # Tasks that were trained on before need not come again.
            seen = self.tasks_seen()
            warn_of_unseen_tasks({task: counts for task, counts in seen.items() if task not in self._earlier_tasks})
        return result

    def _begin_attempt(self) -> None:
        super()._begin_attempt()
        self._metrics_step = None
        self._extra_logs = {}
        # TRL counts tokens over attempts (1.16; no upstream issue).
        self._total_train_tokens = 0
        self._metrics["train"].clear()
        self._nan_guard.restart()
        if self._monitor is not None:
            self._monitor.restart()
        if self._first_gradients is None or self._first_gradients.squares:  # of an attempt that was given up
            self._watch_first_gradients()

    def _watch_first_gradients(self) -> None:
        self._end_first_gradients(tell=False)
        scaled = self.accelerator.scaler is not None
        self._first_gradients = FirstGradients(self._adapters, fresh=self._is_first_run, scaled=scaled)

    def _check_same_adapters(self) -> None:
        """
        See that the adapters that train are those that the trainer was made for.

        Its optimizer holds their parameters, and its counts and records are theirs.

        Raises:
            ValueError: If others are active, or they don't train any more.
        """
        active = list(self._peft_model().active_adapters)
        present = {id(module) for module in self.model.modules()}
        replaced = any(id(adapter) not in present for adapter in self._adapters.values())
        trains = any(adapter.trains for adapter in self._adapters.values()) or not self._adapters
        if active == self._trained_adapters and trains and not replaced:
            return
        made_for, now = (", ".join(map(repr, names)) for names in (self._trained_adapters, active))
        state = "it was taken out of the model" if replaced else "it is frozen or disabled"
        state = state if active == self._trained_adapters else f"adapter {now} is active"
        raise ValueError(
            f"The trainer was made for adapter {made_for}, whose parameters its optimizer holds, and now {state}: "
            f"nothing would train. Make a new trainer for this, or go back: {how_to_train(self._trained_adapters)}."
        )

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        keep_outputs_wide(self.accelerator)
        prepared = super()._prepare_for_training(*args, **kwargs)
        keep_adapters_wide(self.model)
        return prepared

    def _show(self, text: str) -> None:
        if self.args.disable_tqdm:
            logger.info(text)
        else:
            tqdm.write(text)

    def _reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(tensor, "sum") if self.accelerator.num_processes > 1 else tensor

    def _will_log(self) -> bool:
        """Whether the step that is running ends in a log."""
        step = self.state.global_step + 1
        if step == 1 and self.args.logging_first_step:  # whatever the strategy
            return True
        if self.args.logging_strategy == IntervalStrategy.NO:
            return False
        if self.args.logging_strategy == IntervalStrategy.EPOCH:
            epochs = max(1, self.state.num_train_epochs or 1)
            return step % max(1, self.state.max_steps // epochs) == 0 or step == self.state.max_steps
        return step % max(1, int(self.state.logging_steps)) == 0

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        if not batches:
            return batches, num_items
        self._records_step = self._monitor is not None and (self._balances or self._will_log())
        if self._monitor is not None and self._records_step:
            tokens = torch.as_tensor(sum(count_tokens(batch) for batch in batches), dtype=torch.float32)
            alike = self.get_tp_size()  # ranks that have the same batch
            if self._balances:
                self._monitor.begin_step(tokens / alike, self.accelerator.num_processes // alike, self._reduce)
            else:
                self._monitor.begin_step(tokens, 1, lambda tensor: tensor)
        return batches, num_items

    def _set_batch_context(self, inputs: dict[str, Any], tally: RoutingTally | None) -> None:
        """Hand the tasks and the padding of a batch to the layers; they stay until the backward pass is over."""
        mask, batch = token_mask_of(inputs), describe_batch((), inputs)
        lengths = () if batch is None else batch.lengths
        for routing in self._routings:
            one_seed = self._recomputes_with_other_seeds and self.model.training
            routing.update(
                task_ids=inputs.get(TASK_IDS),
                token_mask=None if mask is None else mask.to(torch.uint8),
                tally=tally,
                seed=draw_seed() if one_seed else None,
                lengths=lengths,
            )

    @property
    def _recomputes_with_other_seeds(self) -> bool:
        """
        Whether recomputed layers would draw other dropout masks: accelerate's checkpointing does not restore the state
        of random numbers (no upstream issue as of 1.15).
        """
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        return plugin is not None and bool(plugin.activation_checkpointing)

    def _clear_batch_context(self) -> None:
        for routing in self._routings:
            routing.forget_batch()

    def _keep_fused_outputs(self, module: nn.Module, args: Any, outputs: Any) -> None:
        if self._ledger is None or not module.training:
            return
        # A loss function of the user's and label smoothing run the model twice; only the pass with the fused head
        # matters then, and the logits of the other are not kept alive.
        if getattr(outputs, "log_probs", None) is not None:
            self._fused_outputs = outputs
        elif self._fused_outputs is None and not self._ledger.has_log_probs:
            self._fused_outputs = outputs

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        is_training = self.model.training
        tally = None
        if is_training and self._monitor is not None and self._records_step:
            # Where the loss is not divided by the tokens of the step, the trainer divides it by its micro-batches.
            undivided = num_items_in_batch is not None or self.compute_loss_func is not None
            divided_by = 1 if undivided else self.current_gradient_accumulation_steps
            tally = self._monitor.tally(divided_by, count_tokens(inputs))
        self._set_batch_context(inputs, tally)
        own = {name: value for name, value in inputs.items() if name not in (TASK_IDS, ROW_STARTS, TOKEN_MASK)}
        # For the length of the pass alone: a model that holds on to its trainer can't be copied or pickled.
        hook = self.model.get_base_model().register_forward_hook(self._keep_fused_outputs)
        try:
            result = super().compute_loss(
                model, own, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
            self._note_tasks(inputs, is_training)
        finally:
            hook.remove()
            self._fused_outputs = None
            if not is_training:
                self._clear_batch_context()
        if tally is None:
            return result
        if return_outputs:
            return capture_loss_grad(result[0], tally), result[1]
        return capture_loss_grad(result, tally)

    def _note_tasks(self, inputs: dict[str, Any], is_training: bool) -> None:
        if is_training and self._ledger is not None and TASK_IDS in inputs:
            self._ledger.note(inputs, self._fused_outputs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        try:
            loss = super().training_step(*args, **kwargs)
            if self.is_fsdp_enabled and not self.accelerator.sync_gradients:
                wait_for_backward(self.args.device)
        finally:
            self._clear_batch_context()
        if self.accelerator.sync_gradients and self._is_left_out() and self._monitor is not None:
            self._monitor.drop_step()
        if self.accelerator.sync_gradients and self._will_log():
            scaler = self.accelerator.scaler
            scale = scaler.get_scale() if scaler is not None else 1.0
            norms = gradient_norms(list(self._adapters.values()))
            self._extra_logs = {name: norm / scale for name, norm in norms.items()}
        if self.accelerator.sync_gradients:
            self._end_first_gradients(tell=True)
        return loss

    def _is_left_out(self) -> bool:
        """Whether the step is left out, as its gradients are not finite."""
        step = self.state.global_step + 1
        if not self.is_deepspeed_enabled:
            # A scaler (fp16) expects some, and leaves those steps out by itself.
            return self.accelerator.scaler is None and self._nan_guard.look(step)
        if self.model_wrapped.fp16_enabled():
            return False
        return self._nan_guard.look(step, skipped_by_engine=self.accelerator.optimizer_step_was_skipped)

    def _end_first_gradients(self, *, tell: bool) -> None:
        watched, self._first_gradients = self._first_gradients, None
        if watched is None:
            return
        watched.close()
        for problem in watched.report() if tell else []:
            logger.warning(f"The first step gave {problem}")

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if fresh and (self.args.router_learning_rate is not None or self.args.loraplus_lr_ratio is not None):
            set_learning_rates(
                optimizer,
                list(self._adapters.values()),
                learning_rate=self.args.learning_rate,
                router=self.args.router_learning_rate,
                heads_ratio=self.args.loraplus_lr_ratio,
            )
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.model.training and "loss" in logs:
            if self._monitor is not None:
                logs.update(self._monitor.summary(self._reduce))
            similarity = head_similarity(list(self._adapters.values()))
            if similarity is not None:
                logs["head_similarity"] = similarity
            logs.update(self._extra_logs)
            if self._nan_guard.skipped:
                logs["skipped_steps"] = self._nan_guard.skipped
            if self._ledger is not None:
                by_task = self._ledger.tell(self._reduce)
                # A task may be called like something else that is logged.
                logs.update({name if name not in logs else f"task_{name}": loss for name, loss in by_task.items()})
        super().log(logs, *args, **kwargs)

    # Evaluation by task

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        is_part = self._given_rows is not None  # `Trainer.evaluate` calls this for each data set of a dictionary
        if not is_part:
            eval_dataset = split_by_task(eval_dataset, self._task_column)
            self._given_rows = {}
            if eval_dataset is not None and not isinstance(eval_dataset, str):
                self._given_rows = find_option_rows(eval_dataset, self._task_column, metric_key_prefix)
                eval_dataset = self._number_eval(eval_dataset)
        tasks = self.eval_dataset if eval_dataset is None else eval_dataset
        try:
            if isinstance(tasks, Mapping):
                self._stopping = EarlyStopping(self.callback_handler, self.args, list(tasks), metric_key_prefix)
                metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
                self.note_metrics(metrics, tasks)
                return self._add_means(metrics, list(tasks), metric_key_prefix)
            self._scored = self._given_rows.get(metric_key_prefix) if self._given_rows else None
            if eval_dataset is None or isinstance(eval_dataset, str):
                self._scored = self._option_rows.get(eval_dataset or "")
            if self._stopping is None and metric_key_prefix != "eval":  # of other data than training is stopped by
                self._stopping = EarlyStopping(self.callback_handler, self.args, [], metric_key_prefix)
            waiting = nullcontext() if self._stopping is None else self._stopping.at_task(metric_key_prefix)
            with self._counting_heads(), waiting:
                return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._scored = None
            if not is_part:
                self._given_rows = self._stopping = None
                self._lost_rows.tell()

    def _add_means(self, metrics: dict[str, float], tasks: list[str], prefix: str) -> dict[str, float]:
        means = mean_over_tasks(metrics, tasks, prefix)
        if means:
            self.log(dict(means))
            # For callbacks that wait for a metric of all tasks, such as `EarlyStoppingCallback`.
            control: Any = self.control  # type: ignore[has-type]
            assert self._stopping is not None
            with self._stopping.at_means(metrics, means):
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
        if self._scored is not None:
            output.metrics[f"{metric_key_prefix}_accuracy"] = self._accuracy(self._scored)
        return output

    def _accuracy(self, scored: OptionRows) -> float:
        """The share of rows whose completion is the most likely of its options. On all ranks."""
        # Every rank runs every row where a forward pass needs all of them.
        share_rows = not self._is_deepspeed_or_fsdp
        with self._together():  # a row that can't be scored is that of one rank
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
        correct, rows = (self._reduce(total) if share_rows else total).tolist()
        return correct / rows

    # What is kept: counts by task and, for `balance_scope="global"`, the shares of heads

    def tasks_seen(self) -> dict[str, dict[str, int]]:
        """
        Rows and tokens of each task that this run, or the one it goes on from, has trained on.

        To be called on all ranks.
        """
        return {} if self._ledger is None else self._ledger.totals(self._reduce)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._seen = self.tasks_seen()
        super()._save_checkpoint(model, trial)

    def _checkpoint_state(self) -> dict[str, Any]:
        state = {**super()._checkpoint_state(), "tasks": self._seen}
        if self._monitor is not None:
            state["head_sums"] = self._monitor.state(self.accelerator.gather)
        return state

    def _load_state(self, state: dict[str, Any]) -> None:
        super()._load_state(state)
        if self._ledger is not None:
            self._ledger.load(state.get("tasks", {}))
        if self._monitor is not None:
            ranks = self.accelerator.num_processes
            self._monitor.load_state(state.get("head_sums"), self.accelerator.process_index, ranks)


def _pack_rows(dataset: AnyDataset, args: RLoraSFTConfig, map_kwargs: dict[str, Any]) -> AnyDataset:
    dataset = spread_over_tokens(dataset, **map_kwargs).select_columns(["input_ids", "labels", TASK_IDS])
    if args.shuffle_dataset:
        dataset = dataset.shuffle(seed=args.seed)
    dataset = pack_dataset(dataset, args.max_length, args.packing_strategy, map_kwargs)
    return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset


def _check_devices(args: RLoraSFTConfig) -> None:
    if args.n_gpu > 1:
        # What layers are told of a batch is one state, which the replicas of `torch.nn.DataParallel` would share.
        raise ValueError(
            f"This process sees {args.n_gpu} GPUs, over which `Trainer` would spread each batch by threads "
            "(`torch.nn.DataParallel`), which R-LoRA does not support. Start one process for each GPU with "
            "`accelerate launch` or `torchrun`, or show it a single one with `CUDA_VISIBLE_DEVICES=0`."
        )


def _check_balance(args: RLoraSFTConfig, config: RLoraConfig) -> None:
    if args.balance_loss != "none" and (config.router == "uniform" or config.num_heads == 1):
        raise ValueError(
            f"`balance_loss={args.balance_loss!r}` needs a router with several heads to balance, and the adapter has "
            f"`router={config.router!r}` and `num_heads={config.num_heads}`. Set `balance_loss='none'`."
        )


def _name_tasks(config: RLoraConfig, tasks: list[str] | None, *, is_new: bool) -> list[str]:
    """The names of the adapter's tasks in the order of their ids: those it has, then those it is now trained on."""
    known = list(config.tasks or [])
    added = [task for task in tasks or [] if task not in known]
    if added and config.router == "task" and known:
        remedy = (
            "Name all tasks, or leave `tasks` to the trainer." if is_new else "Train a new adapter on all of them."
        )
        raise ValueError(
            f"The adapter has a mixture for each of its tasks ({', '.join(known)}), and the training data has "
            f"{', '.join(added)} too. {remedy}"
        )
    return known + added


def _check_eval_tasks(eval_dataset: Any, tasks: list[str] | None) -> None:
    if not isinstance(eval_dataset, Mapping) or not tasks or not set(map(str, eval_dataset)) & set(tasks):
        return
    absent = [task for task in tasks if task not in {str(name) for name in eval_dataset}]
    if absent:
        logger.warning(
            f"`eval_dataset` has no data for {', '.join(absent)}, which the training data has: means over tasks leave "
            "these tasks out. Add them, or ignore this."
        )


def _as_rlora_config(args: TrainingArguments | None, model: Any) -> RLoraSFTConfig:
    if isinstance(args, RLoraSFTConfig):
        return args
    if args is None:
        name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or "model"
        return RLoraSFTConfig(f"{str(name).rstrip('/').split('/')[-1]}-R-LoRA")
    # Not through `to_dict`, which hides every field named like a token, `eos_token` among them.
    known = {entry.name for entry in fields(RLoraSFTConfig)}
    config = RLoraSFTConfig(
        **{entry.name: getattr(args, entry.name) for entry in fields(args) if entry.init and entry.name in known}
    )
    for entry in fields(args):
        if entry.name not in known:  # of a subclass of the user's own
            setattr(config, entry.name, getattr(args, entry.name))
    return config
