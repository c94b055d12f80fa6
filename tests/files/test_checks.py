"""Checks before use: whole adapters pass, each fault and each attack gets one clear error, and nothing is executed."""

import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import struct
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from testing_utils import TINY_MODELS, perturb

from rlora_trl import RLoraConfig
from rlora_trl.files.checks import AdapterCheckError, adapter_digest, check_adapter, check_listing, read_json
from rlora_trl.files.config import read_lora_config
from rlora_trl.files.layout import CARD_NAME, CONFIG_NAME, RECORD_NAME, WEIGHTS_NAME


BASE = "example/tiny-llama"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
VALID = {
    "softmax": ("llama", {}),
    "top_k": ("llama", {"router": "top_k", "router_top_k": 2, "router_init": "kaiming_uniform"}),
    "task": ("llama", {"router": "task", "tasks": ["a", "b"]}),
    "uniform": ("llama", {"router": "uniform"}),
    "own_a": ("llama", {"share_a": False}),
    "zero_b": ("llama", {"init_weights": "zero_b"}),
    "ranks": ("llama", {"rank_pattern": {"layers.0.mlp.down_proj": 2, "up_proj": 3}}),
    "expression": ("llama", {"target_modules": r".*\.(?:gate|up)_proj"}),
    "first_layer": ("llama", {"target_modules": ["gate_proj"], "layers_to_transform": [0]}),
    "modules": ("llama", {"modules_to_save": ["lm_head"], "target_modules": ["gate_proj"]}),
    "tokens": ("llama", {"trainable_token_indices": [1, 2], "target_modules": ["gate_proj"]}),
    "all_biases": ("gpt2", {"bias": "all", "task_type": "CAUSAL_LM"}),
    "own_biases": ("gpt2", {"bias": "rlora_only", "task_type": "CAUSAL_LM"}),
    "classifier": ("bert", {"task_type": "SEQ_CLS"}),
}


def save(folder, model, config):
    torch.manual_seed(0)
    peft_model = get_peft_model(TINY_MODELS[model](), config)
    perturb(peft_model)
    peft_model.save_pretrained(folder)
    return peft_model


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """Folders of whole adapters, made when they are asked for."""
    folders = {}

    def get(name):
        if name not in folders:
            model, fields = VALID[name]
            folders[name] = tmp_path_factory.mktemp(name)
            save(folders[name], model, RLoraConfig(**{"task_type": "CAUSAL_LM", **fields}))
            set_config(folders[name], base_model_name_or_path=BASE)
        return folders[name]

    return get


@pytest.fixture
def adapter(originals, tmp_path):
    return shutil.copytree(originals("softmax"), tmp_path / "adapter")


def set_config(folder, **changes):
    path = folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def set_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_NAME)


def key_of(tensors, ending):
    return next(key for key in sorted(tensors) if key.endswith(ending))


def split_weights(folder):
    data = (folder / WEIGHTS_NAME).read_bytes()
    size = int.from_bytes(data[:8], "little")
    return data[8 : 8 + size], data[8 + size :]


def write_weights(folder, header, body):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS_NAME).write_bytes(struct.pack("<Q", len(header)) + header + body)


def set_header(folder, change):
    header, body = split_weights(folder)
    header = json.loads(header)
    change(header)
    write_weights(folder, header, body)


@pytest.mark.parametrize("name", VALID)
def test_whole_adapter_passes(originals, name):
    folder = originals(name)
    checked = check_adapter(folder, base_model=BASE)
    tensors = load_file(folder / WEIGHTS_NAME)
    assert checked.folder == folder
    assert checked.config.router == VALID[name][1].get("router", "softmax")
    assert checked.num_parameters == sum(
        tensor.numel() for key, tensor in tensors.items() if not key.endswith((".A0", ".B0"))
    )
    assert len(checked.layers) == sum(key.endswith(".rlora_adapters.A") for key in tensors)
    assert checked.digest == adapter_digest(folder) == adapter_digest(tensors)
    assert checked.sha256 == hashlib.sha256((folder / WEIGHTS_NAME).read_bytes()).hexdigest()
    assert (checked.base_model, checked.base_model_revision, checked.record) == (BASE, None, None)


def test_layers_are_paths_in_the_base_model_in_order(tmp_path):
    torch.manual_seed(0)
    tensors = {}
    for i in range(12):
        stem = f"base_model.model.layers.{i}.up_proj.rlora_adapters."
        tensors |= {stem + "A": torch.ones(2, 6), stem + "B": torch.ones(3, 4, 2)}
    RLoraConfig(r=2, target_modules=["up_proj"], router="uniform", init_weights="zero_a").save_pretrained(tmp_path)
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    assert check_adapter(tmp_path).layers == tuple(f"layers.{i}.up_proj" for i in range(12))


def test_sixteen_bits_pass(adapter):
    set_tensors(adapter, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
    assert check_adapter(adapter).digest == adapter_digest(load_file(adapter / WEIGHTS_NAME))


def test_leftovers_of_training_pass(adapter):
    """A trainer's output folder has pickles of its own; they are neither read nor published."""
    for path in ("training_args.bin", "optimizer.pt", "checkpoint-3/scheduler.pt", "checkpoint-3/anything.pkl"):
        (adapter / path).parent.mkdir(exist_ok=True)
        (adapter / path).write_bytes(b"\x80")
    check_adapter(adapter)


# Configuration


def test_config_of_another_method(tmp_path):
    save(tmp_path, "llama", LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(
        AdapterCheckError, match="`peft_type` 'LORA', and RLORA is expected.*PeftModel.from_pretrained"
    ):
        check_adapter(tmp_path)


CONFIGS = {
    "type": ({"peft_type": None}, "`peft_type` None"),
    "foreign_code": ({"auto_mapping": {"base_model_class": "x", "parent_library": "evil"}}, "would import"),
    "almost_transformers": (
        {"auto_mapping": {"base_model_class": "x", "parent_library": "transformers_modules.evil"}},
        "would import",
    ),
    "mapping_is_text": ({"auto_mapping": "evil"}, "would import"),
    "rank_is_huge": ({"r": 10**12}, "`r` must be from 1 to 16384"),
    "own_rank_is_none": ({"rank_pattern": {"x": True}}, r"`rank_pattern` must be of type dict\[str, int\]"),
    "own_alpha": ({"alpha_pattern": {"x": "1"}}, r"`alpha_pattern` must be of type dict\[str, int \| float\]"),
    "rank_is_bool": ({"r": True}, r"`r` must be of type int \| None, got True"),
    "rank_is_text": ({"r": "4"}, r"`r` must be of type int \| None, got '4'"),
    "rank_is_zero": ({"r": 0}, "`r` must be from 1 to"),
    "heads": ({"num_heads": 10**9}, "`num_heads` must be"),
    "alpha": ({"lora_alpha": 1e30}, "`lora_alpha` must be from -1000000 to"),
    "rank_pattern": ({"rank_pattern": {"x": 10**9}}, "`rank_pattern` must be from 1 to"),
    "rank_pattern_is_list": ({"rank_pattern": [1]}, "`rank_pattern` must be of type dict"),
    "router": ({"router": "nonsense"}, "`router` must be one of"),
    "router_top_k": ({"router_top_k": 7}, "router_top_k"),
    "task_type": ({"task_type": "NOTHING"}, "task type"),
    "tasks": ({"tasks": [1]}, "`tasks` must be"),
    "tasks_twice": ({"tasks": ["a", "a"]}, "more than once"),
    "base_model": ({"base_model_name_or_path": ["x"]}, "`base_model_name_or_path` must be of type str"),
    "base_model_is_long": ({"base_model_name_or_path": "x" * 600}, "`base_model_name_or_path` must be printable text"),
    "targets_are_objects": ({"target_modules": [{"a": 1}]}, "`target_modules` must be of type str"),
    "expression_for_modules": ({"modules_to_save": ["(x*)*y"]}, "`modules_to_save`.*must have names of modules"),
    "expression_for_pattern": (
        {"target_modules": ["up_proj"], "layers_to_transform": 0, "layers_pattern": "(x*)*"},
        "`layers_pattern`.*must have names of modules",
    ),
    "many_modules": ({"modules_to_save": [f"x{i}" for i in range(200)]}, "200 names, more than 100"),
    "look_ahead_for_alpha": ({"alpha_pattern": {"(?!x)y": 4}}, "`alpha_pattern`.*linear time"),
    "long_expression": ({"alpha_pattern": {"a?" * 1000: 4}}, "2000 characters|2005 characters|characters, more than"),
    "many_expressions": ({"alpha_pattern": {f"x+{i}": 4 for i in range(60)}}, "one of more than 50"),
    "another_expression": ({"target_modules": r".*\.(?:gate|down)_proj"}, "does not select"),
    "tokens": ({"trainable_token_indices": [-1]}, "`trainable_token_indices`"),
    "layers": ({"target_modules": ["up_proj"], "layers_to_transform": ["x"]}, "`layers_to_transform`"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_bad_config(adapter, name):
    changes, message = CONFIGS[name]
    set_config(adapter, **changes)
    with pytest.raises(AdapterCheckError, match=message):
        check_adapter(adapter)


@pytest.mark.filterwarnings("error::UserWarning")
def test_unknown_field_warns(adapter):
    set_config(adapter, from_the_future=1)
    with pytest.raises(UserWarning, match="from_the_future.*newer version"):
        check_adapter(adapter)


JSON = {
    "not_json": (b"{", "not valid JSON"),
    "empty": (b"", "not valid JSON"),
    "list": (b"[]", "holds a list"),
    "deep": (b"[" * 100_000, "nested more than"),
    "deep_objects": (b'{"a":' * 100_000, "nested more than"),
    "open_string": (b'"\\' * 500_000, "not valid JSON|has .* bytes"),
    "twice": (b'{"r": 1, "r": 2}', "key 'r' occurs twice"),
    "nan": (b'{"r": NaN}', "not a finite number"),
    "infinity": (b'{"r": -Infinity}', "not a finite number"),
    "overflow": (b'{"r": 1e999}', "not a finite number"),
    "long_integer": (b'{"r": ' + b"9" * 5000 + b"}", "more than 64 digits"),
    "surrogate": (b'{"peft_type": "\\ud800"}', "not valid JSON"),
    "latin": (b'{"a": "\xe9"}', "not valid JSON"),
    "utf16": ('{"a": 1}'.encode("utf-16"), "not valid JSON"),
    "huge": (b" " * (2**20 + 1), "1048577 bytes, and at most"),
}


@pytest.mark.parametrize("name", JSON)
def test_bad_json(adapter, name):
    data, message = JSON[name]
    (adapter / CONFIG_NAME).write_bytes(data)
    start = time.process_time()
    with pytest.raises(AdapterCheckError, match=message):
        check_adapter(adapter)
    assert time.process_time() - start < 2


def test_json_that_is_fine(tmp_path):
    value = {"a": ["[{" * 50, 1, -2.5e-3, None, True, "\\", '"', "日本", "\U0001f600"], "b": {"c": {}}}
    for ascii_only in (True, False):
        (tmp_path / "x.json").write_text(json.dumps(value, ensure_ascii=ascii_only), encoding="utf-8")
        assert read_json(tmp_path / "x.json") == value


def test_pipe_is_not_waited_for(adapter):
    (adapter / CONFIG_NAME).unlink()
    os.mkfifo(adapter / CONFIG_NAME)
    with pytest.raises(AdapterCheckError, match="not a regular file"):
        check_adapter(adapter)


# Header of the weights


def _first(header):
    return header[min(name for name in header if name.endswith(".A"))]


def _grow(header):
    """A shape of petabytes, with offsets that agree."""
    entry = _first(header)
    entry["shape"] = [2**40, 2**10]
    entry["data_offsets"][1] = entry["data_offsets"][0] + 2**52


def _overlap(header):
    first, second = sorted(header.values(), key=lambda entry: entry.get("data_offsets", [0])[0])[1:3]
    size = second["data_offsets"][1] - second["data_offsets"][0]
    second["data_offsets"] = [first["data_offsets"][0], first["data_offsets"][0] + size]


NOT_SAFETENSORS = "truncated or not a safetensors file"
HEADERS = {
    "huge_shape": (_grow, NOT_SAFETENSORS),
    "shape_without_bytes": (lambda h: _first(h).update(shape=[4, 33]), NOT_SAFETENSORS),
    "overlap": (_overlap, NOT_SAFETENSORS),
    "hole": (lambda h: h.pop(next(iter(h))) and h.pop(next(iter(h))), NOT_SAFETENSORS),
    "negative": (lambda h: _first(h).update(shape=[-4, -32]), NOT_SAFETENSORS),
    "float_shape": (lambda h: _first(h).update(shape=[4.0, 32]), NOT_SAFETENSORS),
    "bool_shape": (lambda h: _first(h).update(shape=[True, 128]), NOT_SAFETENSORS),
    "shape_of_others": (lambda h: _first(h).update(shape=[1] * 1000), NOT_SAFETENSORS),
    "many_dimensions": (lambda h: _first(h).update(shape=[1] * 7 + _first(h)["shape"]), "at most 8 dimensions"),
    "offsets": (lambda h: _first(h).update(data_offsets=[0]), NOT_SAFETENSORS),
    "unknown_type": (lambda h: _first(h).update(dtype="F31"), NOT_SAFETENSORS),
    "type_is_list": (lambda h: _first(h).update(dtype=["F32"]), NOT_SAFETENSORS),
    "type_of_4_bits": (lambda h: _first(h).update(dtype="F4", shape=[32, 48]), "must have a type of BF16, BOOL"),
    "integers": (lambda h: _first(h).update(dtype="I32"), "has type I32, expected BF16, F16, F32, F64"),
    "extra_field": (lambda h: _first(h).update(code="x"), "must have `dtype`, `shape` and `data_offsets`"),
    "lacks_field": (lambda h: _first(h).pop("dtype"), NOT_SAFETENSORS),
    "list": (lambda h: h.update({k: list(h[k].values()) for k in h if k.endswith(".A")}), "must have `dtype`"),
    "metadata": (lambda h: h.update(__metadata__={"a": {"b": 1}}), NOT_SAFETENSORS),
    "metadata_elsewhere": (lambda h: h.update({"a": h.pop("__metadata__")}), NOT_SAFETENSORS),
    "control_characters": (lambda h: h.update({"a\nb": h.pop(max(h))}), "is not the name of a tensor"),
    "long_name": (lambda h: h.update({"a" * 513: h.pop(max(h))}), "is not the name of a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_bad_header(adapter, name):
    change, message = HEADERS[name]
    set_header(adapter, change)
    with pytest.raises(AdapterCheckError, match=message):
        check_adapter(adapter)


EMPTY = b'{"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}'
RAW_HEADERS = {
    "bomb": (b"[" * 1_000_000, NOT_SAFETENSORS),
    "list": (b"[]", NOT_SAFETENSORS),
    "many_elements": (b"[" + b"0," * 1_500_000 + b"0]", "more than 1000000 elements"),
    "many_tensors": (
        json.dumps({f"{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(50_001)}).encode(),
        "50001 tensors, more than",
    ),
    "large": (b" " * (16 * 2**20 + 1), "header of 16777217 bytes"),
    "twice": (b'{"a": %b, "a": %b}' % (EMPTY, EMPTY), "key 'a' occurs twice"),
    "pickle": (pickle.dumps({"a": 1}), NOT_SAFETENSORS),
}


@pytest.mark.parametrize("name", RAW_HEADERS)
def test_bad_raw_header(adapter, name):
    data, message = RAW_HEADERS[name]
    write_weights(adapter, data, b"")
    start, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AdapterCheckError, match=message):
        check_adapter(adapter)
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 500_000  # KiB


def test_header_larger_than_the_file(adapter):
    (adapter / WEIGHTS_NAME).write_bytes(b"\xff" * 8 + b"{}")
    with pytest.raises(AdapterCheckError, match="truncated or not a safetensors file"):
        check_adapter(adapter)


# Names, shapes and values


def _rename(old, new):
    return lambda tensors: tensors.update({key_of(tensors, old)[: -len(old)] + new: tensors.pop(key_of(tensors, old))})


def _reshape(ending, *shape):
    return lambda tensors: tensors.update({key_of(tensors, ending): torch.ones(*shape)})


def _add(name, *shape):
    return lambda tensors: tensors.update({name: torch.ones(*shape)})


LAYER = "base_model.model.model.layers.0.mlp.down_proj"
# name: adapter, change of its tensors, error
TENSORS = {
    **{
        f"without_{role}": (
            "softmax",
            lambda tensors, role=role: tensors.pop(key_of(tensors, f".{role}")),
            rf"it lacks {LAYER}.rlora_adapters.{role}\.",
        )
        for role in ("A", "B", "router", "A0", "B0")
    },
    "renamed": ("softmax", _rename(".router", ".gate"), "it lacks .*router"),
    "unknown_role": ("softmax", _add(f"{LAYER}.rlora_adapters.C", 2), "it has .*rlora_adapters.C, which an adapter"),
    "rank": ("softmax", _reshape(".A", 5, 48), r"down_proj.rlora_adapters.A has shape \[5, 48\], expected \[4, 48\]"),
    "heads": ("softmax", _reshape(".B", 4, 32, 4), r"B has shape \[4, 32, 4\], expected \[3, 32, 4\]"),
    "flat": ("softmax", _reshape(".B", 384), r"B has shape \[384\], expected \[3, \?, 4\]"),
    "scalar": ("softmax", lambda t: t.update({key_of(t, ".A"): torch.tensor(1.0)}), r"A has shape \[\]"),
    "router_width": ("softmax", _reshape(".router", 3, 47), r"router has shape \[3, 47\], expected \[3, 48\]"),
    "anchor": ("softmax", _reshape(".B0", 4, 32), r"B0 has shape \[4, 32\], expected \[32, 4\]"),
    "anchor_of_zero_b": ("zero_b", _add(f"{LAYER}.rlora_adapters.A0", 4, 48), "it has .*A0, which"),
    "router_of_uniform": ("uniform", _add(f"{LAYER}.rlora_adapters.router", 3, 48), "it has .*router, which"),
    "tasks": ("task", _reshape(".router", 3, 3), r"router has shape \[3, 3\], expected \[2, 3\]"),
    "shared_a": ("own_a", _reshape(".A", 4, 48), r"A has shape \[4, 48\], expected \[3, 4, 48\]"),
    "rank_pattern": ("ranks", _reshape(".A", 4, 48), r"A has shape \[4, 48\], expected \[2, 48\]"),
    "unexplained": ("softmax", _add("base_model.model.model.norm.weight", 32), "nothing in its configuration"),
    "foreign_bias": ("own_biases", _add("base_model.model.transformer.ln_f.bias", 32), "nothing in its configuration"),
    "without_prefix": ("softmax", _add("model.norm.weight", 32), "names must begin with base_model.model."),
    "only_others": ("modules", lambda t: [t.pop(k) for k in list(t) if "rlora_" in k], "no tensors of R-LoRA"),
    "lora": (
        "softmax",
        lambda t: t.update({k.replace("rlora_adapters.A", "lora_A.weight"): t.pop(k) for k in list(t)}),
        "it lacks",
    ),
    "another_layer": (
        "softmax",
        lambda t: t.update({k.replace("down_proj", "o_proj"): t[k].clone() for k in list(t) if "down_proj" in k}),
        "layer 'model.layers.0.mlp.o_proj', which `target_modules`",
    ),
    "no_module": ("modules", lambda t: t.pop(key_of(t, "lm_head.weight")), "no tensors for `modules_to_save=") ,
    "token_rows": ("tokens", _reshape("trainable_tokens_delta", 3, 32), r"\[3, 32\], which nothing in its config"),
    "nan": ("softmax", lambda t: t[key_of(t, ".B0")].view(-1)[7:8].fill_(float("nan")), "NaN or infinity in .*B0"),
    "infinity": ("modules", lambda t: t[key_of(t, "lm_head.weight")].fill_(float("inf")), "NaN.*lm_head"),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_bad_tensors(originals, tmp_path, name):
    original, change, message = TENSORS[name]
    folder = shutil.copytree(originals(original), tmp_path / "adapter")
    set_tensors(folder, change)
    with pytest.raises(AdapterCheckError, match=message):
        check_adapter(folder)


def test_config_of_another_adapter(originals, adapter):
    shutil.copy(originals("own_a") / CONFIG_NAME, adapter)
    with pytest.raises(AdapterCheckError, match=r"A has shape \[4, .*expected \[3, 4, .*another adapter's"):
        check_adapter(adapter)


def test_rank_larger_than_the_layer(tmp_path):
    """The tuner gives such a layer the largest rank that it allows, here 3, and so must its file."""
    stem = "base_model.model.x.rlora_adapters."
    RLoraConfig(r=4, target_modules=["x"], router="uniform", init_weights="zero_a").save_pretrained(tmp_path)
    save_file({stem + "A": torch.ones(4, 6), stem + "B": torch.ones(3, 3, 4)}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(AdapterCheckError, match=r"A has shape \[4, 6\], expected \[3, 6\]"):
        check_adapter(tmp_path)
    save_file({stem + "A": torch.ones(3, 6), stem + "B": torch.ones(3, 3, 3)}, tmp_path / WEIGHTS_NAME)
    assert check_adapter(tmp_path).num_parameters == 3 * 6 + 3 * 3 * 3


def test_embeddings_must_be_announced(adapter):
    """Loading would overwrite those of the base. PEFT saves them if the vocabulary was resized."""
    set_tensors(adapter, _add("base_model.model.model.embed_tokens.weight", 90, 32))
    with pytest.raises(AdapterCheckError, match=r'embed_tokens.weight.*"saved_embeddings": \["model.embed_tokens"\]'):
        check_adapter(adapter)
    set_config(adapter, saved_embeddings=["model.embed_tokens"])
    assert check_adapter(adapter).num_parameters > 90 * 32


# Exports


UNUSUAL = {
    "replication": ({"layer_replication": [[0, 1]] * 1000}, "sets layer_replication, which an export never does"),
    "pissa": ({"init_lora_weights": "pissa"}, "sets init_lora_weights, which"),
    "parameters": ({"target_parameters": ["experts.(w+)+"]}, "`target_parameters`.*must have names of modules"),
    "expression": ({"target_modules": "(a+)(?#)+b"}, "`target_modules`.*must have names of modules"),
    "pattern": ({"rank_pattern": {"(a+)+b": 4}}, "`rank_pattern`.*must have names of modules"),
    "many": ({"alpha_pattern": {f"x{i}": 4 for i in range(600)}}, "600 names, more than 500"),
    "code": ({"megatron_config": {"a": 1}}, "name code to import"),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_exports_only_do_what_exports_do(tmp_path, name):
    changes, message = UNUSUAL[name]
    LoraConfig(target_modules=["up_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    assert read_lora_config(tmp_path / CONFIG_NAME)["target_modules"] == ["up_proj"]
    set_config(tmp_path, **changes)
    with pytest.raises(AdapterCheckError, match=message):
        read_lora_config(tmp_path / CONFIG_NAME)


# Files


class Planted:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickle_is_never_executed(adapter, tmp_path):
    witness = tmp_path / "executed"
    payload = pickle.dumps(Planted(witness))
    whole = (adapter / WEIGHTS_NAME).read_bytes()
    (adapter / "adapter_model.bin").write_bytes(payload)
    with pytest.raises(AdapterCheckError, match="adapter_model.bin.*may run code"):
        check_adapter(adapter)
    (adapter / WEIGHTS_NAME).unlink()
    with pytest.raises(AdapterCheckError, match="only as adapter_model.bin, a pickle"):
        check_adapter(adapter)
    (adapter / "adapter_model.bin").unlink()
    for disguised in (payload, struct.pack("<Q", len(payload)) + payload, whole + payload):
        (adapter / WEIGHTS_NAME).write_bytes(disguised)
        with pytest.raises(AdapterCheckError, match="safetensors"):
            check_adapter(adapter)
    assert not witness.exists()
    # The payload does work where something unpickles it.
    pickle.loads(payload).close()
    assert witness.exists()


@pytest.mark.parametrize("name", ["modeling.py", "README.MD", "figures/x.pkl", "exports/a/adapter_model.bin"])
def test_hostile_file(adapter, name):
    (adapter / name).parent.mkdir(parents=True, exist_ok=True)
    (adapter / name).write_text("")
    with pytest.raises(AdapterCheckError, match=f"{name}.*Nothing was loaded"):
        check_adapter(adapter)


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_missing_file(adapter, name):
    (adapter / name).unlink()
    with pytest.raises(AdapterCheckError, match=f"has no {name}"):
        check_adapter(adapter)


def test_no_folder(tmp_path):
    with pytest.raises(AdapterCheckError, match="is not a folder"):
        check_adapter(tmp_path / "nothing")


def test_link_to_a_secret(adapter, tmp_path):
    (adapter / CONFIG_NAME).rename(tmp_path / "secret")
    os.symlink(tmp_path / "secret", adapter / CONFIG_NAME)
    with pytest.raises(AdapterCheckError, match="is a link to"):
        check_adapter(adapter)


def test_snapshot_in_the_cache_passes(adapter, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    for i, path in enumerate(sorted(adapter.iterdir())):
        shutil.move(path, tmp_path / "models--a--b" / "blobs" / str(i))
        os.symlink(f"../../blobs/{i}", snapshot / path.name)
    assert len(check_adapter(snapshot).layers) == 6


def test_figure_that_is_none(adapter):
    (adapter / "figures").mkdir()
    (adapter / "figures" / "routing.png").write_text("<svg onload='x()'>")
    with pytest.raises(AdapterCheckError, match="not a PNG"):
        check_adapter(adapter)


def test_tokenizer_with_code(adapter):
    (adapter / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Tokenizer", null]}}')
    with pytest.raises(AdapterCheckError, match="auto_map"):
        check_adapter(adapter)


LISTING = {CONFIG_NAME: 800, WEIGHTS_NAME: 10**8, CARD_NAME: None, "figures/routing.png": 10**5}


def test_listing():
    others = {"trainer_state.json": 10**12, ".gitattributes": 1, "notes/x.txt": 5}
    assert check_listing({**LISTING, **others}) == sorted(LISTING)


LISTINGS = {
    "pickle": ({"training_args.bin": 5000}, "training_args.bin.*may run code"),
    "traversal": ({"../../.bashrc": 5}, "bashrc"),
    "case": ({"readme.md": 5}, "readme.md"),
    "config_size": ({CONFIG_NAME: 10**9}, "adapter_config.json has 1000000000 bytes"),
    "weights_size": ({WEIGHTS_NAME: 10**15}, "adapter_model.safetensors has 1000000000000000 bytes"),
    "negative_size": ({CARD_NAME: -1}, "README.md has -1 bytes"),
    "size_is_text": ({CARD_NAME: "1"}, "README.md has 1 bytes"),
    "export_size": ({"exports/a/adapter_config.json": 10**9}, "exports/a/adapter_config.json has"),
    "count": ({f"{i}.txt": 1 for i in range(5001)}, "5005 files"),
    "one_file_on_some_systems": ({"figures/A.png": 1, "figures/a.png": 1}, "both figures/A.png and figures/a.png"),
}


@pytest.mark.parametrize("name", LISTINGS)
def test_bad_listing(name):
    added, message = LISTINGS[name]
    with pytest.raises(AdapterCheckError, match=message):
        check_listing({**LISTING, **added})


def test_listing_with_a_pickle_for_weights():
    with pytest.raises(AdapterCheckError, match="only as adapter_model.bin, a pickle.*save it as adapter_model.safe"):
        check_listing({CONFIG_NAME: 800, "adapter_model.bin": 10**6})


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_listing_without(name):
    with pytest.raises(AdapterCheckError, match=f"has no {name}"):
        check_listing({path: size for path, size in LISTING.items() if path != name})


# Card


FRONT = "---\nbase_model: a/b\ntags:\n- x\n---\n"
BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n"
CARDS = {
    "alias": (f"---\n{BOMB}---\n", "line 2, is not YAML of plain values.*anchor"),
    "deep": ("---\na: " + "[" * 1000 + "]" * 1000 + "\n---\n", "nested more than|not YAML"),
    "python": ("---\na: !!python/object/apply:os.system ['true']\n---\n", "a tag"),
    "not_yaml": ("---\na: [\n---\n", "not YAML"),
    "no_dictionary": ("---\n- a\n---\n", "must be a mapping"),
    "long_metadata": ("---\na: " + "x" * 2**21 + "\n---\n", "metadata of 2097155"),
    "long": ("x" * (2**22 + 1), "4194305 bytes"),
}


@pytest.mark.parametrize("name", CARDS)
def test_bad_card(adapter, name):
    text, message = CARDS[name]
    (adapter / CARD_NAME).write_text(text, encoding="utf-8")
    with pytest.raises(AdapterCheckError, match=message):
        check_adapter(adapter)


def test_card_that_is_not_text(adapter):
    (adapter / CARD_NAME).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AdapterCheckError, match="not text in UTF-8"):
        check_adapter(adapter)


@pytest.mark.parametrize(
    "text",
    [
        "# No metadata",
        FRONT + "Use `on = 1`, x < y and online=True.\n<!-- comment --> <b>bold</b>",
        FRONT + "<script>the Hub removes it</script>",
        FRONT + '<p align="center"><img src="figures/routing.png" alt="on tasks"></p>\n[a](https://x.org/?on=1)',
        "---\nmodel-index: nonsense\n---\ntext",
    ],
)
def test_card_that_is_fine(adapter, text):
    (adapter / CARD_NAME).write_text(text)
    check_adapter(adapter)


@pytest.mark.parametrize("part", ["---\n", "a: &a [*a]\n", "<a x='"])
def test_card_is_read_in_linear_time(adapter, part):
    (adapter / CARD_NAME).write_text((FRONT + part * (2**20 // len(part)))[: 2**20])
    start = time.process_time()
    check_adapter(adapter)
    assert time.process_time() - start < 5


# Base model and record


def write_record(folder, **fields):
    (folder / RECORD_NAME).write_text(json.dumps({"format": 1, **fields}))


def test_record_is_read(adapter):
    write_record(adapter, base_model=BASE, base_model_revision=COMMIT, tasks=[{"name": "sst2"}])
    checked = check_adapter(adapter, base_model=BASE)
    assert [task.name for task in checked.record.tasks] == ["sst2"]
    assert (checked.base_model, checked.base_model_revision) == (BASE, COMMIT)


def test_other_base_model(adapter):
    with pytest.raises(AdapterCheckError, match=f"trained on '{BASE}', and is being loaded on 'other/model'"):
        check_adapter(adapter, base_model="other/model")


def test_base_model_in_a_folder(adapter, tmp_path):
    """A folder may hold any model, so it is not compared."""
    check_adapter(adapter, base_model=str(tmp_path))
    set_config(adapter, base_model_name_or_path=str(tmp_path))
    check_adapter(adapter, base_model=BASE)


def test_record_of_another_adapter(adapter):
    write_record(adapter, base_model="other/model")
    with pytest.raises(
        AdapterCheckError, match=f"on {BASE} by its adapter_config.json, and on other/model by its rlora_"
    ):
        check_adapter(adapter)


RECORDS = {
    "newer_format": ({"format": 2}, "`format` is 2.*newer rlora_trl"),
    "wrong_type": ({"tasks": "sst2"}, "tasks"),
    "huge_version": ({"versions": {"rlora_trl": 3}}, "versions"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_bad_record(adapter, name):
    changes, message = RECORDS[name]
    write_record(adapter, **changes)
    with pytest.raises(AdapterCheckError, match=f"{RECORD_NAME} is not a record.*{message}"):
        check_adapter(adapter)


def test_record_of_a_newer_package_warns(adapter):
    write_record(adapter, versions={"rlora_trl": "999.1.0"})
    with pytest.warns(UserWarning, match="written by rlora_trl '999.1.0'"):
        check_adapter(adapter)


# Exports


@pytest.fixture
def exported(adapter):
    save(adapter / "exports" / "sst2", "llama", LoraConfig(r=8, target_modules=["down_proj"], task_type="CAUSAL_LM"))
    return adapter


def test_export_passes(exported):
    check_adapter(exported)


EXPORTED = {
    "type": (lambda folder: set_config(folder, peft_type="RLORA"), "`peft_type` 'RLORA', and LORA is expected"),
    "import": (lambda folder: set_config(folder, megatron_config={"a": 1}), "name code to import"),
    "import_core": (lambda folder: set_config(folder, megatron_core="evil"), "name code to import"),
    "mapping": (lambda folder: set_config(folder, auto_mapping={"parent_library": "evil"}), "would import"),
    "rank": (lambda folder: set_config(folder, r=4), "with r of 4"),
    "name": (lambda folder: set_tensors(folder, _rename(".lora_A.weight", ".lora_E.weight")), "tensor .*lora_E"),
    "half": (lambda folder: set_tensors(folder, lambda t: t.pop(key_of(t, "lora_B.weight"))), "expected `lora_A`"),
    "nan": (lambda folder: set_tensors(folder, lambda t: t[min(t)].fill_(float("nan"))), "NaN"),
    "no_weights": (lambda folder: (folder / WEIGHTS_NAME).unlink(), "can't be read"),
    "no_config": (lambda folder: (folder / CONFIG_NAME).unlink(), "has no adapter_config.json in its folder"),
    "card": (lambda folder: (folder / CARD_NAME).write_text("---\na: [\n---\n"), "not YAML"),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPORTED)
def test_bad_export(exported, name):
    change, message = EXPORTED[name]
    change(exported / "exports" / "sst2")
    with pytest.raises(AdapterCheckError, match=message):
        check_adapter(exported)


# Digest


def test_digest_does_not_depend_on_the_file(adapter, tmp_path):
    tensors = load_file(adapter / WEIGHTS_NAME)
    digest = adapter_digest(tensors)
    assert digest.startswith("sha256:") and len(digest) == 71
    save_file(dict(reversed(tensors.items())), tmp_path / "a.safetensors", metadata={"a": "b"})
    header, body = split_weights(adapter)
    entries = [item for item in json.loads(header).items() if item[0] != "__metadata__"]
    order = {}  # the same tensors the other way round
    blob = b""
    for name, entry in reversed(entries):
        start, end = entry["data_offsets"]
        order[name] = {**entry, "data_offsets": [len(blob), len(blob) + end - start]}
        blob += body[start:end]
    write_weights(adapter, order, blob)
    assert adapter_digest(tmp_path / "a.safetensors") == adapter_digest(str(adapter)) == digest
    assert check_adapter(adapter).digest == digest


def _flip_bit(tensors):
    tensors["b"].view(torch.int16)[1] ^= 1


CHANGES = {
    "bit": _flip_bit,
    "name": lambda t: t.update(c=t.pop("b")),
    "shape": lambda t: t.update(a=t["a"].reshape(2, 3)),
    "dtype": lambda t: t.update(b=t["b"].view(torch.float16)),
    "swapped": lambda t: t.update(a=t["d"], d=t["a"]),
    "missing": lambda t: t.pop("s"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_digest_depends_on(name):
    def tensors():
        return {
            "a": torch.arange(6.0),
            "b": torch.arange(6).bfloat16(),
            "d": torch.zeros(6),
            "s": torch.tensor(2.0),
            "t": torch.arange(6.0).reshape(2, 3).T,
        }

    changed = tensors()
    CHANGES[name](changed)
    assert adapter_digest(tensors()) == adapter_digest(tensors())
    assert adapter_digest(changed) != adapter_digest(tensors())


# Damage at random


def mutate(data, header_size, draw):
    """Flip, overwrite, delete or insert in the header, or truncate anywhere."""
    data = bytearray(data)
    kind = draw.choice(("flip", "byte", "delete", "insert", "truncate", "copy"))
    at = draw.randrange(8 + header_size)
    if kind == "flip":
        data[at] ^= 1 << draw.randrange(8)
    elif kind == "byte":
        data[at] = draw.randrange(256)
    elif kind == "delete":
        del data[at : at + draw.randrange(1, 40)]
    elif kind == "insert":
        data[at:at] = draw.choice((b"9", b"[", b"{", b'"', b"-", b"\\", b"\0", b"e9", b"\xff" * 9))
    elif kind == "copy":
        other = draw.randrange(8 + header_size)
        data[at : at + 30] = data[other : other + 30]
    else:
        del data[draw.randrange(len(data)) :]
    return bytes(data)


@pytest.mark.parametrize("seed", range(4))
def test_random_damage_to_the_weights(adapter, seed):
    draw = random.Random(seed)
    whole = (adapter / WEIGHTS_NAME).read_bytes()
    digest = adapter_digest(adapter)
    refused = 0
    start = time.process_time()
    for _ in range(75):
        (adapter / WEIGHTS_NAME).write_bytes(mutate(whole, len(split_weights_of(whole)), draw))
        try:
            assert check_adapter(adapter).digest == digest
        except AdapterCheckError as error:
            assert len(str(error)) < 3000
            refused += 1
    assert refused > 60
    assert time.process_time() - start < 30


def split_weights_of(data):
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [CONFIG_NAME, CARD_NAME, RECORD_NAME])
def test_random_damage_to_other_files(adapter, name):
    """Some damage is not visible, as in the text of a card; it must then leave the weights alone."""
    write_record(adapter, base_model=BASE, tasks=[{"name": "sst2", "metrics": {"accuracy": 0.5}}])
    draw = random.Random(0)
    whole = (adapter / name).read_bytes()
    digest = adapter_digest(adapter)
    start = time.process_time()
    for _ in range(150):
        (adapter / name).write_bytes(mutate(whole, len(whole) - 8, draw))
        try:
            assert check_adapter(adapter).digest == digest
        except AdapterCheckError:
            pass
    assert time.process_time() - start < 30
