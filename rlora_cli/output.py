"""
How results are shown: tables on a terminal, plain text in a pipe, one JSON document for machines.

All values may be foreign and are escaped here; see `terminal`.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .terminal import redact, shown, unguarded


# Wide enough for any row, so that nothing is cut or wrapped without a terminal.
_PIPE_WIDTH = 10_000


def stdout_console() -> Console:
    """A console for results; plain and unbounded unless stdout is a terminal."""
    return _console(stderr=False)


def stderr_console() -> Console:
    """A console for everything that is not a result."""
    return _console(stderr=True)


def _console(stderr: bool) -> Console:
    # `emoji` would replace `:x:` in a text.
    console = Console(file=unguarded(sys.stderr if stderr else sys.stdout), highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    return console


@contextlib.contextmanager
def results_only() -> Iterator[None]:
    """Redirect to stderr what libraries print, so that stdout has only the result."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def print_json(value: Any) -> None:
    """One JSON document on stdout, in ASCII: a terminal sees no control characters, and a parser gets them back."""
    unguarded(sys.stdout).write(json.dumps(plain(value), indent=2) + "\n")


def plain(value: Any) -> Any:
    """A value of JSON's types without secrets: tensors as lists, times in ISO 8601, paths as text, NaN as null."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {redact(str(key)): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime):
        return value.isoformat()
    return redact(str(value)) if isinstance(value, (str, Path)) else value


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str | None = None) -> None:
    """
    A table on stdout, or the facts of each row if the terminal is too narrow.

    Columns of numbers are aligned right, and means follow a rule.

    Args:
        columns (`Sequence[str]`): Headings; the first column names the rows.
        rows (`Sequence[Sequence]`): Cells; `None` is an empty one.
        title (`str`, *optional*): Line above the table.
    """
    console = stdout_console()
    rules = console.is_terminal
    table = Table(
        box=box.SIMPLE_HEAD if rules else None,
        pad_edge=False,
        show_edge=False,
        header_style="bold",
        padding=(0, 2, 0, 0),
    )
    for index, heading in enumerate(columns):
        numeric = index > 0 and all(_is_number(row[index]) for row in rows)
        table.add_column(_cell(heading), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        if rules and str(row[0]).startswith("mean"):
            table.add_section()
        table.add_row(*map(_cell, row))

    if title:
        console.print(title, style="bold", markup=False)
    unbounded = console.options.update(max_width=_PIPE_WIDTH)
    if console.measure(table, options=unbounded).maximum > console.width:
        for index, row in enumerate(rows):
            console.print("\n" * bool(index), end="")
            print_facts(dict(zip(columns, row, strict=True)))
        return

    # Without trailing spaces.
    with console.capture() as captured:
        console.print(table)
    console.file.write("".join(f"{line.rstrip()}\n" for line in captured.get().split("\n")[:-1]))


def _is_number(value: Any) -> bool:
    """Whether a cell is a number, such as "80.0 % (+12.5)", or two of an interval, or empty."""
    if value in (None, "", "-"):
        return True
    try:
        for part in str(value).partition(" (")[0].split(" to "):
            float(part.replace(",", "").removesuffix("%"))
    except ValueError:
        return False
    return True


def _cell(value: Any) -> Text:
    if isinstance(value, float):
        value = f"{value:.3f}"
    elif isinstance(value, int) and not isinstance(value, bool):
        value = f"{value:,}"
    # Escaped before widths are computed.
    return Text("" if value is None else shown(str(value), encoding=sys.stdout.encoding))


def print_facts(facts: Mapping[str, Any]) -> None:
    """Names and values on stdout, one per line; `None` and empty text are left out."""
    cells = [(_cell(name), _cell(value)) for name, value in facts.items() if value not in (None, "")]
    width = max((name.cell_len for name, _ in cells), default=0) + 2
    for name, value in cells:
        name.pad_right(width - name.cell_len)
        name.stylize("bold")
        # The terminal wraps long lines, so that names and paths can be copied whole.
        stdout_console().print(name + value, soft_wrap=True)


def print_text(text: str) -> None:
    """Plain text of one or several lines on stdout, without markup or wrapping."""
    stdout_console().print(shown(text, keep="\n"), markup=False, soft_wrap=True)


def note(text: str) -> None:
    """A remark of one or several lines on stderr."""
    console = stderr_console()
    console.print(shown(text, keep="\n"), markup=False, soft_wrap=not console.is_terminal)


def percent(share: float | None) -> str | None:
    """A share in percent, such as "71.3"."""
    return None if share is None else f"{100 * share:.1f}"


def shorten(names: Sequence[str], limit: int = 3) -> str:
    """The first names and the number of the others; all names if stdout is not a terminal."""
    if len(names) <= limit or not stdout_console().is_terminal:
        return ", ".join(names)
    return f"{', '.join(names[:limit])} +{len(names) - limit}"
