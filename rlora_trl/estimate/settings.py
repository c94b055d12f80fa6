"""The settings of a training run on which its memory depends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """
    Settings of the run to estimate.

    Args:
        num_gpus (`int`, *optional*, defaults to `1`):
            GPUs, over all nodes.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"bfloat16"`):
            Dtype in which the base is loaded. DeepSpeed casts it to `mixed_precision`.
        mixed_precision (`str` or `torch.dtype`, *optional*, defaults to `"bfloat16"`):
            Dtype of autocast (`bf16=True`, TRL's default); `None` for none. A float32 base without it that groups its
            queries takes more than the estimate: PyTorch has no fused attention for it on a GPU.
        load_in_4bit (`bool`, *optional*, defaults to `False`), load_in_8bit (`bool`, *optional*, defaults to `False`):
            Quantize the base with bitsandbytes.
        double_quant (`bool`, *optional*, defaults to `False`):
            Quantize the scales of 4-bit weights too (`bnb_4bit_use_double_quant`).
        per_device_train_batch_size (`int`, *optional*, defaults to `8`):
            Rows of a micro-batch.
        max_length (`int`, *optional*, defaults to `1024`):
            Tokens of a row. Every row is assumed to be full.
        gradient_checkpointing (`bool`, *optional*, defaults to `True`):
            As in TRL.
        loss (`str`, *optional*, defaults to `"chunked"`):
            `"chunked"`: TRL's loss, which never holds all logits. `"full"`: the model's own, which does.
        optimizer_states (`float`, *optional*, defaults to `2`):
            Float32 values that the optimizer keeps for each trained weight: 2 for AdamW, 0 for plain SGD.

    Raises:
        ValueError: If a value is out of its range, or two do not go together.
    """

    num_gpus: int = 1
    dtype: str | torch.dtype = "bfloat16"
    mixed_precision: str | torch.dtype | None = "bfloat16"
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    double_quant: bool = False
    per_device_train_batch_size: int = 8
    max_length: int = 1024
    gradient_checkpointing: bool = True
    loss: str = "chunked"
    optimizer_states: float = 2

    def __post_init__(self) -> None:
        check_choice("loss", self.loss, ("chunked", "full"))
        for name in ("dtype", "mixed_precision"):
            if isinstance(getattr(self, name), str):
                check_choice(name, getattr(self, name), _DTYPES)
        for name in ("num_gpus", "per_device_train_batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("`load_in_4bit` and `load_in_8bit` are both set. Choose one of them.")

    @property
    def stored(self) -> torch.dtype:
        """Dtype in which the base is loaded."""
        return self.dtype if isinstance(self.dtype, torch.dtype) else getattr(torch, self.dtype)

    @property
    def autocast(self) -> torch.dtype | None:
        """Dtype of mixed precision, if any."""
        mixed = self.mixed_precision
        return mixed if mixed is None or isinstance(mixed, torch.dtype) else getattr(torch, mixed)

    @property
    def bits(self) -> int | None:
        """Bits to which the base is quantized, if it is."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """
    Check that an argument is one of its accepted values.

    Raises:
        ValueError: If it is not.
    """
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")
