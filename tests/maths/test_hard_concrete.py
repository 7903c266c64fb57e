"""Hard-concrete gates against the closed forms of arXiv 1712.01312."""

from __future__ import annotations

import math

import pytest
import torch

from peft.maths.hard_concrete import gates, open_probability

LOW, HIGH = -1.5, 1.5


def test_without_noise_a_gate_is_the_stretched_sigmoid():
    # σ(ln 3) = 3/4, σ(−ln 3) = 1/4: 3·3/4 − 3/2 = 3/4 and 3·1/4 − 3/2 < 0
    odds = torch.tensor([0.0, math.log(3), -math.log(3), 9.0])
    torch.testing.assert_close(gates(odds, LOW, HIGH, noisy=False), torch.tensor([0.0, 0.75, 0.0, 1.0]))
    torch.testing.assert_close(gates(odds[1:2], -0.1, 1.1, noisy=False), torch.tensor([0.8]))


@pytest.mark.parametrize("log_odds", [-1.0, 0.0, 2.0])
def test_draws_are_zero_and_one_as_often_as_the_distribution_says(log_odds):
    """P(z ≠ 0) = σ(α − ln(−l/r)), P(z = 1) = σ(α − ln((1 − l)/(r − 1))), and the distribution between them."""
    low, high = -0.3, 1.2
    torch.manual_seed(0)
    z = gates(torch.full((200_000,), log_odds), low, high, noisy=True)

    def above(t: float) -> float:
        """P(z > t) for t in [0, 1)."""
        s = (t - low) / (high - low)
        return 1 / (1 + math.exp(-(log_odds - math.log(s / (1 - s)))))

    assert ((z >= 0) & (z <= 1)).all()
    assert abs(float((z > 0).float().mean()) - above(0)) < 0.005
    assert abs(float((z > 0.5).float().mean()) - above(0.5)) < 0.005
    assert abs(float((z == 1).float().mean()) - above(1 - 1e-9)) < 0.005
    assert abs(float(open_probability(torch.tensor(log_odds), low, high)) - above(0)) < 1e-6


def test_a_gate_passes_gradients_where_it_is_neither_open_nor_closed():
    odds = torch.tensor([0.5, 9.0, -9.0], requires_grad=True)
    gates(odds, LOW, HIGH, noisy=False).sum().backward()
    s = 1 / (1 + math.exp(-0.5))
    torch.testing.assert_close(odds.grad, torch.tensor([3 * s * (1 - s), 0.0, 0.0]))
