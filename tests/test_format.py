"""docs/format.md: its reader, run as written, computes what the package computes."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from testing_utils import TINY_MODELS, VOCAB, perturb, random_ids
from transformers import AutoModelForCausalLM

from rlora_trl import RLoraConfig
from rlora_trl.files.checks import AdapterCheckError, check_adapter
from rlora_trl.tuner import MultiHeadAdapter
from rlora_trl.tuner.layer import RLoraLayer


PAGE = (Path(__file__).parent.parent / "docs" / "format.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
# Relative to the largest value. A sum in float64 of some hundred terms, in another order, rounds to about 1e-15; Llama
# normalizes in float32 whatever its dtype, so that a difference of 1e-16 before may be 1e-7 after.
DELTA, LOGITS = 1e-12, 1e-5

KAIMING = {"router_init": "kaiming_uniform"}
TASKS = {"router": "task", "tasks": ["sst2", "rte"]}
CONFIGS = {
    "softmax": {},
    "softmax-own-a": {"share_a": False},
    "top_k": {"router": "top_k", "router_top_k": 2, "num_heads": 5, **KAIMING},
    "top_k-own-a": {"router": "top_k", "router_top_k": 3, "num_heads": 4, "share_a": False, **KAIMING},
    "task": TASKS,
    "task-own-a": {**TASKS, "share_a": False},
    "uniform": {"router": "uniform"},
    "uniform-own-a": {"router": "uniform", "share_a": False},
    "zero_a": {"init_weights": "zero_a"},
    "zero_b": {"init_weights": "zero_b", **KAIMING},
    "no-scheme": {"init_weights": False, "use_rslora": False},
    "one-head": {"num_heads": 1, "router": "uniform"},
    "rank_pattern": {"rank_pattern": {"up_proj": 2, r"layers\.1\..*down_proj": 6}},
    "alpha_pattern": {
        "rank_pattern": {"gate_proj": 3},
        "alpha_pattern": {r".*\.1\.mlp\..*": 5, "layers.0.mlp.up_proj": 7.5, "0.mlp.up_proj": 200},
    },
    "narrow": {"r": 64, "target_modules": ["k_proj", "up_proj"]},
    "saved": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "up_proj"]},
    "token-rows": {"trainable_token_indices": [3, 17, 5]},
    "token-rows-by-name": {"trainable_token_indices": {"embed_tokens": [9, 8]}},
}


@pytest.fixture(scope="module")
def reader():
    """The names that the blocks of the page define."""
    names = {}
    for block in BLOCKS:
        exec(block, names)
    return names


def save(base, folder, **fields):
    """An adapter whose trained tensors have moved."""
    model = get_peft_model(copy.deepcopy(base), RLoraConfig(task_type="CAUSAL_LM", **fields))
    perturb(model)
    model.save_pretrained(folder)


def logits(model, **inputs):
    with torch.no_grad():
        return model.eval()(input_ids=random_ids(), **inputs).logits


def check_equal(actual, expected, tolerance):
    assert actual.dtype == expected.dtype == torch.float64
    difference = (actual - expected).abs().max() / expected.abs().max()
    assert difference < tolerance, float(difference)


def compare(reader, base, folder, task=None):
    """Deltas of all layers and logits, by the package and by the page; and that the adapter does something."""
    # In float64, as the package subtracts the anchor from B in the dtype that both have.
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder).double()
    if task is not None:
        model.set_task(task)
    compare_deltas(reader, model.eval(), folder, task)

    by_page = copy.deepcopy(base)
    reader["attach"](by_page, folder, task)
    expected = logits(model)
    check_equal(logits(by_page), expected, LOGITS)
    assert (expected - logits(base)).abs().max() > 1e-2 * expected.abs().max()
    return expected


@torch.no_grad()
def compare_deltas(reader, model, folder, task):
    """Of inputs without and with batch dimensions."""
    config, layers, _ = reader["read"](folder)
    modules = {
        name: module for name, module in model.get_base_model().named_modules() if isinstance(module, RLoraLayer)
    }
    assert modules.keys() == layers.keys()
    for name, module in modules.items():
        for shape in ((), (7,), (2, 3, 1)):
            x = torch.randn(*shape, module.in_features, dtype=torch.float64)
            expected = module.rlora_adapters["default"](x)
            check_equal(reader["delta"](config, name, layers[name], x, task), expected, DELTA)


@pytest.mark.parametrize("name", CONFIGS)
def test_reader_computes_what_the_package_computes(reader, tmp_path, name):
    base = TINY_MODELS["llama"]().double()
    save(base, tmp_path, **CONFIGS[name])
    check_adapter(tmp_path)
    compare(reader, base, tmp_path)


@pytest.mark.parametrize("share_a", [True, False])
def test_reader_selects_a_task(reader, tmp_path, share_a):
    base = TINY_MODELS["llama"]().double()
    save(base, tmp_path, **TASKS, share_a=share_a)
    by_task = [compare(reader, base, tmp_path, task) for task in (None, "sst2", "rte")]
    for i in range(3):
        assert (by_task[i] - by_task[i - 1]).abs().max() > 1e-6


def test_resized_vocabulary(reader, tmp_path):
    base = TINY_MODELS["llama"]().double()
    base.resize_token_embeddings(VOCAB + 7, mean_resizing=False)
    trained = copy.deepcopy(base)
    with torch.no_grad():
        trained.get_input_embeddings().weight[-7:] += 1.0
        trained.get_output_embeddings().weight[:] += 0.5
    model = get_peft_model(trained, RLoraConfig(task_type="CAUSAL_LM"))
    perturb(model)
    model.save_pretrained(tmp_path, save_embedding_layers=True)

    config, _, others = reader["read"](tmp_path)
    assert config["saved_embeddings"] == ["lm_head", "model.embed_tokens"]
    assert sorted(others) == ["lm_head.weight", "model.embed_tokens.weight"]
    compare(reader, base, tmp_path)


@pytest.mark.parametrize("bias", ["all", "rlora_only"])
def test_biases(reader, tmp_path, bias):
    """Of layers with and without an adapter; Qwen2 has biases in its attention."""
    base = TINY_MODELS["qwen2"]().double()
    save(base, tmp_path, bias=bias, target_modules=["q_proj", "down_proj"])
    _, _, others = reader["read"](tmp_path)
    assert others and all(name.endswith(".bias") for name in others)
    compare(reader, base, tmp_path)


def test_transposed_weights_of_the_base(reader, tmp_path):
    base = TINY_MODELS["gpt2"]().double()
    save(base, tmp_path)
    compare(reader, base, tmp_path)


def test_flags_in_a_pattern(reader):
    """In RE2's syntax they may stand at the start of any group."""
    config = {"alpha_pattern": {"(?i)UP_PROJ": 5}, "lora_alpha": 32, "use_rslora": False}
    found = [reader["scaling"](config, layer, 1) for layer in ("up_proj", "layers.0.mlp.up_proj", "mlp.my_up_proj")]
    assert found == [5, 5, 32]


def test_equal_logits(reader):
    """The lower index counts as larger."""
    config = {"router": "top_k", "router_top_k": 2, "num_heads": 4}
    R, x = torch.ones(4, 3, dtype=torch.float64), torch.ones(5, 3, dtype=torch.float64)
    adapter = MultiHeadAdapter(3, 2, 1, 4, 1.0, router="top_k", router_top_k=2, dtype=torch.float64)
    with torch.no_grad():
        adapter.router.fill_(1.0)
        expected = adapter.head_weights(x)
    assert torch.equal(reader["head_weights"](config, R, x, None), expected)
    assert expected[0].tolist() == [0.5, 0.5, 0.0, 0.0]


def test_adapter_of_an_earlier_version(reader):
    """As docs/format.md says of versions."""
    folder = Path(__file__).parent / "fixtures" / "earlier" / "adapter"
    base = TINY_MODELS["llama"]().double()
    config, layers, _ = reader["read"](folder)
    assert "saved_embeddings" not in config and layers
    compare(reader, base, folder)


def test_other_methods_and_routers_are_refused(reader, tmp_path):
    save(TINY_MODELS["llama"](), tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for change in ({"peft_type": "LORA"}, {"router": "hash"}):
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=next(iter(change.values()))):
            reader["read"](tmp_path)


def test_reader_is_short_and_needs_nothing_else():
    assert sum(bool(line) for line in BLOCKS[0].splitlines()) <= 40
    imported = re.findall(r"^(?:import|from) +([\w., ]+)", BLOCKS[0] + BLOCKS[1], re.MULTILINE)
    assert imported == ["json, math, re", "pathlib import Path", "torch", "safetensors.torch import load_file"]


def rows(heading):
    """The rows of the first table in a section, by their first cell without code marks."""
    section = PAGE.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)


def test_page_names_every_field_of_the_configuration():
    named = set(re.findall(r"`(\w+)`", " ".join(rows("Configuration"))))
    fields = set(RLoraConfig.__dataclass_fields__) - {"source", "download", "loaded"}
    assert named == fields, (named - fields, fields - named)


def test_page_has_the_defaults():
    section = PAGE.split("\n## Configuration\n", 1)[1].split("\n## ", 1)[0]
    table = re.findall(r"^\| (`[^|]*) \| [^|]* \| ([^|]+) \|", section, re.MULTILINE)
    default = RLoraConfig()
    checked = 0
    for names, value in table:
        for name in re.findall(r"`(\w+)`", names):
            if value.strip():
                assert json.loads(value.strip(" `")) == getattr(default, name), name
                checked += 1
    assert checked >= 12


def test_page_names_the_tensors(tmp_path):
    save(TINY_MODELS["llama"](), tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        roles = {name.rpartition(".")[2] for name in file.keys()}
        assert file.metadata() == {"format": "pt"}
        assert {str(file.get_slice(name).get_dtype()) for name in file.keys()} == {"F32"}
    named = set(re.findall(r"^\| `(\w+)` \| `\[", PAGE, re.MULTILINE))
    assert named == roles == set(MultiHeadAdapter.tensor_names)


def rewrite(folder, **fields):
    """Other values in the file of an adapter's configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_field_that_is_null_has_the_default(reader, tmp_path, model_folders):
    """All at once, of the table and of those that don't change the function; and checks agree."""
    base = AutoModelForCausalLM.from_pretrained(model_folders["llama"]).double()
    save(base, tmp_path / "adapter")
    names = ["num_heads", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "router", "router_top_k"]
    names += ["share_a", "init_weights", "tasks", "target_parameters", "bias", "modules_to_save", "saved_embeddings"]
    names += ["trainable_token_indices", "head_dropout", "dropout_position", "init_gamma", "router_init"]
    names += ["exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "task_type"]
    names += ["peft_version", "inference_mode"]
    expected = compare(reader, base, tmp_path / "adapter")
    rewrite(tmp_path / "adapter", **dict.fromkeys(names))
    check_equal(compare(reader, base, tmp_path / "adapter"), expected, LOGITS)
    check_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("field", ["use_rslora", "share_a", "fan_in_fan_out"])
@pytest.mark.parametrize("value", ["false", 0, 1, []])
def test_flags_are_true_or_false(tmp_path, model_folders, field, value):
    """Python would take "false" for true."""
    base = AutoModelForCausalLM.from_pretrained(model_folders["llama"])
    save(base, tmp_path / "adapter")
    rewrite(tmp_path / "adapter", **{field: value})
    with pytest.raises(AdapterCheckError, match=f"`{field}` must be of type"):
        check_adapter(tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"`{field}` must be of type"):
        PeftModel.from_pretrained(base, tmp_path / "adapter")
