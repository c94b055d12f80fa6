"""What a call of one adapted layer costs the host: microseconds to issue its forward and its backward pass.

    python benchmarks/host.py --out benchmarks/results/host.jsonl

A model of 20 layers, each called once a step, and small enough for the GPU to be done long before the host is (64
tokens, 256 to 512). With short steps, as in `train_step.py --settings 6x512`, these times set the pace.
"""

import argparse
import time
from pathlib import Path

import torch
from common import DEVICE, Variant, check_numerics, environment, ours, synchronize, write_row
from torch import nn


CALLS = 20
TOKENS, D_IN, D_OUT = 64, 256, 512


class Stack(nn.Module):
    """Layers that all get the same input."""

    def __init__(self) -> None:
        super().__init__()
        options = {"bias": False, "device": DEVICE, "dtype": torch.bfloat16}
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"gate_proj": nn.Linear(D_IN, D_OUT, **options)}) for _ in range(CALLS)
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [block["gate_proj"](x) for block in self.blocks]


class Case:
    """A variant's model, with an input and upstream gradients."""

    def __init__(self, variant: Variant) -> None:
        check_numerics(variant, torch.bfloat16)
        self.model = variant.wrap(Stack()).train()
        options = {"device": DEVICE, "dtype": torch.bfloat16}
        self.x = torch.randn(TOKENS, D_IN, requires_grad=True, **options)
        self.upstream = [torch.randn(TOKENS, D_OUT, **options)] * CALLS

    def turn(self) -> tuple[float, float]:
        """Microseconds of a call's forward and backward pass, from the start of an idle GPU's queue."""
        self.model.zero_grad(set_to_none=True)
        synchronize()
        start = time.perf_counter()
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            outputs = self.model(self.x)
        middle = time.perf_counter()
        torch.autograd.backward(outputs, self.upstream)
        end = time.perf_counter()
        return (middle - start) / CALLS * 1e6, (end - middle) / CALLS * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    variants = [
        Variant("frozen base (floor)", "floor"),
        ours(3, 4),
        ours(10, 16),
        Variant("PEFT LoRA r=10", "lora", r=10),
        Variant("PEFT LoRA r=10, dropout 0.2", "lora", r=10, dropout=0.2),
        Variant("PEFT LoRA r=10, 16-bit adapter", "lora_16bit", r=10),
    ]
    cases = [Case(variant) for variant in variants]
    times: list[list[tuple[float, float]]] = [[] for _ in variants]
    for _ in range(args.repeats):
        for case, found in zip(cases, times, strict=True):
            found.append(case.turn())
    for variant, found in zip(variants, times, strict=True):
        forward, backward = (min(column) for column in zip(*found, strict=True))
        row = {"variant": variant.name, "family": variant.family, "num_heads": variant.num_heads, "r": variant.r}
        row |= {"forward_us": forward, "backward_us": backward, "repeats": args.repeats}
        write_row(args.out, {**row, **environment()})
        print(f"{variant.name:<34} forward {forward:6.1f} us  backward {backward:6.1f} us", flush=True)


if __name__ == "__main__":
    main()
