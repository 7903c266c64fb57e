"""Diff pruning: hard-concrete masks, the expected L0 penalty, what is kept in the end."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from peft import PeftModel, get_peft_model, prune_diff
from peft.methods.diffpruning import DiffPruningConfig
from tests.helpers.selective import shake, tiny, train


def test_diff_pruning_masks_are_hard_concrete_and_the_penalty_counts_them():
    config = DiffPruningConfig(target_modules=["0"], sparsity_penalty=0.01, alpha_init=0.3)
    model = get_peft_model(tiny(), config)
    (_, m), *_ = model.roster.adapters["default"].methods
    W = model.base_model.model[0].base_layer.weight
    m.diff_delta.weight.data.normal_()
    sigmoid = lambda t: 1 / (1 + math.exp(-t))  # noqa: E731
    z = min(1, max(0, sigmoid(0.3) * 3 - 1.5))
    model.eval()
    torch.testing.assert_close(m.replace("weight", W), W + z * z * m.diff_delta.weight)
    assert torch.equal(m.replace("weight", W), m.replace("weight", W))
    model.train()
    draws = torch.stack([m.mask(torch.full((2000,), 0.3)) for _ in range(5)])
    assert draws.min() == 0 and draws.max() == 1
    # s̄ > 0 exactly when ln u − ln(1 − u) > −α − ln(−r/l) = −0.3
    assert abs(float((draws > 0).float().mean()) - sigmoid(0.3)) < 0.02
    assert float(m.penalty().detach()) == pytest.approx(0.01 * 35 * sigmoid(0.3) ** 2)


def test_diff_pruning_keeps_the_largest_share_and_gets_small(tmp_path):
    x = torch.randn(7, 6)
    model = get_peft_model(tiny(), DiffPruningConfig(target_modules=["0", "2"], density=0.2, alpha_init=8.0))
    shake(model)
    methods = dict(model.roster.adapters["default"].methods)
    model.eval()
    with torch.no_grad():
        deltas = {(s, n): m.difference(n) for s, m in methods.items() for n in m.shapes}
        flat = torch.cat([d.abs().flatten() for d in deltas.values()])
        cut = flat.sort(descending=True).values[round(0.2 * len(flat)) - 1]
        base, kept = tiny(), []
        for (s, n), d in deltas.items():
            mask = d.abs() >= min(cut, d.abs().max())  # each tensor keeps its largest entry
            kept.append(int(mask.sum()))
            getattr(base[int(s)], n).data += d * mask
        assert round(0.2 * len(flat)) <= sum(kept) <= round(0.2 * len(flat)) + 1
        counts = prune_diff(model)
        assert sum(counts.values()) == sum(kept)
        torch.testing.assert_close(model(x), base(x))
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == sum(kept)
    train(model, lambda m: m(x).square().mean())
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 8
    assert torch.equal(PeftModel.from_pretrained(tiny(), tmp_path)(x), model(x))
    with pytest.raises(ValueError, match="pruned already"):
        prune_diff(model)


def test_the_l0_penalty_reaches_the_loss():
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.site = nn.Linear(4, 4)

        def forward(self, x):
            from transformers.modeling_outputs import MaskedLMOutput

            return MaskedLMOutput(loss=self.site(x).sum() * 0)

    model = get_peft_model(
        WithLoss(), DiffPruningConfig(target_modules=["site"], sparsity_penalty=0.5, structured=False)
    )
    model.train()
    loss = model(torch.ones(1, 4)).loss
    assert float(loss.detach()) == pytest.approx(0.5 * 20 / (1 + math.exp(-5)), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "diff_alpha" in n)
