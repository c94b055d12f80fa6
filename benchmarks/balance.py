"""What balance losses do to the router and to accuracy: one model, several tasks, every loss, several seeds.

    python benchmarks/balance.py --model SmolLM2-135M-Instruct --data multitask --jobs 4 \\
        --out benchmarks/results/balance.jsonl

Each run trains an adapter with `RLoraSFTTrainer` in a process of its own and scores the options of the test rows by
likelihood. A row of `--out` is one run; runs that are there already are skipped, so a command that was cut off goes on
where it stopped. Data are folders `<task>/{train,test}.jsonl` of rows {prompt, completion, options}, read from the
first row on. On a GPU training runs in bfloat16 (autocast) over weights of `--dtype`, and scoring in that dtype.

`--scope` makes a difference only where a step has several micro-batches: set `--micro_batch` below `--batch`.
"""

import argparse
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path

import torch
from common import TARGETS, environment, write_row
from datasets import Dataset
from transformers import set_seed
from transformers.utils import logging as transformers_logging

import rlora_trl
from rlora_trl import MultiHeadAdapter, RLoraConfig, RLoraSFTConfig, RLoraSFTTrainer
from rlora_trl.evaluation import score_tasks


TASKS = ("sst2", "mrpc", "rte", "sick", "dpr", "trec", "cola")
# Coefficient of each loss where `--coef` gives none.
COEFS = {"none": 0.0, "switch": 0.01, "importance": 0.01, "mutual_information": 0.01, "z": 0.001}
# What the trainer logs of the router. A key that it does not log is absent from the rows.
LOGGED = ("loss", "balance_loss", "router_entropy", "head_load_max", "head_load_cv")


@dataclass(frozen=True)
class Run:
    """All settings of one run; two runs with the same settings are the same run."""

    loss: str
    coef: float
    scope: str
    seed: int
    model: str
    tasks: tuple[str, ...]
    train_rows: int
    test_rows: int
    epochs: float
    batch: int
    micro_batch: int
    learning_rate: float
    dtype: str
    r: int
    num_heads: int
    router: str
    router_init: str
    router_learning_rate: float | None

    @property
    def name(self) -> str:
        """What tells it from the other runs of a command."""
        return f"{self.loss:<18} coef {self.coef:<6g} {self.scope:<6} seed {self.seed}"

    def is_in(self, rows: list[dict]) -> bool:
        """Whether one of the rows has these settings."""
        settings = json.loads(json.dumps(asdict(self)))
        return any(all(row.get(key) == value for key, value in settings.items()) for row in rows)


def planned(args: argparse.Namespace) -> list[Run]:
    """The runs that the arguments ask for, seed by seed; without a loss there is neither coefficient nor scope."""
    shared = {entry.name for entry in fields(Run)} - {"loss", "coef", "scope", "seed", "model", "tasks", "micro_batch"}
    settings = {name: getattr(args, name) for name in shared}
    settings |= {"model": args.model.resolve().name, "tasks": tuple(args.tasks)}
    settings |= {"micro_batch": args.micro_batch or args.batch}
    runs = []
    for seed, loss in itertools.product(args.seeds, args.losses):
        coefs = [0.0] if loss == "none" else args.coef or [COEFS[loss]]
        scopes = ["micro"] if loss == "none" else args.scope
        runs += [Run(loss, coef, scope, seed, **settings) for coef, scope in itertools.product(coefs, scopes)]
    return list(dict.fromkeys(runs))


def read_rows(path: Path, limit: int) -> list[dict]:
    """The first rows of a JSON-lines file."""
    with path.open() as file:
        return [json.loads(line) for line in itertools.islice(file, limit)]


def head_cosine(model: torch.nn.Module) -> float | None:
    """Mean cosine between two heads' B of a layer, over pairs and layers; `None` for one head."""
    means = []
    for adapter in (module for module in model.modules() if isinstance(module, MultiHeadAdapter)):
        heads = torch.nn.functional.normalize(adapter.B.detach().float().flatten(1), dim=1)  # [N, d_out * r]
        pairs = torch.triu_indices(len(heads), len(heads), offset=1, device=heads.device)
        means.append((heads @ heads.T)[pairs[0], pairs[1]].mean().item())
    mean = sum(means) / len(means)
    return None if math.isnan(mean) else mean


def training_arguments(run: Run, output_dir: str, logging_steps: int) -> RLoraSFTConfig:
    """The trainer's configuration. Without a balance loss its fields stay at their defaults."""
    balance = {"balance_loss": run.loss, "balance_coef": run.coef, "balance_scope": run.scope}
    return RLoraSFTConfig(
        output_dir,
        num_train_epochs=run.epochs,
        per_device_train_batch_size=run.micro_batch,
        gradient_accumulation_steps=run.batch // run.micro_batch,
        learning_rate=run.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": run.dtype},
        seed=run.seed,
        logging_steps=logging_steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        router_learning_rate=run.router_learning_rate,
        **(balance if run.loss != "none" else {}),
    )


def train_and_score(run: Run, args: argparse.Namespace) -> dict:
    """One run, as the row that is written."""
    transformers_logging.set_verbosity_error()
    train = {task: read_rows(args.data / task / "train.jsonl", run.train_rows) for task in run.tasks}
    test = {task: read_rows(args.data / task / "test.jsonl", run.test_rows) for task in run.tasks}
    columns = ("prompt", "completion")
    datasets = {task: Dataset.from_list([{c: row[c] for c in columns} for row in train[task]]) for task in run.tasks}
    set_seed(run.seed)  # the adapter is drawn when the trainer is made
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = RLoraSFTTrainer(
            model=str(args.model),
            args=training_arguments(run, output_dir, args.logging_steps),
            train_dataset=datasets,
            peft_config=RLoraConfig(
                r=run.r,
                num_heads=run.num_heads,
                head_dropout=0.2,
                router=run.router,
                router_init=run.router_init,
                target_modules=list(TARGETS),
            ),
        )
        metrics = trainer.train().metrics
    started = time.monotonic()
    # Without the autocast that `accelerate` put around its forward.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    scores = score_tasks(model, trainer.processing_class, test, batch_size=args.score_batch)
    accuracy = {task: score.accuracy for task, score in scores.items()}
    history = [
        {key: entry[key] for key in ("step", *LOGGED) if key in entry}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    return {
        **asdict(run),
        "steps": trainer.state.global_step,
        "trained_rows": {task: len(rows) for task, rows in train.items()},
        "scored_rows": {task: score.total for task, score in scores.items()},
        "accuracy": accuracy,
        "mean_accuracy": sum(accuracy.values()) / len(accuracy),
        "head_cosine": head_cosine(model),
        "train_runtime_s": metrics["train_runtime"],
        "score_runtime_s": time.monotonic() - started,
        "history": history,
        **environment(),
        "trl": version("trl"),
        "rlora_trl": rlora_trl.__version__,
    }


def summary(row: dict) -> str:
    """Results of a run in a few words."""
    last = row["history"][-1] if row["history"] else {}
    router = [f"{key} {last[key]:.3f}" for key in ("head_load_max", "router_entropy") if key in last]
    cosine = [] if row["head_cosine"] is None else [f"cosine {row['head_cosine']:.3f}"]
    times = f"[{row['train_runtime_s']:.0f} + {row['score_runtime_s']:.0f} s]"
    return "  ".join([f"{100 * row['mean_accuracy']:5.1f} %", *router, *cosine, times])


@dataclass
class Child:
    """A run in a process of its own."""

    run: Run
    process: subprocess.Popen
    row: Path
    log: Path


def start(run: Run, args: argparse.Namespace, folder: Path, index: int) -> Child:
    """Start a run as a subprocess; its row and what it prints go to files in `folder`."""
    row, log = folder / f"{index}.jsonl", folder / f"{index}.log"
    command = [sys.executable, __file__, "--model", str(args.model), "--data", str(args.data), "--out", str(row)]
    command += ["--logging_steps", str(args.logging_steps), "--score_batch", str(args.score_batch)]
    command += ["--single", json.dumps(asdict(run))]
    threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
    env = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", **os.environ}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env)
    return Child(run, process, row, log)


def finish(child: Child, out: Path | None, command: str) -> bool:
    """Take over the row of a subprocess that ended; whether it succeeded."""
    if child.process.returncode != 0 or not child.row.exists():
        tail = "\n".join(child.log.read_text().splitlines()[-25:])
        print(f"{child.run.name}  FAILED with exit status {child.process.returncode}:\n{tail}", flush=True)
        return False
    row = {**json.loads(child.row.read_text()), "command": command}
    write_row(out, row)
    print(f"{child.run.name}  {summary(row)}", flush=True)
    return True


def run_all(runs: list[Run], args: argparse.Namespace) -> list[Run]:
    """All runs, `--jobs` at a time; those that failed."""
    command = environment()["command"]
    waiting, running, failed = list(enumerate(runs)), [], []
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or running:
                while waiting and len(running) < args.jobs:
                    index, run = waiting.pop(0)
                    running.append(start(run, args, Path(folder), index))
                time.sleep(0.2)
                ended = [child for child in running if child.process.poll() is not None]
                running = [child for child in running if child not in ended]
                failed += [child.run for child in ended if not finish(child, args.out, command)]
        finally:
            for child in running:  # only after an interruption
                child.process.terminate()
            for child in running:
                child.process.wait()
    return failed


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, required=True, help="folder of a causal language model and its tokenizer"
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the tasks")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--train_rows", type=int, default=1500, help="of each task; fewer where it has fewer")
    parser.add_argument("--test_rows", type=int, default=250, help="of each task")
    parser.add_argument("--losses", nargs="+", choices=COEFS, default=list(COEFS))
    parser.add_argument("--coef", nargs="+", type=float, help=f"for every loss; by default {COEFS}")
    parser.add_argument("--scope", nargs="+", choices=["micro", "global"], default=["micro"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=32, help="rows of a step")
    parser.add_argument("--micro_batch", type=int, help="rows of a forward pass; by default the whole batch")
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights of the model"
    )
    parser.add_argument("--r", type=int, default=4)
    parser.add_argument("--num_heads", type=int, default=3)
    parser.add_argument("--router", default="softmax")
    parser.add_argument("--router_init", choices=["zeros", "kaiming_uniform"], default="zeros")
    parser.add_argument("--router_learning_rate", type=float, help="by default that of all")
    parser.add_argument("--logging_steps", type=int, default=10)
    parser.add_argument("--score_batch", type=int, default=64, help="sequences in one forward pass of scoring")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, all on the same device")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--single", help=argparse.SUPPRESS)  # one run, as JSON, in this process
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    if args.single:
        values = json.loads(args.single)
        write_row(args.out, train_and_score(Run(**{**values, "tasks": tuple(values["tasks"])}), args))
        return
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    if args.batch % (args.micro_batch or args.batch):
        parser.error(f"--batch {args.batch} must be a multiple of --micro_batch {args.micro_batch}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the subprocesses end too
    done = read_rows(args.out, sys.maxsize) if args.out is not None and args.out.exists() else []
    runs = planned(args)
    missing = [run for run in runs if not run.is_in(done)]
    print(f"{len(runs)} runs, {len(runs) - len(missing)} of them in {args.out} already", flush=True)
    failed = run_all(missing, args)
    if failed:
        sys.exit(f"{len(failed)} of {len(missing)} runs failed: " + "; ".join(run.name for run in failed))


if __name__ == "__main__":
    main()
