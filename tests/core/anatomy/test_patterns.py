"""Patterns of ranks and layers."""

from __future__ import annotations

import torch

from peft.core.adapted.layer import adapted_layers
from tests.helpers.experts import adapted, base


@torch.no_grad()
def test_rank_patterns_name_the_stack_and_layers_can_be_chosen():
    model = adapted(base("mixtral"), rank_pattern={"experts.down_proj": 5}, layers_to_transform=[1])
    ranks = {x.path: x.methods["default"][0].own_r for x in adapted_layers(model)}
    assert set(ranks.values()) == {2, 5} and all(".layers.1." in p for p in ranks) and len(ranks) == 6
    assert all((r == 5) == ("down_proj" in p) for p, r in ranks.items())
