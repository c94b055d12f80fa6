"""One error for whatever a library raises over a foreign file. This module imports neither PyTorch nor PEFT."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from .reading import printable


_MAX_CAUSE = 300


@contextmanager
def explain_failure(
    what: str, remedy: str, *, unchanged: tuple[type[Exception], ...] = ()
) -> Generator[None, None, None]:
    """
    Raise a `ValueError` that names a foreign file, whatever a library raises over its contents.

    Libraries that expect the files of their own program raise anything: `AttributeError` and `KeyError` for values of
    another type, `RecursionError` for deep nesting, and those in Rust a panic, which is not even an `Exception`.

    Args:
        what (`str`): Begin of the message, such as "The tokenizer in folder can't be loaded".
        remedy (`str`): Its last sentence.
        unchanged (`tuple`, *optional*): Types of errors that have good messages, and are not replaced.

    Raises:
        ValueError: On one line, with the type and the text of the error.
    """
    try:
        yield
    except unchanged:
        raise
    except BaseException as error:
        # As Rust's bindings name it; they have no module to import it from.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        if len(cause) > _MAX_CAUSE:
            cause = f"{cause[:_MAX_CAUSE]}..."
        raise ValueError(f"{what} ({printable(cause)}). {remedy}") from error
