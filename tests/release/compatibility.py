"""
The tables of COMPATIBILITY.md: versions from pyproject.toml and the files of constraints, and runs of the test suite.

    pytest ... --junitxml=report.xml                                   # with any versions, on any Python
    python tests/release/compatibility.py --add report.xml --part fast # in the same environment
    python tests/release/compatibility.py                              # writes the tables again

A run is a line of tests/release/runs.jsonl: the day, the versions that were installed, what ran, and the counts.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import re
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "COMPATIBILITY.md"
RUNS = Path(__file__).parent / "runs.jsonl"
_MARK = "<!-- {}: written by tests/release/compatibility.py -->"
_END = "<!-- end of {} -->"
# What a run names; the others follow from these or matter less.
_NAMED = ("torch", "transformers", "peft", "trl", "accelerate", "huggingface_hub")


def constraints(name: str) -> dict[str, str]:
    """Versions by canonical name in a file of constraints."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = (line.partition("==") for line in lines if "==" in line and not line.startswith("#"))
    return {canonicalize_name(package): version.split()[0] for package, _, version in pairs}


def dependencies() -> list[Requirement]:
    """What the package requires, extras left out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(text) for text in project["dependencies"]]


def versions_table() -> str:
    """Packages with the range that is accepted, the oldest version that is tested, and that of CI."""
    floors, pinned = constraints("constraints-floors.txt"), constraints("constraints.txt")
    lines = ["| package | accepted | `make test-floors` | `make test` |", "|---|---|---|---|"]
    for requirement in sorted(dependencies(), key=lambda entry: canonicalize_name(entry.name)):
        name = canonicalize_name(requirement.name)
        accepted = ", ".join(str(part) for part in sorted(requirement.specifier, key=lambda part: part.operator)[::-1])
        lines.append(f"| {requirement.name} | {accepted} | {floors.get(name, '')} | {pinned.get(name, '')} |")
    return "\n".join(lines)


def read_runs() -> list[dict[str, Any]]:
    """The recorded runs, newest first."""
    lines = RUNS.read_text(encoding="utf-8").splitlines() if RUNS.is_file() else []
    return sorted(map(json.loads, lines), key=lambda run: run["date"], reverse=True)


def runs_table() -> str:
    """What ran on which versions."""
    lines = ["| Python | versions | tests | passed | failed | skipped | day |", "|---|---|---|---:|---:|---:|---|"]
    for run in read_runs():
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        counts = " | ".join(f"{run[count]:,}" for count in ("passed", "failed", "skipped"))
        lines.append(f"| {run['python']} | {versions} | {run['part']} | {counts} | {run['date']} |")
    return "\n".join(lines)


def render(text: str) -> str:
    """The page with its tables written again."""
    for name, table in (("versions", versions_table()), ("runs", runs_table())):
        start, end = re.escape(_MARK.format(name)), re.escape(_END.format(name))
        body = f"{_MARK.format(name)}\n\n{table}\n\n{_END.format(name)}"
        text, count = re.subn(f"{start}.*{end}", lambda _, body=body: body, text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(
                f"{PAGE.name} must have {_MARK.format(name)!r} and its end once, and has it {count} times."
            )
    return text


def summarize(report: Path, part: str) -> dict[str, Any]:
    """A run from the JUnit report of pytest, with the versions of this environment."""
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in suites:
        for name in counts:
            counts[name] += int(suite.get(name, 0))
    failed = counts["failures"] + counts["errors"]
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _NAMED},
        "part": part,
        "passed": counts["tests"] - failed - counts["skipped"],
        "failed": failed,
        "skipped": counts["skipped"],
    }


def main() -> None:
    """Add a run if one is named, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", type=Path, metavar="REPORT", help="JUnit report of a run in this environment")
    parser.add_argument("--part", help="what ran: fast, slow, gpu, or folders of tests")
    options = parser.parse_args()
    if options.add is not None:
        if not options.part:
            parser.error("`--add` needs `--part`, which says what ran.")
        with RUNS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(summarize(options.add, options.part)) + "\n")
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
