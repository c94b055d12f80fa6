"""The written-out balance losses against numbers worked by hand; the delta is what the other tests compare with."""

import pytest
import torch

from rlora_trl.kernels import balance_loss


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
