"""A configuration that names what the model does not have, or asks more than a layer allows: one warning for it."""

import re
import warnings
from dataclasses import replace

import pytest
import torch
import transformers
from expert_models import build
from peft import PeftConfig, PeftModel, get_peft_config, get_peft_model
from safetensors.torch import load_file
from testing_utils import TINY_MODELS, perturb, random_ids
from torch import nn
from transformers import LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from rlora_trl import RLoraConfig, export_lora
from rlora_trl.files.tensors import check_tensors
from rlora_trl.reading import read_safetensors_header


def messages_of(model, config):
    """The warnings of adding an adapter, but those of other packages about themselves."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(model, config)
    return [str(entry.message) for entry in caught if issubclass(entry.category, UserWarning | RuntimeWarning)]


def phimoe():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    return transformers.PhimoeForCausalLM(
        transformers.PhimoeConfig(**sizes, vocab_size=80, num_key_value_heads=2, num_local_experts=4)
    ).eval()


IGNORED = {
    "target": ({"target_modules": ["up_proj", "no_such_proj"]}, "`target_modules` names 'no_such_proj'"),
    "two_targets": ({"target_modules": ["up_proj", "b", "mlp.a"]}, "`target_modules` names 'b', 'mlp.a'"),
    "part_of_a_name": ({"target_modules": ["up_proj", "wn_proj"]}, "`target_modules` names 'wn_proj'"),
    "excluded": (
        {"target_modules": "all-linear", "exclude_modules": ["up_proj", "no_such"]},
        "`exclude_modules` names 'no_such'",
    ),
    "all_excluded": ({"exclude_modules": ["no_such"]}, "no modules were excluded"),  # PEFT's
    "saved": ({"modules_to_save": ["lm_head", "no_such"]}, "`modules_to_save` names 'no_such'"),
    "index": ({"target_modules": ["up_proj"], "layers_to_transform": [1, 2, 7]}, "`layers_to_transform` has 2, 7,"),
    "rank": ({"rank_pattern": {"no_such": 2}}, "rank_pattern keys.*no_such"),  # PEFT's
    "alpha": ({"alpha_pattern": {"no_such": 2}}, "alpha_pattern keys.*no_such"),  # PEFT's
}


@pytest.mark.parametrize("name", IGNORED)
def test_what_is_ignored_is_named_once(name):
    config, expected = IGNORED[name]
    found = messages_of(TINY_MODELS["llama"](), RLoraConfig(**config))
    assert len(found) == 1
    with pytest.warns(match=expected):
        warnings.warn(found[0], stacklevel=1)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"target_modules": ["up_proj", "layers.1.mlp.down_proj"]},
        {"target_modules": r".*\.(up_proj|no_such)"},
        {"target_modules": "all-linear", "exclude_modules": ["up_proj"]},
        {"target_modules": ["up_proj", "q_proj"], "exclude_modules": ["q_proj"]},
        {"target_modules": "all-linear", "modules_to_save": ["gate_proj"]},
        {"target_modules": ["up_proj", "model.layers.0.mlp.down_proj"], "layers_to_transform": [1]},
        {"target_modules": ["up_proj"], "layers_to_transform": 1},
        {"target_modules": ["up_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"down_proj": 8}},
    ],
)
def test_what_is_used_is_silent(config):
    assert messages_of(TINY_MODELS["llama"](), RLoraConfig(**config)) == []


def test_names_that_peft_adds_are_silent():
    assert messages_of(TINY_MODELS["bert"](), RLoraConfig(task_type="SEQ_CLS")) == []


def test_a_default_is_silent_for_any_member_of_the_family():
    """T5 has `wi`, or `wi_0` and `wi_1`; and the configuration is used for a second model."""
    config = RLoraConfig()
    for _ in range(2):
        model = T5ForConditionalGeneration(
            T5Config(vocab_size=80, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2)
        )
        assert messages_of(model, config) == []


def test_a_loaded_adapter_is_not_warned_of_again(model_folders, tmp_path):
    model = TINY_MODELS["llama"]()
    with pytest.warns(UserWarning, match="no_such"):
        model = get_peft_model(model, RLoraConfig(target_modules=["up_proj", "no_such"], r=40))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        PeftModel.from_pretrained(TINY_MODELS["llama"](), tmp_path)
    assert not [entry for entry in caught if "no_such" in str(entry.message) or "narrow" in str(entry.message)]


class Gated(nn.Module):
    """An MLP with a gate of one output, and a narrow classifier."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.up, self.gate, self.classifier = nn.Linear(16, 24), nn.Linear(16, 1), nn.Linear(24, 3)

    def forward(self, x):
        return self.classifier(torch.tanh(self.up(x)) * torch.sigmoid(self.gate(x)))


def test_narrow_layers_get_the_rank_that_they_allow(tmp_path):
    with pytest.warns(UserWarning) as caught:
        model = get_peft_model(
            Gated(),
            RLoraConfig(target_modules="all-linear", rank_pattern={"classifier": 7}, alpha_pattern={"gate": 5}),
        )
    assert len(caught) == 1
    assert "2 of 3 adapted layers" in str(caught[0].message)
    assert "'gate', with 16 inputs and 1 outputs, gets rank 1 instead of 4" in str(caught[0].message)
    layers = {name: getattr(model.base_model.model, name) for name in ("up", "gate", "classifier")}
    assert {name: layer.r["default"] for name, layer in layers.items()} == {"up": 4, "gate": 1, "classifier": 3}
    assert layers["gate"].scaling["default"] == 5
    assert layers["classifier"].scaling["default"] == pytest.approx(32 / 3**0.5)

    x = torch.randn(5, 16)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), Gated()(x))
    perturb(model)
    with torch.no_grad():
        expected = model(x)
    model.save_pretrained(tmp_path)
    shapes = {name: list(tensor.shape) for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert shapes["base_model.model.gate.rlora_adapters.A"] == [1, 16]
    assert shapes["base_model.model.classifier.rlora_adapters.B"] == [3, 3, 3]
    path = tmp_path / "adapter_model.safetensors"
    saved = RLoraConfig.from_pretrained(tmp_path)
    assert set(check_tensors(path, read_safetensors_header(path), saved)) == set(layers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = PeftModel.from_pretrained(Gated(), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(x), expected)


def test_narrow_layers_export(tmp_path):
    """The rank of an export is that of the layers as they are."""
    base = TINY_MODELS["llama"]()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match="k_proj.*gets rank 16 instead of 20"):
        model = get_peft_model(
            base,
            RLoraConfig(task_type="CAUSAL_LM", target_modules=["k_proj", "up_proj"], r=20, router="uniform"),
        )
    perturb(model, 0.05)
    with torch.no_grad():
        expected = model.eval()(input_ids=random_ids()).logits
    export_lora(model, str(tmp_path / "export"))
    exported = PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "export").eval()
    with torch.no_grad():
        torch.testing.assert_close(exported(input_ids=random_ids()).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("saved_by", ["peft", "transformers"])
def test_an_adapter_that_others_load_is_not_warned_of_again(tmp_path, recwarn, saved_by, trains):
    """By way of `PeftConfig.from_pretrained`, which transformers' loading takes."""
    torch.manual_seed(0)
    base, adapter = str(tmp_path / "base"), str(tmp_path / "adapter")
    TINY_MODELS["llama"]().save_pretrained(base)
    config = RLoraConfig(target_modules=["up_proj", "no_such"], r=64, num_heads=1, init_weights=False)
    model = LlamaForCausalLM.from_pretrained(base).eval()
    if saved_by == "peft":
        model = get_peft_model(model, config)
    else:
        model.add_adapter(config)
    assert len([entry for entry in recwarn if "no_such" in str(entry.message)]) == 1
    model.save_pretrained(adapter)
    expected = model.eval()(input_ids=random_ids()).logits
    recwarn.clear()

    given = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(base),
        adapter,
        config=PeftConfig.from_pretrained(adapter),
        is_trainable=trains,
    )
    by_transformers = LlamaForCausalLM.from_pretrained(base)
    by_transformers.load_adapter(adapter, is_trainable=trains)
    assert [str(entry.message) for entry in recwarn if entry.category in (UserWarning, RuntimeWarning)] == []
    for loaded in (given, by_transformers):
        assert torch.equal(loaded.eval()(input_ids=random_ids()).logits, expected)


def test_a_configuration_from_a_dictionary_or_a_copy_is_new():
    config = RLoraConfig(target_modules=["up_proj", "no_such"])
    copies = [replace(config), get_peft_config({"peft_type": "RLORA", "target_modules": ["up_proj", "no_such"]})]
    for copied in copies:
        assert len(messages_of(TINY_MODELS["llama"](), copied)) == 1


def test_every_known_architecture_exists():
    from transformers import CONFIG_MAPPING

    from rlora_trl.tuner.targets import MLP_TARGET_MODULES

    assert set(MLP_TARGET_MODULES) <= set(CONFIG_MAPPING)


ENCODER_DECODER = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}


SIBLINGS = {"mt5": ({"wi_0", "wi_1", "wo"}, {"d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4})}
SIBLINGS |= {
    name: (
        {"fc1", "fc2"},
        ENCODER_DECODER
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "pad_token_id": 0, "decoder_start_token_id": 1},
    )
    for name in ("mbart", "pegasus", "marian")
}


@pytest.mark.parametrize("name", SIBLINGS)
def test_default_targets_of_siblings(name):
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    expected, sizes = SIBLINGS[name]
    base = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(name, vocab_size=80, d_model=32, **sizes))
    model = get_peft_model(base, RLoraConfig(task_type="SEQ_2_SEQ_LM"))
    targeted = model.base_model.targeted_module_names
    assert {name.rpartition(".")[2] for name in targeted} == expected
    assert len(targeted) == 2 * len(expected)


_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_PATCHES, _WORDS = {"image_size": 16, "patch_size": 8}, {"vocab_size": 96, "max_position_embeddings": 32}


@pytest.mark.parametrize("name", ["CLIP", "Siglip", "Siglip2"])
@pytest.mark.parametrize("tower", ["Vision", "Text"])
def test_default_targets_of_towers(name, tower):
    """A tower that is loaded alone has the MLPs of its layers, and not that of a pooling head."""
    sizes = _WORDS if tower == "Text" else {"num_patches": 4, "patch_size": 8} if name == "Siglip2" else _PATCHES
    config = getattr(transformers, f"{name}{tower}Config")(**_TOWER, **sizes)
    model = get_peft_model(getattr(transformers, f"{name}{tower}Model")(config), RLoraConfig())
    adapted = model.base_model.targeted_module_names
    assert len(adapted) == 4 and all(re.search(r"layers\.\d\.mlp\.fc[12]$", path) for path in adapted)


def test_targets_that_match_nothing():
    with pytest.raises(ValueError, match="nothing_like_it.*down_proj, gate_proj.*all-linear"):
        get_peft_model(TINY_MODELS["llama"](), RLoraConfig(target_modules=["nothing_like_it"]))


def test_target_that_is_not_linear():
    with pytest.raises(TypeError, match="embed_tokens.*Embedding.*exclude_modules"):
        get_peft_model(TINY_MODELS["llama"](), RLoraConfig(target_modules=["embed_tokens"]))


def test_architecture_without_a_default():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="no default for models of type.*all-linear"):
        get_peft_model(model, RLoraConfig())
    assert get_peft_model(nn.Sequential(nn.Linear(4, 4)), RLoraConfig(target_modules=["0"]))


@pytest.mark.parametrize("family", ["llama4", "phimoe"])
def test_routers_that_derive_from_linear_layers_are_left_out(family):
    """They return scores and indices, so that no adapter can add to their output."""
    base = build(family) if family == "llama4" else phimoe()
    with pytest.warns(match="experts"):
        model = get_peft_model(base, RLoraConfig(target_modules="all-linear", router="uniform")).eval()
    ends = {path.rpartition(".")[2] for path in model.base_model.targeted_module_names}
    assert "q_proj" in ends and "router" not in ends
    perturb(model)
    with torch.no_grad():
        expected = model(random_ids()).logits
        torch.testing.assert_close(model.merge_and_unload()(random_ids()).logits, expected, rtol=1e-4, atol=1e-4)

    base = build(family) if family == "llama4" else phimoe()
    with pytest.raises(ValueError, match=r"selects model\.layers\.0.*router.*derives from `torch\.nn\.Linear`"):
        get_peft_model(base, RLoraConfig(target_modules=["q_proj", "router"]))
    with pytest.raises(ValueError, match=r"are named (?!.*router)"):
        get_peft_model(base, RLoraConfig(target_modules=["no_such"]))


def test_own_classes_of_linear_layers():
    """Those that compute what their parent does are adapted, and those that need more than an input; others not."""

    class Same(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    class Scores(nn.Linear):
        def forward(self, x):
            return super().forward(x).topk(2)

    class Wider(nn.Linear):
        def forward(self, x):
            return torch.cat([super().forward(x)] * 2, -1)

    class Gated(nn.Linear):
        def forward(self, x, gate):
            return gate * super().forward(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.same, self.scores, self.wider, self.gated = Same(8, 8), Scores(8, 8), Wider(8, 8), Gated(8, 8)

    model = get_peft_model(Model(), RLoraConfig(target_modules="all-linear"))
    assert set(model.base_model.targeted_module_names) == {"same", "gated"}
