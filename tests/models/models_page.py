"""
The tables of docs/models.md.

    PYTHONPATH=.:tests python tests/models/models_page.py    # after a change of architectures.py or of default targets
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from architectures import ARCHITECTURES, GROUPS, Architecture
from capabilities import CAPABILITIES, default_targets

from rlora_trl.tuner.targets import MLP_TARGET_MODULES


PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- tables: written by tests/models/models_page.py -->", "<!-- end of tables -->"
TARGETS = "default targets"


def works(architecture: Architecture, capability: str) -> bool:
    """Whether a cell says yes."""
    return not {capability, TARGETS} & set(architecture.limits)


def table(rows: dict[str, Architecture]) -> Iterator[str]:
    yield f"| architecture | {TARGETS} | {' | '.join(CAPABILITIES)} |"
    yield f"|---|---|{':---:|' * len(CAPABILITIES)}"
    for name, row in rows.items():
        targets = "none" if TARGETS in row.limits else ", ".join(default_targets(row))
        cells = ["yes" if works(row, capability) else "no" for capability in CAPABILITIES]
        yield f"| {name} | {targets} | {' | '.join(cells)} |"


def reasons() -> Iterator[str]:
    """What a "no" is for; architectures with the same reason share a row."""
    named: dict[tuple[str, str], list[str]] = {}
    for name, row in ARCHITECTURES.items():
        for what, (reason, _) in row.limits.items():
            named.setdefault((what, reason), []).append(name)
    yield "| what | architectures | why |"
    yield "|---|---|---|"
    for (what, reason), names in named.items():
        yield f"| {what} | {', '.join(names)} | {reason} |"


def render() -> str:
    """The part of the page between its marks."""
    lines: list[str] = []
    for group, rows in GROUPS.items():
        lines += [f"## {group}", "", *table(rows), ""]
    lines += ["## Why not", "", *reasons(), ""]
    others = sorted(set(MLP_TARGET_MODULES) - set(ARCHITECTURES))
    lines += [f"Default targets, but no row: {', '.join(others)}.", ""]
    return "\n".join(lines)


def split() -> tuple[str, str, str]:
    """The page before, between and after its marks."""
    before, rest = PAGE.read_text(encoding="utf-8").split(f"{BEGIN}\n\n")
    between, after = rest.split(END)
    return before, between, after


def main() -> None:
    before, _, after = split()
    PAGE.write_text(f"{before}{BEGIN}\n\n{render()}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
