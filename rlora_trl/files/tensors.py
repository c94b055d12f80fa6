"""The tensors of an adapter's file: their digest, finite values, and names and shapes that fit the configuration."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import SafetensorError, safe_open

from ..reading import AdapterCheckError, TensorEntry, first_few, shorten
from ..tuner.adapter import MultiHeadAdapter
from ..tuner.comparison import Shape, compare_tensors
from ..tuner.config import RLoraConfig


PREFIX = "base_model.model."

_RLORA = re.compile(r"base_model\.model\.(.+)\.rlora_adapters\.([^.]+)")
_LORA = re.compile(r"base_model\.model\.(.+)\.(lora_[AB])\.weight")
# No layer has a longer name; it would make the regular expressions of a configuration slow.
_MAX_LAYER_NAME = 256
_MATCHING_SECONDS = 5.0
# PEFT saves the whole embedding by default if the vocabulary was resized.
_EMBEDDINGS = frozenset("embed_tokens lm_head wte word_embeddings embed_in embed_out shared tok_embeddings".split())
_FLOATING = ("BF16", "F16", "F32", "F64")
_DTYPE_NAMES = {
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
            if finite and not _is_finite(tensor):
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
        header = json.dumps([name, _DTYPE_NAMES[tensor.dtype], list(tensor.shape)])
        state.update(header.encode() + b"\n")

        for chunk in tensor.detach().cpu().contiguous().reshape(-1).split(_CHUNK):
            data = chunk.view(torch.uint8)
            if sys.byteorder == "big":
                data = data.view(-1, tensor.element_size()).flip(-1).contiguous()
            state.update(data.numpy())
    return f"sha256:{state.hexdigest()}"


def _is_finite(tensor: torch.Tensor) -> bool:
    # Types of 8 bits have no test of their own.
    chunks = tensor.reshape(-1).split(_CHUNK) if tensor.is_floating_point() else ()
    return all(bool(torch.isfinite(chunk if chunk.element_size() > 1 else chunk.float()).all()) for chunk in chunks)


def count_parameters(entries: Mapping[str, TensorEntry]) -> int:
    """Number of values that training changes: all but those of the anchor."""
    anchors = tuple(f".rlora_adapters.{name}" for name in MultiHeadAdapter.anchor_names)
    return sum(math.prod(entry.shape) for name, entry in entries.items() if not name.endswith(anchors))


def check_tensors(path: Path, entries: Mapping[str, TensorEntry], config: RLoraConfig) -> tuple[str, ...]:
    """
    Check names, shapes and types of an R-LoRA adapter's tensors against its configuration.

    Args:
        path (`Path`): The file, for messages.
        entries (`Mapping[str, TensorEntry]`): Its header.
        config ([`RLoraConfig`]): The configuration.

    Returns:
        `tuple[str, ...]`: The adapted layers, by their paths in the base model.

    Raises:
        AdapterCheckError: If a tensor is missing, unknown or of another shape or type.
    """
    layers, others = _by_layer(path, entries, _RLORA)
    if not layers:
        raise AdapterCheckError(
            f"{path} has no tensors of R-LoRA, which are named {PREFIX}<layer>.rlora_adapters.<A, B, ...>. It belongs "
            "to another method, or is not an adapter; take adapter_config.json and this file from one source."
        )
    _check_targets(path, layers, config)

    # The adapters themselves.
    adapters = {name: entry for name, entry in entries.items() if name not in others}
    expected = {
        name: shape for layer in layers for name, shape in _expected_tensors(layer, layers[layer], config).items()
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
        if entry.dtype not in _FLOATING:
            problem = problem or f"{name} has type {entry.dtype}, expected {', '.join(_FLOATING)}"
    if problem:
        raise AdapterCheckError(
            f"{path} does not fit its configuration: {problem}. The file is incomplete or altered, or the "
            "configuration is another adapter's; get both again."
        )

    _check_others(path, others, {layer: tensors["B"].shape[1] for layer, tensors in layers.items()}, config)
    return tuple(sorted(layers, key=_by_number))


def _by_number(layer: str) -> list[tuple[bool, int, str]]:
    """Sorts layer 2 before layer 10."""
    parts = layer.split(".")
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def _by_layer(
    path: Path, entries: Mapping[str, TensorEntry], form: re.Pattern[str]
) -> tuple[dict[str, dict[str, TensorEntry]], dict[str, TensorEntry]]:
    """Tensors of adapters by layer and role, and all others by name."""
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
    return layers, others


def _check_targets(path: Path, layers: Iterable[str], config: RLoraConfig) -> None:
    """Check that the configuration targets each layer, and that its regular expressions don't take too long."""
    deadline = time.monotonic() + _MATCHING_SECONDS
    targeted = config.target_modules not in (None, "all-linear")
    for layer in layers:
        if targeted and not check_target_module_exists(config, layer):
            raise AdapterCheckError(
                f"{path} has an adapter for the layer {shorten(layer)}, which `target_modules` of its configuration "
                f"({shorten(config.target_modules)}) does not select. The two files belong to different adapters; "
                "take both from one source."
            )
        config.rank_of(layer)
        if time.monotonic() > deadline:
            raise AdapterCheckError(
                f"The regular expressions in the configuration of {path} take more than {_MATCHING_SECONDS:g} s "
                "to match. List names instead."
            )


def _expected_tensors(layer: str, tensors: Mapping[str, TensorEntry], config: RLoraConfig) -> dict[str, Shape]:
    """Shapes by name of the tensors that a layer must have; a size is 0 where the file does not show it."""
    A, B = tensors.get("A"), tensors.get("B")
    d_in = A.shape[-1] if A is not None and A.shape else 0
    d_out = B.shape[1] if B is not None and len(B.shape) == 3 else 0
    shapes = MultiHeadAdapter.expected_tensors(
        d_in,
        d_out,
        config.rank_of(layer, *(size for size in (d_in, d_out) if size)),
        config.num_heads,
        router=config.router,
        num_tasks=len(config.tasks or ()),
        share_a=config.share_a,
        init_weights=config.init_weights,
    )
    return {f"{PREFIX}{layer}.rlora_adapters.{role}": shape for role, shape in shapes.items()}


def _spell(shape: Shape) -> str:
    return f"[{', '.join(str(size or '?') for size in shape)}]"


def _check_others(
    path: Path, others: Mapping[str, TensorEntry], d_out: Mapping[str, int], config: RLoraConfig
) -> None:
    """Tensors besides the adapters' must follow from a field of the configuration."""
    explaining = set()
    for name, entry in others.items():
        field = _explaining_field(name.removeprefix(PREFIX), entry, d_out, config)
        if field is None:
            raise AdapterCheckError(
                f"{path} has the tensor {shorten(name, 200)} of shape {list(entry.shape)}, which nothing in its "
                "configuration explains (`modules_to_save`, `bias`, `trainable_token_indices`). The two files belong "
                "to different adapters, or one was altered; take both from one source."
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
        fits = indices and len(entry.shape) == 2 and entry.shape[0] in counts and entry.dtype in _FLOATING
        return "trainable_token_indices" if fits else None

    if leaf == "bias" and len(entry.shape) == 1 and config.bias != "none":
        layer = module.removesuffix(".base_layer")
        if layer in d_out:
            return "bias" if entry.shape[0] == d_out[layer] else None
        if config.bias == "all":
            return "bias"

    if _is_saved(name, config.modules_to_save or ()):
        return "modules_to_save"
    # With `trainable_token_indices` the embedding is within its wrapper.
    is_embedding = module.removesuffix(".base_layer").removesuffix(".token_adapter").rpartition(".")[2] in _EMBEDDINGS
    return "embedding" if is_embedding and leaf == "weight" and len(entry.shape) == 2 else None


def _is_saved(name: str, modules_to_save: Collection[str]) -> bool:
    """Whether a tensor lies in one of the modules, which PEFT takes by how their path ends."""
    parts = name.split(".")
    paths = [".".join(parts[:i]) for i in range(1, len(parts))]
    return any(path.endswith(saved) for saved in modules_to_save for path in paths)


def check_lora_tensors(
    path: Path, entries: Mapping[str, TensorEntry], ranks: Collection[int], modules_to_save: Collection[str] = ()
) -> None:
    """
    Check names, shapes and types of a plain LoRA adapter's tensors.

    Args:
        path (`Path`): The file, for messages.
        entries (`Mapping[str, TensorEntry]`): Its header.
        ranks (`Collection[int]`): Ranks that its configuration has.
        modules_to_save (`Collection[str]`, *optional*): Modules that it holds besides.

    Raises:
        AdapterCheckError: If there are others than `lora_A` and `lora_B`, in pairs of one of these ranks.
    """
    layers, others = _by_layer(path, entries, _LORA)
    problem = None if layers else "it has no `lora_A` and `lora_B`"
    for name in others:
        if not _is_saved(name.removeprefix(PREFIX), modules_to_save):
            problem = problem or f"it has the tensor {shorten(name, 200)}"

    for layer, tensors in layers.items():
        shapes = [tensors[role].shape if role in tensors else () for role in ("lora_A", "lora_B")]
        d_in, d_out = (shape[-1] if shape else 0 for shape in (shapes[0], shapes[1][:1]))
        if not any(shapes == [(r, d_in), (d_out, r)] for r in ranks):
            problem = problem or (
                f"{layer} has {dict(zip(('lora_A', 'lora_B'), map(list, shapes), strict=True))}, expected `lora_A` "
                f"[r, d_in] and `lora_B` [d_out, r] with r of {' or '.join(map(str, sorted(ranks)[:8]))}"
            )
        if any(entry.dtype not in _FLOATING for entry in tensors.values()):
            problem = problem or f"{layer} has types other than {', '.join(_FLOATING)}"
    if problem:
        raise AdapterCheckError(
            f"{path} is not a plain LoRA adapter that fits its configuration: {problem}. Export it again."
        )
