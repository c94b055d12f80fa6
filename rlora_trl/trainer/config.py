"""`RLoraSFTConfig`: what `SFTConfig` has, and what multi-task training with R-LoRA adds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from trl import SFTConfig

from ..kernels import BALANCE_LOSSES
from .mixing import check_options
from .nan_policy import NAN_POLICIES


@dataclass
class RLoraSFTConfig(SFTConfig):
    """
    Configuration of [`RLoraSFTTrainer`]: all of `trl.SFTConfig`, and the fields below.

    Parameters:
        > Parameters that control the tasks

        task_column (`str`, *optional*, defaults to `"task"`):
            Column that names the task of each row, in a data set that holds several. A data set without the default
            column is trained on as it is; any other name must be there.
        mixing (`str`, *optional*, defaults to `"proportional"`):
            How much of each task an epoch draws (T5, arXiv 1910.10683, section 3.5.2). `"proportional"`: by the rows
            that it has, which without a cap is each row once. `"equal"`: the same of all tasks. `"temperature"`: by
            `min(rows, mixing_cap) ** (1 / mixing_temperature)`.
        mixing_temperature (`float`, *optional*, defaults to `1.0`):
            The larger, the more equal; for `mixing="temperature"`.
        mixing_cap (`int`, *optional*):
            Rows (or tokens) beyond which a task counts as no larger.
        mixing_unit (`str`, *optional*, defaults to `"rows"`):
            Whether tasks are mixed by `"rows"` or by `"tokens"`.

        > Parameters that control the router

        balance_loss (`str`, *optional*, defaults to `"none"`):
            Loss that keeps all heads in use: `"none"`, `"switch"`, `"importance"`, `"mutual_information"` or `"z"`.
        balance_coef (`float`, *optional*, defaults to `0.01`):
            What it is multiplied by.
        balance_scope (`str`, *optional*, defaults to `"micro"`):
            Where the shares of heads are taken from: `"micro"`, each micro-batch; or `"global"`, the whole batch of a
            step, over ranks and accumulation, so that a micro-batch of one task may prefer one head (arXiv
            2501.11873). What a rank has not seen of a step counts as in the step before.
        router_learning_rate (`float`, *optional*):
            Learning rate of routers; by default that of all.
        loraplus_lr_ratio (`float`, *optional*):
            Learning rate of the heads B as a multiple of `learning_rate` (LoRA+, arXiv 2402.12354).
        train_a (`bool`, *optional*, defaults to `True`):
            Whether A trains.

        > Parameters that control what happens when something goes wrong

        nan_policy (`str`, *optional*, defaults to `"stop"`):
            What a step does whose gradients are not finite. `"stop"`: it raises a `FloatingPointError`, before any
            weight changes. `"skip"`: it is left out, counted in the logs as `skipped_steps`; more than ten in a row
            end the run. `"ignore"`: nothing is looked at. In fp16 the gradient scaler decides.

        > Parameters that control what is recorded and published

        mixture_rows (`int`, *optional*, defaults to `32`):
            Rows of each task's training data on which, when training ends, the mean weights of the heads are measured.
            They are saved with the adapter, for its card and for [`export_lora`]. 0 turns it off.
        hub_base_model (`str`, *optional*):
            Name of the base model on the Hub, to publish an adapter that is trained on a local folder.

    > [!NOTE]
    > One default differs from `trl.SFTConfig`: `bf16` is `True` unless `fp16` is set or the machine has no
    > accelerator, where `SFTConfig` raises an error.

    Raises:
        ValueError: If a field has a value outside its range, or fields do not go together.
    """

    task_column: str = field(
        default="task", metadata={"help": "Column that names the task of each row, in a data set that holds several."}
    )
    mixing: Literal["proportional", "equal", "temperature"] = field(
        default="proportional", metadata={"help": "How much of each task an epoch draws."}
    )
    mixing_temperature: float = field(
        default=1.0, metadata={"help": "The larger, the more equal; for `mixing='temperature'`."}
    )
    mixing_cap: int | None = field(
        default=None, metadata={"help": "Rows (or tokens) beyond which a task counts as no larger."}
    )
    mixing_unit: Literal["rows", "tokens"] = field(
        default="rows", metadata={"help": "Whether tasks are mixed by rows or by tokens."}
    )
    balance_loss: Literal["none", "switch", "importance", "mutual_information", "z"] = field(
        default="none", metadata={"help": "Loss that keeps all heads in use."}
    )
    balance_coef: float = field(default=0.01, metadata={"help": "What the balance loss is multiplied by."})
    balance_scope: Literal["micro", "global"] = field(
        default="micro",
        metadata={"help": "Shares of heads over each micro-batch ('micro') or the whole batch of a step ('global')."},
    )
    router_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of routers; by default that of all."}
    )
    loraplus_lr_ratio: float | None = field(
        default=None, metadata={"help": "Learning rate of the heads B as a multiple of `learning_rate` (LoRA+)."}
    )
    train_a: bool = field(default=True, metadata={"help": "Whether A trains."})

    nan_policy: Literal["stop", "skip", "ignore"] = field(
        default="stop", metadata={"help": "What a step does whose gradients are not finite."}
    )

    mixture_rows: int = field(
        default=32, metadata={"help": "Rows of each task on which the use of heads is measured when training ends."}
    )
    hub_base_model: str | None = field(
        default=None, metadata={"help": "Name of the base model on the Hub, where training uses a local folder."}
    )

    def __post_init__(self) -> None:
        if self.bf16 is None and not (self.use_cpu or torch.accelerator.is_available()):  # type: ignore[has-type]
            self.bf16 = False
        super().__post_init__()
        if not self.task_column:
            raise ValueError(f"`task_column` must name a column, got {self.task_column!r}. The default is 'task'.")
        check_options(self.mixing, self.mixing_temperature, self.mixing_cap, self.mixing_unit, prefix="mixing_")
        choices = {
            "balance_loss": BALANCE_LOSSES,
            "balance_scope": ("micro", "global"),
            "nan_policy": NAN_POLICIES,
        }
        for name, accepted in choices.items():
            if getattr(self, name) not in accepted:
                listed = ", ".join(map(repr, accepted))
                raise ValueError(f"`{name}` must be one of {listed}, got {getattr(self, name)!r}. Choose one.")
        if not (_is_number(self.balance_coef) and 0 <= self.balance_coef < math.inf):
            raise ValueError(
                f"`balance_coef` must be a number of at least 0, got {self.balance_coef!r}. 0.01 is a common choice."
            )
        for name in ("router_learning_rate", "loraplus_lr_ratio"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value < math.inf):
                raise ValueError(f"`{name}` must be a positive number, got {value!r}. Leave it unset for none.")

    @property
    def mixes_tasks(self) -> bool:
        """Whether an epoch draws something else than each row once."""
        return self.mixing == "equal" or self.mixing_temperature != 1.0 or self.mixing_cap is not None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
