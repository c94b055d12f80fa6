"""`rlora estimate`: the memory that training takes, before weights are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import options
from .output import print_facts, print_json, print_table, print_text, results_only


if TYPE_CHECKING:
    from rlora_trl.estimate import MemoryEstimate


Strategy = Literal["single", "ddp", "zero1", "zero2", "zero3", "zero3-offload", "fsdp2"]
# Share of a GPU's memory to leave free, as PyTorch can't use all of it.
_FRAGMENTS = 0.05
_LABELS = {
    "base": "Base weights",
    "adapter": "Adapter",
    "gradients": "Gradients",
    "optimizer": "Optimizer",
    "activations": "Activations",
    "loss": "Loss",
    "buffers": "Buffers",
}


def estimate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Base model: a folder, a config.json, or a name on the Hub.")
    ],
    strategy: Annotated[
        Strategy | None,
        typer.Option(
            "--strategy",
            metavar="NAME",
            help="single, ddp, zero1, zero2, zero3, zero3-offload or fsdp2.",
            show_default="a table of all",
        ),
    ] = None,
    num_gpus: Annotated[
        int, typer.Option("--num-gpus", metavar="N", min=1, help="Number of GPUs, over all nodes.")
    ] = 1,
    gpu_memory: Annotated[
        float | None,
        typer.Option("--gpu-memory", metavar="GIB", min=0.0, help="Show what fits on a GPU with this much memory."),
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"],
        typer.Option("--dtype", metavar="DTYPE", help="Dtype of the base model, if it is not quantized."),
    ] = "bfloat16",
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="Quantize the base model to 4 bits.")] = False,
    load_in_8bit: Annotated[bool, typer.Option("--load-in-8bit", help="Quantize the base model to 8 bits.")] = False,
    double_quant: Annotated[
        bool,
        typer.Option("--double-quant", "--use-bnb-nested-quant", help="Quantize the scales of 4-bit weights too."),
    ] = False,
    per_device_train_batch_size: Annotated[
        int, typer.Option("--per-device-train-batch-size", metavar="N", min=1, help="Rows per micro-batch.")
    ] = 8,
    max_length: Annotated[int, typer.Option("--max-length", metavar="N", min=1, help="Tokens per row.")] = 1024,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing", help="Recompute activations in the backward pass."
        ),
    ] = True,
    r: Annotated[int, typer.Option("--r", metavar="N", min=1, help="Rank of each head.")] = 4,
    num_heads: Annotated[int, typer.Option("--num-heads", metavar="N", min=1, help="Number of heads.")] = 3,
    target_modules: Annotated[
        list[str] | None,
        typer.Option(
            "--target-modules",
            help="Layers to adapt, separated by commas, or all-linear; may be repeated.",
            show_default="MLP projections",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Estimate the memory that training takes on each GPU.

    It is computed from the configuration of the model; weights are neither read nor downloaded. Every row is assumed
    to have `--max-length` tokens. Without `--strategy` all strategies for this number of GPUs are compared.
    """
    with results_only():
        from rlora_trl.estimate import CUDA_CONTEXT
        from rlora_trl.estimate.memory import estimate_strategies
        from rlora_trl.tuner import RLoraConfig

        targets = _targets(target_modules)
        estimates = estimate_strategies(
            model,
            RLoraConfig(task_type="CAUSAL_LM", r=r, num_heads=num_heads, target_modules=targets),
            strategies=[strategy] if strategy is not None else _strategies(num_gpus),
            num_gpus=num_gpus,
            dtype=dtype,
            load_in_4bit=load_in_4bit,
            load_in_8bit=load_in_8bit,
            double_quant=double_quant,
            per_device_train_batch_size=per_device_train_batch_size,
            max_length=max_length,
            gradient_checkpointing=gradient_checkpointing,
        )
    fits = [None if gpu_memory is None else _fits(entry, gpu_memory, CUDA_CONTEXT) for entry in estimates]
    if as_json:
        values = [
            entry.to_dict() | {"cuda_context": CUDA_CONTEXT, "fits": fit}
            for entry, fit in zip(estimates, fits, strict=True)
        ]
        print_json(values[0] if strategy is not None else values)
    elif strategy is not None:
        print_facts(_facts(estimates[0], fits[0], CUDA_CONTEXT))
    else:
        _print_strategies(estimates, fits)
        print_text(f"GiB on each GPU. CUDA itself takes about {_gib(CUDA_CONTEXT)} more.")


def _targets(typed: list[str] | None) -> list[str] | str | None:
    names = [name for part in typed or () for name in part.split(",") if name]
    # A single name may be a regular expression or "all-linear", as for `rlora train`.
    return names[0] if len(names) == 1 else names or None


def _strategies(num_gpus: int) -> list[str]:
    """The strategies to compare: a single GPU can't divide weights, but can offload them."""
    from rlora_trl.estimate import STRATEGIES

    return ["single", "zero3-offload"] if num_gpus == 1 else [name for name in STRATEGIES if name != "single"]


def _fits(entry: MemoryEstimate, gpu_memory: float, context: int) -> str:
    size = gpu_memory * 2**30
    if entry.total + context > size:
        return "no"
    return "yes" if (entry.total + context) <= (1 - _FRAGMENTS) * size else "barely"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def _facts(entry: MemoryEstimate, fits: str | None, context: int) -> dict[str, Any]:
    gpus = "1 GPU" if entry.num_gpus == 1 else f"{entry.num_gpus} GPUs"
    parts = {label: f"{_gib(getattr(entry, name))} GiB" for name, label in _LABELS.items()}
    return {
        "Strategy": f"{entry.strategy}, {gpus}",
        "Parameters": f"{entry.parameters:,}, {entry.trainable:,} trainable in the adapter",
        **parts,
        "Total": f"{_gib(entry.total)} GiB on each GPU, and about {_gib(context)} for CUDA itself",
        "Host": f"{_gib(entry.host)} GiB, for all GPUs together" if entry.host else None,
        "Fits": fits,
    }


def _print_strategies(estimates: list[MemoryEstimate], fits: list[str | None]) -> None:
    columns = ["strategy", *(label.lower() for label in _LABELS.values()), "total", "host"]
    rows: list[list[Any]] = []
    for entry in estimates:
        sizes = [_gib(getattr(entry, name)) for name in _LABELS]
        rows.append([entry.strategy, *sizes, _gib(entry.total), _gib(entry.host) if entry.host else "-"])
    if any(fits):
        columns.append("fits")
        rows = [[*row, fit] for row, fit in zip(rows, fits, strict=True)]
    print_table(columns, rows)
