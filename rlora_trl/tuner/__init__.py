"""R-LoRA as a PEFT method: configuration, tuner layer, tuner model. Importing it registers the method with PEFT."""

from .adapter import MultiHeadAdapter
from .config import RLoraConfig, RLoraPeftType
from .head_usage import HeadUsage
from .layer import RLoraLayer, RLoraLinear
from .model import RLoraModel
from .registration import register
from .routing import Routing, find_routings, set_task
from .task_heads import add_task_heads


__all__ = [
    "HeadUsage",
    "MultiHeadAdapter",
    "RLoraConfig",
    "RLoraLayer",
    "RLoraLinear",
    "RLoraModel",
    "RLoraPeftType",
    "Routing",
    "add_task_heads",
    "find_routings",
    "register",
    "set_task",
]

register()
