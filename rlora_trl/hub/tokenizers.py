"""Whether an adapter needs a tokenizer of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import logging

from ..files.layout import FileKind, classify, published_files


logger = logging.get_logger(__name__)


def changed_tokenizer_files(folder: Path, base_model: str | None, token: str | bool | None = None) -> set[str]:
    """
    The tokenizer's files of an adapter's folder, unless that tokenizer is the base model's.

    Args:
        folder (`Path`): Folder of the adapter.
        base_model (`str`, *optional*): Its base model, a name or a folder.
        token (`str` or `bool`, *optional*): To read it from the Hub.

    Returns:
        `set[str]`: Paths in the folder; all of them, too, where the base model's tokenizer can't be had.
    """
    files = {path for path in published_files(folder) if classify(path) is FileKind.TOKENIZER}
    if not files or base_model is None:
        return files
    try:
        own = AutoTokenizer.from_pretrained(folder)
        base = AutoTokenizer.from_pretrained(base_model, token=token)
    except (OSError, ValueError) as error:
        logger.info(f"The tokenizer is published, as that of {base_model} can't be loaded to compare: {error}")
        return files
    return files if _identity(own) != _identity(base) else set()


def _identity(tokenizer: Any) -> tuple:
    """What makes a tokenizer what it is; not how it pads."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_padding()
        backend.no_truncation()
    return (
        backend.to_str() if backend is not None else tuple(sorted(tokenizer.get_vocab().items())),
        tuple(sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())),
        tokenizer.chat_template if not isinstance(tokenizer.chat_template, dict) else str(tokenizer.chat_template),
    )
