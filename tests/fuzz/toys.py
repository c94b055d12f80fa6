"""Readers with known faults, for the test that the fuzzer reports each: `python -m fuzz --readers fuzz.toys`."""

from __future__ import annotations

import re
import time
from pathlib import Path
from random import Random

from .cases import Reader
from .samples import Files


# The input at which the fault of a reader shows.
_FAULTY = 12


def _make(rng: Random) -> Files:
    return {"number": str(rng.randrange(25)).encode()}


def _read_number(files: Files, folder: Path) -> None:
    _number(files)


def _number(files: Files) -> int:
    number = int(files["number"])
    if number % 2:
        raise ValueError(f"{number} is odd")
    return number


def _read_wrong_type(files: Files, folder: Path) -> None:
    if _number(files) == _FAULTY:
        len(_number(files))  # type: ignore[arg-type]


def _read_stuck(files: Files, folder: Path) -> None:
    if _number(files) == _FAULTY:
        re.match("(a|a)+b", "a" * 60)


def _read_asleep(files: Files, folder: Path) -> None:
    if _number(files) == _FAULTY:
        time.sleep(3600)


def _read_slow(files: Files, folder: Path) -> None:
    """Takes longer than the limit of the test, 0.5 s, but returns before it is ended."""
    end = time.thread_time() + (0.7 if _number(files) == _FAULTY else 0)
    while time.thread_time() < end:
        pass


def _read_large(files: Files, folder: Path) -> None:
    if _number(files) == _FAULTY:
        bytearray(600 * 2**20)


def _read_huge(files: Files, folder: Path) -> None:
    if _number(files) == _FAULTY:
        [0] * 2**40


def _read_crash(files: Files, folder: Path) -> None:
    if _number(files) == _FAULTY:
        import ctypes

        ctypes.string_at(0)


def _read_idle(files: Files, folder: Path) -> None:
    raise ValueError("nothing is ever accepted")


READERS = [
    Reader(name, _make, read, (ValueError,))
    for name, read in (
        ("good", _read_number),
        ("wrong_type", _read_wrong_type),
        ("stuck", _read_stuck),
        ("asleep", _read_asleep),
        ("slow", _read_slow),
        ("large", _read_large),
        ("huge", _read_huge),
        ("crash", _read_crash),
        ("idle", _read_idle),
    )
]
