"""`RLoraSFTConfig`: `SFTConfig` with fields for multi-task training with R-LoRA."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from trl import SFTConfig

from ..kernels import BALANCE_LOSSES
from .mixing import check_options
from .nan_policy import NAN_POLICIES
from .secrets import mask_secrets, without_secrets


# Modes of `torch.compile` that use CUDA graphs.
_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


@dataclass
class RLoraSFTConfig(SFTConfig):
    """
    Configuration of [`RLoraSFTTrainer`]: all of `trl.SFTConfig`, and the fields below.

    Parameters:
        learning_rate (`float`, *optional*, defaults to `5e-4`):
            Initial learning rate of AdamW.

        > Parameters that control the tasks

        task_column (`str`, *optional*, defaults to `"task"`):
            Column that names the task of each row, in a dataset of several tasks. A dataset without the default
            column is trained on without tasks; a column of any other name must exist.
        mixing (`str`, *optional*, defaults to `"proportional"`):
            How many rows of each task an epoch draws (T5, arXiv 1910.10683, section 3.5.2). `"proportional"`: as many
            as it has, so that without a cap an epoch has each row once. `"equal"`: the same number of all tasks.
            `"temperature"`: in proportion to `min(rows, mixing_cap) ** (1 / mixing_temperature)`.
        mixing_temperature (`float`, *optional*, defaults to `1.0`):
            For `mixing="temperature"`: higher values sample small tasks more often.
        mixing_cap (`int`, *optional*):
            Maximum task size, in rows (or tokens), used when sampling rates are computed.
        mixing_unit (`str`, *optional*, defaults to `"rows"`):
            Whether tasks are mixed by `"rows"` or by `"tokens"`.

        > Parameters that control the router

        balance_loss (`str`, *optional*, defaults to `"none"`):
            Loss that keeps all heads in use: `"none"`, `"switch"`, `"importance"`, `"mutual_information"` or `"z"`.
        balance_coef (`float`, *optional*, defaults to `0.01`):
            Weight of the balance loss.
        balance_scope (`str`, *optional*, defaults to `"micro"`):
            Tokens over which the shares of heads are computed: `"micro"`, each micro-batch; or `"global"`, the whole
            batch of a step, over ranks and accumulation, so that a micro-batch of one task may prefer one head (arXiv
            2501.11873). The part of a step that a rank has not seen yet counts as in the step before.
        router_learning_rate (`float`, *optional*):
            Learning rate for router parameters. Defaults to `learning_rate`; and to 0.05 for `router="task"` if that
            is larger, as its logits, which no input multiplies, would hardly leave zero at the rate of A and B.
        loraplus_lr_ratio (`float`, *optional*):
            Learning rate of the heads B as a multiple of `learning_rate` (LoRA+, arXiv 2402.12354).
        train_a (`bool`, *optional*, defaults to `True`):
            Train the down-projection A.

        > Parameters that control failures

        nan_policy (`str`, *optional*, defaults to `"stop"`):
            What to do when gradients contain NaN or Inf. `"stop"`: raise a `FloatingPointError` before any weight
            changes. `"skip"`: skip the step, and log the number of them as `skipped_steps`; more than ten in a row end
            the run. `"ignore"`: don't check. In fp16 the gradient scaler decides.

        > Parameters that control the record and publishing

        mixture_rows (`int`, *optional*, defaults to `32`):
            Number of training rows per task on which the mean head weights are measured when training ends. They are
            saved with the adapter, for its card and for [`export_lora`]. 0 turns it off.
        hub_base_model (`str`, *optional*):
            Name of the base model on the Hub, for publishing an adapter that was trained on a local folder.

    > [!NOTE]
    > Two defaults differ from `trl.SFTConfig`. `learning_rate` is 5e-4, as 2e-5 is meant for training all weights of a
    > model. `bf16` is `True` unless `fp16` is set or the machine has no accelerator, where `SFTConfig` raises an
    > error.

    Raises:
        ValueError: If a field has a value outside its range, or fields contradict each other.
    """

    learning_rate: float = field(default=5e-4, metadata={"help": "Initial learning rate of AdamW."})

    task_column: str = field(
        default="task", metadata={"help": "Column that names the task of each row, in a dataset of several tasks."}
    )
    mixing: Literal["proportional", "equal", "temperature"] = field(
        default="proportional", metadata={"help": "How many rows of each task an epoch draws."}
    )
    mixing_temperature: float = field(
        default=1.0, metadata={"help": "Higher values sample small tasks more often; for `mixing='temperature'`."}
    )
    mixing_cap: int | None = field(
        default=None, metadata={"help": "Maximum task size used when computing sampling rates."}
    )
    mixing_unit: Literal["rows", "tokens"] = field(
        default="rows", metadata={"help": "Whether tasks are mixed by rows or by tokens."}
    )
    balance_loss: Literal["none", "switch", "importance", "mutual_information", "z"] = field(
        default="none", metadata={"help": "Loss that keeps all heads in use."}
    )
    balance_coef: float = field(default=0.01, metadata={"help": "Weight of the balance loss."})
    balance_scope: Literal["micro", "global"] = field(
        default="micro",
        metadata={
            "help": "Compute shares of heads over each micro-batch ('micro') or the whole batch of a step ('global')."
        },
    )
    router_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate for router parameters. Defaults to `learning_rate`, for `router='task'` to 0.05."
        },
    )
    loraplus_lr_ratio: float | None = field(
        default=None, metadata={"help": "Learning rate of the heads B as a multiple of `learning_rate` (LoRA+)."}
    )
    train_a: bool = field(default=True, metadata={"help": "Train the down-projection A."})

    nan_policy: Literal["stop", "skip", "ignore"] = field(
        default="stop", metadata={"help": "What to do when gradients contain NaN or Inf."}
    )

    mixture_rows: int = field(
        default=32, metadata={"help": "Training rows per task on which head weights are measured when training ends."}
    )
    hub_base_model: str | None = field(
        default=None, metadata={"help": "Name of the base model on the Hub, if it is trained from a local folder."}
    )

    def __post_init__(self) -> None:
        if self.bf16 is None and not (self.use_cpu or torch.accelerator.is_available()):  # type: ignore[has-type]
            self.bf16 = False
        # TRL's default sets the old name, of which transformers warns in each run (trl 1.16, transformers 5.23). Older
        # versions have no other name.
        if getattr(self, "activation_checkpointing", True) is None:
            self.activation_checkpointing = self.gradient_checkpointing
        super().__post_init__()

        # Tasks and mixing
        if not self.task_column:
            raise ValueError(f"`task_column` must name a column, got {self.task_column!r}. The default is 'task'.")
        check_options(self.mixing, self.mixing_temperature, self.mixing_cap, self.mixing_unit, prefix="mixing_")

        # Choices
        choices = {
            "balance_loss": BALANCE_LOSSES,
            "balance_scope": ("micro", "global"),
            "nan_policy": NAN_POLICIES,
        }
        for name, accepted in choices.items():
            if getattr(self, name) not in accepted:
                listed = ", ".join(map(repr, accepted))
                raise ValueError(f"`{name}` must be one of {listed}, got {getattr(self, name)!r}. Choose one.")

        if self.torch_compile_mode in _CUDA_GRAPHS:
            raise ValueError(
                f"`torch_compile_mode={self.torch_compile_mode!r}` records steps as CUDA graphs, and those of this "
                "trainer can't be recorded: their layers report statistics of the router from Python. Set "
                "`torch_compile=True` without a mode. A training loop of your own may compile the model in that mode."
            )

        # Numbers
        if not (_is_number(self.balance_coef) and 0 <= self.balance_coef < math.inf):
            raise ValueError(
                f"`balance_coef` must be a number of at least 0, got {self.balance_coef!r}. 0.01 is a common choice."
            )
        for name in ("router_learning_rate", "loraplus_lr_ratio"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value < math.inf):
                raise ValueError(f"`{name}` must be a positive number, got {value!r}. Leave it unset for none.")

    def to_dict(self) -> dict[str, Any]:
        """All fields, without secrets: loggers report them. `TrainingArguments` masks only its own `*_token`."""
        return mask_secrets(super().to_dict())

    def __str__(self) -> str:
        kept = without_secrets(self)
        return super(RLoraSFTConfig, kept).__str__()

    __repr__ = __str__

    @property
    def balances(self) -> bool:
        """Whether a balance loss is added to the loss."""
        return self.balance_loss != "none" and self.balance_coef > 0

    @property
    def mixes_tasks(self) -> bool:
        """Whether an epoch draws anything other than each row once."""
        return self.mixing == "equal" or self.mixing_temperature != 1.0 or self.mixing_cap is not None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
