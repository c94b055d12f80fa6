"""Cosines between heads: against a loop, from each kind of source, and what is refused."""

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from testing_utils import TINY_MODELS, perturb

from rlora_trl import RLoraConfig
from rlora_trl.analysis import head_similarities, mean_similarity
from rlora_trl.trainer.monitor import head_similarity


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = get_peft_model(TINY_MODELS["llama"](), RLoraConfig(num_heads=3, target_modules=["up_proj", "down_proj"]))
    perturb(model)
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


def adapters(model):
    return {name: module for name, module in model.named_modules() if name.endswith("rlora_adapters.default")}


def test_each_cosine(model):
    similarities = head_similarities(model)
    assert set(similarities) == {f"model.layers.{i}.mlp.{kind}_proj" for i in (0, 1) for kind in ("up", "down")}
    for name, adapter in adapters(model).items():
        layer = name.removeprefix("base_model.model.").removesuffix(".rlora_adapters.default")
        B = adapter.B.detach().double()
        for i in range(3):
            for j in range(3):
                expected = (B[i] * B[j]).sum() / (B[i].norm() * B[j].norm())
                assert similarities[layer][i, j].item() == pytest.approx(expected.item(), abs=1e-6)


def test_all_sources_agree(model, folder):
    expected = head_similarities(model)
    file = folder / "adapter_model.safetensors"
    sources = (folder, str(folder), file, load_file(file), model.state_dict(), model.base_model.model.state_dict())
    for source in sources:
        cosines = head_similarities(source)
        assert set(cosines) == set(expected)
        assert all(torch.equal(cosines[layer], expected[layer]) for layer in expected)


def test_mean_is_that_of_the_trainer(model):
    expected = head_similarity(list(adapters(model).values()))
    assert mean_similarity(head_similarities(model)) == pytest.approx(expected, abs=1e-6)


def test_extremes():
    B = torch.ones(3, 4, 2)
    B[1] *= -2.0
    B[2] = 0.0
    matrix = head_similarities({"layer.rlora_adapters.B": B})["layer"]
    assert torch.allclose(matrix, torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    assert matrix.abs().max() <= 1.0


def test_half_precision_is_compared_in_float32():
    B = torch.randn(2, 50, 4).bfloat16()
    matrix = head_similarities({"layer.rlora_adapters.B": B})["layer"]
    assert matrix.dtype == torch.float32
    assert torch.allclose(matrix, head_similarities({"layer.rlora_adapters.B": B.float()})["layer"])


def test_several_adapters(folder):
    torch.manual_seed(0)
    model = get_peft_model(TINY_MODELS["llama"](), RLoraConfig(num_heads=2, target_modules=["up_proj"]))
    model.add_adapter("other", RLoraConfig(num_heads=4, target_modules=["down_proj"]))
    assert {len(matrix) for matrix in head_similarities(model, "other").values()} == {4}
    assert all("up_proj" in layer for layer in head_similarities(model.state_dict(), "default"))
    with pytest.raises(ValueError, match="Expected the heads of one R-LoRA adapter.*'default', 'other'"):
        head_similarities(model.state_dict())
    with pytest.raises(ValueError, match="of adapter 'third' of one"):
        head_similarities(model.state_dict(), "third")
    # In a file the adapter has no name.
    assert head_similarities(folder, "other").keys() == head_similarities(folder).keys()


def test_nothing_to_compare(tmp_path, model):
    with pytest.raises(FileNotFoundError, match="does not exist. Pass the folder"):
        head_similarities(tmp_path)
    save_file({"base_model.model.layer.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="found those of none"):
        head_similarities(tmp_path)
    with pytest.raises(ValueError, match="one head has none"):
        mean_similarity({"layer": torch.ones(1, 1)})
    with pytest.raises(ValueError, match="matrices"):
        mean_similarity({})


def test_more_cosines_than_fit_are_refused():
    """4,096 heads of one value take 16 KB of a file, and their cosines 64 MB for each layer."""
    state = {f"layers.{i}.rlora_adapters.B": torch.ones(4096, 1, 1) for i in range(100)}
    with pytest.raises(ValueError, match="more than 33,554,432 cosines.*4096 heads"):
        head_similarities(state)
