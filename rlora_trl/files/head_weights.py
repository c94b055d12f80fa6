"""Mean head weights of an adapter by task, measured or read from a record."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from ..reading import first_few, shorten
from ..tuner.selection import SUM_TOLERANCE
from ..tuner.task_names import MAX_TASK_NAME, MAX_TASKS, task_name


# For untrusted contents: more layers than an adapter's file may have, and longer names, are not of an adapter.
_MAX_LAYERS, _MAX_LAYER_NAME = 50_000, 512


@dataclass(frozen=True)
class HeadWeights:
    """
    Mean weights of the heads by task.

    Args:
        layers (`tuple[str, ...]`):
            Names of the L adapted layers in the base model, e.g. "model.layers.0.mlp.gate_proj".
        weights (`dict[str, torch.Tensor]`): By task the weights `[L, N]` in float32; rows sum to one.
        tokens (`dict[str, int]`): By task the number of tokens that they are means over.

    Raises:
        ValueError: If sizes do not agree, or a row does not consist of weights.
    """

    layers: tuple[str, ...]
    weights: dict[str, torch.Tensor]
    tokens: dict[str, int]

    def __post_init__(self) -> None:
        if set(self.weights) != set(self.tokens):
            raise ValueError(
                f"Head weights have weights of tasks {_few(self.weights)} and numbers of tokens of "
                f"{_few(self.tokens)}. Give both for the same tasks."
            )

        shapes = {tuple(weights.shape) for weights in self.weights.values()}
        if any(len(shape) != 2 or shape[0] != len(self.layers) or shape[1] < 1 for shape in shapes) or len(shapes) > 1:
            raise ValueError(
                f"The weights of each task must be of one shape [{len(self.layers)}, N], a row for each layer; got "
                f"{first_few(map(str, shapes))}. Measure them on one adapter."
            )

        for task, weights in self.weights.items():
            off = (weights.sum(-1) - 1.0).abs()  # [L]
            # Written so that NaN fails.
            if not bool((weights >= 0).all()) or not bool((off <= SUM_TOLERANCE).all()):
                raise ValueError(
                    f"The weights of task {shorten(task)} must be numbers of at least 0 that sum to 1 in each layer; "
                    f"the smallest is {float(weights.min()):g}, sums differ from 1 by up to {float(off.max()):g}. "
                    "Measure them again."
                )

    def for_task(self, task: str) -> dict[str, torch.Tensor]:
        """
        The weights `[N]` of a task by layer.

        Raises:
            ValueError: If the task was not measured.
        """
        if task not in self.weights:
            raise ValueError(
                f"Task {shorten(task)} was not measured; there are head weights of {_few(self.weights)}. Name one of "
                "these, or measure it."
            )
        return dict(zip(self.layers, self.weights[task], strict=True))

    def mean(self) -> dict[str, torch.Tensor]:
        """The mean over tasks, each counting the same, of the weights `[N]` by layer."""
        if not self.weights:
            raise ValueError("There are no head weights to take the mean over. Measure at least one task.")
        return dict(zip(self.layers, torch.stack(list(self.weights.values())).mean(0), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Lists and numbers for JSON, weights with six digits after the point."""
        weights = {task: [[round(w, 6) for w in row] for row in rows.tolist()] for task, rows in self.weights.items()}
        return {"layers": list(self.layers), "weights": weights, "tokens": dict(self.tokens)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HeadWeights:
        """
        The inverse of [`HeadWeights.to_dict`], for untrusted contents.

        Raises:
            ValueError: If a key is missing, or a value has another type or size.
        """
        if not isinstance(values, Mapping) or not {"layers", "weights", "tokens"} <= set(values):
            raise ValueError(f"Head weights must have `layers`, `weights` and `tokens`, got {shorten(values)}.")
        layers, weights, tokens = values["layers"], values["weights"], values["tokens"]

        # Sizes, before anything is made of them.
        if not isinstance(layers, list) or len(layers) > _MAX_LAYERS:
            raise ValueError(
                f"`layers` of head weights must be a list of at most {_MAX_LAYERS} names, got {_sized(layers)}."
            )
        for key, kind, entries in (("weights", "lists", weights), ("tokens", "numbers", tokens)):
            if not isinstance(entries, dict) or len(entries) > MAX_TASKS:
                raise ValueError(
                    f"`{key}` of head weights must be {kind} by task, of at most {MAX_TASKS} tasks, got "
                    f"{_sized(entries)}."
                )
        if weights.keys() != tokens.keys():
            raise ValueError(
                f"`weights` of head weights are of tasks {_few(weights)}, and `tokens` of {_few(tokens)}. Give both "
                "for the same tasks."
            )
        num_heads = None
        for task, rows in weights.items():
            num_heads = _check_shape(task, rows, len(layers), num_heads)

        # Values.
        for name in layers:
            if not isinstance(name, str) or not 0 < len(name) <= _MAX_LAYER_NAME:
                raise ValueError(
                    f"`layers` of head weights must be names of at most {_MAX_LAYER_NAME} characters, got "
                    f"{shorten(name)}."
                )
        for task, count in tokens.items():
            if type(count) is not int or not 0 <= count <= sys.float_info.max:
                raise ValueError(
                    f"`tokens` of head weights must be numbers by task, got {shorten(count)} for {shorten(task)}."
                )
        for task, rows in weights.items():
            _check_numbers(task, rows)
        table = {task_name(task): torch.tensor(rows, dtype=torch.float32) for task, rows in weights.items()}
        return cls(tuple(layers), table, dict(tokens))


def _check_shape(task: Any, rows: Any, num_layers: int, num_heads: int | None) -> int | None:
    """Check that the weights of a task are a list for each layer, all of one length, and return that length."""
    if not isinstance(task, str) or len(task) > MAX_TASK_NAME:
        raise ValueError(f"Head weights name a task {shorten(task)}; names are texts of at most {MAX_TASK_NAME}.")
    if not isinstance(rows, list) or len(rows) != num_layers:
        _refuse(task, rows, f"of shape [{num_layers}, N], all of one length")
    for row in rows:
        if not isinstance(row, list) or not row or len(row) != (num_heads or len(row)):
            _refuse(task, row, f"of shape [{num_layers}, {num_heads or 'N'}], all of one length")
        num_heads = len(row)
    return num_heads


def _check_numbers(task: str, rows: list[list[Any]]) -> None:
    for row in rows:
        try:
            valid = {*map(type, row)} <= {int, float} and all(map(math.isfinite, row))
        except OverflowError:  # an integer beyond the range of a float
            valid = False
        if not valid:
            _refuse(task, row, "finite")


def _refuse(task: str, value: Any, accepted: str) -> NoReturn:
    raise ValueError(f"Weights of task {shorten(task)} must be lists of numbers, {accepted}; got {_sized(value)}.")


def _few(tasks: Iterable[str]) -> str:
    return first_few(map(repr, tasks), 10) or "none"


def _sized(value: Any) -> str:
    """A value for a message, long ones by their length."""
    return f"{len(value)} of them" if isinstance(value, list | dict) and len(value) > 10 else shorten(value)
