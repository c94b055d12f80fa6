"""The only file that knows PEFT's registries."""

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from .config import RLoraConfig, RLoraPeftType
from .model import RLoraModel


def register() -> None:
    """
    Enter R-LoRA into PEFT's registries; calling it again changes nothing.

    `peft.utils.register_peft_method` accepts only members of `peft.PeftType`, an enum that can't be extended. The
    registries are dictionaries with string keys, and a member of another string enum is such a key. (No open upstream
    issue as of peft 0.21.2; peft#2282 added the function for methods inside PEFT, peft#2273 asked for others.)
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[RLoraPeftType.RLORA] = RLoraConfig
    PEFT_TYPE_TO_TUNER_MAPPING[RLoraPeftType.RLORA] = RLoraModel
    PEFT_TYPE_TO_PREFIX_MAPPING[RLoraPeftType.RLORA] = RLoraModel.prefix
