"""COMPATIBILITY.md says what pyproject.toml, the constraints and the recorded runs say."""

import json
import platform
import tomllib

import pytest
from packaging.version import Version
from processes import ROOT

from release import compatibility


def test_tables_are_up_to_date():
    text = compatibility.PAGE.read_text(encoding="utf-8")
    assert compatibility.render(text) == text, "Run `python tests/release/compatibility.py`."


def test_versions_agree():
    """The oldest tested version is the floor, and CI's version is accepted."""
    floors, pinned = (compatibility.constraints(f"constraints{name}.txt") for name in ("-floors", ""))
    for requirement in compatibility.dependencies():
        name = compatibility.canonicalize_name(requirement.name)
        if name in floors:
            lowest = next(part.version for part in requirement.specifier if part.operator == ">=")
            assert (
                Version(floors[name]) == Version(lowest)
                or Version(floors[name]).release[:2] == Version(lowest).release[:2]
            )
        if name in pinned:
            assert requirement.specifier.contains(pinned[name])


def test_classifiers_have_a_run():
    """A Python is claimed only with a run of the whole fast part, or is the one that CI has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {
        c.rpartition(" :: ")[2] for c in project["classifiers"] if c.startswith("Programming Language :: Python :: 3.")
    }
    ran = {".".join(run["python"].split(".")[:2]) for run in compatibility.read_runs() if not run["failed"]}
    assert named and named <= ran | {"3.11"}


def test_a_run_is_read_from_a_report(tmp_path, monkeypatch):
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite tests="10" failures="1" errors="1" skipped="3"/></testsuites>', encoding="utf-8"
    )
    run = compatibility.summarize(report, "fast")
    assert (run["passed"], run["failed"], run["skipped"], run["python"]) == (5, 2, 3, platform.python_version())
    monkeypatch.setattr(compatibility, "RUNS", tmp_path / "runs.jsonl")
    (tmp_path / "runs.jsonl").write_text(json.dumps(run) + "\n", encoding="utf-8")
    assert (
        "| fast | 5 | 2 | 3 |" in compatibility.runs_table()
        and f"torch {run['versions']['torch']}" in compatibility.runs_table()
    )
    with pytest.raises(ValueError, match="its end once, and has it 0 times"):
        compatibility.render("no marks")
