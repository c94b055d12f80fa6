"""The tensors of an adapter's file: their digest, finite values, and names and shapes that fit the configuration."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..reading import AdapterCheckError, TensorEntry, shorten
from ..tuner.adapter import MultiHeadAdapter
from ..tuner.config import RLoraConfig
from ..tuner.layer_names import PREFIX, module_of
from ..tuner.patterns import settle_patterns, unselected
from ..tuner.stored import FLOATING, check_layers, split_by_layer


_LORA = re.compile(r"base_model\.model\.(.+)\.(lora_[AB])\.weight")
DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
    **{getattr(torch, f"uint{bits}"): f"U{bits}" for bits in (16, 32, 64)},
}
_CHUNK = 2**22
# Adapters of earlier versions.
_RESIZED = ' If you resized the vocabulary yourself, announce it in adapter_config.json: `"saved_embeddings": {}`.'


def file_digest(path: Path, entries: Collection[str], *, finite: bool = False) -> str:
    """
    Digest of the tensors of a safetensors file, which are read one by one.

    Args:
        path (`Path`): The file, whose header was checked.
        entries (`Collection[str]`): Names of its tensors.
        finite (`bool`, *optional*, defaults to `False`): Check the values in the same pass.

    Returns:
        `str`: `"sha256:"` and 64 hexadecimal digits.

    Raises:
        AdapterCheckError: If a value is NaN or infinite and `finite` is set, or the file can't be read.
    """

    def read() -> Iterator[tuple[str, torch.Tensor]]:
        for name in sorted(entries):
            tensor = file.get_tensor(name)
            if finite and not is_finite(tensor):
                raise AdapterCheckError(
                    f"{path} holds NaN or infinity in {name}. The file is damaged or training diverged; use an "
                    "earlier checkpoint or revision."
                )
            yield name, tensor

    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return _digest(read())
    except (SafetensorError, OSError) as error:
        raise AdapterCheckError(f"{path} can't be read ({error}). Save or download it again.") from error


def state_dict_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Digest of tensors in memory, by the names that they have in a file; see [`file_digest`]."""
    return _digest((name, tensors[name]) for name in sorted(tensors))


def _digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over tensors in the order of their names."""
    state = hashlib.sha256()
    for name, tensor in tensors:
        # The header says how many bytes follow, so that nothing can be moved from one tensor to the next.
        header = json.dumps([name, DTYPE_NAMES[tensor.dtype], list(tensor.shape)])
        state.update(header.encode() + b"\n")

        for chunk in _chunks(tensor.detach().cpu().contiguous()):
            data = chunk.view(torch.uint8)
            if sys.byteorder == "big":
                data = data.view(-1, tensor.element_size()).flip(-1).contiguous()
            state.update(data.numpy().data)
    return f"sha256:{state.hexdigest()}"


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinity, found without a copy of it."""
    # Types of 8 bits have no test of their own.
    chunks = _chunks(tensor) if tensor.is_floating_point() else ()
    return all(bool(torch.isfinite(chunk if chunk.element_size() > 1 else chunk.float()).all()) for chunk in chunks)


def _chunks(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """The values of a tensor in parts that need little memory. Most tensors are small; a file may have many."""
    values = tensor.reshape(-1)
    if values.numel() <= _CHUNK:
        return (values,) if values.numel() else ()
    return values.split(_CHUNK)


def count_parameters(entries: Mapping[str, TensorEntry]) -> int:
    """Number of values that training changes: all but those of the anchor."""
    anchors = tuple(f".rlora_adapters.{name}" for name in MultiHeadAdapter.anchor_names)
    return sum(math.prod(entry.shape) for name, entry in entries.items() if not name.endswith(anchors))


def check_tensors(path: Path, entries: Mapping[str, TensorEntry], config: RLoraConfig) -> tuple[str, ...]:
    """
    Check names, shapes and types of an R-LoRA adapter's tensors against its configuration, and the patterns of this.

    Args:
        path (`Path`): The file, for messages.
        entries (`Mapping[str, TensorEntry]`): Its header.
        config ([`RLoraConfig`]): The configuration.

    Returns:
        `tuple[str, ...]`: The adapted layers, by their paths in the base model.

    Raises:
        AdapterCheckError: If a tensor is missing, unknown or of another shape or type.
    """
    stored = split_by_layer(path, entries)
    layers, others = stored
    settle_patterns(copy(config), list(layers), stored.ranks, str(path))
    layer = unselected(config, layers, str(path))
    if layer is not None:
        raise AdapterCheckError(
            f"{path} has an adapter for the layer {shorten(layer)}, which `target_modules` of its configuration "
            f"({shorten(config.target_modules)}) does not select, nor `target_parameters` "
            f"({shorten(config.target_parameters)}). The two files belong to different adapters; "
            "take both from one source."
        )
    check_layers(path, stored, config)
    _check_others(path, others, {layer: tensors["B"].shape[1] for layer, tensors in layers.items()}, config)
    return tuple(sorted(layers, key=_by_number))


def _by_number(layer: str) -> list[tuple[bool, int, str]]:
    """Sorts layer 2 before layer 10."""
    parts = layer.split(".")
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def _check_others(
    path: Path, others: Mapping[str, TensorEntry], d_out: Mapping[str, int], config: RLoraConfig
) -> None:
    """Tensors besides the adapters' must follow from a field of the configuration."""
    explaining = set()
    for name, entry in others.items():
        field = _explaining_field(name.removeprefix(PREFIX), entry, d_out, config)
        if field is None:
            embedding = module_of(name)
            hint = "" if embedding is None else _RESIZED.format(json.dumps([shorten(embedding, 200)[1:-1]]))
            raise AdapterCheckError(
                f"{path} has the tensor {shorten(name, 200)} of shape {list(entry.shape)}, which nothing in its "
                "configuration explains (`modules_to_save`, `bias`, `trainable_token_indices`, `saved_embeddings`). "
                f"The two files belong to different adapters, or one was altered; take both from one source.{hint}"
            )
        explaining.add(field)
    for field in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, field) and field not in explaining:
            raise AdapterCheckError(
                f"{path} has no tensors for `{field}={shorten(getattr(config, field))}` of its configuration. It is "
                "incomplete, or the configuration is another adapter's; get both again."
            )


def _explaining_field(name: str, entry: TensorEntry, d_out: Mapping[str, int], config: RLoraConfig) -> str | None:
    """Field of the configuration that a tensor belongs to."""
    module, _, leaf = name.rpartition(".")
    if leaf == "trainable_tokens_delta" and module.endswith(".token_adapter"):
        indices = config.trainable_token_indices or ()
        counts = [len(rows) for rows in indices.values()] if isinstance(indices, dict) else [len(indices)]
        fits = indices and len(entry.shape) == 2 and entry.shape[0] in counts and entry.dtype in FLOATING
        return "trainable_token_indices" if fits else None

    if leaf == "bias" and len(entry.shape) == 1 and config.bias != "none":
        layer = module.removesuffix(".base_layer")
        if layer in d_out:
            return "bias" if entry.shape[0] == d_out[layer] else None
        if config.bias == "all":
            return "bias"

    if _is_saved(name, config.modules_to_save or ()):
        return "modules_to_save"
    announced = module_of(name) in (config.saved_embeddings or ())
    return "saved_embeddings" if announced and len(entry.shape) == 2 and entry.dtype in FLOATING else None


def _is_saved(name: str, modules_to_save: Collection[str]) -> bool:
    """Whether a tensor lies in one of the modules, which PEFT takes by how their path ends."""
    return any(f"{saved}." in name for saved in modules_to_save)


def check_lora_tensors(
    path: Path,
    entries: Mapping[str, TensorEntry],
    ranks: Collection[int],
    modules_to_save: Collection[str] = (),
    parameters: Collection[str] = (),
) -> None:
    """
    Check names, shapes and types of a plain LoRA adapter's tensors.

    Args:
        path (`Path`): The file, for messages.
        entries (`Mapping[str, TensorEntry]`): Its header.
        ranks (`Collection[int]`): Ranks that its configuration has.
        modules_to_save (`Collection[str]`, *optional*): Modules that it holds besides.
        parameters (`Collection[str]`, *optional*): Full names of weights of experts that it adapts.

    Raises:
        AdapterCheckError: If there are others than `lora_A` and `lora_B`, in pairs of one of these ranks, or for
            experts of a multiple of one.
    """
    layers, others = split_by_layer(path, entries, _LORA)
    problem = None if layers else "it has no `lora_A` and `lora_B`"
    for name in others:
        if not _is_saved(name.removeprefix(PREFIX), modules_to_save):
            problem = problem or f"it has the tensor {shorten(name, 200)}"

    modules = {name.rpartition(".")[0] for name in parameters}
    for layer, tensors in layers.items():
        shapes = [tensors[role].shape if role in tensors else () for role in ("lora_A", "lora_B")]
        d_in, d_out = (shape[-1] if shape else 0 for shape in (shapes[0], shapes[1][:1]))
        accepted = set(ranks)
        if layer.replace(".base_layer", "") in modules and len(shapes[0]) == 2:
            # PEFT has the factors of all experts side by side.
            accepted |= {shapes[0][0] for r in ranks if shapes[0][0] and shapes[0][0] % r == 0}
        if not any(shapes == [(r, d_in), (d_out, r)] for r in accepted):
            problem = problem or (
                f"{layer} has {dict(zip(('lora_A', 'lora_B'), map(list, shapes), strict=True))}, expected `lora_A` "
                f"[r, d_in] and `lora_B` [d_out, r] with r of {' or '.join(map(str, sorted(ranks)[:8]))}"
            )
        if any(entry.dtype not in FLOATING for entry in tensors.values()):
            problem = problem or f"{layer} has types other than {', '.join(FLOATING)}"
    if problem:
        raise AdapterCheckError(
            f"{path} is not a plain LoRA adapter that fits its configuration: {problem}. Export it again."
        )
