"""R-LoRA on TRL's `SFTTrainer`."""

from .config import RLoraSFTConfig
from .trainer import RLoraSFTTrainer


__all__ = ["RLoraSFTConfig", "RLoraSFTTrainer"]
