"""
The plugin for axolotl, with axolotl's classes where it is installed, and everywhere with a stand-in of its interface.

Axolotl needs other versions of the stack than this package; to run all tests of this file, put it, with the packages
that it imports and trl 1.9, into folders of their own and name these in PYTHONPATH.
"""

import dataclasses
import importlib
import importlib.util
import inspect
import json
import os
import sys
import types
from types import SimpleNamespace

import axolotl_stand_in
import processes
import pytest
import torch
import trl
import yaml
from packaging.version import Version
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from pydantic import ValidationError
from testing_utils import random_ids, task_rows
from transformers import AutoModelForCausalLM

from rlora_trl.files.checks import AdapterCheckError


PLUGIN = "rlora_trl.integrations.axolotl"
is_installed = importlib.util.find_spec("axolotl") is not None
needs_axolotl = pytest.mark.skipif(not is_installed, reason="needs axolotl")


@pytest.fixture(params=["stand-in", pytest.param("axolotl", marks=needs_axolotl)])
def plugin(request, monkeypatch):
    """The module of the plugin, imported with the stand-in or with axolotl."""
    if request.param == "stand-in":
        names = ("axolotl", "axolotl.integrations")
        for name in names:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, "axolotl.integrations.base", axolotl_stand_in)
    monkeypatch.delitem(sys.modules, PLUGIN, raising=False)
    yield importlib.import_module(PLUGIN)
    sys.modules.pop(PLUGIN, None)


@pytest.fixture
def settings(blocks):
    (text,) = blocks("axolotl.md", "yaml")
    return yaml.safe_load(text)


def base(model_folders):
    return AutoModelForCausalLM.from_pretrained(model_folders["llama"])


@needs_axolotl
def test_the_stand_in_is_like_axolotl():
    real = importlib.import_module("axolotl.integrations.base")
    for name, method in inspect.getmembers(axolotl_stand_in.BasePlugin, inspect.isfunction):
        assert list(inspect.signature(method).parameters.values()) == [
            parameter.replace(annotation=inspect.Parameter.empty)
            for parameter in inspect.signature(getattr(real.BasePlugin, name)).parameters.values()
        ], name
    own, fields = (
        {field.name: field.default for field in dataclasses.fields(module.AdapterCapabilities)}
        for module in (axolotl_stand_in, real)
    )
    assert own == fields


def test_settings_of_the_page(plugin, settings):
    """Axolotl finds the plugin, its settings and its adapter by the names that stand in the file."""
    (name,) = settings["plugins"]
    module, cls = name.rsplit(".", 1)
    made = getattr(importlib.import_module(module), cls)()
    module, cls = made.get_input_args().rsplit(".", 1)
    assert getattr(importlib.import_module(module), cls)(**settings).rlora == settings["rlora"]
    (capability,) = made.get_adapter_capabilities()
    assert capability.name == settings["adapter"] and not capability.lora_like and not capability.relora
    config = plugin.adapter_config(settings)
    assert (config.r, config.num_heads, config.tasks) == (4, 3, ["sst2", "rte", "trec"])
    assert [entry["path"] for entry in settings["datasets"]] == [f"{task}.jsonl" for task in config.tasks]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rlora": {"rank": 4}}, "`rlora` has 'rank', and its fields are r, num_heads"),
        ({"rlora": {"r": 0}}, "`r` must be an integer of at least 1, got 0"),
        ({"rlora": {"router": "task", "tasks": ["a"]}}, "batches of axolotl do not say which task"),
        ({"lora_r": 8}, "`lora_r` has no effect with `adapter: rlora`. Set `r` under `rlora`"),
        (
            {"lora_dropout": 0.1},
            "`lora_dropout` has no effect with `adapter: rlora`. Set `head_dropout` under `rlora`",
        ),
        ({"peft_use_rslora": False}, "`peft_use_rslora` has no effect .* Set `use_rslora` under `rlora`"),
        ({"peft_init_lora_weights": False}, "`peft_init_lora_weights` has no effect .* Set `init_weights`"),
        ({"loraplus_lr_ratio": 16.0}, "`loraplus_lr_ratio` has no effect with `adapter: rlora`. Remove it"),
        ({"peft": {"loftq_config": {"loftq_bits": 4}}}, "`peft` has no effect with `adapter: rlora`. Remove it"),
        ({"rlora": "r: 4"}, "`rlora` must be a mapping of fields of RLoraConfig, got 'r: 4'"),
        ({"rlora": 4}, "`rlora` must be a mapping of fields of RLoraConfig, got 4"),
        ({"rlora": {"tasks": "sst2"}}, "`tasks` must be a list of names, got 'sst2'"),
        ({"rlora": {"share_a": "no"}}, "`share_a` must be True or False, got 'no'"),
        ({"lora_target_linear": True}, "Set `target_modules: all-linear` under `rlora`"),
        ({"lora_mlp_kernel": True}, "`lora_mlp_kernel` has no effect with `adapter: rlora`. Remove it"),
        ({"load_in_4bit": True}, "`load_in_4bit` can't be used .* stored quantized"),
        ({"fsdp_config": {"reshard": True}}, "`fsdp_config` can't be used .* DDP or DeepSpeed"),
        ({"merge_lora": True}, "rlora export --merge"),
        ({"adapter": "lora"}, "`rlora` needs `adapter: rlora`, got `adapter: lora`"),
        (
            {"lora_modules_to_save": ["lm_head"], "rlora": {"modules_to_save": ["norm"]}},
            r"`lora_modules_to_save` is \['lm_head'\], and `modules_to_save` under `rlora` is \['norm'\]",
        ),
    ],
)
def test_refused_settings(plugin, settings, changes, message):
    with pytest.raises(ValidationError, match=message):
        plugin.RLoraArgs(**{**settings, **changes})


@pytest.mark.parametrize("named", [3, "norm", {}])
def test_modules_to_save_that_are_no_list(plugin, settings, named):
    """Refused as a setting, and not by an error of Python."""
    fields = {**settings["rlora"], "modules_to_save": named}
    with pytest.raises(ValidationError, match="`modules_to_save` under `rlora` is"):
        plugin.RLoraArgs(**{**settings, "lora_modules_to_save": ["lm_head"], "rlora": fields})


def test_modules_to_save_that_are_null(plugin, settings):
    fields = {**settings["rlora"], "modules_to_save": None}
    config = plugin.adapter_config({**settings, "lora_modules_to_save": ["lm_head"], "rlora": fields})
    assert config.modules_to_save == ["lm_head"]


def test_settings_that_agree(plugin, settings):
    """Off is off, and what R-LoRA does anyway is no conflict."""
    agreeing = {"peft_use_rslora": False, "lora_target_linear": False, "lora_mlp_kernel": False}
    fields = {**settings["rlora"], "head_dropout": 0, "use_rslora": False}
    config = plugin.adapter_config(plugin.RLoraArgs(**{**settings, **agreeing, "rlora": fields}).model_dump())
    assert config.head_dropout == 0 and config.use_rslora is False
    plugin.RLoraArgs(**{**settings, "rlora": None, "lora_fan_in_fan_out": False, "loraplus_lr_ratio": None})
    plugin.RLoraArgs(**settings, lora_dropout=0.0)  # set by axolotl


@needs_axolotl
def test_every_setting_of_lora_is_known(plugin):
    """What axolotl reads for LoRA has an effect, is refused, or belongs to what is refused."""
    from axolotl.utils.schemas.peft import LoraConfig as AxolotlLora

    effective = {"adapter", "lora_model_dir", "lora_modules_to_save", "peft_autocast_adapter_dtype"}
    with_others = {"gptq", "bnb_config_kwargs", "qlora_sharded_model_loading", "merge_method", "lora_on_cpu"}
    known = {*plugin._LORA_SETTINGS, *plugin._REFUSED, *effective, *with_others}
    assert {name for name in AxolotlLora.model_fields if name not in known} <= {"load_in_8bit", "load_in_4bit"}


def test_other_adapters_are_left_alone(plugin):
    made, cfg = plugin.RLoraPlugin(), {"adapter": "lora", "lora_r": 8, "load_in_4bit": True, "output_dir": "none"}
    assert plugin.RLoraArgs(**cfg).rlora is None
    assert made.load_adapter(None, cfg) is None and made.add_callbacks_post_trainer(cfg, None) == []
    made.post_train_unload(cfg)


def test_a_new_adapter(plugin, settings, model_folders):
    model, config = plugin.RLoraPlugin().load_adapter(
        base(model_folders), {**settings, "lora_modules_to_save": ["norm"]}
    )
    assert isinstance(model, PeftModel) and model.peft_config["default"] is config
    assert config.tasks == settings["rlora"]["tasks"] and config.modules_to_save == ["norm"]
    assert any("rlora_adapters" in name and p.requires_grad for name, p in model.named_parameters())


def test_only_the_configuration(plugin, settings):
    """For the trainers of TRL that add the adapter themselves."""
    assert plugin.RLoraPlugin().load_adapter(None, settings, config_only=True)[1].num_heads == 3


@pytest.mark.parametrize("inference", [False, True])
def test_an_adapter_is_loaded(plugin, adapter, model_folders, inference):
    cfg = {"adapter": "rlora", "lora_model_dir": str(adapter)}
    model, config = plugin.RLoraPlugin().load_adapter(base(model_folders), cfg, inference=inference)
    expected = AutoPeftModelForCausalLM.from_pretrained(adapter)
    with torch.no_grad():
        assert model.eval()(random_ids()).logits.equal(expected.eval()(random_ids()).logits)
    assert any(p.requires_grad for p in model.parameters()) != inference and config.inference_mode == inference


def test_an_adapter_of_another_method_is_refused(plugin, model_folders, tmp_path):
    get_peft_model(base(model_folders), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    cfg = {"adapter": "rlora", "lora_model_dir": str(tmp_path)}
    with pytest.raises(ValueError, match="an adapter of PEFT's method .*LORA"):
        plugin.RLoraPlugin().load_adapter(base(model_folders), cfg)


def test_zero3_is_refused(plugin, settings, model_folders, monkeypatch):
    monkeypatch.setattr(plugin, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="ZeRO-3 can't be used"):
        plugin.RLoraPlugin().load_adapter(base(model_folders), settings)


def test_head_usage(plugin, settings, model_folders, tmp_path):
    made, cfg = plugin.RLoraPlugin(), {**settings, "output_dir": str(tmp_path)}
    model, _ = made.load_adapter(base(model_folders), cfg)
    trainer = SimpleNamespace(model=model, args=SimpleNamespace(device=torch.device("cpu")), eval_dataset=None)
    assert made.add_callbacks_post_trainer(cfg, trainer) == []
    trainer.eval_dataset = [1]
    (callback,) = made.add_callbacks_post_trainer(cfg, trainer)
    with torch.no_grad():
        model.eval()(random_ids())
    callback.on_evaluate(None, SimpleNamespace(global_step=3, is_world_process_zero=True), None)
    usage = json.loads((tmp_path / "head_usage.json").read_text())
    assert len(usage["layers"]) == 6 and len(usage["usage"]["3"]["(unknown)"][0]) == 3


def test_head_usage_needs_no_trainer_of_trl():
    """Axolotl requires another release of TRL than `RLoraSFTTrainer`: the callback comes without it."""
    code = "import sys; sys.modules['trl'] = None; from rlora_trl.trainer.callbacks import HeadUsageCallback"
    result = processes.run([sys.executable, "-c", code], cwd=processes.ROOT, env={**os.environ, **processes.CPU})
    assert result.returncode == 0, result.stderr[-3000:]


def test_the_saved_adapter_is_checked(plugin, adapter, monkeypatch):
    cfg = {"adapter": "rlora", "output_dir": str(adapter)}
    plugin.RLoraPlugin().post_train_unload(cfg)
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(AdapterCheckError):
        plugin.RLoraPlugin().post_train_unload(cfg)
    monkeypatch.setenv("RANK", "1")
    plugin.RLoraPlugin().post_train_unload(cfg)


@pytest.mark.slow
@needs_axolotl
@pytest.mark.skipif(Version(trl.__version__) >= Version("1.10"), reason="axolotl 0.19 does not import with this trl")
def test_axolotl_trains_the_file_of_the_page(blocks, settings, model_folders, tmp_path):
    """Three tasks, then further from that adapter; with evaluation."""
    for task, rows in zip(settings["rlora"]["tasks"], ("first", "colour", "same"), strict=True):
        (tmp_path / f"{task}.jsonl").write_text("\n".join(map(json.dumps, task_rows(rows, 40))))
    (text,) = blocks("axolotl.md", "yaml")
    for name, value in {settings["base_model"]: model_folders["llama"], "bf16: auto": "bf16: false"}.items():
        assert text.count(name) == 1
        text = text.replace(name, value)
    (tmp_path / "tasks.yaml").write_text(text)
    variables = {"AXOLOTL_DO_NOT_TRACK": "1", "WANDB_MODE": "disabled"}
    path = os.pathsep.join([str(processes.ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, **processes.CPU, **variables, "PYTHONPATH": path}

    for words, folder in (([], "adapter"), (["--lora-model-dir", "adapter", "--output-dir", "further"], "further")):
        command = [sys.executable, "-m", "axolotl.cli.train", "tasks.yaml", *words]
        result = processes.run(command, cwd=tmp_path, env=env, timeout=300)
        assert result.returncode == 0, result.stderr[-3000:]
        assert "eval_loss" in result.stdout + result.stderr
        config = AutoPeftModelForCausalLM.from_pretrained(tmp_path / folder).peft_config["default"]
        assert config.tasks == settings["rlora"]["tasks"]
        usage = json.loads((tmp_path / folder / "head_usage.json").read_text())["usage"]
        assert usage and all(len(weights) == 6 for step in usage.values() for weights in step.values())
    saved = [(tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in ("adapter", "further")]
    assert saved[0] != saved[1]
