"""Time and memory of one adapted linear layer, forward and backward, by tokens, heads and rank.

    python benchmarks/layer.py --out benchmarks/results/layer.jsonl

Reports the forward pass, forward and backward together, and what is allocated at the peak beyond inputs and weights,
for the gate projection of the 3B shape (2048 -> 11008) in bfloat16.
"""

import argparse
from pathlib import Path

import torch
from common import Variant, check_numerics, environment, median, ours, time_gpu, write_row
from torch import nn


def layer_of(variant: Variant, d_in: int, d_out: int) -> nn.Module:
    """One layer with a variant's adapter, named as the variants expect."""
    holder = nn.Module()
    holder.gate_proj = nn.Linear(d_in, d_out, bias=False, device="cuda", dtype=torch.bfloat16)
    wrapped = variant.wrap(holder)
    return next(m for n, m in wrapped.named_modules() if n.endswith("gate_proj"))


def measure(variant: Variant, tokens: int, d_in: int, d_out: int, repeats: int) -> dict:
    """One row for one variant."""
    layer = layer_of(variant, d_in, d_out).train()
    x = torch.randn(tokens, d_in, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(tokens, d_out, device="cuda", dtype=torch.bfloat16)

    def forward() -> torch.Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return layer(x)

    def both() -> None:
        forward().backward(upstream)
        x.grad = None
        for parameter in layer.parameters():
            parameter.grad = None

    both()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    peak = torch.cuda.max_memory_allocated() - before
    forward_ms, both_ms = median(time_gpu(forward, repeats, 10)), median(time_gpu(both, repeats, 10))
    return {
        "variant": variant.name,
        "family": variant.family,
        "num_heads": variant.num_heads,
        "r": variant.r,
        "tokens": tokens,
        "d_in": d_in,
        "d_out": d_out,
        "forward_ms": forward_ms,
        "forward_backward_ms": both_ms,
        "peak_mib": peak / 2**20,
        "repeats": repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096, 16384, 65536])
    parser.add_argument("--heads", nargs="+", type=int, default=[1, 2, 3, 5, 8, 10, 16])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 8, 16, 32])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    d_in, d_out = 2048, 11008
    base = [
        Variant("frozen base (floor)", "floor"),
        Variant("PEFT LoRA r=10, 16-bit adapter", "lora_16bit", r=10),
        Variant("R-LoRA loop N=3 r=4", "rlora_loop", 3, 4, 0.2),
    ]
    cases = [(tokens, v) for tokens in args.tokens for v in (*base, ours(3, 4))]
    cases += [(16384, ours(n, 4)) for n in args.heads if n != 3] + [(16384, ours(3, r)) for r in args.ranks if r != 4]
    for num_heads, r in {(v.num_heads, v.r) for _, v in cases if v.family == "ours"}:
        check_numerics(num_heads, r, "cuda", torch.bfloat16)
    for tokens, variant in cases:
        row = measure(variant, tokens, d_in, d_out, args.repeats)
        torch.cuda.empty_cache()
        write_row(args.out, {**row, **environment()})
        print(
            f"T={tokens:<6} {variant.name:<32} forward {row['forward_ms']:7.3f} ms  with backward "
            f"{row['forward_backward_ms']:7.3f} ms  {row['peak_mib']:8.1f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
