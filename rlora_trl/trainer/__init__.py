"""R-LoRA on TRL's `SFTTrainer`."""

from .callbacks import HeadUsageCallback
from .config import RLoraSFTConfig
from .mixing import mix_tasks
from .other_trainers import RLoraCallback
from .trainer import RLoraSFTTrainer


__all__ = ["HeadUsageCallback", "RLoraCallback", "RLoraSFTConfig", "RLoraSFTTrainer", "mix_tasks"]
