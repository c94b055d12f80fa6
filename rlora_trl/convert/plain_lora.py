"""
Plain LoRA of PEFT as R-LoRA with one head: the same A and B, bit for bit, and the same scaling.

With `num_heads=1` and `router="uniform"` the head weight is 1, and with `init_weights="zero_b"` there is no offset, so
that the delta is s B A x in both. What PEFT's LoRA has besides A and B, and changes the function, is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from peft import LoraConfig
from peft.utils.constants import EMBEDDING_LAYER_NAMES

from ..files.tensors import check_tensors
from ..reading import AdapterCheckError, TensorEntry, shorten
from ..tuner import RLoraConfig
from ..tuner.layer_names import PREFIX, module_of
from ..tuner.stored import split_by_layer
from .source import Converted, Source, dropout_of, new_config, required_number


# A name with a part of LoRA: the layer, and which part.
_LORA = re.compile(r"base_model\.model\.(.+?)\.(lora_\w+(?:\..+)?)")
_PAIR = ("lora_A.weight", "lora_B.weight")
_BIASES = {"none": "none", "all": "all", "lora_only": "rlora_only"}
# Fields that both configurations have, with the same meaning.
_SAME = (
    *("r", "lora_alpha", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"),
    *("layers_pattern", "rank_pattern", "alpha_pattern", "trainable_token_indices", "task_type", "auto_mapping"),
    *("base_model_name_or_path", "revision"),
)
# Fields that are converted, or that do not change what a saved adapter computes.
_OTHER = frozenset(
    ("peft_type", "peft_version", "inference_mode", "lora_dropout", "use_rslora", "bias", "fan_in_fan_out")
    + ("init_lora_weights", "runtime_config", "qalora_group_size", "merge_weights", "eva_config")
)
# Ways of initialization that leave the base as it is. The others subtract from it when PEFT loads the adapter.
_HARMLESS_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
_REASONS = {
    "use_dora": "DoRA divides by the norms of the columns of base weight and delta together, which R-LoRA does not",
    "lora_bias": "its B have biases, and heads of R-LoRA have none",
    "target_parameters": "it adapts fused experts, and the files say neither how many there are nor which side of a "
    "weight is its input",
    "layer_replication": "it repeats layers of the base model",
    "enable_lora": "it adapts parts of a fused q, k and v, and heads of R-LoRA adapt whole layers",
    "alora_invocation_tokens": "it is active only behind certain tokens (aLoRA)",
    **dict.fromkeys(("megatron_config", "megatron_core"), "it names code to import"),
}
_PARTS = {
    "lora_embedding_": "a LoRA of an embedding, and R-LoRA adapts linear layers. `trainable_token_indices` and "
    "`modules_to_save` train embeddings",
    "lora_magnitude_vector": "the magnitudes of DoRA, which R-LoRA does not have",
    "lora_B.bias": "the bias of a B (`lora_bias=True`), which heads of R-LoRA do not have",
}


def convert_lora(source: Source, given: Mapping[str, Any]) -> Converted:
    """
    Convert a plain LoRA adapter.

    Args:
        source ([`Source`]): The adapter.
        given (`Mapping[str, Any]`): Fields of the configuration that override those of the source.

    Returns:
        [`Converted`]: The configuration, and tensors that equal those of the source. Modules, biases and rows of
        embeddings that were trained in full are carried over.

    Raises:
        AdapterCheckError: If it has something that R-LoRA can't represent, or its files do not fit each other.
    """
    _refuse_other_methods(source)
    layers, others = split_by_layer(source.weights.path, source.weights.entries, _LORA)
    for layer, parts in layers.items():
        _check_layer(source, layer, parts)
    if not layers:
        raise AdapterCheckError(f"{source.weights.path} has no `lora_A` and `lora_B`. It is not a LoRA adapter.")
    config = _config(source, given, sorted(layers), others)

    # The same values under other names; B gets a dimension for its head.
    named = {
        f"{PREFIX}{layer}.{part}": f"{PREFIX}{layer}.rlora_adapters.{part[5]}" for layer in layers for part in _PAIR
    }
    heads = {name for name in named if name.endswith(_PAIR[1])}
    entries = {
        named.get(name, name): TensorEntry(entry.dtype, (1, *entry.shape) if name in heads else entry.shape)
        for name, entry in source.weights.entries.items()
    }
    check_tensors(source.weights.path, entries, config)
    tensors = {
        named.get(name, name): tensor[None] if name in heads else tensor
        for name, tensor in source.weights.load().items()
    }
    return Converted(config, tensors)


def _refuse_other_methods(source: Source) -> None:
    """Refuse fields that change the function of the adapter in ways that R-LoRA does not have."""
    defaults = vars(LoraConfig())
    for field, value in source.fields.items():
        if field in _SAME or field in _OTHER or not value or value == defaults.get(field):
            continue
        reason = _REASONS.get(field, "R-LoRA has nothing that corresponds to it")
        raise AdapterCheckError(
            f"{source.config_path} sets `{shorten(field)[1:-1]}={shorten(value)}`, and can't be converted: "
            f"{reason}. Convert an adapter without it."
        )

    init = source.fields.get("init_lora_weights")
    if init not in _HARMLESS_INITS:
        raise AdapterCheckError(
            f"{source.config_path} has `init_lora_weights` {shorten(init)}, with which PEFT changes the base model "
            "when it loads the adapter. Save it as plain LoRA first, with `save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)` of PEFT."
        )
    bias = source.fields.get("bias", "none")
    if not isinstance(bias, str) or bias not in _BIASES:
        raise AdapterCheckError(
            f"{source.config_path} has `bias` {shorten(bias)}, and one of {', '.join(map(repr, _BIASES))} is "
            "expected. Correct it."
        )


def _check_layer(source: Source, layer: str, parts: Mapping[str, TensorEntry]) -> None:
    """A layer must have A [r, d_in] and B [d_out, r], and nothing else."""
    path, shown = source.weights.path, shorten(layer, 200)
    for part in parts:
        if part in _PAIR:
            continue
        known = next((reason for begin, reason in _PARTS.items() if part.startswith(begin)), None)
        raise AdapterCheckError(
            f"{path} has {shorten(part)} for the layer {shown}: "
            f"{known or 'names in a file of PEFT are `lora_A.weight` and `lora_B.weight`'}. It can't be converted."
        )
    missing = [part for part in _PAIR if part not in parts]
    if missing:
        raise AdapterCheckError(
            f"{path} lacks {missing[0]} of the layer {shown}. The file is incomplete; get it again."
        )

    A, B = (parts[part].shape for part in _PAIR)
    if len(A) == len(B) and len(A) > 2:
        raise AdapterCheckError(
            f"{path} has `lora_A` of shape {list(A)} for the layer {shown}: a LoRA of a convolution, and R-LoRA "
            "adapts linear layers. It can't be converted."
        )
    if len(A) != 2 or len(B) != 2 or A[0] != B[1]:
        raise AdapterCheckError(
            f"{path} has `lora_A` {list(A)} and `lora_B` {list(B)} for the layer {shown}, and [r, d_in] and "
            "[d_out, r] are expected. The file is damaged; get it again."
        )
    if A[0] > min(A[1], B[0]):
        raise AdapterCheckError(
            f"{path} has rank {A[0]} in the layer {shown} of {A[1]} inputs and {B[0]} outputs. R-LoRA has at most the "
            "smaller of these. It can't be converted."
        )


def _config(source: Source, given: Mapping[str, Any], layers: list[str], others: Iterable[str]) -> RLoraConfig:
    fields = source.fields
    for field in ("r", "lora_alpha"):
        required_number(source, field)
    same = {field: fields[field] for field in _SAME if fields.get(field) is not None}
    # PEFT fills in the targets; a configuration by hand may lack them.
    same.setdefault("target_modules", layers)
    if given["base_model_name_or_path"] not in (None, same.get("base_model_name_or_path")):
        same.pop("revision", None)  # that of another base model
    return new_config(
        source,
        given,
        **same,
        num_heads=1,
        use_rslora=bool(fields.get("use_rslora")),
        head_dropout=dropout_of(source),
        dropout_position="input",
        init_weights="zero_b",
        router="uniform",
        bias=_BIASES[fields.get("bias", "none")],
        fan_in_fan_out=bool(fields.get("fan_in_fan_out")),
        # PEFT saves these where the vocabulary was resized. A file may replace no other weights of the base.
        saved_embeddings=sorted({module for module in map(module_of, others) if _is_embedding(module)}) or None,
    )


def _is_embedding(module: str | None) -> bool:
    return module is not None and module.rpartition(".")[2] in EMBEDDING_LAYER_NAMES
