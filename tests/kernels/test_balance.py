"""Balance losses: the gradient that layers add in their backward pass against autograd through the formula."""

import os

import pytest
import torch

from rlora_trl.kernels import (
    BALANCE_LOSSES,
    LayerProbe,
    RoutingTally,
    balance_loss,
    capture_loss_grad,
    fused,
    fused_multihead,
    multihead_delta,
    rank_space,
)
from rlora_trl.kernels.balance import new_record
from rlora_trl.kernels.rank_space import Layout


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
KINDS = [kind for kind in BALANCE_LOSSES if kind != "none"]
# (N, r, tokens): odd sizes, more tokens than one program of the kernels takes, one token.
SIZES = [(3, 4, 67), (2, 3, 64), (8, 5, 200), (5, 2, 1)]


def make(num_heads, r, tokens, dtype, d_in=13, d_out=17):
    shapes = {"x": (tokens, d_in), "A": (r, d_in), "B": (num_heads, d_out, r), "router": (num_heads, d_in)}
    return {name: torch.randn(shape, dtype=dtype, device=DEVICE, requires_grad=True) for name, shape in shapes.items()}


def probe_for(kind, tokens, num_heads, dtype, mask=None, coefficient=0.7, **kwargs):
    record = new_record(1, num_heads, DEVICE).to(torch.promote_types(dtype, torch.float32))
    count = tokens if mask is None else int(mask.sum())
    tally = RoutingTally(record, kind, coefficient / max(count, 1), **kwargs)
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
def test_gradient_is_that_of_the_formula(size, kind, masked, form):
    num_heads, r, tokens = size
    # The composed form has no kernels of its own: float64 shows that it is exact.
    dtype = torch.float32 if form is fused_multihead else torch.float64
    tensors = make(num_heads, r, tokens, dtype)
    mask = None
    if masked:
        mask = (torch.arange(tokens, device=DEVICE) % 3 != 1).to(torch.uint8)
    upstream = torch.randn(tokens, 17, dtype=dtype, device=DEVICE)
    probe = probe_for(kind, tokens, num_heads, dtype, mask)
    got = gradients(form, tensors, probe, upstream, scale=3.0, dropout=0.2, seed=4)

    plain = (form(**tensors, dropout=0.2, seed=4) * upstream).sum()
    formula = balance_loss(tensors["x"] @ tensors["router"].T, kind, mask)
    wanted = torch.autograd.grad(3.0 * (plain + 0.7 * formula), list(tensors.values()))
    for name, a, b in zip(tensors, got, wanted, strict=True):
        assert error(a, b) < (1e-5 if dtype == torch.float32 else 1e-9), name
    columns = Layout(num_heads, r).statistics_columns
    count = tokens if mask is None else int(mask.sum())
    torch.testing.assert_close(
        probe.tally.record[0, columns] / count, formula.detach().to(probe.tally.record), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_in_16_bits(kind):
    tensors = make(3, 4, 300, torch.float32)
    x = tensors["x"].detach().bfloat16().requires_grad_(True)
    upstream = torch.zeros(300, 17, device=DEVICE, dtype=torch.bfloat16)
    probe = probe_for(kind, 300, 3, torch.float32)
    grads = gradients(fused_multihead, {**tensors, "x": x}, probe, upstream)
    formula = balance_loss(x.float() @ tensors["router"].T, kind)
    (wanted,) = torch.autograd.grad(formula * 0.7, tensors["router"])
    # One rounding of the logits, one of their gradient: 2**-9 each. "switch" jumps where rounding reorders heads.
    assert error(grads[3], wanted) < (5e-2 if kind == "switch" else 2e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_top_k_is_balanced_by_its_probabilities(kind):
    """So that a head which is never chosen gets a gradient too."""
    tensors = make(4, 3, 100, torch.float64)
    upstream = torch.zeros(100, 17, dtype=torch.float64, device=DEVICE)
    probe = probe_for(kind, 100, 4, torch.float64)
    got = gradients(fused_multihead, tensors, probe, upstream, top_k=2)[3]
    (wanted,) = torch.autograd.grad(0.7 * balance_loss(tensors["x"] @ tensors["router"].T, kind), tensors["router"])
    assert error(got, wanted) < 1e-9
    assert (got.norm(dim=1) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_given_logits(kind):
    tensors = make(3, 4, 30, torch.float64)
    del tensors["router"]
    tensors["logits"] = torch.randn(30, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    upstream = torch.zeros(30, 17, dtype=torch.float64, device=DEVICE)
    for form in (fused_multihead, multihead_delta):
        got = gradients(form, tensors, probe_for(kind, 30, 3, torch.float64), upstream)[3]
        (wanted,) = torch.autograd.grad(0.7 * balance_loss(tensors["logits"], kind), tensors["logits"])
        assert error(got, wanted) < 1e-9


@pytest.mark.parametrize("tokens", [1, 64, 301])
@pytest.mark.parametrize("top_k", [0, 2])
def test_statistics(tokens, top_k):
    """Those of the active back end against sums written out here."""
    layout = Layout(5, 3, top_k=top_k)
    P = torch.randn(tokens, layout.p_columns, device=DEVICE)
    mask = (torch.arange(tokens, device=DEVICE) % 4 != 3).to(torch.uint8)
    P[mask == 0] = float("nan")  # what padding computes must not matter
    ops = fused.backend(P.device, P.dtype)
    partials = torch.full((ops.statistics_rows(tokens), layout.statistics_columns), float("nan"), device=DEVICE)
    ops.mix(P, layout.z_columns, layout, partials=partials, token_mask=mask)
    logits = P[mask.bool()][:, 3:8].double()
    p = logits.softmax(-1)
    largest = torch.nn.functional.one_hot(logits.argmax(-1), 5).double()
    weights = rank_space.routing_weights(logits, top_k)
    scalars = [len(logits), (logits.exp().sum(-1).log() ** 2).sum(), -(p * p.log()).sum()]
    wanted = torch.cat([torch.tensor(scalars).to(p), largest.sum(0), p.sum(0), weights.sum(0)])
    torch.testing.assert_close(partials.sum(0).double(), wanted, rtol=1e-5, atol=1e-5)


def test_equal_heads_share_a_token():
    """At a router of zeros every head has the same share, and no balance loss pushes."""
    layout = Layout(4, 2)
    P = torch.zeros(10, layout.p_columns, device=DEVICE)
    assert rank_space.statistics(P, layout, None)[3:7].tolist() == [2.5] * 4
    tensors = make(4, 2, 10, torch.float64)
    tensors["router"] = torch.zeros_like(tensors["router"]).requires_grad_(True)
    upstream = torch.zeros(10, 17, dtype=torch.float64, device=DEVICE)
    for kind in ("switch", "importance", "mutual_information"):
        got = gradients(fused_multihead, tensors, probe_for(kind, 10, 4, torch.float64), upstream)
        assert got[3].abs().max() < 1e-12


def random_sums(num_heads):
    layout = Layout(num_heads, 1)
    logits = torch.randn(50, num_heads, device=DEVICE)
    P = torch.cat([torch.zeros(50, 1, device=DEVICE), logits, torch.zeros(50, 1, device=DEVICE)], 1)
    return logits, rank_space.statistics(P, layout, None).unsqueeze(0)


@pytest.mark.parametrize("has_prior", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_shares_of_the_whole_step(kind, has_prior):
    """What this rank has seen of the step counts as it is; the rest is taken to be as in the step before."""
    num_heads, layout = 3, Layout(3, 1)
    (first, sums1), (second, sums2) = random_sums(num_heads), random_sums(num_heads)
    record = new_record(1, num_heads, DEVICE)[0]
    prior = torch.tensor([0.5, 0.3, 0.2, 0.1, 0.2, 0.7], device=DEVICE) if has_prior else None
    options = {"kind": kind, "factor": 2.0, "whole_step": True, "expected_tokens": 400.0}
    options["upstream"] = torch.tensor(0.5, device=DEVICE)
    ops = fused.backend(record.device, torch.float32)
    ops.finalize_routing_stats(sums1, record, prior, layout, **options)
    slope = ops.finalize_routing_stats(sums2, record, prior, layout, **options)
    p = torch.cat([first, second]).softmax(-1)
    f = torch.nn.functional.one_hot(p.argmax(-1), num_heads).float().mean(0)
    P = p.mean(0)
    if has_prior:  # 100 of 400 tokens were seen
        f, P = 0.25 * f + 0.75 * prior[:3], 0.25 * P + 0.75 * prior[3:]
    wanted = {
        "switch": torch.cat([num_heads * f, torch.zeros(2).to(f)]),
        "importance": torch.cat([2 * num_heads * P, torch.zeros(2).to(f)]),
        "mutual_information": torch.cat([P.log(), torch.tensor([1.0, 0.0]).to(f)]),
        "z": torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]).to(f),
    }[kind]
    torch.testing.assert_close(slope, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(record[: layout.statistics_columns], (sums1 + sums2)[0])


def test_a_step_of_one_micro_batch_is_the_same_in_both_scopes():
    for kind in KINDS:
        _, sums = random_sums(3)
        options = {"kind": kind, "factor": 1.0, "expected_tokens": 50.0, "upstream": torch.tensor(1.0, device=DEVICE)}
        prior = torch.rand(6, device=DEVICE)
        ops = fused.backend(sums.device, torch.float32)
        slopes = [
            ops.finalize_routing_stats(
                sums, new_record(1, 3, DEVICE)[0], prior, Layout(3, 1), whole_step=whole, **options
            )
            for whole in (False, True)
        ]
        torch.testing.assert_close(slopes[0], slopes[1])


def test_without_upstream_only_the_record_is_written():
    tensors = make(3, 4, 20, torch.float32)
    probe = probe_for("switch", 20, 3, torch.float32)
    fused_multihead(**tensors, probe=probe).sum().backward()
    with_record = {name: t.grad.clone() for name, t in tensors.items()}
    for tensor in tensors.values():
        tensor.grad = None
    fused_multihead(**tensors).sum().backward()
    assert all(torch.equal(with_record[name], t.grad) for name, t in tensors.items())
    assert probe.tally.record[0, 0] == 20


def test_no_record_without_gradients():
    """The first pass under reentrant checkpointing, which a second one follows."""
    tensors = make(3, 4, 20, torch.float32)
    probe = probe_for("switch", 20, 3, torch.float32)
    with torch.no_grad():
        fused_multihead(**tensors, probe=probe)
    assert probe.tally.record.abs().sum() == 0


def test_empty_input():
    tensors = make(3, 4, 0, torch.float32)
    probe = probe_for("switch", 1, 3, torch.float32)
    upstream = torch.zeros(0, 17, device=DEVICE)
    grads = gradients(fused_multihead, tensors, probe, upstream)
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert probe.tally.record.abs().sum() == 0


def test_formulas():
    """Worked by hand: two tokens, two heads."""
    logits = torch.tensor([[0.9, 0.1], [0.6, 0.4]]).log()
    assert balance_loss(logits, "switch").item() == pytest.approx(2 * (1.0 * 0.75))
    assert balance_loss(logits, "importance").item() == pytest.approx((0.25 / 0.5) ** 2)
    assert balance_loss(logits, "z").item() == pytest.approx(0.0, abs=1e-12)
    assert balance_loss(logits + 2.0, "z").item() == pytest.approx(4.0)
    entropy = lambda *p: -sum(v * torch.tensor(v).log().item() for v in p)  # noqa: E731
    mean = (entropy(0.9, 0.1) + entropy(0.6, 0.4)) / 2
    assert balance_loss(logits, "mutual_information").item() == pytest.approx(mean - entropy(0.75, 0.25), rel=1e-5)
    assert balance_loss(logits, "none").item() == 0
    with pytest.raises(ValueError, match="must be one of none, switch, .* got 'swich'"):
        balance_loss(logits, "swich")
