"""`RLoraSFTTrainer`: TRL's `SFTTrainer` for R-LoRA adapters and data sets of several tasks."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from accelerate.logging import get_logger
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainingArguments, set_seed
from trl import SFTTrainer

from ..tuner import MultiHeadAdapter, RLoraConfig, RLoraLayer
from .config import RLoraSFTConfig
from .tasks import AnyDataset, collect_tasks


logger = get_logger(__name__)


class RLoraSFTTrainer(SFTTrainer):
    """
    Supervised fine-tuning of one model on many tasks with an R-LoRA adapter.

    Everything that `trl.SFTTrainer` does works as it does there. What differs:

    - `train_dataset` may also be a dictionary of data sets by task, which are joined and shuffled, or a data set with
      a column (`args.task_column`) that names the task of each row. The tasks' names are saved with the adapter.
    - `peft_config` defaults to `RLoraConfig()`.
    - Adapters train in float32 on a quantised base too, where `SFTTrainer` casts what trains to bfloat16: the
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
            Training data.
        eval_dataset (`Dataset`, `IterableDataset` or `dict[str, Dataset | IterableDataset]`, *optional*):
            Evaluation data. A dictionary gives metrics for each of its keys, `eval_<key>_loss`.
        quantization_config (`BitsAndBytesConfig`, *optional*):
            As in `SFTTrainer`: how to quantise a model given by name.
        peft_config ([`RLoraConfig`], *optional*):
            The adapter, for a `model` that has none. It is copied, not changed.
        kwargs:
            All other arguments of `SFTTrainer`.

    Raises:
        TypeError: If the adapter is not an R-LoRA adapter.
        ValueError: If a task is empty, formats of tasks differ, or the task column is missing.
    """

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
        peft_config = _choose_peft_config(model, peft_config)
        train_dataset, tasks = collect_tasks(
            train_dataset, task_column=args.task_column, text_column=args.dataset_text_field, seed=args.seed
        )
        if peft_config is not None and tasks is not None:
            peft_config.tasks = tasks
        loaded = {p: p.data for p in model.parameters()} if isinstance(model, PeftModel) else {}

        super().__init__(
            model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            *positional,
            quantization_config=quantization_config,
            peft_config=peft_config,
            **kwargs,
        )
        self._undo_bf16_cast(loaded)
        if tasks is not None:
            self._record_tasks(tasks)

    def _undo_bf16_cast(self, loaded: dict[nn.Parameter, torch.Tensor]) -> None:
        """
        Give adapters on a quantised base the float32 values back that `SFTTrainer.__init__` rounded to bfloat16.

        Values that were there before come from `loaded`; an adapter created in between is drawn anew from the seed.
        DeepSpeed keeps a float32 copy of what trains itself, and wants all parameters of an adapter in one dtype.
        """
        adapters = [module for module in self.model.modules() if isinstance(module, MultiHeadAdapter)]
        rounded = [adapter for adapter in adapters if adapter.A.dtype == torch.bfloat16]
        if self.is_deepspeed_enabled:
            for adapter in rounded:
                adapter.to(torch.bfloat16)
                if adapter.A not in loaded:
                    adapter.reset_anchor()
            return
        for parameter, data in loaded.items():
            if parameter.dtype != data.dtype:
                parameter.data = data
        quantized = getattr(self.model, "is_loaded_in_4bit", False) or getattr(self.model, "is_loaded_in_8bit", False)
        fresh = [adapter for adapter in rounded if adapter.A not in loaded]
        if fresh and quantized:
            set_seed(self.args.seed)
            for adapter in fresh:
                adapter.to(torch.float32).reset_parameters()

    def _record_tasks(self, tasks: list[str]) -> None:
        config = self.model.peft_config[self.model.active_adapter]
        config.tasks = sorted({*(config.tasks or []), *tasks}) if config.tasks != tasks else tasks
        logger.info(f"Training on {len(tasks)} tasks: {', '.join(tasks)}")


def _as_rlora_config(args: TrainingArguments | None, model: Any) -> RLoraSFTConfig:
    if isinstance(args, RLoraSFTConfig):
        return args
    if args is None:
        name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or "model"
        return RLoraSFTConfig(f"{str(name).rstrip('/').split('/')[-1]}-R-LoRA")
    # Not through `to_dict`, which hides every field named like a token, `eos_token` among them.
    known = {entry.name for entry in fields(RLoraSFTConfig)}
    return RLoraSFTConfig(
        **{entry.name: getattr(args, entry.name) for entry in fields(args) if entry.init and entry.name in known}
    )


def _choose_peft_config(model: Any, peft_config: PeftConfig | None) -> RLoraConfig | None:
    """The configuration of the adapter to create, a copy; `None` for a model that has an adapter."""
    if isinstance(model, PeftModel):
        active = model.peft_config[model.active_adapter]
        if not isinstance(active, RLoraConfig):
            raise TypeError(
                f"The model's active adapter is a {type(active).__name__}; `RLoraSFTTrainer` trains R-LoRA adapters. "
                "Use `trl.SFTTrainer` for it, or pass the base model and a `peft_config=RLoraConfig(...)`."
            )
        return peft_config  # `SFTTrainer` refuses a second one and says why
    if not isinstance(model, str) and any(isinstance(module, RLoraLayer) for module in model.modules()):
        raise TypeError(
            "The model has adapters that were loaded through transformers, and `RLoraSFTTrainer` would put new ones "
            "over them. To go on training them, load with "
            "`AutoPeftModelForCausalLM.from_pretrained(adapter, is_trainable=True)`."
        )
    if isinstance(model, str) and os.path.isfile(os.path.join(model, "adapter_config.json")):
        if not os.path.isfile(os.path.join(model, "config.json")):
            raise ValueError(
                f"`model={model!r}` is an adapter, not a model. To go on training it, pass "
                "`AutoPeftModelForCausalLM.from_pretrained(adapter, is_trainable=True)`."
            )
    if peft_config is None:
        peft_config = RLoraConfig()
    elif not isinstance(peft_config, RLoraConfig):
        raise TypeError(
            f"`peft_config` is a {type(peft_config).__name__}; `RLoraSFTTrainer` trains R-LoRA adapters and needs an "
            "`RLoraConfig`. Use `trl.SFTTrainer` for other methods."
        )
    peft_config = copy.deepcopy(peft_config)
    if peft_config.task_type is None:
        peft_config.task_type = "CAUSAL_LM"  # what `AutoPeftModelForCausalLM` looks for
    return peft_config
