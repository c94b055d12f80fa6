"""All benchmarks that need a GPU, on one machine: one at a time on each of its GPUs, within a given time.

    python benchmarks/gpu_all.py --limit 560 --out results            # in the order of importance
    python benchmarks/gpu_all.py --only short host decode             # some of them
    python benchmarks/gpu_all.py --list                               # names, expected seconds and commands

With several GPUs, each benchmark has one of them and its share of the cores to itself. What needs two GPUs runs first,
on the first two. A benchmark that would not end in time is not started. Rows go to `<out>/<script>.jsonl`, and what
benchmarks print to `<out>/gpu_all.log`.
"""

import argparse
import os
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple


HERE = Path(__file__).parent


class Job(NamedTuple):
    """A benchmark: seconds that it takes on an H100, its command, and GPUs that it needs."""

    seconds: int
    command: str
    gpus: int = 1


_LORA = "--families floor lora lora_16bit axolotl unsloth"
_ALL = f"{_LORA} ours ours_task ours_uniform"
_FEW = "--families floor lora lora_16bit ours --sizes 3x4"
_LOOPS = "--families floor hydra_loop rlora_loop rlora_loop_a_once ours --sizes 3x4 5x4"
_GRID = "--families floor ours --heads 1 3 5 10 --ranks 4 8 16"
# Short steps vary with the host, and cost little: 48 of each form are timed, else 25.
_SHORT = "train_step.py --rounds 8 --repeats 6 --settings 2x512 1x2048 6x512"
_LONG = "train_step.py --settings 8x2048"
# By importance.
JOBS = {
    "zero3": Job(100, "large.py --processes 2 --cases bf16-zero3 nf4-zero3 --total_limit 170", gpus=2),
    "short": Job(300, f"{_SHORT} {_ALL} --sizes 3x4 10x16"),
    "long": Job(330, f"{_LONG} {_ALL} --sizes 3x4 10x16"),
    "four_bit": Job(140, f"{_SHORT} {_LORA} ours ours_task --sizes 3x4 --four_bit"),
    "busy": Job(190, f"{_LONG} 6x512 {_FEW} --busy"),
    "host": Job(80, "host.py"),
    "experts": Job(150, "experts.py"),
    "decode": Job(65, "decode.py"),
    "compile": Job(170, f"train_step.py --settings 2x512 {_FEW} --compile --layers 9"),
    "small": Job(70, f"{_LONG} 6x512 {_FEW} --shape qwen2.5-0.5b"),
    "four_bit_long": Job(110, f"{_LONG} {_LORA} ours --sizes 3x4 --four_bit --rounds 3 --repeats 3"),
    "heads": Job(110, f"{_LONG} {_GRID} --rounds 2 --repeats 2"),
    "liger": Job(70, f"{_SHORT} {_ALL} --sizes 3x4 --liger"),
    "seven_b": Job(90, f"{_LONG} {_FEW} --shape qwen2.5-7b --rounds 3 --repeats 3"),
    "time_to_loss": Job(150, "time_to_loss.py"),
    "trainer_overhead": Job(150, "trainer_overhead.py"),
    "loops": Job(120, f"{_LONG} {_LOOPS} --rounds 2 --repeats 2"),
    "decode_four_bit": Job(70, "decode.py --four_bit"),
    "liger_long": Job(120, f"{_LONG} {_ALL} --sizes 3x4 --liger --rounds 3 --repeats 3"),
}


class Machine:
    """Runs jobs on GPUs until the time is over."""

    def __init__(self, gpus: list[str], waiting: dict[str, Job], args: argparse.Namespace) -> None:
        self.gpus, self.waiting, self.args = gpus, waiting, args
        self.end = time.monotonic() + args.limit
        self.lock = threading.Lock()
        self.failed: list[str] = []
        cores = sorted(os.sched_getaffinity(0))
        share = max(1, len(cores) // len(gpus))
        self.cores = {gpu: cores[i * share : (i + 1) * share] or cores for i, gpu in enumerate(gpus)}

    def take(self, gpus: int) -> tuple[str, Job] | None:
        """The next job for so many GPUs that ends in time."""
        with self.lock:
            for name, job in list(self.waiting.items()):
                if job.gpus == gpus and job.seconds <= self.end - time.monotonic():
                    return name, self.waiting.pop(name)
        return None

    def lane(self, gpus: list[str]) -> None:
        """One job after the other on some GPUs."""
        while (taken := self.take(len(gpus))) is not None:
            self.run(*taken, gpus)

    def run(self, name: str, job: Job, gpus: list[str]) -> None:
        script, *options = shlex.split(job.command)
        if name == "time_to_loss":
            options += ["--data", str(self.args.data), *(["--model", str(self.args.model)] if self.args.model else [])]
        rows = self.args.out / f"{Path(script).stem}.jsonl"
        command = [sys.executable, str(HERE / script), *options, "--out", str(rows)]
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(gpus), "PYTHONWARNINGS": "ignore"}
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
        # Before it starts threads, which inherit it.
        os.sched_setaffinity(process.pid, [core for gpu in gpus for core in self.cores[gpu]])
        try:
            printed, _ = process.communicate(timeout=max(1.0, self.end - started))
        except subprocess.TimeoutExpired:
            process.terminate()
            printed, _ = process.communicate()

        result = f"{name}: {time.monotonic() - started:.0f} s of {job.seconds}, exit status {process.returncode}"
        with self.lock:
            with (self.args.out / "gpu_all.log").open("a") as file:
                file.write(f"{result}\n{printed}\n")
            print(result, flush=True)
            if process.returncode != 0:
                self.failed.append(name)
                print("\n".join(printed.splitlines()[-8:]), flush=True)

    def run_all(self) -> None:
        def first_two() -> None:
            try:
                self.lane(self.gpus[:2])
            finally:
                lanes[1].start()  # which is waited for
            self.lane(self.gpus[:1])

        lanes = [threading.Thread(target=self.lane, args=([gpu],)) for gpu in self.gpus]
        if len(self.gpus) > 1:
            lanes[0] = threading.Thread(target=first_two)
        for lane in [lanes[0], *lanes[2:]]:
            lane.start()
        for lane in lanes:
            lane.join()


def visible_gpus() -> list[str]:
    """Ids of the GPUs that this process may use."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    return [str(i) for i, _ in enumerate(listed.stdout.splitlines())]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=JOBS, default=list(JOBS), help="in this order")
    parser.add_argument("--data", type=Path, help="folder of tasks for time_to_loss, which needs one")
    parser.add_argument("--model", type=Path, help="folder of a model for time_to_loss; by default it makes one")
    parser.add_argument("--limit", type=float, default=3600, help="seconds")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args(arguments)
    jobs = {name: JOBS[name] for name in args.only if name != "time_to_loss" or args.data is not None}
    if args.list:
        print("\n".join(f"{name:<16} {job.seconds:>4} s  {job.command}" for name, job in jobs.items()))
        return
    gpus = visible_gpus()
    if not gpus:
        parser.error("no GPU is visible. Check `nvidia-smi` and CUDA_VISIBLE_DEVICES.")
    args.out.mkdir(parents=True, exist_ok=True)
    machine = Machine(gpus, jobs, args)
    machine.run_all()
    if machine.waiting:
        print(f"Not run, for lack of time or GPUs: {', '.join(machine.waiting)}")
    if machine.failed:
        sys.exit(f"Failed: {', '.join(machine.failed)}")


if __name__ == "__main__":
    main()
