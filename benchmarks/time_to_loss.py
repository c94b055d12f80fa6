"""Time to the same loss: LoRA and rlora_trl on the same batches, with the held-out loss by seconds of training.

    python benchmarks/time_to_loss.py --model SmolLM2-135M-Instruct --data multitask \\
        --out benchmarks/results/time_to_loss.jsonl

`--model` is a folder of a causal language model and its tokenizer, `--data` a folder of tasks, with rows {prompt,
completion} in `<task>/train.jsonl` and `<task>/test.jsonl`. Losses are those of completions. Each form first trains
for `--search_steps` with each of `--learning_rates` and keeps the one with the lowest held-out loss; then it trains
once for each of `--seeds`. A seed sets the order of the rows, the same for all forms. The clock stops while the loss
is measured.

Without `--model` it trains a model of the shape of SmolLM2-135M on bytes, in full and on the prompts of the same tasks
for `--pretrain_s` seconds, so that adapters have something to adapt.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import (
    DEVICE,
    Variant,
    baselines,
    environment,
    free,
    ours,
    ours_as_lora,
    share_weights,
    synchronize,
    write_row,
)
from report import time_to_loss_table
from shapes import small_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer


IGNORED = -100
# A token that bytes leave free.
END_OF_BYTES = 256


@dataclass(frozen=True)
class Example:
    """Token ids of a row, and how many of them are its prompt."""

    ids: list[int]
    prompt: int


class Data:
    """Rows of several tasks as tokens; rows that are longer than `max_length` are left out."""

    def __init__(self, args: argparse.Namespace) -> None:
        tokenizer = AutoTokenizer.from_pretrained(args.model) if args.model else None
        self.tasks = args.tasks or sorted(path.parent.name for path in args.data.glob("*/train.jsonl"))
        self.train, self.test = (
            [
                example
                for task in self.tasks
                for example in itertools.islice(self._read(args.data / task / name, tokenizer, args.max_length), count)
            ]
            for name, count in (("train.jsonl", args.train_rows), ("test.jsonl", args.test_rows))
        )

    def _read(self, path: Path, tokenizer: Any, max_length: int) -> Iterator[Example]:
        for line in path.open():
            row = json.loads(line)
            if tokenizer is None:
                prompt, completion = (list(row[name].encode()) for name in ("prompt", "completion"))
                ids = [*prompt, *completion, END_OF_BYTES]
            else:
                prompt = tokenizer(row["prompt"], add_special_tokens=False).input_ids
                completion = tokenizer(row["completion"], add_special_tokens=False).input_ids
                ids = [*prompt, *completion, tokenizer.eos_token_id]
            if len(ids) <= max_length:
                yield Example(ids, len(prompt))

    def batches(self, batch: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
        """Batches of training rows without end, in an order that depends on the seed only."""
        generator, batch = torch.Generator().manual_seed(seed), min(batch, len(self.train))
        while True:
            order = torch.randperm(len(self.train), generator=generator).tolist()
            for start in range(0, len(order) - batch + 1, batch):
                yield collate([self.train[i] for i in order[start : start + batch]])

    def test_batches(self, batch: int) -> Iterator[dict[str, torch.Tensor]]:
        """Batches of held-out rows of similar length."""
        rows = sorted(self.test, key=lambda example: len(example.ids))
        for start in range(0, len(rows), batch):
            yield collate(rows[start : start + batch])


def collate(examples: list[Example]) -> dict[str, torch.Tensor]:
    """A batch padded to its longest row, on the device."""
    length = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), length, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, example in enumerate(examples):
        end = len(example.ids)
        ids[row, :end] = torch.tensor(example.ids)
        mask[row, :end] = 1
        labels[row, example.prompt : end] = ids[row, example.prompt : end]
    return {"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE), "labels": labels.to(DEVICE)}


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        return model(**batch).loss


def held_out_loss(model: nn.Module, data: Data, batch: int) -> float:
    """The mean over tokens of completions."""
    model.eval()
    total = tokens = 0.0
    with torch.no_grad():
        for rows in data.test_batches(batch):
            count = (rows["labels"][:, 1:] != IGNORED).sum().item()
            total += loss_of(model, rows).item() * count
            tokens += count
    model.train()
    return total / tokens


def schedule(step: int, steps: int) -> float:
    """Of the learning rate: a tenth of the steps up, then a cosine down."""
    warmup = max(1, steps // 10)
    return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))


@dataclass(frozen=True)
class Training:
    """What a run depends on beside its form and data."""

    learning_rate: float
    seed: int
    steps: int
    every: int  # steps between two measurements of the held-out loss
    batch: int
    test_batch: int


def train(variant: Variant, base: nn.Module, data: Data, run: Training) -> list[tuple[int, float, float]]:
    """Train an adapter; steps, seconds of training and held-out loss at each measurement, the first at the start."""
    torch.manual_seed(run.seed)
    model = variant.wrap(share_weights(base)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=run.learning_rate, weight_decay=0.0, fused=DEVICE == "cuda")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, run.steps))
    batches = list(itertools.islice(data.batches(run.batch, run.seed), run.steps))

    curve = [(0, 0.0, held_out_loss(model, data, run.test_batch))]
    seconds = 0.0
    for first in range(0, run.steps, run.every):
        chosen = batches[first : first + run.every]
        synchronize()
        started = time.perf_counter()
        for batch in chosen:
            loss_of(model, batch).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            scheduler.step()
        synchronize()
        seconds += time.perf_counter() - started
        curve.append((first + len(chosen), seconds, held_out_loss(model, data, run.test_batch)))
    return curve


def pretrained_on_bytes(data: Data, args: argparse.Namespace) -> nn.Module:
    """A small model that has learned the prompts, and no answer, for `--pretrain_s` seconds."""
    model = small_model(args.layers, vocabulary=END_OF_BYTES + 1).to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, fused=DEVICE == "cuda")
    started = time.monotonic()
    for step, batch in enumerate(data.batches(4 * args.batch, seed=-1)):
        if time.monotonic() - started > args.pretrain_s:
            break
        for group in optimizer.param_groups:
            group["lr"] = 6e-4 * min(1.0, (step + 1) / 50)
        other = (batch["labels"] != IGNORED) | (batch["attention_mask"] == 0)
        labels = batch["input_ids"].masked_fill(other, IGNORED)
        loss_of(model, {**batch, "labels": labels}).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.to(torch.bfloat16)


def make_base(data: Data, args: argparse.Namespace) -> nn.Module:
    if args.model is None:
        return pretrained_on_bytes(data, args)
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).to(DEVICE)


def best_learning_rate(variant: Variant, base: nn.Module, data: Data, args: argparse.Namespace) -> float:
    """The one with the lowest held-out loss after a short training."""
    losses, steps = {}, args.search_steps
    for rate in args.learning_rates:
        run = Training(rate, args.seeds[0], steps, steps, args.batch, args.test_batch)
        losses[rate] = train(variant, base, data, run)[-1][2]
        print(f"{variant.name:<34} learning rate {rate:g}: {losses[rate]:.4f}", flush=True)
    return min(losses, key=lambda rate: losses[rate])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model and its tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="folder of the tasks")
    parser.add_argument("--tasks", nargs="+", help="by default all")
    parser.add_argument("--train_rows", type=int, default=1500, help="of each task")
    parser.add_argument("--test_rows", type=int, default=30, help="of each task")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--families", nargs="+", default=["lora", "lora_16bit", "ours"])
    parser.add_argument("--learning_rates", nargs="+", type=float, default=[1e-4, 3e-4, 1e-3, 3e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--search_steps", type=int, default=50)
    parser.add_argument("--every", type=int, default=10, help="steps between two measurements of the held-out loss")
    parser.add_argument("--test_batch", type=int, default=64)
    parser.add_argument("--layers", type=int, default=30, help="without --model")
    parser.add_argument("--pretrain_s", type=float, default=30, help="without --model")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    forms = [*(form for form in baselines() if not form.dropout), ours(3, 4), ours_as_lora()]
    variants = [form for form in forms if form.family in args.families]

    data = Data(args)
    base = make_base(data, args)
    rates = {variant: best_learning_rate(variant, base, data, args) for variant in variants}
    rows = []
    for seed, variant in itertools.product(args.seeds, variants):
        run = Training(rates[variant], seed, args.steps, args.every, args.batch, args.test_batch)
        curve = train(variant, base, data, run)
        row = {
            **variant.facts(),
            "model": args.model.name if args.model else f"SmolLM2-135M's shape, {args.pretrain_s:g} s on bytes",
            "tasks": data.tasks,
            "batch": args.batch,
            "seed": seed,
            "learning_rate": rates[variant],
            "learning_rates": args.learning_rates,
            "curve": curve,
            **environment(),
        }
        write_row(args.out, row)
        rows.append(row)
        print(f"{variant.name:<34} seed {seed}: {curve[-1][2]:.4f} after {curve[-1][1]:.1f} s", flush=True)
        free()
    print(time_to_loss_table(rows))


if __name__ == "__main__":
    main()
