"""Intervals against formulas that hold for many rows, and their coverage."""

import numpy as np
import pytest

from rlora_trl.evaluation.intervals import bootstrap_interval


Z = 1.959964  # of 95 % of a normal distribution


def rows(correct, total):
    return [1.0] * correct + [0.0] * (total - correct)


@pytest.mark.parametrize("correct, total", [(500, 1000), (900, 1000), (350, 400)])
def test_one_task_as_the_binomial_formula(correct, total):
    share = correct / total
    half = Z * (share * (1 - share) / total) ** 0.5
    # Within the noise of 10,000 samples and a step of one row.
    assert bootstrap_interval([rows(correct, total)]) == pytest.approx((share - half, share + half), abs=0.06 * half)


def test_coverage():
    """About 95 of 100 intervals contain the share that the rows were drawn with."""
    draw = np.random.default_rng(1)
    inside = 0
    for _ in range(300):
        low, high = bootstrap_interval([(draw.random(400) < 0.7).astype(float)])
        inside += low <= 0.7 <= high
    assert 0.92 * 300 <= inside <= 0.98 * 300  # two standard errors of 300 draws


def test_mean_of_tasks_resamples_within_tasks():
    """Tasks count equally, and how much they differ from each other is no part of the interval."""
    half = Z * (0.5**2 / 400 + 0.3**2 / 1600) ** 0.5 / 2  # standard errors of both, over two tasks
    low, high = bootstrap_interval([rows(200, 400), rows(1440, 1600)])
    assert (low, high) == pytest.approx((0.7 - half, 0.7 + half), abs=0.06 * half)
    assert bootstrap_interval([rows(5, 5), rows(0, 50)]) == (0.5, 0.5)


def test_differences_are_paired():
    """Two models that agree on most rows differ more surely than their own intervals say."""
    base = np.asarray(rows(500, 1000))
    model = base.copy()
    model[960:] = 1.0  # forty rows better, none worse
    half = Z * (0.04 * 0.96 / 1000) ** 0.5
    assert bootstrap_interval([model - base]) == pytest.approx((0.04 - half, 0.04 + half), abs=0.12 * half)
    assert bootstrap_interval([base])[1] > bootstrap_interval([model])[0]


def test_values_between_zero_and_one():
    values = np.random.default_rng(0).random(500)
    half = Z * values.std() / 500**0.5
    expected = (values.mean() - half, values.mean() + half)
    assert bootstrap_interval([values]) == pytest.approx(expected, abs=0.06 * half)


def test_the_same_rows_have_the_same_interval():
    values = np.random.default_rng(0).random(50)
    assert bootstrap_interval([values]) == bootstrap_interval([values[::-1]]) == bootstrap_interval([list(values)])
    assert bootstrap_interval([[1.0]]) == (1.0, 1.0)


def test_rows_that_all_have_one_value():
    """All of 25 right does not mean certain: a model that is right 97 times in 100 does that half of the time."""
    draw = np.random.default_rng(2)
    drawn = [(draw.random(25) < 0.97).astype(float) for _ in range(300)]
    found = [bootstrap_interval([values], bounds=(0, 1)) for values in drawn]
    assert sum(values.all() for values in drawn) > 100
    assert sum(low <= 0.97 <= high for low, high in found) >= 0.93 * 300

    # The share with which 25 of 25 are right in 2.5 of 100 samples.
    low, high = bootstrap_interval([rows(25, 25)], bounds=(0, 1))
    assert low**25 == pytest.approx(0.025) and high == 1.0
    assert bootstrap_interval([rows(0, 25)], bounds=(0, 1)) == pytest.approx((0.0, 1 - low))
    # A gain of one in each row: the others could lose one.
    assert bootstrap_interval([rows(25, 25)], bounds=(-1, 1)) == pytest.approx((2 * low - 1, 1.0))
    assert bootstrap_interval([rows(0, 25)], bounds=(-1, 1)) == pytest.approx((low - 1, 1 - low))
    # Gains of F1 that differ by rounding only.
    gains = [0.3 - 0.1, 0.4 - 0.2]
    assert np.ptp(gains) > 0 and np.diff(bootstrap_interval([gains], bounds=(-1, 1))) > 0.5

    # One task with rows of two values: the bootstrap stays as it is.
    mixed = [rows(25, 25), rows(5, 25)]
    assert bootstrap_interval(mixed, bounds=(0, 1)) == bootstrap_interval(mixed)


def test_several_tasks_that_each_have_one_value():
    """The farthest mean with which such rows are drawn in 2.5 of 100 samples, also found by trying all shares."""
    both = bootstrap_interval([rows(25, 25), rows(0, 25)], bounds=(0, 1))
    one = 0.025 ** (1 / 25)
    assert both == pytest.approx((one / 2, 1 - one / 2))
    assert bootstrap_interval([rows(25, 25)] * 10, bounds=(0, 1)) == pytest.approx((0.025 ** (1 / 250), 1.0))

    for first, second in ((25, 100), (25, 30)):
        low, high = bootstrap_interval([rows(first, first), rows(second, second)], bounds=(0, 1))
        share = np.linspace(one, 1, 100_001)  # of right rows of the first task; the second gets what is left
        rest = np.minimum((0.025 / share**first) ** (1 / second), 1)
        assert low == pytest.approx(np.min(share + rest) / 2, abs=1e-6) and high == 1.0


def test_values_outside_of_the_bounds():
    with pytest.raises(ValueError, match=r"from -1 to 1, and `bounds` 0 to 1\. Give the lowest and the highest"):
        bootstrap_interval([[1.0, -1.0]], bounds=(0, 1))


@pytest.mark.parametrize("tasks", [[], [[1.0], []]])
def test_nothing_to_draw_from(tasks):
    with pytest.raises(ValueError, match="at least one task, and each task at least one row"):
        bootstrap_interval(tasks)
