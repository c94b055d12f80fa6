"""R-LoRA (Randomized Multi-Head LoRA, arXiv 2502.15455) for PEFT and TRL.

Importing the package registers the method with PEFT. The trainer, which needs TRL, and the Hub tools are imported on
first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .tuner import MultiHeadAdapter, RLoraConfig, RLoraModel, add_task_heads, set_task


if TYPE_CHECKING:
    from . import zoo
    from .convert import convert_adapter
    from .estimate import MemoryEstimate, estimate_memory
    from .export import export_lora
    from .hub import pull_adapter
    from .publish import push_adapter
    from .trainer import HeadUsageCallback, RLoraCallback, RLoraSFTConfig, RLoraSFTTrainer, mix_tasks


__all__ = [
    "HeadUsageCallback",
    "MemoryEstimate",
    "MultiHeadAdapter",
    "RLoraCallback",
    "RLoraConfig",
    "RLoraModel",
    "RLoraSFTConfig",
    "RLoraSFTTrainer",
    "__version__",
    "add_task_heads",
    "convert_adapter",
    "estimate_memory",
    "export_lora",
    "mix_tasks",
    "pull_adapter",
    "push_adapter",
    "set_task",
    "zoo",
]

_LAZY = {
    **dict.fromkeys(
        ("HeadUsageCallback", "RLoraCallback", "RLoraSFTConfig", "RLoraSFTTrainer", "mix_tasks"), ".trainer"
    ),
    **dict.fromkeys(("MemoryEstimate", "estimate_memory"), ".estimate"),
    "convert_adapter": ".convert",
    "export_lora": ".export",
    "pull_adapter": ".hub",
    "push_adapter": ".publish",
}


def __getattr__(name: str) -> Any:
    if name == "zoo":
        return import_module(".zoo", __name__)
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
