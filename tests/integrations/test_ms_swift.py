"""
The tuner for ms-swift, with its classes where it is installed, and everywhere with a stand-in of its interface.

Ms-swift asks for other versions of the stack than this package; to run all tests of this file, put it, with the
packages that it imports, into folders of their own and name these in PYTHONPATH.
"""

import importlib
import importlib.util
import inspect
import json
import os
import shlex
import sys
import types
from dataclasses import dataclass, field

import processes
import pytest
import swift_stand_in
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file
from testing_utils import perturb, random_ids, task_rows
from transformers import AutoModelForCausalLM

from rlora_trl import RLoraConfig
from rlora_trl.files.checks import AdapterCheckError


PLUGIN = "rlora_trl.integrations.ms_swift"
is_installed = importlib.util.find_spec("swift") is not None and importlib.util.find_spec("swift.tuner_plugin")
needs_swift = pytest.mark.skipif(not is_installed, reason="needs ms-swift")


@dataclass
class Arguments:
    """Some of ms-swift's arguments, with its defaults."""

    lora_rank: int = 8
    init_weights: str = "true"
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    task_type: str = "causal_lm"
    fsdp: list[str] = field(default_factory=list)


@pytest.fixture(params=["stand-in", pytest.param("ms-swift", marks=needs_swift)])
def plugin(request, monkeypatch):
    """The module of the tuner, imported with the stand-in or with ms-swift."""
    if request.param == "stand-in":
        monkeypatch.setitem(sys.modules, "swift", types.ModuleType("swift"))
        monkeypatch.setitem(sys.modules, "swift.tuner_plugin", swift_stand_in)
        monkeypatch.setattr(swift_stand_in, "tuners_map", {})
    monkeypatch.delitem(sys.modules, PLUGIN, raising=False)
    module = importlib.import_module(PLUGIN)
    yield module
    module.tuners_map.pop("rlora", None)
    sys.modules.pop(PLUGIN, None)


def base(model_folders):
    return AutoModelForCausalLM.from_pretrained(model_folders["llama"])


@needs_swift
def test_the_stand_in_is_like_ms_swift():
    real = importlib.import_module("swift.tuner_plugin")
    assert isinstance(real.tuners_map, dict) and all(
        issubclass(tuner, real.Tuner) for tuner in real.tuners_map.values()
    )
    for name, method in inspect.getmembers(swift_stand_in.PeftTuner, inspect.isfunction):
        found = inspect.signature(getattr(real.PeftTuner, name)).parameters.values()
        plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in found]
        assert list(inspect.signature(method).parameters.values()) == plain, name


@needs_swift
@pytest.mark.parametrize("plugin", ["ms-swift"], indirect=True)
def test_the_arguments_are_those_of_ms_swift(plugin):
    arguments = importlib.import_module("swift.arguments.tuner_args").TunerArguments
    names = set(arguments.__dataclass_fields__)
    assert set(plugin._LORA_ARGUMENTS) <= names
    assert {f.name: f.default for f in Arguments.__dataclass_fields__.values() if f.name == "lora_rank"} == {
        "lora_rank": arguments.__dataclass_fields__["lora_rank"].default
    }


def test_the_file_of_the_page(plugin, blocks, model_folders):
    (text,) = blocks("ms-swift.md", "python")
    exec(text, {})
    tuner = plugin.tuners_map["rlora"]
    model = tuner.prepare_model(Arguments(init_weights=True), base(model_folders))
    config = model.peft_config["default"]
    assert (config.r, config.num_heads, config.tasks, config.task_type) == (4, 3, ["sst2", "rte", "trec"], "CAUSAL_LM")
    assert (
        {name for name, p in model.named_parameters() if p.requires_grad}
        == {name for name, p in model.named_parameters() if "rlora_adapters" in name and p.requires_grad}
        != set()
    )
    plugin.register()
    assert tuner.prepare_model(Arguments(), base(model_folders)).peft_config["default"].tasks is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lora_rank": 16, "target_modules": ["q_proj"]}, "--lora_rank, --target_modules have no effect"),
        ({"init_weights": "pissa"}, "--init_weights have no effect"),
        ({"fsdp": ["full_shard"]}, "`--fsdp` can't be used.*fsdp2"),
    ],
)
def test_refused_arguments(plugin, model_folders, arguments, message):
    plugin.register()
    with pytest.raises(ValueError, match=message):
        plugin.RLoraTuner.prepare_model(Arguments(**arguments), base(model_folders))


def test_zero3_is_refused(plugin, adapter, model_folders, monkeypatch):
    plugin.register()
    monkeypatch.setattr(plugin, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="ZeRO-3 can't be used"):
        plugin.RLoraTuner.prepare_model(Arguments(), base(model_folders))
    with pytest.raises(ValueError, match="ZeRO-3 can't be used"):
        plugin.RLoraTuner.from_pretrained(base(model_folders), str(adapter), is_trainable=True)


def test_refused_configurations(plugin):
    with pytest.raises(ValueError, match="batches of ms-swift do not say which task"):
        plugin.register(RLoraConfig(router="task", tasks=["a"]))
    with pytest.raises(TypeError, match="must be an `RLoraConfig`, got LoraConfig"):
        plugin.register(LoraConfig())
    assert "rlora" not in plugin.tuners_map


def test_saved_and_loaded(plugin, model_folders, tmp_path):
    plugin.register(RLoraConfig(r=2))
    tuner = plugin.tuners_map["rlora"]
    model = tuner.prepare_model(Arguments(), base(model_folders))
    perturb(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tuner.save_pretrained(model, str(tmp_path / "a"), state_dict=trained, safe_serialization=True)
    loaded = tuner.from_pretrained(base(model_folders), str(tmp_path / "a"), is_trainable=True)
    with torch.no_grad():
        assert loaded.eval()(random_ids()).logits.equal(model.eval()(random_ids()).logits)
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == set(trained)

    with torch.no_grad():
        next(iter(trained.values())).fill_(float("nan"))
    with pytest.raises(AdapterCheckError):
        tuner.save_pretrained(model, str(tmp_path / "b"))


def test_an_adapter_of_another_method_is_refused(plugin, model_folders, tmp_path):
    get_peft_model(base(model_folders), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="an adapter of PEFT's method .*LORA"):
        plugin.RLoraTuner.from_pretrained(base(model_folders), str(tmp_path))


@pytest.mark.slow
@needs_swift
def test_ms_swift_trains_with_the_commands_of_the_page(blocks, model_folders, tmp_path):
    (text,) = blocks("ms-swift.md", "python")
    (tmp_path / "rlora_plugin.py").write_text(text)
    for name, rows in zip(("sst2", "rte", "trec", "more"), ("first", "colour", "same", "first"), strict=True):
        conversations = [
            {"messages": [{"role": role, "content": row[key]} for role, key in roles]}
            for row in task_rows(rows, 40)
            for roles in [(("user", "prompt"), ("assistant", "completion"))]
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, conversations)))
    path = os.pathsep.join([str(processes.ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, **processes.CPU, "PYTHONPATH": path}

    folders = []
    for block in blocks("ms-swift.md", "bash"):
        if not block.startswith("swift sft"):
            continue
        words = shlex.split(block.replace("\\\n", ""))[2:]
        names = {"Qwen/Qwen2.5-0.5B": model_folders["llama"]}
        names |= {word: str(folder) for word in words if "DATE" in word for folder in folders}
        words = [names.get(word, word) for word in words]
        # A tiny model has no name that ms-swift would know.
        words += ["--model_type", "llama", "--template", "default", "--max_steps", "3", "--report_to", "none"]
        result = processes.run([sys.executable, "-m", "swift.cli.sft", *words], cwd=tmp_path, env=env, timeout=400)
        assert result.returncode == 0, result.stderr[-3000:]
        output = words[words.index("--output_dir") + 1]
        folders += (tmp_path / output).glob("v0-*/checkpoint-3")
    first, further = folders
    config = AutoPeftModelForCausalLM.from_pretrained(further).peft_config["default"]
    assert config.tasks == ["sst2", "rte", "trec"]
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert before.keys() == after.keys() and any(not before[name].equal(after[name]) for name in before)
