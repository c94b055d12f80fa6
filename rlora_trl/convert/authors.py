"""
Adapters of the authors' code: R-LoRA (github.com/jinda-liu/R-LoRA) and HydraLoRA (github.com/Clin0212/HydraLoRA).

Both save the same names: `lora_A` [r, d_in], `lora_B0` to `lora_B<N-1>` [d_out, r] and `lora_route` [N, d_in] for each
layer, and compute, with w the softmax of `lora_route` x,

    y = W x + s sum_i w_i B_i A x

In HydraLoRA the heads start at zero, s is `lora_alpha / r`, and W is the base weight: the files say everything.
R-LoRA starts from random heads. Its `reinit.py` subtracts the initial delta s mean_i(B_i) A from W, so that training
starts at the base model, and saves neither the changed W nor the initial values. With `--rank_stablization True` s is
`lora_alpha / sqrt(r)`, which is not saved either. Its own `PeftModel.from_pretrained` restores neither of the two.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..files.tensors import check_tensors
from ..kernels import mean_of_heads
from ..reading import AdapterCheckError, TensorEntry, first_few, shorten
from ..tuner.layer_names import PREFIX, endings, is_plain
from ..tuner.stored import FLOATING, split_by_layer
from .report import SourceFormat
from .source import Converted, Source, Weights, dropout_of, new_config, required_number


_NAME = re.compile(r"base_model\.model\.(.+)\.(lora_A|lora_route|lora_B\d{1,4})\.weight")
# Their configuration, with fields of earlier versions of HydraLoRA; none of these changes what an adapter computes.
_FIELDS = frozenset(
    ("peft_type", "task_type", "base_model_name_or_path", "inference_mode", "r", "lora_alpha", "lora_nums")
    + ("lora_dropout", "target_modules", "merge_weights", "blc_alpha", "blc_weight")
)
_MAX_HEADS = 4096
# By which initial heads must be more like the trained ones than chance makes them.
_STANDARD_DEVIATIONS = 5


def is_multi_head(source: Source) -> bool:
    """Whether the names in a file are those of the authors' code rather than of plain LoRA."""
    return any(".lora_route." in name or re.search(r"\.lora_B\d", name) for name in source.weights.entries)


def convert_authors(
    source: Source,
    source_format: SourceFormat,
    given: Mapping[str, Any],
    *,
    use_rslora: bool,
    initial: Weights | None,
) -> Converted:
    """
    Convert an adapter of the authors' code.

    Args:
        source ([`Source`]): The adapter.
        source_format (`str`): `"hydralora"` or `"r-lora"`.
        given (`Mapping[str, Any]`): Fields of the configuration that override those of the source.
        use_rslora (`bool`): Whether it was trained with the scaling `lora_alpha / sqrt(r)`.
        initial ([`Weights`], *optional*): The same adapter before its first step, for the offset.

    Returns:
        [`Converted`]: The configuration and tensors. The values of A, B and the router are those of the source.

    Raises:
        AdapterCheckError: If the files are incomplete, do not fit each other, or have something that R-LoRA can't
            represent.
    """
    _refuse_other_fields(source)
    r, num_heads = required_number(source, "r"), _num_heads(source)
    layers = _layers(source.weights, r, num_heads)
    config = new_config(
        source,
        given,
        r=r,
        num_heads=num_heads,
        lora_alpha=required_number(source, "lora_alpha"),
        use_rslora=use_rslora,
        target_modules=_targets(source, layers),
        head_dropout=dropout_of(source),
        # On A x, with a mask for each head, or on x.
        dropout_position="head" if source_format == "r-lora" else "input",
        init_weights="zero_b" if initial is None else "rlora",
        # The weight of one head is 1, whatever its router has learned.
        router="softmax" if num_heads > 1 else "uniform",
        router_init="kaiming_uniform",
        task_type=source.fields.get("task_type"),
        base_model_name_or_path=source.fields.get("base_model_name_or_path"),
    )

    if initial is not None:
        _check_initial(initial, source, _layers(initial, r, num_heads), layers)
    tensors = _renamed(source.weights.load(), layers, num_heads)
    if initial is not None:
        tensors |= _anchors(_renamed(initial.load(), layers, num_heads), tensors, layers, initial)
    entries = {name: TensorEntry("F32", tuple(tensor.shape)) for name, tensor in tensors.items()}
    check_tensors(source.weights.path, entries, config)
    return Converted(config, tensors)


def _refuse_other_fields(source: Source) -> None:
    for field, value in source.fields.items():
        if field in _FIELDS or not value or (field == "bias" and value == "none"):
            continue
        reasons = {
            "bias": "it trained biases, which are not converted",
            "modules_to_save": "it trained whole modules, which are not converted",
            "enable_lora": "it adapts parts of a fused q, k and v, which the authors' code can't load either",
            "fan_in_fan_out": "the authors' code adapts `nn.Linear` only, whose weights are [d_out, d_in]",
        }
        reason = reasons.get(field, "the authors' code has no such field")
        raise AdapterCheckError(
            f"{source.config_path} sets `{shorten(field)[1:-1]}={shorten(value)}`, and can't be converted: {reason}."
        )


def _num_heads(source: Source) -> int:
    value = required_number(source, "lora_nums")
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_HEADS:
        raise AdapterCheckError(
            f"{source.config_path} has `lora_nums` {shorten(value)}, and a number of heads from 1 to {_MAX_HEADS} is "
            "expected. Correct it."
        )
    return value


def _parts(num_heads: int) -> list[str]:
    return ["lora_A", "lora_route", *(f"lora_B{head}" for head in range(num_heads))]


def _layers(weights: Weights, r: int, num_heads: int) -> list[str]:
    """The layers in a file, whose tensors must be complete and of the shapes that the configuration has."""
    layers, others = split_by_layer(weights.path, weights.entries, _NAME)
    if others or not layers:
        what = f"the tensor {shorten(next(iter(others)), 200)}" if others else "no tensors"
        raise AdapterCheckError(
            f"{weights.path} has {what}, and names in a file of the authors' code are "
            f"{PREFIX}<layer>.<lora_A, lora_route, lora_B0, ...>.weight. It can't be converted."
        )
    for layer, parts in layers.items():
        _check_layer(weights, layer, parts, r, num_heads)
    return list(layers)


def _check_layer(weights: Weights, layer: str, parts: Mapping[str, TensorEntry], r: int, num_heads: int) -> None:
    path, shown = weights.path, shorten(layer, 200)
    expected = _parts(num_heads)
    missing, unknown = [part for part in expected if part not in parts], parts.keys() - set(expected)
    if missing or unknown:
        problem = f"lacks {first_few(missing)}" if missing else f"has {first_few(unknown)} besides"
        raise AdapterCheckError(
            f"{path} {problem} in the layer {shown}, and with `lora_nums={num_heads}` it has {expected[2]} to "
            f"{expected[-1]}, `lora_A` and `lora_route`. Take both files from one source."
        )
    if any(parts[part].shape == (0,) for part in expected):
        raise AdapterCheckError(
            f"{path} has empty tensors in the layer {shown}, as a process of DeepSpeed ZeRO-3 saves them. Consolidate "
            "the checkpoint with its `zero_to_fp32.py` first."
        )

    A, B = parts["lora_A"].shape, parts["lora_B0"].shape
    d_in, d_out = A[-1] if len(A) == 2 else 0, B[0] if len(B) == 2 else 0
    shapes = {"lora_A": (r, d_in), "lora_route": (num_heads, d_in)}
    for part in expected:
        needed, entry = shapes.get(part, (d_out, r)), parts[part]
        if entry.shape != needed or 0 in needed:
            raise AdapterCheckError(
                f"{path} has {part} of shape {list(entry.shape)} in the layer {shown}, and with `r={r}`, "
                f"`lora_nums={num_heads}`, {d_in} inputs and {d_out} outputs it must be {list(needed)}. Take both "
                "files from one source."
            )
        if entry.dtype not in FLOATING:
            raise AdapterCheckError(
                f"{path} has {part} of type {entry.dtype} in the layer {shown}, and one of {', '.join(FLOATING)} is "
                "expected."
            )
    if r > min(d_in, d_out):
        raise AdapterCheckError(
            f"{path} has rank {r} in the layer {shown} of {d_in} inputs and {d_out} outputs. R-LoRA has at most the "
            "smaller of these. It can't be converted."
        )


def _targets(source: Source, layers: Iterable[str]) -> list[str]:
    """
    Names that select the layers in the file and no others.

    The authors' code adapts every linear layer whose name ends with a target, also within a word: "proj" is all
    projections. PEFT and this package compare whole words.
    """
    layers, targets = list(layers), source.fields.get("target_modules")
    if isinstance(targets, list) and all(map(is_plain, targets)):
        if all(not set(endings(layer)).isdisjoint(targets) for layer in layers):
            return targets
        if not any("." in target for target in targets):
            # Whatever ends with one of these words was adapted.
            return sorted({layer.rpartition(".")[2] for layer in layers})
    return layers


def _renamed(tensors: Mapping[str, torch.Tensor], layers: Iterable[str], num_heads: int) -> dict[str, torch.Tensor]:
    """A [r, d_in], B [N, d_out, r] and router [N, d_in] of each layer, by their names in a file of R-LoRA."""
    renamed: dict[str, torch.Tensor] = {}
    for layer in layers:
        A, router, *heads = (tensors[f"{PREFIX}{layer}.{part}.weight"] for part in _parts(num_heads))
        prefix = f"{PREFIX}{layer}.rlora_adapters."
        renamed |= {f"{prefix}A": A, f"{prefix}B": torch.stack(heads)}
        if num_heads > 1:
            renamed[f"{prefix}router"] = router
    return renamed


def _check_initial(initial: Weights, source: Source, found: list[str], layers: list[str]) -> None:
    shapes = {name: entry.shape for name, entry in source.weights.entries.items()}
    if {name: entry.shape for name, entry in initial.entries.items()} != shapes:
        differ = first_few(set(found) ^ set(layers)) or "their sizes"
        raise AdapterCheckError(
            f"{initial.path}, the initial values, is not of the same adapter as {source.weights.path}: {differ} "
            "differ. Pass the adapter as the authors' code saves it before the first step, with the "
            "same settings and seed."
        )


def _anchors(
    initial: Mapping[str, torch.Tensor],
    trained: Mapping[str, torch.Tensor],
    layers: Iterable[str],
    weights: Weights,
) -> dict[str, torch.Tensor]:
    """A0 and the mean over heads of the initial B, of each layer."""
    if all(torch.equal(initial[name], tensor) for name, tensor in trained.items()):
        raise AdapterCheckError(
            f"{weights.path}, the initial values, equals the adapter itself. Pass the adapter as the authors' code "
            "saves it before the first step."
        )
    _check_related(initial, trained, weights)
    anchors = {}
    for layer in layers:
        prefix = f"{PREFIX}{layer}.rlora_adapters."
        anchors[f"{prefix}A0"] = initial[f"{prefix}A"]
        anchors[f"{prefix}B0"] = mean_of_heads(initial[f"{prefix}B"])
    return anchors


def _check_related(initial: Mapping[str, torch.Tensor], trained: Mapping[str, torch.Tensor], weights: Weights) -> None:
    """
    Refuse initial heads of which nothing is left in the adapter, as those of another seed.

    The cosine of independent heads is about 1 / sqrt(number of values), more if some heads are larger than others; in
    an adapter of a common size even a long training leaves many times that.
    """
    dot = before = after = 0.0
    names = [name for name in trained if name.endswith(".B")]
    for name in names:
        old, new = initial[name].double().flatten(), trained[name].double().flatten()
        dot, before, after = dot + float(old @ new), before + float(old @ old), after + float(new @ new)
    of_one_head = sum(trained[name][0].numel() for name in names)
    noise = _STANDARD_DEVIATIONS / math.sqrt(of_one_head)
    # Where all heads started at zero, nothing was subtracted; in very small adapters chance decides.
    if before * after == 0 or noise > 0.5:
        return
    cosine = dot / math.sqrt(before * after)
    if cosine < noise:
        raise AdapterCheckError(
            f"{weights.path}, the initial values, has left no trace in the adapter: the cosine of their heads is "
            f"{cosine:.4f}, and that of unrelated ones is below {noise:.4f}. They are of another seed or run. Save "
            "them with the same settings, seed, model and versions."
        )
