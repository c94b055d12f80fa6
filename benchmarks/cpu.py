"""What the forms cost on a CPU: one layer forward and backward, and a training step of a small model, in float32.

    python benchmarks/cpu.py --out benchmarks/results/cpu.jsonl

Ours runs the torch twin of its kernels there, which is what the quickstart uses. It is compared with the loop over
heads that it replaces, as published and with A x once, and with PEFT's LoRA of about the same number of parameters.
The forms of one case are timed in turn, call by call; sizes are those of SmolLM2-135M, with random weights.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from common import Variant, attempt, baselines, environment, free, ours, processor, summary, take_turns, write_row
from layer import Layer
from shapes import small_model
from train_step import prepare


LAYERS = {"gate_proj": (576, 1536), "down_proj": (1536, 576)}
BATCH, LENGTH = 4, 256


def forms() -> list[Variant]:
    names = (
        "frozen base (floor)",
        "PEFT LoRA r=10",
        "PEFT LoRA r=10, dropout 0.2",
        "R-LoRA loop N=3 r=4",
        "R-LoRA loop N=3 r=4, A x once",
    )
    return [*(variant for variant in baselines() if variant.name in names), ours(3, 4)]


def measure(case: str, make: Callable[[Variant], Any], repeats: int) -> list[dict[str, Any]]:
    """The rows of all forms in one case; `make` gives what is to be called, and has called it once."""
    made: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for variant in forms():
        made[variant.name], why = attempt(lambda variant=variant: make(variant))
        if why is not None:
            del made[variant.name]
            failed[variant.name] = why
    times, lost = take_turns(made, repeats, 1, warmup=0)
    failed |= lost
    rows = []
    for variant in forms():
        row = {"case": case, **variant.facts(), "dtype": "float32", "processor": processor(), "median_ms": None}
        if variant.name in failed:
            row["error"] = failed[variant.name]
        else:
            row |= summary(times[variant.name])
        rows.append(row)
    return rows


def line(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """A row in one line, with its ratio to the loop as published."""
    start = f"{row['case']:<36} {row['variant']:<32}"
    if row["median_ms"] is None:
        return f"{start} {row['error']}"
    loop = next((r["median_ms"] for r in rows if r["family"] == "rlora_loop"), None)
    ratio = f"{row['median_ms'] / loop:5.2f}" if loop else "    -"
    return f"{start} {row['median_ms']:8.1f} ms (min {row['min_ms']:7.1f})  {ratio} x loop"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="*", type=int, default=[512, 2048], help="of one layer")
    parser.add_argument("--layers", type=int, default=30, help="of the model")
    parser.add_argument("--repeats", type=int, default=60, help="timed calls of each form, with one layer")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of the model; 0 leaves it out")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    cases: list[tuple] = []
    for name, (d_in, d_out) in LAYERS.items():
        for tokens in args.tokens:

            def make(variant: Variant, name: str = name, tokens: int = tokens) -> Layer:
                return Layer(variant, name, LAYERS[name], tokens, torch.float32)

            cases.append((f"layer {d_in} to {d_out}, {tokens} tokens", make, args.repeats))
    if args.steps:
        base = small_model(args.layers)
        size = (BATCH, LENGTH, False)
        title = f"step of SmolLM2-135M's shape, {BATCH}x{LENGTH}"
        cases.append((title, lambda variant: prepare(variant, base, size, torch.float32, 0), args.steps))
    for case in cases:
        rows = measure(*case)
        for row in rows:
            write_row(args.out, {**row, **environment()})
            print(line(row, rows), flush=True)
        free()


if __name__ == "__main__":
    main()
