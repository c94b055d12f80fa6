"""R-LoRA on TRL's `SFTTrainer`."""

from .config import RLoraSFTConfig
from .mixing import mix_tasks
from .trainer import RLoraSFTTrainer


__all__ = ["RLoraSFTConfig", "RLoraSFTTrainer", "mix_tasks"]
