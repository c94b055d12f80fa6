"""Adapters trained on one base and run on another: bfloat16, 4 bits (NF4 with double quantization), 8 bits.

    python benchmarks/quantized_exchange.py --model SmolLM2-135M-Instruct --data multitask --seeds 0 \\
        --out benchmarks/results/quantized_exchange.jsonl
    python benchmarks/quantized_exchange.py --report benchmarks/results/quantized_exchange.jsonl --update

For each seed an adapter is trained on each base, as `export_loss.py` trains one, and saved; then each is loaded on
each base and measured on test rows, and so is each base by itself. A row of `--out` is one such pair: accuracy by
task, the mean loss in nats per token of the completions, and the mean KL of the predicted distributions from those of
the same adapter on the base that it was trained on (of a base by itself: from those of the bfloat16 base). `--report`
prints the means over seeds; `--update` writes them into docs/quantization.md. Data are as for `balance.py`.
"""

import argparse
import gc
import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from balance import TASKS, Run, read_rows, training_arguments
from common import TARGETS, environment, write_row
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed
from transformers.utils import logging as transformers_logging

import rlora_trl
from rlora_trl import RLoraConfig, RLoraSFTTrainer
from rlora_trl.evaluation import score_tasks


BASES = ("bf16", "nf4", "int8")
BEGIN, END = "<!-- exchange:begin -->", "<!-- exchange:end -->"
PAGE = Path(__file__).parent.parent / "docs" / "quantization.md"


def quantization(base: str) -> BitsAndBytesConfig | None:
    if base == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if base == "int8" else None


def make_run(args: argparse.Namespace, seed: int) -> Run:
    settings = {"loss": "none", "coef": 0.0, "scope": "micro", "seed": seed, "model": args.model.resolve().name}
    settings |= {"tasks": tuple(args.tasks), "micro_batch": 32, "batch": 32, "epochs": 1.0, "learning_rate": 2e-4}
    settings |= {"r": 4, "num_heads": 3, "router": "softmax", "dtype": "bfloat16"}
    settings |= {"router_init": "zeros", "router_learning_rate": None}
    return Run(train_rows=args.train_rows, test_rows=args.test_rows, **settings)


def train(run: Run, args: argparse.Namespace, base: str, folder: str) -> float:
    """Train an adapter on a base, save it in `folder`; seconds that training took."""
    columns = ("prompt", "completion")
    rows = {task: read_rows(args.data / task / "train.jsonl", run.train_rows) for task in run.tasks}
    datasets = {task: Dataset.from_list([{c: row[c] for c in columns} for row in rows[task]]) for task in run.tasks}
    set_seed(run.seed)  # the adapter is drawn when the trainer is made
    trainer = RLoraSFTTrainer(
        model=str(args.model),
        args=training_arguments(run, folder, 50),
        train_dataset=datasets,
        peft_config=RLoraConfig(r=run.r, num_heads=run.num_heads, head_dropout=0.2, target_modules=list(TARGETS)),
        quantization_config=quantization(base),
    )
    runtime = trainer.train().metrics["train_runtime"]
    trainer.save_model(folder)
    return runtime


def load(args: argparse.Namespace, base: str, folders: dict[str, str]) -> PeftModel:
    """A base with all adapters, by the names of the bases that they were trained on."""
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    options = {"dtype": torch.bfloat16, "device_map": {"": device}}
    model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=quantization(base), **options)
    first, *others = folders
    model = PeftModel.from_pretrained(model, folders[first], first)
    for name in others:
        model.load_adapter(folders[name], name)
    return model.eval()


def sequences(tokenizer, rows: list[dict]) -> list[tuple[list[int], int]]:
    """Token ids of each row, and where its completion begins: where they part from the prompt's."""
    found = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        begin = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt))
        found.append((ids, max(1, min(begin, len(ids) - 1))))
    return found


@torch.no_grad()
def predictions(model, tokenizer, rows: list[dict], batch: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities `[tokens, vocabulary]` in float32 on the CPU, and the tokens of the completions `[tokens]`."""
    entries, found, targets = sequences(tokenizer, rows), [], []
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for start in range(0, len(entries), batch):
        chosen = entries[start : start + batch]
        width = max(len(ids) for ids, _ in chosen)
        ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in chosen])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in chosen])
        predicting = torch.zeros_like(ids, dtype=torch.bool)
        for place, (row, begin) in enumerate(chosen):
            predicting[place, begin - 1 : len(row) - 1] = True
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits[predicting.to(device)]
        found.append(logits.float().log_softmax(-1).cpu())
        targets.append(ids[:, 1:][predicting[:, :-1]])
    return torch.cat(found), torch.cat(targets)


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """Mean KL(p || q) of rows of log-probabilities, in nats."""
    parts = zip(p.split(512), q.split(512), strict=True)
    return sum(float((a.exp() * (a - b)).sum(dtype=torch.float64)) for a, b in parts) / len(p)


def measure(run: Run, args: argparse.Namespace) -> Iterator[dict]:
    test = {task: read_rows(args.data / task / "test.jsonl", run.test_rows) for task in run.tasks}
    compared = [row for rows in test.values() for row in rows[: args.kl_rows]]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows, predicted = [], {}
    with tempfile.TemporaryDirectory() as root:
        folders = {base: f"{root}/{base}" for base in args.bases}
        runtimes = {}
        for base in args.bases:
            runtimes[base] = train(run, args, base, folders[base])
            release(f"trained on {base} in {runtimes[base]:.0f} s")
        for base in args.bases:
            model = load(args, base, folders)
            for name in (None, *args.bases):
                started = time.monotonic()
                if name is not None:
                    model.set_adapter(name)
                with model.disable_adapter() if name is None else torch.no_grad():
                    scores = score_tasks(model, tokenizer, test, batch_size=args.score_batch)
                    predicted[name, base], targets = predictions(model, tokenizer, compared)
                accuracy = {task: score.accuracy for task, score in scores.items()}
                loss = -predicted[name, base].gather(1, targets[:, None]).mean().item()
                row = {"trained_on": name, "run_on": base, "mean_accuracy": sum(accuracy.values()) / len(accuracy)}
                row |= {"loss": loss, "tokens": len(targets), "accuracy": accuracy}
                row |= {"train_runtime_s": runtimes.get(name), "score_runtime_s": time.monotonic() - started}
                rows.append(row)
            del model
            release(f"measured on {base}")
    for row in rows:
        home = predicted[row["trained_on"], row["trained_on"] or args.bases[0]]
        yield {**row, "kl": divergence(home, predicted[row["trained_on"], row["run_on"]])}


def release(what: str) -> None:
    print(f"  {what}", flush=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def table(path: Path) -> str:
    """Means over seeds, as Markdown, with what they were measured with."""
    rows = read_rows(path, sys.maxsize)
    lines = ["| trained on | run on | accuracy, % | loss | KL |", "|---|---|---:|---:|---:|"]
    pairs = dict.fromkeys((row["trained_on"], row["run_on"]) for row in rows)
    for pair in sorted(pairs, key=lambda pair: (pair[0] is not None, list(pairs).index(pair))):
        own = [row for row in rows if (row["trained_on"], row["run_on"]) == pair]
        accuracy, loss, kl = (sum(row[key] for row in own) / len(own) for key in ("mean_accuracy", "loss", "kl"))
        lines.append(f"| {pair[0] or 'not trained'} | {pair[1]} | {100 * accuracy:.1f} | {loss:.3f} | {kl:.4f} |")
    last, seeds = rows[-1], len({row["seed"] for row in rows})
    software = f"torch {last['torch']}, bitsandbytes {last['bitsandbytes']}, transformers {last['transformers']}"
    lines += [
        "",
        f"{last['model']}, {last['train_rows']} training and {last['test_rows']} test rows of each of "
        f"{len(last['accuracy'])} tasks, means over {seeds} seed{'s' if seeds > 1 else ''}; {last['device']}, "
        f"{software}, peft {last['peft']}, {last['date']}; rows in `benchmarks/results/{path.name}`.",
    ]
    return "\n".join(lines)


def update(page: Path, text: str) -> None:
    """Replace what stands between the markers of a page."""
    before, rest = page.read_text().split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a causal language model and its tokenizer")
    parser.add_argument("--data", type=Path, help="folder of the tasks")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--train_rows", type=int, default=1000, help="of each task; fewer where it has fewer")
    parser.add_argument("--test_rows", type=int, default=200, help="of each task")
    parser.add_argument("--kl_rows", type=int, default=64, help="test rows of each task for loss and KL")
    parser.add_argument("--score_batch", type=int, default=64, help="sequences in one forward pass of scoring")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--report", type=Path, help="print the table of the rows in a file, and measure nothing")
    parser.add_argument("--update", action="store_true", help="with --report: write it into docs/quantization.md too")
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    if args.report is not None:
        print(table(args.report))
        if args.update:
            update(PAGE, table(args.report))
        return
    if args.model is None or args.data is None:
        parser.error("--model and --data are needed to measure")
    transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of each cast in 8-bit layers
    for seed in args.seeds:
        run = make_run(args, seed)
        shared = {"seed": seed, "model": run.model, "train_rows": run.train_rows, "test_rows": run.test_rows}
        software = {"bitsandbytes": version("bitsandbytes"), "trl": version("trl"), "rlora_trl": rlora_trl.__version__}
        for row in measure(run, args):
            write_row(args.out, {**shared, **row, **environment(), **software})
            told = f"{row['trained_on'] or 'not trained'} on {row['run_on']}"
            results = f"{100 * row['mean_accuracy']:5.1f} %  loss {row['loss']:.3f}  KL {row['kl']:.4f}"
            print(f"seed {seed}  {told:<20} {results}  [{row['score_runtime_s']:.0f} s]", flush=True)


if __name__ == "__main__":
    main()
