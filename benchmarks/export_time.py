"""
Time and memory that the plugin for vLLM takes for an export, without a GPU.

    python benchmarks/export_time.py --heads 3 --rank 4 --out benchmarks/results/export_time.jsonl

The adapter has random values in the shape of the MLP projections of Qwen2.5-3B. The time is a median. The memory is
that of the process, with PyTorch and the values that are written.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file


sys.path.insert(0, str(Path(__file__).parents[1]))

from common import environment, processor, write_row

from rlora_trl import RLoraConfig
from rlora_trl.export.folder import export_folder
from rlora_trl.files.checks import check_adapter


LAYERS, HIDDEN, INTERMEDIATE = 36, 2048, 11008
SHAPES = {"gate_proj": (HIDDEN, INTERMEDIATE), "up_proj": (HIDDEN, INTERMEDIATE), "down_proj": (INTERMEDIATE, HIDDEN)}
TASKS = ["first", "second"]


def write_adapter(folder: Path, heads: int, r: int) -> None:
    """An adapter with a task router, moved from its initial values."""
    tensors = {}
    for index in range(LAYERS):
        for name, (d_in, d_out) in SHAPES.items():
            prefix = f"base_model.model.model.layers.{index}.mlp.{name}.rlora_adapters."
            A, B = 0.02 * torch.randn(r, d_in), 0.02 * torch.randn(heads, d_out, r)
            values = {"A": A + 0.001, "B": B, "A0": A, "B0": B.mean(0), "router": torch.randn(len(TASKS), heads)}
            tensors |= {f"{prefix}{role}": value for role, value in values.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = RLoraConfig(r=r, num_heads=heads, router="task", tasks=TASKS, target_modules=list(SHAPES))
    config.save_pretrained(str(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    check, export = [], []
    with tempfile.TemporaryDirectory() as scratch:
        adapter = Path(scratch, "adapter")
        adapter.mkdir()
        write_adapter(adapter, args.heads, args.rank)
        for index in range(args.repeats):
            start = time.perf_counter()
            checked = check_adapter(adapter)
            middle = time.perf_counter()
            report = export_folder(checked, Path(scratch, f"export-{index}"), task=TASKS[0])
            check.append(middle - start)
            export.append(time.perf_counter() - middle)

    row = {
        "heads": args.heads,
        "rank": args.rank,
        "cpu": processor(),
        "export_rank": report.rank,
        "check_ms": round(1000 * statistics.median(check)),
        "export_ms": round(1000 * statistics.median(export)),
        "slowest_ms": round(1000 * max(export)),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 1),
    }
    write_row(args.out, {**row, **environment()})


if __name__ == "__main__":
    main()
