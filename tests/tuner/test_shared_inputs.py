"""Layers with the same input, found by its identity and computed by one function; on a CPU with the torch twins."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from rlora_trl import RLoraConfig
from rlora_trl.kernels import joint
from rlora_trl.tuner import base_product, shared_inputs


grouping = pytest.mark.skipif(shared_inputs._top_hooks is None, reason="layers are not grouped with torch 2.6")


TARGETS = ["q", "k", "v", "gate", "up", "down"]


@pytest.fixture(autouse=True)
def joined_on_the_cpu(monkeypatch):
    monkeypatch.setattr(base_product, "JOINED_DEVICES", {"cpu", "cuda"})


@pytest.fixture
def sizes(monkeypatch):
    """The number of layers in each call of the function."""
    found, real = [], joint._apply

    def apply(x, call, *parameters):
        found.append(call.group.sizes.count)
        return real(x, call, *parameters)

    monkeypatch.setattr(joint, "_apply", apply)
    return found


class Block(nn.Module):
    """Attention and MLP in miniature; q, k and v have a bias and two output sizes."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 12), nn.Linear(12, 6), nn.Linear(12, 6)
        self.gate, self.up, self.down = (nn.Linear(*size, bias=False) for size in ((12, 20), (12, 20), (20, 12)))

    def forward(self, x):
        x = x + torch.tanh(self.q(x)) * torch.cat([self.k(x), self.v(x)], -1)
        return x + self.down(torch.tanh(self.gate(x)) * self.up(x))


class Net(nn.Module):
    def __init__(self, reentrant=None):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.reentrant = reentrant

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def adapted(model=None, **options):
    options = {
        "r": 2,
        "num_heads": 3,
        "init_weights": False,
        "head_dropout": 0.3,
        "target_modules": TARGETS,
        **options,
    }
    return get_peft_model((model or Net()).double(), RLoraConfig(**options)).train()


def batch():
    return torch.randn(5, 4, 12, dtype=torch.float64, requires_grad=True)


def step(model, x, run=None, **kwargs):
    """The output, and the gradients of the input and of all that is trained."""
    torch.manual_seed(7)
    model.zero_grad()
    x.grad = None
    y = (run or model)(x, **kwargs)
    y.square().mean().backward()
    return [y.detach(), x.grad.clone(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]]


def alone(model, x, monkeypatch, **kwargs):
    """The same where each base layer is called."""
    with monkeypatch.context() as patch:
        patch.setattr(base_product, "JOINED_DEVICES", set())
        return step(model, x, **kwargs)


def assert_same(found, wanted, rtol=1e-9):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12)


@grouping
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"router": "uniform"}, {"share_a": False}, {"router": "top_k", "router_top_k": 2}, {"num_heads": 1, "r": 5}],
    ids=lambda options: "-".join(map(str, options.values())) or "softmax",
)
def test_a_step_is_the_same_and_later_ones_are_grouped(options, reentrant, sizes, monkeypatch):
    model, x = adapted(Net(reentrant), **options), batch()
    wanted = alone(model, x, monkeypatch)
    assert not sizes
    assert_same(step(model, x), wanted)
    sizes.clear()
    assert_same(step(model, x), wanted)
    # Nothing tells the regions of reentrant checkpoints from each other.
    assert set(sizes) == ({1} if reentrant else {1, 2, 3})


@grouping
def test_the_first_pass_is_observed(sizes):
    model, x = adapted(), batch()
    step(model, x)
    assert sizes == [1] * 12
    sizes.clear()
    step(model, x)
    assert sizes == [3, 2, 1] * 2


@grouping
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("given", ["rows", "tokens", "partly", "one", "none"])
def test_task_router(given, reentrant, sizes, monkeypatch):
    model, x = adapted(Net(reentrant), router="task", tasks=["a", "b", "c"], head_dropout=0.0), batch()
    ids = {
        "rows": torch.tensor([0, 2, 1, 0, 0]),
        "tokens": torch.randint(0, 3, (5, 4)),
        "partly": torch.tensor([0, -1, 1, -1, 2]),
    }.get(given)
    if given == "one":
        model.base_model.set_task("b")
    kwargs = {} if ids is None else {"task_ids": ids}
    wanted = alone(model, x, monkeypatch, **kwargs)
    for _ in range(3):
        assert_same(step(model, x, **kwargs), wanted, rtol=1e-5)  # gradients of float32 logits
    assert (3 in sizes) is not bool(reentrant)


def test_task_router_with_several_backward_passes(monkeypatch):
    """Losses of two layers may be differentiated one after the other."""
    model, x = adapted(router="task", tasks=["a", "b"], head_dropout=0.0), batch()
    ids = torch.tensor([0, 1, 1, 0, 1])
    for _ in range(2):
        step(model, x, task_ids=ids)
    blocks, kept = model.base_model.model.blocks, []
    hooks = [block.down.register_forward_hook(lambda m, args, y: kept.append(y)) for block in blocks]
    model.zero_grad()
    model(x.detach(), task_ids=ids)
    first = kept[0].square().mean()
    first.backward(retain_graph=True)
    once = blocks[0].gate.rlora_adapters.default.router.grad.clone()
    first.backward()
    torch.testing.assert_close(blocks[0].gate.rlora_adapters.default.router.grad, 2 * once, rtol=1e-9, atol=1e-12)
    for hook in hooks:
        hook.remove()


@grouping
def test_layers_that_get_other_inputs_are_left_alone(sizes, monkeypatch):
    """A pass with other inputs than those observed: computed again, and not grouped any more."""

    class Changing(Net):
        changed = False

        def forward(self, x):
            block = self.blocks[0]
            y = torch.tanh(block.gate(x)) * block.up(x + 1 if self.changed else x)
            return x + block.down(y)

    model, x = adapted(Changing(), target_modules=["gate", "up", "down"], head_dropout=0.0), batch()
    step(model, x)
    step(model, x)
    model.base_model.model.changed = True
    wanted = alone(model, x, monkeypatch)
    sizes.clear()
    assert_same(step(model, x), wanted)
    assert sizes == [2, 1, 1]
    sizes.clear()
    assert_same(step(model, x), wanted)
    assert sizes == [1, 1, 1]


def test_an_input_that_is_changed_in_place(monkeypatch):
    class InPlace(Net):
        def forward(self, x):
            h = (x * 1.0).detach()
            gate = self.blocks[0].gate(h)
            h.add_(0.0 if not self.changed else 1.0)
            return self.blocks[0].down(gate.detach() * self.blocks[0].up(h)) + x

        changed = False

    model, x = adapted(InPlace(), target_modules=["gate", "up", "down"]), batch()
    step(model, x)
    model.base_model.model.changed = True
    wanted = alone(model, x, monkeypatch)
    for _ in range(3):
        assert_same(step(model, x), wanted)


def test_layers_that_are_recomputed_on_their_own(monkeypatch):
    """A checkpoint around single layers: each recomputes its own output, and saves what it saved before."""

    class Apart(Net):
        def forward(self, x):
            block = self.blocks[0]
            gate = checkpoint(block.gate, x, use_reentrant=False)
            up = checkpoint(block.up, x, use_reentrant=False)
            return x + block.down(gate * up)

    model, x = adapted(Apart(), target_modules=["gate", "up", "down"], head_dropout=0.0), batch()
    wanted = alone(model, x, monkeypatch)
    for _ in range(3):
        assert_same(step(model, x), wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_that_begins_later(reentrant, monkeypatch):
    model, x = adapted(), batch()
    wanted = alone(model, x, monkeypatch)
    step(model, x)
    step(model, x)
    model.base_model.model.reentrant = reentrant
    for _ in range(2):
        assert_same(step(model, x), wanted)


def test_a_pass_that_is_recomputed_after_the_groups_have_changed(monkeypatch):
    """The backward pass of an observed pass, after later passes were grouped."""
    model, x = adapted(Net(False), head_dropout=0.0), batch()
    wanted = alone(model, x, monkeypatch)
    torch.manual_seed(7)
    model.zero_grad()
    x.grad = None
    first = model(x)
    with torch.no_grad():
        model(x)
    model(x.detach().requires_grad_(True))
    first.square().mean().backward()
    assert_same([first.detach(), x.grad, *[p.grad for p in model.parameters() if p.grad is not None]], wanted)


@pytest.mark.parametrize(
    "how",
    [
        *(
            "hook on adapter",
            "hook on base",
            "hook on layer",
            "scale",
            "frozen",
            "disabled",
            "data",
            "forward of base",
        ),
        *("forward of adapter", "backward hook on base", "backward hook on adapter", "global hook"),
    ],
)
def test_a_layer_that_is_changed_is_seen(how, monkeypatch):
    model, x = adapted(head_dropout=0.0), batch()
    step(model, x)
    step(model, x)
    up = model.base_model.model.blocks[0].up
    if how == "hook on adapter":
        up.rlora_adapters.default.register_forward_hook(lambda m, args, y: 2 * y)
    elif how == "hook on base":
        up.base_layer.register_forward_hook(lambda m, args, y: 3 * y)
    elif how == "hook on layer":
        up.register_forward_pre_hook(lambda m, args: (2 * args[0],))
    elif how == "scale":
        up.set_scale("default", 0.1)
    elif how == "data":
        up.base_layer.weight.data = 2 * up.base_layer.weight.data
    elif how == "forward of base":
        up.base_layer.forward = lambda x: 3 * nn.functional.linear(x, up.base_layer.weight)
    elif how == "forward of adapter":
        real = up.rlora_adapters.default.forward
        up.rlora_adapters.default.forward = lambda *args, **kwargs: real(*args, **kwargs) * 2
    elif how == "backward hook on base":
        up.base_layer.register_full_backward_pre_hook(lambda m, grads: (2 * grads[0],))
    elif how == "backward hook on adapter":
        up.rlora_adapters.default.register_full_backward_pre_hook(lambda m, grads: (2 * grads[0],))
    elif how == "global hook":
        handle = nn.modules.module.register_module_forward_hook(
            lambda m, args, y: 2 * y if m is up.base_layer else None
        )
    elif how == "frozen":
        up.rlora_adapters.default.B.requires_grad_(False)
    else:
        up.enable_adapters(False)
    try:
        wanted = alone(model, x, monkeypatch)
        for _ in range(2):
            assert_same(step(model, x), wanted)
    finally:
        if how == "global hook":
            handle.remove()


def test_biases_that_are_unfrozen(monkeypatch):
    model, x = adapted(head_dropout=0.0), batch()
    step(model, x)
    step(model, x)
    model.base_model.model.blocks[0].k.base_layer.bias.requires_grad_(True)
    assert_same(step(model, x), alone(model, x, monkeypatch))


def test_a_whole_model_that_is_checkpointed(monkeypatch):
    """Also in its first pass, and in passes that miss a group: a recomputation has the groups of its pass."""
    model, x = adapted(head_dropout=0.0), batch()
    wanted = alone(model, x, monkeypatch)
    for _ in range(3):
        assert_same(step(model, x, run=lambda x: checkpoint(model, x, use_reentrant=False)), wanted)


def test_a_mode_that_changes_before_the_backward_pass(monkeypatch):
    model, x = adapted(Net(False), head_dropout=0.0), batch()
    wanted = alone(model, x, monkeypatch)
    for _ in range(3):
        model.zero_grad()
        x.grad = None
        y = model.train()(x)
        model.eval()
        y.square().mean().backward()
        found = [y.detach(), x.grad.clone(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]]
        assert_same(found, wanted)


def test_adapters_that_are_replaced_under_their_name(monkeypatch):
    model, x = adapted(head_dropout=0.0), batch()
    step(model, x)
    step(model, x)
    for layer in model.base_model._adapted:
        layer.rlora_adapters["default"] = copy.deepcopy(layer.rlora_adapters["default"])
        layer.rlora_adapters["default"].routing = layer.rlora_adapters["default"].routing
        with torch.no_grad():
            layer.rlora_adapters["default"].B.mul_(0.5)
    assert_same(step(model, x), alone(model, x, monkeypatch))


@grouping
def test_a_first_pass_that_fails_is_observed_again(sizes):
    model, x = adapted(), batch()
    handle = model.base_model.model.blocks[1].down.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x)
    handle.remove()
    assert model.base_model._shared_inputs.groups._last is None
    step(model, x)
    sizes.clear()
    step(model, x)
    assert sizes == [3, 2, 1] * 2


def test_calls_outside_of_a_pass_are_not_observed():
    model, x = adapted(), batch()
    step(model, x)
    model.base_model._shared_inputs.groups = type(model.base_model._shared_inputs.groups)()
    groups = model.base_model._shared_inputs.groups
    for _ in range(3):
        model.base_model.model(x).sum().backward()
    assert not groups._found and groups._last is None


def test_task_ids_in_a_buffer_that_is_reused(monkeypatch):
    model, x = adapted(router="task", tasks=["a", "b", "c"], head_dropout=0.0), batch()
    ids = torch.tensor([0, 2, 1, 0, 0])
    step(model, x, task_ids=ids)
    step(model, x, task_ids=ids)
    ids.copy_(torch.tensor([1, 1, 2, 2, 0]))
    assert_same(step(model, x, task_ids=ids), alone(model, x, monkeypatch, task_ids=ids), rtol=1e-4)


def test_routers_that_change_between_passes(monkeypatch):
    """A call of the inner model, which no pass prepares."""
    model, x = adapted(router="task", tasks=["a", "b"], head_dropout=0.0), batch()
    model.base_model.set_task("b")
    step(model, x)
    step(model, x)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("router"):
                p.add_(1.0 + torch.arange(3.0))
    inner = model.base_model.model
    assert_same(step(inner, x), alone(inner, x, monkeypatch), rtol=1e-5)


def test_gradients_of_task_routers_reach_hooks_once(monkeypatch):
    """Of layers that the loss does not use, no hook runs, as DistributedDataParallel expects."""

    class Unused(Net):
        def forward(self, x):
            super().forward(x)
            return x + self.blocks[0].down(self.blocks[0].gate(x) * self.blocks[0].up(x))

    model, x = adapted(Unused(), router="task", tasks=["a", "b"], head_dropout=0.0), batch()
    calls = []
    for name, p in model.named_parameters():
        if name.endswith("router") and p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p, name=name: calls.append((name, p.grad is not None)))
    for _ in range(2):
        calls.clear()
        step(model, x, task_ids=torch.tensor([0, 1, 1, 0, 1]))
        assert len(calls) == len(set(calls)) == 3 and all(found for _, found in calls)


def test_weights_that_change_between_the_layers_of_a_group(monkeypatch):
    """By `functional_call` of a follower within the pass."""
    model, x = adapted(head_dropout=0.0), batch()
    block = model.base_model.model.blocks[0]
    given = {name: 2 * p.detach() for name, p in block.up.named_parameters() if "rlora" in name}
    real = block.up.forward
    step(model, x)
    step(model, x)
    block.up.forward = lambda x: real(x)
    wrapped, busy = block.up.forward, []

    def forward(x):
        if busy:
            return wrapped(x)
        busy.append(1)
        try:
            return torch.func.functional_call(block.up, given, (x,))
        finally:
            busy.clear()

    block.up.forward = forward
    wanted = alone(model, x, monkeypatch)
    for _ in range(2):
        assert_same(step(model, x), wanted)


def test_a_changed_weight_of_the_base(monkeypatch):
    model, x = adapted(head_dropout=0.0), batch()
    step(model, x)
    step(model, x)
    base = model.base_model.model.blocks[0].up.base_layer
    base.weight = nn.Parameter(2 * base.weight.detach(), requires_grad=False)
    assert_same(step(model, x), alone(model, x, monkeypatch))


def test_other_adapters_and_merging(monkeypatch):
    model, x = adapted(head_dropout=0.0, router="uniform"), batch()
    step(model, x)
    step(model, x)
    options = {"r": 3, "num_heads": 2, "target_modules": TARGETS, "init_weights": False, "head_dropout": 0.0}
    model.add_adapter("other", RLoraConfig(**options))
    model.set_adapter("other")
    assert_same(step(model, x), alone(model, x, monkeypatch))
    model.set_adapter("default")
    model.delete_adapter("other")
    for _ in range(2):
        assert_same(step(model, x), alone(model, x, monkeypatch))
    wanted = step(model, x)[0]
    model.merge_adapter()
    torch.testing.assert_close(model(x).detach(), wanted, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert_same(step(model, x), alone(model, x, monkeypatch))


def test_a_failed_pass_leaves_nothing_behind():
    model, x = adapted(), batch()
    step(model, x)
    step(model, x)
    handle = model.base_model.model.blocks[0].up.register_forward_pre_hook(lambda *args: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            model(x)
    handle.remove()
    assert not any("ready" in vars(module) for module in model.modules())
    step(model, x)


def test_copies_find_their_own_groups(sizes):
    model, x = adapted(), batch()
    step(model, x)
    wanted = step(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        sizes.clear()
        assert_same(step(other, x), wanted)
        assert sizes == [1] * 12
        assert_same(step(other, x), wanted)
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(2)
        assert not torch.equal(step(other, x)[0], wanted[0])
    assert_same(step(model, x), wanted)


def test_memory_is_given_back():
    model, x = adapted(), batch()
    step(model, x)
    step(model, x)
    adapters = [
        weakref.ref(layer.rlora_adapters["default"]) for layer in model.modules() if hasattr(layer, "rlora_adapters")
    ]
    model.unload()
    gc.collect()
    assert len(adapters) == 12 and not any(adapter() is not None for adapter in adapters)


def test_outputs_may_be_changed_in_place():
    class InPlace(Net):
        def forward(self, x):
            block = self.blocks[0]
            return x + block.down(block.gate(x).mul_(2.0) * block.up(x).add_(1.0))

    model, x = adapted(InPlace(), target_modules=["gate", "up", "down"]), batch()
    wanted = step(model, x)
    assert_same(step(model, x), wanted)


@pytest.mark.parametrize("how", ["another dtype", "data", "merge"])
def test_groups_keep_no_weights_that_were_replaced(how):
    model, x = adapted(router="uniform"), batch()
    for _ in range(2):
        step(model, x)
    weights = [p for name, p in model.named_parameters() if name.endswith("base_layer.weight")]
    storages = [StorageWeakRef(weight.untyped_storage()) for weight in weights]
    if how == "another dtype":
        model.float()
    elif how == "merge":
        model.merge_adapter()
    else:
        for weight in weights:
            weight.data = weight.data.clone()
    gc.collect()
    assert all(storage.expired() for storage in storages)


def test_a_scaling_that_changes_within_a_pass(monkeypatch):
    """The weights that were concatenated when the pass began have another one."""
    model, x = adapted(), batch()
    block = model.base_model.model.blocks[0]
    block.gate.register_forward_pre_hook(lambda *args: block.down.set_scale("default", 2.0))
    block.down.register_forward_hook(lambda *args: block.down.set_scale("default", 1.0) and None)
    wanted = alone(model, x, monkeypatch)
    for _ in range(4):
        assert_same(step(model, x), wanted)
