"""Reads the JSON state of a checkpoint, which may be damaged or a stranger's: with limits, and each field checked."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ..files.record import is_plain
from ..reading import MIB, AdapterCheckError, read_bytes, read_json, shorten


STATE_FILE = "rlora_state.json"
DATA = "training data"  # name of the fingerprint of the data among the settings of a run

# The log of a run grows with its steps: a few hundred thousand, each with a dozen numbers.
_TRAINER_STATE_LIMIT, _TRAINER_STATE_ELEMENTS = 64 * MIB, 4_000_000
_REMEDY = "Resume from another checkpoint."


def read_object(path: Path) -> dict[str, Any]:
    """
    A JSON object from a file; see [`read_json`].

    Raises:
        AdapterCheckError: If the file is missing, can't be read, or holds something else.
    """
    try:
        value = read_json(path)
    except AdapterCheckError as error:
        raise AdapterCheckError(f"{path.name} can't be read ({error}) {_REMEDY}") from error
    return _as_object(value, path)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """
    The state file of a checkpoint.

    Returns:
        `dict`: `{}` if the file is missing. Parts of other names than in `_CHECKS` are not checked.

    Raises:
        AdapterCheckError: If it is damaged: not a JSON object, or with a part that no checkpoint has.
    """
    path = checkpoint / STATE_FILE
    if not os.path.lexists(path):
        return {}
    state = read_object(path)
    for name, (is_valid, accepted) in _CHECKS.items():
        if name in state and not is_valid(state[name]):
            _refuse(path, name, state[name], accepted)
    return state


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """
    The state of transformers' `Trainer`, which may have NaN in its log.

    Raises:
        AdapterCheckError: If the file is missing or damaged, or has a field that `TrainerState` lacks or of another
            type.
    """
    path = checkpoint / TRAINER_STATE_NAME
    data = read_bytes(path, _TRAINER_STATE_LIMIT)
    if sum(map(data.count, (b",", b"[", b"{"))) > _TRAINER_STATE_ELEMENTS:
        raise AdapterCheckError(f"{path} has more than {_TRAINER_STATE_ELEMENTS} elements. {_REMEDY}")
    try:
        state = _as_object(json.loads(data.decode("utf-8")), path)
    except (ValueError, RecursionError) as error:
        if isinstance(error, AdapterCheckError):
            raise
        raise AdapterCheckError(f"{path} is not valid JSON: {shorten(str(error), 200)}. {_REMEDY}") from error

    # `TrainerState` takes its fields as they are, and fails on others.
    known = {field.name for field in fields(TrainerState)}
    for name, value in state.items():
        is_valid, accepted = _TRAINER_CHECKS.get(name, (lambda value: True, ""))
        if name not in known or not is_valid(value):
            _refuse(path, name, value, accepted or f"absent; fields are {', '.join(sorted(known))}")
    return state


def _as_object(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise AdapterCheckError(f"{path} holds a {type(value).__name__} instead of an object. {_REMEDY}")
    return value


def _refuse(path: Path, name: str, value: Any, accepted: str) -> NoReturn:
    raise AdapterCheckError(f"{path} has {shorten(value)} as {shorten(name)}, which must be {accepted}. {_REMEDY}")


# Types


def is_count(value: Any) -> bool:
    """Whether a value is a whole number of at least 0, which fits into 63 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_line(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and len(value) <= 200


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _maps_to(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(is_valid, value.values()))


def _lists(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_valid, value))


def _optional(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_valid(value)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_part(value: Any) -> bool:
    """Whether a value is a part of a run; see `RunSettings`."""
    if not isinstance(value, dict) or value.keys() != {"from_step", "compared", "recorded"}:
        return False
    compared, recorded = value["compared"], value["recorded"]
    if not is_count(value["from_step"]) or not isinstance(compared, dict) or not _maps_to(is_plain)(recorded):
        return False
    data = compared.get(DATA)
    is_described = isinstance(data, dict) and is_count(data.get("rows")) and isinstance(data.get("digest"), str)
    return (data is None or is_described) and all(map(str.isidentifier, recorded))


_Checks = dict[str, tuple[Callable[[Any], bool], str]]
_CHECKS: _Checks = {
    "runs": (_lists(_is_part), "a list of objects with `from_step`, `compared` and `recorded`"),
    "adapters": (_maps_to(_is_text), "digests by the names of adapters"),
    "strategy": (_is_line, "a line of text"),
    "processes": (lambda value: is_count(value) and value > 0, "a number of at least 1"),
    "files": (_maps_to(is_count), "sizes in bytes by the names of files"),
}
_TRAINER_CHECKS: _Checks = {
    **dict.fromkeys(("global_step", "max_steps", "num_train_epochs", "num_input_tokens_seen"), (is_count, "a count")),
    **dict.fromkeys(("total_flos", "logging_steps", "eval_steps", "save_steps"), (_is_number, "a number")),
    **dict.fromkeys(("epoch", "best_metric"), (_optional(_is_number), "a number or null")),
    **dict.fromkeys(("best_global_step", "train_batch_size"), (_optional(is_count), "a count or null")),
    **dict.fromkeys(("best_model_checkpoint", "trial_name"), (_optional(_is_text), "text or null")),
    **dict.fromkeys(
        ("is_local_process_zero", "is_world_process_zero", "is_hyper_param_search"), (_is_flag, "true or false")
    ),
    "trial_params": (_optional(_is_object), "an object or null"),
    "log_history": (_optional(_lists(_is_object)), "a list of objects"),
    "stateful_callbacks": (
        _optional(_maps_to(lambda value: _is_object(value) or _lists(_is_object)(value))),
        "an object of the states of callbacks",
    ),
}
