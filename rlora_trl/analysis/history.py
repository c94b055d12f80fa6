"""The course of training, from the state that `Trainer` saves."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from ..reading import read_json


_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_MAX_POINTS = 500


@dataclass(frozen=True)
class TrainingHistory:
    """
    Values over the steps of training.

    Args:
        steps (`list[int]`): Optimizer steps, increasing.
        similarity (`list[float]`): The logged `head_similarity` of each: the mean cosine between heads.
    """

    steps: list[int]
    similarity: list[float]


def read_history(folder: str | Path) -> TrainingHistory | None:
    """
    Read the logs of training, in `trainer_state.json` of the folder, or else of its newest checkpoint.

    `trainer.save_state()` and `rlora train` write that of the folder.

    Args:
        folder (`str` or `Path`): Folder of the adapter.

    Returns:
        [`TrainingHistory`] of at most 500 steps, evenly spaced; `None` if there is no such file, or no log has
        `head_similarity`.

    Raises:
        ValueError: If the file is not the state of a trainer.
    """
    folder = Path(folder)
    checkpoints = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _number(path))]
    for place in (folder, *(path for _, path in sorted(checkpoints, reverse=True))):
        path = place / TRAINER_STATE_NAME
        if path.is_file():
            return _from_state(read_json(path), path)
    return None


def _number(path: Path) -> re.Match[str] | None:
    return _CHECKPOINT.fullmatch(path.name)


def _from_state(state: object, path: Path) -> TrainingHistory | None:
    logs = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(logs, list):
        raise ValueError(f"{path} has no list `log_history`, so it is not the state of a trainer. Remove it.")
    values: dict[int, float] = {}
    for entry in logs:
        step, similarity = (entry.get(key) if isinstance(entry, dict) else None for key in ("step", "head_similarity"))
        if type(step) is int and isinstance(similarity, (int, float)) and math.isfinite(similarity):
            values[step] = float(similarity)
    if not values:
        return None
    steps = sorted(values)
    every = -(-len(steps) // _MAX_POINTS)
    kept = sorted({*steps[::every], steps[-1]})
    return TrainingHistory(kept, [values[step] for step in kept])
