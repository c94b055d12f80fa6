"""Head weights of an export: the adapter's own, measured, recorded."""

import pytest
import torch
from exporting import DATA, TASKS, adapted, error, load_base, logits, same_state, state_of
from peft import PeftModel
from safetensors.torch import load_file

from rlora_trl.analysis.measuring import measure_head_weights
from rlora_trl.export import export_lora
from rlora_trl.files.record import AdapterRecord
from rlora_trl.tuner.selection import fixed_head_weights


@pytest.mark.parametrize("option", ["uniform", "task", "one_head", "hydra_uniform"])
def test_exact_routers(model_folders, tmp_path, tokenizer, option):
    kwargs = {
        "uniform": {"router": "uniform"},
        "task": {"router": "task", "tasks": TASKS, "router_init": "kaiming_uniform"},
        "one_head": {"num_heads": 1, "router": "softmax"},
        "hydra_uniform": {"router": "uniform", "share_a": False, "init_weights": "zero_b"},
    }[option]
    if option == "one_head":
        with pytest.warns(UserWarning, match="get no gradient"):
            model = adapted(model_folders, **kwargs)
    else:
        model = adapted(model_folders, **kwargs)
    report = export_lora(model, tmp_path / "out", task="same", data=DATA, tokenizer=tokenizer)
    if option == "task":
        model.base_model.set_task("same")
    loaded = PeftModel.from_pretrained(load_base(model_folders, "llama"), tmp_path / "out").eval()
    expected = logits(model)
    assert error(logits(loaded), expected) <= 1e-5
    assert report.exact
    assert abs(report.kl) <= 1e-9
    assert report.accuracy_dynamic == report.accuracy_export
    with model.disable_adapter():
        assert error(logits(model), expected) > 1e-3
    if option == "task":
        model.base_model.set_task("first")
        assert error(logits(model), expected) > 1e-3
    card = (tmp_path / "out" / "README.md").read_text()
    assert "the same function" in card and "for each token" not in card


@pytest.mark.parametrize("router", ["softmax", "top_k"])
def test_measured_weights_of_a_task(model_folders, tmp_path, tokenizer, router):
    kwargs = {"router_top_k": 2, "router_init": "kaiming_uniform"} if router == "top_k" else {}
    model = adapted(model_folders, router=router, scale=2.0, **kwargs)
    before = state_of(model)
    report = export_lora(model, tmp_path / "out", task="same", data=DATA, tokenizer=tokenizer)
    same_state(model, before)
    measured = measure_head_weights(model, tokenizer, {"same": DATA["same"]})
    with fixed_head_weights(model, "default", measured.for_task("same")):
        expected = logits(model)
    loaded = PeftModel.from_pretrained(load_base(model_folders, "llama"), tmp_path / "out").eval()
    assert error(logits(loaded), expected) <= 1e-5
    assert not report.exact and report.kl > 1e-4
    # What is reported is what the loaded export gives, computed here row by row.
    total, count = 0.0, 0
    for row in DATA["same"]:
        start = len(tokenizer(row["prompt"])["input_ids"])
        ids = torch.tensor([tokenizer(row["prompt"] + row["completion"])["input_ids"]])
        p, q = (logits(m, ids)[0, start - 1 :].double().log_softmax(-1) for m in (model, loaded))
        total += float((p.exp() * (p - q)).sum())
        count += len(p)
    assert report.kl == pytest.approx(total / count, rel=1e-3)
    assert report.rows == 8
    # Given as `HeadWeights`, and for all tasks.
    again = export_lora(model, tmp_path / "again", task="same", routing=measured)
    assert "mean over the tokens of the task" in again.mixture
    pair = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("out", "again")]
    assert all(torch.equal(tensor, pair[1][name]) for name, tensor in pair[0].items())
    both = export_lora(model, tmp_path / "both", data=DATA, tokenizer=tokenizer)
    assert "plain mean over `first`, `same`" in both.mixture
    assert both.rows == 16


def test_recorded_weights(model_folders, tmp_path, tokenizer):
    """The head weights recorded with an adapter are read from beside it, and the adapter is loaded from its folder."""
    model = adapted(model_folders, scale=2.0)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        ValueError, match=r"no mean weights are known for task 'same' \(recorded: none\).*`routing=measure"
    ):
        export_lora(str(tmp_path / "adapter"), tmp_path / "out", task="same")
    measured = measure_head_weights(model, tokenizer, DATA)
    AdapterRecord(mixtures=measured).save(tmp_path / "adapter")
    report = export_lora(tmp_path / "adapter", tmp_path / "out", task="same")
    assert "recorded with the adapter" in report.mixture
    with fixed_head_weights(model, "default", measured.for_task("same")):
        expected = logits(model)
    loaded = PeftModel.from_pretrained(load_base(model_folders, "llama"), tmp_path / "out").eval()
    assert error(logits(loaded), expected) <= 1e-5
    with pytest.raises(ValueError, match="'colour' .*recorded: 'first', 'same'"):
        export_lora(tmp_path / "adapter", tmp_path / "other", task="colour")
    # Measured on a model of other layers.
    other = adapted(model_folders, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="all 2 layers of the adapter.*like 'model.layers.0.self_attn.q_proj'"):
        export_lora(other, tmp_path / "other", task="same", routing=measured)
    assert not (tmp_path / "other").exists()
