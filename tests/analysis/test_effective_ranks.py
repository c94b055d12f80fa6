"""Effective ranks: known matrices, the delta of the module, and what is left out."""

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from testing_utils import TINY_MODELS, perturb

from rlora_trl import RLoraConfig, export_lora
from rlora_trl.analysis import effective_ranks
from rlora_trl.analysis.ranks import delta_factors, effective_rank


TARGETS = ["up_proj", "down_proj"]


def saved(folder, trained=True, **config):
    torch.manual_seed(0)
    model = get_peft_model(TINY_MODELS["llama"](), RLoraConfig(num_heads=3, target_modules=TARGETS, **config))
    if trained:
        perturb(model)
    model.save_pretrained(folder)
    return model


def test_known_singular_values():
    def rank_of(*values):
        k = len(values)
        ups, _ = torch.linalg.qr(torch.randn(7, k, dtype=torch.float64))
        downs, _ = torch.linalg.qr(torch.randn(11, k, dtype=torch.float64))
        return effective_rank(ups * torch.tensor(values, dtype=torch.float64), downs.mT)

    assert rank_of(1.0, 1.0, 1.0) == (pytest.approx(3), 3)
    assert rank_of(1.0, 0.0, 0.0) == (pytest.approx(1), 3)
    assert rank_of(0.0, 0.0) == (0, 2)
    p = torch.tensor([3.0, 1.0]) / 4
    assert rank_of(3.0, 1.0)[0] == pytest.approx(float((-(p * p.log()).sum()).exp()))
    assert effective_rank(torch.zeros(2, 9), torch.zeros(9, 5)) == (0, 2), "the rank of a narrow layer"


@pytest.mark.parametrize("config", [{}, {"share_a": False}, {"init_weights": "zero_b"}], ids=str)
def test_that_of_the_exported_delta(tmp_path, config):
    """The definition, on the full matrix that `export_lora` writes for the same head weights."""
    model = saved(tmp_path / "adapter", **config)
    weights = [0.5, 0.3, 0.2]
    export_lora(model, tmp_path / "lora", routing=weights)
    lora = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    layers = [key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for key in lora if "lora_A" in key]
    ranks = effective_ranks(tmp_path / "adapter", dict.fromkeys(layers, torch.tensor(weights)))
    assert set(ranks) == set(layers) and len(ranks) == 4
    for layer, (rank, limit) in ranks.items():
        down, up = (lora[f"base_model.model.{layer}.lora_{name}.weight"].double() for name in "AB")
        values = torch.linalg.svdvals(up @ down)
        shares = values / values.sum()
        assert rank == pytest.approx(float(torch.special.entr(shares).sum().exp()), rel=1e-3)
        assert 1 < rank <= limit == min(down.shape[0], *(up @ down).shape)


def test_a_new_adapter_changes_nothing(tmp_path):
    saved(tmp_path, trained=False)
    assert {rank for rank, _ in effective_ranks(tmp_path).values()} == {0.0}


def test_experts_are_averaged():
    torch.manual_seed(0)
    shapes = {"A": (2, 3, 8), "B": (2, 4, 6, 3), "A0": (2, 3, 8), "B0": (2, 6, 3)}
    tensors = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    both = effective_rank(*delta_factors(tensors))
    each = [effective_rank(*delta_factors({name: t[e] for name, t in tensors.items()})) for e in range(2)]
    assert both == (pytest.approx(sum(rank for rank, _ in each) / 2), 6)


def test_huge_ranks_are_left_out(tmp_path):
    saved(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    layer = next(key for key in tensors if key.endswith(".A")).removesuffix(".A")
    tensors |= {f"{layer}.A": torch.zeros(600, 2), f"{layer}.B": torch.zeros(3, 2, 600)}
    tensors |= {f"{layer}.A0": torch.zeros(600, 2), f"{layer}.B0": torch.zeros(2, 600)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert len(effective_ranks(tmp_path)) == 3
    with pytest.raises(FileNotFoundError, match="adapter_model"):
        effective_ranks(tmp_path / "none")
