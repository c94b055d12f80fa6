"""Comparing the tensors that an adapter must have with those that were found."""

import pytest

from rlora_trl.tuner.comparison import TensorDifferences, compare_tensors


A, B = ("A", (4, 8)), ("B", (3, 16, 4))

CASES = {
    "equal": ([A, B], [B, A], TensorDifferences((), (), {})),
    "missing": ([A, B], [A], TensorDifferences(("B",), (), {})),
    "unknown": ([A], [A, B], TensorDifferences((), ("B",), {})),
    "misshapen": ([A, B], [A, ("B", (3, 16, 2))], TensorDifferences((), (), {"B": ((3, 16, 4), (3, 16, 2))})),
    "all of it": ([A, B], [("A", ()), ("C", (1,))], TensorDifferences(("B",), ("C",), {"A": ((4, 8), ())})),
}


@pytest.mark.parametrize("expected, found, differences", CASES.values(), ids=CASES)
def test_names_missing_unknown_and_misshapen_tensors(expected, found, differences):
    assert compare_tensors(dict(expected), dict(found)) == differences


def test_a_list_from_json_is_a_shape():
    assert compare_tensors(dict([A]), {"A": [4, 8]}) == TensorDifferences((), (), {})
