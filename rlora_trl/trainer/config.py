"""`RLoraSFTConfig`: what `SFTConfig` has, and what multi-task training with R-LoRA adds."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from trl import SFTConfig


# Fields of a later version. Until then only their defaults are accepted, so that no setting is ignored in silence.
_RESERVED = (
    "balance_loss",
    "balance_coef",
    "balance_scope",
    "mixing",
    "mixing_temperature",
    "mixing_cap",
    "router_learning_rate",
)


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
            How tasks are mixed: `"proportional"` to their rows. (`"equal"` and `"temperature"` are reserved.)
        mixing_temperature (`float`, *optional*, defaults to `1.0`):
            Reserved.
        mixing_cap (`int`, *optional*):
            Reserved.

        > Parameters that control the router

        balance_loss (`str`, *optional*, defaults to `"none"`):
            Loss that keeps the heads in use. (`"switch"`, `"importance"`, `"mutual_information"` and `"z"` are
            reserved.)
        balance_coef (`float`, *optional*, defaults to `0.0`):
            Reserved.
        balance_scope (`str`, *optional*, defaults to `"micro"`):
            Reserved.
        router_learning_rate (`float`, *optional*):
            Reserved.

    > [!NOTE]
    > One default differs from `trl.SFTConfig`: `bf16` is `True` unless `fp16` is set or the machine has no
    > accelerator, where `SFTConfig` raises an error.

    Raises:
        NotImplementedError: For a value that is reserved for a later version.
    """

    task_column: str = field(
        default="task", metadata={"help": "Column that names the task of each row, in a data set that holds several."}
    )
    mixing: Literal["proportional", "equal", "temperature"] = field(
        default="proportional", metadata={"help": "How tasks are mixed; only 'proportional' so far."}
    )
    mixing_temperature: float = field(default=1.0, metadata={"help": "Reserved for a later version."})
    mixing_cap: int | None = field(default=None, metadata={"help": "Reserved for a later version."})
    balance_loss: Literal["none", "switch", "importance", "mutual_information", "z"] = field(
        default="none", metadata={"help": "Loss that keeps the heads in use; only 'none' so far."}
    )
    balance_coef: float = field(default=0.0, metadata={"help": "Reserved for a later version."})
    balance_scope: Literal["micro", "global"] = field(
        default="micro", metadata={"help": "Reserved for a later version."}
    )
    router_learning_rate: float | None = field(default=None, metadata={"help": "Reserved for a later version."})

    def __post_init__(self) -> None:
        if self.bf16 is None and not (self.use_cpu or torch.accelerator.is_available()):  # type: ignore[has-type]
            self.bf16 = False
        super().__post_init__()
        defaults = {entry.name: entry.default for entry in fields(RLoraSFTConfig)}
        for name in _RESERVED:
            value = getattr(self, name)
            if value != defaults[name]:
                raise NotImplementedError(
                    f"`{name}={value!r}` is reserved for a later version; only {defaults[name]!r} is accepted so far. "
                    "Leave it unset."
                )
        if not self.task_column:
            raise ValueError(f"`task_column` must name a column, got {self.task_column!r}. The default is 'task'.")
