"""R-LoRA on TRL's `SFTTrainer`."""

from .callbacks import HeadUsageCallback
from .config import RLoraSFTConfig
from .mixing import mix_tasks
from .trainer import RLoraSFTTrainer


__all__ = ["HeadUsageCallback", "RLoraSFTConfig", "RLoraSFTTrainer", "mix_tasks"]
