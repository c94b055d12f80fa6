"""R-LoRA as a PEFT method: configuration, tuner layer, tuner model. Importing it registers the method with PEFT."""

from .adapter import MultiHeadAdapter
from .config import RLoraConfig, RLoraPeftType
from .layer import RLoraLayer, RLoraLinear
from .model import RLoraModel
from .registration import register
from .routing import HeadUsage, Routing, find_routings, set_task


__all__ = [
    "HeadUsage",
    "MultiHeadAdapter",
    "RLoraConfig",
    "RLoraLayer",
    "RLoraLinear",
    "RLoraModel",
    "RLoraPeftType",
    "Routing",
    "find_routings",
    "register",
    "set_task",
]

register()
