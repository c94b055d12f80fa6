"""What a call of one adapted layer costs the host: microseconds to issue its forward and its backward pass.

    python benchmarks/host.py --out benchmarks/results/host.jsonl

The layer is small enough for the GPU to be done long before the host is (64 tokens, 256 to 512). With short steps,
as in `train_step.py --settings 6x512`, these times set the pace.
"""

import argparse
import time
from pathlib import Path

import torch
from common import Variant, environment, ours, write_row
from torch import nn


CALLS = 20


def layer_of(variant: Variant) -> nn.Module:
    """One layer with a variant's adapter, named as the variants expect."""
    holder = nn.Module()
    holder.gate_proj = nn.Linear(256, 512, bias=False, device="cuda", dtype=torch.bfloat16)
    wrapped = variant.wrap(holder)
    return next(m for n, m in wrapped.named_modules() if n.endswith("gate_proj")).train()


def turn(layer: nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> tuple[float, float]:
    """Microseconds of a call's forward and backward pass, from the start of an idle GPU's queue."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        outputs = [layer(x) for _ in range(CALLS)]
    middle = time.perf_counter()
    torch.autograd.backward(outputs, [upstream] * CALLS)
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
    layers = [layer_of(variant) for variant in variants]
    x = torch.randn(1, 64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(1, 64, 512, device="cuda", dtype=torch.bfloat16)
    times: list[list[tuple[float, float]]] = [[] for _ in variants]
    for _ in range(args.repeats):
        for layer, found in zip(layers, times, strict=True):
            found.append(turn(layer, x, upstream))
    for variant, found in zip(variants, times, strict=True):
        forward, backward = (min(column) for column in zip(*found, strict=True))
        row = {"variant": variant.name, "family": variant.family, "num_heads": variant.num_heads, "r": variant.r}
        row |= {"forward_us": forward, "backward_us": backward, "repeats": args.repeats}
        write_row(args.out, {**row, **environment()})
        print(f"{variant.name:<34} forward {forward:6.1f} us  backward {backward:6.1f} us", flush=True)


if __name__ == "__main__":
    main()
