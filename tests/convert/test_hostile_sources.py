"""Sources of the authors' code that are damaged, hostile or incomplete: refused with the reason, nothing written."""

import json
import os
import re

import pytest
import torch
from authors_code import PREFIX, authors_model, save, state, tiny_base

from rlora_trl.convert import convert_adapter
from rlora_trl.reading import AdapterCheckError


LAYER = f"{PREFIX}model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def reference():
    return authors_model(tiny_base(), num_heads=3)


@pytest.fixture
def source(reference, tmp_path):
    return save(tmp_path / "source", reference)


def refused(source, message, **arguments):
    target = source.parent / "out"
    with pytest.raises(AdapterCheckError, match=message):
        convert_adapter(source, target, **{"source_format": "hydralora", **arguments})
    assert [path.name for path in source.parent.iterdir()] == [source.name]


def change(source, **fields):
    path = source / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


class Runs:
    def __reduce__(self):
        return os.system, ("true",)


def replaced(name, value):
    return lambda tensors: {**tensors, f"{LAYER}.{name}.weight": value}


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != f"{LAYER}.{name}.weight"}


def added(name, value):
    return lambda tensors: {**tensors, name: value}


@pytest.mark.parametrize(
    "changed, message",
    [
        (without("lora_B1"), r"lacks lora_B1 in the layer 'model.layers.0.mlp.up_proj', and with `lora_nums=3`"),
        (without("lora_route"), "lacks lora_route in the layer"),
        (without("lora_A"), "lacks lora_A in the layer"),
        (added(f"{LAYER}.lora_B3.weight", torch.zeros(48, 4)), "has lora_B3 besides"),
        (added(f"{LAYER}.lora_B01.weight", torch.zeros(48, 4)), "has lora_B01 besides"),
        (added(f"{LAYER}.lora_B.weight", torch.zeros(48, 4)), "names in a file of the authors' code are"),
        (added(f"{LAYER}.bias", torch.zeros(48)), r"has the tensor '.*up_proj.bias', and names"),
        (added(f"{PREFIX}lm_head.weight", torch.zeros(80, 32)), r"has the tensor '.*lm_head.weight', and names"),
        (added("model.lora_A.weight", torch.zeros(4, 32)), "names must begin with base_model.model."),
        (added(f"{PREFIX}{'x' * 300}.lora_A.weight", torch.zeros(4, 32)), "of 300 characters"),
        (replaced("lora_A", torch.zeros(3, 32)), r"lora_A of shape \[3, 32\].*it must be \[4, 32\]"),
        (replaced("lora_A", torch.zeros(4, 31)), r"lora_route of shape \[3, 32\].*it must be \[3, 31\]"),
        (replaced("lora_A", torch.zeros(4)), r"lora_A of shape \[4\]"),
        (replaced("lora_route", torch.zeros(2, 32)), r"lora_route of shape \[2, 32\].*it must be \[3, 32\]"),
        (replaced("lora_B2", torch.zeros(40, 4)), r"lora_B2 of shape \[40, 4\].*it must be \[48, 4\]"),
        (replaced("lora_B0", torch.zeros(0, 4)), r"lora_B0 of shape \[0, 4\]"),
        (lambda tensors: {name: torch.zeros(0) for name in tensors}, "empty tensors.*zero_to_fp32.py"),
        (replaced("lora_B1", torch.full((48, 4), torch.nan)), "holds NaN or infinity in .*up_proj.lora_B1.weight"),
        (replaced("lora_A", torch.full((4, 32), torch.inf)), "holds NaN or infinity in .*lora_A.weight"),
        (replaced("lora_A", torch.zeros(4, 32, dtype=torch.long)), "imports 'torch.LongStorage'"),
        (replaced("lora_A", torch.zeros(1, 1).expand(4, 32)), r"is not contiguous: it has strides \[0, 0\]"),
        (replaced("lora_A", torch.zeros(1).expand(2**20, 2**20)), "is not contiguous"),
        (replaced("lora_A", Runs()), r"imports '(posix|nt)\.system'.*Nothing was executed"),
        (replaced("lora_A", torch.zeros(4, 32).to_sparse()), "imports 'torch._utils._rebuild_sparse_tensor'"),
        (replaced("lora_A", torch.zeros(4, 32, device="meta")), "imports 'torch._utils._rebuild_meta_tensor"),
    ],
)
def test_tensors(reference, source, changed, message):
    torch.save(changed(state(reference)), source / "adapter_model.bin")
    refused(source, message)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"lora_nums": 4}, "lacks lora_B3"),
        ({"lora_nums": 2}, "has lora_B2 besides"),
        ({"lora_nums": None}, "has no `lora_nums`"),
        ({"lora_nums": 10**9}, "`lora_nums` 1000000000, and a number of heads from 1 to 4096"),
        ({"lora_nums": "3"}, "`lora_nums` '3'"),
        ({"r": 8}, r"with `r=8`.*it must be \[8, 32\]"),
        ({"r": 10**9}, "`r` must be from 1 to 16384"),
        ({"r": None}, "has no `r`"),
        ({"lora_alpha": None}, "has no `lora_alpha`"),
        ({"lora_alpha": 1e9}, "`lora_alpha` must be from"),
        ({"lora_dropout": 1.0}, r"`lora_dropout` 1.0, and a number in \[0, 1\)"),
        ({"lora_dropout": "x"}, "`lora_dropout` 'x'"),
        ({"bias": "all"}, "sets `bias='all'`.*trained biases"),
        ({"modules_to_save": ["lm_head"]}, "sets `modules_to_save=.*trained whole modules"),
        ({"enable_lora": [True, False, True]}, "sets `enable_lora=.*fused q, k and v"),
        ({"fan_in_fan_out": True}, "sets `fan_in_fan_out=True`"),
        ({"use_dora": True}, "sets `use_dora=True`.*the authors' code has no such field"),
        ({"peft_type": "RLORA"}, "`peft_type` 'RLORA', and LORA is expected.*needs no conversion"),
        ({"auto_mapping": {"parent_library": "os", "base_model_class": "system"}}, "PEFT would import what it names"),
        ({"base_model_name_or_path": "x" * 600}, "must be printable text of at most 512 characters"),
    ],
)
def test_configuration(source, fields, message):
    change(source, **fields)
    refused(source, message)


def test_folders(source, tmp_path):
    weights, config = source / "adapter_model.bin", source / "adapter_config.json"
    (source / "adapter_model.safetensors").write_bytes(b"")
    refused(source, "has both adapter_model.safetensors and adapter_model.bin, and one of them is expected")
    (source / "adapter_model.safetensors").unlink()
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(source, "truncated, or has something behind its end")
    weights.unlink()
    refused(source, "has neither adapter_model.safetensors nor adapter_model.bin")
    config.write_text("{")
    refused(source, "is not valid JSON")
    config.unlink()
    refused(source, "has no adapter_config.json: pass the folder that the adapter was saved in")
    (source / "sft_lora_model").mkdir()
    refused(source, rf"has no adapter_config.json: pass {re.escape(str(source / 'sft_lora_model'))}\.")
    with pytest.raises(AdapterCheckError, match="user/adapter is not a folder.*hf download"):
        convert_adapter("user/adapter", tmp_path / "out")


def test_a_rank_that_is_larger_than_the_layer(tmp_path):
    source = save(tmp_path / "source", authors_model(tiny_base(), r=40))
    refused(source, "has rank 40 in the layer .* of 32 inputs and 48 outputs")
