"""benchmarks/quality_report.py on rows that are made up, whose answers are known."""

import json
import sys

import numpy as np
import pytest
from processes import ROOT


sys.path.insert(0, str(ROOT / "benchmarks"))

import quality_report
from quality_intervals import Seeds, against, bits, bootstrap, compare, differences, row_weights
from quality_rows import methods_of
from quality_worker import scored


PLENTY, LITTLE = ("multitask", "plenty"), ("multitask", "little")


def row(name, right, seed=0, rate=1e-3, cell=PLENTY, batch=32):
    """A row; `right` is which test rows are right, by task."""
    facts = {"name": name, "suite": cell[0], "size": cell[1], "seed": seed, "learning_rate": rate, "batch": batch}
    spent = {"trainable": 1_900_800, "seconds": {"train": 12.0}, "side_by_side": 4}
    return {"key": json.dumps(facts), **facts, **spent, **scored(right)}


def drawn(share, count, seed):
    return list(np.random.default_rng(seed).random(count) < share)


def test_bits():
    for count in (1, 4, 5, 400):
        right = drawn(0.5, count, count)
        made = row("a", {"t": right})
        assert bits(made, "t").tolist() == [int(bit) for bit in right]
        assert made["accuracy"]["t"] == pytest.approx(100 * sum(right) / count, abs=1e-3)


def test_differences_are_paired_by_seed():
    ours = [row("a", {"t": [1, 1, 0]}, seed=seed) for seed in (0, 2)]
    other = [row("b", {"t": [0, 1, 1]}, seed=2), row("b", {"t": [1, 1, 1]}, seed=1)]
    assert differences(ours, other)["t"].tolist() == [[1, 0, -1]]
    assert differences(ours, other[1:]) == {}


def test_a_constant_difference_has_no_width():
    found = {"t": np.ones((3, 50), dtype=np.int8), "u": np.zeros((3, 10), dtype=np.int8)}
    each, mean = compare({PLENTY: found})
    assert each[PLENTY] == mean and mean.seeds == 3  # tasks count alike, whatever their rows
    assert (mean.value, mean.low, mean.high) == pytest.approx((50, 50, 50), abs=1e-3)


def test_the_bootstrap_s_errors_are_the_textbook_s():
    """Of test rows alone, of seeds alone, and of two cells with the same test rows."""
    rng = np.random.default_rng(0)
    noise = rng.choice([-1, 0, 1], size=400).astype(np.int8)
    same = {"t": np.tile(noise, (5, 1))}
    one = bootstrap({PLENTY: same})[PLENTY]
    assert one.std() == pytest.approx(100 * noise.std() / 20, rel=0.05)
    two = bootstrap({PLENTY: same, LITTLE: same})
    assert np.mean(list(two.values()), axis=0).std() == pytest.approx(one.std(), rel=0.05)  # not a half less

    by_seed = {"t": np.repeat(np.array([[1], [0], [-1], [1]], dtype=np.int8), 30, axis=1)}
    drawn_seeds = bootstrap({PLENTY: by_seed})[PLENTY]
    assert drawn_seeds.std() == pytest.approx(100 * np.std([1, 0, -1, 1]) / 2, rel=0.05)


def test_intervals_are_the_same_in_each_process():
    found = {PLENTY: {"t": np.random.default_rng(0).choice([-1, 0, 1], size=(2, 40)).astype(np.int8)}}
    first = compare(found)
    row_weights.cache_clear()
    assert compare(found) == first


def test_intervals_cover_the_truth():
    """Methods of the same quality: 95 % of the intervals contain zero."""
    inside = 0
    for trial in range(100):
        rng = np.random.default_rng(trial)
        found = {task: (rng.random((4, 100)) < 0.7).astype(np.int8) - (rng.random((4, 100)) < 0.7) for task in "tu"}
        _, mean = compare({PLENTY: found}, 500)
        inside += mean.low <= 0 <= mean.high
    assert inside >= 88


def made_up():
    """Reference best at 1e-3 in plenty and 5e-4 in little; ours a tenth better, at 2e-3, but for one seed less."""
    rows = []
    for cell, best in ((PLENTY, 1e-3), (LITTLE, 5e-4)):
        for rate in (5e-4, 1e-3, 2e-3):
            for seed in range(3):
                share = 0.7 if rate == best else 0.6
                base = np.random.default_rng(seed).random(200)
                rows.append(row("LoRA r=10", {"t": list(base < share)}, seed, rate, cell))
                if seed:
                    better = 0.8 if rate == 2e-3 else 0.5
                    rows.append(row("ours", {"t": list(base < better)}, seed, rate, cell))
    return rows


def test_each_method_has_its_own_learning_rate():
    methods = methods_of(made_up())
    reference, ours = methods["LoRA r=10"], methods["ours"]
    assert reference.best(PLENTY) == (1e-3, 32) and reference.best(LITTLE) == (5e-4, 32)
    assert ours.best_for_all([PLENTY, LITTLE]) == (2e-3, 32)
    for one_setting in (False, True):
        each, mean = against(ours, reference, [PLENTY, LITTLE], Seeds(), one_setting=one_setting)
        assert set(each) == {PLENTY, LITTLE} and mean.seeds == 2
        assert mean.low > 5 and mean.value == pytest.approx(10, abs=3) and mean.high < 15
    assert against(ours, reference, [PLENTY, ("setting1", "little")], Seeds())[1] is None  # not all cells


def test_a_setting_with_fewer_seeds_is_not_chosen():
    rows = [row("a", {"t": [1, 0]}, seed) for seed in (0, 1)] + [row("a", {"t": [1, 1]}, 0, 4e-3)]
    (method,) = methods_of(rows).values()
    assert method.best(PLENTY) == (1e-3, 32)
    assert method.best(PLENTY, (0,)) == (4e-3, 32)


def test_settings_are_chosen_on_other_seeds():
    rows = [row("LoRA r=10", {"t": [1, 0, 0, 0]}, seed) for seed in (0, 1)]
    rows += [row("a", {"t": [1, 1, 1, 0]}, 0, 1e-3), row("a", {"t": [1, 1, 0, 0]}, 0, 2e-3)]
    rows += [row("a", {"t": [1, 0, 0, 0]}, 1, 1e-3), row("a", {"t": [1, 1, 1, 1]}, 1, 2e-3)]
    methods = methods_of(rows)
    _, mean = against(methods["a"], methods["LoRA r=10"], [PLENTY], Seeds((0,), (1,)))
    assert mean.value == 0.0


def test_rows_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match="3 test rows of t.*and others 2"):
        differences([row("a", {"t": [1, 1, 0]})], [row("b", {"t": [1, 0]})])


def test_tables(tmp_path, capsys):
    path, document = tmp_path / "rows.jsonl", tmp_path / "results.md"
    rows = [*made_up(), row("half", {"t": [1, 0] * 100}, batch=16)]
    failed = {**rows[0], "error": "out of memory"}
    lines = [json.dumps(one) for one in (*rows, rows[1], {**failed, "key": "failed"})]
    path.write_text("\n".join(lines) + '\n{"key": "cut')
    document.write_text("<!-- quality: written by benchmarks/report.py -->\n<!-- end of quality -->\n")
    quality_report.main(["--rows", str(path), "--curves", "--update", str(document)])
    text = capsys.readouterr().out
    lora = methods_of(rows)["LoRA r=10"].mean(PLENTY, (1e-3, 32))
    assert f"| LoRA r=10 | 1.90 | 3.0 | {lora:.2f} (0.001; 3 seeds) | " in text and "(0.0005; 3 seeds) |" in text
    assert "| half | 1.90 | 3.0 | 50.00 (0.001, batch 16; 1 seed)" in text
    assert "(0.002; 2 seeds) +" in text and "| ours | 2 of 2 | 2 | +" in text
    assert "By learning rate: multitask, little." in text
    assert " | **" in text and text.strip() in document.read_text()
