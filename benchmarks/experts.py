"""Time and peak memory of one training step of a mixture of experts, with adapters on all experts.

    python benchmarks/experts.py --out benchmarks/results/experts.jsonl
    python benchmarks/experts.py --layers 4 --settings 2x2048

The shape is that of Qwen3-30B-A3B (hidden size 2048, 8 experts of 768 for each token) with 64 experts and 24 layers.
Forms share the frozen weights of one base and are timed in turn, as in `train_step.py`: the frozen base, through which
gradients flow to its input; PEFT's LoRA on the same parameters (`target_parameters`), with float32 and 16-bit
adapters, of about as many trainable parameters as N=3 r=4; and R-LoRA. The bar is 1.3 x the frozen base.

Before a form of R-LoRA is timed, outputs and gradients of its grouped products, with dropout, are compared with one
expert at a time in float64.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from common import (
    DEVICE,
    Variant,
    allocated,
    attempt,
    environment,
    free,
    summary,
    take_turns,
    write_row,
)
from peft import LoraConfig, get_peft_model
from train_step import TrainStep
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from rlora_trl import RLoraConfig
from rlora_trl.kernels import grouped, rank_space
from rlora_trl.kernels.dropout import keep_mask
from rlora_trl.kernels.reference import multihead_delta_reference


BAR = 1.3
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
# Batch, length, checkpointing.
SETTINGS = {"1x16": (1, 16, False), "2x2048": (2, 2048, True), "8x2048": (8, 2048, True)}
# Relative error of outputs and gradients: 16 bits round each of three factors to 2**-9; the gradient of a router is a
# difference of heads.
_TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-4}


class ExpertVariant(Variant):
    """A form of adapter on the experts."""

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model with this adapter; `floor` trains nothing, but gradients flow to its input."""
        if self.family == "floor":
            return model.requires_grad_(False)
        if self.family == "ours":
            config = RLoraConfig(r=self.r, num_heads=self.num_heads, head_dropout=self.dropout)
            return get_peft_model(model, config)
        lora = LoraConfig(r=self.r, lora_alpha=32, target_modules=[], target_parameters=PARAMETERS)
        return get_peft_model(model, lora, autocast_adapter_dtype=self.family == "lora")


def variants() -> list[ExpertVariant]:
    """What is measured."""
    return [
        ExpertVariant("frozen base (floor)", "floor"),
        ExpertVariant("PEFT LoRA r=10", "lora", r=10),
        ExpertVariant("PEFT LoRA r=10, 16-bit adapter", "lora_16bit", r=10),
        ExpertVariant("rlora_trl N=3 r=4", "ours", 3, 4, 0.2),
        ExpertVariant("rlora_trl N=3 r=4, no dropout", "ours", 3, 4),
        ExpertVariant("rlora_trl N=10 r=16", "ours", 10, 16, 0.2),
    ]


def build_model(args: argparse.Namespace) -> torch.nn.Module:
    """A model with random weights on the device."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=args.hidden,
        intermediate_size=args.hidden,
        moe_intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=max(args.hidden // 64, 1),
        num_key_value_heads=max(args.hidden // 512, 1),
        head_dim=min(128, args.hidden),
        num_experts=args.experts,
        num_experts_per_tok=min(8, args.experts),
        vocab_size=args.vocabulary,
        use_cache=False,
    )
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))


def check_numerics(
    variant: ExpertVariant, dtype: torch.dtype, experts: int = 5, d_in: int = 96, d_out: int = 160
) -> float:
    """
    The largest relative error of a form of R-LoRA against one expert at a time in float64.

    Raises:
        RuntimeError: If it is larger than rounding explains.
    """
    torch.manual_seed(0)
    heads, r, seed = variant.num_heads, variant.r, 7
    counts = [0, 33, 70, 1, 200][:experts]
    ends = torch.tensor(counts, device=DEVICE).cumsum(0).to(torch.int32)
    rows, groups, layout = sum(counts), grouped.RowGroups(offsets=ends), rank_space.Layout(heads, r)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, dtype=torch.float64) * shape[-1] ** -0.5).to(DEVICE, torch.float32)

    params = [draw(experts, r, d_in), draw(experts, heads, d_out, r), draw(experts, heads, d_in)]
    anchors = [draw(experts, r, d_in), draw(experts, d_out, r)]
    x, dy, W = (
        (draw(rows, d_in) * d_in**0.5).to(dtype),
        draw(rows, d_out).to(dtype),
        draw(experts, d_out, d_in).to(dtype),
    )
    inputs = [tensor.requires_grad_() for tensor in (x, *params)]

    def product(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.cat([tokens[start:end] @ weight[e].T for e, start, end in groups.segments(len(tokens))])

    # The fused form.
    weights = grouped.concat_experts(*params, *anchors, layout, scaling=2.0, multiple=16 if DEVICE == "cuda" else 1)
    call = grouped.GroupedCall(
        *(groups, layout, weights.initial_A, variant.dropout, seed if variant.dropout else None),
        lambda tokens: product(tokens, W),
        lambda grad: product(grad, W.transpose(1, 2)),
    )
    y = grouped.fused_grouped(x, weights, None, call)
    actual = [y, *torch.autograd.grad(y, inputs, dy)]

    # One expert at a time.
    mask = keep_mask(seed, (rows, heads, r), variant.dropout, DEVICE).double() if variant.dropout else None
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = [
        wide[0][start:end] @ W[e].double().T
        + multihead_delta_reference(
            wide[0][start:end],
            *(tensor[e] for tensor in wide[1:]),
            *(anchor[e].double() for anchor in anchors),
            scaling=2.0,
            dropout=variant.dropout,
            head_masks=None if mask is None else mask[start:end],
        )
        for e, start, end in groups.segments(rows)
    ]
    total = torch.cat(expected)
    reference = [total, *torch.autograd.grad(total, wide, dy.double())]

    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(actual, reference, strict=True)]
    if not max(errors) <= _TOLERANCE[dtype]:
        raise RuntimeError(f"relative errors {[f'{error:.1e}' for error in errors]} against float64")
    return max(errors)


def prepare(
    variant: ExpertVariant, base: torch.nn.Module, setting: str, args: argparse.Namespace
) -> tuple[TrainStep, float | None]:
    """A form ready to be timed, and the error of its numerics."""
    dtype = getattr(torch, args.dtype)
    error = check_numerics(variant, dtype) if variant.family == "ours" else None
    return TrainStep(variant, base, SETTINGS[setting], dtype, args.warmup), error


def measure(base: torch.nn.Module, base_gib: float, setting: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of all forms in one setting."""
    steps, failed, known = {}, {}, {}
    chosen = [variant for variant in variants() if not args.families or variant.family in args.families]
    for variant in chosen:
        started = time.monotonic()
        prepared, why = attempt(lambda variant=variant: prepare(variant, base, setting, args))
        if why is not None:
            failed[variant.name] = why
            continue
        steps[variant.name], error = prepared
        facts = {**steps[variant.name].facts(), "error_of_numerics": error, "build_s": time.monotonic() - started}
        known[variant.name] = {**facts, "peak_gib": base_gib + facts["adapter_gib"] + facts["activation_gib"]}
        del prepared

    times, lost = take_turns(steps, args.rounds, args.repeats)
    failed |= lost
    shape = {key: getattr(args, key) for key in ("hidden", "intermediate", "experts", "layers", "vocabulary")}
    shape |= {"setting": setting, "checkpointing": SETTINGS[setting][2], "dtype": args.dtype}
    rows = []
    for variant in chosen:
        row = {**variant.facts(), **shape, "median_ms": None}
        name = variant.name
        rows.append(row | ({"error": failed[name]} if name in failed else {**known[name], **summary(times[name])}))
    return rows


def line(row: dict[str, Any], floor: float | None) -> str:
    """A row in one line."""
    start = f"{row['experts']} experts, {row['layers']} layers  {row['setting']:<7} {row['variant']:<34}"
    if row["median_ms"] is None:
        return f"{start} {row['error']}"
    ratio = row["median_ms"] / floor if floor else float("nan")
    verdict = "" if row["family"] != "ours" or not floor else f"  bar {BAR}: {'met' if ratio <= BAR else 'missed'}"
    return (
        f"{start} {row['median_ms']:8.1f} ms (min {row['min_ms']:7.1f}, p90 {row['p90_ms']:7.1f})  {ratio:5.2f}  "
        f"{row['peak_gib']:5.1f} GiB  {row['trainable'] / 1e6:6.1f} M{verdict}"
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["2x2048", "8x2048"])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768, help="width of an expert")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--vocabulary", type=int, default=32768, help="a large one would hide what adapters cost")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--families", nargs="+", help="only these: floor lora lora_16bit ours")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each form")
    parser.add_argument("--repeats", type=int, default=4, help="timed steps of a turn")
    parser.add_argument("--warmup", type=int, default=2, help="steps before memory is measured; a turn has one more")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    free()
    empty = allocated()
    base = build_model(args)
    base_gib = (allocated() - empty) / 2**30
    for setting in args.settings:
        rows = measure(base, base_gib, setting, args)
        floor = next((row["median_ms"] for row in rows if row["family"] == "floor"), None)
        for row in rows:
            write_row(args.out, {**row, **environment()})
            print(line(row, floor), flush=True)
        free()


if __name__ == "__main__":
    main()
