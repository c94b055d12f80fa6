"""Weights packed for the whole model at the start of a forward pass: the same results, and nothing that goes stale."""

import copy
import gc
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from rlora_trl import MultiHeadAdapter, RLoraConfig
from rlora_trl.kernels.fused import concat_layers
from rlora_trl.tuner.adapter import PrefetchedWeights
from rlora_trl.tuner.prefetch import WeightPrefetch


class Blocks(nn.Module):
    """Three layers of two shapes, checkpointed or not."""

    def __init__(self, checkpointing=None):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.gate, self.down = nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(20, 12)
        self.checkpointing = checkpointing

    def block(self, x):
        return self.down(self.up(x) * self.gate(x).sigmoid())

    def forward(self, x):
        if self.checkpointing is None:
            return self.block(x)
        return checkpoint(self.block, x, use_reentrant=self.checkpointing == "reentrant")


def adapted(checkpointing=None, **options):
    options = {"r": 2, "num_heads": 3, "init_weights": False, "head_dropout": 0.0, **options}
    options.setdefault("target_modules", ["up", "gate", "down"])
    return get_peft_model(Blocks(checkpointing), RLoraConfig(**options)).train()


def adapters_of(model):
    return [module for module in model.modules() if isinstance(module, MultiHeadAdapter)]


def step(model, x, of=None):
    """The output, and the gradients of all that is trained; `of` a model that `model` calls."""
    of = model if of is None else of
    of.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return y.detach(), {name: p.grad.clone() for name, p in of.named_parameters() if p.grad is not None}


@pytest.fixture
def packed_alone(monkeypatch):
    """How many adapters pack their own weights; and a way to have all do so."""
    from rlora_trl.kernels import fused

    calls = []
    real = fused.concat_weights
    monkeypatch.setattr(fused, "concat_weights", lambda *args: calls.append(1) or real(*args))
    return calls


def without_packing(model, x, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(WeightPrefetch, "concat", lambda self, adapters: None)
        return step(model, x)


def assert_same(found, wanted):
    assert torch.equal(found[0], wanted[0])
    assert found[1].keys() == wanted[1].keys()
    assert all(torch.equal(found[1][name], wanted[1][name]) for name in wanted[1])


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "not reentrant"])
def test_a_step_is_the_same_and_no_layer_packs(checkpointing, packed_alone, monkeypatch):
    model, x = adapted(checkpointing), torch.randn(5, 12, requires_grad=True)
    wanted = without_packing(model, x, monkeypatch)
    packed_alone.clear()
    assert_same(step(model, x), wanted)
    # A recomputation packs for itself: weights are only known not to change during the forward pass.
    assert len(packed_alone) == (0 if checkpointing is None else 3)
    assert all(not adapter.prefetched for adapter in adapters_of(model))


def test_the_first_step_packs_layer_by_layer(packed_alone):
    model = adapted()
    step(model, torch.randn(5, 12))
    assert len(packed_alone) == 3
    step(model, torch.randn(5, 12))
    assert len(packed_alone) == 3


@pytest.mark.parametrize(
    "options",
    [{"router": "task", "tasks": ["a", "b"]}, {"router": "uniform"}, {"share_a": False}, {"init_weights": "zero_b"}],
    ids=lambda options: "-".join(options),
)
def test_all_kinds_of_adapters(options, packed_alone, monkeypatch):
    model, x = adapted(**options), torch.randn(5, 12)
    wanted = without_packing(model, x, monkeypatch)
    packed_alone.clear()
    assert_same(step(model, x), wanted)
    assert not packed_alone


def test_ranks_and_scalings_of_their_own(packed_alone, monkeypatch):
    model, x = adapted(rank_pattern={"gate": 4}, alpha_pattern={"up": 1}), torch.randn(5, 12)
    wanted = without_packing(model, x, monkeypatch)
    packed_alone.clear()
    assert_same(step(model, x), wanted)
    assert not packed_alone


@pytest.mark.parametrize("how", ["optimizer", "through data", "new storage", "in place", "loaded", "cast"])
def test_changed_weights_are_seen(how, monkeypatch):
    model, x = adapted(), torch.randn(5, 12)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = step(model, x)
    step(model, x)
    if how == "optimizer":
        optimizer.step()
    elif how == "loaded":
        model.load_state_dict({name: tensor + 0.5 for name, tensor in model.state_dict().items()})
    elif how == "cast":
        for adapter in adapters_of(model):
            adapter.to(torch.bfloat16)
    else:
        for p in model.parameters():
            if how == "through data":
                p.data.add_(0.5)
            elif how == "new storage":
                p.data = p.data + 0.5
            else:
                with torch.no_grad():
                    p.add_(0.5)
    found = step(model, x)
    assert not torch.equal(found[0], before[0])
    assert_same(found, without_packing(model, x, monkeypatch))


def test_changed_scale_mixture_and_dtype_are_seen(monkeypatch):
    model, x = adapted(), torch.randn(5, 12)
    step(model, x)
    step(model, x)
    model.base_model.model.up.set_scale("default", 0.3)
    assert_same(step(model, x), without_packing(model, x, monkeypatch))
    for adapter in adapters_of(model):
        adapter.fix_head_weights(torch.tensor([0.7, 0.2, 0.1]))
    assert_same(step(model, x), without_packing(model, x, monkeypatch))
    for adapter in adapters_of(model):
        adapter.fix_head_weights(None)
    assert_same(step(model, x), without_packing(model, x, monkeypatch))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            assert_same(step(model, x), without_packing(model, x, monkeypatch))
    assert_same(step(model, x), without_packing(model, x, monkeypatch))


def test_autocast_is_as_it_was_after_a_layer():
    model, x = adapted(), torch.randn(5, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x)
        assert torch.is_autocast_enabled("cpu")
        assert (torch.randn(2, 2) @ torch.randn(2, 2)).dtype == torch.bfloat16
        with pytest.raises(RuntimeError):
            adapters_of(model)[0](torch.randn(5, 3))
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")


def test_adapters_that_are_off_or_come_and_go(packed_alone, monkeypatch):
    model, x = adapted(), torch.randn(5, 12)
    step(model, x)
    with model.disable_adapter():
        assert torch.equal(model(x), model.base_model.model.block(x))
    model.add_adapter(
        "other", RLoraConfig(r=3, num_heads=2, target_modules=["up"], init_weights=False, head_dropout=0.0)
    )
    model.set_adapter("other")
    step(model, x)
    packed_alone.clear()
    found = step(model, x)
    assert not packed_alone
    assert_same(found, without_packing(model, x, monkeypatch))
    model.set_adapter("default")
    model.delete_adapter("other")
    packed_alone.clear()
    assert_same(step(model, x), without_packing(model, x, monkeypatch))


@pytest.mark.parametrize("how", ["marked by DeepSpeed", "empty", "of another class", "strided"])
def test_sharded_weights_are_left_to_the_layer(how, packed_alone, monkeypatch):
    model, x = adapted(), torch.randn(5, 12)
    wanted = step(model, x)
    adapter = adapters_of(model)[0]
    whole = adapter.B.data
    if how == "marked by DeepSpeed":
        adapter.B.ds_id = 3
    elif how == "empty":
        # Taken away, and brought back when the adapter is called, as DeepSpeed does.
        adapter.B.data = whole.new_empty(0)
        adapter.register_forward_pre_hook(lambda module, args: setattr(module.B, "data", whole))
    elif how == "of another class":
        adapter.B = type("Sharded", (nn.Parameter,), {})(whole)
    else:
        adapter.B.data = whole.transpose(1, 2).contiguous().transpose(1, 2)
        wanted = without_packing(
            model, x, monkeypatch
        )  # products of another layout are rounded otherwise on some CPUs
    packed_alone.clear()
    assert_same(step(model, x), wanted)
    assert len(packed_alone) == 1


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "not reentrant"])
def test_weights_that_deepspeed_has_gathered(checkpointing, packed_alone, monkeypatch):
    """They are packed when a pass begins, and recomputations use them too."""
    model, x = adapted(checkpointing), torch.randn(5, 12, requires_grad=True)
    adapters = adapters_of(model)
    for adapter in adapters:
        adapter.hold_anchor_in_buffers()
        for number, p in enumerate(adapter.parameters()):
            p.ds_id, p.ds_status = number, SimpleNamespace(name="AVAILABLE")
    step(model, x)

    # DeepSpeed's optimizer writes to other memory, which no counter notices.
    for _ in range(2):
        for p in model.parameters():
            p.data = p.data + 0.5
        packed_alone.clear()
        found = step(model, x)
        assert not packed_alone
        assert not any(adapter.kept and checkpointing for adapter in adapters)
        assert_same(found, without_packing(model, x, monkeypatch))

    # A call that passes by the model, after a pass without a backward pass: its recomputations have the new weights.
    model(x)
    for p in model.parameters():
        p.data = p.data * 1.5
    found = step(model.base_model.model, x, of=model)
    assert_same(found, without_packing(model, x, monkeypatch))

    # The backward passes of two forward passes.
    twice = lambda x: model(x) + model(2 * x)  # noqa: E731
    found = step(twice, x, of=model)
    with monkeypatch.context() as patch:
        patch.setattr(WeightPrefetch, "concat", lambda self, adapters: None)
        assert_same(found, step(twice, x, of=model))

    # Weights that change after the pass: a recomputation has the new ones.
    y = model(x)
    with torch.no_grad():
        adapters[0].B.mul_(2)
    packed_alone.clear()
    y.sum().backward()
    assert len(packed_alone) == (0 if checkpointing is None else 1)

    # On the way, at an address that was known before, the values are not there yet.
    adapters[0].B.ds_status = SimpleNamespace(name="INFLIGHT")
    packed_alone.clear()
    found = step(model, x)
    assert len(packed_alone) == (1 if checkpointing is None else 2)
    assert_same(found, without_packing(model, x, monkeypatch))
    model.eval()
    assert not any(adapter.kept for adapter in adapters)


class Doubled(nn.Module):
    def forward(self, tensor):
        return 2 * tensor


def test_parameters_that_are_computed_are_left_to_the_layer(monkeypatch):
    model, x = adapted(), torch.randn(5, 12)
    step(model, x)
    for adapter in adapters_of(model):
        torch.nn.utils.parametrize.register_parametrization(adapter, "B", Doubled())
    for _ in range(3):
        with torch.no_grad():
            for adapter in adapters_of(model):
                adapter.parametrizations.B.original.add_(0.1)
        assert_same(step(model, x), without_packing(model, x, monkeypatch))


def test_functional_call_uses_its_own_tensors():
    model, x = adapted(), torch.randn(5, 12)
    step(model, x)
    step(model, x)
    for factor in (2.0, 3.0, 1.0):
        given = {name: factor * p.detach() for name, p in model.named_parameters() if "rlora" in name}
        other = copy.deepcopy(model)
        other.load_state_dict(given, strict=False)
        found = torch.func.functional_call(model, given, (x,))
        torch.testing.assert_close(found, other(x))


def test_another_top_k_is_seen(monkeypatch):
    model, x = adapted(router="top_k", router_top_k=2), torch.randn(5, 12)
    step(model, x)
    before = step(model, x)
    for adapter in adapters_of(model):
        adapter.top_k = 1
    found = step(model, x)
    assert not torch.equal(found[0], before[0])
    assert_same(found, without_packing(model, x, monkeypatch))


@pytest.mark.parametrize("with_gradients", [True, False])
def test_a_pass_within_a_pass_uses_its_own_tensors(with_gradients):
    model, x = adapted(), torch.randn(5, 12)
    step(model, x)
    outer = step(model, x)
    given = {name: 3 * p.detach() for name, p in model.named_parameters() if "rlora" in name}
    wanted = torch.func.functional_call(model, given, (x,))
    inner = []

    def run_again(module, args):
        handle.remove()
        with torch.set_grad_enabled(with_gradients):
            inner.append(torch.func.functional_call(model, given, (x,)))

    handle = model.base_model.model.register_forward_pre_hook(run_again)
    assert_same(step(model, x), outer)
    torch.testing.assert_close(inner[0], wanted)


def test_a_layer_called_with_other_tensors_within_a_pass():
    model, x = adapted(), torch.randn(5, 12)
    step(model, x)
    layer = model.base_model.model.up
    given = {name: 3 * p.detach() for name, p in layer.named_parameters() if "rlora" in name}
    wanted, found = torch.func.functional_call(layer, given, (x,)), []
    hook = lambda module, args: found.append(torch.func.functional_call(layer, given, (x,)))  # noqa: E731
    handle = model.base_model.model.register_forward_pre_hook(hook)
    model(x)
    handle.remove()
    torch.testing.assert_close(found[0], wanted)


def test_weights_that_a_hook_changes_within_a_pass():
    model, x = adapted(), torch.randn(5, 12)
    step(model, x)
    step(model, x)

    def clamp(module, args):
        with torch.no_grad():
            module.B.clamp_(-0.01, 0.01)

    for adapter in adapters_of(model):
        adapter.register_forward_pre_hook(clamp)
    assert_same(step(model, x), step(model, x))


def test_packed_weights_hold_for_one_kind_of_product():
    adapter, x = adapters_of(adapted())[0], torch.randn(5, 12)
    spec, tensors = adapter.delta_spec(), adapter.kernel_tensors()
    with torch.no_grad():
        layers = concat_layers([tensors], None, spec, torch.float32)
        ahead = PrefetchedWeights.of(layers, 0, spec.scaling, tensors)
    assert ahead.holds_for(tensors, spec.layout, spec.scaling, x)
    # Layers may be brought to the device of the input after weights were packed where they rest.
    assert not ahead.holds_for(tensors, spec.layout, spec.scaling, x.to("meta"))
    assert not ahead.holds_for(tensors, spec.layout, spec.scaling, x.bfloat16())
    assert not ahead.holds_for(tensors, spec.layout, 2 * spec.scaling, x)
    assert not ahead.holds_for(tensors, spec.layout._replace(top_k=1), spec.scaling, x)
    for index, tensor in enumerate(tensors):
        other = (*tensors[:index], None if tensor is not None else x, *tensors[index + 1 :])
        assert not ahead.holds_for(other, spec.layout, spec.scaling, x)
    adapter.B.data.add_(0.0)
    assert ahead.holds_for(tensors, spec.layout, spec.scaling, x)  # the documented gap
    with torch.no_grad():
        adapter.B.add_(0.0)
    assert not ahead.holds_for(tensors, spec.layout, spec.scaling, x)


def test_packing_is_no_part_of_a_graph(monkeypatch):
    model, x = adapted(), torch.randn(5, 12)
    step(model, x)
    found = []
    real = MultiHeadAdapter._prefetched
    monkeypatch.setattr(
        MultiHeadAdapter, "_prefetched", lambda self, *args: found.append(real(self, *args)) or found[-1]
    )
    model(x)
    assert len(found) == 3
    assert not any(tensor.requires_grad for packed in found for tensor in packed[:4])


@pytest.mark.skipif(Version(torch.__version__) < Version("2.7"), reason="torch 2.6 disables functions, not methods")
def test_nothing_is_prepared_in_graphs_where_the_whole_call_is_none(monkeypatch):
    """Then functions are compiled one by one; in CUDA graphs, these would be recorded and not run again."""
    real, compiled = WeightPrefetch.concat, []

    def concat(self, adapters):
        compiled.append(torch.compiler.is_compiling())
        real(self, adapters)

    monkeypatch.setattr(WeightPrefetch, "concat", concat)
    model, x = adapted(), torch.randn(5, 12)
    model.forward = torch.compiler.disable(model.forward, recursive=False)
    step(torch.compile(model, backend="eager"), x)
    assert compiled == [False]


def test_two_adapters_at_a_time(packed_alone, monkeypatch):
    model, x = adapted(), torch.randn(5, 12)
    config = RLoraConfig(r=3, num_heads=2, target_modules=["up", "down"], init_weights=False, head_dropout=0.0)
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    step(model, x)
    packed_alone.clear()
    found = step(model, x)
    assert not packed_alone
    assert_same(found, without_packing(model, x, monkeypatch))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_whole_model_that_is_checkpointed(reentrant):
    model, x = adapted(head_dropout=0.3), torch.randn(5, 12, requires_grad=True)
    step(model, x)
    torch.manual_seed(3)
    wanted = step(model, x)
    torch.manual_seed(3)
    assert_same(step(lambda x: checkpoint(model, x, use_reentrant=reentrant), x, of=model), wanted)


def test_memory_is_given_back():
    model, x = adapted(), torch.randn(5, 12)
    model.add_adapter("other", RLoraConfig(r=3, num_heads=2, target_modules=["up"], init_weights=False))
    model.set_adapter("other")
    step(model, x)
    step(model, x)
    deleted = [weakref.ref(p) for name, p in model.named_parameters() if "other" in name]
    model.delete_adapter("other")
    model.set_adapter("default")
    gc.collect()
    assert deleted and not any(p() is not None for p in deleted)
    step(model, x)
    step(model, x)
    unloaded = [weakref.ref(adapter) for adapter in adapters_of(model)]
    model.unload()
    gc.collect()
    assert len(unloaded) == 3 and not any(adapter() is not None for adapter in unloaded)


def test_nothing_is_left_behind_by_a_forward_pass_that_fails():
    model, x = adapted(), torch.randn(5, 12)
    step(model, x)
    handle = model.base_model.model.down.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x)
    assert all(not adapter.prefetched for adapter in adapters_of(model))
    handle.remove()
    step(model, x)


def test_copies_have_their_own():
    model, x = adapted(), torch.randn(5, 12)
    wanted = step(model, x)
    step(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not other.base_model._prefetch._groups
        assert_same(step(other, x), wanted)
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(2)
        assert not torch.equal(step(other, x)[0], wanted[0])
        assert_same(step(model, x), wanted)


def test_inference_is_not_touched(packed_alone, monkeypatch):
    model, x = adapted(), torch.randn(5, 12)
    step(model, x)
    calls = []
    monkeypatch.setattr(WeightPrefetch, "concat", lambda self, adapters: calls.append(1))
    with torch.no_grad():
        model(x)
    model.eval()
    model(x)
    assert not calls
