"""An adapter's configuration from the settings of another tool."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from peft import PeftConfig

from ..reading import first_few, shorten
from ..tuner import RLoraConfig


# Of the file of an adapter, not settings.
_INTERNAL = {"saved_embeddings"}


def field_names() -> list[str]:
    """The fields of [`RLoraConfig`] that a user sets; those of every PEFT method are the tool's."""
    inherited = {field.name for field in fields(PeftConfig)}
    return [f.name for f in fields(RLoraConfig) if f.init and f.name not in inherited | _INTERNAL]


def config_from_settings(values: Mapping[str, Any], where: str, tool: str, **fixed: Any) -> RLoraConfig:
    """
    Build the configuration of an adapter that another tool trains.

    Args:
        values (`Mapping[str, Any]`): Fields of [`RLoraConfig`].
        where (`str`): What holds them, for messages: a key of a file, an option.
        tool (`str`): Name of the tool, for messages.
        fixed: Fields that the tool sets, such as `task_type`.

    Returns:
        [`RLoraConfig`].

    Raises:
        ValueError: If there is no such field, a value is refused by [`RLoraConfig`], or `router="task"` is set: the
            batches of other tools do not say which task a row belongs to.
    """
    unknown = [name for name in values if name not in field_names()]
    if unknown:
        raise ValueError(
            f"`{where}` has {first_few(map(shorten, unknown))}, and its fields are {', '.join(field_names())}. "
            "Balance losses and task mixing need RLoraSFTTrainer."
        )
    try:
        config = RLoraConfig(**{**values, **fixed})
    except TypeError as error:
        raise ValueError(str(error)) from error  # which the tools report as a wrong setting
    check_router(config, where, tool)
    return config


def check_router(config: RLoraConfig, where: str, tool: str) -> None:
    """
    Refuse head weights by task.

    Raises:
        ValueError: If `config` has `router="task"`.
    """
    if config.router == "task":
        raise ValueError(
            f'`router="task"` in `{where}` learns head weights for each task, and batches of {tool} do not say which '
            "task a row belongs to. Use the router softmax or top_k, which decide by token, or `rlora train`."
        )
