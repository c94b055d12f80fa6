"""One error for whatever a library raises over foreign contents."""

import pytest

from rlora_trl.foreign import explain_failure


class PanicException(BaseException):
    """As libraries in Rust raise it."""


@pytest.mark.parametrize("error", [AttributeError, KeyError, RecursionError, MemoryError, PanicException])
def test_any_error_names_the_file(error):
    with pytest.raises(ValueError, match=rf"^The file can't be used \({error.__name__}: '?why'?\)\. Correct it\.$"):
        with explain_failure("The file can't be used", "Correct it."):
            raise error("why")


def test_the_cause_is_short_and_printable_and_on_one_line():
    with pytest.raises(ValueError, match="ValueError: one two ") as caught:
        with explain_failure("The file can't be used", "Correct it."):
            raise ValueError("one\n  two \x1b[2J" + "x" * 10_000)
    text = str(caught.value)
    assert text.isprintable() and "\\x1b[2J" in text and len(text) < 400


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError])
def test_other_errors_pass(error):
    with pytest.raises(error, match="^why$"):
        with explain_failure("The file can't be used", "Correct it.", unchanged=(OSError,)):
            raise error("why")
