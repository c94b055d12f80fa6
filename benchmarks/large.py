"""Step time and memory of large models under each strategy, ours beside PEFT's LoRA, and the largest that trains.

    python benchmarks/large.py --out benchmarks/results/large.jsonl                 # 7B shape, one GPU
    python benchmarks/large.py --processes 1 2 --out ...                            # on one and on two GPUs
    python benchmarks/large.py --largest --out ...                                  # largest 4-bit model on one GPU
    python benchmarks/large.py --report                                             # tables of docs/large-models.md

Real trainers on random weights and tokens: `RLoraSFTTrainer` (r=4, three heads) and `trl.SFTTrainer` with PEFT's LoRA
of as many parameters, one after the other in the same processes. The batch of a GPU stays the same, so two GPUs do
twice the work of one in a step. A case that fails becomes a row that says why, and the rest goes on.
"""

import argparse
import json
import os
import queue
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from large_shapes import SHAPES


HERE = Path(__file__).parent
# More than this, in GiB, left by one job would show in the next one's memory: its processes are replaced.
LEFT = 0.1
PROGRAM = HERE / "large_worker.py"
ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
OUT_OF_MEMORY = "out of memory"  # the name that large_worker.py gives it


class Case(NamedTuple):
    """How a base is held (`"bf16"` or `"nf4"`), how it is spread, and how 4-bit values are packed."""

    base: str
    strategy: str
    storage: str = "uint8"


# Over two processes "single" is data parallel (DDP).
CASES = {
    "bf16": Case("bf16", "single"),
    "bf16-zero2": Case("bf16", "zero2"),
    "bf16-zero3": Case("bf16", "zero3"),
    "bf16-fsdp2": Case("bf16", "fsdp2"),
    "nf4": Case("nf4", "single"),
    "nf4-zero3": Case("nf4", "zero3", "bfloat16"),
    "nf4-fsdp2": Case("nf4", "fsdp2", "bfloat16"),
}
DEFAULT_CASES = {
    1: ["nf4", "bf16-zero2", "bf16-zero3", "bf16", "bf16-fsdp2"],
    2: ["nf4", "bf16-zero2", "bf16-zero3", "bf16-fsdp2", "nf4-zero3"],
}
METHODS = ("ours", "lora")


class Clock:
    """What is left of the time for all."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def one_gpu(place: int) -> str:
    """The value of `CUDA_VISIBLE_DEVICES` that shows one of the GPUs that are visible here; none stays none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return str(place)
    return visible.split(",")[place] if visible else ""


class Workers:
    """
    The processes of one case, started at once and given jobs later.

    Args:
        folder (`Path`): Where they log and answer.
        processes (`int`): How many, with a GPU each.
        strategy (`str`): As in `CASES`.
        gpu (`int`, *optional*, defaults to 0): The only GPU that a single process sees.
    """

    def __init__(self, folder: Path, processes: int, strategy: str, gpu: int = 0) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=folder))
        self.count = 0
        preload = ["deepspeed"] if strategy.startswith("zero") else []
        command = [sys.executable, str(PROGRAM), "--answers", str(self.folder), "--preload", *preload]
        shared = dict(os.environ, PYTHONUNBUFFERED="1")
        if processes == 1:  # which would spread a batch over all that it sees
            shared["CUDA_VISIBLE_DEVICES"] = one_gpu(gpu)
        if processes > 1 or strategy != "single":
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
            shared |= {"LOCAL_WORLD_SIZE": str(processes)}
        self.processes = []
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if "WORLD_SIZE" in shared else {}
            log = (self.folder / f"log.{rank}").open("w")
            with log:
                self.processes.append(
                    subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=shared | own)
                )

    @property
    def alive(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def run(self, job: dict, limit: float) -> list[dict]:
        """
        The answers of all processes to a job.

        Where one fails, dies, or takes longer than `limit` seconds, all are ended, and the first answer has `error`;
        a single process that ran out of memory and has freed it goes on.
        """
        self.count += 1
        job = {**job, "id": self.count, "limit": limit}
        end = time.monotonic() + limit
        try:
            for process in self.processes:
                assert process.stdin is not None
                process.stdin.write(json.dumps(job).encode() + b"\n")
                process.stdin.flush()
        except BrokenPipeError:
            pass  # it is dead, which shows below
        paths = [self.folder / f"{self.count}.{rank}.json" for rank in range(len(self.processes))]
        while not all(path.exists() for path in paths):
            failed = [path for path in paths if path.exists() and "error" in json.loads(path.read_text())]
            if failed:
                time.sleep(2)  # for what the others have to say
            if failed or not self.alive or time.monotonic() > end:
                break
            time.sleep(0.05)
        answers = [json.loads(path.read_text()) for path in paths if path.exists()]
        answers.sort(key=lambda answer: "error" not in answer)
        if [answer.get("error") for answer in answers] == [OUT_OF_MEMORY] and answers[0]["left_gib"] <= LEFT:
            return answers  # a single process that has freed what it took can go on
        if len(answers) < len(paths) or "error" in answers[0]:
            if not answers or "error" not in answers[0]:
                reason = f"no answer within {limit:.0f} s" if self.alive else "a process died"
                answers.insert(0, {"error": reason, "environment": {}})
            self.end()
        elif max(answer["left_gib"] for answer in answers) > LEFT:
            self.close()
        return answers

    def log_tail(self, lines: int = 12) -> str:
        """The end of what each process printed."""
        parts = []
        for rank in range(len(self.processes)):
            text = (self.folder / f"log.{rank}").read_text(errors="replace").splitlines()[-lines:]
            parts.append("\n".join(f"    [{rank}] {line}" for line in text))
        return "\n".join(parts)

    def close(self) -> None:
        """Let them end, and wait."""
        for process in self.processes:
            if process.stdin is not None and not process.stdin.closed:
                try:
                    process.stdin.close()
                except BrokenPipeError:
                    pass
        end = time.monotonic() + 15
        while self.processes and any(process.poll() is None for process in self.processes):
            if time.monotonic() > end:
                break
            time.sleep(0.05)
        self.end()

    def end(self) -> None:
        """End them at once."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def merge(job: dict, answers: list[dict], command: str) -> dict:
    """One row of a job: the slowest process's times, the largest memory of any, and where it ran; or the error."""
    row = {key: value for key, value in job.items() if key != "limit"}
    given = answers[0]
    for answer in answers:
        row |= answer.get("environment", {})
    row["command"] = command
    if "error" in given:
        return row | {"median_ms": None, "error": given["error"]}
    rows = [answer["row"] for answer in answers]
    slowest = max(rows, key=lambda one: statistics.median(one["times_ms"]))
    row |= slowest
    for key in ("peak_gib", "peak_with_start_gib", "reserved_gib"):
        row[key] = round(max(one[key] for one in rows), 3)
    row["median_ms"] = statistics.median(slowest["times_ms"])
    row["tokens_per_second"] = round(1e3 * job["batch"] * job["length"] * job["processes"] / row["median_ms"], 1)
    return row


class Recorder:
    """Writes rows as they come, and prints a line for each."""

    def __init__(self, out: Path | None, command: str) -> None:
        self.out, self.command, self.rows = out, command, []
        self.environment: dict[str, Any] = {}
        self.lock = threading.Lock()

    def note(self, job: dict, answers: list[dict], tail: str = "") -> dict:
        with self.lock:
            # A process that died does not tell where it ran: as those before it.
            self.environment = next((a["environment"] for a in answers if a.get("environment")), self.environment)
            row = self.environment | merge(job, answers, self.command)
            self.rows.append(row)
            if self.out is not None:
                self.out.parent.mkdir(parents=True, exist_ok=True)
                with self.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            print(line_of(row), flush=True)
            if "error" in row and tail and row["error"] != OUT_OF_MEMORY:
                print(tail, flush=True)
        return row


def line_of(row: dict) -> str:
    """A row in a line."""
    name = f"{row['shape']} x{row['layers']} {row['case']} on {row['processes']}, {row['method']}"
    if row["median_ms"] is None:
        return f"{name:<52} {row['error'][:120]}"
    return (
        f"{name:<52} {row['median_ms']:8.1f} ms  peak {row['peak_gib']:6.2f} GiB  with start "
        f"{row['peak_with_start_gib']:6.2f}  loss {row['loss']:.3f}  [{row['build_s']:.0f} of {row['wall_s']:.0f} s]"
    )


def run_cases(args: argparse.Namespace, recorder: Recorder, clock: Clock, folder: Path) -> None:
    """All cases: those of one process side by side where there are GPUs for it, then the others, one at a time."""
    for processes in sorted(args.processes):
        cases: queue.SimpleQueue[str] = queue.SimpleQueue()
        for name in args.cases or DEFAULT_CASES[min(processes, 2)]:
            cases.put(name)
        lanes = args.lanes if processes == 1 else 1
        threads = [
            threading.Thread(
                target=run_lane,
                args=(args, recorder, clock, folder, processes, cases, lane),
            )
            for lane in range(lanes)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def run_lane(
    args: argparse.Namespace,
    recorder: Recorder,
    clock: Clock,
    folder: Path,
    processes: int,
    cases: queue.SimpleQueue,
    gpu: int,
) -> None:
    """Cases one after the other; the processes of the next one import their packages meanwhile."""

    def begin() -> tuple[str, Workers] | None:
        try:
            name = cases.get_nowait()
        except queue.Empty:
            return None
        return name, Workers(folder, processes, CASES[name].strategy, gpu)

    present = begin()
    while present is not None:
        following = begin()
        name, workers = present
        try:
            run_case(args, recorder, clock, folder, processes, name, workers, gpu)
        except Exception as error:  # the next cases go on
            print(f"{name} on {processes}: {error!r}", flush=True)
        present = following


def run_case(
    args: argparse.Namespace,
    recorder: Recorder,
    clock: Clock,
    folder: Path,
    processes: int,
    name: str,
    workers: Workers,
    gpu: int,
) -> None:
    """The methods of one case, alternating, in the same processes unless one leaves memory behind or fails."""
    case = CASES[name]
    try:
        for method in args.methods * args.rounds:
            limit = min(args.limit, clock.left())
            if limit < 10:
                print(f"{name} on {processes}, {method}: not run, no time is left", flush=True)
                continue
            if not workers.alive:
                workers.end()
                workers = Workers(folder, processes, case.strategy, gpu)
            job = make_job(args, name, method, processes)
            recorder.note(job, workers.run(job, limit), workers.log_tail())
    finally:
        workers.close()


def make_job(args: argparse.Namespace, name: str, method: str, processes: int, **changes: Any) -> dict:
    """What a worker is told."""
    case = CASES[name]
    job = {
        "kind": "step",
        "case": name,
        "base": case.base,
        "strategy": case.strategy,
        "storage": case.storage,
        "processes": processes,
        "method": method,
        "shape": args.shape,
        "layers": args.layers,
        "batch": args.batch,
        "length": args.length,
        "checkpointing": True,
        "steps": args.steps,
        "warmup": args.warmup,
        **changes,
    }
    return {**job, "parameters": SHAPES[job["shape"]].with_layers(job["layers"]).parameters}


class Search:
    """
    Finds the most layers that fit, from the memory that others took.

    Args:
        first (`int`): Layers to begin with.
        per_layer (`float`): GiB that a layer is expected to take, until two sizes have been measured.
    """

    def __init__(self, first: int, per_layer: float) -> None:
        self.first, self.per_layer = first, per_layer
        self.fits: dict[int, float] = {}
        self.fails: set[int] = set()

    def note(self, layers: int, peak: float | None) -> None:
        """Tell what came of a number of layers: its peak in GiB, or `None` where it did not fit."""
        if peak is None:
            self.fails.add(layers)
        else:
            self.fits[layers] = peak

    def next(self, capacity: float) -> int | None:
        """The number to try next, given the GiB of the GPU; `None` once the most is known."""
        if not self.fits and not self.fails:
            return self.first
        low, high = max(self.fits, default=0), min(self.fails, default=None)
        if high is not None and high - low <= 1:
            return None
        if not self.fits or len(self.fails) > 1:  # what was expected is wrong: halves are safe
            return (low + high) // 2
        guess = low + max(1, int((capacity - self.fits[low]) / self.slope))
        return guess if high is None else min(guess, high - 1)

    @property
    def slope(self) -> float:
        """GiB of a layer: as measured between the smallest and the largest that fits, or as expected."""
        if len(self.fits) < 2:
            return self.per_layer
        low, high = min(self.fits), max(self.fits)
        return (self.fits[high] - self.fits[low]) / (high - low)


def run_largest(args: argparse.Namespace, recorder: Recorder, clock: Clock, folder: Path) -> None:
    """Named shapes of growing size, then as many layers of the largest one as fit, for each method."""
    # So that what is left between tensors of many sizes does not decide what fits.
    os.environ.setdefault(ALLOCATOR, "expandable_segments:True")
    workers = Workers(folder, 1, "single")

    def attempt(method: str, shape: str, layers: int, kind: str) -> dict | None:
        nonlocal workers
        limit = min(args.limit, clock.left())
        if limit < 10:
            print(f"{shape} x{layers}, {method}: not run, no time is left", flush=True)
            return None
        if not workers.alive:
            workers.end()
            workers = Workers(folder, 1, "single")
        changes = {"shape": shape, "layers": layers, "kind": kind, "batch": 1, "length": args.largest_length}
        job = make_job(args, "nf4", method, 1, **changes, steps=args.largest_steps, warmup=1)
        row = recorder.note(job, workers.run(job, limit), workers.log_tail())
        if row.get("error", OUT_OF_MEMORY) != OUT_OF_MEMORY and os.environ.pop(ALLOCATOR, None):
            return attempt(method, shape, layers, kind)  # in case it was the allocator's setting
        return row

    try:
        for shape in args.largest_shapes[:-1]:
            for method in args.methods:
                attempt(method, shape, SHAPES[shape].layers, "named")
        shape = args.largest_shapes[-1]
        per_layer = gib_per_layer(SHAPES[shape], args.largest_length)
        for place, method in enumerate(args.methods):
            # The first method gets its share of the time, the last what is left, and what a layer was seen to take.
            share = Clock(clock.left() / (len(args.methods) - place))
            search = Search(SHAPES[shape].layers, per_layer)
            search_layers(search, lambda layers, m=method: attempt(m, shape, layers, "largest"), share)
            per_layer = search.slope
    finally:
        workers.close()


def search_layers(search: Search, attempt: Callable[[int], dict | None], share: Clock) -> None:
    """Try numbers of layers until the most that fits is known, time is up, or something but memory fails."""
    capacity = 0.0
    while share.left() > 0:
        layers = search.next(capacity)
        row = None if layers is None else attempt(layers)
        if row is None or layers is None or row.get("error", OUT_OF_MEMORY) != OUT_OF_MEMORY:
            return
        search.note(layers, None if "error" in row else row["reserved_gib"])
        # What the CUDA context and libraries take beside the allocator.
        capacity = max(capacity, row.get("gpu_gib", 0.0) - 0.8)
        if search.fits and capacity <= 0:
            return  # no GPU, nothing to fill


def gib_per_layer(shape: Any, length: int) -> float:
    """GiB that a layer adds: 4-bit weights with their scales, its checkpoint, and what AdamW keeps of its adapter."""
    adapter = shape.with_layers(1).adapter_parameters(4, 3)
    return (shape.layer_weights * (0.5 + 1 / 64 + 4 / (64 * 256)) + 2 * length * shape.hidden + 16 * adapter) / 2**30


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2.5-7b", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="cut the model short, for a quick look")
    parser.add_argument("--processes", nargs="+", type=int, default=[1], help="numbers of GPUs")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="by default those of each number of GPUs")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=1, help="times that methods take turns")
    parser.add_argument("--lanes", type=int, default=1, help="GPUs on which cases of one process run side by side")
    parser.add_argument("--batch", type=int, default=4, help="rows of a GPU")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--limit", type=float, default=120, help="seconds of one method of one case, imports included")
    parser.add_argument("--total_limit", type=float, default=560, help="seconds of everything")
    parser.add_argument("--largest", action="store_true", help="find the largest 4-bit model that trains on one GPU")
    parser.add_argument(
        "--largest_shapes",
        nargs="+",
        choices=SHAPES,
        default=["qwen2.5-72b", "mistral-large-123b"],
        help="shapes of growing size; of the last one the number of layers is searched for",
    )
    parser.add_argument("--largest_length", type=int, default=2048)
    parser.add_argument("--largest_steps", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape on the CPU, to try the script itself")
    parser.add_argument("--report", action="store_true", help="write the tables of docs/large-models.md and stop")
    parser.add_argument("--out", type=Path, help="file of rows to append to")
    args = parser.parse_args(arguments)
    if args.tiny:
        args.shape, args.batch, args.length, args.largest_length = "tiny", 2, 32, 32
        args.largest_shapes = ["tiny", "tiny"]
    return args


def command_line() -> str:
    """This run's command, without where the rows went, which is nobody's business."""
    return re.sub(r" --out \S+", "", " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]))


def main() -> None:
    args = parse()
    if args.report:
        from large_report import update

        print(update())
        return
    if args.tiny:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
        os.environ |= {"OMP_NUM_THREADS": "1"}
    clock, recorder = Clock(args.total_limit), Recorder(args.out, command_line())
    args.layers = args.layers or SHAPES[args.shape].layers
    with tempfile.TemporaryDirectory() as folder:
        (run_largest if args.largest else run_cases)(args, recorder, clock, Path(folder))
    from large_report import tables

    print(f"\n{tables(recorder.rows)}")


if __name__ == "__main__":
    main()
