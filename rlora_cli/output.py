"""How results are shown: tables on a terminal, plain text in a pipe, one JSON document for machines."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text


# Wide enough for any row, so that nothing is cut or wrapped where no terminal sets a width.
_PIPE_WIDTH = 10_000


def stdout_console() -> Console:
    """A console for results; plain and unbounded unless stdout is a terminal."""
    return _console(stderr=False)


def stderr_console() -> Console:
    """A console for everything that is not a result."""
    return _console(stderr=True)


def _console(stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console = Console(stderr=stderr, highlight=False, width=_PIPE_WIDTH, no_color=True)
    return console


@contextlib.contextmanager
def results_only() -> Iterator[None]:
    """Send to stderr what libraries print while a result is computed, so that stdout has the result alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n")


def plain(value: Any) -> Any:
    """A value as JSON has it: data classes as objects, tensors as lists, times in ISO 8601, NaN as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {entry.name: plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (str, int, bool)) or value is None:
        return value
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return [plain(entry) for entry in value]


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str | None = None) -> None:
    """
    A table on stdout, or where the terminal is too narrow for it a few lines for each row.

    Columns of numbers are aligned right, and means are set apart.

    Args:
        columns (`Sequence[str]`): Headings; the first is of what names a row.
        rows (`Sequence[Sequence]`): Cells; `None` is shown as nothing.
        title (`str`, *optional*): Line above the table.
    """
    console = stdout_console()
    table = _table(columns, rows, rules=console.is_terminal)
    if title:
        console.print(title, style="bold", markup=False)
    unbounded = console.options.update(max_width=_PIPE_WIDTH)
    if Measurement.get(console, unbounded, table).maximum <= console.width:
        _print_trimmed(console, table)
        return
    for place, row in enumerate(rows):
        if place:
            console.print()
        console.print(str(row[0]), style="bold", markup=False, soft_wrap=True)
        print_facts(dict(zip(columns[1:], row[1:], strict=True)), indent=2)


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, rules: bool) -> Table:
    rich_box = box.SIMPLE_HEAD if rules else None
    table = Table(box=rich_box, pad_edge=False, show_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for place, heading in enumerate(columns):
        numeric = place > 0 and all(_is_number(row[place]) for row in rows)
        table.add_column(heading, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        if rules and str(row[0]).startswith("mean"):
            table.add_section()
        table.add_row(*(_cell(value) for value in row))
    return table


def _print_trimmed(console: Console, table: Table) -> None:
    """Without the spaces that fill up the last column."""
    with console.capture() as captured:
        console.print(table)
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def _is_number(value: Any) -> bool:
    """Whether a cell shows a number, or the lack of one."""
    if value in (None, "", "-"):
        return True
    try:
        # "80.0 % (+12.5)" is one number too, with what it has gained.
        float(str(value).partition(" (")[0].replace(",", "").removesuffix(" %"))
    except ValueError:
        return False
    return True


def _cell(value: Any) -> Text:
    if isinstance(value, float):
        value = f"{value:.3f}"
    elif isinstance(value, int) and not isinstance(value, bool):
        value = f"{value:,}"
    return Text("" if value is None else str(value))


def print_facts(facts: Mapping[str, Any], *, indent: int = 0) -> None:
    """
    Names and values, one to a line. Text is wrapped to the terminal, but names and paths stay whole, to be copied.

    Args:
        facts (`Mapping[str, Any]`): Values by name; `None` is left out.
        indent (`int`, *optional*, defaults to 0): Spaces before each line.
    """
    console = stdout_console()
    shown = {name: _cell(value).plain for name, value in facts.items() if value is not None and value != ""}
    start = indent + max(map(len, shown), default=0) + 2
    for name, value in shown.items():
        width = max(20, console.width - start)
        lines = textwrap.wrap(value, width, break_long_words=False, break_on_hyphens=False)
        label = f"{' ' * indent}{name}".ljust(start)
        console.print(Text.assemble((label, "bold"), f"\n{' ' * start}".join(lines)), soft_wrap=True)


def print_text(text: str) -> None:
    """Text on stdout as it is: neither markup nor wrapped."""
    stdout_console().print(text, markup=False, soft_wrap=True)


def note(text: str) -> None:
    """A remark on stderr."""
    console = stderr_console()
    console.print(text, markup=False, soft_wrap=not console.is_terminal)


def percent(share: float | None) -> str | None:
    """A share as "71.3" percent."""
    return None if share is None else f"{100 * share:.1f}"


def shorten(names: Sequence[str], limit: int = 3) -> str:
    """The first names, and how many more: all of them where there is no terminal."""
    if len(names) <= limit or not stdout_console().is_terminal:
        return ", ".join(names)
    return f"{', '.join(names[:limit])} +{len(names) - limit}"
