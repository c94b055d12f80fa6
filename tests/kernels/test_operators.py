"""The operators for `torch.compile`: sound for the compiler, for inputs of any strides."""

import pytest
import torch

from rlora_trl.kernels import RoutingStats, RoutingTally, operators, rank_space
from rlora_trl.kernels.rank_space import Layout


T, N, R = 37, 3, 4
LAYOUTS = {
    "plain": Layout(N, R),
    "separate_a": Layout(N, R, anchored=False, shared=False, top_k=2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_operators_are_sound(name):
    """Schemas, and shapes of the fakes (also with symbols)."""
    layout = LAYOUTS[name]
    P = torch.randn(T, rank_space.p_columns(layout))
    dZ, seed = torch.randn(T, rank_space.z_columns(layout)), torch.tensor(5)
    calls = [
        (operators.mix, (P, seed, 0.3, rank_space.z_columns(layout), *layout)),
        (operators.mix_backward, (P, dZ, seed, 0.3, 2.0, N * R + 1, *layout)),
    ]
    tally, mask = RoutingTally(RoutingStats.zeros(1, N), "switch", 0.1), (torch.rand(T) < 0.7).to(torch.uint8)
    partials = rank_space.routing_stats(P, layout, mask).unsqueeze(0)
    calls += [
        (operators.mix_with_stats, (P, mask, seed, 0.3, rank_space.z_columns(layout), *layout)),
        (operators.mix_backward_with_stats, (P, dZ, partials, mask, tally.ticket, 0, seed, 0.3, 2.0, 0, *layout)),
        (operators.add_balance_gradient, (P, torch.randn_like(P), None, tally.ticket, 0, *layout)),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator.default, arguments)


def test_operators_take_any_strides():
    """Kernels read contiguous rows; a slice of columns or an expanded gradient has none."""
    layout = Layout(3, 4, anchored=False)
    P = torch.randn(5, 9)[:, 1:-1]  # 4 + 3 columns
    Z = operators.mix(P, None, 0.0, 12, *layout)
    assert torch.equal(Z, operators.mix(P.contiguous(), None, 0.0, 12, *layout))
    dZ = torch.tensor(1.0).expand(5, 12)
    expected = rank_space.mix_backward(P.contiguous(), torch.ones(5, 12), layout)
    for actual, reference in zip(operators.mix_backward(P, dZ, None, 0.0, 1.0, 0, *layout), expected, strict=True):
        assert torch.equal(actual, reference)
