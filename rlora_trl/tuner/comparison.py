"""Compares the tensors that an adapter must have with those that a file or a model has, by name and shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple


Shape = tuple[int, ...]


class TensorDifferences(NamedTuple):
    """
    How the tensors of a file differ from the expected ones; all three are empty where nothing differs.

    Args:
        missing (`tuple[str]`): Expected names that were not found, in the order of the expected ones.
        unknown (`tuple[str]`): Names that were found and not expected, in the order in which they were found.
        misshapen (`dict[str, tuple[Shape, Shape]]`): The expected and the found shape, by name.
    """

    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    misshapen: dict[str, tuple[Shape, Shape]]


def compare_tensors(expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]]) -> TensorDifferences:
    """
    Compare expected tensors with those that were found.

    Args:
        expected (`Mapping[str, Sequence[int]]`): The expected shapes, by name.
        found (`Mapping[str, Sequence[int]]`): The shapes that a file or a model has, by name.

    Returns:
        [`TensorDifferences`]: What is missing, unknown or of another shape.
    """
    shapes = {name: (tuple(shape), tuple(found[name])) for name, shape in expected.items() if name in found}
    return TensorDifferences(
        missing=tuple(name for name in expected if name not in found),
        unknown=tuple(name for name in found if name not in expected),
        misshapen={name: pair for name, pair in shapes.items() if pair[0] != pair[1]},
    )
