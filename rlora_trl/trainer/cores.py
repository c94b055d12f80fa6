"""CPUs: as many threads as the cores that this process may use, and whether they compute in bfloat16."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from transformers import TrainingArguments


# An environment variable that `accelerate launch` sets in each process.
_LAUNCHED = "ACCELERATE_USE_CPU"


def use_all_cores() -> None:
    """
    Use a thread for each available core, in a single process on a CPU: `accelerate launch` sets one thread.

    An `OMP_NUM_THREADS` of the user is respected. The value 1 counts as the launcher's, which sets it by default.
    """
    threads = os.environ.get("OMP_NUM_THREADS")
    is_default = threads is None or (threads == "1" and _LAUNCHED in os.environ)
    if is_default and not torch.accelerator.is_available() and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        torch.set_num_threads(available_cores())


def has_fast_bf16() -> bool:
    """Whether this machine multiplies bfloat16 matrices faster than float32 ones; a CPU may be many times slower."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    # AMX of Intel, AVX-512 BF16 of both. A training step then takes about half the time of one in float32.
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)


def slow_precision(arguments: TrainingArguments, model: torch.nn.Module) -> str | None:
    """
    What to change where a run computes in bfloat16 on a CPU without instructions for it.

    Args:
        arguments (`TrainingArguments`): The arguments of the run; `bf16` is TRL's default.
        model (`torch.nn.Module`): The model, whose weights may be in bfloat16.

    Returns:
        `str`, *optional*: A message; `None` on other devices, on CPUs that are fast, and in other precisions.
    """
    if arguments.device.type != "cpu" or has_fast_bf16():
        return None
    stored = any(parameter.dtype is torch.bfloat16 for parameter in model.parameters())
    changes = ["load the model in float32 (`--dtype float32`)"] if stored else []
    changes += ["set `bf16=False` (`--bf16 false`)"] if arguments.bf16 else []
    if not changes:
        return None
    return (
        "This CPU has no instructions for bfloat16, and a step may take ten times longer than in float32. To change "
        f"that, {' and '.join(changes)}."
    )


def available_cores(groups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """
    The number of cores that this process may use, by its affinity (`taskset`, Slurm) and its quota (containers).

    Args:
        groups (`Path`, *optional*, defaults to `/sys/fs/cgroup`): Folder of the control groups of Linux.
        membership (`Path`, *optional*, defaults to `/proc/self/cgroup`): File with the groups of this process.

    Returns:
        `int`: At least 1.
    """
    # `sched_getaffinity` is missing on macOS and Windows; `os.process_cpu_count` comes with Python 3.13.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = min((_cpu_quota(group) for group in _groups(groups, membership)), default=math.inf)
    return max(1, math.ceil(min(cores, quota)))


def _groups(groups: Path, membership: Path) -> list[Path]:
    """The folders of the control group of this process, of version 1 or 2, and of all groups around it."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    folders = [groups, groups / "cpu"]
    for line in lines:
        _, controllers, name = line.split(":", 2)  # "0::/job" of version 2, "4:cpu,cpuacct:/job" of version 1
        root = groups if not controllers else groups / "cpu" if "cpu" in controllers.split(",") else None
        parts = Path(name.lstrip("/")).parts
        # A container may see its own group as the root, with the path that the host uses: then only the root exists.
        # A name with ".." is a group outside the container.
        if root is not None and ".." not in parts:
            folders += [root.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1)]
    return folders


def _cpu_quota(group: Path) -> float:
    """The quota of a control group in cores, of version 2 or 1; infinite without a limit."""
    try:
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
        else:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            quota, period = ((group / name).read_text(encoding="ascii") for name in names)
        return float(quota) / float(period) if float(quota) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):  # "max", or no such file
        return math.inf
