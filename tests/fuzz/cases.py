"""Reads one input within limits on time and memory, and reduces an input that fails."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

from .samples import Files


SECONDS = 2.0  # of processor time that one input may take, where `slowness` is 1
USUAL = 0.012  # seconds of what `slowness` measures
MEGABYTES = 500  # that one input may add to the memory of the process
# At this many times the limits an input is ended with its process, as it may never return.
FATAL = 2
# A message is shown to a user.
MESSAGE_LIMIT = 5_000
_PAGE = os.sysconf("SC_PAGE_SIZE")
# Linux resets the peak of resident memory on request; elsewhere the peak only grows, and large inputs hide small ones.
_CAN_RESET = os.access("/proc/self/clear_refs", os.W_OK)


@dataclass(frozen=True)
class Reader:
    """
    A reader of foreign files.

    Args:
        name (`str`): Its name, for `--only` and the report.
        make (`Callable[[Random], Files]`): Makes an input.
        read (`Callable[[Files, Path], None]`): Reads an input; the folder is empty, for files that it needs.
        errors (`tuple[type[Exception], ...]`): The errors that it documents: the input is refused.
        weight (`int`, *optional*, defaults to `1`): Its share of the inputs; small for slow readers.
    """

    name: str
    make: Callable[[Random], Files]
    read: Callable[[Files, Path], None]
    errors: tuple[type[Exception], ...]
    weight: int = 1


@dataclass(frozen=True)
class Outcome:
    """
    What became of an input.

    Args:
        verdict (`str`): "accepted", "refused", or the kind of failure: "error", "slow", "memory".
        detail (`str`): The error, in one line.
        place (`str`): File and line that raised it, to tell failures apart.
        seconds (`float`), megabytes (`float`): Processor time and memory that reading took.
        trace (`str`): The traceback of an undocumented error.
    """

    verdict: str
    detail: str = ""
    place: str = ""
    seconds: float = 0.0
    megabytes: float = 0.0
    trace: str = ""

    @property
    def failed(self) -> bool:
        return self.verdict not in ("accepted", "refused")


def slowness() -> float:
    """How many times longer than on a usual machine small operations take here, at least 1: limits scale with it."""
    import torch

    values, times = torch.zeros(4), []
    for _ in range(5):
        start = time.thread_time()
        for number in range(1_000):
            torch.isfinite(values).all()
            values.split(2)
            json.dumps({"number": number})
        times.append(time.thread_time() - start)
    return max(1.0, min(times) / USUAL)


def limit_memory() -> None:
    """Let allocations fail far beyond what an input may take, before they take the machine's memory."""
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            present = int(file.read().split()[0]) * _PAGE
        resource.setrlimit(resource.RLIMIT_AS, (present + 2 * FATAL * MEGABYTES * 2**20, resource.RLIM_INFINITY))


@contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """
    End the process, by a signal that it does not handle, if the block takes so much processor time.

    An exception would not do: regular expressions and parsers in C do not return to Python meanwhile.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def run_case(reader: Reader, files: Files, scratch: Path, limit: float = SECONDS) -> Outcome:
    """
    Read an input.

    Args:
        reader (`Reader`): The reader.
        files (`Files`): The input.
        scratch (`Path`): A folder for its files.
        limit (`float`, *optional*, defaults to `2.0`): Seconds of processor time that it may take.

    Returns:
        [`Outcome`]: Its verdict. An input that takes far too long or too much ends the process instead.
    """
    folder = scratch / "case"
    folder.mkdir()
    resident = _reset_peak()
    # Of this thread, as the clock of a process is as coarse as the kernel's ticks while the timer runs.
    start = time.thread_time()
    verdict, detail, place, trace = "accepted", "", "", ""
    try:
        with _ended_after(FATAL * limit):
            reader.read(files, folder)
    except reader.errors as error:
        verdict, detail, place = "refused", _line(error), _place(error)
        if len(str(error)) > MESSAGE_LIMIT:
            verdict, detail = "error", f"a message of {len(str(error))} characters: {detail}"
    except (Exception, MemoryError) as error:
        verdict, detail, place = "error", _line(error), _place(error)
        trace = "".join(traceback.format_exception(error, limit=-12))[-6_000:]
        if isinstance(error, MemoryError):
            verdict = "memory"
    seconds, megabytes = time.thread_time() - start, _peak() - resident
    shutil.rmtree(folder)
    if megabytes > MEGABYTES:
        verdict, detail = "memory", f"{megabytes:.0f} MB; {detail}"
    elif seconds > limit and verdict != "error":
        verdict, detail = "slow", f"{seconds:.1f} s; {detail}"
    return Outcome(verdict, detail, place, seconds, megabytes, trace)


def _line(error: BaseException) -> str:
    return ascii(f"{type(error).__name__}: {error}"[:300])[1:-1]


def _place(error: BaseException) -> str:
    """The last frame of the package, or of whatever raised the error."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "rlora_" in frame.filename] or list(frames[-1:])
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""


def _reset_peak() -> float:
    """Resident memory in megabytes; the peak is measured from now on."""
    if not _CAN_RESET:
        return _peak()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * _PAGE / 2**20


def _peak() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def reduce(reader: Reader, files: Files, outcome: Outcome, scratch: Path, seconds: float = 2.0) -> Files:
    """
    Cut parts of an input as long as it fails in the same way.

    Args:
        reader (`Reader`), files (`Files`), scratch (`Path`): As in [`run_case`].
        outcome ([`Outcome`]): Of the input.
        seconds (`float`, *optional*, defaults to `2.0`): When to stop.
    """
    end = time.monotonic() + seconds
    same = (outcome.verdict, outcome.place, outcome.detail.partition(":")[0])

    def fails(candidate: Files) -> bool:
        found = run_case(reader, candidate, scratch)
        return (found.verdict, found.place, found.detail.partition(":")[0]) == same

    for name in files:
        size = len(files[name]) // 2
        while size:
            start = 0
            while start < len(files[name]):
                if time.monotonic() > end:
                    return files
                data = files[name]
                candidate = {**files, name: data[:start] + data[start + size :]}
                if fails(candidate):
                    files = candidate
                else:
                    start += size
            size //= 2
    return files
