"""The operators for `torch.compile`, and compiled layers against eager ones: no graph break, no recompilation."""

import gc
import shutil
from collections import OrderedDict

import pytest
import torch
from peft import get_peft_model
from testing_utils import perturb
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from rlora_trl import RLoraConfig
from rlora_trl.kernels import (
    LayerProbe,
    RoutingTally,
    capture_loss_grad,
    compiled,
    compiled_multihead,
    fused_multihead,
    multihead_delta,
    rank_space,
)
from rlora_trl.kernels.balance import new_record
from rlora_trl.kernels.rank_space import Layout
from rlora_trl.tuner import HeadUsage, MultiHeadAdapter


T, D_IN, D_OUT, N, R = 37, 13, 17, 3, 4
LAYOUTS = {
    "plain": Layout(N, R),
    "own_a": Layout(N, R, anchored=False, shared=False, top_k=2),
}


@pytest.fixture(autouse=True)
def _forget_graphs():
    torch._dynamo.reset()
    counters.clear()


def graphs():
    return counters["stats"]["unique_graphs"]


def new_tally(rows=1, kind="switch"):
    return RoutingTally(new_record(rows, N), kind, 0.1)


def some_mask(*shape):
    return (torch.rand(shape) < 0.7).to(torch.uint8)


@pytest.mark.parametrize("name", LAYOUTS)
def test_operators_are_sound(name):
    """Schemas, shapes of the fakes (also with symbols), and the gradient of `mix`."""
    layout = LAYOUTS[name]
    P = torch.randn(T, layout.p_columns)
    dZ, seed = torch.randn(T, layout.z_columns), torch.tensor(5)
    calls = [
        (compiled.mix, (P.clone().requires_grad_(True), seed, 0.3, layout.z_columns, *layout)),
        (compiled.mix_backward, (P, dZ, seed, 0.3, 2.0, N * R + 1, *layout)),
    ]
    tally, mask = new_tally(), some_mask(T)
    partials = rank_space.statistics(P, layout, mask).unsqueeze(0)
    calls += [
        (compiled.mix_recorded, (P, mask, seed, 0.3, layout.z_columns, *layout)),
        (compiled.mix_backward_recorded, (P, dZ, partials, mask, tally.ticket, 0, seed, 0.3, 2.0, 0, *layout)),
        (compiled.record, (P, torch.randn_like(P), None, tally.ticket, 0, *layout)),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator.default, arguments)


CASES = {
    "plain": {},
    "own_a": {"shared": False},
    "top_k": {"top_k": 2, "anchored": False},
    "uniform": {"router": False},
    "logits": {"router": False, "logits": True},
}


def make(shared=True, anchored=True, router=True, logits=False, dtype=torch.float32):
    shape_A = (R, D_IN) if shared else (N, R, D_IN)
    shapes = {"x": (2, T, D_IN), "A": shape_A, "B": (N, D_OUT, R), "router": (N, D_IN), "logits": (2 * T, N)}
    if not router:
        del shapes["router"]
    if not logits:
        del shapes["logits"]
    tensors = {name: torch.randn(shape, dtype=dtype, requires_grad=True) for name, shape in shapes.items()}
    anchors = {}
    if anchored:
        shape_B = (D_OUT, R) if shared else (N, D_OUT, R)
        anchors = {"anchor_A": torch.randn(shape_A, dtype=dtype), "anchor_B": torch.randn(shape_B, dtype=dtype)}
    return tensors, anchors


def results(form, tensors, upstream, tally=None, mask=None, **options):
    """The output and all gradients."""
    y = form(**tensors, probe=None if tally is None else LayerProbe(tally, 0, mask), **options)
    loss = (y * upstream).sum()
    loss = loss if tally is None else capture_loss_grad(3.0 * loss, tally)
    return [y.detach(), *torch.autograd.grad(loss, list(tensors.values()))]


@pytest.mark.parametrize("name", CASES)
def test_compiled_equals_eager(name):
    """Outputs, every gradient, and what is recorded; with new tallies and seeds, and without a new graph for them."""
    case = dict(CASES[name])
    top_k = case.pop("top_k", 0)
    tensors, anchors = make(**case)
    compiled = torch.compile(compiled_multihead, backend="aot_eager", fullgraph=True)
    upstream = torch.randn(2, T, D_OUT)
    for step in range(3):
        options = {**anchors, "scaling": 0.5, "dropout": 0.3, "top_k": top_k}
        tallies = (None, None) if name == "uniform" else (new_tally(), new_tally())
        mask = some_mask(2 * T)
        wanted = results(fused_multihead, tensors, upstream, tallies[0], mask, seed=step + 2**40, **options)
        got = results(compiled, tensors, upstream, tallies[1], mask, seed=torch.tensor(step + 2**40), **options)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        if name != "uniform":
            assert tallies[1].record[0, 0] == mask.sum()
            torch.testing.assert_close(tallies[1].record, tallies[0].record)
            gc.collect()  # so that a graph which holds on to the first tally, by its number, shows
        assert graphs() == 1


@pytest.mark.parametrize("form", [compiled_multihead, multihead_delta])
def test_input_dropout_and_balance_of_the_composed_form(form):
    """Both forms, called without a compiler too, where it is pretended that there is one."""
    tensors, anchors = make()
    upstream, mask = torch.randn(2, T, D_OUT), some_mask(2 * T)
    position = {"dropout_position": "input"} if form is multihead_delta else {}
    options = {**anchors, "dropout": 0.3, "seed": torch.tensor(4), **position}
    first, second = new_tally(), new_tally()
    wanted = results(form, tensors, upstream, first, mask, **options)
    compiled = torch.compile(form, backend="aot_eager", fullgraph=True)
    got = results(compiled, tensors, upstream, second, mask, **options)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second.record, first.record)
    assert second.record[0, 0] == mask.sum()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor():
    tensors, anchors = make()
    compiled = torch.compile(compiled_multihead, fullgraph=True)
    upstream, tallies = torch.randn(2, T, D_OUT), (new_tally(), new_tally())
    options = {**anchors, "dropout": 0.3}
    wanted = results(fused_multihead, tensors, upstream, tallies[0], seed=5, **options)
    got = results(compiled, tensors, upstream, tallies[1], seed=torch.tensor(5), **options)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tallies[1].record, tallies[0].record)


def test_saved_for_backward():
    """x, P and the packed weights: neither a mask, nor Z, nor anything of the size of the output."""
    saved = []

    def backward(graph, inputs):
        saved.extend(inputs)
        return graph

    from functorch.compile import min_cut_rematerialization_partition  # what Inductor uses

    backend = aot_autograd(
        fw_compiler=lambda graph, inputs: graph,
        bw_compiler=backward,
        partition_fn=min_cut_rematerialization_partition,
    )
    tensors, anchors = make()
    options = {**anchors, "dropout": 0.3, "seed": torch.tensor(5)}
    compiled = torch.compile(compiled_multihead, backend=backend)
    results(compiled, tensors, torch.ones(2, T, D_OUT), new_tally(), **options)
    layout = Layout(N, R)
    large = sorted(t.numel() for t in saved if isinstance(t, torch.Tensor) and t.numel() % T == 0 and t.numel())
    # The last is the gradient of the output, which comes from outside.
    assert large == sorted([2 * T * D_IN, 2 * T * layout.p_columns, 2 * T * D_OUT])
    assert not any(t.dtype == torch.bool for t in saved if isinstance(t, torch.Tensor))


def test_a_tally_that_is_gone():
    tensors, _ = make(anchored=False)
    tally = new_tally()
    y = torch.compile(compiled_multihead, backend="aot_eager")(**tensors, probe=LayerProbe(tally, 0))
    del tally
    gc.collect()
    with pytest.raises(RuntimeError, match="is gone. Keep it until the backward pass is over"):
        y.sum().backward()


class Net(nn.Module):
    """A block of two layers, checkpointed in one of the two ways or not at all."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.reentrant = reentrant
        self.block = nn.Sequential(OrderedDict(up=nn.Linear(12, 20), down=nn.Linear(20, 12)))

    def forward(self, x):
        if self.reentrant is None:
            return x + self.block(x)
        return x + checkpoint(self.block, x, use_reentrant=self.reentrant)


def adapted_net(reentrant=None, **options):
    """The net with adapters, and the adapters."""
    config = RLoraConfig(target_modules=["up", "down"], num_heads=N, **options)
    net = get_peft_model(Net(reentrant), config).get_base_model()
    perturb(net)
    adapters = [module for module in net.modules() if isinstance(module, MultiHeadAdapter)]
    assert len(adapters) == 2
    for row, adapter in enumerate(adapters):
        adapter.routing_row = adapter.usage_row = row
    return net, adapters


def step(net, forward, routing, x, mask, task_ids):
    """Gradients and record of a micro-batch, as the trainer has them."""
    tally = new_tally(2)
    routing.update(tally=tally, token_mask=mask, task_ids=task_ids)
    net.zero_grad()
    capture_loss_grad(forward(x).square().sum(), tally).backward()
    routing.forget_batch()
    return [p.grad for p in net.parameters() if p.grad is not None], tally.record


@pytest.mark.parametrize(("router", "reentrant"), [("softmax", None), ("task", False), ("softmax", True)])
def test_compiled_model(router, reentrant):
    """One graph for micro-batches of one shape, one for all other shapes; each layer reports once in each pass."""
    options = {"router": "task", "tasks": ["a", "b"]} if router == "task" else {}
    net, adapters = adapted_net(reentrant, head_dropout=0.0, **options)
    routing, compiled = adapters[0].routing, torch.compile(net, backend="aot_eager", fullgraph=True)
    known = []
    for rows, length in [(3, 5), (3, 5), (4, 7), (2, 6), (5, 8)]:
        x = torch.randn(rows, length, 12, requires_grad=True)
        mask = some_mask(rows, length)
        task_ids = torch.arange(rows) % 3 - 1 if router == "task" else None
        wanted, wanted_record = step(net, net, routing, x, mask, task_ids)
        got, record = step(net, compiled, routing, x, mask, task_ids)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert record[:, 0].tolist() == [mask.sum()] * 2
        torch.testing.assert_close(record, wanted_record)
        known.append(graphs())
    assert known[:3] == [1, 1, 2]
    # torch 2.6 takes the sizes of a tensor that an object holds, as a routing state holds the mask, for constants.
    assert torch.__version__.startswith("2.6") or known[3:] == [2, 2]


def test_fused_function_can_be_compiled():
    """It has another form for that, which the compiler can trace."""
    x, A, B = torch.randn(5, 12, requires_grad=True), torch.randn(4, 12), torch.randn(3, 7, 4)
    weight = torch.randn(7, 12)
    compiled = torch.compile(lambda x: fused_multihead(x, A, B, weight=weight), backend="aot_eager", fullgraph=True)
    expected = fused_multihead(x, A, B, weight=weight)
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (compiled(x), expected)))


def test_operators_take_any_strides():
    """Kernels read rows that are side by side; a gradient that was expanded has none."""
    layout = Layout(3, 4, anchored=False)
    P = torch.randn(5, 9)[:, 1:-1].requires_grad_(True)  # 4 + 3 columns
    whole = P.detach().clone(memory_format=torch.contiguous_format).requires_grad_(True)
    outputs = [compiled.mix(p, None, 0.0, 12, *layout) for p in (P, whole)]
    assert torch.equal(*outputs)
    gradients = [torch.autograd.grad(y.sum(), p)[0] for y, p in zip(outputs, (P, whole), strict=True)]
    expected = torch.autograd.grad((rank_space.mix(whole, 12, layout) * torch.ones(5, 12)).sum(), whole)[0]
    for gradient in gradients:
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_has_the_same_masks(reentrant):
    """Without routers and anchors the net is linear in the heads of a layer, given the masks."""
    net, adapters = adapted_net(reentrant, head_dropout=0.4, router="uniform", init_weights="zero_a")
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 5, 12, requires_grad=True)
    upstream = torch.randn(3, 5, 12)

    def output():
        torch.manual_seed(3)
        return compiled(x)

    before = output()
    (before * upstream).sum().backward()
    for adapter in adapters:
        change = torch.randn_like(adapter.B)
        with torch.no_grad():
            adapter.B += change
            difference = ((output() - before) * upstream).sum()
            adapter.B -= change
        torch.testing.assert_close(difference, (change * adapter.B.grad).sum(), rtol=1e-3, atol=1e-3)
    torch.manual_seed(4)
    assert not torch.equal(compiled(x), before)  # other masks


def test_usage_is_recorded():
    """Evaluation sums the weights of heads in the forward pass."""
    net, adapters = adapted_net()
    net.eval()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        x, found = torch.randn(3, 5, 12), []
        routing = adapters[0].routing
        routing.update(token_mask=some_mask(3, 5))
        for forward in (net, compiled):
            usage = HeadUsage(1, 2, N)
            routing.update(usage=usage)
            with torch.no_grad():
                found.append((forward(x), usage.weights, usage.tokens))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert found[1][2].sum() == 2 * routing.batch.token_mask.sum()
        assert graphs() == 1


def test_autocast():
    net, adapters = adapted_net(head_dropout=0.0)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 5, 12)
    grads = []
    for forward in (net, compiled):
        net.zero_grad()
        routing = adapters[0].routing
        routing.update(tally=new_tally(2))
        with torch.autocast("cpu", torch.bfloat16):
            y = forward(x)
        capture_loss_grad(y.float().square().sum(), routing.batch.tally).backward()
        grads.append([adapter.B.grad for adapter in adapters] + [adapter.router.grad for adapter in adapters])
    for a, b in zip(*grads, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() / b.norm() < 2e-2  # a few roundings of 2**-9 each
