"""How large the initial delta of R-LoRA is beside the frozen weights: Table 1 does not depend on their size.

    python benchmarks/initial_delta.py --model SmolLM2-135M-Instruct gemma-3-270m \\
        --out benchmarks/results/initial_delta.jsonl
    python benchmarks/initial_delta.py --update      # the table of docs/results.md

A row is a base model: for each kind of projection the median over layers of |scaling B0 A0| / |W|, in Frobenius norms,
of an adapter as in the paper (`RLoraConfig.paper()`). The anchor subtracts the initial delta, so the model starts as
the base; but head dropout acts on the rest of it. `--model` are folders of models, which are read on the CPU.
"""

import argparse
import statistics
from pathlib import Path

import torch
from common import TARGETS, environment, write_row
from peft import get_peft_model
from quality_report import table
from report import ROOT, read, replace_block
from transformers import AutoModelForCausalLM

from rlora_trl import RLoraConfig
from rlora_trl.tuner import RLoraLinear


def shares(model: torch.nn.Module) -> dict[str, float]:
    """
    Median share by the name of the projection.

    Args:
        model (`torch.nn.Module`): With adapters of R-LoRA, at their initial values.
    """
    found: dict[str, list[float]] = {}
    for path, module in model.named_modules():
        if isinstance(module, RLoraLinear):
            adapter = module.rlora_adapters["default"]
            delta = adapter.scaling * adapter.B0 @ adapter.A0  # [d_out, d_in]
            weight = module.get_base_layer().weight.float()
            found.setdefault(path.rpartition(".")[2], []).append((delta.norm() / weight.norm()).item())
    return {name: statistics.median(values) for name, values in found.items()}


def measure(folder: Path) -> dict:
    """The row of one base model."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = RLoraConfig.paper(target_modules=list(TARGETS), task_type="CAUSAL_LM")
    values = shares(get_peft_model(base, config))
    settings = {"num_heads": config.num_heads, "r": config.r, "init_gamma": config.init_gamma}
    return {"model": folder.resolve().name, **settings, "shares": values, **environment()}


def shares_table(rows: list[dict]) -> str:
    """In %, the newest row of each model."""
    newest = {row["model"]: row["shares"] for row in rows}
    body = [[model, *(f"{100 * found[name]:.0f}" for name in TARGETS)] for model, found in newest.items()]
    return table(["model", *TARGETS], body)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, nargs="+", default=[], help="folders of models")
    parser.add_argument("--out", type=Path, help="file of rows, appended to")
    parser.add_argument("--update", action="store_true", help="write the table of docs/results.md from the rows")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "results.md")
    args = parser.parse_args(arguments)
    for folder in args.model:
        row = measure(folder)
        print(f"{row['model']}: " + ", ".join(f"{name} {100 * value:.1f} %" for name, value in row["shares"].items()))
        write_row(args.out, row)
    if args.update:
        replace_block(args.document, "initial delta", shares_table(read("initial_delta")), Path(__file__).name)


if __name__ == "__main__":
    main()
