"""The tensors of an adapter's file: their digest, whether they are finite, and what the configuration implies."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import SafetensorError, safe_open

from ..tuner.adapter import MultiHeadAdapter
from ..tuner.config import RLoraConfig
from .reading import ITEM_SIZES, AdapterCheckError, TensorEntry, shorten


PREFIX = "base_model.model."
Shape = tuple[int, ...]

_RLORA = re.compile(r"base_model\.model\.(.+)\.rlora_adapters\.([^.]+)")
_LORA = re.compile(r"base_model\.model\.(.+)\.(lora_[AB])\.weight")
# Names longer than any layer's would make the regular expressions of a configuration slow.
_MAX_LAYER_NAME = 256
_MATCHING_SECONDS = 5.0
# PEFT saves the whole embedding, unasked, where the vocabulary was resized.
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


class _Digest:
    """SHA-256 over tensors, fed in the order of their names."""

    def __init__(self) -> None:
        self._state = hashlib.sha256()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        # The header says how many bytes follow, so that nothing can be moved from one tensor to the next.
        header = json.dumps([name, _DTYPE_NAMES[tensor.dtype], list(tensor.shape)])
        self._state.update(header.encode() + b"\n")
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        for chunk in flat.split(_CHUNK):
            data = chunk.view(torch.uint8)
            if sys.byteorder == "big":
                data = data.view(-1, tensor.element_size()).flip(-1).contiguous()
            self._state.update(data.numpy())

    def result(self) -> str:
        return f"sha256:{self._state.hexdigest()}"


@contextmanager
def _reading(path: Path) -> Iterator[Callable[[str], torch.Tensor]]:
    """A function that reads one tensor of a file by its name."""
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            yield file.get_tensor
    except (SafetensorError, OSError) as error:
        raise AdapterCheckError(f"{path} can't be read ({error}). Save or download it again.") from error


def file_digest(path: Path, entries: Collection[str], *, finite: bool = False) -> str:
    """
    Digest of the tensors of a safetensors file, which are read one by one.

    Args:
        path (`Path`): The file, whose header was checked.
        entries (`Collection[str]`): Names of its tensors.
        finite (`bool`, *optional*, defaults to `False`): Check the values in the same pass.

    Raises:
        AdapterCheckError: If a value is NaN or infinite and `finite` is set, or the file can't be read.
    """
    digest = _Digest()
    with _reading(path) as read:
        for name in sorted(entries):
            tensor = read(name)
            if finite:
                _check_finite(path, name, tensor)
            digest.add(name, tensor)
    return digest.result()


def state_dict_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Digest of tensors in memory, by the names that they have in a file."""
    digest = _Digest()
    for name in sorted(tensors):
        digest.add(name, tensors[name])
    return digest.result()


def _check_finite(path: Path, name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        return
    for chunk in tensor.reshape(-1).split(_CHUNK):
        # Types of 8 bits have no test of their own.
        values = chunk if chunk.element_size() > 1 else chunk.float()
        if not torch.isfinite(values).all():
            raise AdapterCheckError(
                f"{path} holds NaN or infinity in {name}. The file is damaged or training diverged; use an earlier "
                "checkpoint or revision."
            )


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
    ranks = layer_ranks(layers, config, path)
    for layer, tensors in layers.items():
        _check_layer(path, layer, tensors, config, ranks[layer])
    _check_others(path, others, layers, config)
    return tuple(sorted(layers, key=_by_number))


def _by_number(layer: str) -> list[tuple[bool, int, str]]:
    """Sorts layer 2 before layer 10."""
    parts = layer.split(".")
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def _by_layer(
    path: Path, entries: Mapping[str, TensorEntry], form: re.Pattern[str]
) -> tuple[dict[str, dict[str, TensorEntry]], dict[str, TensorEntry]]:
    """Tensors of adapters by layer and role, and all others."""
    layers: dict[str, dict[str, TensorEntry]] = defaultdict(dict)
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
            raise AdapterCheckError(f"{path} names a layer {shorten(match[1])}, of {len(match[1])} characters.")
        else:
            layers[match[1]][match[2]] = entry
    return dict(layers), others


def layer_ranks(layers: Iterable[str], config: RLoraConfig, path: Path) -> dict[str, int]:
    """
    Rank that the configuration has for each layer, once it is clear that it targets the layer.

    Raises:
        AdapterCheckError: If it does not, or its regular expressions take too long.
    """
    deadline = time.monotonic() + _MATCHING_SECONDS
    targeted = config.target_modules not in (None, "all-linear")
    ranks = {}
    for layer in layers:
        if targeted and not check_target_module_exists(config, layer):
            raise AdapterCheckError(
                f"{path} has an adapter for the layer {shorten(layer)}, which `target_modules` of its configuration "
                f"({shorten(config.target_modules)}) does not select. The two files belong to different adapters; "
                "take both from one source."
            )
        ranks[layer] = config.rank_of(layer)
        if time.monotonic() > deadline:
            raise AdapterCheckError(
                f"The regular expressions in the configuration beside {path} take more than {_MATCHING_SECONDS:g} s "
                "to match. List names instead."
            )
    return ranks


def expected_tensors(config: RLoraConfig, r: int, d_in: int, d_out: int) -> dict[str, Shape]:
    """Shapes of the tensors that an adapter has in a layer, by role."""
    heads = config.num_heads
    shapes: dict[str, Shape] = {"A": (r, d_in) if config.share_a else (heads, r, d_in), "B": (heads, d_out, r)}
    if config.router == "task":
        shapes["router"] = (len(config.tasks or ()), heads)
    elif config.router != "uniform":
        shapes["router"] = (heads, d_in)
    if config.init_weights == "rlora":
        shapes |= {"A0": shapes["A"], "B0": (d_out, r) if config.share_a else shapes["B"]}
    return shapes


def _check_layer(path: Path, layer: str, tensors: dict[str, TensorEntry], config: RLoraConfig, r: int) -> None:
    A, B = tensors.get("A"), tensors.get("B")
    d_in = A.shape[-1] if A is not None and A.shape else 0
    d_out = B.shape[1] if B is not None and len(B.shape) == 3 else 0
    # The tuner gives a layer no more than the rank that it allows. A size of 0 is unknown.
    r = min([r, *(size for size in (d_in, d_out) if size)])
    expected = expected_tensors(config, r, d_in, d_out)
    start = f"{path} does not fit its configuration: "
    remedy = "The file is incomplete or altered, or the configuration is another adapter's; get both again."
    for role in [name for name in MultiHeadAdapter.tensor_names if name in expected and name not in tensors]:
        raise AdapterCheckError(
            f"{start}{PREFIX}{layer}.rlora_adapters.{role} is missing, expected with shape "
            f"{_spell(role, expected[role], config)}. {remedy}"
        )
    for role, entry in tensors.items():
        name = f"{PREFIX}{layer}.rlora_adapters.{role}"
        if role not in expected:
            raise AdapterCheckError(f"{start}{name} is not one of {', '.join(expected)}. {remedy}")
        if entry.shape != expected[role]:
            raise AdapterCheckError(
                f"{start}{name} has shape {list(entry.shape)}, expected {_spell(role, expected[role], config)}. "
                f"{remedy}"
            )
        if entry.dtype not in _FLOATING:
            raise AdapterCheckError(f"{start}{name} has type {entry.dtype}, expected {', '.join(_FLOATING)}. {remedy}")


def _spell(role: str, shape: Shape, config: RLoraConfig) -> str:
    """A shape, with its meaning, where a size is not known as the tensor that shows it is missing or misshapen."""
    letters = {"A": "[r, d_in]" if config.share_a else "[N, r, d_in]", "B": "[N, d_out, r]", "router": "[N, d_in]"}
    letters |= {"A0": letters["A"], "B0": "[d_out, r]" if config.share_a else "[N, d_out, r]"}
    meaning = "[K, N]" if role == "router" and config.router == "task" else letters[role]
    values = ", ".join("?" if size == 0 else str(size) for size in shape)
    return f"[{values}], which is {meaning}"


def _check_others(
    path: Path, others: Mapping[str, TensorEntry], layers: Mapping[str, dict[str, TensorEntry]], config: RLoraConfig
) -> None:
    """Tensors besides the adapters': only those that a field of the configuration explains."""
    explained: dict[str, int] = {"modules_to_save": 0, "trainable_token_indices": 0}
    for name, entry in others.items():
        field = _explain(path, name.removeprefix(PREFIX), entry, layers, config)
        if field is None:
            raise AdapterCheckError(
                f"{path} has the tensor {shorten(name, 200)} of shape {list(entry.shape)}, which nothing in its "
                "configuration explains (`modules_to_save`, `bias`, `trainable_token_indices`). The two files belong "
                "to different adapters, or one was altered; take both from one source."
            )
        if field in explained:
            explained[field] += 1
    for field, count in explained.items():
        if getattr(config, field) and not count:
            raise AdapterCheckError(
                f"{path} has no tensors for `{field}={shorten(getattr(config, field))}` of its configuration. It is "
                "incomplete, or the configuration is another adapter's; get both again."
            )


def _explain(
    path: Path, name: str, entry: TensorEntry, layers: Mapping[str, dict[str, TensorEntry]], config: RLoraConfig
) -> str | None:
    """Field of the configuration that a tensor belongs to."""
    module, _, leaf = name.rpartition(".")
    if leaf == "trainable_tokens_delta" and module.endswith(".token_adapter"):
        return "trainable_token_indices" if _fits_tokens(path, name, entry, config) else None
    if leaf == "bias" and len(entry.shape) == 1:
        layer = module.removesuffix(".base_layer")
        if layer in layers and config.bias != "none":
            return "bias" if entry.shape[0] == layers[layer]["B"].shape[1] else None
        if config.bias == "all":
            return "bias"
    parts = name.split(".")
    paths = [".".join(parts[:i]) for i in range(1, len(parts))]
    if any(prefix.endswith(saved) for saved in config.modules_to_save or () for prefix in paths):
        return "modules_to_save"
    # With `trainable_token_indices` the embedding is within its wrapper.
    is_embedding = module.removesuffix(".base_layer").removesuffix(".token_adapter").rpartition(".")[2] in _EMBEDDINGS
    return "embedding" if is_embedding and leaf == "weight" and len(entry.shape) == 2 else None


def _fits_tokens(path: Path, name: str, entry: TensorEntry, config: RLoraConfig) -> bool:
    indices = config.trainable_token_indices
    if not indices or entry.dtype not in _FLOATING:
        return False
    counts = {len(rows) for rows in indices.values()} if isinstance(indices, dict) else {len(indices)}
    if len(entry.shape) == 2 and entry.shape[0] in counts:
        return True
    raise AdapterCheckError(
        f"{path} has {name} of shape {list(entry.shape)}, and `trainable_token_indices` of its configuration names "
        f"{' or '.join(map(str, sorted(counts)))} tokens. The two files belong to different adapters; get both again."
    )


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
    start = f"{path} is not a plain LoRA adapter that fits its configuration: "
    for name in others:
        parts = name.removeprefix(PREFIX).split(".")
        if not any(".".join(parts[:i]).endswith(saved) for saved in modules_to_save for i in range(1, len(parts))):
            raise AdapterCheckError(f"{start}it has the tensor {shorten(name, 200)}. Export it again.")
    if not layers:
        raise AdapterCheckError(f"{start}it has no `lora_A` and `lora_B`. Export it again.")
    for layer, tensors in layers.items():
        A, B = tensors.get("lora_A"), tensors.get("lora_B")
        shapes = {role: list(entry.shape) for role, entry in tensors.items()}
        fits = A is not None and B is not None and len(A.shape) == len(B.shape) == 2 and A.shape[0] == B.shape[1]
        if A is None or B is None or not fits or A.shape[0] not in ranks:
            raise AdapterCheckError(
                f"{start}{layer} has {shapes}, expected `lora_A` [r, d_in] and `lora_B` [d_out, r] with r of "
                f"{' or '.join(map(str, sorted(ranks)[:8]))}. Export it again."
            )
        if A.dtype not in _FLOATING or B.dtype not in _FLOATING:
            raise AdapterCheckError(f"{start}{layer} has type {A.dtype} and {B.dtype}. Export it again.")


def count_parameters(entries: Mapping[str, TensorEntry]) -> int:
    """Number of values that training changes: all but those of the anchor."""
    anchors = tuple(f".rlora_adapters.{name}" for name in MultiHeadAdapter.anchor_names)
    return sum(
        (entry.end - entry.start) // ITEM_SIZES[entry.dtype]
        for name, entry in entries.items()
        if not name.endswith(anchors)
    )
