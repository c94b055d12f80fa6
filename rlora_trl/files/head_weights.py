"""Mean head weights of an adapter by task, measured or read from a record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..reading import shorten
from ..tuner.selection import SUM_TOLERANCE


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
                f"Head weights have weights of tasks {sorted(self.weights)} and numbers of tokens of "
                f"{sorted(self.tokens)}. Give both for the same tasks."
            )

        shapes = {tuple(weights.shape) for weights in self.weights.values()}
        if any(len(shape) != 2 or shape[0] != len(self.layers) or shape[1] < 1 for shape in shapes) or len(shapes) > 1:
            raise ValueError(
                f"The weights of each task must be of one shape [{len(self.layers)}, N], a row for each layer; got "
                f"{sorted(shapes)}. Measure them on one adapter."
            )

        for task, weights in self.weights.items():
            off = (weights.sum(-1) - 1.0).abs()  # [L]
            # Written so that NaN fails.
            if not bool((weights >= 0).all()) or not bool((off <= SUM_TOLERANCE).all()):
                raise ValueError(
                    f"The weights of task {task!r} must be numbers of at least 0 that sum to 1 in each layer; the "
                    f"smallest is {float(weights.min()):g}, sums differ from 1 by up to {float(off.max()):g}. Measure "
                    "them again."
                )

    def for_task(self, task: str) -> dict[str, torch.Tensor]:
        """
        The weights `[N]` of a task by layer.

        Raises:
            ValueError: If the task was not measured.
        """
        if task not in self.weights:
            measured = ", ".join(map(repr, self.weights)) or "none"
            raise ValueError(
                f"Task {task!r} was not measured; there are head weights of {measured}. Name one of these, or measure "
                "it."
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
        if not isinstance(layers, list) or not all(isinstance(name, str) for name in layers):
            raise ValueError(f"`layers` of head weights must be a list of names, got {shorten(layers)}.")
        if not isinstance(tokens, dict) or not all(type(count) is int and count >= 0 for count in tokens.values()):
            raise ValueError(f"`tokens` of head weights must be numbers by task, got {shorten(tokens)}.")
        if not isinstance(weights, dict):
            raise ValueError(f"`weights` of head weights must be lists by task, got {shorten(weights)}.")
        table = {task: torch.tensor(_rows(task, rows), dtype=torch.float32) for task, rows in weights.items()}
        return cls(tuple(layers), table, dict(tokens))


def _rows(task: str, rows: Any) -> list[list[float]]:
    def is_weight(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    good = isinstance(rows, list) and all(isinstance(row, list) and all(map(is_weight, row)) for row in rows)
    if not good or not rows or len({len(row) for row in rows}) != 1:
        raise ValueError(f"Weights of task {task!r} must be lists of numbers, all of one length, got {shorten(rows)}.")
    return rows
