"""Malicious inputs that were written by hand are refused or accepted as they must be, in time."""

import json
import sys

import processes
import pytest

from fuzz.corpus import CORPUS


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "report.json"
    words = [sys.executable, "-m", "fuzz", "--readers", "fuzz.corpus", "--once", "--report", str(path)]
    env = {"PYTHONPATH": f"{processes.ROOT}:{processes.TESTS}"}
    done = processes.run(words, cwd=processes.ROOT, env={**processes.os.environ, **env}, timeout=900)
    assert path.is_file(), done.stderr
    return json.loads(path.read_text())


def test_names_are_unique():
    assert len({malicious.name for malicious in CORPUS}) == len(CORPUS) > 100


@pytest.mark.parametrize("malicious", CORPUS, ids=lambda malicious: malicious.name)
def test_malicious_input(report, malicious):
    row = report["rows"][malicious.name]
    failures = [failure for failure in report["failures"] if failure[0] == malicious.name]
    assert not failures
    assert row["inputs"] == 1
    if malicious.expected != "any":
        assert row[malicious.expected] == 1
