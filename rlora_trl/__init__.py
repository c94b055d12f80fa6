"""R-LoRA (Randomized Multi-Head LoRA, arXiv 2502.15455) for PEFT and TRL.

Importing the package registers the method with PEFT. The trainer, which needs TRL, is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .tuner import MultiHeadAdapter, RLoraConfig, RLoraModel, register, set_task


if TYPE_CHECKING:
    from .trainer import HeadUsageCallback, RLoraSFTConfig, RLoraSFTTrainer, mix_tasks


__all__ = [
    "HeadUsageCallback",
    "MultiHeadAdapter",
    "RLoraConfig",
    "RLoraModel",
    "RLoraSFTConfig",
    "RLoraSFTTrainer",
    "__version__",
    "mix_tasks",
    "set_task",
]

_LAZY = dict.fromkeys(("HeadUsageCallback", "RLoraSFTConfig", "RLoraSFTTrainer", "mix_tasks"), ".trainer")

register()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
