"""Foreign text, such as names of tasks, in the Markdown of cards."""

from __future__ import annotations

import html
import re
from typing import Any

from ..reading import printable


def escape(text: Any, most: int = 100) -> str:
    """
    Text as one printable line without meaning in Markdown or HTML; underscores within words may stay.

    Args:
        text (`Any`): The text, or another value; nothing for `None`.
        most (`int`, *optional*, defaults to 100): Characters to show. Of longer texts the middle is left out: names of
            tasks often differ at the end.
    """
    line = " ".join(str(text).split()) if text is not None else ""
    if len(line) > most:
        line = f"{line[: most // 2]}…{line[-(most // 2) :]}"
    line = html.escape(printable(line), quote=False)
    line = re.sub(r"([\\`*\[\]|~$])", r"\\\1", line)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", line)


def code(text: str) -> str:
    """A commit, or another name of ordinary characters, as code; other text escaped."""
    return f"`{text}`" if re.fullmatch(r"[\w.:/-]{1,100}", text) else escape(text)
