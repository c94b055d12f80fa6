"""Publishing of what a trainer saves: the card, pushes in the background, and checks before training."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from huggingface_hub import CommitInfo, HfApi
from torch import nn
from transformers.trainer_utils import HubStrategy

from ..files.layout import published_files
from ..files.names import hub_name
from ..files.record import AdapterRecord
from ..hub.card import render_card
from ..publish import push_adapter
from ..tuner import RLoraConfig
from .task_evaluation import OptionRows


logger = get_logger(__name__)

# Evaluation rows of a task on which the fidelity of an export is measured.
_MEASURED_ROWS = 200


def write_card(path: Path, config: RLoraConfig, record: AdapterRecord, **options: Any) -> None:
    """
    Write the card of an adapter atomically, so that a full disk does not destroy hand-written text.

    Args:
        path (`Path`): The file.
        config ([`RLoraConfig`]), record ([`AdapterRecord`]), options: See [`render_card`].
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.saving")
    try:
        render_card(config, record, **options).save(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def push_copy(api: HfApi, folder: Path, repo_id: str, options: dict[str, Any]) -> Future:
    """
    Push the current contents of a folder in the background. Later changes of the folder are not included.

    Args:
        api (`HfApi`): Client that runs its jobs one after another.
        folder (`Path`): Folder of the adapter.
        repo_id (`str`): The repository.
        options (`dict`): Arguments of [`push_adapter`].

    Returns:
        `Future`: Of the `CommitInfo`.
    """
    copy = Path(tempfile.mkdtemp(prefix="rlora-push-"))
    for path in published_files(folder):
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / path, copy / path)

    def push() -> CommitInfo:
        try:
            return push_adapter(copy, repo_id, **options)
        except Exception as error:  # logged, since the result of the future may never be read
            logger.warning(f"A push to {repo_id} in the background failed: {error}")
            raise
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    return api.run_as_future(push)


def rows_to_measure(option_rows: Mapping[str, OptionRows]) -> dict[str, list[Any]]:
    """The first scorable evaluation rows of each task."""
    rows_of: dict[str, list[Any]] = {}
    for scored in option_rows.values():
        for task, rows in scored.by_task().items():
            rows_of.setdefault(task, rows.select(range(min(len(rows), _MEASURED_ROWS))).to_list())
    return rows_of


def is_sharded(model: nn.Module, uses_fsdp: bool) -> bool:
    """Whether the parameters of a model are sharded over processes."""
    return uses_fsdp or any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def check_publishing(args: Any, base_model: str | None) -> None:
    """
    Refuse settings before training if the result could not be published.

    Args:
        args ([`RLoraSFTConfig`]): The configuration.
        base_model (`str`, *optional*): Name or folder of the base model.

    Raises:
        ValueError: If checkpoints are to be pushed, which hold the state of the optimizer; or the base model is a
            local folder without a name.
    """
    if not args.push_to_hub:
        return
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise ValueError(
            f"`hub_strategy={args.hub_strategy.value!r}` uploads checkpoints with the state of the optimizer and the "
            "training arguments, which are not published with adapters. Use 'every_save' or 'end', and store "
            "checkpoints elsewhere."
        )
    if args.hub_base_model is None and base_model and hub_name(base_model) is None:
        raise ValueError(
            f"`push_to_hub=True`, and the base model is the local folder {base_model!r}, which others can't load. "
            "Set `hub_base_model` to its name on the Hub, or load it by that name."
        )


def count_trainable(model: nn.Module) -> int:
    """Number of trainable parameters, sharded or not."""
    return sum(
        parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()
        for parameter in model.parameters()
        if parameter.requires_grad
    )


def as_list(value: str | Sequence[str] | None) -> list[str]:
    """An argument that may be a string, several strings or `None`, as a list."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)
