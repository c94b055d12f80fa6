"""Worker processes that read inputs, and the parent that watches them and collects what failed."""

from __future__ import annotations

import gc
import logging
import math
import multiprocessing
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any

from .cases import FATAL, SECONDS, Outcome, Reader, limit_memory, reduce, run_case
from .samples import Files


# Readers wait for nothing: one that takes this many times its limit by the clock, on a busy machine too, is stuck.
_STUCK = 10
_MAKING, _READING, _REDUCING = range(3)
_TALLIES = ("inputs", "refused", "accepted", "failures")


@dataclass(frozen=True)
class Plan:
    """
    Which inputs are read.

    Args:
        readers (`Sequence[Reader]`): The readers.
        seed (`int`): Inputs follow from it, the name of the reader and their number.
        seconds (`float`): When to stop.
        cases (`int`, *optional*): Number of inputs after which to stop.
        first (`int`, *optional*, defaults to `0`): Number of the first input.
        workers (`int`, *optional*, defaults to `2`): Number of processes.
        output (`Path`, *optional*): Folder for inputs that fail.
        limit (`float`, *optional*, defaults to `2.0`): Seconds of processor time that an input may take.
        once (`bool`, *optional*, defaults to `False`): One input for each reader, in order.
    """

    readers: Sequence[Reader]
    seed: int
    seconds: float
    cases: int | None = None
    first: int = 0
    workers: int = 2
    output: Path | None = None
    limit: float = SECONDS
    once: bool = False

    @property
    def end(self) -> float:
        """The number after that of the last input."""
        if self.once:
            return len(self.readers)
        return math.inf if self.cases is None else self.first + self.cases

    def reader(self, number: int) -> int:
        """Index of the reader of an input: random, with chances by weight."""
        if self.once:
            return number
        # Seeded by text, which is hashed: numbers in sequence would give similar choices.
        weights = [reader.weight for reader in self.readers]
        return random.Random(f"{self.seed} {number}").choices(range(len(weights)), weights)[0]

    def make(self, reader: int, number: int) -> Files:
        """Make an input."""
        chosen = self.readers[reader]
        return chosen.make(random.Random(f"{self.seed} {chosen.name} {number}"))


@dataclass(frozen=True)
class Failure:
    """An input that failed, reduced where that was possible."""

    reader: str
    number: int
    outcome: Outcome
    files: Files


@dataclass
class Report:
    """
    What became of all inputs.

    Attributes:
        rows (`dict[str, dict[str, float]]`): By reader: inputs, refused, accepted, failures; processor time in seconds
            of all inputs (total) and of the slowest (seconds); megabytes of the largest.
        failures (`dict[tuple, list[Failure]]`): Failures by reader, kind and place.
        seconds (`float`): How long the run took.
    """

    rows: dict[str, dict[str, float]] = field(default_factory=dict)
    failures: dict[tuple[str, str, str], list[Failure]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def idle(self) -> list[str]:
        """Readers that accepted none of many inputs: their samples no longer fit, and little of them was tried."""
        return [name for name, row in self.rows.items() if row["inputs"] >= 300 and not row["accepted"]]


class _Board:
    """Memory that workers and parent share, so that counts and the present input survive the end of a worker."""

    def __init__(self, plan: Plan) -> None:
        self.number = RawArray("q", [plan.first + worker for worker in range(plan.workers)])
        self.phase = RawArray("i", plan.workers)
        self.since = RawArray("d", [time.monotonic()] * plan.workers)
        size = plan.workers * len(plan.readers)
        self.tallies = {name: RawArray("q", size) for name in _TALLIES}
        self.slowest, self.largest, self.total = (RawArray("d", size) for _ in range(3))

    def enter(self, worker: int, phase: int) -> None:
        self.since[worker], self.phase[worker] = time.monotonic(), phase

    def rows(self, plan: Plan) -> dict[str, dict[str, float]]:
        result = {}
        for index, reader in enumerate(plan.readers):
            places = [worker * len(plan.readers) + index for worker in range(plan.workers)]
            row: dict[str, float] = {name: sum(tally[i] for i in places) for name, tally in self.tallies.items()}
            row["total"] = sum(self.total[i] for i in places)
            row["seconds"] = max(self.slowest[i] for i in places)
            row["megabytes"] = max(self.largest[i] for i in places)
            result[reader.name] = row
        return result


def _work(plan: Plan, worker: int, end: float, board: _Board, connection: Any) -> None:
    """Read inputs, from the present one of this worker on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    gc.freeze()
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-", dir=_fast_folder()))
    reduced: Counter[tuple[str, str, str]] = Counter()
    limit_memory()
    try:
        while time.monotonic() < end and board.number[worker] < plan.end:
            number = board.number[worker]
            board.enter(worker, _MAKING)
            index = plan.reader(number)
            files, reader = plan.make(index, number), plan.readers[index]

            board.enter(worker, _READING)
            outcome = run_case(reader, files, scratch, plan.limit)
            _count(board, worker * len(plan.readers) + index, outcome)
            if outcome.failed:
                board.enter(worker, _REDUCING)
                kind = (reader.name, outcome.verdict, outcome.place)
                reduced[kind] += 1
                if reduced[kind] == 1 and outcome.verdict == "error":
                    connection.send(Failure(reader.name, number, outcome, reduce(reader, files, outcome, scratch)))
                else:
                    connection.send(Failure(reader.name, number, outcome, files if reduced[kind] == 1 else {}))
            board.number[worker] += plan.workers
            if outcome.verdict == "memory":  # start afresh, with little memory
                sys.exit(0)
        board.number[worker] = -1
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _fast_folder() -> str | None:
    """A folder in memory, where there is one."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _count(board: _Board, place: int, outcome: Outcome) -> None:
    board.tallies["inputs"][place] += 1
    board.tallies["failures" if outcome.failed else outcome.verdict][place] += 1
    board.total[place] += outcome.seconds
    board.slowest[place] = max(board.slowest[place], outcome.seconds)
    board.largest[place] = max(board.largest[place], outcome.megabytes)


class _Watch:
    """The parent: starts workers, ends those that are stuck, and starts them again after their input."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.board, self.report = plan, _Board(plan), Report()
        self.context = multiprocessing.get_context("fork")
        self.start = time.monotonic()
        self.processes: dict[int, Any] = {}
        self.connections: dict[int, Any] = {}

    def run(self) -> Report:
        # What is imported is shared with the workers; a collection would copy it.
        gc.collect()
        gc.freeze()
        try:
            for worker in range(self.plan.workers):
                self._begin(worker)
            while self.processes:
                wait([*self.connections.values(), *(p.sentinel for p in self.processes.values())], timeout=0.2)
                for worker in list(self.processes):
                    self._look_at(worker)
        finally:
            for process in self.processes.values():
                process.kill()
                process.join()
            gc.unfreeze()
        self.report.rows = self.board.rows(self.plan)
        self.report.seconds = time.monotonic() - self.start
        return self.report

    def _begin(self, worker: int) -> None:
        receiver, sender = self.context.Pipe(duplex=False)
        self.board.enter(worker, _MAKING)
        arguments = (self.plan, worker, self.start + self.plan.seconds, self.board, sender)
        process = self.context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        sender.close()
        self.processes[worker], self.connections[worker] = process, receiver

    def _look_at(self, worker: int) -> None:
        process, connection = self.processes[worker], self.connections[worker]
        seconds = time.monotonic() - self.board.since[worker]
        stuck = self.board.phase[worker] == _READING and seconds > _STUCK * self.plan.limit
        if stuck and process.is_alive():
            process.kill()
        is_over = not process.is_alive()
        try:
            while connection.poll():
                self._note(connection.recv())
        except (EOFError, OSError):
            is_over = True
        if not is_over:
            return

        process.join()
        del self.processes[worker], self.connections[worker]
        connection.close()
        if self.board.number[worker] == -1:
            return
        if process.exitcode != 0:
            self._note_end(worker, process.exitcode, stuck)
        self._begin(worker)

    def _note_end(self, worker: int, exit_code: int, stuck: bool) -> None:
        """A worker was ended while it read an input, by its limits or by the parent."""
        number, phase = self.board.number[worker], self.board.phase[worker]
        if phase == _MAKING or exit_code > 0:
            raise RuntimeError(f"The fuzzer itself failed on input {number} (exit code {exit_code}); see above.")
        self.board.number[worker] += self.plan.workers
        if phase == _REDUCING:  # the failure is known already
            return
        if stuck:
            seconds = _STUCK * self.plan.limit
            outcome = Outcome("stuck", f"did not return within {seconds:g} s", seconds=seconds)
        elif exit_code == -signal.SIGPROF:
            seconds = FATAL * self.plan.limit
            outcome = Outcome("slow", f"ended after {seconds:g} s of processor time", seconds=seconds)
        else:
            outcome = Outcome("crash", f"the process was ended by {signal.Signals(-exit_code).name}")
        index = self.plan.reader(number)
        _count(self.board, worker * len(self.plan.readers) + index, outcome)
        files = self.plan.make(index, number)
        self._note(Failure(self.plan.readers[index].name, number, outcome, files))

    def _note(self, failure: Failure) -> None:
        kind = (failure.reader, failure.outcome.verdict, failure.outcome.place)
        alike = self.report.failures.setdefault(kind, [])
        alike.append(failure)
        # Failures that end a worker have no place, and may differ.
        is_new = len(alike) == 1 or (not failure.outcome.place and len(alike) <= 20)
        if is_new and self.plan.output is not None:
            save(failure, self.plan)


def save(failure: Failure, plan: Plan) -> Path:
    """Write the input of a failure, and how to repeat it."""
    assert plan.output is not None
    folder = plan.output / f"{failure.reader}-{plan.seed}-{failure.number}"
    folder.mkdir(parents=True, exist_ok=True)
    outcome = failure.outcome
    repeat = f"python -m fuzz --seed {plan.seed} --only {failure.reader} --first {failure.number} --cases 1"
    lines = [f"{outcome.verdict}: {outcome.detail}", outcome.place, repeat, "", outcome.trace]
    (folder / "failure.txt").write_text("\n".join(lines), encoding="utf-8", errors="backslashreplace")
    for index, (name, data) in enumerate(failure.files.items()):
        # Names of files may be malicious too: each is stored under its number.
        (folder / f"file-{index}").write_bytes(data)
        with open(folder / "names.txt", "a", encoding="utf-8") as file:
            file.write(f"file-{index} {ascii(name)}\n")
    return folder


def fuzz(plan: Plan) -> Report:
    """
    Read many inputs.

    Args:
        plan ([`Plan`]): Which ones.

    Returns:
        [`Report`]: Counts, extremes and failures.

    Raises:
        RuntimeError: If an input can't be made: a fault of the fuzzer.
    """
    try:
        return _Watch(plan).run()
    except RuntimeError:
        traceback.print_exc()
        raise
