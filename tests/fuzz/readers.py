"""
The readers of foreign files: how an input of each is made, how it is read, and which errors it documents.

What a reader accepts is also used as the package uses it: written again, shown in a table, loaded into a model.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import nn

from rlora_cli.terminal import as_message, shown
from rlora_trl import RLoraConfig
from rlora_trl.convert import convert_adapter
from rlora_trl.files import download
from rlora_trl.files.card_text import check_card, check_card_text
from rlora_trl.files.checks import adapter_digest, check_adapter, check_listing
from rlora_trl.files.config import read_config, read_lora_config
from rlora_trl.files.head_weights import HeadWeights
from rlora_trl.files.layout import classify, task_slug
from rlora_trl.files.names import hub_name
from rlora_trl.files.pickled import load_pickled, read_pickled_header
from rlora_trl.files.record import AdapterRecord
from rlora_trl.files.signatures import read_signature, verify_folder
from rlora_trl.files.tensors import check_lora_tensors, check_tensors, file_digest
from rlora_trl.hub.card import render_card
from rlora_trl.hub.card_reading import hand_written, read_card_info, read_existing
from rlora_trl.reading import AdapterCheckError, read_json, read_safetensors_header, shorten, split_json_list
from rlora_trl.trainer.ledger import TaskLedger
from rlora_trl.trainer.resuming import check_settings, check_strategy, checkpoint_problem
from rlora_trl.trainer.run_settings import RunSettings, check_run
from rlora_trl.trainer.state_files import read_state
from rlora_trl.tuner.task_names import task_name
from rlora_trl.zoo.compare import Comparison
from rlora_trl.zoo.listing import name_of
from rlora_trl.zoo.search import AdapterInfo

from . import kinds, samples
from .cases import Reader
from .mutations import NUMBERS, TEXTS, JsonMutator, change_bytes, change_text, count, rarely_many, text
from .samples import CARD, CONFIG, EXPORT, PICKLED, RECORD, TOKENIZER, WEIGHTS, Files


def write(files: Files, folder: Path) -> Path:
    """Write an input to a folder."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def _encode(source: str) -> bytes:
    return source.encode("utf-8", "surrogatepass")


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _json(rng: Random, tree: Any, own: Callable[[Random], Any] | None = None) -> bytes:
    """A mutated tree as JSON, or its mutated bytes."""
    mutator = JsonMutator(rng, own)
    if rng.random() < 0.75:
        return _encode(mutator.write(mutator.mutate(tree)))
    return change_bytes(rng, _encode(json.dumps(tree)), _WORDS)


_WORDS = (
    *(_encode(word) for word in TEXTS),
    b",",
    b":",
    b"{",
    b"}",
    b"[",
    b"]",
    b'":',
    b"\xff",
    b"\xef\xbb\xbf",
    b"\\u",
)


def _fresh(tree: Any) -> Any:
    return json.loads(json.dumps(tree))


# Configurations


def _fields(rng: Random, fields: dict[str, Any]) -> bytes:
    """Fields of a configuration: of a known kind, or mutated."""
    kind = rng.random()
    if kind < 0.25:
        return _encode(json.dumps({**fields, **kinds.patterns(rng)}))
    if kind < 0.4:
        return _encode(json.dumps({**fields, **kinds.claims(rng)}))
    return _json(rng, fields, kinds.regular_expression)


def _make_config(rng: Random) -> Files:
    return {CONFIG: _fields(rng, samples.config(rng))}


def _read_config(files: Files, folder: Path) -> None:
    read_config(write(files, folder) / CONFIG)


def _make_lora_config(rng: Random) -> Files:
    return {CONFIG: _fields(rng, samples.lora_config())}


def _read_lora_config(files: Files, folder: Path) -> None:
    read_lora_config(write(files, folder) / CONFIG)


# Tensors


def _weights(rng: Random, header: dict[str, Any]) -> bytes:
    """A safetensors file with a mutated header, or mutated bytes."""
    kind = rng.random()
    if kind < 0.2:
        return samples.safetensors(kinds.header(rng), bytes(count(rng, 400)))
    if kind < 0.6:
        mutator, body = JsonMutator(rng, kinds.layer_name), bytes(samples.body_size(header))
        return samples.safetensors(mutator.write(mutator.mutate(header)), body)
    return change_bytes(rng, samples.safetensors(header), _WORDS)


def _make_header(rng: Random) -> Files:
    return {WEIGHTS: _weights(rng, samples.header_of(samples.shapes_of(samples.config(rng))))}


def _read_header(files: Files, folder: Path) -> None:
    path = write(files, folder) / WEIGHTS
    file_digest(path, read_safetensors_header(path, limit=2**30), finite=True)


def _make_tensors(rng: Random) -> Files:
    """A configuration and a header that may not fit each other, both of which can be read."""
    fields = samples.config(rng)
    layers = list(samples.LAYERS)
    if rng.random() < 0.5:
        layers += [kinds.layer_name(rng) for _ in range(3)]
    if rng.random() < 0.002:
        layers = [f"model.layers.{i}.mlp.up_proj" for i in range(count(rng, 20_000, 1_000))]
    changes = rng.choice((kinds.patterns, kinds.claims, lambda rng: {}))(rng)
    shapes = samples.shapes_of(fields, layers)
    if rng.random() < 0.3:  # as the changed fields claim, so that what comes after is reached too
        claimed = samples.shapes_of({**fields, **changes}, layers)
        shapes = claimed if sum(map(math.prod, claimed.values())) < 500_000 else shapes
    header = samples.header_of(shapes)
    fields |= changes
    if rng.random() < 0.5:
        del header[rng.choice(list(header))]
    if rng.random() < 0.2:
        header = samples.header_of(
            {**shapes, samples.PREFIX + rng.choice(_OTHER_TENSORS): (samples.SIZE, samples.SIZE)}
        )
    return {CONFIG: _encode(json.dumps(fields)), WEIGHTS: samples.safetensors(header)}


_OTHER_TENSORS = (
    *("model.embed_tokens.weight", "lm_head.weight", "head.weight", "model.layers.0.mlp.up_proj.weight", "a.bias"),
    *("model.embed_tokens.token_adapter.trainable_tokens_delta", "shared.weight", "model.norm.weight", "wte.weight"),
)


def _read_tensors(files: Files, folder: Path) -> None:
    write(files, folder)
    config = read_config(folder / CONFIG)
    check_tensors(folder / WEIGHTS, read_safetensors_header(folder / WEIGHTS), config)


def _make_lora_tensors(rng: Random) -> Files:
    return {WEIGHTS: _weights(rng, samples.header_of(samples.lora_shapes()))}


def _read_lora_tensors(files: Files, folder: Path) -> None:
    path = write(files, folder) / WEIGHTS
    check_lora_tensors(path, read_safetensors_header(path), {4, 8}, ["head"])


# Adapters of other code

# Instructions of a pickle: numbers, texts, marks, tuples, calls, memo, imports, and many of a kind.
_INSTRUCTIONS = (
    *(b"K\x01", b"M\xff\xff", b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\xff" * 8, b"N", b"\x88"),
    *(b"\x8a\xff" + b"\x7f" * 255, b"X\x01\x00\x00\x00a", b"X\xff\xff\xff\xff", b"}", b"]", b")", b"(", b"t", b"\x85"),
    *(b"\x86", b"\x87", b"R", b"Q", b"s", b"u", b"b", b"0", b"2", b".", b"\x81", b"i", b"\x8c\x01a", b"\x94", b"\x93"),
    *(
        b"q\x00",
        b"h\x00",
        b"q\x00h\x00",
        b"h\x00h\x00\x86q\x00" * 60,
        b"h\x00" * 3_000,
        b"(" * 3_000,
        b")\x85" * 3_000,
    ),
    *(b"cos\nsystem\n", b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nload\n"),
    *(
        b"ccollections\nOrderedDict\n)R",
        b"ctorch._utils\n_rebuild_parameter\n",
        b"c\xff\n\n",
        b"\x80\x05",
        b"\x80\x02",
    ),
)


def _pickled(rng: Random, shapes: dict[str, tuple[int, ...]]) -> bytes:
    """A pickled file with changed instructions, storages or bytes."""
    data, records = samples.pickle_of(shapes), samples.storages(shapes)
    kind = rng.random()
    if kind < 0.5:
        data = change_bytes(rng, data, _INSTRUCTIONS)
    elif kind < 0.6:
        key = rng.choice(list(records))
        records[rng.choice(["0", "x", "../x", key])] = bytes(count(rng, 400))
    file = samples.archive(data, records)
    return change_bytes(rng, file, (*_WORDS, b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\6\7")) if kind > 0.7 else file


def _make_pickled(rng: Random) -> Files:
    return {PICKLED: _pickled(rng, samples.authors_shapes())}


def _read_pickled(files: Files, folder: Path) -> None:
    path = write(files, folder) / PICKLED
    load_pickled(path, read_pickled_header(path, limit=2**30))


def _make_source(rng: Random) -> Files:
    """An adapter of the authors' code, or plain LoRA, with changes in one of its two files."""
    authors = rng.random() < 0.5
    fields, shapes = samples.lora_config(), samples.lora_shapes()
    if authors:
        fields, shapes = samples.authors_config(), samples.authors_shapes()
    config, kind = _encode(json.dumps(fields)), rng.random()
    if kind < 0.4:
        config = _fields(rng, fields)
    elif kind < 0.7:
        name = rng.choice(list(shapes))
        shape = shapes.pop(name)
        if rng.random() < 0.7:
            others = (name, kinds.layer_name(rng), f"{name}.bias", name.replace("lora_", "lora_embedding_"))
            shapes[rng.choice(others)] = rng.choice((shape, shape[::-1], shape[:1], (*shape, 1, 1), (0,), (3, 5)))
    if authors:
        return {CONFIG: config, PICKLED: _pickled(rng, shapes) if kind > 0.8 else _whole(shapes)}
    header = samples.header_of(shapes)
    return {CONFIG: config, WEIGHTS: _weights(rng, header) if kind > 0.8 else samples.safetensors(header)}


def _whole(shapes: dict[str, tuple[int, ...]]) -> bytes:
    return samples.archive(samples.pickle_of(shapes), samples.storages(shapes))


def _read_source(files: Files, folder: Path) -> None:
    source = write(files, folder / "source")
    multi_head = PICKLED in files
    # With the safest choice for either kind; a mutated name of a tensor may change the kind.
    convert_adapter(source, folder / "out", source_format="hydralora" if multi_head else None, tasks=["first"])
    checked = check_adapter(folder / "out")
    assert checked.config.num_heads == (3 if multi_head else 1)


# Records


def _make_record(rng: Random) -> Files:
    tree = _fresh(samples.RECORD_TREE)
    if rng.random() < 0.002:
        tree["tasks"] = [{"name": f"t{i}"} for i in range(count(rng, 100_000, 5_000))]
    return {RECORD: _json(rng, tree, kinds.path)}


def _read_record(files: Files, folder: Path) -> None:
    record = AdapterRecord.load(write(files, folder))
    assert record is not None
    other = AdapterRecord.from_dict(samples.RECORD_TREE)
    for merged in (record, record.merged_with(other), other.merged_with(record)):
        written = json.dumps(merged.to_dict(), ensure_ascii=False, allow_nan=False).encode()
        AdapterRecord.from_dict(json.loads(written))
    if record.mixtures is not None and record.mixtures.weights:
        record.mixtures.mean()


def _make_head_weights(rng: Random) -> Files:
    return {"head_weights.json": _json(rng, _fresh(samples.RECORD_TREE["mixtures"]))}


def _read_head_weights(files: Files, folder: Path) -> None:
    weights = HeadWeights.from_dict(read_json(write(files, folder) / "head_weights.json"))
    for task in weights.weights:
        weights.for_task(task)
    json.dumps(weights.to_dict(), allow_nan=False)


# Cards


def _card(rng: Random) -> bytes:
    mutator = JsonMutator(rng, kinds.yaml_bomb)
    kind = rng.random()
    if kind < 0.35:
        metadata = kinds.yaml_bomb(rng)
        if rng.random() < 0.3:
            metadata = kinds.to_yaml(rng, mutator, samples.CARD_METADATA) + "\n" + metadata
    else:
        metadata = kinds.to_yaml(rng, mutator, mutator.mutate(_fresh(samples.CARD_METADATA)))
    body = change_text(rng, samples.CARD_BODY) if rng.random() < 0.3 else samples.CARD_BODY
    card = _encode(samples.card(metadata, body))
    return change_bytes(rng, card, _WORDS) if kind > 0.7 else card


def _make_card(rng: Random) -> Files:
    return {CARD: _card(rng)}


def _read_card(files: Files, folder: Path) -> None:
    read_card_info(check_card(write(files, folder) / CARD))


def _read_existing(files: Files, folder: Path) -> None:
    source = _decode(files[CARD])
    read_card_info(read_existing(source).metadata)
    hand_written(source)


def _read_rendered(files: Files, folder: Path) -> None:
    record = AdapterRecord.from_dict(samples.RECORD_TREE)
    config = RLoraConfig(tasks=samples.TASKS, target_modules=["up_proj"], task_type="CAUSAL_LM")
    # A card that this package writes passes its own check.
    card = str(render_card(config, record, repo_id="user/x", existing=_decode(files[CARD])))
    check_card_text(card)


def _make_card_info(rng: Random) -> Files:
    return {"card_data.json": _json(rng, _fresh(samples.CARD_METADATA))}


def _read_card_info(files: Files, folder: Path) -> None:
    data = read_json(write(files, folder) / "card_data.json")
    json.dumps(read_card_info(data), allow_nan=False).encode()


# What the Hub answers


def _make_listing(rng: Random) -> Files:
    listing: dict[str, Any] = dict(samples.LISTING)
    for _ in range(rarely_many(rng) if rng.random() < 0.3 else 1):
        size = rng.choice((0, 1, None, rng.choice(NUMBERS), text(rng)))
        listing[kinds.path(rng)] = size
    if rng.random() < 0.3:
        return {"listing.json": _json(rng, listing, kinds.path)}
    return {"listing.json": _encode(json.dumps(listing))}


def _read_listing(files: Files, folder: Path) -> None:
    listing = _loads(files["listing.json"])
    if not isinstance(listing, dict):
        raise AdapterCheckError("not a listing")
    for path in check_listing(listing):
        classify(path)


def _loads(data: bytes) -> Any:
    """JSON as the client of the Hub reads it: NaN, half characters and duplicate keys pass."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AdapterCheckError(f"not JSON: {error}") from error


def _make_entries(rng: Random) -> Files:
    entry = _fresh(samples.MODEL_INFO)
    if rng.random() < 0.5:  # most of an entry is its card
        mutator = JsonMutator(rng)
        entry["cardData"] = mutator.mutate(entry["cardData"])
        return {"entry.json": _encode(mutator.write(entry))}
    return {"entry.json": _json(rng, entry)}


def _read_entry(files: Files, folder: Path) -> None:
    info = AdapterInfo.from_json(files["entry.json"])
    json.dumps(info.to_dict(), allow_nan=False).encode()
    table = Comparison((info, info), tuple(info.metrics))
    table.to_markdown().encode()
    json.dumps(table.to_dict(), allow_nan=False)


def _make_entry_list(rng: Random) -> Files:
    entries = [_make_entries(rng)["entry.json"] for _ in range(rng.choice((0, 1, 2, 3)))]
    data = b"[" + b",".join(entries) + b"]"
    return {"entries.json": change_bytes(rng, data, _WORDS) if rng.random() < 0.5 else data}


def _read_entry_list(files: Files, folder: Path) -> None:
    for element in split_json_list(files["entries.json"], "the answer"):
        try:
            AdapterInfo.from_json(element)
        except AdapterCheckError:
            name_of(element).encode()


def _make_repository(rng: Random) -> Files:
    sha = "0123456789abcdef0123456789abcdef01234567"
    siblings = [
        {"rfilename": WEIGHTS, "size": 5, "lfs": {"sha256": "a" * 64, "size": 5, "pointerSize": 100}},
        {"rfilename": CONFIG, "size": 5, "blobId": sha},
    ]
    return {"repository.json": _json(rng, {"id": "user/words", "sha": sha, "siblings": siblings}, kinds.path)}


def _read_repository(files: Files, folder: Path) -> None:
    listing = download._read_listing("user/words", read_json(write(files, folder) / "repository.json"))
    # Both become names of files in the cache.
    for name in (listing.commit, *(file.lfs.sha256 if file.lfs else file.blob_id for file in listing.files.values())):
        assert name.isalnum(), name


# Names


def _make_name(rng: Random) -> Files:
    own = rng.choice((kinds.path, kinds.layer_name, text))
    return {"name.json": _encode(JsonMutator(rng, own).write(own(rng)))}


def _read_name(files: Files, folder: Path) -> None:
    name = _loads(files["name.json"])
    classify(name)
    hub_name(name)
    shorten(name)
    slug = task_slug(name) if name else "task"
    assert classify(f"exports/{slug}/{CONFIG}") == "export", slug
    task_name(name)


def _make_text(rng: Random) -> Files:
    return {"text.json": _encode(JsonMutator(rng).write("".join(text(rng) for _ in range(count(rng, 6)))))}


def _read_text(files: Files, folder: Path) -> None:
    """All foreign text on its way to a terminal."""
    foreign = _loads(files["text.json"])
    for encoding in ("utf-8", "ascii", "latin-1"):
        line = shown(foreign, encoding=encoding)
        line.encode(encoding)
        assert line.isprintable(), ascii(line)
    assert as_message(foreign).replace("\n", "").isprintable()


# Signatures

_PUBLIC_KEY = """-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAElm5/1MbUlfZRGq/o5ozWuOGMqePR
VTNP5kkgJCMO+UVPJfOQvWoKhi3xs8fa3TXvSzqRe5zaz8CBYpzk7isOhQ==
-----END PUBLIC KEY-----
"""
_HINT = "5b1377f0f9f968765da9b911171af961b0dfaf38bedff86ab70130107adf9200"  # of that key


def _make_signature(rng: Random) -> Files:
    serialization = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": [CARD]}
    resources = [{"name": name, "digest": "00" * 32, "algorithm": "sha256"} for name in (CONFIG, WEIGHTS)]
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "adapter", "digest": {"sha256": "00" * 32}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {"serialization": serialization, "resources": resources},
    }
    inside = rng.random() < 0.5
    payload = _json(rng, statement, kinds.path) if inside else _encode(json.dumps(statement))
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": "application/vnd.in-toto+json",
        "signatures": [{"sig": "MEUCIQ==", "keyid": ""}],
    }
    bundle = {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {"publicKey": {"hint": _HINT}, "tlogEntries": []},
        "dsseEnvelope": envelope,
    }
    return {samples.SIGNATURE: _encode(json.dumps(bundle)) if inside else _json(rng, bundle)}


def _read_signature(files: Files, folder: Path) -> None:
    """Read, and then refused by the verification where its package is installed, as nobody has signed it."""
    path = write(files, folder)
    read_signature(path / samples.SIGNATURE)
    if find_spec("model_signing") is not None:
        (path / "key.pub").write_text(_PUBLIC_KEY)
        try:
            verify_folder(path, path / "key.pub")
        except AdapterCheckError:
            return
        raise AssertionError("accepted")


# Whole folders


def _make_adapter(rng: Random) -> Files:
    fields = samples.config(rng)
    files = {
        CONFIG: _encode(json.dumps(fields)),
        WEIGHTS: samples.safetensors(samples.header_of(samples.shapes_of(fields))),
        RECORD: _encode(json.dumps(samples.RECORD_TREE)),
        CARD: _encode(samples.card("tags: [rlora]")),
        TOKENIZER: _encode(json.dumps(samples.TOKENIZER_TREE)),
        f"{EXPORT}/{CONFIG}": _encode(json.dumps(samples.lora_config())),
        f"{EXPORT}/{WEIGHTS}": samples.safetensors(samples.header_of(samples.lora_shapes())),
        "figures/routing.png": b"\x89PNG\r\n\x1a\n",
    }
    changed = rng.choice(list(files))
    if changed in (CONFIG, f"{EXPORT}/{CONFIG}"):
        files[changed] = _fields(rng, json.loads(files[changed]))
    elif changed == TOKENIZER:
        files[changed] = _json(rng, _fresh(samples.TOKENIZER_TREE))
    elif changed == CARD:
        files[changed] = _card(rng)
    elif rng.random() < 0.5:
        files[changed] = change_bytes(rng, files[changed], _WORDS)
    else:
        del files[rng.choice(list(files))]
    name = kinds.path(rng)
    if rng.random() < 0.2 and _can_be_a_file(name) and not any(f"{other}/".startswith(f"{name}/") for other in files):
        files[name] = b""
    return files


def _can_be_a_file(name: str) -> bool:
    """Whether a path can be created below a folder, with parents that are not files."""
    parts = name.split("/")
    portable = all(0 < len(part.encode("utf-8", "replace")) < 200 and part not in (".", "..") for part in parts)
    return portable and "\x00" not in name and len(parts) < 4 and name.isprintable() and "." not in parts[0][1:]


def _read_adapter(files: Files, folder: Path) -> None:
    check_adapter(write(files, folder), base_model="user/tiny")


class _Model(nn.Module):
    """Square linear layers by path, as a foreign base model may name them."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="custom", to_dict=dict, tie_word_embeddings=False)
        for path, size in sizes.items():
            *folders, leaf = path.split(".")
            parent: nn.Module = self
            for name in folders:
                if name not in parent._modules:
                    parent.add_module(name, nn.Module())
                parent = parent._modules[name]  # type: ignore[assignment]
            parent.add_module(leaf, nn.utils.skip_init(nn.Linear, size, size))

    def prepare_inputs_for_generation(self) -> None:
        """PEFT looks for it in models that generate."""


# Of the layers of the model. For the last one many heads of a large rank would take gigabytes.
_SIZES = {
    **dict.fromkeys(
        (*samples.LAYERS, "head", "lm_head", "model.embed_tokens", "a" * 250, "model." + "a" * 100), samples.SIZE
    ),
    "wide.gate_proj": 512,
}


def _make_load(rng: Random) -> Files:
    if rng.random() < 0.6:
        return _make_tensors(rng)
    fields = samples.config(rng)
    weights = samples.safetensors(samples.header_of(samples.shapes_of(fields)))
    return {CONFIG: _fields(rng, fields), WEIGHTS: weights}


def _read_load(files: Files, folder: Path) -> None:
    # What is not the configuration of an R-LoRA adapter does not reach this package.
    fields = _loads(files[CONFIG])
    if not isinstance(fields, dict) or fields.get("peft_type") != "RLORA":
        raise AdapterCheckError("PEFT loads another method, or nothing")

    model = _Model(_SIZES)
    peft_model = PeftModel.from_pretrained(model, str(write(files, folder)))
    peft_model.load_adapter(str(folder), "other")


# Checkpoints of the trainer


_TRAINER_STATE = {"global_step": 4, "epoch": 1.0, "log_history": [{"loss": 1.0, "step": 4}], "best_metric": None}


@cache
def _checkpoint_state() -> dict[str, Any]:
    compared = {"learning_rate": 1e-4, "seed": 42, "training data": {"rows": 10, "digest": "0123456789abcdef"}}
    return {
        "tasks": {task: {"rows": 4, "tokens": 40} for task in samples.TASKS},
        "head_sums": [[1.0, 2.0, 3.0]],
        "runs": [{"from_step": 0, "compared": compared, "recorded": {"learning_rate": 1e-4}}],
        "adapters": {"default": None},
        "strategy": "whole weights in each process",
        "processes": 1,
        "files": {"optimizer.pt": 4, WEIGHTS: 0},
    }


@cache
def _checkpoint_weights(folder: Path) -> tuple[bytes, str]:
    """Weights of the adapter in a checkpoint, and their digest."""
    data = samples.safetensors(samples.header_of(samples.shapes_of(samples.config())))
    write({WEIGHTS: data}, folder)
    return data, adapter_digest(folder)


def checkpoint_files(changes: Any) -> Files:
    """A valid checkpoint with changes of its state, or with another state that is not an object."""
    weights = samples.safetensors(samples.header_of(samples.shapes_of(samples.config())))
    state = {**_checkpoint_state(), "adapters": {"default": _DIGEST}}
    state["files"] = {**state["files"], WEIGHTS: len(weights)}
    return {
        "trainer_state.json": _encode(json.dumps(_TRAINER_STATE)),
        CONFIG: _encode(json.dumps(samples.config())),
        WEIGHTS: weights,
        RECORD: _encode(json.dumps(samples.RECORD_TREE)),
        "optimizer.pt": b"\x80\x04N.",
        "rlora_state.json": _encode(json.dumps({**state, **changes} if isinstance(changes, dict) else changes)),
    }


def _make_checkpoint(rng: Random) -> Files:
    files = checkpoint_files({} if rng.random() < 0.9 else {"adapters": {"default": ""}})
    changed = rng.choice(("rlora_state.json",) * 6 + ("trainer_state.json", CONFIG, WEIGHTS, RECORD))
    if changed == WEIGHTS:
        files[changed] = change_bytes(rng, files[changed], _WORDS)
    elif changed == CONFIG:
        files[changed] = _fields(rng, json.loads(files[changed]))
    else:
        files[changed] = _json(rng, json.loads(files[changed]), kinds.path)
    return files


_CHECKPOINT_FIELDS = {"r": 2, "target_modules": ["up_proj", "down_proj"], "base_model_name_or_path": "user/tiny"}
_DIGEST = "sha256:" + "0" * 64


def _read_checkpoint(files: Files, folder: Path) -> None:
    checkpoint = folder / "checkpoint-4"
    write(files, checkpoint)
    weights, digest = _checkpoint_weights(folder / "weights")
    state = checkpoint / "rlora_state.json"
    state.write_bytes(state.read_bytes().replace(_DIGEST.encode(), digest.encode()))
    problem = checkpoint_problem(checkpoint)
    if problem is not None:
        raise ValueError(problem)

    # As the trainer does before it loads anything, and at the first step.
    PartialState(cpu=True)  # for the loggers
    check_strategy(checkpoint, "whole weights in each process", 1)
    check_settings(checkpoint, RLoraConfig(tasks=samples.TASKS, **_CHECKPOINT_FIELDS), "default")
    args = SimpleNamespace(learning_rate=1e-4, seed=42, max_steps=8)
    data = {"rows": 10, "digest": "0123456789abcdef"}
    check_run(checkpoint, args, data)
    state = read_state(checkpoint)
    settings = RunSettings()
    settings.begin(4, args, data, state.get("runs"))
    settings.recorded(5)
    TaskLedger(samples.TASKS, torch.device("cpu")).load(state.get("tasks") or {})


_CHECK, _VALUE = (AdapterCheckError,), (ValueError,)
READERS = [
    Reader("config", _make_config, _read_config, _CHECK, weight=30),
    Reader("lora_config", _make_lora_config, _read_lora_config, _CHECK, weight=20),
    Reader("header", _make_header, _read_header, _CHECK, weight=26),
    Reader("tensors", _make_tensors, _read_tensors, _CHECK, weight=10),
    Reader("lora_tensors", _make_lora_tensors, _read_lora_tensors, _CHECK, weight=16),
    Reader("pickled", _make_pickled, _read_pickled, _CHECK, weight=16),
    Reader("source", _make_source, _read_source, _VALUE, weight=6),
    Reader("record", _make_record, _read_record, _VALUE, weight=8),
    Reader("head_weights", _make_head_weights, _read_head_weights, _VALUE, weight=16),
    Reader("card", _make_card, _read_card, _CHECK, weight=26),
    Reader("existing_card", _make_card, _read_existing, _VALUE, weight=14),
    Reader("rendered_card", _make_card, _read_rendered, _VALUE, weight=1),
    Reader("card_info", _make_card_info, _read_card_info, _CHECK, weight=20),
    Reader("listing", _make_listing, _read_listing, _CHECK, weight=30),
    Reader("entry", _make_entries, _read_entry, _CHECK, weight=20),
    Reader("entry_list", _make_entry_list, _read_entry_list, _CHECK, weight=14),
    Reader("repository", _make_repository, _read_repository, _VALUE, weight=24),
    Reader("text", _make_text, _read_text, (), weight=10),
    Reader("name", _make_name, _read_name, (*_VALUE, TypeError), weight=24),
    Reader("signature", _make_signature, _read_signature, _CHECK, weight=8),
    Reader("adapter", _make_adapter, _read_adapter, _CHECK, weight=3),
    Reader("load", _make_load, _read_load, (*_VALUE, TypeError), weight=3),
    Reader("checkpoint", _make_checkpoint, _read_checkpoint, _VALUE, weight=6),
]
