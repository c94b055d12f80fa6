"""What may name a task: one rule for dictionaries, columns, configurations and saved adapters."""

from __future__ import annotations

from numbers import Integral
from typing import Any


# What an adapter from the Hub is accepted with: names of as many characters, and as many of them.
MAX_TASK_NAME = 512
MAX_TASKS = 10_000

_REMEDY = 'Name it by a short text, such as "sst2".'


def task_name(task: Any) -> str:
    """
    The name of a task as text.

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
            f"{task!r} ({type(task).__name__}) can't name a task, which takes a text or a whole number. {_REMEDY}"
        )
    name = str.__str__(task)  # of an enumeration of texts the value, of NumPy's text a plain one
    if not name.strip():
        raise ValueError(f"{name!r} can't name a task: it is blank. {_REMEDY}")
    if len(name) > MAX_TASK_NAME:
        raise ValueError(
            f"A text of {len(name)} characters ({name[:20]!r}...) can't name a task, whose name has at most "
            f"{MAX_TASK_NAME}. {_REMEDY}"
        )
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name!r} can't name a task: half a character (a surrogate) in it can't be saved. {_REMEDY}"
        ) from error
    return name
