"""Balance losses: the gradients that layers add in their backward pass against autograd through the formulas."""

import pytest
import torch
from kernel_helpers import DEVICE, INTERPRETED, fused_multihead

from rlora_trl.kernels import (
    BALANCE_LOSSES,
    LayerProbe,
    RoutingStats,
    RoutingTally,
    balance_loss,
    capture_loss_grad,
    multihead_delta,
    rank_space,
)
from rlora_trl.kernels.rank_space import Layout


KINDS = [kind for kind in BALANCE_LOSSES if kind != "none"]
# (N, r, tokens): odd sizes, more tokens than one program of the kernels takes, one token.
SIZES = [(3, 4, 67), (2, 3, 64), (8, 5, 200), (5, 2, 1)]


def make(num_heads, r, tokens, dtype, d_in=13, d_out=17):
    shapes = {"x": (tokens, d_in), "A": (r, d_in), "B": (num_heads, d_out, r), "router": (num_heads, d_in)}
    return {name: torch.randn(shape, dtype=dtype, device=DEVICE, requires_grad=True) for name, shape in shapes.items()}


def probe_for(kind, tokens, num_heads, dtype, mask=None, coefficient=0.7, **kwargs):
    stats = RoutingStats.zeros(1, num_heads, DEVICE)
    stats = stats._replace(data=stats.data.to(torch.promote_types(dtype, torch.float32)))
    count = tokens if mask is None else int(mask.sum())
    tally = RoutingTally(stats, kind, coefficient / max(count, 1), **kwargs)
    return LayerProbe(tally, 0, mask)


def gradients(form, tensors, probe, upstream, scale=1.0, **kwargs):
    loss = (form(**tensors, probe=probe, **kwargs) * upstream).sum()
    return torch.autograd.grad(scale * capture_loss_grad(loss, probe.tally), list(tensors.values()))


def error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("form", [fused_multihead, multihead_delta])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_gradient_equals_the_formula(size, kind, masked, form):
    num_heads, r, tokens = size
    if INTERPRETED and tokens > 67 and (kind, masked) != ("switch", True):
        pytest.skip("slow in the interpreter")
    # The composed form has no kernels of its own: float64 shows that it is exact.
    dtype = torch.float32 if form is fused_multihead else torch.float64
    tensors = make(num_heads, r, tokens, dtype)
    mask = None
    if masked:
        mask = (torch.arange(tokens, device=DEVICE) % 3 != 1).to(torch.uint8)
    upstream = torch.randn(tokens, 17, dtype=dtype, device=DEVICE)
    probe = probe_for(kind, tokens, num_heads, dtype, mask)
    actual = gradients(form, tensors, probe, upstream, scale=3.0, dropout=0.2, seed=4)

    plain = (form(**tensors, dropout=0.2, seed=4) * upstream).sum()
    formula = balance_loss(tensors["x"] @ tensors["router"].T, kind, mask)
    expected = torch.autograd.grad(3.0 * (plain + 0.7 * formula), list(tensors.values()))
    for name, a, b in zip(tensors, actual, expected, strict=True):
        assert error(a, b) < (1e-5 if dtype == torch.float32 else 1e-9), name
    loss = (probe.tally.stats.loss / probe.tally.stats.tokens)[0]
    torch.testing.assert_close(loss, formula.detach().to(loss), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_in_16_bits(kind):
    tensors = make(3, 4, 300, torch.float32)
    x = tensors["x"].detach().bfloat16().requires_grad_(True)
    upstream = torch.zeros(300, 17, device=DEVICE, dtype=torch.bfloat16)
    probe = probe_for(kind, 300, 3, torch.float32)
    grads = gradients(fused_multihead, {**tensors, "x": x}, probe, upstream)
    formula = balance_loss(x.float() @ tensors["router"].T, kind)
    (expected,) = torch.autograd.grad(formula * 0.7, tensors["router"])
    # One rounding of the logits, one of their gradient: 2**-9 each. "switch" jumps where rounding reorders heads.
    assert error(grads[3], expected) < (5e-2 if kind == "switch" else 2e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_top_k_is_balanced_by_its_probabilities(kind):
    """A head outside of the top k gets a gradient too."""
    tensors = make(4, 3, 100, torch.float64)
    upstream = torch.zeros(100, 17, dtype=torch.float64, device=DEVICE)
    probe = probe_for(kind, 100, 4, torch.float64)
    actual = gradients(fused_multihead, tensors, probe, upstream, top_k=2)[3]
    (expected,) = torch.autograd.grad(0.7 * balance_loss(tensors["x"] @ tensors["router"].T, kind), tensors["router"])
    assert error(actual, expected) < 1e-9
    assert (actual.norm(dim=1) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_tasks(kind):
    tensors = make(3, 4, 30, torch.float64)
    del tensors["router"]
    tensors["logits"] = torch.randn(30, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    upstream = torch.zeros(30, 17, dtype=torch.float64, device=DEVICE)
    for form in (fused_multihead, multihead_delta):
        actual = gradients(form, tensors, probe_for(kind, 30, 3, torch.float64), upstream)[3]
        (expected,) = torch.autograd.grad(0.7 * balance_loss(tensors["logits"], kind), tensors["logits"])
        assert error(actual, expected) < 1e-9


def test_equal_heads_share_a_token():
    """At a router of zeros every head has the same share, and no balance loss pushes."""
    layout = Layout(4, 2)
    P = torch.zeros(10, rank_space.p_columns(layout), device=DEVICE)
    assert rank_space.routing_stats(P, layout, None)[3:7].tolist() == [2.5] * 4
    tensors = make(4, 2, 10, torch.float64)
    tensors["router"] = torch.zeros_like(tensors["router"]).requires_grad_(True)
    upstream = torch.zeros(10, 17, dtype=torch.float64, device=DEVICE)
    for kind in ("switch", "importance", "mutual_information"):
        actual = gradients(fused_multihead, tensors, probe_for(kind, 10, 4, torch.float64), upstream)
        assert actual[3].abs().max() < 1e-12


def test_without_upstream_only_the_statistics_are_written():
    tensors = make(3, 4, 20, torch.float32)
    probe = probe_for("switch", 20, 3, torch.float32)
    fused_multihead(**tensors, probe=probe).sum().backward()
    with_stats = {name: t.grad.clone() for name, t in tensors.items()}
    for tensor in tensors.values():
        tensor.grad = None
    fused_multihead(**tensors).sum().backward()
    assert all(torch.equal(with_stats[name], t.grad) for name, t in tensors.items())
    assert probe.tally.stats.tokens[0] == 20


def test_no_statistics_without_gradients():
    """The first pass under reentrant checkpointing, which a second one follows."""
    tensors = make(3, 4, 20, torch.float32)
    probe = probe_for("switch", 20, 3, torch.float32)
    with torch.no_grad():
        fused_multihead(**tensors, probe=probe)
    assert not probe.tally.stats.data.any()


def test_statistics_by_name():
    layout = Layout(3, 4)
    P = torch.randn(20, rank_space.p_columns(layout), device=DEVICE)
    stats = RoutingStats.zeros(2, 3, DEVICE)
    assert stats.data.shape[1] % 4 == 0
    stats.data[1, : rank_space.stats_columns(3)] = rank_space.routing_stats(P, layout, None)
    stats.loss[1] = 7.0
    weights = rank_space.routing_weights(P[:, 4:7])
    largest = torch.nn.functional.one_hot(weights.argmax(1), 3).float()
    entropy = torch.distributions.Categorical(weights).entropy()
    assert stats.tokens.tolist() == [0, 20] and stats.loss.tolist() == [0, 7]
    torch.testing.assert_close(stats.entropy[1], entropy.sum())
    torch.testing.assert_close(stats.head_shares[1], torch.cat([largest, weights], 1).sum(0))
    torch.testing.assert_close(stats.head_weights[1], weights.sum(0))
    assert not any(view[0].any() for view in (stats.entropy, stats.head_shares, stats.head_weights))


def test_empty_input():
    tensors = make(3, 4, 0, torch.float32)
    probe = probe_for("switch", 1, 3, torch.float32)
    upstream = torch.zeros(0, 17, device=DEVICE)
    grads = gradients(fused_multihead, tensors, probe, upstream)
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert not probe.tally.stats.data.any()
