"""
The way of all text to the terminal: what is foreign is escaped, and secrets in URLs are left out.

Names, cards, metrics and the errors that quote them come from strangers, and an escape sequence in one of them could
clear the screen, hide text or fill the clipboard. The functions of `output` escape each value. Everything else, which
libraries print, log and warn of while a command runs, passes through [`GuardedStream`].
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from tempfile import TemporaryFile
from typing import Any, TextIO, cast


_DESCRIPTORS = (1, 2)  # of stdout and stderr
_HIDDEN = "***"
_SECRETS = (
    # User and password of a URL.
    (re.compile(r"(://)[^\s/?#\"'<>]+@"), rf"\1{_HIDDEN}@"),
    # What gives access in a presigned URL.
    (
        re.compile(
            r"([?&][\w.-]*(?:token|signature|sig|credential|secret|password|policy|key|key-pair-id)=)[^\s&#\"'<>]+",
            re.IGNORECASE,
        ),
        rf"\1{_HIDDEN}",
    ),
    # A token of the Hub.
    (re.compile(r"\bhf_[A-Za-z0-9]{30,}"), f"hf_{_HIDDEN}"),
)

# How libraries draw progress: back to the start of the line, or, in a write of its own, to lines above.
_REDRAWN = re.compile(r"\r(?:\x1b\[K)?")
_MOVED = re.compile(r"(?:\x1b\[\d*A)+")
_MAX_MESSAGE = 10_000
# Colors and styles of libraries on a terminal, which are left out: the same sequences hide text.
_STYLE = re.compile(r"\x1b\[[\d;]*m")


def redact(text: str) -> str:
    """Text without passwords in URLs, that of `HF_ENDPOINT` among them, signatures of URLs, and tokens of the Hub."""
    # Most text has none, and tables have thousands of cells.
    if not any(mark in text for mark in ("://", "=", "hf_")):
        return text

    # As it was set, which may have characters that URLs do not have.
    user = os.environ.get("HF_ENDPOINT", "").partition("://")[2].rpartition("@")[0]
    if user:
        text = text.replace(f"://{user}@", f"://{_HIDDEN}@")
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def shown(text: str, *, keep: str = "", encoding: str | None = None) -> str:
    """
    Text of unknown origin as it is shown.

    Args:
        text (`str`): The text.
        keep (`str`, *optional*): Control characters that are not escaped, such as line ends.
        encoding (`str`, *optional*): Encoding of the terminal. Characters that it does not have are escaped.

    Returns:
        `str`: The text without secrets, and with escaped control and format characters; see
        [`rlora_trl.reading.printable`].
    """
    # Files are read through this module. Before its import, which takes seconds, text comes from the command line.
    reading = sys.modules.get("rlora_trl.reading")
    printable = getattr(reading, "printable", _printable)
    text = printable(redact(text), keep=keep)
    return text if encoding is None else _encodable(text, encoding)


def _printable(text: str, keep: str) -> str:
    escaped = (c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)
    return text if text.isprintable() else "".join(escaped)


def as_message(text: str) -> str:
    """An error or a warning as it is shown; lines after the first are indented, so that none looks like another."""
    text = redact(text.strip())  # before a secret could be cut
    if len(text) > _MAX_MESSAGE:
        text = f"{text[:_MAX_MESSAGE]}... and {len(text) - _MAX_MESSAGE:,} more characters"
    return shown(text, keep="\n").replace("\n", "\n  ")


def _encodable(text: str, encoding: str) -> str:
    return text if text.isascii() else text.encode(encoding, "backslashreplace").decode(encoding)


class EncodingStream:
    """A stream whose text may have characters that its encoding does not have: they are escaped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._stream.write(_encodable(text, self._stream.encoding or "utf-8"))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)


class GuardedStream(EncodingStream):
    """A stream for what libraries write; `own` is the same stream for text that has been escaped."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.own = EncodingStream(stream)

    def write(self, text: str) -> int:
        if _MOVED.fullmatch(text):
            self.own.write(text)
            return len(text)
        redrawn = _REDRAWN.match(text)
        begin = redrawn[0] if redrawn else ""
        rest = text[len(begin) :].expandtabs(4)
        if self.isatty():
            rest = _STYLE.sub("", rest)
        self.own.write(begin + shown(rest, keep="\n"))
        return len(text)


@contextmanager
def guarded_streams() -> Iterator[None]:
    """Escape what libraries write to stdout and stderr."""
    stdout, stderr = (cast(TextIO, GuardedStream(unguarded(stream))) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(stdout), redirect_stderr(stderr):
        yield


@contextmanager
def guarded_descriptors() -> Iterator[None]:
    """
    Escape what compiled libraries write, past Python's streams; all of it appears on stderr at the end.

    tokenizers, for example, prints keys of files that it does not know. The text waits in a file: a pipe could be full
    while the library holds the lock that its reader needs.
    """
    with TemporaryFile() as file:
        saved = [os.dup(descriptor) for descriptor in _DESCRIPTORS]
        _flush()
        for descriptor in _DESCRIPTORS:
            os.dup2(file.fileno(), descriptor)
        try:
            yield
        finally:
            _flush()
            for descriptor, original in zip(_DESCRIPTORS, saved, strict=True):
                os.dup2(original, descriptor)
                os.close(original)
            file.seek(0)
            GuardedStream(unguarded(sys.stderr)).write(file.read().decode("utf-8", "backslashreplace"))


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def unguarded(stream: TextIO) -> TextIO:
    """The stream for text that has been escaped."""
    return cast(TextIO, stream.own if isinstance(stream, GuardedStream) else EncodingStream(stream))
