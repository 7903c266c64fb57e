"""Two free factors: ranks and strengths in configs, factors that are given, initial ones that are subtracted."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from peft import LoraConfig, get_peft_model
from peft.core.anatomy.patterns import for_path
from peft.core.forms.low_rank import LowRank
from peft.registry import method


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(12, 24)

    def forward(self, x):
        return self.lin(x)


def held(**fields) -> LowRank:
    """The method at `lin`."""
    model = get_peft_model(Net(), LoraConfig(r=4, lora_alpha=8, target_modules=["lin"], **fields))
    (found,) = (m for m in model.modules() if isinstance(m, LowRank))
    return found


KIND = method("LORA")


@pytest.mark.parametrize("root, own, joined", [(False, 12, 20), (True, 8 * math.sqrt(1.5), 8 * math.sqrt(2.5))])
def test_joined_matrices_keep_their_strength_and_their_ranks_together(root, own, joined):
    config = LoraConfig(r=4, lora_alpha=8, use_rslora=root, rank_pattern={"b": 6}, alpha_pattern={"b": own})
    KIND.join(config, "x.ab", ["x.a", "x.b"])
    assert for_path(config.rank_pattern, "x.ab", config.r) == 10
    assert for_path(config.alpha_pattern, "x.ab", config.lora_alpha) == pytest.approx(joined, rel=1e-12)
    assert for_path(config.rank_pattern, "x.a", config.r) == 4


def test_matrices_of_different_strength_cannot_be_joined():
    config = LoraConfig(r=4, lora_alpha=8, alpha_pattern={"b": 9})
    with pytest.raises(ValueError, match=r"x\.ab holds x\.a, x\.b at one strength"):
        KIND.join(config, "x.ab", ["x.a", "x.b"])


def test_a_config_for_given_ranks_has_strength_one_at_each():
    config = LoraConfig(r=4, lora_alpha=8, use_rslora=True, init_lora_weights="pissa", rank_pattern={"a": 2})
    ranks = {"x.a": 3, "x.b": 5, "y.b": 5}
    made = KIND.config_for_ranks(config, ranks)
    for path, r in ranks.items():
        assert for_path(made.rank_pattern, path, made.r) == for_path(made.alpha_pattern, path, made.lora_alpha) == r
    assert not made.use_rslora and made.init_lora_weights is True
    assert config.rank_pattern == {"a": 2} and config.use_rslora  # as it was


def test_given_factors_and_bias_are_what_it_becomes():
    m = held(lora_bias=True)
    A, B, bias = torch.randn(4, 12), torch.randn(24, 4), torch.randn(24)
    m.set_factors(A, B, bias)
    assert torch.allclose(m.dense(), 2 * B @ A, atol=1e-6) and torch.allclose(m.bias_change(), 2 * bias)
    m.set_factors(A, B, None)
    assert not m.bias_change().any()
    found_A, found_B, s = m.two_factors()
    assert torch.equal(found_A, A) and torch.equal(found_B, B) and s == 2.0 and m.rank() == 4


def test_initial_factors_of_the_weight_are_subtracted():
    m = held(init_lora_weights="olora")
    A0, B0 = m.first_A.clone(), m.first_B.clone()
    A, B = torch.randn(4, 12), torch.randn(24, 4)
    m.set_factors(A, B, None)
    assert torch.allclose(m.dense(), 2 * (B @ A - B0 @ A0), atol=1e-5)
    assert m.two_factors()[0].shape == (8, 12) and m.rank() == 8
