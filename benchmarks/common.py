"""What the benchmarks share: variants, timing, and rows with everything needed to read them later."""

import copy
import gc
import json
import os
import platform
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import peft
import torch
from loop_forms import LoopLinear, wrap_in_loops
from peft import LoraConfig, get_peft_model
from torch import nn

from rlora_trl import MultiHeadAdapter, RLoraConfig
from rlora_trl.kernels import draw_seed, keep_mask
from rlora_trl.kernels.reference import multihead_delta_reference


TARGETS = ("gate_proj", "up_proj", "down_proj")
# On a CPU the scripts run too, to try them; only cpu.py measures there.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_STARTED = datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Variant:
    """One form of adapter: its family, heads, rank of each head and dropout; and whether the model is compiled."""

    name: str
    family: str
    num_heads: int = 1
    r: int = 0
    dropout: float = 0.0
    compiled: bool = False

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with this adapter; `floor` trains nothing, but gradients flow to its input."""
        if self.family == "floor":
            return model.requires_grad_(False)
        if self.family in ("lora", "lora_16bit"):
            return self._wrap_in_lora(model)
        if self.family in _LOOPS:
            options = {"r": self.r, "num_heads": self.num_heads, "scaling": 32 / self.r, "dropout": self.dropout}
            return wrap_in_loops(model, TARGETS, **options, **_LOOPS[self.family])
        options = {"r": self.r, "num_heads": self.num_heads, "head_dropout": self.dropout}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="With `num_heads=1`")
            return get_peft_model(model, RLoraConfig(target_modules=list(TARGETS), **options))

    def _wrap_in_lora(self, model: nn.Module) -> nn.Module:
        config = LoraConfig(r=self.r, lora_alpha=32, lora_dropout=self.dropout, target_modules=list(TARGETS))
        wide = self.family == "lora"
        wrapped = get_peft_model(model, config, autocast_adapter_dtype=wide)
        if not wide:
            # PEFT leaves adapters of quantized layers in float32; TRL casts them to bfloat16.
            dtype = getattr(model, "dtype", next(model.parameters()).dtype)
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
        return wrapped

    def facts(self) -> dict[str, Any]:
        """What a row says of its variant. The compiled ones are families of their own."""
        family = f"{self.family}_compiled" if self.compiled else self.family
        sizes = {"num_heads": self.num_heads, "r": self.r, "dropout": self.dropout}
        return {"variant": self.name, "family": family, **sizes}

    def when_compiled(self) -> "Variant":
        return replace(self, name=f"{self.name}, compiled", compiled=True)


_LOOPS = {
    "hydra_loop": {"head_dropout": False},
    "rlora_loop": {"head_dropout": True},
    "rlora_loop_a_once": {"head_dropout": True, "a_once": True},
}


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
        Variant("R-LoRA loop N=3 r=4, A x once", "rlora_loop_a_once", 3, 4, 0.2),
        Variant("R-LoRA loop N=5 r=4, A x once", "rlora_loop_a_once", 5, 4, 0.2),
    ]


def share_weights(model: nn.Module) -> nn.Module:
    """A copy of the modules on the same parameters and buffers, for a variant to put its adapters into."""
    shared: list[Any] = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


# What is compared with float64


def _off(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """The largest relative error, by norms."""
    return max(((a.detach().double().cpu() - b).norm() / b.norm()).item() for a, b in pairs)


def _wide(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.detach().double().cpu().requires_grad_(True) for t in tensors]


def _error_of_ours(num_heads: int, r: int, device: str, dtype: torch.dtype) -> float:
    """With dropout, whose masks the reference is given, and away from the initial values."""
    adapter = MultiHeadAdapter(256, 384, r, num_heads, 2.0, dropout=0.2).to(device).train()
    with torch.no_grad():
        for parameter in (adapter.A, adapter.B, adapter.router):
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    x = torch.randn(500, 256, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(384, 256, device=device).mul_(1 / 16).to(dtype)
    torch.manual_seed(7)
    y = adapter(x, weight=weight)
    upstream = torch.randn_like(y)
    grads = torch.autograd.grad(y, [x, adapter.A, adapter.B], upstream)
    torch.manual_seed(7)
    mask = keep_mask(draw_seed(), (500, num_heads, r), 0.2)
    wide = _wide(x, adapter.A, adapter.B)
    fixed = [t.detach().double().cpu() for t in (adapter.router, adapter.A0, adapter.B0)]
    expected = multihead_delta_reference(*wide, *fixed, scaling=2.0, dropout=0.2, head_masks=mask)
    expected = expected + wide[0] @ weight.double().cpu().T
    wanted = torch.autograd.grad(expected, wide, upstream.double().cpu())
    return _off([(y, expected), *zip(grads, wanted, strict=True)])


def _error_of_baseline(variant: Variant, device: str, dtype: torch.dtype) -> float:
    """Without dropout: the masks of the others come from PyTorch's generator."""
    holder = nn.Module()
    holder.gate_proj = nn.Linear(256, 384, bias=False, device=device, dtype=dtype)
    wrapped = replace(variant, dropout=0.0).wrap(holder).train()
    layer = next(m for n, m in wrapped.named_modules() if n.endswith("gate_proj"))
    router, scaling = None, 32 / variant.r
    if isinstance(layer, LoopLinear):
        A, heads, router = layer.lora_A.weight, [head.weight for head in layer.lora_B], layer.lora_route.weight
    else:
        A, heads = layer.lora_A.default.weight, [layer.lora_B.default.weight]
    for head in heads:
        nn.init.normal_(head, std=0.1)  # LoRA's start at zero
    x = torch.randn(500, 256, device=device, dtype=dtype, requires_grad=True)
    with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        y = layer(x)
    upstream = torch.randn_like(y)
    grads = torch.autograd.grad(y, [x, A, *heads], upstream)
    wide = _wide(x, A, *heads)
    B = torch.stack(wide[2:])
    expected = multihead_delta_reference(
        wide[0], wide[1], B, None if router is None else router.detach().double().cpu(), scaling=scaling
    )
    expected = expected + wide[0] @ layer.base_layer.weight.detach().double().cpu().T
    wanted = torch.autograd.grad(expected, wide, upstream.double().cpu())
    return _off([(y, expected), *zip(grads, wanted, strict=True)])


def check_numerics(variant: Variant, dtype: torch.dtype, device: str = DEVICE) -> float:
    """
    Relative error of a variant's layer against the float64 loop over heads, outputs and gradients.

    Ours is checked with dropout, the others without; the floor has nothing to check.

    Raises:
        RuntimeError: If it is larger than rounding explains; nothing is reported then.
    """
    if variant.family == "floor":
        return 0.0
    torch.manual_seed(0)
    if variant.family == "ours":
        error = _error_of_ours(variant.num_heads, variant.r, device, dtype)
    else:
        error = _error_of_baseline(variant, device, dtype)
    limit = 2e-2 if dtype in (torch.bfloat16, torch.float16) else 2e-3  # float32 products may use tf32
    if not error <= limit:
        raise RuntimeError(f"numerics off by {error:.2e} in {dtype}; not reported")
    return error


# Timing and memory


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def allocated() -> int:
    """Bytes allocated on the device."""
    return torch.cuda.memory_allocated() if DEVICE == "cuda" else 0


def reset_peak() -> None:
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak() -> int:
    """The most bytes that were allocated on the device since [`reset_peak`]."""
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0


def free() -> None:
    """Give back what nobody holds."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def time_calls(function: Callable[[], Any], repeats: int, warmup: int = 0) -> list[float]:
    """Milliseconds of each of `repeats` calls after `warmup` calls: by CUDA events, on a CPU by the clock."""
    for _ in range(warmup):
        function()
    if DEVICE == "cpu":
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - started))
        return times
    torch.cuda.synchronize()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def attempt(function: Callable[[], Any]) -> tuple[Any, str | None]:
    """What a call returns and `None`, or `None` and why it failed, in one line; what it held is given back."""
    try:
        return function(), None
    except torch.OutOfMemoryError:
        why = "out of memory"
    except Exception as error:
        lines = str(error).splitlines() or [""]
        why = f"{type(error).__name__}: {lines[0][:200]}"
    free()
    return None, why


def take_turns(
    functions: dict[str, Callable[[], Any]], rounds: int, repeats: int, warmup: int = 1
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """
    Time functions in turn, so that a drift of the machine's speed hits all of them.

    Args:
        functions (`dict[str, Callable]`): By name. One that fails is removed, so that what it holds is given back.
        rounds (`int`): How often each has its turn. Each round starts with another one.
        repeats (`int`), warmup (`int`): Calls of a turn that are timed, after `warmup` that are not.

    Returns:
        `tuple`: Milliseconds of all timed calls by name, and why others failed.
    """
    names = list(functions)
    times: dict[str, list[float]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    # What exists by now is not looked through by each garbage collection in a timed call.
    gc.collect()
    gc.freeze()
    for turn in range(rounds):
        first = turn * max(1, len(names) // rounds) % len(names)
        for name in names[first:] + names[:first]:
            if name in failed:
                continue
            found, why = attempt(lambda name=name: time_calls(functions[name], repeats, warmup))
            if why is None:
                times[name] += found
            else:
                failed[name] = why
                del functions[name], times[name]
    gc.unfreeze()
    free()
    return times, failed


def summary(times: list[float]) -> dict[str, Any]:
    """Median, smallest and largest time, and how many."""
    return {"median_ms": median(times), "min_ms": min(times), "max_ms": max(times), "repeats": len(times)}


def median(values: list[float]) -> float:
    return statistics.median(values)


# Rows


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def processor() -> str:
    """The name of the CPU, and how many threads PyTorch uses."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", path.read_text()) if path.exists() else None
    threads = torch.get_num_threads()
    name = found.group(1).strip() if found else platform.machine()
    return f"{name}, {threads} thread{'s' * (threads > 1)}"


def environment() -> dict[str, str]:
    """Device, versions, command, and when it was started: rows of one run share the last two."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "peft": peft.__version__,
        "date": date.today().isoformat(),
        "started": _STARTED,
        "kernels": os.environ.get("RLORA_TRL_KERNELS", "auto"),
        # Without where the rows went, which is nobody's business.
        "command": re.sub(r" --out \S+", "", " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])),
    }


def write_row(path: Path | None, row: dict) -> None:
    """Append a row to a JSON-lines file."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
