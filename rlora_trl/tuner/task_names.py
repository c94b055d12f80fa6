"""Names of tasks: one rule for dictionaries, columns, configurations and saved adapters."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from ..reading import shorten


# Limits for adapters from the Hub too: characters in a name, and number of names.
MAX_TASK_NAME = 512
MAX_TASKS = 10_000

_REMEDY = 'Use a short text, such as "sst2".'


def task_name(task: Any) -> str:
    """
    Convert the name of a task to text.

    Args:
        task (`str` or `int`): A name, or a whole number, whose digits are the name. NumPy's types count as both.

    Returns:
        `str`: The name, of at most 512 characters.

    Raises:
        TypeError: If it is neither a text nor a whole number.
        ValueError: If the text is blank, too long, or can't be written as UTF-8.
    """
    if isinstance(task, Integral) and not isinstance(task, bool):
        return str(int(task))
    if not isinstance(task, str):
        raise TypeError(
            f"{shorten(task)} ({type(task).__name__}) can't name a task: names are text or whole numbers. {_REMEDY}"
        )
    name = str.__str__(task)  # the value of a string enum, and a plain text for NumPy's
    if not name.strip():
        raise ValueError(f"{shorten(name)} can't name a task: it is blank. {_REMEDY}")
    if len(name) > MAX_TASK_NAME:
        raise ValueError(
            f"A text of {len(name)} characters ({shorten(name, 20)}) can't name a task: names have at most "
            f"{MAX_TASK_NAME}. {_REMEDY}"
        )
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{shorten(name)} can't name a task: half a character (a surrogate) in it can't be saved. {_REMEDY}"
        ) from error
    return name
