"""Pruned ranks: importance by its formula, what is kept over all sites, what a file holds of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft import AdaLoraConfig, get_peft_model
from peft.core.forms.pruned import Pruned


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.second(self.first(x))


@pytest.fixture
def methods() -> dict[str, Pruned]:
    config = AdaLoraConfig(init_r=3, total_step=9, target_modules=["first", "second"])
    model = get_peft_model(Net(), config)
    return {m.path: m for m in model.modules() if isinstance(m, Pruned)}


def know(m: Pruned, scores: list[float]) -> None:
    """Let the importance say that the parts have these scores."""
    for name, axis in m.part_axes.items():
        p = m.get_parameter(name)
        mean = torch.tensor(scores).view(-1, 1) if axis == 0 else torch.tensor(scores).view(1, -1)
        m.importance[name] = (mean.expand_as(p) / len(m.part_axes), torch.ones_like(p))


def test_scores_are_averages_of_the_sensitivity_times_its_deviation(methods):
    m = methods["first"]
    averages = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in m.named_parameters()}
    for _ in range(3):
        for name, p in m.named_parameters():
            p.data.normal_()
            p.grad = torch.randn_like(p)
            now, (mean, deviation) = (p * p.grad).abs().detach(), averages[name]
            mean = 0.7 * mean + 0.3 * now
            averages[name] = mean, 0.6 * deviation + 0.4 * (now - mean).abs()
        m.observe(0.7, 0.6)
    expected = sum((i * u).mean(1 - m.part_axes[n]) for n, (i, u) in averages.items())
    assert torch.allclose(m.scores(), expected) and expected.shape == (3,)


def test_the_least_important_parts_of_all_sites_go(methods):
    know(methods["first"], [5.0, 1.0, 4.0])
    know(methods["second"], [2.0, 3.0, 6.0])
    Pruned.prune(methods, 3)
    assert {path: m.kept.tolist() for path, m in methods.items()} == {
        "first": [True, False, True],
        "second": [False, False, True],
    }
    assert [m.rank() for m in methods.values()] == [2, 1]
    for m in methods.values():
        m.get_parameter(m.gates).data.fill_(1.0)
        m.mask()
        assert m.get_parameter(m.gates)[:, 0].tolist() == [float(k) for k in m.kept]


def test_no_excess_prunes_nothing(methods):
    Pruned.prune(methods, 0)
    assert all(m.kept.all() for m in methods.values())


def test_a_file_holds_the_kept_parts_and_gives_their_number_back(methods):
    m, other = methods["second"], methods["first"]
    m.kept = torch.tensor([True, False, True])
    state = {n: m.stored(n, p.detach()) for n, p in m.named_parameters()}
    assert {n: t.shape[m.part_axes[n]] for n, t in state.items()} == dict.fromkeys(m.part_axes, 2)
    m.config.rank_pattern = Pruned.patterns({"base.second": m})
    m.config.rank_pattern = {k.removeprefix("base."): v for k, v in m.config.rank_pattern.items()}
    m.resize(state)
    assert m.own_r == 2 and m.pattern == [True, False, True] and m.kept.all()
    assert all(m.get_parameter(n).shape == t.shape for n, t in state.items())
    m.kept = torch.tensor([False, True])
    assert m.full_pattern() == [False, False, True]
    assert other.own_r == 3
