"""The rank-space functions of the active back end, alone: masks, statistics, and the gradients of balance losses."""

import pytest
import torch
from kernel_helpers import DEVICE

from rlora_trl.kernels import BALANCE_LOSSES, RoutingStats, fused, rank_space
from rlora_trl.kernels.rank_space import Layout


KINDS = [kind for kind in BALANCE_LOSSES if kind != "none"]


@pytest.mark.parametrize("seed", [0, 7, 2**62 + 12345])
def test_a_seed_in_memory_makes_the_masks_of_its_number(seed):
    layout, ops = Layout(3, 4), fused.backend(torch.device(DEVICE), torch.float32)
    P, dZ = torch.randn(67, 11, device=DEVICE), torch.randn(67, 16, device=DEVICE)
    in_memory = torch.tensor(seed, device=DEVICE)
    options = {"dropout": 0.3}
    Z = ops.mix(P, 16, layout, seed=seed, **options)
    # Two kernels, compiled apart, may add in another order; another mask is far away.
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(ops.mix(P, 16, layout, seed=in_memory, **options), Z, **close)
    assert not torch.allclose(ops.mix(P, 16, layout, seed=in_memory + 1, **options), Z, **close)
    expected = ops.mix_backward(P, dZ, layout, seed=seed, **options)
    for actual, reference in zip(ops.mix_backward(P, dZ, layout, seed=in_memory, **options), expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 64, 301])
@pytest.mark.parametrize("top_k", [0, 2])
def test_statistics(tokens, top_k):
    """Those of the active back end against sums written out here."""
    layout = Layout(5, 3, top_k=top_k)
    P = torch.randn(tokens, rank_space.p_columns(layout), device=DEVICE)
    mask = (torch.arange(tokens, device=DEVICE) % 4 != 3).to(torch.uint8)
    P[mask == 0] = float("nan")  # what padding computes must not matter
    ops = fused.backend(P.device, P.dtype)
    partials = torch.full((ops.stats_rows(tokens), rank_space.stats_columns(5)), float("nan"), device=DEVICE)
    ops.mix(P, rank_space.z_columns(layout), layout, partials=partials, token_mask=mask)
    logits = P[mask.bool()][:, 3:8].double()
    p = logits.softmax(-1)
    largest = torch.nn.functional.one_hot(logits.argmax(-1), 5).double()
    weights = rank_space.routing_weights(logits, top_k)
    scalars = [len(logits), (logits.exp().sum(-1).log() ** 2).sum(), -(p * p.log()).sum()]
    expected = torch.cat([torch.tensor(scalars).to(p), largest.sum(0), p.sum(0), weights.sum(0)])
    torch.testing.assert_close(partials.sum(0).double(), expected, rtol=1e-5, atol=1e-5)


def random_sums(num_heads):
    layout = Layout(num_heads, 1)
    logits = torch.randn(50, num_heads, device=DEVICE)
    P = torch.cat([torch.zeros(50, 1, device=DEVICE), logits, torch.zeros(50, 1, device=DEVICE)], 1)
    return logits, rank_space.routing_stats(P, layout, None).unsqueeze(0)


@pytest.mark.parametrize("has_prior", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_shares_of_the_whole_step(kind, has_prior):
    """What this rank has seen of the step counts as it is; the rest is taken to be as in the step before."""
    num_heads, layout = 3, Layout(3, 1)
    (first, sums1), (second, sums2) = random_sums(num_heads), random_sums(num_heads)
    stats = RoutingStats.zeros(1, num_heads, DEVICE).data[0]
    prior = torch.tensor([0.5, 0.3, 0.2, 0.1, 0.2, 0.7], device=DEVICE) if has_prior else None
    options = {"kind": kind, "factor": 2.0, "whole_step": True, "expected_tokens": 400.0}
    options["upstream"] = torch.tensor(0.5, device=DEVICE)
    ops = fused.backend(stats.device, torch.float32)
    ops.finalize_routing_stats(sums1, stats, prior, layout, **options)
    coeffs = ops.finalize_routing_stats(sums2, stats, prior, layout, **options)
    p = torch.cat([first, second]).softmax(-1)
    f = torch.nn.functional.one_hot(p.argmax(-1), num_heads).float().mean(0)
    P = p.mean(0)
    if has_prior:  # 100 of 400 tokens were seen
        f, P = 0.25 * f + 0.75 * prior[:3], 0.25 * P + 0.75 * prior[3:]
    expected = {
        "switch": torch.cat([num_heads * f, torch.zeros(2).to(f)]),
        "importance": torch.cat([2 * num_heads * P, torch.zeros(2).to(f)]),
        "mutual_information": torch.cat([P.log(), torch.tensor([1.0, 0.0]).to(f)]),
        "z": torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]).to(f),
    }[kind]
    torch.testing.assert_close(coeffs, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats[: rank_space.stats_columns(3)], (sums1 + sums2)[0])


def test_a_step_of_one_micro_batch_is_the_same_in_both_scopes():
    for kind in KINDS:
        _, sums = random_sums(3)
        options = {"kind": kind, "factor": 1.0, "expected_tokens": 50.0, "upstream": torch.tensor(1.0, device=DEVICE)}
        prior = torch.rand(6, device=DEVICE)
        ops = fused.backend(sums.device, torch.float32)
        both = [
            ops.finalize_routing_stats(
                sums, RoutingStats.zeros(1, 3, DEVICE).data[0], prior, Layout(3, 1), whole_step=whole, **options
            )
            for whole in (False, True)
        ]
        torch.testing.assert_close(both[0], both[1])
