"""What the benchmarks share: variants, timing, and rows with everything needed to read them later."""

import json
import re
import statistics
import sys
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import peft
import torch
from loop_forms import wrap_in_loops
from peft import LoraConfig, get_peft_model
from torch import nn

from rlora_trl import MultiHeadAdapter, RLoraConfig
from rlora_trl.kernels import keep_mask
from rlora_trl.kernels.reference import multihead_delta_reference


TARGETS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Variant:
    """One form of adapter: its family, heads, rank of each head and dropout."""

    name: str
    family: str
    num_heads: int = 1
    r: int = 0
    dropout: float = 0.0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with this adapter; `floor` trains nothing, but gradients flow to its input."""
        if self.family == "floor":
            return model.requires_grad_(False)
        if self.family in ("lora", "lora_16bit"):
            config = LoraConfig(r=self.r, lora_alpha=32, lora_dropout=self.dropout, target_modules=list(TARGETS))
            return get_peft_model(model, config, autocast_adapter_dtype=self.family == "lora")
        if self.family in ("hydra_loop", "rlora_loop"):
            scaling, head_dropout = 32 / self.r, self.family == "rlora_loop"
            options = {"r": self.r, "num_heads": self.num_heads, "scaling": scaling, "dropout": self.dropout}
            return wrap_in_loops(model, TARGETS, head_dropout=head_dropout, **options)
        config = RLoraConfig(
            r=self.r, num_heads=self.num_heads, head_dropout=self.dropout, target_modules=list(TARGETS)
        )
        return get_peft_model(model, config)


def ours(num_heads: int, r: int, dropout: float = 0.2) -> Variant:
    return Variant(f"rlora_trl N={num_heads} r={r}", "ours", num_heads, r, dropout)


def baselines() -> list[Variant]:
    """The floor, PEFT's LoRA with about the parameters of N=3 r=4, and the published loop forms."""
    return [
        Variant("frozen base (floor)", "floor"),
        Variant("PEFT LoRA r=10", "lora", r=10),
        Variant("PEFT LoRA r=10, dropout 0.2", "lora", r=10, dropout=0.2),
        Variant("PEFT LoRA r=10, 16-bit adapter", "lora_16bit", r=10),
        Variant("HydraLoRA loop N=3 r=4", "hydra_loop", 3, 4, 0.2),
        Variant("R-LoRA loop N=3 r=4", "rlora_loop", 3, 4, 0.2),
        Variant("R-LoRA loop N=5 r=4", "rlora_loop", 5, 4, 0.2),
    ]


def check_numerics(num_heads: int, r: int, device: str, dtype: torch.dtype) -> float:
    """
    Relative error of our layer against the float64 loop over heads, outputs and gradients, with dropout.

    Raises:
        RuntimeError: If it is larger than rounding explains; nothing is reported then.
    """
    torch.manual_seed(0)
    adapter = MultiHeadAdapter(256, 384, r, num_heads, 2.0, init_weights=False, dropout=0.2).to(device).train()
    x = torch.randn(500, 256, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(384, 256, device=device).mul_(1 / 16).to(dtype)
    torch.manual_seed(7)
    y = adapter(x, weight=weight)
    upstream = torch.randn_like(y)
    grads = torch.autograd.grad(y, [x, adapter.A, adapter.B], upstream)
    torch.manual_seed(7)
    from rlora_trl.kernels import draw_seed

    mask = keep_mask(draw_seed(), (500, num_heads, r), 0.2)
    wide = [t.detach().double().cpu().requires_grad_(True) for t in (x, adapter.A, adapter.B)]
    router = adapter.router.detach().double().cpu()
    expected = multihead_delta_reference(*wide, router, scaling=2.0, dropout=0.2, head_masks=mask)
    expected = expected + wide[0] @ weight.double().cpu().T
    wanted = torch.autograd.grad(expected, wide, upstream.double().cpu())
    pairs = [(y, expected), *zip(grads, wanted, strict=True)]
    error = max(((a.double().cpu() - b).norm() / b.norm()).item() for a, b in pairs)
    limit = 2e-2 if dtype in (torch.bfloat16, torch.float16) else 2e-3  # float32 products may use tf32
    if error > limit:
        raise RuntimeError(f"Numerics of N={num_heads} r={r} in {dtype} are off by {error:.2e}; nothing is reported.")
    return error


def time_gpu(function, repeats: int, warmup: int) -> list[float]:
    """Milliseconds of each of `repeats` calls, by CUDA events, after `warmup` calls."""
    for _ in range(warmup):
        function()
    torch.cuda.synchronize()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def environment() -> dict[str, str]:
    """Device, versions and command of a run."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
        "peft": peft.__version__,
        "date": date.today().isoformat(),
        # Without where the rows went, which is nobody's business.
        "command": re.sub(r" --out \S+", "", " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])),
    }


def write_row(path: Path | None, row: dict) -> None:
    """Append a row to a JSON-lines file."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def median(values: list[float]) -> float:
    return statistics.median(values)
