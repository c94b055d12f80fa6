"""`rlora env`: what to say about a machine when something does not work."""

from __future__ import annotations

import os
from typing import Any

import typer

from .options import Command, JsonOption, help_of
from .output import print_json, print_text, results_only


_PACKAGES = (
    *("torch", "transformers", "peft", "trl", "accelerate", "datasets", "huggingface_hub", "safetensors"),
    *("triton", "bitsandbytes", "deepspeed", "matplotlib"),
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("env", cls=Command, help=help_of(show_environment))(show_environment)


def show_environment(as_json: JsonOption = False) -> None:
    """Show versions, devices and kernels: what to copy into a bug report.

    No paths, names of machines or tokens are in it.
    """
    with results_only():
        facts = _facts()
    if as_json:
        print_json(facts)
        return
    print_text("\n".join(f"- {name}: {_shown(value)}" for name, value in facts.items()))


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return "not installed" if value is None else str(value)


def _facts() -> dict[str, Any]:
    import platform
    from importlib import metadata

    from rlora_trl._version import __version__

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    facts: dict[str, Any] = {
        "rlora_trl": __version__,
        "Python": platform.python_version(),
        "Platform": f"{platform.system()} {platform.machine()}",
        **{package: version(package) for package in _PACKAGES},
    }
    return facts | _devices()


def _devices() -> dict[str, Any]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [torch.cuda.get_device_name(index) for index in range(count)]
    if not count and torch.backends.mps.is_available():
        names = ["MPS"]
    return {
        "Devices": names or ["CPU"],
        "CUDA of torch": torch.version.cuda or "none",
        "CPU threads": torch.get_num_threads(),
        "Kernels": _kernels(torch.device("cuda" if count else "cpu"), torch.float32),
    }


def _kernels(device: Any, dtype: Any) -> str:
    from rlora_trl.kernels.fused import KERNELS_VARIABLE, backend

    try:
        name = "Triton" if backend(device, dtype).__name__.endswith("triton_ops") else "PyTorch"
    except (ImportError, ValueError) as error:
        return f"none: {error}"
    forced = os.environ.get(KERNELS_VARIABLE)
    return f"{name} ({KERNELS_VARIABLE}={forced})" if forced else name
