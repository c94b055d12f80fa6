"""Adapters, their base models and data, as commands name them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .output import note
from .terminal import guarded_descriptors


if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlora_trl.files.checks import CheckedAdapter
    from rlora_trl.files.record import AdapterRecord


class LoadedAdapter(NamedTuple):
    """An adapter on its base model, ready to be measured."""

    checked: CheckedAdapter
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase


def find_adapter(name: str, revision: str | None = None) -> CheckedAdapter:
    """Check the adapter in a folder, or download one from the Hub and check it."""
    from rlora_trl.hub.pull import pull_checked

    refuse_missing_folder(name)
    return pull_checked(name, revision=revision)


def refuse_missing_folder(name: str, *, local: bool = False) -> None:
    """
    Refuse a path without a folder, before a request to the Hub.

    Args:
        name (`str`): A folder or a name on the Hub.
        local (`bool`, *optional*, defaults to `False`): It must be a folder.

    Raises:
        FileNotFoundError: If the folder does not exist, and the name can't be one on the Hub.
    """
    looks_like_path = local or name.startswith((".", "~", os.sep)) or name.rstrip("/").count("/") != 1
    if looks_like_path and not Path(name).is_dir():
        hint = "" if local else ", or its name on the Hub: user/name"
        raise FileNotFoundError(f"There is no folder {name}. Give the folder of an adapter{hint}.")


def refuse_unknown_task(checked: CheckedAdapter, task: str) -> None:
    """
    Refuse a task that the adapter does not have. An adapter without a list of tasks accepts any.

    Raises:
        ValueError: If the adapter has other tasks.
    """
    from difflib import get_close_matches

    tasks = checked.config.tasks or []
    if tasks and task not in tasks:
        close = get_close_matches(task, tasks, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"There is no task {task!r}; the adapter has {', '.join(map(repr, tasks))}.{hint}")


def load_adapter(
    checked: CheckedAdapter,
    *,
    base: str | None = None,
    dtype: str = "auto",
    load_in_4bit: bool = False,
    device: torch.device | None = None,
) -> LoadedAdapter:
    """
    Load an adapter on its base model, on the GPU if there is one.

    Args:
        checked ([`CheckedAdapter`]): The adapter.
        base (`str`, *optional*): Base model. Defaults to the one that the adapter names.
        dtype (`str`, *optional*, defaults to `"auto"`): Dtype of the base model.
        load_in_4bit (`bool`, *optional*, defaults to `False`): Quantize the base model as in training.
        device (`torch.device`, *optional*): That of one of several processes.

    Raises:
        ValueError: If the adapter names no base model and `base` is not set, or one of them or the tokenizer can't be
            loaded without running code that comes with it.
    """
    from peft import PeftModel
    from trl import ModelConfig, get_quantization_config

    hide_progress_in_logs()
    base_model = base or checked.config.base_model_name_or_path or checked.base_model
    if base_model is None:
        raise ValueError(f"{checked.folder} does not name its base model. Add `--base MODEL`.")
    # The recorded revision belongs to the adapter's own base model.
    base_revision = None if base else checked.base_model_revision

    quantization = get_quantization_config(ModelConfig(load_in_4bit=True, dtype="bfloat16")) if load_in_4bit else None
    model = _load_base(base_model, device, revision=base_revision, dtype=dtype, quantization_config=quantization)
    adapted = PeftModel.from_pretrained(model, str(checked.folder), torch_device=str(model.device))

    # The adapter has a tokenizer if training changed it.
    if (checked.folder / "tokenizer_config.json").is_file():
        remedy = (
            "Save it again with the adapter, or remove its files (tokenizer*.json and the like) from a copy of the "
            "adapter, which then takes the tokenizer of its base model."
        )
        tokenizer = _load_tokenizer(str(checked.folder), None, remedy)
    else:
        tokenizer = _load_tokenizer(base_model, base_revision, _OTHER_BASE)
    return LoadedAdapter(checked, adapted.eval(), tokenizer)


# An adapter names its base model and may bring a tokenizer, so the files of both may be foreign. Where
# `trust_remote_code` is not set, transformers asks on a terminal whether to run code that comes with them.
_OTHER_BASE = "Check its files, or name another base model with `--base`."


def _load_base(name: str, device: torch.device | None, **options: Any) -> PreTrainedModel:
    import torch
    from huggingface_hub.errors import HTTPError
    from transformers import AutoModelForCausalLM

    from rlora_trl.foreign import explain_failure
    from rlora_trl.requirements import require_model_folder

    require_model_folder(name, "It is the base model of the adapter: name where it is with `--base`.")
    if device is None:
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    place = None if device.type == "cpu" else {"": device}
    clear = (OSError, HTTPError, ImportError, torch.OutOfMemoryError)
    with explain_failure(f"The base model {name} can't be loaded", _OTHER_BASE, unchanged=clear):
        return AutoModelForCausalLM.from_pretrained(name, device_map=place, trust_remote_code=False, **options)


def _load_tokenizer(name: str, revision: str | None, remedy: str) -> PreTrainedTokenizerBase:
    from huggingface_hub.errors import HTTPError
    from transformers import AutoTokenizer

    from rlora_trl.foreign import explain_failure

    clear = (OSError, HTTPError, ImportError)
    what = f"The tokenizer in {name} can't be used"
    with guarded_descriptors(), explain_failure(what, remedy, unchanged=clear):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        tokenizer("a")  # some mistakes show only in use
    return tokenizer


def hide_progress_in_logs() -> None:
    """Hide progress bars of loading unless stderr is a terminal."""
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
    """Rows by task, as in [`load_task_rows`]. Data without tasks belong to the adapter's task if it has only one."""
    from rlora_trl.evaluation.rows import load_task_rows

    hide_progress_in_logs()
    tasks = checked.config.tasks or ()
    only = tasks[0] if len(tasks) == 1 else None
    return load_task_rows(data, split=split, task_column=task_column, limit=limit, default_task=only, answers=answers)


def local_record(checked: CheckedAdapter, name: str) -> AdapterRecord:
    """
    The record of an adapter in the user's own folder, to be extended.

    Raises:
        ValueError: If the adapter is in the Hub's cache, whose files must not change.
    """
    from rlora_trl.files.record import AdapterRecord

    if not Path(name).is_dir():
        raise ValueError(
            f"`--save` writes into a local folder, and {name} is on the Hub. Copy it with `rlora pull {name} "
            "--output FOLDER`, and pass that folder."
        )
    return checked.record or AdapterRecord(base_model=checked.base_model)


def note_saved(path: Path) -> None:
    """Say where a record was written."""
    note(f"Saved in {path}. `rlora card FOLDER --write` puts it into the card.")
