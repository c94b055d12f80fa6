"""
Masks as a function of a seed: reproducible, unbiased, and independent of each other.

The statistics below are compared with what independent masks give, at a false alarm probability of `ALARM` each
(normal approximation, Bonferroni over what is compared). The seeds arise as in training: `torch.manual_seed` on all
ranks alike, then a draw for each layer or for each batch.
"""

from statistics import NormalDist

import pytest
import torch

from rlora_trl.kernels import draw_seed, dropout, keep_mask
from rlora_trl.tuner.adapter import MultiHeadAdapter
from rlora_trl.tuner.routing import Routing


ALARM = 1e-6
RANKS, STEPS, LAYERS = 3, 4, 6
TOKENS, HEADS, RANK_OF_HEAD = 1024, 4, 4


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


def limit(comparisons: int) -> float:
    """What the largest of the absolute values of so many standard normal variables exceeds with probability ALARM."""
    return NormalDist().inv_cdf(1.0 - ALARM / (2 * comparisons))


def adapters_of_a_model(p: float) -> tuple[Routing, list[MultiHeadAdapter]]:
    routing = Routing(None, "softmax")
    options = {"routing": routing, "dropout": p}
    return routing, [MultiHeadAdapter(8, 8, RANK_OF_HEAD, HEADS, 1.0, **options) for _ in range(LAYERS)]


def masks_of_training(monkeypatch, p: float, one_seed_a_batch: bool, make=keep_mask) -> torch.Tensor:
    """Masks `[ranks, steps, layers, tokens, heads, r]` of some steps of training; `make` makes one from a seed."""
    routing, adapters = adapters_of_a_model(p)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    masks = []
    for rank in range(RANKS):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        torch.manual_seed(42)
        for _ in range(STEPS):
            routing.update(seed=draw_seed() if one_seed_a_batch else None)
            masks += [make(adapter.draw_seed(), (TOKENS, HEADS, RANK_OF_HEAD), p) for adapter in adapters]
    return torch.stack(masks).view(RANKS, STEPS, LAYERS, TOKENS, HEADS, RANK_OF_HEAD)


def keep_rates(masks: torch.Tensor, p: float) -> float:
    """How far the counts of kept elements are off: of each mask, head, column and stretch of 64 tokens, and of all."""
    scores = []
    flat = masks.view(-1, TOKENS, HEADS, RANK_OF_HEAD).float()
    for dims in ((1, 2, 3), (1, 3), (0, 1), (0, 1, 2, 3)):
        rates = flat.mean(dims)
        scores.append((rates - (1 - p)) * (flat.numel() / rates.numel() / (p * (1 - p))) ** 0.5)
    stretches = flat.view(len(flat), -1, 64 * HEADS * RANK_OF_HEAD).mean(2)
    scores.append((stretches - (1 - p)) * (64 * HEADS * RANK_OF_HEAD / (p * (1 - p))) ** 0.5)
    scores = torch.cat([score.flatten() for score in scores])
    return scores.abs().max().item() / limit(len(scores))


def standardized(masks: torch.Tensor, p: float) -> torch.Tensor:
    return (masks.double() - (1 - p)) / (p * (1 - p)) ** 0.5


def pairs(masks: torch.Tensor, p: float) -> float:
    """Correlations of the same elements of all pairs of heads, layers, steps and ranks: the largest one, and all."""
    streams = standardized(masks, p).transpose(3, 4).reshape(-1, TOKENS * RANK_OF_HEAD)
    scores = streams @ streams.T / streams.shape[1] ** 0.5
    scores = scores[torch.ones_like(scores).triu(1).bool()]
    excess = (scores.square().sum() - len(scores)) / (2 * len(scores)) ** 0.5  # a chi-squared variable
    return max(scores.abs().max().item() / limit(len(scores)), abs(excess.item()) / limit(1))


def shifts(masks: torch.Tensor, p: float) -> float:
    """Correlations of each mask with each other one, shifted by 1 to 64 elements, and with itself."""
    flat = standardized(masks, p).reshape(-1, TOKENS * HEADS * RANK_OF_HEAD)
    worst = 0.0
    for lag in range(1, 65):
        scores = flat[:, lag:] @ flat[:, :-lag].T / (flat.shape[1] - lag) ** 0.5
        worst = max(worst, scores.abs().max().item())
    return worst / limit(64 * len(flat) ** 2)


def _off_from_expected(streams: torch.Tensor, p: float) -> float:
    """A chi-squared test of the joint patterns of 4 masks `[4, n]`: 16 cells with known probabilities."""
    code = (streams.long() * torch.tensor([1, 2, 4, 8])[:, None]).sum(0)
    counts = torch.bincount(code, minlength=16).double()
    ones = torch.tensor([bin(cell).count("1") for cell in range(16)])
    expected = streams.shape[1] * (1 - p) ** ones.double() * p ** (4 - ones).double()
    statistic = ((counts - expected).square() / expected).sum().item()
    degrees = 15
    # Wilson and Hilferty: the cube root of a chi-squared variable is nearly normal.
    return ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / (2 / (9 * degrees)) ** 0.5


def patterns(masks: torch.Tensor, p: float) -> float:
    """Joint patterns of four: of heads, layers, steps, elements of a head, and tokens that follow each other."""
    fours = {
        "heads": masks.permute(4, 0, 1, 2, 3, 5),
        "layers": masks[:, :, :4].permute(2, 0, 1, 3, 4, 5),
        "steps": masks.permute(1, 0, 2, 3, 4, 5),
        "elements": masks.permute(5, 0, 1, 2, 3, 4),
        "tokens": masks.unflatten(3, (-1, 4)).permute(4, 0, 1, 2, 3, 5, 6),
    }
    scores = [_off_from_expected(four.reshape(4, -1), p) for four in fours.values()]
    # Ranks and layers of one batch are made from one seed: two of each.
    scores.append(_off_from_expected(masks[:2, :, :2].permute(0, 2, 1, 3, 4, 5).reshape(4, -1), p))
    return max(abs(score) for score in scores) / limit(len(scores))


def periods(masks: torch.Tensor, p: float) -> float:
    """Power at each frequency, over tokens and over elements in their order: of one series, and on average."""
    X = standardized(masks, p).view(-1, TOKENS, HEADS * RANK_OF_HEAD)
    worst = 0.0
    for series in (X.transpose(1, 2).reshape(-1, TOKENS), X.reshape(len(X), -1)):
        power = torch.fft.rfft(series).abs().square()[:, 1:-1] / series.shape[1]  # exponential with mean 1
        highest = torch.tensor(power.numel() / ALARM).log()
        average = (power.mean(0) - 1) * len(power) ** 0.5
        worst = max(worst, (power.max() / highest).item(), average.abs().max().item() / limit(power.shape[1]))
    return worst


STATISTICS = {"keep rates": keep_rates, "pairs": pairs, "shifts": shifts, "patterns": patterns, "periods": periods}


def over_limits(masks: torch.Tensor, p: float) -> dict[str, float]:
    """All statistics, as multiples of their limits."""
    return {name: statistic(masks, p) for name, statistic in STATISTICS.items()}


@pytest.mark.parametrize("one_seed_a_batch", [False, True])
@pytest.mark.parametrize("p", [0.2, 0.5])
def test_masks_of_training_are_independent(monkeypatch, p, one_seed_a_batch):
    """Between heads, layers, steps, ranks, elements and tokens."""
    masks = masks_of_training(monkeypatch, p, one_seed_a_batch)
    assert all(value < 1.0 for value in over_limits(masks, p).values()), over_limits(masks, p)


def test_keep_rates_of_many_seeds():
    """Counts of kept elements are binomial: the largest deviation, and the sum of all squared ones."""
    torch.manual_seed(5)
    scores = []
    for p in (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.9, 0.99):
        for _ in range(50):
            mask = keep_mask(draw_seed(), (5000, 3, 4), p)
            scores.append((mask.sum().item() - mask.numel() * (1 - p)) / (mask.numel() * p * (1 - p)) ** 0.5)
    scores = torch.tensor(scores)
    assert scores.abs().max().item() < limit(len(scores))
    assert abs(scores.square().sum().item() - len(scores)) < limit(1) * (2 * len(scores)) ** 0.5


# Generators that are wrong in one way, and the statistic that must find it.


def one_mask_for_all_heads(seed, shape, p):
    tokens, heads, r = shape
    return keep_mask(seed, (tokens, 1, r), p).expand(shape).contiguous()


def seed_not_mixed(seed, shape, p):
    """The masks of near seeds are one sequence, shifted."""
    index = torch.arange(TOKENS * HEADS * RANK_OF_HEAD) + (seed & 31)
    return (dropout._mix32(index) >= round(p * 2**32)).view(shape)


def half_a_round(seed, shape, p):
    """One multiplication and two shifts in place of two rounds of mixing."""
    value = (torch.arange(TOKENS * HEADS * RANK_OF_HEAD) + dropout.mask_parameters(seed, p)[0]) & 0xFFFFFFFF
    value = ((value ^ (value >> 16)) * dropout._MIX_MULTIPLIERS[0]) & 0xFFFFFFFF
    return (value ^ (value >> 15) >= round(p * 2**32)).view(shape)


def repeats_after_64_tokens(seed, shape, p):
    return keep_mask(seed, (64, HEADS, RANK_OF_HEAD), p).repeat(TOKENS // 64, 1, 1)


def threshold_of_eight_bits(seed, shape, p):
    return keep_mask(seed, shape, round(p * 256) / 256)


def last_head_from_the_others(seed, shape, p):
    """Any three heads are independent, the four are not (p = 1/2)."""
    mask = keep_mask(seed, shape, p)
    mask[:, 3] = mask[:, 0] ^ mask[:, 1] ^ mask[:, 2]
    return mask


@pytest.mark.parametrize(
    "make, p, statistic",
    [
        (one_mask_for_all_heads, 0.2, "pairs"),
        (seed_not_mixed, 0.2, "shifts"),
        (half_a_round, 0.2, "periods"),
        (repeats_after_64_tokens, 0.2, "periods"),
        (threshold_of_eight_bits, 0.03, "keep rates"),
        (last_head_from_the_others, 0.5, "patterns"),
    ],
)
def test_wrong_generators_are_found(monkeypatch, make, p, statistic):
    masks = masks_of_training(monkeypatch, p, one_seed_a_batch=False, make=make)
    assert STATISTICS[statistic](masks, p) > 1.0


def one_round(seed, shape, p):
    """The masks of two seeds are one sequence, read from different places."""
    index = torch.arange(TOKENS * HEADS * RANK_OF_HEAD) + dropout.mask_parameters(seed, p)[0]
    return (dropout._mix32(index & 0xFFFFFFFF) >= round(p * 2**32)).view(shape)


def test_masks_of_near_keys_are_independent():
    """Two rounds of mixing are needed: of 40,000 draws some have keys so near that one round shows."""
    torch.manual_seed(1)
    keys = sorted((dropout.mask_parameters(seed, 0.2)[0], seed) for seed in (draw_seed() for _ in range(40_000)))
    gap, first, second = min((b - a, seed, other) for (a, seed), (b, other) in zip(keys, keys[1:], strict=False))
    assert 0 < gap <= 64
    shape = (TOKENS, HEADS, RANK_OF_HEAD)
    assert shifts(torch.stack([keep_mask(seed, shape, 0.2) for seed in (first, second)]), 0.2) < 1.0
    assert shifts(torch.stack([one_round(seed, shape, 0.2) for seed in (first, second)]), 0.2) > 1.0


def test_shared_seeds_are_found(monkeypatch):
    """Of layers (no number mixed into the batch's seed), of ranks, and of steps (a seed that is not drawn again)."""
    with monkeypatch.context() as patch:
        patch.setattr("rlora_trl.tuner.adapter._SPREAD", 0)
        assert pairs(masks_of_training(patch, 0.2, one_seed_a_batch=True), 0.2) > 1.0
    with monkeypatch.context() as patch:
        patch.setattr(dropout, "_GOLDEN", 0)
        assert pairs(masks_of_training(patch, 0.2, one_seed_a_batch=False), 0.2) > 1.0
    masks = masks_of_training(monkeypatch, 0.2, one_seed_a_batch=False)
    assert pairs(masks, 0.2) < 1.0
    masks[:, 1] = masks[:, 0]
    assert pairs(masks, 0.2) > 1.0
