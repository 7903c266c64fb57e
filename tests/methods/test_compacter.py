"""Compacter shares its rule and has the paper's count."""

from __future__ import annotations

import torch

from peft import get_peft_model
from peft.core.adapted.layer import adapted_layers
from peft.methods.compacter import CompacterConfig
from tests.helpers.activation import D, adapted, base


def test_compacter_shares_its_rule_and_has_the_paper_s_count():
    model = adapted("llama", CompacterConfig(bottleneck_size=8, phm_dim=4, phm_rank=2))
    methods = [m for _, m in model.roster.adapters["default"].methods]
    assert len(methods) == 4  # after attention and FFN of two layers
    assert len({id(m.adapter_phm_rule) for m in methods}) == 1
    n, b, k = 4, 8, 2
    each = k * (b + D) + k * (D + b) + b + D  # s and t of both matrices: n·k·(rows + columns)/n, and two biases
    assert model.get_nb_trainable_parameters()[0] == n**3 + 4 * each
    m = methods[0]
    down = sum(torch.kron(m.adapter_phm_rule[i], m.adapter_down_s[i] @ m.adapter_down_t[i]) for i in range(n))
    assert torch.allclose(m.matrices()[0], down, atol=1e-6)
    assert torch.linalg.matrix_rank(m.adapter_down_s[0] @ m.adapter_down_t[0]) == k
    plus = get_peft_model(base("llama"), CompacterConfig(variant="compacter++", bottleneck_size=8))
    assert {layer.path.rsplit(".", 1)[-1] for layer in adapted_layers(plus)} == {"mlp"}
