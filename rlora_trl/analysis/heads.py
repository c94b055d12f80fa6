"""How similar the heads of an adapter are: cosines between the matrices B, by layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import safe_open
from torch import nn

from ..tuner.config import SAFETENSORS_NAME
from ..tuner.selection import adapted_layers, adapter_config


HeadSource: TypeAlias = nn.Module | Mapping[str, torch.Tensor] | str | Path

# Cosines of all layers, before their sums: heads are few, but a file may claim any number of tiny ones.
MAX_COSINES = 2**25

# State dicts of models have the adapter's name, files don't.
_HEADS = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.rlora_adapters\.(?:(?P<adapter>[^.]+)\.)?B")


def head_similarities(source: HeadSource, adapter_name: str | None = None) -> dict[str, torch.Tensor]:
    """
    Cosine similarity between the heads B of each layer, over all their elements.

    Independent heads have a similarity near 0, copies of each other 1.

    Args:
        source (`torch.nn.Module`, `Mapping[str, torch.Tensor]`, `str` or `Path`):
            A model with the adapter, its state dict, or a folder or safetensors file, from which only the heads are
            read.
        adapter_name (`str`, *optional*):
            Name of the adapter in a model or its state dict; required if there are several.

    Returns:
        `dict[str, torch.Tensor]`: Cosines `[N, N]` in float32 on the CPU, by name of the layer in the base model.
        Heads of zeros have a cosine of 0 with every head, themselves included.

    Raises:
        ValueError: If there are no heads, heads of several adapters, or more than 2^25 cosines.
        FileNotFoundError: If the folder or file does not exist.
    """
    heads: Iterable[tuple[str, torch.Tensor]]
    if isinstance(source, nn.Module):
        name, _ = adapter_config(source, adapter_name)
        layers = adapted_layers(source, name)
        heads = ((layer, module.rlora_adapters[name].get_parameter("B")) for layer, module in layers.items())
    elif isinstance(source, Mapping):
        heads = ((layer, source[key]) for layer, key in _find_heads(source, adapter_name).items())
    else:
        heads = _read_heads(Path(source), adapter_name)

    similarities, count = {}, 0
    for layer, B in heads:
        count += B.shape[-3] ** 2 if B.ndim > 2 else 0
        if count > MAX_COSINES:
            raise ValueError(
                f"There are more than {MAX_COSINES:,} cosines between the heads: {B.shape[-3]} heads in {layer}. "
                "Compare fewer layers, passed as a state dict."
            )
        similarities[layer] = head_cosines(B.detach()).cpu()
    return similarities


def mean_similarity(similarities: Mapping[str, torch.Tensor]) -> float:
    """
    The mean cosine between different heads, over pairs and layers.

    Args:
        similarities (`Mapping[str, torch.Tensor]`): Cosines `[N, N]` by layer, from [`head_similarities`].

    Raises:
        ValueError: If there are no layers, or only one head.
    """
    return torch.stack([mean_between(matrix) for matrix in check_similarities(similarities).values()]).mean().item()


def head_cosines(B: torch.Tensor) -> torch.Tensor:
    """Cosines `[N, N]` in float32 between heads `[N, d_out, r]`; the mean over experts of heads `[E, N, d_out, r]`."""
    flat = nn.functional.normalize(B.float().flatten(-2), dim=-1)  # [N, d_out * r]
    cosines = (flat @ flat.mT).clamp(-1.0, 1.0)
    return cosines.mean(0) if B.ndim > 3 else cosines


def mean_between(matrix: torch.Tensor) -> torch.Tensor:
    """The mean of the elements off the diagonal of a matrix `[N, N]`."""
    heads = matrix.shape[0]
    return (matrix.sum() - matrix.diagonal().sum()) / (heads * (heads - 1))


def check_similarities(similarities: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """
    Check that there are heads to compare.

    Raises:
        ValueError: If there are no layers, only one head, or layers of different numbers of heads.
    """
    shapes = sorted({tuple(matrix.shape) for matrix in similarities.values()})
    if len(shapes) != 1 or len(shapes[0]) != 2 or shapes[0][0] != shapes[0][1] or shapes[0][0] < 2:
        raise ValueError(
            f"Head similarities must be matrices [N, N] with N of at least 2, the same in all layers; got {shapes}. "
            "An adapter with one head has none."
        )
    return similarities


def _find_heads(names: Mapping[str, object], adapter_name: str | None) -> dict[str, str]:
    """Names of the tensors B by layer."""
    by_adapter: dict[str | None, dict[str, str]] = {}
    for key in names:
        match = _HEADS.fullmatch(key)
        # Heads without an adapter's name are read under any.
        if match and (adapter_name is None or match["adapter"] in (None, adapter_name)):
            by_adapter.setdefault(match["adapter"], {})[match["layer"]] = key
    if len(by_adapter) != 1:
        adapters = ", ".join(sorted(repr(name) for name in by_adapter)) or "none"
        of_adapter = "" if adapter_name is None else f" of adapter {adapter_name!r}"
        raise ValueError(
            f"Expected the heads{of_adapter} of one R-LoRA adapter, tensors named '<layer>.rlora_adapters.B'; found "
            f"those of {adapters}. Set `adapter_name`, or check the source."
        )
    return next(iter(by_adapter.values()))


def _read_heads(path: Path, adapter_name: str | None) -> Iterator[tuple[str, torch.Tensor]]:
    if path.is_dir():
        path = path / SAFETENSORS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. Pass the folder of a saved adapter, or its {path.name}.")
    with safe_open(path, framework="pt") as file:
        for layer, key in _find_heads(dict.fromkeys(file.keys()), adapter_name).items():
            yield layer, file.get_tensor(key)
