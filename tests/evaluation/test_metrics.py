"""Metrics of generated answers, on texts whose values are known."""

from decimal import Decimal

import pytest

from rlora_trl.evaluation.metrics import GENERATED, exact_match, f1, find_number, normalize_answer, same_number


@pytest.mark.parametrize(
    "text, normal",
    [
        ("  The Cat, a dog.", "cat dog"),
        ("An U.S. theater\nAND then", "us theater and then"),
        ("the", ""),
        ("1,000", "1000"),
    ],
)
def test_normalization(text, normal):
    assert normalize_answer(text) == normal


def test_exact_match():
    assert exact_match(" The answer.", "answer") == 1
    assert exact_match("answers", "answer") == 0
    assert exact_match("", "the") == 1  # nothing is left of either


@pytest.mark.parametrize(
    "answer, reference, value",
    [
        ("the red car", "red car", 1),
        ("red car", "blue car", 0.5),  # one word of two, both ways
        ("car", "red car", 2 / 3),
        ("red red red", "red car", 2 / 5),  # a word counts as often as both have it
        ("green", "red car", 0),
        ("", "red", 0),
        ("the", "a", 1),
    ],
)
def test_f1(answer, reference, value):
    assert f1(answer, reference) == pytest.approx(value)


@pytest.mark.parametrize(
    "text, number",
    [
        ("48/2 = 24 clips.\n#### 72", 72),
        ("#### 5\n\nQuestion: 9", 5),
        ("9 #### \n8", 8),  # nothing follows the mark on its line
        ("She has 3 and then 4.", 4),
        ("It costs $1,234.50.", "1234.5"),
        ("#### -3", -3),
        ("#### -$3", -3),
        ("#### $-3", -3),
        ("a loss of \u22127 points", -7),
        ("10-3", 3),  # a difference
        ("x = +12", 12),
        ("1,2345", 2345),  # no thousands
        ("about .5", "0.5"),
        ("18.", 18),
        ("90%", 90),
        ("No number", None),
        ("", None),
    ],
)
def test_numbers(text, number):
    assert find_number(text) == (None if number is None else Decimal(number))


def test_same_number():
    assert same_number("so it is 1,000.00 dollars", "#### 1000") == 1
    assert same_number("10", "#### 1000") == 0
    assert same_number("none", "#### 1000") == 0


def test_values_are_shares():
    for metric in GENERATED.values():
        assert metric("7 red", "#### 7 red") == 1 and metric("blue", "#### 7 red") == 0
