"""The fuzzer itself: it reports every kind of failure, repeats an input exactly, and finds the readers in order."""

import json
import re
import sys
from random import Random

import processes
import pytest

from fuzz.mutations import JsonMutator, change_bytes
from fuzz.readers import READERS
from fuzz.runner import Plan


FUZZ = [sys.executable, "-m", "fuzz"]
# What each toy must be reported for.
TOYS = {
    "wrong_type": "error toys.py",
    "stuck": "(slow|stuck)",  # by its processor time, or on a busy machine by the clock
    "asleep": "stuck",
    "slow": "slow",
    "large": "(memory|slow)",  # a busy machine takes longer than the limit to hand out the memory
    "huge": "memory toys.py",
    "crash": "crash",
}


def fuzz(*words):
    return processes.run([*FUZZ, *words], cwd=processes.ROOT, env=None, timeout=180)


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{processes.ROOT}:{processes.TESTS}")


def test_every_kind_of_failure_is_reported(tmp_path):
    done = fuzz(*"--readers fuzz.toys --seed 182 --cases 400 --limit 0.5 --output".split(), str(tmp_path))
    assert done.returncode == 1, done.stderr
    for name, failure in TOYS.items():
        assert re.search(rf"^{name}: \d+ x {failure}", done.stdout, re.MULTILINE), (name, done.stdout)
        saved = next(tmp_path.glob(f"{name}-182-*"))
        assert (saved / "file-0").read_bytes() == b"12"
        assert f"--seed 182 --only {name}" in (saved / "failure.txt").read_text()
    assert not re.search(r"^good: ", done.stdout, re.MULTILINE)


def test_a_run_without_failures_succeeds_and_one_that_accepts_nothing_does_not():
    assert fuzz(*"--readers fuzz.toys --only good --cases 400".split()).returncode == 0
    done = fuzz(*"--readers fuzz.toys --only idle --cases 400".split())
    assert done.returncode == 1
    assert "idle: accepted no input" in done.stdout


def test_unknown_readers_are_named():
    done = fuzz(*"--readers fuzz.toys --only nothing".split())
    assert done.returncode == 2
    assert "Unknown readers: nothing. Known are good, wrong_type" in done.stderr


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_inputs_are_repeatable(reader):
    """An input follows from the seed, its reader and its number, whichever readers run besides."""
    index = READERS.index(reader)
    for number in range(20):
        assert Plan(READERS, 7, 1.0).make(index, number) == Plan([reader], 7, 1.0).make(0, number)


def test_all_readers(tmp_path):
    """A short run over all readers. Samples that no longer fit a reader would be refused at once, and try little."""
    report = tmp_path / "report.json"
    done = fuzz(*"--seed 0 --cases 2500 --report".split(), str(report))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(report.read_text())["rows"]
    assert list(rows) == [reader.name for reader in READERS]
    for name, row in rows.items():
        assert row["accepted"] > 0, name
        assert row["refused"] > 0 or name == "text", name  # none of which is refused


def test_mutated_trees_have_what_python_can_not_express():
    sources = set()
    for seed in range(3000):
        mutator = JsonMutator(Random(seed))
        sources.add(mutator.write(mutator.mutate({"a": 1, "b": [1, {"c": "text"}]})))
    text = "\n".join(sources)
    for written in ("NaN", "[" * 500, "1e999", "9" * 65, "\\ud800", '"a": 1, "a": 2'):
        assert written in text
    assert len(sources) > 1500


def test_bytes_are_flipped_cut_and_grown():
    changed = {change_bytes(Random(seed), b'{"a": 12}') for seed in range(500)}
    assert len(changed) > 300
    assert min(map(len, changed)) < 5
    assert max(map(len, changed)) > 30
