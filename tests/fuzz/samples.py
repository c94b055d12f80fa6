"""Valid inputs, which mutations start from: small, and written out, so that they stay when the package changes."""

from __future__ import annotations

import io
import json
import math
import struct
import zipfile
from collections.abc import Iterable, Mapping
from random import Random
from typing import Any


# An input: the contents of files by name.
Files = dict[str, bytes]

SIGNATURE = "model.sig"
CONFIG, WEIGHTS, RECORD, CARD = "adapter_config.json", "adapter_model.safetensors", "rlora_record.json", "README.md"
TOKENIZER, EXPORT, PICKLED = "tokenizer_config.json", "exports/first", "adapter_model.bin"
SIZE = 4  # of each layer's input and output
LAYERS = ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj")
PREFIX = "base_model.model."
TASKS = ["first", "colour", "same"]

_CONFIG = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "user/tiny",
    "bias": "none",
    "dropout_position": "head",
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "head_dropout": 0.2,
    "inference_mode": True,
    "init_gamma": 64.0,
    "init_weights": "rlora",
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_alpha": 32,
    "modules_to_save": None,
    "num_heads": 3,
    "peft_type": "RLORA",
    "peft_version": "0.21.2",
    "r": 2,
    "rank_pattern": {},
    "revision": None,
    "router": "softmax",
    "router_init": "zeros",
    "router_top_k": None,
    "share_a": True,
    "target_modules": ["up_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
    "tasks": TASKS,
    "trainable_token_indices": None,
    "use_rslora": True,
}
# Fields of further adapters.
_VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"router": "task"},
    {"router": "uniform", "share_a": False, "init_weights": "zero_b"},
    {"router": "top_k", "router_top_k": 2, "router_init": "kaiming_uniform"},
    {"rank_pattern": {"down_proj": 1}, "alpha_pattern": {"up_proj": 8}},
    {"target_modules": r".*\.(up|down)_proj"},
    {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
    {"bias": "rlora_only"},
    {"modules_to_save": ["head"]},
    {"exclude_modules": ["gate_proj"], "auto_mapping": {"base_model_class": "M", "parent_library": "transformers.x"}},
)

_LORA_CONFIG = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "user/tiny",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_alpha": 4,
    "lora_dropout": 0.0,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 4,
    "rank_pattern": {},
    "target_modules": ["up_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
    "use_rslora": False,
}
# As the authors' code of HydraLoRA and R-LoRA writes it.
_AUTHORS_CONFIG = {
    "base_model_name_or_path": "user/tiny",
    "bias": "none",
    "enable_lora": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "lora_nums": 3,
    "merge_weights": False,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 2,
    "target_modules": ["up_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
}

RECORD_TREE: dict[str, Any] = {
    "format": 1,
    "base_model": "user/tiny",
    "base_model_revision": "0123456789abcdef0123456789abcdef01234567",
    "base_model_license": "mit",
    "base_dtype": "float32",
    "quantization": "bitsandbytes nf4",
    "tasks": [
        {
            "name": task,
            "cluster": "words",
            "dataset": "user/words",
            "license": "mit",
            "rows": 40,
            "tokens": 400,
            "share": 0.33,
            "metrics": {"accuracy": 0.9, "base_accuracy": 0.5, "loss": 1.5},
            "metric_rows": 40,
        }
        for task in TASKS
    ],
    "hyperparameters": {"learning_rate": 2e-4, "optim": "adamw_torch", "bf16": True},
    "versions": {"rlora_trl": "0.1.0", "peft": "0.21.2"},
    "mixtures": {
        "layers": list(LAYERS),
        "weights": {task: [[0.5, 0.25, 0.25]] * len(LAYERS) for task in TASKS},
        "tokens": dict.fromkeys(TASKS, 100),
    },
    "balance_loss": "switch",
    "balance_coef": 0.01,
    "exports": [{"path": EXPORT, "task": "first", "rank": 8, "rows": 10, "kl": 0.1, "accuracy": 0.8}],
}

CARD_METADATA: dict[str, Any] = {
    "base_model": "user/tiny",
    "library_name": "peft",
    "license": "mit",
    "datasets": ["user/words"],
    "language": ["en"],
    "metrics": ["accuracy"],
    "pipeline_tag": "text-generation",
    "tags": ["rlora", "multi-task", *(f"task:{task}" for task in TASKS)],
    "base_model_relation": "adapter",
    "rlora": {
        "format": 1,
        "r": 2,
        "num_heads": 3,
        "router": "softmax",
        "scaling": 16.0,
        "digest": "sha256:" + "a" * 64,
        "parameters": 1000,
        "tasks": TASKS,
        "measured": ["accuracy"],
        "exports": {"first": EXPORT},
        "base_model_revision": "0123456789abcdef0123456789abcdef01234567",
    },
    "model-index": [
        {
            "name": "x",
            "results": [
                {
                    "task": {"type": "text-generation", "name": "Text"},
                    "dataset": {"name": task, "type": task},
                    "metrics": [{"type": "accuracy", "value": 0.9, "name": "Accuracy", "verified": False}],
                    "source": {"name": "x", "url": "https://example.com"},
                }
                for task in TASKS
            ],
        }
    ],
}
CARD_BODY = """
Written by hand, before.

<!-- rlora_trl: generated, rewritten by each push -->

# x

An adapter for [user/tiny](https://huggingface.co/user/tiny).

| task | accuracy |
| --- | ---: |
| first | 90.0% |

<!-- rlora_trl: end -->

Written by hand, after.
"""

# What the Hub lists for a repository.
MODEL_INFO: dict[str, Any] = {
    "id": "user/words",
    "author": "user",
    "sha": "0123456789abcdef0123456789abcdef01234567",
    "lastModified": "2026-01-02T03:04:05.000Z",
    "private": False,
    "downloads": 12,
    "tags": ["rlora", "task:first", "base_model:adapter:user/tiny"],
    "cardData": CARD_METADATA,
}

TOKENIZER_TREE: dict[str, Any] = {
    "added_tokens_decoder": {"0": {"content": "<pad>", "special": True}},
    "chat_template": "{{ messages }}",
    "model_max_length": 10**30,
    "pad_token": "<pad>",
    "tokenizer_class": "PreTrainedTokenizerFast",
}

LISTING: dict[str, int | None] = {
    ".gitattributes": 1500,
    CARD: 4000,
    CONFIG: 900,
    WEIGHTS: 100_000,
    RECORD: 3000,
    "tokenizer.json": 2_000_000,
    TOKENIZER: 1000,
    "figures/routing.png": 40_000,
    f"{EXPORT}/{CONFIG}": 800,
    f"{EXPORT}/{WEIGHTS}": 60_000,
    f"{EXPORT}/{CARD}": None,
    "LICENSE": 11_000,
}


def config(rng: Random | None = None) -> dict[str, Any]:
    """Fields of the configuration of an R-LoRA adapter: of one of several kinds, or the plainest."""
    return json.loads(json.dumps({**_CONFIG, **(rng.choice(_VARIANTS) if rng is not None else {})}))


def lora_config() -> dict[str, Any]:
    """Fields of the configuration of a plain LoRA adapter."""
    return json.loads(json.dumps(_LORA_CONFIG))


def authors_config() -> dict[str, Any]:
    """Fields of the configuration of an adapter of the authors' code."""
    return json.loads(json.dumps(_AUTHORS_CONFIG))


def authors_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes by name of the tensors of an adapter with `authors_config`."""
    r, heads = _AUTHORS_CONFIG["r"], _AUTHORS_CONFIG["lora_nums"]
    parts = {"lora_A": (r, SIZE), "lora_route": (heads, SIZE), **{f"lora_B{head}": (SIZE, r) for head in range(heads)}}
    return {f"{PREFIX}{layer}.{part}.weight": shape for layer in LAYERS for part, shape in parts.items()}


def pickle_of(shapes: Mapping[str, Iterable[int]]) -> bytes:
    """The pickle that `torch.save` writes for a dictionary of tensors in float32, each with a storage of its own."""

    def text(value: str) -> bytes:
        data = value.encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(data)) + data

    def numbers(values: Iterable[int]) -> bytes:
        return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"

    tensors = b""
    for key, (name, shape) in enumerate(shapes.items()):
        lengths = list(shape)
        strides = [1]
        for length in lengths[:0:-1]:
            strides.insert(0, strides[0] * length)
        numel = strides[0] * lengths[0]
        device = text("cpu") + numbers([numel])[1:-1]
        storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(str(key)) + device + b"tQ"
        arguments = storage + b"K\x00" + numbers(lengths) + numbers(strides) + b"\x89ccollections\nOrderedDict\n)R"
        tensors += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"
    return b"\x80\x02}q\x00(" + tensors + b"u."


def archive(data: bytes, records: Mapping[str, bytes]) -> bytes:
    """The archive that `torch.save` writes around a pickle, with these storages by key."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        # With a fixed date.
        file.writestr(zipfile.ZipInfo("a/data.pkl"), data)
        file.writestr(zipfile.ZipInfo("a/byteorder"), b"little")
        for key, record in records.items():
            file.writestr(zipfile.ZipInfo(f"a/data/{key}"), record)
        file.writestr(zipfile.ZipInfo("a/version"), b"3\n")
    return buffer.getvalue()


def storages(shapes: Mapping[str, Iterable[int]]) -> dict[str, bytes]:
    """The storages of `pickle_of`, of zeros."""
    return {str(key): bytes(4 * math.prod(shape)) for key, shape in enumerate(shapes.values())}


def header_of(shapes: Mapping[str, Iterable[int]]) -> dict[str, Any]:
    """The header of a safetensors file with these tensors, one after the other, in float32."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, size = end, 4
        for length in shape:
            size *= length
        end += size
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    return header


def body_size(header: Mapping[str, Any]) -> int:
    """The bytes that the tensors of a valid header take."""
    return max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)


def safetensors(header: str | Mapping[str, Any], body: bytes | None = None) -> bytes:
    """A safetensors file. The body is zeros by default, of the size that the header says."""
    if body is None:
        assert not isinstance(header, str)
        body = bytes(body_size(header))
    data = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data + body


def shapes_of(fields: Mapping[str, Any], layers: Iterable[str] = LAYERS) -> dict[str, tuple[int, ...]]:
    """Shapes by name of the tensors of an adapter with such a configuration."""
    shapes: dict[str, tuple[int, ...]] = {}
    heads, share_a = fields["num_heads"], fields["share_a"]
    for layer in layers:
        r = next((rank for end, rank in fields["rank_pattern"].items() if layer.endswith(end)), fields["r"])
        tensors = {"A": (r, SIZE) if share_a else (heads, r, SIZE), "B": (heads, SIZE, r)}
        if fields["router"] != "uniform":
            tensors["router"] = (len(fields["tasks"]), heads) if fields["router"] == "task" else (heads, SIZE)
        if fields["init_weights"] == "rlora":
            tensors |= {"A0": tensors["A"], "B0": (SIZE, r) if share_a else tensors["B"]}
        shapes |= {f"{PREFIX}{layer}.rlora_adapters.{name}": shape for name, shape in tensors.items()}
        if fields["bias"] == "rlora_only":
            shapes[f"{PREFIX}{layer}.base_layer.bias"] = (SIZE,)
    for name in fields["modules_to_save"] or ():
        shapes[f"{PREFIX}{name}.weight"] = (SIZE, SIZE)
    return shapes


def lora_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes by name of the tensors of a plain LoRA adapter with `lora_config`."""
    r = _LORA_CONFIG["r"]
    return {
        f"{PREFIX}{layer}.lora_{role}.weight": (r, SIZE) if role == "A" else (SIZE, r)
        for layer in LAYERS
        for role in "AB"
    }


def card(metadata: str, body: str = CARD_BODY) -> str:
    """A card with these lines as metadata."""
    return f"---\n{metadata}\n---\n{body}"
