"""Loads an adapter by folder or Hub name, with its base model and tokenizer."""

from __future__ import annotations

import peft
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from ..files.task_types import auto_peft_class
from ..tuner import RLoraConfig


logger = logging.get_logger(__name__)


def load_adapted(
    name: str, adapter_name: str, *, revision: str | None = None, token: str | bool | None = None
) -> tuple[nn.Module, PreTrainedTokenizerBase | None]:
    """
    Load an adapter on its base, and the tokenizer if there is one.

    Args:
        name (`str`): Folder or Hub name of the adapter.
        adapter_name (`str`): Its name in the model.
        revision (`str`, *optional*): Branch, tag or commit of the adapter. Its configuration names that of the base.
        token (`str` or `bool`, *optional*): Hub token for the adapter and its base, as in `hf_hub_download`.

    Returns:
        `tuple`: The model in eval mode, and the tokenizer or `None`.

    Raises:
        ValueError: If it is not an R-LoRA adapter, or does not name its base.
    """
    config = peft.PeftConfig.from_pretrained(name, revision=revision, token=token)
    if not isinstance(config, RLoraConfig):
        raise ValueError(
            f"{name} is an adapter of type {config.peft_type}; only R-LoRA adapters can be exported. Pass one."
        )
    if not config.base_model_name_or_path:
        raise ValueError(
            f"{name} does not name its base model (`base_model_name_or_path`). Load the base, then the adapter with "
            "`PeftModel.from_pretrained(base, ...)`, and pass that model."
        )

    auto = getattr(peft, auto_peft_class(config.task_type))
    # A stranger's adapter names the base: its code is not run, and transformers does not ask.
    options = {"token": token, "trust_remote_code": False}
    model = auto.from_pretrained(name, adapter_name=adapter_name, revision=revision, **options).eval()

    # The tokenizer that was saved with the adapter, or that of the base.
    for source, commit in ((name, revision), (config.base_model_name_or_path, config.revision)):
        try:
            return model, AutoTokenizer.from_pretrained(source, revision=commit, **options)
        except (OSError, ValueError) as error:
            logger.info(f"No tokenizer in {source}: {error}")
    return model, None
