"""What the benchmarks share: variants, timing, and rows with everything needed to read them later."""

import copy
import gc
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import peft
import torch
from loop_forms import LoopLinear, wrap_in_loops
from peft import LoraConfig, get_peft_model
from shapes import mlp
from torch import nn

from rlora_trl import RLoraConfig
from rlora_trl.kernels import draw_seed, keep_mask
from rlora_trl.kernels.reference import multihead_delta_reference
from rlora_trl.tuner import RLoraLinear, find_routings
from rlora_trl.tuner.routing import using_all


TARGETS = ("gate_proj", "up_proj", "down_proj")
# Those of a task router.
TASKS = ("boolq", "arc", "openbookqa", "piqa", "siqa", "hellaswag", "winogrande", "gsm8k")
# On a CPU the scripts run too, to try them; only cpu.py measures there.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_STARTED = datetime.now(UTC).isoformat(timespec="seconds")


# How a model is compiled: by `torch.compile`, or in its mode "reduce-overhead"; and the ends of their families.
COMPILED = {"compiled": "compiled", "CUDA graphs": "graphs"}


@dataclass(frozen=True)
class Variant:
    """One form of adapter: family, heads, rank of each head, dropout and router; and how the model is compiled."""

    name: str
    family: str
    num_heads: int = 1
    r: int = 0
    dropout: float = 0.0
    router: str = "softmax"
    compiled: str = ""  # "compiled", or "CUDA graphs" too

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with this adapter; `floor` trains nothing, but gradients flow to its input."""
        if self.family == "floor":
            return model.requires_grad_(False)
        if self.family in ("lora", "lora_16bit"):
            return self._wrap_in_lora(model)
        if self.family in FUSED:
            return fuse(self._wrap_in_lora(model), self.family)
        if self.family in _LOOPS:
            options = {"r": self.r, "num_heads": self.num_heads, "scaling": 32 / self.r, "dropout": self.dropout}
            return wrap_in_loops(model, TARGETS, **options, **_LOOPS[self.family])
        options = {"r": self.r, "num_heads": self.num_heads, "head_dropout": self.dropout, "router": self.router}
        if self.router == "task":
            options["tasks"] = list(TASKS)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="With `num_heads=1`")
            warnings.filterwarnings("ignore", message="`target_modules` names")
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
        family = f"{self.family}_{COMPILED[self.compiled]}" if self.compiled else self.family
        sizes = {"num_heads": self.num_heads, "r": self.r, "dropout": self.dropout}
        package = {"package": f"{self.family} {_version(self.family)}"} if self.family in FUSED else {}
        return {"variant": self.name, "family": family, **sizes, **package}

    def check_installed(self) -> None:
        """
        Before anything is built for it.

        Raises:
            ModuleNotFoundError: If the package of a fused form is missing.
        """
        if self.family in FUSED and importlib.util.find_spec(self.family) is None:
            raise ModuleNotFoundError(f"{self.family} is not installed")

    def when_compiled(self, how: str) -> "Variant":
        """The same compiled; `how` is a key of `COMPILED`."""
        return replace(self, name=f"{self.name}, {how}", compiled=how)


_LOOPS = {
    "hydra_loop": {"head_dropout": False},
    "rlora_loop": {"head_dropout": True},
    "rlora_loop_a_once": {"head_dropout": True, "a_once": True},
}


# Packages that compute LoRA in an MLP by one function, and where that function is.
FUSED = {"axolotl": "axolotl.kernels.lora", "unsloth": "unsloth.kernels.fast_lora"}
# Importing it changes classes of transformers and PEFT, for all other variants too.
ALONE = "unsloth"


def fuse(model: nn.Module, package: str) -> nn.Module:
    """PEFT's LoRA in each MLP computed by the function of a package, put there as the package itself does."""
    if package == "unsloth":
        # It would replace the loss of the model too, by one that never makes the logits, and writes code to a folder.
        os.environ["UNSLOTH_FUSED_FORWARD"] = "0"
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", tempfile.mkdtemp(prefix="unsloth-"))
    function = importlib.import_module(FUSED[package]).apply_lora_mlp_swiglu
    for module in model.modules():
        if all(hasattr(module, target) for target in TARGETS):
            module.forward = types.MethodType(function, module)
    return model


def ours(num_heads: int, r: int, dropout: float = 0.2) -> Variant:
    return Variant(f"rlora_trl N={num_heads} r={r}", "ours", num_heads, r, dropout)


def ours_by_task(num_heads: int = 3, r: int = 4, dropout: float = 0.2) -> Variant:
    return Variant(f"rlora_trl N={num_heads} r={r}, task router", "ours_task", num_heads, r, dropout, "task")


def ours_as_lora(r: int = 10) -> Variant:
    """One head and no router: a plain LoRA, which merges into the base exactly."""
    return Variant(f"rlora_trl N=1 r={r}, uniform", "ours_uniform", 1, r, router="uniform")


def fused() -> list[Variant]:
    return [
        Variant("axolotl LoRA r=10, 16-bit adapter", "axolotl", r=10),
        Variant("Unsloth LoRA r=10, 16-bit adapter", "unsloth", r=10),
    ]


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


class RowTasks:
    """Gives a task router the task of each row, as the trainer does: before the forward pass, dropped after a step."""

    def __init__(self, model: nn.Module, rows: int) -> None:
        self.routings = [routing for routing in find_routings(model) if routing.kind == "task"]
        self.ids = torch.arange(rows, device=DEVICE) % len(TASKS)

    def given(self) -> Any:
        """A context manager for the forward pass."""
        return using_all([(routing, {"task_ids": self.ids}) for routing in self.routings])

    def drop(self) -> None:
        for routing in self.routings:
            routing.forget_batch()


# What is compared with float64


def _off(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """The largest relative error, by norms."""
    return max(((a.detach().double().cpu() - b).norm() / b.norm()).item() for a, b in pairs)


def _wide(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.detach().double().cpu().requires_grad_(True) for t in tensors]


def _error_of_ours(variant: Variant, device: str, dtype: torch.dtype) -> float:
    """With dropout, whose masks the reference is given, and away from the initial values."""
    tokens, sizes, dropout = 500, (variant.num_heads, variant.r), variant.dropout
    holder = nn.Module()
    holder.gate_proj = nn.Linear(256, 384, bias=False, device=device, dtype=dtype)
    layer = next(m for m in variant.wrap(holder).train().modules() if isinstance(m, RLoraLinear))
    adapter: Any = layer.rlora_adapters["default"]
    routing, weight = adapter.routing, layer.base_layer.weight.detach()
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    x = torch.randn(tokens, 256, device=device, dtype=dtype, requires_grad=True)
    ids = torch.arange(tokens) % len(TASKS)

    torch.manual_seed(7)
    with routing.using(task_ids=ids.to(device) if variant.router == "task" else None):
        y = layer(x)
    upstream = torch.randn_like(y)
    grads = torch.autograd.grad(y, [x, adapter.A, adapter.B], upstream)

    torch.manual_seed(7)
    mask = keep_mask(draw_seed(), (tokens, *sizes), dropout) if dropout else None
    wide = _wide(x, adapter.A, adapter.B)
    router, anchor_A, anchor_B = (
        None if t is None else t.detach().double().cpu() for t in (adapter.router, adapter.A0, adapter.B0)
    )
    routed = {"logits": router[ids]} if variant.router == "task" else {"router": router}
    expected = multihead_delta_reference(
        *wide,
        anchor_A=anchor_A,
        anchor_B=anchor_B,
        scaling=adapter.scaling,
        dropout=dropout,
        head_masks=mask,
        **routed,
    )
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


def _error_of_fused(variant: Variant, device: str, dtype: torch.dtype) -> float:
    """Of a whole MLP, against PEFT's own LoRA in float64."""
    holder = nn.Module()
    holder.mlp = mlp(256, 384, device, dtype)
    wrapped = replace(variant, family="lora_16bit").wrap(holder)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    reference = copy.deepcopy(wrapped).double().cpu()
    x = torch.randn(1, 500, 256, device=device, dtype=dtype, requires_grad=True)
    (wide,) = _wide(x)  # before a backward pass, which may overwrite its input

    def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return next(module for name, module in model.named_modules() if name.endswith("mlp"))(x)

    with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        y = outputs(fuse(wrapped, variant.family), x)
    upstream = torch.randn_like(y)
    trained, references = ([p for p in m.parameters() if p.requires_grad] for m in (wrapped, reference))
    wide_upstream = upstream.double().cpu()
    grads = torch.autograd.grad(y, [x, *trained], upstream)
    expected = outputs(reference, wide)
    wanted = torch.autograd.grad(expected, [wide, *references], wide_upstream)
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
    if variant.family.startswith("ours"):
        error = _error_of_ours(variant, device, dtype)
    elif variant.family in FUSED:
        error = _error_of_fused(variant, device, dtype)
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
    if isinstance(function, Elsewhere):
        free()  # which needs the memory
        return function.times(repeats, warmup)
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
    except FailedElsewhereError as error:
        why = str(error)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        why = f"{type(error).__name__}: {lines[0][:200]}"
    free()
    return None, why


class FailedElsewhereError(Exception):
    """Why an object in another process failed, as [`attempt`] says it."""


class Elsewhere:
    """
    An object in a process of its own, whose methods are called from here.

    Args:
        make (`Callable`): Makes the object there; a function of a module.
        args: Its arguments.

    Raises:
        FailedElsewhereError: If the object can't be made, or a method fails.
    """

    def __init__(self, make: Callable[..., Any], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, args), daemon=True)
        self._process.start()
        theirs.close()
        self._answer()

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self._pipe.send((method, args))
            return self._answer()

        return call

    def _answer(self) -> Any:
        try:
            value, why = self._pipe.recv()
        except EOFError:
            value, why = None, "its process ended"
        if why is not None:
            raise FailedElsewhereError(why)
        return value


def _serve(pipe: Connection, make: Callable[..., Any], args: tuple) -> None:
    """Make an object and call its methods, until the other side has closed the pipe."""
    made, why = attempt(lambda: make(*args))
    pipe.send((None, why))
    while why is None:
        try:
            method, values = pipe.recv()
        except EOFError:
            return
        pipe.send(attempt(lambda method=method, values=values: getattr(made, method)(*values)))


@contextmanager
def spinning(wanted: bool, limit_s: float = 900) -> Generator[None, None, None]:
    """
    Keep every second core of this process busy.

    Args:
        wanted (`bool`): Otherwise nothing happens.
        limit_s (`float`): Seconds after which the processes end by themselves.
    """
    cores = sorted(os.sched_getaffinity(0))[::2] if wanted else []
    processes = [subprocess.Popen([sys.executable, "-c", _SPIN, str(core), str(limit_s)]) for core in cores]
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


# It ends with its parent too.
_SPIN = """
import os, sys, time
os.sched_setaffinity(0, {int(sys.argv[1])})
parent, end = os.getppid(), time.monotonic() + float(sys.argv[2])
while time.monotonic() < end and os.getppid() == parent:
    pass
"""


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
    """Median, smallest time and ninth decile, and how many there are."""
    p90 = sorted(times)[math.ceil(0.9 * len(times)) - 1]
    return {"median_ms": median(times), "min_ms": min(times), "p90_ms": p90, "repeats": len(times)}


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
