"""Tokens per second of greedy decoding, one token at a time from a cache, at batch 1 and 16.

python benchmarks/decode.py --shape qwen2.5-3b --out benchmarks/results/decode.jsonl
"""

import argparse
import gc
from pathlib import Path

import torch
from common import Variant, environment, median, ours, time_gpu, write_row
from shapes import SHAPES
from train_step import build_model
from transformers import DynamicCache


class Decoder:
    """One variant with a cache of its own, which decodes a token at each call."""

    def __init__(self, variant: Variant, args: argparse.Namespace, batch: int) -> None:
        self.variant, self.batch = variant, batch
        self.model = variant.wrap(build_model(args.shape, torch.bfloat16, args.layers, args.four_bit)).eval()
        self.cache = DynamicCache(config=self.model.config)
        self.ids = torch.randint(0, 150000, (batch, args.prompt), device="cuda")
        self.times: list[float] = []
        self()

    def __call__(self) -> None:
        with torch.inference_mode():
            logits = self.model(input_ids=self.ids, past_key_values=self.cache, use_cache=True).logits
            self.ids = logits[:, -1:].argmax(-1)

    def row(self, args: argparse.Namespace) -> dict:
        """What was measured."""
        return {
            "variant": self.variant.name,
            "family": self.variant.family,
            "shape": args.shape,
            "layers": self.model.config.num_hidden_layers,
            "base": "nf4" if args.four_bit else "bfloat16",
            "batch": self.batch,
            "median_ms": median(self.times),
            "tokens_per_second": 1000 * self.batch / median(self.times),
            "repeats": args.repeats,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-3b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--four_bit", action="store_true")
    parser.add_argument("--prompt", type=int, default=64, help="tokens in the cache at the start")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    variants = [
        Variant("frozen base (floor)", "floor"),
        Variant("PEFT LoRA r=10", "lora", r=10),
        Variant("PEFT LoRA r=10, 16-bit adapter", "lora_16bit", r=10),
        ours(3, 4),
        ours(10, 16),
    ]
    for batch in (1, 16):
        # All at once and in turn: decoding waits for the host, whose speed drifts.
        decoders = [Decoder(variant, args, batch) for variant in variants]
        for repeat in range(args.warmup + args.repeats):
            for decoder in decoders:
                torch.cuda.synchronize()
                elapsed = time_gpu(decoder, 1, 0)
                if repeat >= args.warmup:
                    decoder.times += elapsed
        for decoder in decoders:
            row = decoder.row(args)
            write_row(args.out, {**row, **environment()})
            print(
                f"{args.shape} batch {batch:<3} {row['variant']:<34} {row['median_ms']:7.2f} ms  "
                f"{row['tokens_per_second']:8.1f} tokens/s",
                flush=True,
            )
        del decoders, decoder
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
