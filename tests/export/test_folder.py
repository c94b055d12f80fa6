"""An export from the files of an adapter is the export of the loaded adapter."""

import json
import re

import pytest
import torch
from expert_models import build
from exporting import MATRIX, TASKS, adapted, load_base
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from rlora_trl import RLoraConfig, export_lora
from rlora_trl.export.folder import export_folder
from rlora_trl.files.checks import check_adapter
from rlora_trl.files.head_weights import HeadWeights
from rlora_trl.files.record import AdapterRecord


# Those of a causal model whose adapter has its heads only.
KINDS = [kind for kind in MATRIX if kind != "bert"]


def recorded(model, folder, seed=0):
    """Save a model and a record of head weights by task."""
    model.save_pretrained(folder)
    layers = check_adapter(folder).layers
    heads = model.peft_config["default"].num_heads
    generator = torch.Generator().manual_seed(seed)
    weights = {task: torch.rand(len(layers), heads, generator=generator).softmax(-1) for task in TASKS}
    AdapterRecord(mixtures=HeadWeights(layers, weights, dict.fromkeys(TASKS, 10))).save(folder)
    return check_adapter(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_same_as_with_the_model(model_folders, tmp_path, kind):
    base, fields, rank = MATRIX[kind]
    model = adapted(model_folders, base, **{**fields, "tasks": TASKS})
    checked = recorded(model, tmp_path / "adapter")
    report = export_folder(checked, tmp_path / "files", task="same")

    routing = checked.record.mixtures
    expected = export_lora(model, tmp_path / "model", task="same", routing=routing)
    assert (report.rank, report.layers, report.exact) == (rank, expected.layers, expected.exact)
    written, by_model = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("files", "model"))
    assert written.keys() == by_model.keys()
    assert all(torch.equal(written[name], by_model[name]) for name in written)

    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("files", "model")]
    targets, expected_targets = (config.pop("target_modules") for config in configs)
    # Which PEFT finds out from the layer, with a warning.
    assert [config.pop("fan_in_fan_out") for config in configs] == [False, base == "gpt2"]
    assert configs[0] == configs[1]
    assert set(targets) == set(checked.layers)
    assert all(any(name == end or name.endswith(f".{end}") for end in expected_targets) for name in targets)


@pytest.mark.parametrize("router", ["task", "uniform"])
def test_stock_peft_computes_the_adapter(model_folders, tmp_path, router):
    model = adapted(model_folders, tasks=TASKS, router=router)
    model.save_pretrained(tmp_path / "adapter")
    report = export_folder(check_adapter(tmp_path / "adapter"), tmp_path / "export", task="same")
    assert report.exact
    ids = torch.arange(5, 25).view(2, 10)
    with torch.no_grad():
        if router == "task":
            model.set_task("same")
        expected = model(input_ids=ids).logits
        plain = PeftModel.from_pretrained(load_base(model_folders, "llama"), tmp_path / "export").eval()
        torch.testing.assert_close(plain(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_what_is_refused(model_folders, tmp_path):
    model = adapted(model_folders, tasks=TASKS, router="task")
    model.save_pretrained(tmp_path / "task")
    with pytest.raises(ValueError, match="tasks are 'first', 'same'; got `task='other'`"):
        export_folder(check_adapter(tmp_path / "task"), tmp_path / "none", task="other")

    adapted(model_folders, tasks=TASKS).save_pretrained(tmp_path / "softmax")
    with pytest.raises(ValueError, match="no mean weights are known for task 'same'"):
        export_folder(check_adapter(tmp_path / "softmax"), tmp_path / "none", task="same")

    model = adapted(model_folders, tasks=TASKS, router="uniform", modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path / "more")
    with pytest.raises(ValueError, match=re.escape("has trained base_model.model.lm_head.weight besides its heads")):
        export_folder(check_adapter(tmp_path / "more"), tmp_path / "none", task="same")
    assert not (tmp_path / "none").exists()


def test_experts_need_the_base(tmp_path):
    """How PEFT names their LoRA depends on the base's modules."""
    model = get_peft_model(build("mixtral"), RLoraConfig(router="uniform", tasks=TASKS, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="adapts experts .*, whose LoRA can't be written without the base model"):
        export_folder(check_adapter(tmp_path / "adapter"), tmp_path / "export", task="same")
    assert not (tmp_path / "export").exists()


def test_expressions_of_a_stranger_are_not_run(model_folders, tmp_path):
    """Python's `re` would take years for this one."""
    adapted(model_folders, tasks=TASKS, router="uniform").save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "alpha_pattern": {"((((((.*)*)*)*)*)*)*!": 3}}))
    export_folder(check_adapter(tmp_path / "adapter"), tmp_path / "export", task="same")
    assert (tmp_path / "export").is_dir()
