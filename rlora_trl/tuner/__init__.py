"""R-LoRA as a PEFT method: configuration, tuner layer, tuner model."""

from .adapter import MultiHeadAdapter
from .config import RLoraConfig, RLoraPeftType
from .layer import RLoraLayer, RLoraLinear
from .model import RLoraModel
from .registration import register


__all__ = [
    "MultiHeadAdapter",
    "RLoraConfig",
    "RLoraLayer",
    "RLoraLinear",
    "RLoraModel",
    "RLoraPeftType",
    "register",
]
