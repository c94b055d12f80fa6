"""What a conversion has found out and assumed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias


SourceFormat: TypeAlias = Literal["lora", "hydralora", "r-lora"]
FORMATS: tuple[SourceFormat, ...] = ("lora", "hydralora", "r-lora")


@dataclass(frozen=True)
class ConversionReport:
    """
    Facts about a converted adapter.

    Args:
        path (`str`): Its folder.
        source_format (`str`): What it was converted from: `"lora"`, `"hydralora"` or `"r-lora"`.
        layers (`int`): Number of adapted layers.
        num_heads (`int`): Number N of heads.
        r (`int`): Rank of each head, where `rank_pattern` sets no other.
        use_rslora (`bool`): Whether the scaling is `lora_alpha / sqrt(r)` rather than `lora_alpha / r`.
        scaling (`float`): The scaling for `r`, where no pattern sets another.
        router (`str`): `"softmax"` or `"uniform"`.
        offset (`str`): The initial delta that is subtracted: `"none"` if the source has none, `"ignored"`, or
            `"initial values"`.
        base_model (`str` or `None`): The base model that the adapter names.
        tasks (`tuple[str, ...]`): Names of its tasks, if any were given.
        warnings (`tuple[str, ...]`): What users of the adapter should know.
    """

    path: str
    source_format: SourceFormat
    layers: int
    num_heads: int
    r: int
    use_rslora: bool
    scaling: float
    router: str
    offset: Literal["none", "ignored", "initial values"]
    base_model: str | None
    tasks: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {**dataclasses.asdict(self), "tasks": list(self.tasks), "warnings": list(self.warnings)}
