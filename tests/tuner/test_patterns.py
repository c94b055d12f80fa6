"""Patterns of a file: a stranger's regular expression is never run, and the adapter loads as it was saved."""

import copy
import json
import re
import time
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from testing_utils import perturb, random_ids
from transformers import AutoModelForCausalLM

from rlora_trl import RLoraConfig
from rlora_trl.files.checks import check_adapter
from rlora_trl.reading import AdapterCheckError
from rlora_trl.tuner.layer_names import endings, value_for
from rlora_trl.tuner.patterns import LinearMatcher, settle_patterns


# Each takes exponential or high polynomial time in Python's `re` on a name of the letter a.
HANGING = {
    "comment": "(a+)(?#)+b",
    "choices": "(?:a|a|aa|aaa|a|a|a|a)*" * 4 + "b",
    "nested": "(?:(?:a*)*)*b",
    "backreference": r"(a*)*\1b",
    "look_around": "(?=(a+)+b)a|(a|a)*b",
    "polynomial": ".*" * 12 + "b",
    "bounded": "(?:a{0,30}){0,30}b",
    "atomic": "(?>(a+)+)b(a|a)*c",
    "repeats of nothing": "(?:(?:){9999}){9999}.*b",
}
SECONDS = 10.0  # a hanging expression takes longer than the test suite


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=random_ids()).logits


@pytest.fixture
def base(model_folders):
    return AutoModelForCausalLM.from_pretrained(model_folders["llama"])


@pytest.fixture
def save(model_folders, tmp_path):
    """Trains nothing, but saves an adapter whose values are not the initial ones; returns its folder and outputs."""

    def saved(**fields):
        base = AutoModelForCausalLM.from_pretrained(model_folders["llama"])
        model = get_peft_model(base, RLoraConfig(task_type="CAUSAL_LM", **fields))
        perturb(model)
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", logits(model)

    return saved


def set_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


LOADERS = {
    "PeftModel": lambda base, folder: PeftModel.from_pretrained(base, folder),
    "second": lambda base, folder: PeftModel.from_pretrained(base, folder).load_adapter(folder, "second"),
    "AutoPeftModel": lambda base, folder: AutoPeftModelForCausalLM.from_pretrained(folder),
    "load_adapter": lambda base, folder: base.load_adapter(str(folder)),
    "AutoModel": lambda base, folder: AutoModelForCausalLM.from_pretrained(folder),
}
BY_TRANSFORMERS = ("load_adapter", "AutoModel")
FIELDS = {
    "target_modules": lambda pattern: {"target_modules": f".*(?:up_proj|{pattern})"},
    "exclude_modules": lambda pattern: {"exclude_modules": pattern},
    "rank_pattern": lambda pattern: {"rank_pattern": {pattern: 8}},
    "alpha_pattern": lambda pattern: {"alpha_pattern": {pattern: 8}},
    "modules_to_save": lambda pattern: {"modules_to_save": [pattern]},
    "layers_pattern": lambda pattern: {"layers_to_transform": [0, 1], "layers_pattern": [pattern]},
}


@pytest.fixture(scope="module")
def long_names(tmp_path_factory):
    """A base with a layer whose name makes the expressions slow, and an adapter on it."""
    name = "a" * 40

    def create():
        torch.manual_seed(0)
        base = torch.nn.ModuleDict({name: torch.nn.Linear(6, 5), "up_proj": torch.nn.Linear(6, 5)})
        base.forward = lambda x: base[name](x) + base["up_proj"](x)
        return base

    folder = tmp_path_factory.mktemp("long")
    get_peft_model(create(), RLoraConfig(target_modules=[name, "up_proj"])).save_pretrained(folder)
    return create, folder


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("name", HANGING)
def test_no_expression_hangs(long_names, tmp_path, field, name):
    create, original = long_names
    for path in original.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    set_config(tmp_path, **FIELDS[field](HANGING[name]))
    for run in (
        lambda: check_adapter(tmp_path),
        lambda: PeftModel.from_pretrained(create(), tmp_path),
        lambda: create_with_config(create(), tmp_path),
    ):
        start = time.process_time()
        try:
            run()
        except ValueError as error:  # `AdapterCheckError` and PEFT's error of no matching module among them
            assert "adapter_config.json" in str(error) or "modules" in str(error)
        assert time.process_time() - start < SECONDS


def create_with_config(base, folder):
    """As transformers does: the configuration alone, without the place that it comes from."""
    config = PeftConfig.from_pretrained(str(folder))
    assert config.loaded and config.source is None
    get_peft_model(base, config)


@pytest.mark.parametrize("way", LOADERS)
@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": r".*\.(?:gate|up)_proj"},
        {
            "target_modules": r"model\.layers\.([0-9]|1[0-9])\.mlp\.(gate|up|down)_proj",
            "exclude_modules": r".*\.0\..*",
        },
        {"rank_pattern": {r"layers\.0\.mlp\..*": 2, "up_proj": 3}, "alpha_pattern": {r"layers\.1\..*": 7}},
        {"alpha_pattern": {"up_proj": 5, r".*\.1\.mlp\.up_proj": 9}, "modules_to_save": ["lm_head"]},
        {"target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ],
    ids=["expression", "excluded", "patterns", "order", "layers"],
)
def test_own_expressions_load(model_folders, save, fields, way):
    folder, expected = save(**fields)
    base = AutoModelForCausalLM.from_pretrained(model_folders["llama"])
    if "modules_to_save" in fields and way in BY_TRANSFORMERS and Version(version("transformers")) < Version("5.18"):
        with pytest.raises(ValueError, match="has not loaded lm_head"):
            LOADERS[way](base, folder)
        return
    loaded = LOADERS[way](base, folder)
    if way == "second":
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folders["llama"]), folder)
    loaded = base if way == "load_adapter" else loaded
    assert torch.equal(logits(loaded), expected)
    check_adapter(folder)


@pytest.mark.parametrize("way", LOADERS)
def test_what_RE2_lacks_comes_from_the_file(model_folders, save, way):  # noqa: N802 - the engine's name
    folder, expected = save(target_modules=r"(?!.*down)model\.layers\.(?P<n>\d+)\.mlp\.(up|gate)_proj")
    base = AutoModelForCausalLM.from_pretrained(model_folders["llama"])
    check_adapter(folder)
    loaded = LOADERS[way](base, folder)
    if way != "second":
        assert torch.equal(logits(base if way == "load_adapter" else loaded), expected)


@pytest.mark.parametrize("pattern", ["(?i)UP_PROJ", "(up", "*proj", "[a"])
def test_what_is_no_expression_is_named(base, pattern):
    message = f"{re.escape(repr(pattern))} in `rank_pattern` or `alpha_pattern` is not a regular expression"
    for field in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(ValueError, match=message):
            get_peft_model(copy.deepcopy(base), RLoraConfig(task_type="CAUSAL_LM", **{field: {pattern: 2}}))


def test_a_loaded_adapter_saves_names(base, save, tmp_path):
    folder, expected = save(target_modules=r".*\.(?:gate|up)_proj")
    model = PeftModel.from_pretrained(base, folder)
    model.save_pretrained(tmp_path / "again")
    targets = json.loads((tmp_path / "again/adapter_config.json").read_text())["target_modules"]
    assert isinstance(targets, list) and all(name.isidentifier() or "." in name for name in targets)
    check_adapter(tmp_path / "again")


def test_names_and_sizes_stay_as_they_are(base, save):
    folder, _ = save(target_modules=["up_proj"], rank_pattern={"up_proj": 2})
    config = PeftModel.from_pretrained(base, folder).peft_config["default"]
    assert (config.target_modules, config.rank_pattern) == ({"up_proj"}, {"up_proj": 2})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 10**9}, "`num_heads` must be from 1 to 4096"),
        ({"num_heads": 4_096, "r": 16_384, "rank_pattern": {}}, "num_heads=4096.*more than"),
        ({"router": "task", "tasks": [f"t{i}" for i in range(9000)], "num_heads": 4096}, "9000 tasks"),
        ({"rank_pattern": {"up_proj": 10**9}}, "`rank_pattern` must be from 1 to 16384"),
    ],
    ids=["heads", "ranks", "tasks", "pattern"],
)
@pytest.mark.parametrize("way", LOADERS)
def test_sizes_are_compared_before_anything_is_created(base, save, way, changes, message):
    folder, _ = save()
    set_config(folder, **changes)
    start = time.process_time()
    with pytest.raises(AdapterCheckError, match=message):
        LOADERS[way](base, folder)
    assert time.process_time() - start < SECONDS


def test_many_patterns_take_linear_time(base, save):
    """Among them one that fits, so that the others are left out."""
    folder, expected = save(rank_pattern={"up_proj": 2}, alpha_pattern={"up_proj": 5})
    for field, value in (("rank_pattern", 2), ("alpha_pattern", 5)):
        set_config(folder, **{field: {f".*{i}" if i < 0 else f"x{i}": 1 for i in range(9_999)} | {"up_proj": value}})
    start = time.process_time()
    check_adapter(folder)
    assert torch.equal(logits(PeftModel.from_pretrained(base, folder)), expected)
    assert time.process_time() - start < SECONDS


def test_many_targets_take_linear_time(tmp_path):
    stem = "base_model.model.{}.rlora_adapters."
    tensors = {}
    for i in range(8_000):
        layer = stem.format(f"model.layers.{i}.mlp.up_proj")
        tensors |= {layer + "A": torch.ones(1, 1), layer + "B": torch.ones(3, 1, 1)}
    config = RLoraConfig(r=1, router="uniform", init_weights="zero_a", target_modules=["up_proj"])
    config.target_modules = {f"layers.{i}.mlp.up_proj" for i in range(9_000)}
    config.rank_pattern = {f"layers.{i}.mlp.up_proj": 1 for i in range(9_000)}
    config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    start = time.process_time()
    assert len(check_adapter(tmp_path).layers) == 8_000
    assert time.process_time() - start < SECONDS


def test_a_layer_that_another_rank_does_not_explain(save):
    folder, _ = save(rank_pattern={r".*\.0\.mlp\.up_proj": 2})
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("0.mlp.up_proj.rlora_adapters.A"))
    tensors[name] = torch.ones(3, tensors[name].shape[1])
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterCheckError, match=r"A has shape \[3, 32\], expected \[4, 32\]"):
        check_adapter(folder)


# The parts


def test_endings():
    assert list(endings("a.b.c")) == ["a.b.c", "b.c", "c"]
    assert list(endings("a")) == ["a"]


@pytest.mark.parametrize(
    ("patterns", "value"),
    [
        ({}, 0),
        ({"up": 1}, 0),
        ({"up_proj": 1}, 1),
        ({"mlp.up_proj": 2, "up_proj": 1}, 2),
        ({"up_proj": 1, "mlp.up_proj": 2}, 1),
        ({r"layers\.\d+\.mlp\.\w+": 3, "up_proj": 1}, 3),
        ({r"mlp": 3}, 0),
    ],
)
def test_first_matching_pattern(patterns, value):
    """As PEFT's `get_pattern_key` finds it."""
    from peft.utils.other import get_pattern_key

    layer = "model.layers.0.mlp.up_proj"
    assert value_for(patterns, layer, 0) == value == patterns.get(get_pattern_key(patterns.keys(), layer), 0)
    assert LinearMatcher("x").values(patterns, [layer], "rank_pattern").get(layer, 0) == value


def test_time_limit(monkeypatch):
    monkeypatch.setattr("rlora_trl.tuner.patterns._MAX_SECONDS", 0.0)
    with pytest.raises(AdapterCheckError, match="take more than 0 s to match. List names"):
        LinearMatcher("x").compile(".*b", "target_modules")("a" * 100)


def test_expressions_beside_all_linear():
    config = RLoraConfig(target_modules="all-linear", exclude_modules=r".*\.b")
    settle_patterns(config, ["x.a", "x.b"])
    assert (config.target_modules, config.exclude_modules) == ("all-linear", {"x.b"})
