"""Every cell of the tables in docs/models.md, on a tiny model of the architecture; and that the page says the same."""

import models_page
import pytest
import torch
from architectures import ARCHITECTURES
from capabilities import CAPABILITIES, adapted, base_of, default_targets, outputs, row_of
from models_page import TARGETS, works
from peft import PeftModel, get_peft_model
from testing_utils import perturb

from rlora_trl import RLoraConfig


# Cells of an architecture follow each other, as they share models.
CELLS = [(name, capability) for name in ARCHITECTURES for capability in CAPABILITIES]


@pytest.fixture(autouse=True)
def without_cards(monkeypatch):
    """PEFT writes a card with each adapter, which takes longer than the adapter."""
    monkeypatch.setattr(PeftModel, "create_or_update_model_card", lambda *args: None)


@pytest.mark.parametrize(("name", "capability"), CELLS)
def test_cell(tmp_path, name, capability):
    architecture = ARCHITECTURES[name]
    check = CAPABILITIES[capability]
    if works(architecture, capability):
        if capability == "4-bit":
            pytest.importorskip("bitsandbytes")
        check(architecture, tmp_path)
        return
    _, message = architecture.limits.get(capability) or architecture.limits[TARGETS]
    with pytest.raises((AssertionError, RuntimeError, ValueError), match=message):
        check(architecture, tmp_path)


def test_the_page_has_the_results():
    _, between, _ = models_page.split()
    assert between == models_page.render(), "run `PYTHONPATH=.:tests python tests/models/models_page.py`"


def test_a_default_that_changes_changes_the_page(monkeypatch):
    from rlora_trl.tuner.targets import MLP_TARGET_MODULES

    assert default_targets(ARCHITECTURES["llama"]) == ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]
    monkeypatch.setitem(MLP_TARGET_MODULES, "llama", ["up_proj"])
    assert default_targets(ARCHITECTURES["llama"]) == ["mlp.up_proj"]


def test_size_of_the_table():
    complete = [a for a in ARCHITECTURES.values() if all(works(a, capability) for capability in CAPABILITIES)]
    assert len(complete) >= 90


def test_rows_of_mpt_have_their_own_adapters():
    """PEFT calls the tuner of this architecture without its hooks."""
    architecture = ARCHITECTURES["mpt"]
    model = adapted(architecture)
    perturb(model)
    batch = row_of(architecture).batch
    mixed = outputs(model, {**batch, "adapter_names": ["default", "__base__", "default", "__base__"]})
    base, both = row_of(architecture).expected, outputs(model, batch)
    torch.testing.assert_close(mixed, torch.stack([both[0], base[1], both[2], base[3]]))
    assert not torch.allclose(both, base, atol=1e-4)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "falcon_mamba"])
def test_state_space_models_adapt_what_their_kernels_call(name):
    base = base_of(ARCHITECTURES[name])
    model = get_peft_model(base, RLoraConfig(target_modules="all-linear"))
    assert {path.rpartition(".")[2] for path in model.base_model.targeted_module_names} == {"in_proj"}
    with pytest.raises(ValueError, match=r"out_proj.*computes with the weight of that layer"):
        get_peft_model(base_of(ARCHITECTURES[name]), RLoraConfig(target_modules=["in_proj", "out_proj"]))
