"""
Malicious inputs that were written by hand, each for one reader, with what must become of it.

`python -m fuzz --readers fuzz.corpus --once` reads each once; `test_corpus.py` compares the results. "any" stands for
inputs that may be refused or accepted, but in time and with documented errors only.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Literal

from . import samples
from .cases import Reader
from .kinds import SLOW_PATTERNS
from .readers import READERS as ALL
from .readers import checkpoint_files
from .samples import (
    CARD,
    CARD_METADATA,
    CONFIG,
    EXPORT,
    LAYERS,
    PREFIX,
    RECORD,
    RECORD_TREE,
    TOKENIZER,
    WEIGHTS,
    Files,
)


Verdict = Literal["refused", "accepted", "any"]


@dataclass(frozen=True)
class Malicious:
    """
    An input for a reader.

    Args:
        name (`str`): What it is.
        reader (`str`): Name of the reader in `readers.py`.
        expected (`str`): "refused", "accepted" or "any".
        files (`Files`): The input.
    """

    name: str
    reader: str
    expected: Verdict
    files: Files


def _json(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def _config(**changes: Any) -> bytes:
    return _json({**samples.config(), **changes})


def _raw_config(source: str) -> bytes:
    """A configuration with further fields, written as they are."""
    return (json.dumps(samples.config())[:-1] + ", " + source + "}").encode("utf-8", "surrogatepass")


def _weights(changes: Mapping[str, Any] | None = None, layers: Any = LAYERS, **fields: Any) -> bytes:
    """The weights of an adapter with such fields, and with entries of the header replaced."""
    header = samples.header_of(samples.shapes_of({**samples.config(), **fields}, layers))
    body = bytes(samples.body_size(header))
    return samples.safetensors(json.dumps({**header, **(changes or {})}), body)


# Configurations

_CONFIGS: dict[str, tuple[Verdict, bytes]] = {
    "empty": ("refused", b""),
    "null": ("refused", b"null"),
    "a list": ("refused", b"[]"),
    "UTF-16": ("refused", json.dumps(samples.config()).encode("utf-16")),
    "Latin-1": ("refused", b'{"peft_type": "RLORA", "tasks": ["\xe9"]}'),
    "a byte order mark": ("refused", b"\xef\xbb\xbf" + _config()),
    "a null byte after the end": ("refused", _config() + b"\x00"),
    "two documents": ("refused", _config() * 2),
    "900,000 blanks": ("accepted", _config() + b" " * 900_000),
    "2 MiB of blanks": ("refused", _config() + b" " * 2**21),
    "500,000 commas": ("refused", b"[" + b"0," * 500_000 + b"0]"),
    "nested 100,000 deep": ("refused", b"[" * 100_000),
    "nested 400 deep": ("refused", _raw_config('"x": ' + "[" * 400 + "]" * 400)),
    "objects nested 100,000 deep": ("refused", b'{"a":' * 100_000),
    "a key twice": ("refused", _raw_config('"r": 1')),
    "a key twice by an escape": ("refused", _raw_config('"\\u0072": 1')),
    "NaN": ("refused", _raw_config('"x": NaN')),
    "an infinite number": ("refused", _raw_config('"x": 1e999')),
    "a number of 900,000 digits": ("refused", _raw_config('"x": ' + "9" * 900_000)),
    "a fraction of 900,000 digits": ("any", _raw_config('"x": 0.' + "9" * 900_000)),
    "half a character": ("refused", _raw_config('"x": "\\ud800"')),
    "half a character as key": ("refused", _raw_config('"\\udfff": 1')),
    "a billion heads": ("refused", _config(num_heads=10**9)),
    "a rank of 2**63": ("refused", _config(r=2**63)),
    "a rank as text": ("refused", _config(r="2")),
    "a rank with a fraction": ("refused", _config(r=2.5)),
    "a boolean rank": ("refused", _config(r=True)),
    "an alpha of 63 digits": ("refused", _config(lora_alpha=10**62)),
    "a list where a choice is expected": ("refused", _config(init_weights=[])),
    "an object where a choice is expected": ("refused", _config(router={"a": 1})),
    "a dropout of 10**300": ("refused", _config(head_dropout=1e300)),
    "a dropout as text": ("refused", _config(head_dropout="0.1")),
    "another method": ("refused", _config(peft_type="LORA")),
    "a method as list": ("refused", _config(peft_type=["RLORA"])),
    "code to import": ("refused", _config(auto_mapping={"base_model_class": "system", "parent_library": "os"})),
    "code to import, after a newline": (
        "refused",
        _config(auto_mapping={"base_model_class": "x", "parent_library": "transformers\n.x"}),
    ),
    "code to import, by a name that begins alike": (
        "refused",
        _config(auto_mapping={"base_model_class": "x", "parent_library": "transformers_evil"}),
    ),
    "code to import, in a folder": (
        "refused",
        _config(auto_mapping={"base_model_class": "x", "parent_library": "transformers..x"}),
    ),
    "code to import, in other letters": (
        "refused",
        _config(auto_mapping={"base_model_class": "x", "parent_library": "transformers.\u0445"}),
    ),
    "a base model that clears the terminal": ("refused", _config(base_model_name_or_path="\x1b[2Jx")),
    "a base model written backwards": ("refused", _config(base_model_name_or_path="\u202egpj.x")),
    "a base model of 600,000 characters": ("refused", _config(base_model_name_or_path="x" * 600_000)),
    "a revision with a newline": ("refused", _config(revision="main\nX: y")),
    "a task twice": ("refused", _config(tasks=["a", "a"])),
    "a task of blanks": ("refused", _config(tasks=["\u2003\u3000"])),
    "a task of 600,000 characters": ("refused", _config(tasks=["x" * 600_000])),
    "10,001 tasks": ("refused", _config(tasks=[f"t{i}" for i in range(10_001)])),
    "10,000 tasks": ("accepted", _config(tasks=[f"t{i}" for i in range(10_000)])),
    "20,000 times one task": ("refused", _config(tasks=["a"] * 20_000)),
    "tasks in an object": ("refused", _config(tasks={"a": 1})),
    "an empty target": ("refused", _config(target_modules=["up_proj", ""])),
    "targets in an object": ("refused", _config(target_modules={"a": 1})),
    "100,000 targets": ("refused", _config(target_modules=[f"m{i}" for i in range(60_000)])),
    "a negative row": ("refused", _config(trainable_token_indices=[-1])),
    "a row of 2**40": ("refused", _config(trainable_token_indices={"embed_tokens": [2**40]})),
    "rows in rows": ("refused", _config(trainable_token_indices=[[1]])),
    "names of Python's attributes": ("any", _config(__class__="x", __dict__={}, __init__=1, __post_init__=1)),
    "names of this package's attributes": ("any", _config(loaded=True, source=["/etc", None, None])),
    "settings of another program": ("any", _config(runtime_config={"ephemeral_gpu_offload": True})),
    "a field named self": ("any", _config(self=1, cls=2)),
    "a boolean as text": ("any", _config(use_rslora="no", share_a="no")),
    "alphas that are not numbers": ("refused", _config(alpha_pattern={"up_proj": "x"})),
    "a rank of no layer": ("refused", _config(rank_pattern={"up_proj": 0})),
    "ranks in a list": ("refused", _config(rank_pattern=[["up_proj", 2]])),
    "a top-k router of one head": ("refused", _config(router="top_k", router_top_k=1)),
    "a top-k router of -1 heads": ("refused", _config(router="top_k", router_top_k=-1)),
    "an index of 2**31": ("refused", _config(layers_to_transform=[2**31], layers_pattern="layers")),
    "10,000 indices": ("any", _config(layers_to_transform=list(range(10_000)))),
}

_LORA_CONFIGS: dict[str, tuple[Verdict, dict[str, Any]]] = {
    "code to import by Megatron": ("refused", {"megatron_core": "os", "megatron_config": {"a": 1}}),
    "code to import by Megatron, without settings": ("refused", {"megatron_core": "os"}),
    "code to import": ("refused", {"auto_mapping": {"base_model_class": "system", "parent_library": "os"}}),
    "a slow target": ("refused", {"target_modules": "(a+)+b"}),
    "a slow rank": ("refused", {"rank_pattern": {"(a|a)+b": 4}}),
    "a slow layer": ("refused", {"layers_to_transform": [0], "layers_pattern": "(a+)(?#)+b"}),
    # PEFT would copy one layer a million times.
    "a layer a million times": ("refused", {"layer_replication": [[0, 1]] * 1_000_000}),
    "a layer a thousand times": ("refused", {"layer_replication": [[0, 1]] * 1_000}),
    # PEFT would change the base weights, or decompose them, before it loads anything.
    "initial values from the base": ("refused", {"init_lora_weights": "pissa"}),
    "initial values by a quantization": ("refused", {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}),
    "a rank of a billion": ("refused", {"r": 10**9}),
    "an infinite dropout": ("any", {"lora_dropout": 1e300}),
}


def _configs() -> Iterator[Malicious]:
    for name, (expected, data) in _CONFIGS.items():
        yield Malicious(f"config: {name}", "config", expected, {CONFIG: data})
    for name, (expected, changes) in _LORA_CONFIGS.items():
        data = _json({**samples.lora_config(), **changes})
        yield Malicious(f"plain LoRA config: {name}", "lora_config", expected, {CONFIG: data})


def _patterns() -> Iterator[Malicious]:
    """Regular expressions, in each field, with layers on which they are slow."""
    layers = ["a" * 250, "model." + "a" * 100, *LAYERS]
    weights = _weights(layers=layers)
    for index, pattern in enumerate(SLOW_PATTERNS):
        fields: dict[str, Any] = (
            {"target_modules": pattern},
            {"rank_pattern": {pattern: 2}},
            {"alpha_pattern": {pattern: 2}},
            {"exclude_modules": pattern},
            {"exclude_modules": [pattern]},
            {"layers_to_transform": [0], "layers_pattern": pattern},
            {"modules_to_save": [pattern]},
        )[index % 7]
        files = {CONFIG: _config(**fields), WEIGHTS: weights}
        field = list(fields)[-1]
        yield Malicious(f"{field}: slow expression {index}", "tensors", "any", files)
        yield Malicious(f"{field}: slow expression {index}, loaded", "load", "any", files)

    several: dict[str, Any] = {
        "10,000 expressions for ranks": {"rank_pattern": {f".*.*aaa{i:05}": 2 for i in range(10_000)}},
        "10,000 expressions for alphas": {"alpha_pattern": {f".*.*aaa{i:05}": 2 for i in range(10_000)}},
        "10,000 names of modules to save": {"modules_to_save": [f".*.*a{i}" for i in range(10_000)]},
        "10,000 names of targets": {"target_modules": [f"(.*a){{9}}{i}" for i in range(10_000)]},
        "10,000 names of lists of layers": {
            "layers_to_transform": list(range(10_000)),
            "layers_pattern": [f".*.*a{i}" for i in range(10_000)],
        },
        "an expression that is not valid": {"rank_pattern": {"(": 2}},
        "a name that is a quantifier": {"alpha_pattern": {"*": 2}},
        "a list of layers that is not valid": {"layers_to_transform": [0], "layers_pattern": "["},
    }
    for name, fields in several.items():
        files = {CONFIG: _config(**fields), WEIGHTS: weights}
        yield Malicious(f"patterns: {name}", "tensors", "any", files)
        yield Malicious(f"patterns: {name}, loaded", "load", "any", files)


# Tensors

_NAME = f"{PREFIX}{LAYERS[0]}.rlora_adapters.A"


def _entry(shape: list[Any], start: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


_ENTRY = json.dumps(_entry([1], 0, 4))


def _header(tree: Any, body: int = 0) -> bytes:
    return samples.safetensors(tree if isinstance(tree, str) else json.dumps(tree), bytes(body))


def _floats(data: bytes, dtype: str, count: int = 1) -> bytes:
    return samples.safetensors(json.dumps({_NAME: _entry([count], 0, len(data), dtype)}), data)


_HEADERS: dict[str, tuple[Verdict, bytes]] = {
    "empty": ("refused", b""),
    "seven bytes": ("refused", b"\x00" * 7),
    "a header of 2**64 - 1 bytes": ("refused", b"\xff" * 8 + b"{}"),
    "a header of 2**63 bytes": ("refused", struct.pack("<Q", 2**63) + b"{}"),
    "a header of 0 bytes": ("refused", b"\x00" * 8),
    "a header that is longer than the file": ("refused", struct.pack("<Q", 100) + b"{}"),
    "a header of 17 MiB": ("refused", _header("{}" + " " * 17 * 2**20)),
    "a pickle": ("refused", b"\x80\x04cos\nsystem\n(S'id'\ntR."),
    "a zip file": ("refused", b"PK\x03\x04" + b"\x00" * 100),
    "a list": ("refused", _header("[]")),
    "a text": ("refused", _header('"x"')),
    "nested 100,000 deep": ("refused", _header('{"a":' * 100_000)),
    "metadata that is a list": ("refused", _header({"__metadata__": []})),
    "metadata with numbers": ("refused", _header({"__metadata__": {"a": 1}})),
    "metadata with a shape": ("refused", _header({"__metadata__": _entry([1], 0, 4)}, 4)),
    "bytes after the tensors": ("refused", _header({_NAME: _entry([1], 0, 4)}, 8)),
    "bytes before the tensors": ("refused", _header({_NAME: _entry([1], 4, 8)}, 8)),
    "a hole": ("refused", _header({_NAME: _entry([1], 0, 4), _NAME + "0": _entry([1], 8, 12)}, 12)),
    "an overlap": ("refused", _header({_NAME: _entry([2], 0, 8), _NAME + "0": _entry([2], 4, 12)}, 12)),
    "one place for two": ("refused", _header({_NAME: _entry([1], 0, 4), _NAME + "0": _entry([1], 0, 4)}, 4)),
    "offsets in reverse": ("refused", _header({_NAME: _entry([1], 4, 0)}, 4)),
    "negative offsets": ("refused", _header({_NAME: _entry([1], -4, 0)}, 4)),
    "offsets of 2**64": ("refused", _header({_NAME: _entry([1], 2**64, 2**64 + 4)}, 4)),
    "sizes whose product overflows": ("refused", _header({_NAME: _entry([2**32, 2**32], 0, 0)})),
    "sizes whose product overflows to the right size": (
        "refused",
        _header({_NAME: _entry([2**62 + 1, 4], 0, 16)}, 16),
    ),
    "a negative size": ("refused", _header({_NAME: _entry([-1], 0, 4)}, 4)),
    "a size with a fraction": ("refused", _header({_NAME: _entry([1.0], 0, 4)}, 4)),
    "a boolean size": ("refused", _header({_NAME: _entry([True], 0, 4)}, 4)),
    "300 dimensions": ("refused", _header({_NAME: _entry([1] * 300, 0, 4)}, 4)),
    "a huge tensor of no values": ("any", _header({_NAME: _entry([0, 2**40], 0, 0)})),
    "a huge tensor of no values, in reverse": ("any", _header({_NAME: _entry([2**62, 2, 0], 0, 0)})),
    "a type of 4 bits": ("refused", _header({_NAME: _entry([2], 0, 1, "F4")}, 1)),
    "an unknown type": ("refused", _header({_NAME: _entry([1], 0, 4, "f32")}, 4)),
    "a type that is null": ("refused", _header({_NAME: _entry([1], 0, 4, None)}, 4)),
    "a further field": ("refused", _header({_NAME: {**_entry([1], 0, 4), "x": 1}}, 4)),
    "a tensor twice": (
        "refused",
        _header(
            f'{{"{_NAME}": {_json(_entry([1], 0, 4)).decode()}, "{_NAME}": {_json(_entry([1], 0, 4)).decode()}}}', 4
        ),
    ),
    "a field twice": ("refused", _header(f'{{"{_NAME}": {{"dtype": "F32", "dtype": "F32", "shape": [1]}}}}', 4)),
    "an empty name": ("refused", _header({"": _entry([1], 0, 4)}, 4)),
    "a name with a newline": ("refused", _header({_NAME + "\n": _entry([1], 0, 4)}, 4)),
    "a name that clears the terminal": ("refused", _header({_NAME + "\x1b[2J": _entry([1], 0, 4)}, 4)),
    "a name written backwards": ("refused", _header({_NAME + "\u202e": _entry([1], 0, 4)}, 4)),
    "a name of 100,000 characters": ("refused", _header({"x" * 100_000: _entry([1], 0, 4)}, 4)),
    "half a character in a name": (
        "refused",
        _header(f'{{"\\ud800": {_ENTRY}}}', 4),
    ),
    "60,000 tensors": ("refused", _header({f"{PREFIX}l{i}": _entry([0], 0, 0) for i in range(60_000)})),
    "40,000 tensors": ("accepted", _header({f"{PREFIX}l{i}": _entry([0], 0, 0) for i in range(40_000)})),
    "NaN": ("refused", _floats(struct.pack("<f", float("nan")), "F32")),
    "infinity in 16 bits": ("refused", _floats(b"\x00\x7c", "F16")),
    "NaN in bfloat16": ("refused", _floats(b"\xc0\x7f", "BF16")),
    "NaN in 8 bits": ("refused", _floats(b"\x7f", "F8_E5M2")),
    "NaN as the last of many": (
        "refused",
        _floats(bytes(396) + struct.pack("<f", float("nan")), "F32", 100),
    ),
}

_MANY_TASKS = [f"t{i}" for i in range(10_000)]
_OTHERS = ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight")


def _tensors() -> Iterator[Malicious]:
    for name, (expected, data) in _HEADERS.items():
        yield Malicious(f"safetensors: {name}", "header", expected, {WEIGHTS: data})

    # What the configuration does not announce.
    for name in _OTHERS:
        shapes = {**samples.shapes_of(samples.config()), PREFIX + name: (samples.SIZE, samples.SIZE)}
        files = {CONFIG: _config(), WEIGHTS: samples.safetensors(samples.header_of(shapes))}
        yield Malicious(f"tensors: an unannounced {name}", "tensors", "refused", files)
        # What the model has no place for is not loaded.
        expected: Verdict = "refused" if name in ("model.embed_tokens.weight", "lm_head.weight") else "any"
        yield Malicious(f"tensors: an unannounced {name}, loaded", "load", expected, files)

    # Claims that the file does not hold.
    claims: dict[str, dict[str, Any]] = {
        "4,096 heads": {"num_heads": 4_096},
        "a rank of 16,384": {"r": 16_384},
        "4,096 heads of rank 16,384": {"num_heads": 4_096, "r": 16_384},
        "10,000 tasks x 4,096 heads": {
            "num_heads": 4_096,
            "router": "task",
            "tasks": [f"t{i}" for i in range(10_000)],
        },
        "ranks of 16,384": {"rank_pattern": dict.fromkeys(LAYERS, 16_384)},
        "a task router without tasks": {"router": "task", "tasks": None},
        "all layers of a wide model": {"target_modules": "all-linear", "num_heads": 4_096, "r": 16_384},
        "a wide layer": {"target_modules": ["up_proj", "down_proj", "gate_proj"], "num_heads": 4_096, "r": 16_384},
        "modules to save": {"modules_to_save": ["head"]},
        "rows of the embedding": {"trainable_token_indices": [0, 1]},
        "rows beyond the embedding": {"trainable_token_indices": [10**6]},
    }
    for name, fields in claims.items():
        files = {CONFIG: _config(**fields), WEIGHTS: _weights()}
        yield Malicious(f"claims: {name}", "tensors", "refused", files)
        yield Malicious(f"claims: {name}, loaded", "load", "refused", files)

    layers = [f"model.layers.{i}.mlp.up_proj" for i in range(5_000)]
    files = {CONFIG: _config(), WEIGHTS: _weights(layers=layers)}
    yield Malicious("tensors: 5,000 layers", "tensors", "accepted", files)
    yield Malicious("tensors: 5,000 layers that the model lacks, loaded", "load", "refused", files)
    odd = ["..", "model..up_proj", "model.layers." + "9" * 200 + ".up_proj", "model.layers.\u0663.up_proj", "up_proj"]
    yield Malicious("tensors: odd names", "tensors", "any", {CONFIG: _config(), WEIGHTS: _weights(layers=odd)})
    yield Malicious("tensors: no layers", "tensors", "refused", {CONFIG: _config(), WEIGHTS: _weights(layers=[])})


# Records


def _record(**changes: Any) -> bytes:
    return _json({**RECORD_TREE, **changes})


def _mixtures(**changes: Any) -> bytes:
    return _json({**RECORD_TREE["mixtures"], **changes})


_TASKS = RECORD_TREE["tasks"]
_RECORDS: dict[str, tuple[Verdict, bytes]] = {
    "a list": ("refused", b"[]"),
    "a newer format": ("refused", _record(format=2)),
    "a boolean format": ("refused", _record(format=True)),
    "100,000 tasks": ("any", _record(tasks=[{"name": f"t{i}"} for i in range(100_000)])),
    "100,000 times one task": ("refused", _record(tasks=[{"name": "a"}] * 100_000)),
    "50,000 tasks, each twice": ("refused", _record(tasks=[{"name": f"t{i}"} for i in range(50_000)] * 2)),
    "tasks in an object": ("refused", _record(tasks={"a": 1})),
    "a task that is a text": ("refused", _record(tasks=["a"])),
    "a task without a name": ("refused", _record(tasks=[{}])),
    "a name that is a list": ("refused", _record(tasks=[{"name": ["a"]}])),
    "a share above 1": ("refused", _record(tasks=[{"name": "a", "share": 2}])),
    "a negative number of rows": ("refused", _record(tasks=[{"name": "a", "rows": -1}])),
    "a metric of 63 digits": ("any", _record(tasks=[{"name": "a", "metrics": {"accuracy": 10**62}}])),
    "a metric that is a text": ("refused", _record(tasks=[{"name": "a", "metrics": {"accuracy": "0.9"}}])),
    "100,000 metrics": ("any", _record(tasks=[{"name": "a", "metrics": {f"m{i}": 0.5 for i in range(100_000)}}])),
    "nested settings": ("refused", _record(hyperparameters={"a": {"b": 1}})),
    "versions that are numbers": ("refused", _record(versions={"peft": 1})),
    "an export out of the folder": ("any", _record(exports=[{"path": "../../etc"}])),
    "an export without a path": ("refused", _record(exports=[{"task": "a"}])),
    "100,000 exports": ("any", _record(exports=[{"path": f"exports/e{i}"} for i in range(100_000)])),
    "a base model that clears the terminal": ("any", _record(base_model="\x1b[2J")),
    "names of Python's attributes": ("accepted", _record(__class__="x", save=1, to_dict=1)),
    "an infinite balance": ("refused", json.dumps(RECORD_TREE).replace("0.01", "1e999").encode()),
}
_HEAD_WEIGHTS: dict[str, tuple[Verdict, bytes]] = {
    "no tasks": ("accepted", _mixtures(weights={}, tokens={})),
    "other layers": ("refused", _mixtures(layers=["a"])),
    "other tasks": ("refused", _mixtures(tokens={"a": 1})),
    "rows of several lengths": ("refused", _mixtures(weights={"first": [[1.0], [0.5, 0.5]]}, tokens={"first": 1})),
    "rows without heads": ("refused", _mixtures(layers=["a"], weights={"first": [[]]}, tokens={"first": 1})),
    "negative weights": ("refused", _mixtures(layers=["a"], weights={"a": [[2.0, -1.0]]}, tokens={"a": 1})),
    "weights of 63 digits": ("refused", _mixtures(layers=["a"], weights={"a": [[10**62, 1]]}, tokens={"a": 1})),
    "weights of 1e300": ("refused", _mixtures(layers=["a"], weights={"a": [[1e300, -1e300]]}, tokens={"a": 1})),
    "boolean weights": ("refused", _mixtures(layers=["a"], weights={"a": [[True]]}, tokens={"a": 1})),
    "200,000 heads": ("any", _mixtures(layers=["a"], weights={"a": [[1] + [0] * 200_000]}, tokens={"a": 1})),
    "100,000 layers": (
        "any",
        _mixtures(layers=[f"l{i}" for i in range(100_000)], weights={"a": [[1]] * 100_000}, tokens={"a": 1}),
    ),
    "20,000 tasks": (
        "any",
        _mixtures(
            layers=["a"], weights={f"t{i}": [[1]] for i in range(20_000)}, tokens={f"t{i}": 1 for i in range(20_000)}
        ),
    ),
    "a layer twice": ("any", _mixtures(layers=["a", "a"], weights={"a": [[1], [1]]}, tokens={"a": 1})),
}


def _records() -> Iterator[Malicious]:
    for name, (expected, data) in _RECORDS.items():
        yield Malicious(f"record: {name}", "record", expected, {RECORD: data})
    for name, (expected, data) in _HEAD_WEIGHTS.items():
        yield Malicious(f"head weights: {name}", "head_weights", expected, {"head_weights.json": data})


# Cards

_BEGIN, _END = "<!-- rlora_trl: generated, rewritten by each push -->", "<!-- rlora_trl: end -->"
_ALIASES = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))
_METADATA: dict[str, tuple[Verdict, str]] = {
    "80,000 empty objects": ("any", "x: [" + "{}," * 80_000 + "]"),
    "60,000 keys with marks": ("any", "? a\n" * 60_000),
    "10,000 different keys with marks": ("any", "".join(f"? a{i}\n" for i in range(10_000))),
    "numbers to the base of 60": ("any", "x: [" + "190:20:30," * 20_000 + "]"),
    "one number to the base of 60": ("any", "x: 1" + ":59" * 80_000),
    "aliases of aliases": ("refused", "a0: &a0 [x]\n" + _ALIASES),
    "an alias of itself": ("refused", "a: &a [*a]"),
    "an alias that merges": ("refused", "a: &a {b: 1}\nc: {<<: *a}"),
    "a merge of a text": ("any", "c: {<<: x}"),
    "an empty integer": ("any", "r: !!int ''"),
    "a time that is none": ("any", "r: !!timestamp x"),
    "a day that is none": ("any", "r: 2024-02-30"),
    "a float that is none": ("any", "r: !!float x"),
    "a boolean that is none": ("any", "r: !!bool x"),
    "bytes that are none": ("any", "r: !!binary '='"),
    "an object of Python": ("any", "r: !!python/object/apply:os.system [id]"),
    "a name of Python": ("any", "r: !!python/name:os.system"),
    "a list as key": ("any", "? [a, b]\n: c"),
    "an object as key": ("any", "{{a: 1}: 2}"),
    "a set": ("any", "tags: !!set {a, b}"),
    "nested 2,000 deep": ("refused", "x: " + "[" * 2_000 + "]" * 2_000),
    "nested 100,000 deep": ("refused", "x: " + "[" * 100_000),
    "blocks nested 30,000 deep": ("refused", "- " * 30_000 + "a"),
    "marks nested 30,000 deep": ("refused", "? " * 30_000 + "a"),
    "a number of 200,000 digits": ("any", "r: " + "9" * 200_000),
    "a hexadecimal number of 200,000 digits": ("any", "r: 0x" + "f" * 200_000),
    "3 million characters": ("refused", "x: " + "a" * 3_000_000),
    "a key twice": ("any", "tags: [a]\ntags: [b]"),
    "self": ("any", "self: x"),
    "a setting of the reader": ("any", "ignore_metadata_errors: true"),
    "tags that are a number": ("any", "tags: 5"),
    "tags that are an object": ("any", "tags: {a: 1}"),
    "base models in lists": ("any", "base_model: [[a], {b: c}]"),
    "an index that is a number": ("any", "model-index: 5"),
    "an index of numbers": ("any", "model-index: [1, 2]"),
    "results that are a number": ("any", "model-index: [{name: x, results: 5}]"),
    "a source that is a text": (
        "any",
        "model-index: [{name: x, results: [{task: {type: a}, dataset: {type: a, name: b}, "
        "metrics: [{type: a, value: 1}], source: text}]}]",
    ),
    "a result without a dataset": ("any", "model-index: [{name: x, results: [{metrics: [{}]}]}]"),
    "a byte of zero": ("any", 'r: "\\0"'),
    "characters of a terminal": ("any", 'base_model: "\\e[2J"'),
    "a directive": ("any", "%YAML 9.9\n--- a"),
    "a tab": ("any", "a:\tb\n\tc: d"),
    "documents": ("any", "a: 1\n--- x\nb: 2"),
    "a list": ("any", "- a\n- b"),
    "a text": ("any", "just a text"),
    "nothing": ("any", ""),
    "numbers that are not finite": ("any", "rlora: {r: .inf, num_heads: .nan, scaling: -.inf}"),
    "100,000 tasks": ("any", "rlora: {tasks: [" + "a," * 100_000 + "]}"),
    "names of Python's attributes": ("any", "__class__: x\n__dict__: {}\nto_dict: 1\nget: 2"),
}
_CARDS: dict[str, tuple[Verdict, bytes]] = {
    "not text": ("refused", b"\xff\xfe\x00"),
    "5 MiB": ("refused", b"a" * 5 * 2**20),
    "a million newlines after the opening": ("any", b"---" + b"\n" * 1_000_000),
    "a million newlines before it": ("any", b"\n" * 1_000_000 + b"---\n"),
    "500,000 returns and newlines": ("any", b"---" + b"\r\n" * 500_000),
    "260,000 openings": ("any", b"---\n" * 260_000),
    "newlines before an opening that is none": ("any", b"---\n" + b"\n\n-- " * 200_000),
    "a million blanks": ("any", b"---\n" + b" " * 1_000_000),
    "10,000 generated parts": ("any", f"{_BEGIN}x{_END}\n".encode() * 10_000),
    "15,000 beginnings": ("any", _BEGIN.encode() * 15_000),
    "20,000 ends": ("any", _END.encode() * 20_000),
    "beginnings, then ends": ("any", _BEGIN.encode() * 8_000 + _END.encode() * 8_000),
    "HTML": ("any", b'---\ntags: []\n---\n<img alt="<" onerror=alert(1)><script>x</script>' * 2),
    "a byte order mark, and returns": ("any", b"\xef\xbb\xbf---\r\ntags: [a]\r\n---\r\nx"),
    "bytes of zero": ("any", b"---\ntags: [a]\n---\n\x00\x00"),
    "only an opening": ("any", b"---"),
    "openings without an end": ("any", b"---\ntags: [a]\n"),
}


def _cards() -> Iterator[Malicious]:
    cards = {name: (expected, samples.card(text).encode()) for name, (expected, text) in _METADATA.items()}
    for name, (expected, data) in {**cards, **_CARDS}.items():
        yield Malicious(f"card: {name}", "card", expected, {CARD: data})
        yield Malicious(f"existing card: {name}", "existing_card", "any", {CARD: data})


# Answers of the Hub

_MANY = {f"exports/a{i}/{CONFIG}": 1 for i in range(5_100)}
_LISTINGS: dict[str, tuple[Verdict, dict[str, Any]]] = {
    "out of the folder": ("refused", {"../x": 1}),
    "out of a folder": ("refused", {"exports/../../x": 1}),
    "at the root": ("refused", {"/etc/passwd": 1}),
    "on a drive": ("refused", {"C:/x": 1}),
    "a stream": ("refused", {f"{CARD}:x": 1}),
    "a pickle": ("refused", {"x.pkl": 1}),
    "a program": ("refused", {"modeling.py": 1}),
    "a program in capitals": ("refused", {"X.PY": 1}),
    "a program in a deep folder": ("refused", {"a/" * 100 + "x.so": 1}),
    "a device": ("refused", {"exports/con/README.md": 1}),
    "a device with an ending": ("refused", {"aux.txt": 1}),
    "another case": ("refused", {"README.MD": 1}),
    "another case by a long s": ("refused", {"tokenizer_config.j\u017fon": 1}),
    "another case by a Kelvin sign": ("refused", {"to\u212aenizer.json": 1}),
    "another case of a folder": ("refused", {"Exports/a/README.md": 1}),
    "a dot at the end": ("refused", {f"{CARD}.": 1}),
    "a blank at the end": ("refused", {f"{CARD} ": 1}),
    "a character without width": ("refused", {f"{CARD}\u200b": 1}),
    "written backwards": ("refused", {"x\u202egpj.exe": 1}),
    "a byte of zero": ("refused", {"a\x00b": 1}),
    "a newline": ("refused", {"a\nb": 1}),
    "half a character": ("refused", {"\ud800": 1}),
    "the folder of Git": ("refused", {".GIT/config": 1}),
    "an empty name": ("refused", {"": 1}),
    "an empty part": ("refused", {"exports//x": 1}),
    "a name of 100,000 characters": ("refused", {"a" * 100_000: 1}),
    "100,000 parts": ("refused", {"a/" * 100_000: 1}),
    "5,100 files": ("refused", _MANY),
    "weights of 2**63 bytes": ("refused", {WEIGHTS: 2**63}),
    "weights of -1 bytes": ("refused", {WEIGHTS: -1}),
    "weights of a size with a fraction": ("refused", {WEIGHTS: 1.5}),
    "weights of a size in words": ("refused", {WEIGHTS: "large"}),
    "a configuration of 1 GB": ("refused", {CONFIG: 10**9}),
    "sizes that are not known": ("accepted", {CONFIG: None, WEIGHTS: None}),
    "a wildcard": ("any", {"*": 1, "[a]?": 1}),
    "other files": ("accepted", {"a/b/c/d": 1, "\u00e9": 1}),
}
_ENTRIES: dict[str, dict[str, Any]] = {
    "an id that clears the terminal": {"id": "\x1b[2J/x"},
    "a card that is a number": {"cardData": 5},
    "a card that is a list": {"cardData": ["a"]},
    "a card that is a text": {"cardData": "self: x"},
    "a time that is a number": {"lastModified": 5},
    "a time that is none": {"lastModified": "yesterday"},
    "a time that is an object": {"lastModified": {"a": 1}},
    "a time out of range": {"lastModified": "9999-99-99T99:99:99.000Z"},
    "a number of downloads in words": {"downloads": "many"},
    "a number of downloads of 63 digits": {"downloads": 10**62},
    "tags that are a number": {"tags": 5},
    "a commit out of the folder": {"sha": "../../x"},
    "a commit that is a list": {"sha": ["a"]},
    "files that are numbers": {"siblings": [5]},
    "files without names": {"siblings": [{}]},
    "sizes that are a text": {"safetensors": "x"},
    "facts of transformers": {"transformersInfo": {"x": 1}},
    "providers in words": {"inferenceProviderMapping": "x"},
    "providers of numbers": {"inferenceProviderMapping": [1]},
    "results in words": {"evalResults": "x"},
    "results of numbers": {"evalResults": [1]},
    "names of Python's attributes": {"__class__": "x", "__dict__": 1, "cardData": {"__class__": "x"}},
    "self": {"cardData": {"self": "x"}},
    "a setting of the client": {"cardData": {"ignore_metadata_errors": True}},
    "tags of a card that are a number": {"cardData": {"tags": 5}},
    "tags of a card that are an object": {"cardData": {"tags": {"a": 1}}},
    "a model index that is a number": {"cardData": {"model-index": 5}},
    "a model index of numbers": {"cardData": {"model-index": [1]}},
    "a source that is a text": {
        "cardData": {
            "model-index": [
                {
                    "name": "x",
                    "results": [
                        {
                            "task": {"type": "a"},
                            "dataset": {"type": "a", "name": "b"},
                            "metrics": [{"type": "a", "value": 1}],
                            "source": "text",
                        }
                    ],
                }
            ]
        }
    },
    "a metric that is not finite": {"cardData": {**CARD_METADATA, "rlora": {"scaling": float("nan")}}},
    "a base model in lists": {"cardData": {"base_model": [["a"]]}},
    "100,000 tasks": {"cardData": {"rlora": {"tasks": [f"t{i}" for i in range(100_000)]}}},
    "100,000 results": {
        "cardData": {
            "model-index": [
                {
                    "name": "x",
                    "results": [
                        {"task": {"type": "a"}, "dataset": {"type": "a", "name": f"t{i}"}, "metrics": [{"type": "a"}]}
                        for i in range(50_000)
                    ],
                }
            ]
        }
    },
    "heads of 63 digits": {"cardData": {"rlora": {"r": 10**62, "num_heads": -1}}},
    "tasks with lines and bars": {"cardData": {"rlora": {"tasks": ["a|b\nc", "\x1b[8m", "`x`", "\u202ex"]}}},
    "half a character": {"cardData": {"rlora": {"tasks": ["\ud800"]}, "base_model": "\udfff"}},
}


def _answers() -> Iterator[Malicious]:
    for name, (expected, files) in _LISTINGS.items():
        data = _json({**samples.LISTING, **files})
        yield Malicious(f"listing: {name}", "listing", expected, {"listing.json": data})
    for name, fields in _ENTRIES.items():
        data = _json({**samples.MODEL_INFO, **fields})
        yield Malicious(f"entry: {name}", "entry", "any", {"entry.json": data})


# Folders and checkpoints


def _folders() -> Iterator[Malicious]:
    whole: Files = {CONFIG: _config(), WEIGHTS: _weights()}
    export: Files = {
        f"{EXPORT}/{CONFIG}": _json(samples.lora_config()),
        f"{EXPORT}/{WEIGHTS}": samples.safetensors(samples.header_of(samples.lora_shapes())),
    }
    changes: dict[str, tuple[Verdict, Files]] = {
        "code for the tokenizer": ("refused", {TOKENIZER: b'{"auto_map": {"AutoTokenizer": "x.y"}}'}),
        "code for the tokenizer, as a list": ("refused", {TOKENIZER: b'{"auto_map": ["x.y"]}'}),
        "code for the tokenizer, twice": ("refused", {TOKENIZER: b'{"auto_map": null, "auto_map": {"a": "x.y"}}'}),
        "a tokenizer that is a list": ("refused", {TOKENIZER: b"[]"}),
        "no code for the tokenizer": ("accepted", {TOKENIZER: b'{"auto_map": null}'}),
        "a picture that is a program": ("refused", {"figures/a.png": b"#!/bin/sh"}),
        "a picture that is empty": ("refused", {"figures/a.png": b""}),
        "a pickle": ("refused", {"adapter_model.bin": b"\x80\x04."}),
        "a program": ("refused", {"x.py": b""}),
        "an export": ("accepted", export),
        "an export without weights": ("refused", {f"{EXPORT}/{CONFIG}": export[f"{EXPORT}/{CONFIG}"]}),
        "an export without a configuration": ("refused", {f"{EXPORT}/{WEIGHTS}": export[f"{EXPORT}/{WEIGHTS}"]}),
        "an export with code to import": (
            "refused",
            {**export, f"{EXPORT}/{CONFIG}": _json({**samples.lora_config(), "megatron_core": "os"})},
        ),
        "an export with other tensors": ("refused", {**export, f"{EXPORT}/{WEIGHTS}": _weights()}),
        "an export that copies a layer": (
            "refused",
            {**export, f"{EXPORT}/{CONFIG}": _json({**samples.lora_config(), "layer_replication": [[0, 1]] * 1_000})},
        ),
        "the record of another base model": ("refused", {RECORD: _record(base_model="user/other")}),
        "a record of 100,000 tasks": ("any", {RECORD: _record(tasks=[{"name": f"t{i}"} for i in range(100_000)])}),
        "a card of a million newlines": ("any", {CARD: b"---" + b"\n" * 1_000_000}),
        "5,100 files": ("refused", {f"f{i}": b"" for i in range(5_100)}),
    }
    for name, (expected, files) in changes.items():
        yield Malicious(f"folder: {name}", "adapter", expected, {**whole, **files})


def _checkpoints() -> Iterator[Malicious]:
    states: dict[str, tuple[Verdict, Any]] = {
        "a list": ("refused", []),
        "files that are a list": ("refused", {"files": []}),
        "files that are a text": ("refused", {"files": "x"}),
        "a file name of 5,000 characters": ("refused", {"files": {"x" * 5_000: 1}}),
        "a file with a byte of zero": ("refused", {"files": {"a\x00b": 1}}),
        "a file out of the folder": ("refused", {"files": {"../../../../../../etc/passwd": 1}}),
        "half a character": ("refused", {"files": {"\ud800": 1}}),
        "a size that is a list": ("refused", {"files": {"optimizer.pt": [4]}}),
        "adapters that are a list": ("refused", {"adapters": ["default"]}),
        "an adapter out of the folder": ("refused", {"adapters": {"../../x": "sha256:0"}}),
        "a digest that is a number": ("refused", {"adapters": {"default": 5}}),
        "a strategy that is a list": ("refused", {"strategy": []}),
        "a number of processes in words": ("any", {"processes": "x"}),
        "runs that are a number": ("refused", {"runs": 5}),
        "runs of numbers": ("refused", {"runs": [5]}),
        "a run without settings": ("refused", {"runs": [{}]}),
        "settings that are a text": ("refused", {"runs": [{"from_step": 0, "compared": "x", "recorded": "x"}]}),
        "a step in words": ("refused", {"runs": [{"from_step": "x", "compared": {}, "recorded": {}}]}),
        "data that are a number": (
            "refused",
            {"runs": [{"from_step": 0, "compared": {"training data": 5}, "recorded": {}}]},
        ),
        "tasks that are a list": ("refused", {"tasks": ["first"]}),
        "counts that are a list": ("refused", {"tasks": {"first": [1]}}),
        "counts in words": ("refused", {"tasks": {"first": {"rows": "x"}}}),
        "counts of 30 digits": ("refused", {"tasks": {"first": {"rows": 10**30}}}),
        "100,000 tasks": ("any", {"tasks": {f"t{i}": {"rows": 1, "tokens": 1} for i in range(100_000)}}),
    }
    for name, (expected, changes) in states.items():
        yield Malicious(f"checkpoint: {name}", "checkpoint", expected, checkpoint_files(changes))
    deep = {**checkpoint_files({}), "rlora_state.json": b'{"a":' * 100_000}
    yield Malicious("checkpoint: a state nested 100,000 deep", "checkpoint", "refused", deep)
    empty = {**checkpoint_files({}), "rlora_state.json": b""}
    yield Malicious("checkpoint: an empty state", "checkpoint", "refused", empty)


def _all() -> list[Malicious]:
    parts = (_configs, _patterns, _tensors, _records, _cards, _answers, _folders, _checkpoints)
    return [malicious for part in parts for malicious in part()]


def _reader(malicious: Malicious) -> Reader:
    """A reader of this input alone."""

    def make(rng: Random) -> Files:
        return malicious.files

    return replace(next(reader for reader in ALL if reader.name == malicious.reader), name=malicious.name, make=make)


CORPUS = _all()
READERS = [_reader(malicious) for malicious in CORPUS]
