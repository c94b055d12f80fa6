"""Adapters, their base models and data, as commands name them."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import note


if TYPE_CHECKING:
    from collections.abc import Iterator

    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from rlora_trl.files.checks import CheckedAdapter
    from rlora_trl.files.record import AdapterRecord


@dataclass
class LoadedAdapter:
    """An adapter on its base model, ready to be measured."""

    checked: CheckedAdapter
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase


def find_adapter(name: str, revision: str | None = None) -> CheckedAdapter:
    """Check the adapter of a folder, or one from the Hub after a download."""
    from rlora_trl.hub.pull import pull_checked

    refuse_missing_folder(name)
    return pull_checked(name, revision=revision)


def refuse_missing_folder(name: str) -> None:
    """A path to nothing is no name on the Hub; say so before the Hub is asked."""
    looks_like_path = name.startswith((".", "~", os.sep)) or name.rstrip("/").count("/") != 1
    if looks_like_path and not Path(name).is_dir():
        raise FileNotFoundError(
            f"There is no folder {name}. Give the folder of an adapter, or its name on the Hub: user/name."
        )


def refuse_unknown_task(checked: CheckedAdapter, task: str) -> None:
    """
    Refuse a task that an adapter does not have, if it knows its tasks.

    Raises:
        ValueError: If it has others.
    """
    from difflib import get_close_matches

    known = checked.config.tasks or []
    if known and task not in known:
        close = get_close_matches(task, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"There is no task {task!r}; the adapter has {', '.join(map(repr, known))}.{hint}")


def load_adapter(
    checked: CheckedAdapter, *, base: str | None = None, dtype: str = "auto", load_in_4bit: bool = False
) -> LoadedAdapter:
    """
    Load an adapter on its base model, on the GPU if there is one.

    Args:
        checked ([`CheckedAdapter`]): The adapter.
        base (`str`, *optional*): Base model. Defaults to the adapter's own.
        dtype (`str`, *optional*, defaults to `"auto"`): Of the base model's weights.
        load_in_4bit (`bool`, *optional*, defaults to `False`): Quantize the base model as in training.

    Raises:
        ValueError: If the adapter names no base model, and none is given.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hide_progress_in_logs()
    base_model = base or checked.config.base_model_name_or_path or checked.base_model
    if base_model is None:
        raise ValueError(f"{checked.folder} does not name its base model. Add `--base MODEL`.")
    # A revision of the adapter's own base model means nothing for another.
    base_revision = None if base else checked.base_model_revision
    model = AutoModelForCausalLM.from_pretrained(
        base_model,
        revision=base_revision,
        dtype=dtype,
        device_map={"": 0} if torch.cuda.is_available() else None,
        quantization_config=_four_bit() if load_in_4bit else None,
    )
    adapted = PeftModel.from_pretrained(model, str(checked.folder), torch_device=str(model.device))
    # A tokenizer lies with the adapter where training changed it.
    own = (checked.folder / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(
        str(checked.folder) if own else base_model, revision=None if own else base_revision
    )
    return LoadedAdapter(checked, adapted.eval(), tokenizer)


def hide_progress_in_logs() -> None:
    """Leave out the bars of loading where stderr is no terminal."""
    if sys.stderr.isatty():
        return
    import datasets
    from transformers.utils import logging

    logging.disable_progress_bar()
    datasets.disable_progress_bars()


def load_rows(
    checked: CheckedAdapter,
    data: str,
    split: str | None,
    task_column: str | None,
    limit: int | None = None,
    *,
    answers: bool = False,
) -> dict[str, list[dict[str, Any]]]:
    """
    Rows by task; data that do not name tasks are of the adapter's, if it has only one.

    Rows with `answers` are to be scored; those of conversations become text with [`text_rows`].
    """
    from rlora_trl.evaluation.rows import load_task_rows

    hide_progress_in_logs()
    tasks = checked.config.tasks or ()
    only = tasks[0] if len(tasks) == 1 else None
    return load_task_rows(data, split=split, task_column=task_column, limit=limit, default_task=only, answers=answers)


def _four_bit() -> Any:
    from trl import ModelConfig, get_quantization_config

    return get_quantization_config(ModelConfig(load_in_4bit=True, dtype="bfloat16"))


def chosen_tasks(loaded: LoadedAdapter, tasks: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """
    The data in portions that one setting of the adapter serves: task by task for a task router, else all at once.
    """
    if loaded.checked.config.router != "task":
        yield tasks
        return
    from rlora_trl.tuner import set_task

    known = loaded.checked.config.tasks or ()
    for task, rows in tasks.items():
        set_task(loaded.model, task if task in known else None)
        yield {task: rows}
    set_task(loaded.model, None)


def local_record(checked: CheckedAdapter, name: str) -> AdapterRecord:
    """
    The record of an adapter in a folder of the user's, to add to.

    Raises:
        ValueError: If the adapter lies in the cache of the Hub, whose files must stay as they were published.
    """
    from rlora_trl.files.record import AdapterRecord

    if not Path(name).is_dir():
        raise ValueError(
            f"`--save` writes into a folder of yours, and {name} is on the Hub. Copy it with `rlora pull {name} "
            "--output FOLDER`, and name that folder."
        )
    return checked.record or AdapterRecord(base_model=checked.base_model)


def say_saved(path: Path) -> None:
    """Tell where a record was written."""
    note(f"Saved in {path}. `rlora card FOLDER --write` puts it into the card.")
