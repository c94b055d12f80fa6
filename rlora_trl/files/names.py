"""Names of models and datasets, which may be on the Hub or folders."""

from __future__ import annotations

import os

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def hub_name(name: str | None) -> str | None:
    """
    Name of a model or dataset on the Hub; `None` for a local folder.

    Args:
        name (`str`, *optional*): For example `"Qwen/Qwen2.5-0.5B"`, or a path.
    """
    if not name or name.count("/") > 1 or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name
