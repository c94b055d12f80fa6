"""Configurations: defaults of the contract, one clear error for each bad value, and files from other versions."""

import json
import math

import pytest
from peft import PeftConfig

from rlora_trl import RLoraConfig


def test_defaults():
    config = RLoraConfig()
    assert (config.r, config.num_heads, config.lora_alpha, config.use_rslora) == (4, 3, 32, True)
    assert (config.head_dropout, config.dropout_position) == (0.0, "head")
    assert (config.init_weights, config.init_gamma) == ("rlora", 64)
    assert (config.router, config.router_init, config.router_top_k, config.share_a) == ("softmax", "zeros", None, True)
    assert config.tasks is None and config.target_modules is None
    assert config.scaling() == 32 / math.sqrt(4)
    assert RLoraConfig(use_rslora=False).scaling() == 8


@pytest.mark.parametrize(
    ("kwargs", "received", "remedy"),
    [
        ({"r": 0}, "got 0", "Set `r=4`"),
        ({"r": 2.5}, "got 2.5", "Set `r=4`"),
        ({"num_heads": 0}, "got 0", "Set `num_heads=4`"),
        ({"rank_pattern": {"down_proj": 0}}, "rank_pattern\\['down_proj'\\]", "exclude_modules"),
        ({"head_dropout": 1.0}, "got 1.0", "Set it to 0"),
        ({"head_dropout": -0.1}, "got -0.1", "Set it to 0"),
        ({"head_dropout": float("nan")}, "got nan", "Set it to 0"),
        ({"init_gamma": 0.0}, "got 0.0", "64"),
        ({"router": "sigmoid"}, "'softmax', 'top_k', 'task', 'uniform', got 'sigmoid'", "Set `router='softmax'`"),
        ({"router_init": "ones"}, "got 'ones'", "Set `router_init='zeros'`"),
        ({"dropout_position": "output"}, "got 'output'", "Set `dropout_position='head'`"),
        ({"init_weights": "gaussian"}, "got 'gaussian'", "Set `init_weights='rlora'`"),
        ({"init_weights": True}, "got True", "Set `init_weights='rlora'`"),
        ({"init_weights": 0}, "got 0", "Set `init_weights='rlora'`"),
        ({"bias": "lora_only"}, "got 'lora_only'", "Set `bias='none'`"),
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, "all-linear", "regular expression"),
        ({"target_modules": ["a"], "layers_pattern": "layers"}, "layers_to_transform", "indices"),
    ],
)
def test_bad_values(kwargs, received, remedy):
    with pytest.raises(ValueError, match=received) as error:
        RLoraConfig(**kwargs)
    assert remedy in str(error.value)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rank_pattern": [1]}, "`rank_pattern` must be a dictionary.*got .1."),
        ({"alpha_pattern": {"a": "b"}}, "`alpha_pattern.'a'.` must be a number, got 'b'"),
        ({"share_a": "no"}, "`share_a` must be True or False, got 'no'"),
        ({"use_rslora": "false"}, "`use_rslora` must be True or False, got 'false'"),
        ({"use_rslora": None}, "`use_rslora` must be True or False, got None"),
        ({"fan_in_fan_out": 1}, "`fan_in_fan_out` must be True or False, got 1"),
        ({"lora_alpha": "x"}, "`lora_alpha` must be a number, got 'x'"),
        ({"head_dropout": "0.1"}, "`head_dropout` must be a number, got '0.1'"),
    ],
)
def test_bad_types(kwargs, message):
    with pytest.raises(TypeError, match=message):
        RLoraConfig(**kwargs)


def test_no_patterns_and_first_layer():
    assert RLoraConfig(rank_pattern=None, alpha_pattern=None).rank_pattern == {}
    assert RLoraConfig(target_modules=["a"], layers_to_transform=0, layers_pattern="layers").layers_to_transform == 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"router": "top_k"}, "from 2 to `num_heads - 1` = 2, got None"),
        ({"router": "top_k", "router_top_k": 4}, "= 2, got 4"),
        ({"router": "top_k", "router_top_k": 3}, "for all heads set `router='softmax'`"),
        ({"router": "top_k", "router_top_k": 1}, "A single head would always weigh 1"),
        ({"router": "top_k", "router_top_k": True}, "got True"),
        ({"router": "top_k", "router_top_k": 2}, "Set `router_init='kaiming_uniform'`"),
        ({"router_top_k": 2}, "belongs to `router='top_k'`, but `router` is 'softmax'"),
        ({"tasks": ["a", "b", "a"]}, "names 'a' more than once"),
    ],
)
def test_fields_that_do_not_go_together(kwargs, message):
    with pytest.raises(ValueError, match=message):
        RLoraConfig(**kwargs)


@pytest.mark.parametrize("tasks", ["sst2", [1, 2], [""]])
def test_tasks_are_names(tasks):
    with pytest.raises(TypeError, match="`tasks` must be a list of names"):
        RLoraConfig(tasks=tasks)


@pytest.mark.parametrize("router", ["softmax", "task"])
def test_one_head_has_nothing_to_route(router):
    with pytest.warns(UserWarning, match="parameters of `router='.*'` get no gradient"):
        RLoraConfig(num_heads=1, router=router)


def test_the_papers_settings():
    config = RLoraConfig.paper(r=8, head_dropout=0.1)
    assert (config.r, config.head_dropout, config.dropout_position) == (8, 0.1, "head")
    config = RLoraConfig.paper()
    assert (config.init_weights, config.init_gamma, config.router, config.router_init) == (
        "rlora",
        64,
        "softmax",
        "zeros",
    )
    assert (config.head_dropout, config.share_a, config.peft_type) == (0.2, True, "RLORA")


def test_presets():
    hydra, multi, moe, mtl = (
        getattr(RLoraConfig, name)(r=8) for name in ("hydra_lora", "multi_lora", "moe_lora", "mtl_lora")
    )
    for preset in (hydra, multi, moe, mtl):
        assert (preset.r, preset.init_weights, preset.dropout_position) == (8, "zero_b", "input")
        assert preset.scaling() == 32 / 8
    assert (hydra.router, hydra.router_init, hydra.share_a) == ("softmax", "kaiming_uniform", True)
    assert (multi.router, multi.share_a) == ("uniform", False)
    assert (moe.router, moe.router_top_k, moe.share_a) == ("top_k", 2, False)
    assert (mtl.router, mtl.router_init, mtl.share_a) == ("task", "kaiming_uniform", True)
    assert RLoraConfig.moe_lora(num_heads=8, router_top_k=3, head_dropout=0.1).router_top_k == 3


def test_heads_that_would_stay_identical_are_reported():
    with pytest.warns(UserWarning, match="router_init='kaiming_uniform'"):
        RLoraConfig(init_weights="zero_b", head_dropout=0.0)


def test_round_trip(tmp_path):
    config = RLoraConfig(
        r=5, num_heads=2, target_modules=["a", "b"], tasks=["x", "y"], rank_pattern={"a": 2}, init_weights=False
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, RLoraConfig)
    assert loaded == config
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "RLORA"


def test_unknown_field_from_a_newer_version_warns(tmp_path):
    RLoraConfig(r=5).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "from_the_future": 1}))
    with pytest.warns(UserWarning, match="from_the_future"):
        assert PeftConfig.from_pretrained(tmp_path).r == 5
