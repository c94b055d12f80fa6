"""Time and peak memory of one training step (forward, backward, AdamW) of a whole model, variant by variant.

    python benchmarks/train_step.py --shape qwen2.5-3b --out benchmarks/results/train_step.jsonl

Every variant runs in the same process on the same weights. The floor trains nothing: its gradients flow through the
frozen base to the input embeddings, which no adapter can avoid.
"""

import argparse
import gc
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from common import Variant, baselines, check_numerics, environment, median, ours, time_gpu, write_row
from shapes import SHAPES, model_config
from transformers import AutoModelForCausalLM


SETTINGS = {"6x512": (6, 512, False), "8x2048": (8, 2048, True)}


def build_model(shape: str, dtype: torch.dtype, layers: int | None, four_bit: bool) -> torch.nn.Module:
    """A model with random weights on the GPU."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(model_config(shape, layers), dtype=dtype)
    if four_bit:
        import bitsandbytes as bnb

        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
                quantized = bnb.nn.Linear4bit(
                    module.in_features,
                    module.out_features,
                    bias=module.bias is not None,
                    compute_dtype=torch.bfloat16,
                    quant_type="nf4",
                )
                quantized.weight = bnb.nn.Params4bit(module.weight.data.cpu(), requires_grad=False, quant_type="nf4")
                if module.bias is not None:
                    quantized.bias = module.bias
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, quantized.cuda())
    return model


def measure(variant: Variant, args: argparse.Namespace, setting: str, dtype: torch.dtype) -> dict:
    """One row: median step time and peak memory of one variant."""
    batch, length, checkpointing = SETTINGS[setting]
    model = variant.wrap(build_model(args.shape, dtype, args.layers, args.four_bit)).train()
    model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None
    ids = torch.randint(0, 150000, (batch, length), device="cuda")
    # As TRL runs it by default: 16-bit autocast, which leaves a 16-bit base as it is.
    autocast = torch.autocast("cuda", dtype=dtype) if dtype != torch.float32 else nullcontext()

    def step() -> None:
        with autocast:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    torch.cuda.reset_peak_memory_stats()
    times = time_gpu(step, args.repeats, args.warmup)
    return {
        "variant": variant.name,
        "family": variant.family,
        "num_heads": variant.num_heads,
        "r": variant.r,
        "dropout": variant.dropout,
        "trainable": sum(p.numel() for p in trained),
        "shape": args.shape,
        "layers": model.config.num_hidden_layers,
        "setting": setting,
        "checkpointing": checkpointing,
        "dtype": str(dtype).removeprefix("torch."),
        "base": "nf4" if args.four_bit else str(dtype).removeprefix("torch."),
        "median_ms": median(times),
        "min_ms": min(times),
        "max_ms": max(times),
        "repeats": args.repeats,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-3b")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--layers", type=int, help="cut the model short, for a quick look")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--four_bit", action="store_true", help="an NF4 base")
    parser.add_argument("--families", nargs="+", help="only these families")
    parser.add_argument("--heads", nargs="+", type=int, default=[1, 3, 5, 10])
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    dtype = getattr(torch, args.dtype)
    variants = [*baselines(), *(ours(n, r) for n in args.heads for r in args.ranks)]
    variants = [v for v in variants if not args.families or v.family in args.families]
    for variant in variants:
        if variant.family == "ours":
            check_numerics(variant.num_heads, variant.r, "cuda", dtype)
    for setting in args.settings:
        floor = None
        for variant in variants:
            started = time.monotonic()
            try:
                row = measure(variant, args, setting, dtype)
            except torch.OutOfMemoryError:
                row = {"variant": variant.name, "shape": args.shape, "setting": setting, "median_ms": None}
            gc.collect()
            torch.cuda.empty_cache()
            write_row(args.out, {**row, **environment()})
            if row["median_ms"] is None:
                print(f"{args.shape} {setting:<7} {variant.name:<34} out of memory", flush=True)
                continue
            floor = row["median_ms"] if variant.family == "floor" else floor
            ratio = f"{row['median_ms'] / floor:5.2f}" if floor else "    -"
            print(
                f"{args.shape} {setting:<7} {variant.name:<34} {row['median_ms']:8.1f} ms  {ratio}  "
                f"{row['peak_gib']:5.1f} GiB  [{time.monotonic() - started:.0f} s]",
                flush=True,
            )


if __name__ == "__main__":
    main()
