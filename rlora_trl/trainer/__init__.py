"""R-LoRA on TRL's `SFTTrainer`. Names are imported when they are used: the callback needs no TRL, the trainer does."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .callbacks import HeadUsageCallback
    from .config import RLoraSFTConfig
    from .mixing import mix_tasks
    from .other_trainers import RLoraCallback
    from .trainer import RLoraSFTTrainer


__all__ = ["HeadUsageCallback", "RLoraCallback", "RLoraSFTConfig", "RLoraSFTTrainer", "mix_tasks"]

_MODULES = {
    "HeadUsageCallback": ".callbacks",
    "RLoraCallback": ".other_trainers",
    "RLoraSFTConfig": ".config",
    "RLoraSFTTrainer": ".trainer",
    "mix_tasks": ".mixing",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
