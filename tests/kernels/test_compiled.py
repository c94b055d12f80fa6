"""Compiled layers against eager ones: no graph break, no recompilation."""

import gc
import shutil
from collections import OrderedDict

import pytest
import torch
from kernel_helpers import fused_multihead
from peft import get_peft_model
from testing_utils import perturb
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from rlora_trl import RLoraConfig
from rlora_trl.kernels import (
    LayerProbe,
    RoutingStats,
    RoutingTally,
    capture_loss_grad,
    compiled_multihead,
    multihead_delta,
    rank_space,
)
from rlora_trl.kernels.rank_space import Layout
from rlora_trl.tuner import HeadUsage, MultiHeadAdapter


T, D_IN, D_OUT, N, R = 37, 13, 17, 3, 4


@pytest.fixture(autouse=True)
def _forget_graphs():
    torch._dynamo.reset()
    counters.clear()


def graphs():
    return counters["stats"]["unique_graphs"]


def new_tally(rows=1, kind="switch"):
    return RoutingTally(RoutingStats.zeros(rows, N), kind, 0.1)


def some_mask(*shape):
    return (torch.rand(shape) < 0.7).to(torch.uint8)


CASES = {
    "plain": {},
    "separate_a": {"shared": False},
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
    """Outputs, every gradient and the statistics; with new tallies and seeds, and without a new graph for them."""
    case = dict(CASES[name])
    top_k = case.pop("top_k", 0)
    tensors, anchors = make(**case)
    compiled = torch.compile(compiled_multihead, backend="aot_eager", fullgraph=True)
    upstream = torch.randn(2, T, D_OUT)
    for step in range(3):
        options = {**anchors, "scaling": 0.5, "dropout": 0.3, "top_k": top_k}
        tallies = (None, None) if name == "uniform" else (new_tally(), new_tally())
        mask = some_mask(2 * T)
        expected = results(fused_multihead, tensors, upstream, tallies[0], mask, seed=step + 2**40, **options)
        actual = results(compiled, tensors, upstream, tallies[1], mask, seed=torch.tensor(step + 2**40), **options)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        if name != "uniform":
            assert tallies[1].stats.tokens[0] == mask.sum()
            torch.testing.assert_close(tallies[1].stats.data, tallies[0].stats.data)
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
    expected = results(form, tensors, upstream, first, mask, **options)
    compiled = torch.compile(form, backend="aot_eager", fullgraph=True)
    actual = results(compiled, tensors, upstream, second, mask, **options)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second.stats.data, first.stats.data)
    assert second.stats.tokens[0] == mask.sum()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor():
    tensors, anchors = make()
    compiled = torch.compile(compiled_multihead, fullgraph=True)
    upstream, tallies = torch.randn(2, T, D_OUT), (new_tally(), new_tally())
    options = {**anchors, "dropout": 0.3}
    expected = results(fused_multihead, tensors, upstream, tallies[0], seed=5, **options)
    actual = results(compiled, tensors, upstream, tallies[1], seed=torch.tensor(5), **options)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tallies[1].stats.data, tallies[0].stats.data)


def test_saved_for_backward():
    """x, P and the concatenated weights: neither a mask, nor Z, nor anything of the size of the output."""
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
    assert large == sorted([2 * T * D_IN, 2 * T * rank_space.p_columns(layout), 2 * T * D_OUT])
    assert not any(t.dtype == torch.bool for t in saved if isinstance(t, torch.Tensor))


def test_a_tally_that_is_gone():
    tensors, _ = make(anchored=False)
    tally = new_tally()
    y = torch.compile(compiled_multihead, backend="aot_eager")(**tensors, probe=LayerProbe(tally, 0))
    del tally
    gc.collect()
    with pytest.raises(RuntimeError, match="no longer exists. Keep a reference"):
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
    """Gradients and statistics of a micro-batch, as in the trainer."""
    tally = new_tally(2)
    routing.update(tally=tally, token_mask=mask, task_ids=task_ids)
    net.zero_grad()
    capture_loss_grad(forward(x).square().sum(), tally).backward()
    routing.forget_batch()
    return [p.grad for p in net.parameters() if p.grad is not None], tally.stats


@pytest.mark.parametrize(("router", "reentrant"), [("softmax", None), ("task", False), ("softmax", True)])
def test_compiled_model(router, reentrant):
    """One graph for micro-batches of one shape, one for all other shapes; each layer reports once in each pass."""
    options = {"router": "task", "tasks": ["a", "b"]} if router == "task" else {}
    net, adapters = adapted_net(reentrant, head_dropout=0.0, **options)
    routing, compiled = adapters[0].routing, torch.compile(net, backend="aot_eager", fullgraph=True)
    graph_counts = []
    for rows, length in [(3, 5), (3, 5), (4, 7), (2, 6), (5, 8)]:
        x = torch.randn(rows, length, 12, requires_grad=True)
        mask = some_mask(rows, length)
        task_ids = torch.arange(rows) % 3 - 1 if router == "task" else None
        expected, expected_stats = step(net, net, routing, x, mask, task_ids)
        actual, stats = step(net, compiled, routing, x, mask, task_ids)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert stats.tokens.tolist() == [mask.sum()] * 2
        torch.testing.assert_close(stats.data, expected_stats.data)
        graph_counts.append(graphs())
    assert graph_counts[:3] == [1, 1, 2]
    # torch 2.6 takes the sizes of a tensor that an object holds, as a routing state holds the mask, for constants.
    assert torch.__version__.startswith("2.6") or graph_counts[3:] == [2, 2]


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


def test_usage_is_counted():
    """Evaluation sums the weights of heads in the forward pass."""
    net, adapters = adapted_net()
    net.eval()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        x, outputs = torch.randn(3, 5, 12), []
        routing = adapters[0].routing
        routing.update(token_mask=some_mask(3, 5))
        for forward in (net, compiled):
            usage = HeadUsage(1, 2, N)
            routing.update(usage=usage)
            with torch.no_grad():
                outputs.append((forward(x), usage.weights, usage.tokens))
        for a, b in zip(*outputs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert outputs[1][2].sum() == 2 * routing.batch.token_mask.sum()
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
