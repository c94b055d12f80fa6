"""How far exports to plain LoRA are from their adapter, trained on several tasks and exported for each of them.

    python benchmarks/export_loss.py --model SmolLM2-135M-Instruct --data multitask \\
        --out benchmarks/results/export_loss.jsonl
    python benchmarks/export_loss.py --report benchmarks/results/export_loss.jsonl     # the table of docs/export.md

For each seed an adapter is trained as `balance.py` trains one without a balance loss. Mean weights of the heads are
measured on training rows; then each task is exported with its weights, and compared under equal weights too. A row of
`--out` is one task: accuracy on test rows of the adapter and under fixed weights, and the mean KL(adapter || fixed) of
the predicted distributions in nats per token of the completions. Data are as for `balance.py`.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from balance import TASKS, Run, read_rows, training_arguments
from common import TARGETS, environment, write_row
from datasets import Dataset
from transformers import set_seed
from transformers.utils import logging as transformers_logging

import rlora_trl
from rlora_trl import RLoraConfig, RLoraSFTTrainer, export_lora
from rlora_trl.analysis import measure_head_weights
from rlora_trl.export.gap import measure_export_gap


MEASURED = ("accuracy", "export_accuracy", "equal_accuracy", "export_kl", "equal_kl")


def make_run(args: argparse.Namespace, seed: int) -> Run:
    settings = {"loss": "none", "coef": 0.0, "scope": "micro", "seed": seed, "model": args.model.resolve().name}
    settings |= {"tasks": tuple(args.tasks), "micro_batch": 32, "batch": 32, "epochs": 1.0, "learning_rate": 2e-4}
    settings |= {"r": 4, "num_heads": 3, "router": "softmax", "dtype": "float32"}
    settings |= {"router_init": args.router_init, "router_learning_rate": args.router_learning_rate}
    return Run(train_rows=args.train_rows, test_rows=args.test_rows, **settings)


def train(run: Run, args: argparse.Namespace, rows: dict[str, list[dict]]) -> RLoraSFTTrainer:
    columns = ("prompt", "completion")
    datasets = {task: Dataset.from_list([{c: row[c] for c in columns} for row in rows[task]]) for task in run.tasks}
    set_seed(run.seed)  # the adapter is drawn when the trainer is made
    config = {"r": run.r, "num_heads": run.num_heads, "router_init": run.router_init, "target_modules": list(TARGETS)}
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = RLoraSFTTrainer(
            model=str(args.model),
            args=training_arguments(run, output_dir, 10),
            train_dataset=datasets,
            peft_config=RLoraConfig(**{"head_dropout": 0.2, **config}),
        )
        trainer.train()
    return trainer


def measure(run: Run, args: argparse.Namespace) -> Iterator[dict]:
    rows = {task: read_rows(args.data / task / "train.jsonl", run.train_rows) for task in run.tasks}
    test = {task: read_rows(args.data / task / "test.jsonl", run.test_rows) for task in run.tasks}
    trainer = train(run, args, rows)
    # Without the autocast that `accelerate` put around its forward.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    tokenizer = trainer.processing_class
    measured = measure_head_weights(model, tokenizer, rows, max_rows=args.mixture_rows)
    equal = dict.fromkeys(measured.layers, torch.full((run.num_heads,), 1 / run.num_heads))
    with tempfile.TemporaryDirectory() as folder:
        for task in run.tasks:
            data = {task: test[task]}
            report = export_lora(
                model, f"{folder}/export", task=task, routing=measured, data=data, tokenizer=tokenizer
            )
            even = measure_export_gap(model, tokenizer, "default", data, equal)
            yield {
                "task": task,
                "rows": report.rows,
                "head_max": measured.weights[task].amax(-1).mean().item(),
                "accuracy": report.accuracy_dynamic,
                "export_accuracy": report.accuracy_export,
                "export_kl": report.kl,
                "equal_accuracy": even.accuracy_export,
                "equal_kl": even.kl,
                "rank": report.rank,
            }


def table(path: Path) -> str:
    """Means over seeds by task and kind of router, as Markdown."""
    rows = read_rows(path, sys.maxsize)
    lines = [
        "| router | task | accuracy, % | exported | equal weights | KL exported | KL equal |",
        "|---|---|" + "---:|" * 5,
    ]
    for init in dict.fromkeys(row["router_init"] for row in rows):
        of_init = [row for row in rows if row["router_init"] == init]
        for task in [*dict.fromkeys(row["task"] for row in of_init), None]:
            of_task = [row for row in of_init if task in (None, row["task"])]
            means = {key: sum(row[key] for row in of_task) / len(of_task) for key in MEASURED}
            shares = " | ".join(f"{100 * means[key]:.1f}" for key in MEASURED[:3])
            nats = " | ".join(f"{means[key]:.4f}" for key in MEASURED[3:])
            lines.append(f"| `{init}` | {task or '**mean**'} | {shares} | {nats} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a causal language model")
    parser.add_argument("--data", type=Path, help="folder of the tasks")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--train_rows", type=int, default=1500, help="of each task; fewer where it has fewer")
    parser.add_argument("--test_rows", type=int, default=250, help="of each task")
    parser.add_argument(
        "--mixture_rows", type=int, default=64, help="training rows of each task to measure weights on"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--router_init", choices=["zeros", "kaiming_uniform"], default="zeros")
    parser.add_argument("--router_learning_rate", type=float, help="by default that of all")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--report", type=Path, help="print the table of the rows in a file, and measure nothing")
    args = parser.parse_args()
    if args.report is not None:
        print(table(args.report))
        return
    if args.model is None or args.data is None:
        parser.error("--model and --data are needed to measure")
    transformers_logging.set_verbosity_error()
    for seed in args.seeds:
        run = make_run(args, seed)
        shared = {"seed": seed, "router_init": run.router_init, "router_learning_rate": run.router_learning_rate}
        shared |= {"model": run.model, "train_rows": run.train_rows, "mixture_rows": args.mixture_rows}
        for row in measure(run, args):
            print(
                {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True
            )
            software = {"trl": version("trl"), "rlora_trl": rlora_trl.__version__}
            write_row(args.out, {**shared, **row, **environment(), **software})


if __name__ == "__main__":
    main()
