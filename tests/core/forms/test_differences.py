"""A dense difference that is learned, and of which the largest entries stay."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from peft import PeftModel, get_peft_model, registry
from peft.core.forms.copies import take
from peft.core.forms.differences import PrunedConfig, PrunedDifference, prune


@pytest.fixture
def added():
    @dataclass
    class AddedConfig(PrunedConfig):
        own_type = "ADDED"

    class Added(PrunedDifference):
        peft_type = "ADDED"
        config_class = AddedConfig
        prefix = "added_"
        holder = "added_kept"

        def learned(self, site):
            return {"added_delta": {n: site.empty(*s) for n, s in self.shapes.items()}}

        def start(self, rng):
            for name in self.shapes:
                take(self.added_delta, name).zero_()

        def difference(self, name):
            return take(self.added_delta, name)

    yield Added
    registry.forget_method("ADDED")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))


def learned(added):
    model = get_peft_model(net(), added.config_class(target_modules=["0", "1"], density=0.25))
    assert all(
        torch.equal(m.replace(n, p), p)
        for m in methods(model)
        for n, p in {"bias": torch.ones(m.shapes["bias"])}.items()
    )
    for m in methods(model):
        for n in m.shapes:
            take(m.added_delta, n).data.normal_()
    return model


def methods(model):
    return [m for _, m in model.roster.adapters["default"].methods]


def test_the_largest_entries_of_all_tensors_stay(added, tmp_path):
    model, x = learned(added), torch.randn(4, 6)
    deltas = {
        (path, n): m.difference(n).detach().clone()
        for path, m in model.roster.adapters["default"].methods
        for n in m.shapes
    }
    kept = round(0.25 * sum(d.numel() for d in deltas.values()))
    cut = torch.cat([d.abs().flatten() for d in deltas.values()]).sort(descending=True).values[kept - 1]
    expected = net()
    for (path, n), d in deltas.items():
        getattr(expected[int(path)], n).data += d * (d.abs() >= cut)
    assert sum(prune(model, "default", added, None).values()) == kept
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == kept
    torch.testing.assert_close(model(x), expected(x))
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(net(), tmp_path)(x), model(x))


def test_the_density_asked_for_is_the_config_s_from_then_on(added):
    model = learned(added).train()
    prune(model, "default", added, 0.5)
    config = model.peft_config["default"]
    assert config.pruned and config.density == 0.5 and all(m.training and m.pruned for m in methods(model))
    with pytest.raises(ValueError, match="is pruned already"):
        prune(model, "default", added, None)


def test_a_density_that_is_no_share_changes_nothing(added):
    with pytest.raises(ValueError, match="`density` is the share of parameters to keep"):
        added.config_class(density=1.5)
    model = learned(added)
    with pytest.raises(RuntimeError):
        prune(model, "default", added, 7.0)
    assert not any(m.pruned for m in methods(model)) and not model.peft_config["default"].pruned
    with pytest.raises(ValueError, match="no adapters"):
        prune(net(), "default", added, None)
