"""The layers in the file of an adapter, by the header of the file: read before anything is created for them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError

from ..reading import AdapterCheckError, TensorEntry, first_few, read_safetensors_header, shorten
from .adapter import MultiHeadAdapter
from .comparison import Shape, compare_tensors
from .config import SAFETENSORS_NAME, RLoraConfig
from .layer_names import PREFIX, is_plain
from .patterns import LinearMatcher


FLOATING = ("BF16", "F16", "F32", "F64")

_NAME = re.compile(r"base_model\.model\.(.+)\.rlora_adapters\.([^.]+)")
_MAX_LAYER_NAME = 256


class StoredTensors(NamedTuple):
    """
    The tensors of a file.

    Args:
        layers (`dict[str, dict[str, TensorEntry]]`): Those of adapters, by layer and by role, such as "A".
        others (`dict[str, TensorEntry]`): All others, by name.
    """

    layers: dict[str, dict[str, TensorEntry]]
    others: dict[str, TensorEntry]

    @property
    def ranks(self) -> dict[str, int]:
        """Ranks by layer, by the shape of A, `[r, d_in]` or `[N, r, d_in]`; layers without one are left out."""
        shapes = {layer: tensors["A"].shape for layer, tensors in self.layers.items() if "A" in tensors}
        return {layer: shape[-2] for layer, shape in shapes.items() if len(shape) >= 2}


def split_by_layer(
    path: str | Path, entries: Mapping[str, TensorEntry], form: re.Pattern[str] = _NAME
) -> StoredTensors:
    """
    Split the tensors of a file by layer.

    Args:
        path (`str` or `Path`): The file, for messages.
        entries (`Mapping[str, TensorEntry]`): Its header.
        form (`re.Pattern`, *optional*): Form of the names, with the layer and the role as groups.

    Raises:
        AdapterCheckError: If a name lacks PEFT's prefix, or has a layer of more than 256 characters.
    """
    layers: dict[str, dict[str, TensorEntry]] = {}
    others = {}
    for name, entry in entries.items():
        if not name.startswith(PREFIX):
            raise AdapterCheckError(
                f"{path} has the tensor {shorten(name)}, and names must begin with {PREFIX}. Save the adapter with "
                "PEFT's `save_pretrained`."
            )
        match = form.fullmatch(name)
        if match is None:
            others[name] = entry
        elif len(match[1]) > _MAX_LAYER_NAME:
            raise AdapterCheckError(
                f"{path} names a layer {shorten(match[1])} of {len(match[1])} characters, and at most "
                f"{_MAX_LAYER_NAME} are accepted. It is not the file of an adapter."
            )
        else:
            layers.setdefault(match[1], {})[match[2]] = entry
    return StoredTensors(layers, others)


def check_layers(path: str | Path, stored: StoredTensors, config: RLoraConfig) -> None:
    """
    Compare the tensors of adapters in a file with its configuration, by names, shapes and types.

    Args:
        path (`str` or `Path`): The file, for messages.
        stored ([`StoredTensors`]): Its tensors.
        config ([`RLoraConfig`]): The configuration.

    Raises:
        AdapterCheckError: If there are none, or a tensor is missing, unknown or of another shape or type.
    """
    layers = stored.layers
    if not layers:
        raise AdapterCheckError(
            f"{path} has no tensors of R-LoRA, which are named {PREFIX}<layer>.rlora_adapters.<A, B, ...>. It belongs "
            "to another method, or is not an adapter; take adapter_config.json and this file from one source."
        )

    adapters = {_full_name(layer, role): entry for layer in layers for role, entry in layers[layer].items()}
    ranks = _expected_ranks(path, stored, config)
    expected = {
        _full_name(layer, role): shape
        for layer, tensors in layers.items()
        for role, shape in _expected_shapes(tensors, ranks[layer], config).items()
    }
    difference = compare_tensors(expected, {name: entry.shape for name, entry in adapters.items()})

    problem = None
    if difference.missing:
        problem = f"it lacks {first_few(difference.missing)}"
    elif difference.unknown:
        problem = f"it has {first_few(difference.unknown)}, which an adapter of this configuration does not have"
    for name, (needed, actual) in difference.misshapen.items():
        problem = problem or f"{name} has shape {list(actual)}, expected {_spell(needed)}"
    for name, entry in adapters.items():
        if entry.dtype not in FLOATING:
            problem = problem or f"{name} has type {entry.dtype}, expected {', '.join(FLOATING)}"
    if problem:
        raise AdapterCheckError(
            f"{path} does not fit its configuration: {problem}. The file is incomplete or altered, or the "
            "configuration is another adapter's; get both again."
        )


def _full_name(layer: str, role: str) -> str:
    return f"{PREFIX}{layer}.rlora_adapters.{role}"


def _expected_shapes(tensors: Mapping[str, TensorEntry], r: int, config: RLoraConfig) -> dict[str, Shape]:
    """Shapes by role of the tensors that a layer must have; a size is 0 where the file does not show it."""
    d_in, d_out = _sizes(tensors)
    return MultiHeadAdapter.expected_tensors(
        d_in,
        d_out,
        r,
        config.num_heads,
        router=config.router,
        num_tasks=len(config.tasks or ()),
        share_a=config.share_a,
        init_weights=config.init_weights,
        num_experts=_num_experts(tensors),
    )


def _sizes(tensors: Mapping[str, TensorEntry]) -> tuple[int, int]:
    """Inputs and outputs of a layer, 0 where the file does not show them."""
    A, B = tensors.get("A"), tensors.get("B")
    d_in = A.shape[-1] if A is not None and A.shape else 0
    return d_in, B.shape[-2] if B is not None and len(B.shape) in (3, 4) else 0


def _num_experts(tensors: Mapping[str, TensorEntry]) -> int:
    """The number of experts, 0 for a layer without: heads of experts have four dimensions."""
    B = tensors.get("B")
    return B.shape[0] if B is not None and len(B.shape) == 4 else 0


def _expected_ranks(path: str | Path, stored: StoredTensors, config: RLoraConfig) -> dict[str, int]:
    """The rank that each layer must have; where `rank_pattern` has an expression, any of its ranks."""
    patterns = config.rank_pattern
    plain = all(map(is_plain, patterns))
    by_layer = LinearMatcher(str(path)).values(patterns, stored.layers, "rank_pattern") if plain else {}
    accepted, actual = {config.r, *patterns.values()}, stored.ranks

    ranks = {}
    for layer, tensors in stored.layers.items():
        largest = min((size for size in _sizes(tensors) if size), default=max(accepted))
        rank = min(by_layer.get(layer, config.r), largest)
        # A layer that is narrower than its rank has the largest possible one.
        fits = actual.get(layer, 0) in accepted or (actual.get(layer) == largest <= max(accepted))
        ranks[layer] = actual[layer] if fits and not plain else rank
    return ranks


def _spell(shape: Shape) -> str:
    return f"[{', '.join(str(size or '?') for size in shape)}]"


def read_stored(config: RLoraConfig) -> StoredTensors | None:
    """
    The tensors in the file that a configuration was loaded with.

    Args:
        config ([`RLoraConfig`]): A configuration with a `source`. From a repository, the weights are downloaded into
            the cache, where PEFT finds them when it loads them.

    Returns:
        [`StoredTensors`], or `None` if the configuration has no source, or the source no such file.

    Raises:
        AdapterCheckError: If the header does not describe the file.
    """
    source = config.source
    if source is None:
        return None
    path = os.path.join(source.name, source.subfolder or "", SAFETENSORS_NAME)
    if not os.path.isdir(source.name):
        try:
            path = hf_hub_download(
                source.name,
                SAFETENSORS_NAME,
                subfolder=source.subfolder,
                revision=source.revision,
                **config.download,
            )
        # PEFT looks for the weights too, and reports what is missing.
        except (EntryNotFoundError, HFValidationError):
            return None
    if not os.path.isfile(path):
        return None
    return split_by_layer(path, read_safetensors_header(path))
