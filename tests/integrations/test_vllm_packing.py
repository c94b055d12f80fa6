"""The packed form of adapters for vLLM's layers: shapes that nothing else accepts, and what is refused."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from testing_utils import perturb
from transformers import AutoModelForCausalLM

from rlora_trl import RLoraConfig
from rlora_trl.files.checks import check_adapter
from rlora_trl.integrations.vllm_packing import is_packed, unpack_layer, write_packed
from rlora_trl.kernels.slots import SlotLayout


@pytest.fixture
def checked(model_folders, tmp_path):
    """A saved adapter with the given fields."""

    def make(**fields):
        base = AutoModelForCausalLM.from_pretrained(model_folders["llama"])
        model = get_peft_model(base, RLoraConfig(task_type="CAUSAL_LM", **fields))
        perturb(model)
        model.save_pretrained(tmp_path / "adapter")
        return check_adapter(tmp_path / "adapter")

    return make


FIELDS = {
    "softmax": ({}, SlotLayout(3, 4, 0, 1, 1), 16),
    "top_k": (
        {"router": "top_k", "router_top_k": 2, "router_init": "kaiming_uniform", "num_heads": 5, "r": 2},
        SlotLayout(5, 2, 2, 1, 1),
        12,
    ),
    "an A for each head": ({"share_a": False}, SlotLayout(3, 4, 0, 1, 0), 27),
    "no anchor": ({"init_weights": "zero_b"}, SlotLayout(3, 4, 0, 0, 1), 12),
}


@pytest.mark.parametrize("kind", FIELDS)
def test_matrices(checked, tmp_path, kind):
    fields, layout, rank = FIELDS[kind]
    assert write_packed(checked(**fields), tmp_path / "packed") == rank
    config = json.loads((tmp_path / "packed" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (rank, rank, False), "scaling is 1"

    tensors = load_file(tmp_path / "packed" / "adapter_model.safetensors")
    sources = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, down in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        up = tensors[name.replace("lora_A", "lora_B")]
        A = sources[name.replace("lora_A.weight", "rlora_adapters.A")]
        d_in = A.shape[-1]
        # As vLLM holds them.
        found = unpack_layer(down.bfloat16(), up.bfloat16(), d_in)
        assert is_packed(down, d_in) and found[2] == layout
        assert found[0].shape == (layout.down_rows, d_in) and found[1].shape[1] == layout.up_columns


def test_rank_patterns(checked, tmp_path):
    adapter = checked(rank_pattern={"up_proj": 2})
    assert write_packed(adapter, tmp_path / "packed") == 16
    tensors = load_file(tmp_path / "packed" / "adapter_model.safetensors")
    ranks = {
        name.split(".")[-3]: unpack_layer(down, tensors[name.replace("lora_A", "lora_B")], down.shape[1] - 8)[2].r
        for name, down in tensors.items()
        if "lora_A" in name
    }
    assert ranks == {"gate_proj": 4, "up_proj": 2, "down_proj": 4}


@pytest.mark.parametrize("num_heads, r", [(3, 2), (2, 3), (3, 4)])
def test_plain_lora_is_not_what_it_is_taken_for(checked, tmp_path, model_folders, num_heads, r):
    """PEFT refuses it, also where the numbers of rows and columns agree."""
    write_packed(checked(num_heads=num_heads, r=r), tmp_path / "packed")
    base = AutoModelForCausalLM.from_pretrained(model_folders["llama"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(base, tmp_path / "packed")


def test_routers_of_tasks_are_exported(checked, tmp_path):
    with pytest.raises(ValueError, match="got 'task', whose tasks are exactly plain LoRA. Use `export_folder`"):
        write_packed(checked(router="task", tasks=["sst2"]), tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_an_output_head_is_refused(checked, tmp_path):
    adapter = checked(target_modules=["up_proj", "lm_head"])
    with pytest.raises(ValueError, match="adapts lm_head, which vLLM computes outside of its linear layers"):
        write_packed(adapter, tmp_path / "packed")


def test_more_than_bfloat16_counts(checked, tmp_path):
    adapter = checked(num_heads=257, r=1, target_modules=["up_proj"])
    with pytest.raises(ValueError, match="has 257 heads of rank 1, and the packed form has at most 256"):
        write_packed(adapter, tmp_path / "packed")


def test_trained_modules_are_refused(checked, tmp_path):
    adapter = checked(modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="has trained .*lm_head.* besides its heads"):
        write_packed(adapter, tmp_path / "packed")


DAMAGES = {
    "another form": lambda down, up: down[0, 24:25].fill_(78),
    "no heads": lambda down, up: down[0, 25:26].fill_(0),
    "other heads": lambda down, up: down[0, 25:26].fill_(4),
    "negative": lambda down, up: down[0, 26:27].fill_(-4),
    "a flag of 2": lambda down, up: down[0, 29:30].fill_(2),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_header(kind):
    layout = SlotLayout(3, 4, 0, 1, 1)
    down, up = torch.zeros(layout.down_rows, 24 + 8), torch.zeros(19, layout.up_columns)
    down[0, 24:30] = torch.tensor([77.0, *layout])
    assert unpack_layer(down, up, 24)[2] == layout
    DAMAGES[kind](down, up)
    with pytest.raises(ValueError, match="which is not the packed form of R-LoRA"):
        unpack_layer(down, up, 24)


def test_plain_matrices_are_left_alone():
    down, up = torch.randn(8, 24), torch.randn(18, 8)
    found = unpack_layer(down, up, 24)
    assert found[0] is down and found[1] is up and found[2].num_heads == 0
