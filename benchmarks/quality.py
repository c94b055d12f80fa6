"""A fair comparison of rlora_trl with LoRA: many short trainings of a small model, each with its own learning rate.

    python benchmarks/quality.py --model SmolLM2-135M-Instruct --data DATA --plan tuning --gpus 4 \\
        --workers_per_gpu 3 --total_limit 540 --out benchmarks/results/quality.jsonl

`--model` is a folder of a causal language model and its tokenizer, `--data` a folder with the suites `multitask` and
`setting1`: rows {prompt, completion, options} in `<suite>/<task>/train.jsonl` and `test.jsonl`. A run is a method with
its options, a suite, a size, a learning rate and a seed. Runs that are in `--out` without an error are skipped, so the
same command continues after a cut. Runs of one shape of a lab method train side by side (`--side_by_side`).
"""

import argparse
import json
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any


# Imports count toward the limit.
_STARTED = time.monotonic()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from quality_finals import FINAL_SEEDS, finals
from quality_plans import CELLS, LABELS, METHODS, PLANS, RATES, grid
from quality_rows import read
from quality_runs import LAB, Run, group_cost, groups_of, with_model
from quality_worker import WorkerSettings, run_facts, work


MARGIN = 1.3  # a group is started if this times its expected seconds are left
MAX_RESTARTS = 3


@dataclass
class Worker:
    """A process, the pipe to it, and the group that it trains."""

    settings: WorkerSettings
    process: Any = None
    connection: Connection | None = None
    group: list[Run] = field(default_factory=list)
    started: float = 0.0
    ready: bool = False
    restarts: int = 0

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, self.settings), daemon=True)
        self.process.start()
        other.close()
        self.ready, self.group = False, []

    def end(self) -> None:
        """End the process, by its own handle."""
        if self.process is not None and self.process.is_alive():
            self.process.kill()
            self.process.join(10)


class Pool:
    """
    Workers that take groups from one queue.

    Args:
        settings (`Sequence[WorkerSettings]`): Of the workers.
        groups (`Sequence[list[Run]]`): In order.
        out (`Path`): Receives the rows.
        limit (`float`): Seconds for everything.
    """

    def __init__(
        self, settings: Sequence[WorkerSettings], groups: Sequence[list[Run]], out: Path, limit: float
    ) -> None:
        self.workers = [Worker(one) for one in settings[: max(1, len(groups))]]
        self.queue, self.out = deque(groups), out
        self.begin, self.limit = time.monotonic(), limit
        self.pace: dict[tuple[str, bool], float] = {}  # seconds for a unit of cost, the slowest yet of each kind
        self.total, self.done, self.failed = sum(map(len, groups)), 0, 0

    def left(self) -> float:
        return self.limit - (time.monotonic() - self.begin)

    def run(self) -> None:
        """Until all is done, or no time is left."""
        for worker in self.workers:
            worker.start()
        try:
            while any(worker.connection is not None for worker in self.workers) and self.left() > 0:
                pipes = {w.connection: w for w in self.workers if w.connection is not None}
                for pipe in wait(list(pipes), timeout=max(0.0, min(5.0, self.left()))):
                    self._receive(pipes[pipe])
        finally:
            for worker in self.workers:
                worker.end()
        left = sum(map(len, self.queue)) + sum(len(worker.group) for worker in self.workers)
        print(f"{self.done} rows, {self.failed} of them errors; {left} runs left", flush=True)

    def _receive(self, worker: Worker) -> None:
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            self._lost(worker)
            return
        if worker.ready:
            self._write(message)
            seconds = time.monotonic() - worker.started
            kind = self._kind(worker.group)
            self.pace[kind] = max(self.pace.get(kind, 0.0), seconds / group_cost(worker.group))
        worker.ready, worker.group = True, []
        self._give(worker)

    def _give(self, worker: Worker) -> None:
        """Hand out the next group that still fits into the time, or let the worker end."""
        while self.queue:
            group = self.queue[0]
            pace = self.pace.get(self._kind(group), max(self.pace.values(), default=0.0))
            if MARGIN * pace * group_cost(group) > self.left():
                break
            self.queue.popleft()
            worker.group, worker.started = group, time.monotonic()
            worker.connection.send(group)
            return
        worker.connection.send(None)
        worker.connection.close()
        worker.connection = None

    @staticmethod
    def _kind(group: list[Run]) -> tuple[str, bool]:
        """Groups of one kind take about the same time for their cost."""
        return group[0].suite, group[0].method in LAB

    def _lost(self, worker: Worker) -> None:
        """A process has died: its runs get rows with an error, and it is started anew a few times."""
        worker.process.join(10)
        why = f"the process ended with code {worker.process.exitcode}"
        self._write([{**run_facts(run), "error": why} for run in worker.group])
        worker.connection, worker.group = None, []
        if self.queue and worker.restarts < MAX_RESTARTS:
            worker.restarts += 1
            worker.start()

    def _write(self, rows: list[dict]) -> None:
        """Append rows at once and say so."""
        if not rows:
            return
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with self.out.open("a+b") as file:
            # A line that was cut off must not swallow the next one.
            cut = file.tell() > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"
            text = "".join(json.dumps(row) + "\n" for row in rows)
            file.write(("\n" * cut + text).encode())
            file.flush()
            os.fsync(file.fileno())
        self.done += len(rows)
        self.failed += sum("error" in row for row in rows)
        for row in rows:
            result = row.get("error") or f"{row['mean_accuracy']:.2f}"
            print(
                f"[{time.monotonic() - self.begin:5.0f} s {self.done}/{self.total}] {row['suite']} {row['size']} "
                f"{row['learning_rate']:g} seed {row['seed']} {row['name']}: {result}",
                flush=True,
            )


def planned(args: argparse.Namespace) -> list[Run]:
    """All runs that were asked for, those left out that are done."""
    runs = [run for name in args.plan for run in PLANS[name]()]
    if args.methods:
        cells = tuple((suite, size) for suite, size in (cell.split("/") for cell in args.cells))
        chosen = {label: METHODS[label] for label in args.methods}
        runs += grid(chosen, tuple(args.rates), tuple(args.seeds), cells, batch=args.batch)
    for path in args.runs:
        runs += [Run.from_dict(values) for values in json.loads(path.read_text())]
    rows = read(args.out)
    if args.finals:
        known = [row for row in rows if row["model"] == args.model.name]
        runs += finals(known, args.finals, args.final_seeds)
    done = {row["key"] for row in rows}
    return [run for run in with_model(runs, args.model.name) if run.key not in done]


def worker_settings(args: argparse.Namespace) -> list[WorkerSettings]:
    """Those of all workers: first one for each GPU, then a second one, and so on."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    count = max(1, args.gpus) * args.workers_per_gpu
    pinned = len(cores) >= 2 * count
    return [
        WorkerSettings(
            args.model,
            args.data,
            f"cuda:{i % args.gpus}" if args.gpus else "cpu",
            tuple(cores[2 * i : 2 * i + 2]) if pinned else (),
            args.dtype,
            args.train_tokens,
            args.score_tokens,
        )
        for i in range(count)
    ]


def main(arguments: list[str] | None = None, started: float | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a model and its tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="folder of the suites")
    parser.add_argument("--out", type=Path, required=True, help="file of rows, appended to")
    parser.add_argument("--plan", nargs="+", default=[], choices=list(PLANS))
    parser.add_argument("--runs", type=Path, nargs="+", default=[], help="JSON files with lists of runs")
    parser.add_argument(
        "--methods", nargs="+", default=[], choices=list(METHODS), metavar="LABEL", help="of the plans"
    )
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates of --methods")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of --methods")
    parser.add_argument("--cells", nargs="+", default=["/".join(cell) for cell in CELLS], help="of --methods")
    parser.add_argument("--batch", type=int, default=32, help="of --methods")
    parser.add_argument(
        "--finals",
        nargs="+",
        default=[],
        choices=list(LABELS),
        metavar="LABEL",
        help="at the settings that the rows of --out choose, on other seeds",
    )
    parser.add_argument("--final_seeds", "--final-seeds", type=int, nargs="+", default=FINAL_SEEDS, help="of --finals")
    parser.add_argument("--gpus", type=int, default=0, help="0 trains on the CPU")
    parser.add_argument("--workers_per_gpu", "--workers-per-gpu", type=int, default=1)
    parser.add_argument("--side_by_side", "--side-by-side", type=int, default=8, help="runs of a group, at most")
    parser.add_argument("--total_limit", "--total-limit", type=float, default=3600, help="seconds")
    parser.add_argument("--dtype", default="bfloat16", help="of the base")
    parser.add_argument("--train_tokens", type=int, default=24576, help="of a forward pass, for all its runs")
    parser.add_argument("--score_tokens", type=int, default=32768)
    parser.add_argument("--list", action="store_true", help="show the groups and train nothing")
    args = parser.parse_args(arguments)

    runs = planned(args)
    groups = groups_of(runs, args.side_by_side)
    print(f"{len(runs)} runs in {len(groups)} groups", flush=True)
    if args.list:
        for group in groups:
            print(len(group), group[0].suite, group[0].size, "; ".join(sorted({run.name for run in group})))
        return
    if groups:
        spent = 0.0 if started is None else time.monotonic() - started
        Pool(worker_settings(args), groups, args.out, args.total_limit - spent).run()


if __name__ == "__main__":
    main(started=_STARTED)
