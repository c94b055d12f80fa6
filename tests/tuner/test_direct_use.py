"""Layers whose parent computes with their weight: left out of "all-linear", refused where they are named."""

import pytest
import torch
from peft import get_peft_model
from testing_utils import TINY_MODELS
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BloomConfig,
    DebertaConfig,
    MambaConfig,
    RwkvConfig,
    T5Config,
    WavLMConfig,
)

from rlora_trl import RLoraConfig
from rlora_trl.tuner.direct_use import bypassed_layers


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out_proj = nn.Linear(8, 8)

    def forward(self, x):
        return self.out_proj(self.attention(x, x, x)[0])


class Reader(nn.Module):
    """Reads of weights that count, and reads that don't."""

    def __init__(self, fused=False):
        super().__init__()
        names = ("named", "called", "asked", "switched", "fused_in_training", "transposed")
        self.layers = nn.ModuleDict({"first": nn.Linear(4, 4)})
        self.stack = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        for name in names:
            setattr(self, name, nn.Linear(4, 4))
        self.config = type("Config", (), {"fused": fused, "slices": 1})()
        nn.init.zeros_(self.called.weight)

    def forward(self, x):
        x = self.called(x.to(self.asked.weight.dtype)) + torch.zeros_like(self.asked.weight)[0]
        if isinstance(self.asked.weight, nn.Parameter) and self.asked.weight.shape[0] == 4:
            x = self.asked(x)
        layer = self.named
        x = F.linear(x, layer.weight, layer.bias)
        if self.config.slices > 1 and self.training:
            x = F.linear(x, self.switched.weight[:2])
        elif not self.config.fused:
            x = self.switched(x)
        else:
            x = x @ self.switched.weight
        if self.training:
            x = self.fused(x)
        else:
            x = self.fused_in_training(x)
        for layer in self.stack:
            x = x @ layer.weight.T
        return x @ self.inner[0].weight.T

    def fused(self, x):
        return F.linear(x, weight=self.fused_in_training.weight) @ self.transposed.weight.T

    def reset_parameters(self):
        self.called.weight.copy_(self.called.weight * 2)


def names_of(model):
    return set(bypassed_layers(model, lambda module: isinstance(module, nn.Linear)))


def test_reads_that_count():
    always = {"named", "fused_in_training", "transposed", "stack.0", "stack.1", "inner.0"}
    assert names_of(Reader()) == always
    assert names_of(Reader(fused=True)) == always | {"switched"}


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.stack = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])


def helper(layer, x):
    return F.linear(x, layer.weight, layer.bias)


def twice(layer, x):
    return helper(layer, helper(layer, x))


def cast_like(x, weight):
    return x.to(weight.dtype)


class ByMethod(Base):
    """Methods that `forward` calls count, whatever they are named."""

    def tied_output(self, x):
        return F.linear(x, self.a.weight)

    def represent(self, x):
        return x @ self.b.weight.T

    def initial_state(self, x):
        return x @ self.c.weight.T

    def forward(self, x):
        return self.tied_output(self.represent(self.initial_state(x)))


class ByParent(ByMethod):
    def represent(self, x):
        return super().represent(x)

    def tied_output(self, x):
        return self.a(x)


class ByCallable(ByMethod):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.represent, x, use_reentrant=False)


class Child(Base):
    def project(self, x):
        return x @ self.c.weight

    def penalty(self):
        return self.a.weight.norm()


class OfChild(nn.Module):
    """Its parent calls a method of it other than `forward`."""

    def __init__(self):
        super().__init__()
        self.child = Child()

    def forward(self, x):
        return self.child.project(x)


class ByProperty(Base):
    @property
    def wt(self):
        return self.a.weight

    def both(self):
        return torch.stack([self.b.weight, self.c.weight])

    def forward(self, x):
        return torch.einsum("bi,kij->bj", F.linear(x, self.wt), self.both())


class ByLoop(Base):
    def forward(self, x):
        for i, layer in enumerate(self.stack):
            x = F.linear(x, layer.weight) * i
        for called, read in zip(self.stack, [self.a, self.b], strict=True):
            x = called(x) @ read.weight
        return x


class ByNames(Base):
    def forward(self, x):
        p, q = self.a, self.b
        weight, bias = self.c.weight, self.c.bias
        return F.linear(x, p.weight) + q(x) + F.linear(x, weight, bias)


class ByComprehension(Base):
    def forward(self, x):
        weights = [layer.weight for layer in self.stack]
        return F.linear(x, torch.cat([layer.weight for layer in (self.a, self.c)])) @ torch.cat(weights)


class ByOtherWays(Base):
    def forward(self, x):
        if (layer := self.c) is not None:
            x = F.linear(x, layer.weight)
        return F.linear(F.linear(x, self.a.weight.data), getattr(self, "b").weight.to(x.dtype))  # noqa: B009


class ByHelper(Base):
    def forward(self, x):
        return self.help(x, layer=self.b) + helper(self.a, x) + twice(self.c, x)

    def help(self, x, layer):
        return x @ layer.weight


class InForward(Base):
    """Calls its layer too, and computes with the weight: which of both counts is not known."""

    def forward(self, x):
        self.penalty = self.a.weight.norm()
        return self.b(self.a(x))


class ByUnclearTest(Base):
    """What can't be evaluated when the adapter is made may hold."""

    def __init__(self):
        super().__init__()
        self.scales = nn.Parameter(torch.ones(2))

    @property
    def later(self):
        raise KeyError("later")

    def forward(self, x):
        if self.later and self.scales:
            x = x @ self.a.weight
        if self.scales == 1 and not self.scales:
            x = x @ self.b.weight
        return x @ self.c.weight if self.missing > 1 else x


READS = {
    ByUnclearTest: {"a", "b", "c"},
    ByMethod: {"a", "b", "c"},
    ByParent: {"b", "c"},
    ByCallable: {"b"},
    OfChild: {"child.c"},
    ByProperty: {"a", "b", "c"},
    ByLoop: {"a", "b", "stack.0", "stack.1"},
    ByNames: {"a", "c"},
    ByComprehension: {"a", "c", "stack.0", "stack.1"},
    ByOtherWays: {"a", "b", "c"},
    ByHelper: {"a", "b", "c"},
    InForward: {"a"},
}


class Calls(Base):
    def forward(self, x):
        return self.b(self.a(x))


class Besides(Calls):
    """Methods that no forward pass runs."""

    def orthogonality_loss(self):
        return (self.a.weight @ self.a.weight.T).norm()

    def log_stats(self):
        return {"a": self.a.weight.norm().item()}

    def merge(self):
        return torch.cat([self.a.weight, self.b.weight])

    def make_weights(self):
        nn.init.normal_(self.a.weight)
        self.b.weight.data = self.a.weight * 2


class ByLocal(Calls):
    def forward(self, x):
        w = self.a.weight
        return super().forward(x.to(w.dtype).to(w.T.device)[:, : w.shape[1]])


class ByPassing(Calls):
    @property
    def dtype(self):
        return next(iter([self.a.weight])).dtype

    @property
    def first(self):
        return self.b.weight

    def forward(self, x):
        return super().forward(cast_like(x.to(self.dtype), self.a.weight).to(self.first.device))


class ByTest(Calls):
    def forward(self, x):
        assert self.a.weight.T.shape[0] == 8 and self.a.weight.sum() != 1
        if self.a.weight.abs().sum() == 0:
            return x
        print(f"{self.a.weight}") if self.training else None
        return super().forward(x) if self.b.weight.isfinite().all() else x


@pytest.mark.parametrize("cls", READS)
def test_reads_by_other_ways(cls):
    assert names_of(cls()) == READS[cls]


@pytest.mark.parametrize("cls", [Calls, Besides, ByLocal, ByPassing, ByTest])
def test_what_is_called_is_adapted_silently(cls, recwarn):
    assert names_of(cls()) == set()
    for targets in (["a", "b"], "all-linear"):
        model = get_peft_model(cls().eval(), RLoraConfig(target_modules=targets, init_weights=False))
        assert {"a", "b"} <= set(model.base_model.targeted_module_names)
        model(torch.randn(2, 8)).sum().backward()
        layers = (model.base_model.model.a, model.base_model.model.b)
        assert all(layer.rlora_adapters["default"].B.grad.abs().sum() > 0 for layer in layers)
    assert not [entry for entry in recwarn if "all-linear" in str(entry.message)]


def test_what_all_linear_leaves_out_of_unknown_classes_is_named_once(recwarn):
    model = get_peft_model(InForward(), RLoraConfig(target_modules="all-linear"))
    assert set(model.base_model.targeted_module_names) == {"b", "c", "stack.0", "stack.1"}
    (message,) = [str(entry.message) for entry in recwarn if "all-linear" in str(entry.message)]
    assert message.startswith('"all-linear" leaves out a: the source of InForward computes')
    recwarn.clear()
    get_peft_model(Attention(), RLoraConfig(target_modules="all-linear"))
    assert not [entry for entry in recwarn if "all-linear" in str(entry.message)]
    get_peft_model(InForward(), RLoraConfig(target_modules="all-linear", exclude_modules=["a"]))
    assert not [entry for entry in recwarn if "all-linear" in str(entry.message)]


def ends(model):
    return {name.rpartition(".")[2] for name in names_of(model)}


ARCHITECTURES = {
    "mamba": (MambaConfig(vocab_size=80, hidden_size=16, num_hidden_layers=1), {"x_proj", "dt_proj", "out_proj"}),
    "bloom": (BloomConfig(vocab_size=80, hidden_size=16, n_layer=1, n_head=2), set()),
    "bloom in slices": (
        BloomConfig(vocab_size=80, hidden_size=16, n_layer=1, n_head=2, pretraining_tp=2, slow_but_exact=True),
        {"dense", "dense_4h_to_h"},
    ),
    "t5": (T5Config(vocab_size=80, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2), set()),
    "deberta": (
        DebertaConfig(vocab_size=80, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24),
        set(),
    ),
    "rwkv": (RwkvConfig(vocab_size=80, hidden_size=16, num_hidden_layers=1), set()),
    "wavlm": (WavLMConfig(num_hidden_layers=1), {"q_proj", "k_proj", "v_proj", "out_proj"}),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name):
    config, expected = ARCHITECTURES[name]
    with torch.device("meta"):
        assert ends(AutoModel.from_config(config)) == expected


def test_transformer_encoder_of_torch():
    """Its fast path for inference takes the weights of the MLP too."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert names_of(layer) == {"self_attn.out_proj", "linear1", "linear2"}


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "bert"])
def test_ordinary_models_call_their_layers(name):
    assert names_of(TINY_MODELS[name]()) == set()


def test_all_linear_leaves_them_out():
    config = RLoraConfig(target_modules="all-linear")
    model = get_peft_model(Attention(), config)
    assert model.base_model.targeted_module_names == ["out_proj"]
    assert set(config.target_modules) == {"out_proj"}
    # A second adapter on the same model finds them too.
    model.add_adapter("second", RLoraConfig(target_modules="all-linear"))
    assert set(model.peft_config["second"].target_modules) == {"out_proj"}
    out = model(torch.randn(2, 3, 8))
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("targets", [["out_proj"], ["attention.out_proj"], r".*out_proj"])
def test_named_they_are_refused_before_anything_changes(targets):
    model = Attention()
    with pytest.raises(ValueError, match="selects attention.out_proj, but MultiheadAttention.*exclude_modules"):
        get_peft_model(model, RLoraConfig(target_modules=targets))
    assert type(model.out_proj) is nn.Linear


def test_excluded_they_are_no_obstacle():
    config = RLoraConfig(target_modules=["out_proj"], exclude_modules=["attention.out_proj"])
    assert get_peft_model(Attention(), config).base_model.targeted_module_names == ["out_proj"]


def test_mamba():
    model = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=80, hidden_size=16, num_hidden_layers=2, state_size=4)
    )
    with pytest.raises(ValueError, match="MambaMixer"):
        get_peft_model(model, RLoraConfig(target_modules=["in_proj", "out_proj"], task_type="CAUSAL_LM"))
    adapted = get_peft_model(model, RLoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert {name.rpartition(".")[2] for name in adapted.base_model.targeted_module_names} == {"in_proj"}
