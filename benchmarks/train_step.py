"""Time and peak memory of one training step (forward, backward, AdamW) of a whole model, variant by variant.

    python benchmarks/train_step.py --shape qwen2.5-3b --out benchmarks/results/train_step.jsonl
    python benchmarks/train_step.py --settings 2x512 1x2048 --families floor lora_16bit ours --sizes 3x4

All variants of a setting share the frozen weights of one base model and live at the same time, each with its adapter
and optimizer; they are timed in turn, a few steps each, in several rounds, because short steps follow the speed of the
host's CPU, which drifts. The floor trains nothing: its gradients flow through the frozen base to the input embeddings,
which no adapter can avoid.

Memory is that of one step, before the rounds, less what other variants hold: adapters and optimizer states, as
activations live in one step at a time. `peak_gib` is the base, this adapter, its optimizer state and all that the step
allocates at its peak; `activation_gib` is the last part alone, activations and gradients; `saved_gib` is what the
forward pass leaves for the backward pass.

`--liger` patches the model with Liger's kernels as `use_liger_kernel=True` does in TRL, under all variants. `--busy`
keeps every second core busy while steps are timed. The fused LoRA of axolotl and Unsloth replaces the forward pass of
each MLP, as these packages do it; nothing else of them runs. Unsloth's runs in a process of its own with its own base.
"""

import argparse
import itertools
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import (
    ALONE,
    COMPILED,
    DEVICE,
    Elsewhere,
    RowTasks,
    Variant,
    allocated,
    attempt,
    baselines,
    check_numerics,
    environment,
    free,
    fused,
    ours,
    ours_as_lora,
    ours_by_task,
    peak,
    reset_peak,
    share_weights,
    spinning,
    summary,
    synchronize,
    take_turns,
    time_calls,
    write_row,
)
from shapes import SHAPES, model_config
from transformers import AutoModelForCausalLM
from transformers.integrations.liger import apply_liger_kernel


# Batch, length, checkpointing.
SETTINGS = {
    "2x512": (2, 512, False),
    "1x2048": (1, 2048, False),
    "6x512": (6, 512, False),
    "8x2048": (8, 2048, True),
}


def build_model(
    shape: str, dtype: torch.dtype, layers: int | None, four_bit: bool, liger: bool = False
) -> torch.nn.Module:
    """A model with random weights on the device."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(model_config(shape, layers), dtype=dtype)
    if four_bit:
        quantize(model)
    if liger:
        # As TRL does: without the loss that never makes the logits, which would hide what adapters cost.
        apply_liger_kernel(model, {"fused_linear_cross_entropy": False})
    return model


def quantize(model: torch.nn.Module) -> None:
    """Replace linear layers but the head by bitsandbytes' NF4 with double quantization, as QLoRA does."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            quantized = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
                device="meta",
            )
            weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            quantized.weight = weight.to(DEVICE)
            quantized.bias = module.bias
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, quantized)
    model.is_loaded_in_4bit = True  # what PEFT chooses its 4-bit layer by
    free()


class TrainStep:
    """
    One variant with its optimizer, which makes a training step at each call.

    Args:
        variant (`Variant`): The form of adapter.
        base (`nn.Module`): The model whose weights all variants share.
        size (`tuple[int, int, bool]`): Batch, length, and whether activations are checkpointed.
        dtype (`torch.dtype`): Of activations.
        warmup (`int`): Steps before memory is measured.
    """

    def __init__(
        self, variant: Variant, base: torch.nn.Module, size: tuple[int, int, bool], dtype: torch.dtype, warmup: int
    ) -> None:
        batch, length, checkpointing = size
        others = allocated()
        self.variant = variant
        model = variant.wrap(share_weights(base)).train()
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        trained = [p for p in model.parameters() if p.requires_grad]
        self.trainable = sum(p.numel() for p in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=DEVICE == "cuda") if trained else None
        self.model = model
        if variant.compiled:
            mode = "reduce-overhead" if variant.compiled == "CUDA graphs" else None
            self.model = torch.compile(model, dynamic=False, mode=mode)
        self.tasks = RowTasks(model, batch)
        self.ids = torch.randint(0, base.config.vocab_size, (batch, length), device=DEVICE)
        # As TRL runs it by default: 16-bit autocast, which leaves a 16-bit base as it is.
        self.autocast = torch.autocast(DEVICE, dtype=dtype) if dtype != torch.float32 else nullcontext()
        for _ in range(warmup):
            self()
        self.memory = self._memory(others)

    def forward(self) -> torch.Tensor:
        """The loss."""
        if self.variant.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        with self.autocast, self.tasks.given():
            return self.model(input_ids=self.ids, labels=self.ids).loss

    def finish(self, loss: torch.Tensor) -> None:
        """The backward pass and the update."""
        loss.backward()
        self.tasks.drop()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def __call__(self) -> None:
        self.finish(self.forward())

    def times(self, repeats: int, warmup: int) -> list[float]:
        """Milliseconds of steps, after which memory is left to other processes."""
        found = time_calls(self, repeats, warmup)
        free()
        return found

    def facts(self) -> dict[str, Any]:
        """What a row says beside times."""
        return {"trainable": self.trainable, **self.memory}

    def _memory(self, others: int) -> dict[str, float]:
        """GiB of one step; `others` bytes were allocated by other variants before this one was made, and the base."""
        synchronize()
        before = allocated()
        reset_peak()
        loss = self.forward()
        synchronize()
        saved = allocated() - before
        self.finish(loss)
        synchronize()
        return {
            "adapter_gib": (before - others) / 2**30,
            "activation_gib": (peak() - before) / 2**30,
            "saved_gib": saved / 2**30,
        }


def prepare(
    variant: Variant, base: torch.nn.Module, size: tuple[int, int, bool], dtype: torch.dtype, warmup: int
) -> TrainStep:
    """A variant ready to be timed; raises where its numerics are off."""
    check_numerics(variant, dtype)
    return TrainStep(variant, base, size, dtype, warmup)


def started_step(
    variant: Variant, base: torch.nn.Module, setting: str, args: argparse.Namespace
) -> TrainStep | Elsewhere:
    """A variant ready to be timed, in this process or in one of its own."""
    variant.check_installed()
    if variant.family == ALONE:
        free()  # both processes need it, one after the other
        return Elsewhere(prepare_alone, variant, base.config.num_hidden_layers, setting, args)
    return prepare(variant, base, SETTINGS[setting], getattr(torch, args.dtype), args.warmup)


def prepare_alone(variant: Variant, layers: int | None, setting: str, args: argparse.Namespace) -> TrainStep:
    """The same in a process that has no base yet."""
    dtype = getattr(torch, args.dtype)
    base = build_model(args.shape, dtype, layers, args.four_bit, args.liger)
    step = prepare(variant, base, SETTINGS[setting], dtype, args.warmup)
    free()
    return step


def measure(
    variants: list[Variant], base: torch.nn.Module, base_gib: float, setting: str, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """The rows of all variants in one setting, in their order."""
    steps: dict[str, TrainStep | Elsewhere] = {}
    failed: dict[str, str] = {}
    known: dict[str, dict[str, Any]] = {}
    for variant in variants:
        started = time.monotonic()
        step, why = attempt(lambda variant=variant: started_step(variant, base, setting, args))
        if why is not None:
            failed[variant.name] = why
            continue
        steps[variant.name] = step
        facts = {**step.facts(), "build_s": time.monotonic() - started}
        facts["peak_gib"] = base_gib + facts["adapter_gib"] + facts["activation_gib"]
        known[variant.name] = facts
        del step

    with spinning(args.busy):
        times, lost = take_turns(steps, args.rounds, args.repeats)
    failed |= lost
    rows = []
    for variant in variants:
        row = {**variant.facts(), **setting_facts(args, base, setting), "median_ms": None}
        if variant.name in failed:
            row["error"] = failed[variant.name]
        else:
            row |= {**known[variant.name], **summary(times[variant.name])}
        rows.append(row)
    return rows


def setting_facts(args: argparse.Namespace, base: torch.nn.Module, setting: str) -> dict[str, Any]:
    """What a row says of the model, the batch and the host."""
    return {
        "shape": args.shape,
        "layers": base.config.num_hidden_layers,
        "setting": setting,
        "checkpointing": SETTINGS[setting][2],
        "dtype": args.dtype,
        "base": "nf4" if args.four_bit else args.dtype,
        "busy": args.busy,
        "liger": version("liger_kernel") if args.liger else None,
    }


def line(row: dict[str, Any], floor: float | None) -> str:
    """A row in one line."""
    start = f"{row['shape']} {row['layers']:>2} {row['base']:<8} {row['setting']:<7} {row['variant']:<38}"
    if row["median_ms"] is None:
        return f"{start} {row['error']}"
    ratio = f"{row['median_ms'] / floor:5.2f}" if floor else "    -"
    return (
        f"{start} {row['median_ms']:8.1f} ms (min {row['min_ms']:7.1f}, p90 {row['p90_ms']:7.1f})  {ratio}  "
        f"{row['peak_gib']:5.1f} GiB  [{row['build_s']:.0f} s]"
    )


def chosen_variants(args: argparse.Namespace) -> list[Variant]:
    """What is measured, by the arguments."""
    sizes = args.sizes or itertools.product(args.heads, args.ranks)
    variants = [*baselines(), *fused(), *itertools.starmap(ours, sizes), ours_by_task(), ours_as_lora()]
    variants = [v for v in variants if not args.families or v.family in args.families]
    if args.dtype == "float32":
        # A 16-bit adapter is the same as `lora` there, and fused functions assume 16 bits.
        variants = [v for v in variants if v.family not in ("lora_16bit", "axolotl", "unsloth")]
    if args.compile:
        kept = [v for v in variants if v.family in ("floor", "lora", "lora_16bit", "ours") and v.name != _DROPPED]
        variants = [*kept, *(v.when_compiled(how) for how in COMPILED for v in kept)]
    return variants


def heads_and_rank(text: str) -> tuple[int, int]:
    """Of `3x4`."""
    heads, rank = text.split("x")
    return int(heads), int(rank)


# LoRA with dropout says nothing more about compilation.
_DROPPED = "PEFT LoRA r=10, dropout 0.2"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-3b")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--layers", nargs="+", type=int, default=[None], help="cut the model short; one run for each")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--four_bit", action="store_true", help="an NF4 base")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="the floor, LoRA and ours, also by `torch.compile`, without and with CUDA graphs",
    )
    parser.add_argument("--liger", action="store_true", help="Liger's kernels in the model, as TRL puts them there")
    parser.add_argument("--busy", action="store_true", help="a spinning process on every second core")
    parser.add_argument(
        "--families",
        nargs="+",
        help="only these: floor lora lora_16bit axolotl unsloth hydra_loop rlora_loop rlora_loop_a_once ours "
        "ours_task ours_uniform",
    )
    parser.add_argument("--heads", nargs="+", type=int, default=[1, 3, 5, 10])
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--sizes", nargs="+", type=heads_and_rank, help="such as 3x4 10x16, in place of the two above")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each variant")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of a turn")
    parser.add_argument("--warmup", type=int, default=1, help="steps before memory is measured; a turn has one more")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    variants = chosen_variants(args)
    for layers in args.layers:
        free()
        empty = allocated()
        base = build_model(args.shape, getattr(torch, args.dtype), layers, args.four_bit, args.liger)
        base_gib = (allocated() - empty) / 2**30
        for setting in args.settings:
            rows = measure(variants, base, base_gib, setting, args)
            floor = next((row["median_ms"] for row in rows if row["family"] == "floor"), None)
            for row in rows:
                write_row(args.out, {**row, **environment()})
                print(line(row, floor), flush=True)
            free()
        del base


if __name__ == "__main__":
    main()
