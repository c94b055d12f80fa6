"""Masks that are a function of a seed: reproducible, unbiased, and independent of each other."""

import pytest
import torch

from rlora_trl.kernels import draw_seed, keep_mask


@pytest.mark.parametrize("p", [0.05, 0.2, 0.5, 0.9])
def test_keep_rate(p):
    mask = keep_mask(12345, (1000, 300), p)
    sigma = (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(mask.float().mean().item() - (1 - p)) < 5 * sigma
    # Also for each row and each column: no stripes.
    for dim, count in ((0, 1000), (1, 300)):
        worst = (mask.float().mean(dim) - (1 - p)).abs().max().item()
        assert worst < 5 * (p * (1 - p) / count) ** 0.5


def test_reproducible_and_seed_dependent():
    assert torch.equal(keep_mask(7, (50, 20), 0.3), keep_mask(7, (50, 20), 0.3))
    assert not torch.equal(keep_mask(7, (50, 20), 0.3), keep_mask(8, (50, 20), 0.3))
    # The upper half of the seed counts too.
    assert not torch.equal(keep_mask(7, (50, 20), 0.3), keep_mask(7 + (1 << 40), (50, 20), 0.3))


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.float().flatten() - a.float().mean(), b.float().flatten() - b.float().mean()
    return ((a * b).mean() / (a.std() * b.std())).item()


def test_masks_of_seeds_and_heads_are_independent():
    """Correlations are within five standard errors of zero: between seeds, near seeds, heads, and shifted by one."""
    tokens, heads, rank = 4000, 3, 5
    error = 5 / (tokens * rank) ** 0.5
    masks = {seed: keep_mask(seed, (tokens, heads, rank), 0.2) for seed in (0, 1, 2, 1 << 32, (1 << 62) + 3)}
    for mask in masks.values():
        for i in range(heads):
            for j in range(i):
                assert abs(_correlation(mask[:, i], mask[:, j])) < error
        flat = mask.flatten()
        assert abs(_correlation(flat[1:], flat[:-1])) < error
    seeds = list(masks)
    for i, a in enumerate(seeds):
        for b in seeds[:i]:
            assert abs(_correlation(masks[a], masks[b])) < error
            # Nor is one a shifted copy of the other.
            for shift in (1, 15, 100):
                assert abs(_correlation(masks[a].flatten()[shift:], masks[b].flatten()[:-shift])) < error


def test_seed_follows_torch_generator():
    torch.manual_seed(3)
    first = draw_seed()
    second = draw_seed()
    torch.manual_seed(3)
    assert draw_seed() == first != second


def test_seed_differs_between_ranks(monkeypatch):
    seeds = []
    for rank in (0, 1, 2):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        torch.manual_seed(3)
        seeds.append(draw_seed())
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**63 for seed in seeds)
