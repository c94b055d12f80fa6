"""Plain LoRA of PEFT becomes one head of R-LoRA, value by value, and comes back as it was."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from testing_utils import TASK_TYPES, TINY_MODELS, perturb, random_ids
from torch import nn

from rlora_trl import RLoraConfig, export_lora
from rlora_trl.convert import convert_adapter
from rlora_trl.files.checks import check_adapter
from rlora_trl.reading import AdapterCheckError


WEIGHTS = "adapter_model.safetensors"
# Kind of base and fields of `LoraConfig`.
CASES = {
    "default": ("llama", {"target_modules": ["gate_proj", "up_proj", "down_proj"]}),
    "all_linear": ("llama", {"target_modules": "all-linear", "r": 3, "lora_alpha": 7}),
    "rslora": ("llama", {"use_rslora": True, "r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}),
    "patterns": (
        "llama",
        {
            "target_modules": ["up_proj", "down_proj"],
            "rank_pattern": {"down_proj": 2, r"model.layers.1.mlp.up_proj": 6},
            "alpha_pattern": {"1.mlp.up_proj": 5},
        },
    ),
    "expression": ("llama", {"target_modules": r".*\.1\.mlp\.(up|down)_proj", "rank_pattern": {r".*up_proj": 3}}),
    "some_layers": ("llama", {"target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "excluded": ("llama", {"target_modules": ["up_proj", "q_proj"], "exclude_modules": ["layers.0.mlp.up_proj"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "bias_all": ("gpt2", {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    "bias_lora_only": ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only", "fan_in_fan_out": True}),
    "saved_module": ("bert", {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
    "token_rows": ("qwen2", {"target_modules": ["up_proj"], "trainable_token_indices": [1, 5, 7]}),
    "lm_head": ("llama", {"target_modules": ["lm_head"]}),
    "gaussian": ("llama", {"target_modules": ["up_proj"], "init_lora_weights": "gaussian"}),
}


def make_base(kind):
    torch.manual_seed(5)
    return TINY_MODELS[kind]().eval()


def make_lora(folder, kind="llama", **fields):
    """Save a plain LoRA adapter that has left its initial values; its model."""
    config = LoraConfig(task_type=TASK_TYPES[kind], **{"target_modules": ["up_proj"], **fields})
    model = get_peft_model(make_base(kind), config).eval()
    perturb(model)
    model.save_pretrained(folder)
    return model


def logits(model):
    with torch.no_grad():
        return model(random_ids()).logits


@pytest.mark.parametrize("case", CASES)
def test_the_same_function(tmp_path, case):
    kind, fields = CASES[case]
    lora = make_lora(tmp_path / "lora", kind, **fields)
    report = convert_adapter(tmp_path / "lora", tmp_path / "out", tasks=["sst2"])
    assert (report.source_format, report.num_heads, report.router, report.offset) == ("lora", 1, "uniform", "none")
    config = RLoraConfig.from_pretrained(str(tmp_path / "out"))
    assert (config.tasks, config.task_type) == (["sst2"], TASK_TYPES[kind])
    assert (config.use_rslora, config.head_dropout) == (
        fields.get("use_rslora", False),
        fields.get("lora_dropout", 0.0),
    )
    check_adapter(tmp_path / "out")

    # The values are copied bit for bit, and so the outputs differ by rounding alone.
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("lora", "out"))
    assert len(after) == len(before)
    for name, tensor in before.items():
        renamed = name.replace(".lora_A.weight", ".rlora_adapters.A").replace(".lora_B.weight", ".rlora_adapters.B")
        assert torch.equal(after[renamed].reshape(tensor.shape), tensor), name
    model = PeftModel.from_pretrained(make_base(kind), tmp_path / "out").eval()
    expected = logits(lora)
    assert (expected - logits(make_base(kind))).abs().max() > 0.01
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fields", [{"r": 8, "lora_alpha": 32}, {"r": 16, "lora_alpha": 8, "use_rslora": True}])
def test_there_and_back_is_bitwise(tmp_path, fields):
    """With scalings that are powers of two, which the export multiplies into B."""
    lora = make_lora(tmp_path / "lora", target_modules=["gate_proj", "up_proj", "down_proj"], **fields)
    convert_adapter(tmp_path / "lora", tmp_path / "out")
    model = PeftModel.from_pretrained(make_base("llama"), tmp_path / "out").eval()
    assert torch.equal(logits(model), logits(lora))
    report = export_lora(model, tmp_path / "back")
    assert report.exact and report.rank == fields["r"]
    scaling = lora.peft_config["default"].lora_alpha / fields["r"] ** (0.5 if "use_rslora" in fields else 1)
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("lora", "back"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor * (scaling if "lora_B" in name else 1.0)), name
    back = PeftModel.from_pretrained(make_base("llama"), tmp_path / "back").eval()
    assert (logits(back) - logits(lora)).abs().max() <= 1e-5


def test_there_and_back_with_any_scaling(tmp_path):
    """B is rounded once more, to float32."""
    lora = make_lora(tmp_path / "lora", r=3, lora_alpha=7, rank_pattern={"1.mlp.up_proj": 5})
    convert_adapter(tmp_path / "lora", tmp_path / "out")
    model = PeftModel.from_pretrained(make_base("llama"), tmp_path / "out").eval()
    export_lora(model, tmp_path / "back")
    back = PeftModel.from_pretrained(make_base("llama"), tmp_path / "back").eval()
    torch.testing.assert_close(logits(back), logits(lora), rtol=1e-5, atol=1e-5)


def test_pickled_and_16_bits(tmp_path):
    """As PEFT saved adapters before it wrote safetensors."""
    make_lora(tmp_path / "lora")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / "lora" / WEIGHTS).items()}
    (tmp_path / "lora" / WEIGHTS).unlink()
    torch.save(tensors, tmp_path / "lora" / "adapter_model.bin")
    convert_adapter(tmp_path / "lora", tmp_path / "out", base_model="user/base")
    after = load_file(tmp_path / "out" / WEIGHTS)
    for name, tensor in tensors.items():
        renamed = name.replace(".lora_A.weight", ".rlora_adapters.A").replace(".lora_B.weight", ".rlora_adapters.B")
        assert torch.equal(after[renamed].reshape(tensor.shape), tensor.float())
    assert RLoraConfig.from_pretrained(str(tmp_path / "out")).base_model_name_or_path == "user/base"


def test_the_revision_is_of_the_base_that_the_source_names(tmp_path):
    make_lora(tmp_path / "lora")
    change(tmp_path / "lora", base_model_name_or_path="user/base", revision="abc")
    for name, base_model, revision in (("a", None, "abc"), ("b", "user/base", "abc"), ("c", "user/other", None)):
        convert_adapter(tmp_path / "lora", tmp_path / name, base_model=base_model)
        assert RLoraConfig.from_pretrained(str(tmp_path / name)).revision == revision


def test_a_resized_vocabulary_is_announced(tmp_path):
    model = get_peft_model(make_base("llama"), LoraConfig(target_modules=["up_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "lora", save_embedding_layers=True)
    report = convert_adapter(tmp_path / "lora", tmp_path / "out")
    config = RLoraConfig.from_pretrained(str(tmp_path / "out"))
    assert config.saved_embeddings == ["lm_head", "model.embed_tokens"]
    assert "lm_head, model.embed_tokens as a whole" in report.warnings[0]


def test_training_goes_on(tmp_path):
    make_lora(tmp_path / "lora", lora_dropout=0.1)
    convert_adapter(tmp_path / "lora", tmp_path / "out")
    model = PeftModel.from_pretrained(make_base("llama"), tmp_path / "out", is_trainable=True)
    model(random_ids(), labels=random_ids()).loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 4 and all(grad is not None and grad.abs().max() > 0 for grad in trained.values())


# What R-LoRA can't represent


def change(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refused(folder, message, error=AdapterCheckError, **arguments):
    with pytest.raises(error, match=message):
        convert_adapter(folder, folder.parent / "out", **arguments)
    assert not (folder.parent / "out").exists()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"use_dora": True}, "sets `use_dora=True`, and can't be converted: DoRA divides by the norms"),
        ({"lora_bias": True}, "its B have biases"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights` 'pissa', with which PEFT changes the base model"),
        ({"init_lora_weights": "olora"}, "changes the base model.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "mica"}, "`init_lora_weights` 'mica'"),
        ({"init_lora_weights": ["pissa"]}, "`init_lora_weights`"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "it repeats layers"),
        (
            {"target_parameters": ["experts.up"]},
            "fused experts, and the files say neither how many there are nor which side",
        ),
        ({"alora_invocation_tokens": [1]}, "active only behind certain tokens"),
        ({"enable_lora": [True, False, True]}, "fused q, k and v"),
        ({"megatron_config": {"a": 1}}, "it names code to import"),
        ({"megatron_core": "os"}, "it names code to import"),
        ({"from_the_future": 3}, "sets `from_the_future=3`.*nothing that corresponds"),
        ({"\x1b[2J" * 100: 3}, r"sets `(\\x1b\[2J){5,20}[^`]{0,10}\.\.=3`, and can't be converted"),
        ({"bias": "some"}, "has `bias` 'some'"),
        ({"bias": ["none"]}, "has `bias`"),
        ({"lora_dropout": 1}, "`lora_dropout` 1"),
        ({"r": None}, "has no `r`"),
        ({"r": 16}, "does not fit its configuration"),
        ({"rank_pattern": {"up_proj": 2}}, "does not fit its configuration"),
        ({"rank_pattern": {"a": "b"}}, "`rank_pattern` must be of type"),
        ({"target_modules": ["down_proj"]}, "`target_modules` of its configuration .* does not select"),
        ({"target_modules": r"(a+)+$"}, "does not select"),
        ({"layers_pattern": r"(a+)+$", "layers_to_transform": [0]}, "regular expression from a file is not run"),
        ({"modules_to_save": ["score"]}, "has no tensors for `modules_to_save="),
        ({"peft_type": "LOHA"}, "`peft_type` 'LOHA', and LORA is expected"),
    ],
)
def test_configuration(tmp_path, fields, message):
    make_lora(tmp_path / "lora")
    change(tmp_path / "lora", **fields)
    refused(tmp_path / "lora", message)


UP = "base_model.model.model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    "changed, message",
    [
        ({f"{UP}.lora_B.weight": None}, "lacks lora_B.weight of the layer 'model.layers.0.mlp.up_proj'"),
        ({f"{UP}.lora_B.bias": torch.zeros(48)}, r"lora_B.bias.*the bias of a B"),
        ({f"{UP}.lora_magnitude_vector.weight": torch.zeros(48)}, "the magnitudes of DoRA"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(8, 80)}, "a LoRA of an embedding"),
        ({f"{UP}.lora_A.default.weight": torch.zeros(8, 32)}, "names in a file of PEFT are `lora_A.weight`"),
        ({f"{UP}.lora_A.weight": torch.zeros(8, 32, 3, 3), f"{UP}.lora_B.weight": torch.zeros(48, 8, 1, 1)}, "convol"),
        ({f"{UP}.lora_A.weight": torch.zeros(7, 32)}, r"`lora_A` \[7, 32\] and `lora_B` \[48, 8\]"),
        ({f"{UP}.lora_A.weight": torch.zeros(40, 32), f"{UP}.lora_B.weight": torch.zeros(48, 40)}, "has rank 40 in"),
        ({f"{UP}.lora_A.weight": torch.full((8, 32), torch.nan)}, "holds NaN or infinity"),
        ({f"{UP}.lora_A.weight": torch.zeros(8, 32, dtype=torch.int8)}, "type I8"),
        ({f"{UP}.weight": torch.zeros(48, 32)}, "has the tensor .*up_proj.weight.*which nothing in its configuration"),
        ({"base_model.model.model.norm.weight": torch.zeros(32)}, "which nothing in its configuration explains"),
        ({"model.norm.weight": torch.zeros(32)}, "names must begin with base_model.model."),
    ],
)
def test_tensors(tmp_path, changed, message):
    make_lora(tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / WEIGHTS) | changed
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / "lora" / WEIGHTS)
    refused(tmp_path / "lora", message)


def test_a_file_without_lora(tmp_path):
    make_lora(tmp_path / "lora")
    save_file({"base_model.model.x": torch.zeros(2)}, tmp_path / "lora" / WEIGHTS)
    refused(tmp_path / "lora", "has no `lora_A` and `lora_B`")


def test_arguments(tmp_path):
    make_lora(tmp_path / "lora")
    folder = tmp_path / "lora"
    refused(folder, "has no `lora_route` and `lora_B0`", ValueError, source_format="r-lora")
    refused(folder, "`use_rslora=True` contradicts the source: its configuration", ValueError, use_rslora=True)
    refused(folder, "`ignore_offset` belongs to", ValueError, ignore_offset=True)
    convert_adapter(folder, tmp_path / "out", use_rslora=False, source_format="lora")


def test_dora_and_embeddings_as_peft_saves_them(tmp_path):
    """The refusals above, for what PEFT really writes."""
    make_lora(tmp_path / "dora", use_dora=True)
    refused(tmp_path / "dora", "`use_dora=True`")
    change(tmp_path / "dora", use_dora=False)
    refused(tmp_path / "dora", "the magnitudes of DoRA")
    make_lora(tmp_path / "embedding", target_modules=["embed_tokens"])
    refused(tmp_path / "embedding", "a LoRA of an embedding")


def test_convolution_as_peft_saves_it(tmp_path):
    class Pictures(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3)

    get_peft_model(Pictures(), LoraConfig(target_modules=["conv"], r=2)).save_pretrained(tmp_path / "lora")
    change(tmp_path / "lora", auto_mapping=None)
    refused(tmp_path / "lora", "a LoRA of a convolution")
