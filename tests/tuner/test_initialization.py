"""Initial values against Table 1 of the paper, and heads that are independent of each other."""

import math

import pytest
import torch

from rlora_trl import MultiHeadAdapter


LAYERS = [(256, 256), (128, 1024), (1024, 128)]  # square, tall and wide


@pytest.mark.parametrize(("d_in", "d_out"), LAYERS)
@pytest.mark.parametrize("gamma", [64.0, 16.0])
def test_table1(d_in, d_out, gamma):
    """A ~ d_out^(1/4)/sqrt(gamma) N(0, 1/d_in), B ~ d_out^(1/4)/sqrt(gamma) N(0, 1/d_out)."""
    adapter = MultiHeadAdapter(d_in, d_out, 16, 8, 1.0, init_gamma=gamma)
    factor = d_out**0.25 / math.sqrt(gamma)
    for tensor, expected in (
        (adapter.A, factor / math.sqrt(d_in)),
        *((b, factor / math.sqrt(d_out)) for b in adapter.B),
    ):
        count = tensor.numel()
        # Five standard errors of the mean, and of the standard deviation of a normal sample.
        assert abs(tensor.mean().item()) < 5 * expected / math.sqrt(count)
        assert abs(tensor.std().item() / expected - 1) < 5 / math.sqrt(2 * count)


def test_heads_are_independent():
    adapter = MultiHeadAdapter(64, 512, 8, 6, 1.0)
    flat = torch.nn.functional.normalize(adapter.B.detach().flatten(1), dim=1)
    cosine = flat @ flat.T - torch.eye(6)
    assert cosine.abs().max() < 5 / math.sqrt(flat.shape[1])


def test_anchor_is_the_initial_value():
    adapter = MultiHeadAdapter(16, 24, 4, 3, 1.0)
    assert torch.equal(adapter.A0, adapter.A)
    assert torch.equal(adapter.B0, adapter.B.mean(0))
    assert not adapter.A0.requires_grad and not adapter.B0.requires_grad


@pytest.mark.parametrize("scheme", ["zero_a", "zero_b"])
def test_zero_schemes_need_no_anchor(scheme):
    adapter = MultiHeadAdapter(16, 24, 4, 3, 1.0, init_weights=scheme)
    zero, other = (adapter.A, adapter.B) if scheme == "zero_a" else (adapter.B, adapter.A)
    assert torch.count_nonzero(zero) == 0
    assert torch.count_nonzero(other) == other.numel()
    assert adapter.A0 is None and adapter.B0 is None
    assert torch.count_nonzero(adapter(torch.randn(5, 16))) == 0


def test_router_initialization():
    assert torch.count_nonzero(MultiHeadAdapter(16, 24, 4, 3, 1.0).router) == 0
    router = MultiHeadAdapter(16, 24, 4, 3, 1.0, router_init="kaiming_uniform").router
    assert torch.count_nonzero(router) == router.numel()
    assert router.abs().max() <= 1 / math.sqrt(16)
    assert MultiHeadAdapter(16, 24, 4, 3, 1.0, router="uniform").router is None


def test_false_gives_a_delta():
    assert MultiHeadAdapter(16, 24, 4, 3, 1.0, init_weights=False)(torch.randn(5, 16)).abs().min() > 0
