"""The adapter as a module: inference, copies, head weights, `torch.compile`."""

import copy
import pickle

import pytest
import torch

from rlora_trl import MultiHeadAdapter
from rlora_trl.tuner import Routing


TASKS = ["first", "colour", "same"]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("position", ["head", "input"])
def test_compiles_without_a_graph_break(position):
    """Several steps, since the second is where numbers that change become symbols."""
    adapter = MultiHeadAdapter(8, 6, 2, 3, 1.0, init_weights=False, dropout=0.3, dropout_position=position).train()
    compiled = torch.compile(adapter, backend="aot_eager", fullgraph=True)
    outputs = []
    for _ in range(3):
        x = torch.randn(5, 8, requires_grad=True)
        y = compiled(x)
        y.sum().backward()
        assert torch.isfinite(x.grad).all() and torch.isfinite(adapter.A.grad).all()
        outputs.append(compiled(torch.ones(5, 8)))
    assert not torch.equal(outputs[0], outputs[1])  # a new mask in each call
    adapter.eval()
    torch.testing.assert_close(torch.compile(adapter, backend="aot_eager", fullgraph=True)(x), adapter(x))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("router", ["top_k", "task", "own_a"])
def test_compiled_adapter_has_no_graph_break(router):
    kwargs = {"top_k": {"router_top_k": 2}, "task": {"routing": Routing(TASKS, "task")}, "own_a": {"share_a": False}}
    kind = "softmax" if router == "own_a" else router
    adapter = MultiHeadAdapter(8, 6, 2, 3, 1.0, router=kind, init_weights=False, dropout=0.0, **kwargs[router]).train()
    if router == "task":
        adapter.routing.set_task(1)
    x = torch.randn(4, 5, 8)
    expected = adapter(x)
    compiled = torch.compile(adapter, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_after_inference(copied):
    """Inference leaves nothing behind that stops a copy, and a copy follows its own weights."""
    adapter = MultiHeadAdapter(8, 6, 2, 3, 1.0, init_weights=False).eval()
    x = torch.randn(4, 8)
    with torch.no_grad():
        expected = adapter(x)
        twin = copied(adapter)
        assert torch.equal(twin(x), expected)
        twin.B.mul_(2)
        assert not torch.allclose(twin(x), expected)
        assert torch.equal(adapter(x), expected)


def test_head_weights():
    adapter = MultiHeadAdapter(8, 6, 2, 3, 1.0, router_init="kaiming_uniform")
    weights = adapter.head_weights(torch.randn(2, 5, 8))
    assert weights.shape == (2, 5, 3)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 5))
    uniform = MultiHeadAdapter(8, 6, 2, 3, 1.0, router="uniform")
    assert torch.equal(uniform.head_weights(torch.randn(4, 8)), torch.full((4, 3), 1 / 3))
    with pytest.raises(ValueError, match="depends on the token"):
        adapter.delta_weight()


# What a kind of adapter has, beside A and B.
KINDS = {
    "softmax": ({}, {"router", "A0", "B0"}),
    "task": ({"router": "task", "routing": Routing(TASKS, "task")}, {"router", "A0", "B0"}),
    "uniform": ({"router": "uniform"}, {"A0", "B0"}),
    "own_a": ({"share_a": False}, {"router", "A0", "B0"}),
    "no_anchor": ({"init_weights": "zero_b"}, {"router"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_anchor_in_buffers(kind):
    """The same adapter and the same names in files, with no more parameters than are trained."""
    options, others = KINDS[kind]
    adapter = MultiHeadAdapter(8, 6, 2, 3, 1.0, **options)
    with torch.no_grad():
        adapter.B.add_(0.1)
    other, x = copy.deepcopy(adapter), torch.randn(5, 8)
    adapter.hold_anchor_in_buffers()
    adapter.hold_anchor_in_buffers()
    assert set(dict(adapter.named_parameters())) == {"A", "B"} | (others & {"router"})
    assert list(adapter.state_dict()) == list(other.state_dict())
    adapter.freeze_anchor()
    assert all(parameter.requires_grad for parameter in adapter.requires_grad_(True).parameters())

    for each in (adapter, pickle.loads(pickle.dumps(adapter))):
        each.train()(x).sum().backward()
        other.train()(x).sum().backward()
        assert torch.equal(each(x), other(x))
        assert all(torch.equal(each.get_parameter(name).grad, other.get_parameter(name).grad) for name in ("A", "B"))
        other.zero_grad()

    # What inference keeps follows the anchor too.
    anchor = {name: 2 * tensor for name, tensor in adapter.state_dict().items() if name in adapter.anchor_names}
    with torch.no_grad():
        before = adapter.eval()(x)
        for each in (adapter, other.eval()):
            each.load_state_dict(anchor, strict=False)
        assert torch.equal(adapter(x), other(x)) and torch.equal(adapter(x), before) == (not anchor)
    adapter.reset_anchor()
    adapter.cast(torch.bfloat16)
    assert {tensor.dtype for tensor in adapter.state_dict().values()} == {torch.bfloat16}
    assert adapter.is_at_anchor() == ("A0" in others)


@pytest.mark.parametrize("kind", KINDS)
def test_expected_tensors_are_those_of_the_state_dict(kind):
    options, others = KINDS[kind]
    adapter = MultiHeadAdapter(8, 6, 2, 3, 1.0, **options)
    settings = {name: value for name, value in options.items() if name != "routing"}
    expected = MultiHeadAdapter.expected_tensors(8, 6, 2, 3, num_tasks=len(TASKS), **settings)
    assert set(expected) == {"A", "B"} | others
    assert {name: tuple(tensor.shape) for name, tensor in adapter.state_dict().items()} == expected
    assert torch.equal(adapter.A, adapter.A0) if "A0" in others else adapter.A0 is None
    frozen = {name for name, parameter in adapter.named_parameters() if not parameter.requires_grad}
    assert frozen == {"A0", "B0"} & others
