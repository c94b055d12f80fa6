"""`rlora env`: the facts for a bug report."""

from __future__ import annotations

import os
from typing import Any

from . import options
from .output import print_json, print_text, results_only


_PACKAGES = (
    *("torch", "transformers", "peft", "trl", "accelerate", "datasets", "huggingface_hub", "safetensors"),
    *("triton", "bitsandbytes", "deepspeed", "matplotlib"),
)


def show_environment(as_json: options.Json = False) -> None:
    """Show versions, devices and kernels, for a bug report.

    The output contains no paths, host names or tokens.
    """
    with results_only():
        facts = _facts()
    if as_json:
        print_json(facts)
        return
    for name, value in facts.items():
        print_text(f"- {name}: {', '.join(value) if isinstance(value, list) else value or 'not installed'}")


def _facts() -> dict[str, Any]:
    # Not `trl env`, which prints accelerate's configuration with paths and host names.
    import platform
    from importlib import metadata

    import torch

    packages: dict[str, str | None] = dict.fromkeys(_PACKAGES)
    for package in _PACKAGES:
        try:
            packages[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # shown as not installed

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    other = "MPS" if torch.backends.mps.is_available() else "CPU"
    return {
        "rlora_trl": metadata.version("rlora-trl"),
        "Python": platform.python_version(),
        "Platform": f"{platform.system()} {platform.machine()}",
        **packages,
        "Devices": [torch.cuda.get_device_name(index) for index in range(count)] or [other],
        "CUDA of torch": torch.version.cuda or "none",
        "CPU threads": torch.get_num_threads(),
        "Kernels": _kernels(torch.device("cuda" if count else "cpu"), torch.float32),
    }


def _kernels(device: Any, dtype: Any) -> str:
    try:
        from rlora_trl.kernels.fused import KERNELS_VARIABLE, backend

        name = "Triton" if backend(device, dtype).__name__.endswith("triton_ops") else "PyTorch"
    except (ImportError, ValueError) as error:
        return f"none: {error}"
    forced = os.environ.get(KERNELS_VARIABLE)
    return f"{name} ({KERNELS_VARIABLE}={forced})" if forced else name
