"""What a call of an adapted layer costs the host: microseconds to issue its forward and its backward pass.

    python benchmarks/host.py --out benchmarks/results/host.jsonl

In two cases, a call after the other, each on the output of the one before:

- `mlp`: MLP blocks of a Qwen2 model, whose gate and up projections get the same input. A call is a third of a block,
  activation included.
- `layer`: one linear layer after the other.

They are small enough for the GPU to be done long before the host is (64 tokens, 256 to 512). With short steps, as in
`train_step.py --settings 2x512`, these times set the pace. Variants have their turns one after the other; the smallest
time of each is reported, and the median. Unsloth's fused LoRA runs in a process of its own.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from common import (
    ALONE,
    DEVICE,
    Elsewhere,
    RowTasks,
    Variant,
    attempt,
    baselines,
    check_numerics,
    environment,
    fused,
    median,
    ours,
    ours_as_lora,
    ours_by_task,
    synchronize,
    write_row,
)
from shapes import mlp
from torch import nn


BLOCKS = 20
TOKENS, HIDDEN, INTERMEDIATE = 64, 256, 512
# Calls of adapted layers in a block.
CALLS = {"mlp": 3, "layer": 1}


def make_block(case: str) -> nn.Module:
    if case == "mlp":
        return mlp(HIDDEN, INTERMEDIATE, DEVICE, torch.bfloat16)
    linear = nn.Linear(INTERMEDIATE, INTERMEDIATE, bias=False, device=DEVICE, dtype=torch.bfloat16)
    return nn.ModuleDict({"down_proj": linear})


class Stack(nn.Module):
    """Blocks one after the other."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(make_block(case) for _ in range(BLOCKS))
        self.is_mlp = case == "mlp"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x) if self.is_mlp else block["down_proj"](x)
        return x


class Calls:
    """A variant's model, with an input and an upstream gradient."""

    def __init__(self, variant: Variant, case: str) -> None:
        check_numerics(variant, torch.bfloat16)
        self.calls = BLOCKS * CALLS[case]
        self.model = variant.wrap(Stack(case)).train()
        shape = (1, TOKENS, HIDDEN if case == "mlp" else INTERMEDIATE)
        self.x = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        self.upstream = torch.randn_like(self.x)
        self.tasks = RowTasks(self.model, 1)
        self.turn()

    def turn(self) -> tuple[float, float]:
        """Microseconds of a call's forward and backward pass, from the start of an idle GPU's queue."""
        self.model.zero_grad(set_to_none=True)
        synchronize()
        start = time.perf_counter()
        with torch.autocast(DEVICE, dtype=torch.bfloat16), self.tasks.given():
            output = self.model(self.x)
        middle = time.perf_counter()
        output.backward(self.upstream)
        end = time.perf_counter()
        self.tasks.drop()
        return (middle - start) / self.calls * 1e6, (end - middle) / self.calls * 1e6


def variants_of(case: str) -> list[Variant]:
    """What is compared; fused functions are those of a whole MLP."""
    simple = [variant for variant in baselines() if variant.family in ("floor", "lora", "lora_16bit")]
    return [*simple, *(fused() if case == "mlp" else []), ours(3, 4), ours(10, 16), ours_by_task(), ours_as_lora()]


def make_calls(variant: Variant, case: str) -> Calls | Elsewhere:
    variant.check_installed()
    return Elsewhere(Calls, variant, case) if variant.family == ALONE else Calls(variant, case)


def measure(case: str, repeats: int) -> list[dict[str, Any]]:
    """The rows of all variants in one case."""
    made: dict[str, Calls | Elsewhere] = {}
    failed: dict[str, str] = {}
    for variant in variants_of(case):
        calls, why = attempt(lambda variant=variant: make_calls(variant, case))
        if why is None:
            made[variant.name] = calls
        else:
            failed[variant.name] = why

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
    for _ in range(repeats):
        for name, calls in made.items():
            times[name].append(calls.turn())

    rows = []
    for variant in variants_of(case):
        row = {**variant.facts(), "case": case, "forward_us": None, "backward_us": None, "repeats": repeats}
        if variant.name in failed:
            row["error"] = failed[variant.name]
        else:
            forward, backward = zip(*times[variant.name], strict=True)
            both = [sum(pair) for pair in times[variant.name]]
            row |= {"forward_us": min(forward), "backward_us": min(backward), "median_us": median(both)}
        rows.append(row)
    return rows


def line(row: dict[str, Any]) -> str:
    """A row in one line."""
    start = f"{row['case']:<6} {row['variant']:<34}"
    if "error" in row:
        return f"{start} {row['error']}"
    both = row["forward_us"] + row["backward_us"]
    parts = f"forward {row['forward_us']:6.1f}, backward {row['backward_us']:6.1f}"
    return f"{start} {both:6.1f} us a call ({parts}, median {row['median_us']:6.1f})"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CALLS, default=list(CALLS))
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    for case in args.cases:
        for row in measure(case, args.repeats):
            write_row(args.out, {**row, **environment()})
            print(line(row), flush=True)


if __name__ == "__main__":
    main()
