"""Time and memory of one adapted linear layer, forward and backward, by tokens, heads and rank.

    python benchmarks/layer.py --out benchmarks/results/layer.jsonl

Reports the forward pass, forward and backward together, and what is allocated at the peak beyond inputs and weights,
in bfloat16, for the gate (2048 to 11008) and the down projection (11008 to 2048) of the 3B shape. The forms of one
number of tokens are timed in turn.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import (
    DEVICE,
    Variant,
    allocated,
    attempt,
    baselines,
    check_numerics,
    environment,
    median,
    ours,
    peak,
    reset_peak,
    synchronize,
    take_turns,
    write_row,
)
from torch import nn


LAYERS = {"gate_proj": (2048, 11008), "down_proj": (11008, 2048)}
# Tokens at which heads and rank vary.
MANY = 16384


class Layer:
    """One layer with a variant's adapter, its input and an upstream gradient; a call goes forward and backward."""

    def __init__(
        self, variant: Variant, name: str, sizes: tuple[int, int], tokens: int, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        check_numerics(variant, dtype)
        d_in, d_out = sizes
        self.dtype = dtype
        options: dict[str, Any] = {"device": DEVICE, "dtype": dtype}
        holder = nn.Module()
        setattr(holder, name, nn.Linear(d_in, d_out, bias=False, **options))
        wrapped = variant.wrap(holder)
        self.layer = next(m for n, m in wrapped.named_modules() if n.endswith(name)).train()
        self.x = torch.randn(tokens, d_in, requires_grad=True, **options)
        self.upstream = torch.randn(tokens, d_out, **options)
        self()
        synchronize()
        before = allocated()
        reset_peak()
        self()
        synchronize()
        self.peak_mib = (peak() - before) / 2**20

    def forward(self) -> torch.Tensor:
        if self.dtype == torch.float32:
            return self.layer(self.x)
        with torch.autocast(DEVICE, dtype=self.dtype):
            return self.layer(self.x)

    def __call__(self) -> None:
        self.forward().backward(self.upstream)
        self.x.grad = None
        for parameter in self.layer.parameters():
            parameter.grad = None


def groups(args: argparse.Namespace) -> Iterator[tuple[str, int, list[Variant]]]:
    """What is timed in turn: a layer, a number of tokens, and forms."""
    names = ("frozen base (floor)", "PEFT LoRA r=10", "PEFT LoRA r=10, 16-bit adapter", "R-LoRA loop N=3 r=4")
    base = [variant for variant in baselines() if variant.name in names]
    for name in args.layers:
        for tokens in args.tokens:
            variants = [*base, ours(3, 4)]
            if tokens == MANY:
                variants += [ours(n, 4) for n in args.heads if n != 3] + [ours(3, r) for r in args.ranks if r != 4]
            yield name, tokens, variants


def measure(name: str, tokens: int, variants: list[Variant], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of forms that are timed in turn."""
    layers: dict[str, Layer] = {}
    failed: dict[str, str] = {}
    for variant in variants:
        layer, why = attempt(lambda variant=variant: Layer(variant, name, args.sizes[name], tokens))
        if why is None:
            layers[variant.name] = layer
        else:
            failed[variant.name] = why
        del layer
    peaks = {name: layer.peak_mib for name, layer in layers.items()}
    both, lost = take_turns(layers, args.rounds, args.repeats, warmup=3)
    failed |= lost
    forward, lost = take_turns({n: layer.forward for n, layer in layers.items()}, args.rounds, args.repeats, warmup=3)
    failed |= lost
    rows = []
    for variant in variants:
        d_in, d_out = args.sizes[name]
        row = {**variant.facts(), "layer": name, "tokens": tokens, "d_in": d_in, "d_out": d_out}
        if variant.name in failed:
            row |= {"forward_backward_ms": None, "error": failed[variant.name]}
        else:
            row |= {
                "forward_ms": median(forward[variant.name]),
                "forward_backward_ms": median(both[variant.name]),
                "peak_mib": peaks[variant.name],
                "repeats": len(both[variant.name]),
            }
        rows.append(row)
    return rows


def line(row: dict[str, Any]) -> str:
    """A row in one line."""
    start = f"{row['layer']} T={row['tokens']:<6} {row['variant']:<32}"
    if row["forward_backward_ms"] is None:
        return f"{start} {row['error']}"
    return (
        f"{start} forward {row['forward_ms']:7.3f} ms  with backward {row['forward_backward_ms']:7.3f} ms  "
        f"{row['peak_mib']:8.1f} MiB"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096, MANY, 65536])
    parser.add_argument("--heads", nargs="+", type=int, default=[1, 2, 3, 5, 8, 10, 16], help=f"at {MANY} tokens")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 8, 16, 32], help=f"at {MANY} tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=10, help="timed calls of a turn")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    args.sizes = LAYERS
    for name, tokens, variants in groups(args):
        for row in measure(name, tokens, variants, args):
            write_row(args.out, {**row, **environment()})
            print(line(row), flush=True)


if __name__ == "__main__":
    main()
