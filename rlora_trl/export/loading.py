"""Adapters by folder or name, loaded on their base."""

from __future__ import annotations

import peft
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from ..tuner import RLoraConfig


logger = logging.get_logger(__name__)

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}


def load_adapted(
    name: str, adapter_name: str, *, revision: str | None = None, token: str | bool | None = None
) -> tuple[nn.Module, PreTrainedTokenizerBase | None]:
    """
    An adapter on its base, and the tokenizer if there is one.

    Args:
        name (`str`): Folder or Hub name of the adapter.
        adapter_name (`str`): Name that it gets in the model.
        revision (`str`, *optional*): Branch, tag or commit of the adapter. That of its base is in its configuration.
        token (`str` or `bool`, *optional*): For the adapter and its base, as in `hf_hub_download`.

    Returns:
        `tuple`: The model in eval mode, and the tokenizer or `None`.

    Raises:
        ValueError: If it is an adapter of another method, or does not say what its base is.
    """
    config = peft.PeftConfig.from_pretrained(name, revision=revision, token=token)
    if not isinstance(config, RLoraConfig):
        raise ValueError(
            f"{name} is an adapter of type {config.peft_type}, and only R-LoRA adapters can be exported. Name one."
        )
    if not config.base_model_name_or_path:
        raise ValueError(
            f"{name} does not say what its base model is (`base_model_name_or_path`). Load the base, then the adapter "
            "with `PeftModel.from_pretrained(base, ...)`, and pass that model."
        )
    kind = str(getattr(config.task_type, "value", config.task_type))
    auto = getattr(peft, _AUTO_CLASSES.get(kind, _AUTO_CLASSES["CAUSAL_LM"]))
    model = auto.from_pretrained(name, adapter_name=adapter_name, revision=revision, token=token).eval()
    for place, commit in ((name, revision), (config.base_model_name_or_path, config.revision)):
        try:
            return model, AutoTokenizer.from_pretrained(place, revision=commit, token=token)
        except (OSError, ValueError) as error:
            logger.info(f"No tokenizer in {place}: {error}")
    return model, None
