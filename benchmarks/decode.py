"""Tokens per second of greedy decoding, one token at a time from a cache, at batch 1 and 16.

    python benchmarks/decode.py --shape qwen2.5-3b --out benchmarks/results/decode.jsonl

All forms share the weights of one base and decode in turn, one token each, because decoding waits for the host, whose
speed drifts.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from common import (
    DEVICE,
    Variant,
    attempt,
    baselines,
    check_numerics,
    environment,
    free,
    ours,
    share_weights,
    summary,
    take_turns,
    write_row,
)
from shapes import SHAPES
from torch import nn
from train_step import build_model
from transformers import DynamicCache


class Decoder:
    """One variant with a cache of its own, which decodes a token at each call."""

    def __init__(self, variant: Variant, base: nn.Module, batch: int, prompt: int, warmup: int) -> None:
        check_numerics(variant, torch.bfloat16)
        self.model = variant.wrap(share_weights(base)).eval()
        self.cache = DynamicCache(config=self.model.config)
        self.ids = torch.randint(0, base.config.vocab_size, (batch, prompt), device=DEVICE)
        for _ in range(1 + warmup):
            self()

    def __call__(self) -> None:
        with torch.inference_mode():
            logits = self.model(input_ids=self.ids, past_key_values=self.cache, use_cache=True).logits
            self.ids = logits[:, -1:].argmax(-1)


def measure(variants: list[Variant], base: nn.Module, batch: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of all variants at one batch size."""
    decoders: dict[str, Decoder] = {}
    failed: dict[str, str] = {}
    for variant in variants:
        decoder, why = attempt(lambda variant=variant: Decoder(variant, base, batch, args.prompt, args.warmup))
        if why is None:
            decoders[variant.name] = decoder
        else:
            failed[variant.name] = why
        del decoder
    times, lost = take_turns(decoders, args.repeats, 1, warmup=0)
    failed |= lost
    rows = []
    for variant in variants:
        facts = {"shape": args.shape, "layers": base.config.num_hidden_layers, "batch": batch, "prompt": args.prompt}
        row = {**variant.facts(), **facts, "base": "nf4" if args.four_bit else "bfloat16", "median_ms": None}
        if variant.name in failed:
            row["error"] = failed[variant.name]
        else:
            row |= summary(times[variant.name])
            row["tokens_per_second"] = 1000 * batch / row["median_ms"]
        rows.append(row)
    return rows


def line(row: dict[str, Any]) -> str:
    """A row in one line."""
    start = f"{row['shape']} {row['base']} batch {row['batch']:<3} {row['variant']:<34}"
    if row["median_ms"] is None:
        return f"{start} {row['error']}"
    return f"{start} {row['median_ms']:7.2f} ms (min {row['min_ms']:6.2f})  {row['tokens_per_second']:8.1f} tokens/s"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-3b")
    parser.add_argument("--layers", type=int, help="cut the model short")
    parser.add_argument("--four_bit", action="store_true", help="an NF4 base")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--prompt", type=int, default=64, help="tokens in the cache at the start")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    kept = ("floor", "lora", "lora_16bit")
    variants = [v for v in baselines() if v.family in kept and not v.dropout] + [ours(3, 4), ours(10, 16)]
    base = build_model(args.shape, torch.bfloat16, args.layers, args.four_bit)
    for batch in args.batches:
        for row in measure(variants, base, batch, args):
            write_row(args.out, {**row, **environment()})
            print(line(row), flush=True)
        free()


if __name__ == "__main__":
    main()
