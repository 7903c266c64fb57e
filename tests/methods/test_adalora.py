"""AdaLoRA: upstream's schedule step by step, the penalty, pruning."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from peft import PeftModel
from peft.methods.adalora import AdaLoraConfig
from tests.helpers.additive import EXPECTED, GOLDEN, base, make, method


class Two(nn.Module):
    """Two linear layers and, with labels, a loss."""

    def __init__(self):
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(12, 24), nn.Linear(24, 16)

    def forward(self, x, labels=None):
        from transformers.modeling_outputs import SequenceClassifierOutput

        y = self.lin2(torch.tanh(self.lin1(x)))
        return SequenceClassifierOutput(loss=None if labels is None else (y - labels).square().mean(), logits=y)


def test_adalora_follows_upstreams_schedule_step_by_step(tmp_path):
    """Fourteen steps: warm-up, allocation every second step, final phase; losses, pruned ranks and logits."""
    model = PeftModel.from_pretrained(base(Two), GOLDEN / "adalora_start", is_trainable=True).train()
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    rng = torch.Generator().manual_seed(1)
    x, labels = torch.randn(64, 12, generator=rng), torch.randn(64, 16, generator=rng)
    for step, expected in enumerate(EXPECTED["schedule.losses"].tolist()):
        loss = model(x, labels=labels).loss
        loss.backward()
        opt.step()
        model.base_model.update_and_allocate(step)
        opt.zero_grad()
        assert loss.item() == pytest.approx(expected, abs=1e-5), f"step {step}"
    model.eval()
    with torch.no_grad():
        out = model(x).logits
    assert torch.allclose(out[:8], EXPECTED["schedule.logits"], atol=1e-5)
    pruned = json.loads((GOLDEN / "adalora_pruned" / "adapter_config.json").read_text())
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"] == pruned["rank_pattern"]
    assert load_file(tmp_path / "adapter_model.safetensors")["base_model.model.lin1.lora_A"].shape == (2, 12)
    for folder in (tmp_path, GOLDEN / "adalora_pruned"):
        again = PeftModel.from_pretrained(base(Two), folder).eval()
        with torch.no_grad():
            assert torch.allclose(again(x).logits, out, atol=1e-5)
        again.save_pretrained(tmp_path / "again")
        saved = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
        assert saved["rank_pattern"] == pruned["rank_pattern"]


def test_adalora_penalty_is_the_mean_distance_from_orthogonality():
    model = make(AdaLoraConfig(init_r=4, total_step=9, target_modules=["lin1", "lin2"], orth_reg_weight=0.7), Two)
    x, labels = torch.randn(3, 12), torch.randn(3, 16)
    plain = model(x, labels=labels).loss  # in eval: the loss alone
    distances = []
    for path in ("lin1", "lin2"):
        m = method(model, path)
        for gram in (m.lora_A_weight @ m.lora_A_weight.T, m.lora_B_weight.T @ m.lora_B_weight):
            distances.append((gram - torch.eye(4)).square().sum().sqrt())
    expected = plain + 0.7 * sum(distances) / 4
    assert model.train()(x, labels=labels).loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_adalora_can_prune_a_layer_away_and_load_it_again(tmp_path):
    model = make(AdaLoraConfig(init_r=2, target_r=1, total_step=4, target_modules=["lin1", "lin2"]), Two)
    for path, kept in (("lin1", [True, True]), ("lin2", [False, False])):
        m = method(model, path)
        m.kept = torch.tensor(kept)
        m.mask()
    model.peft_config["default"].rank_pattern = {"lin1.lora_E": [True, True], "lin2.lora_E": [False, False]}
    x = torch.randn(3, 12)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(Two), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(x).logits, model(x).logits)
    assert method(again, "lin2").own_r == 0


def test_adalora_pruning_twice_speaks_of_the_first_ranks(tmp_path):
    """A reloaded adapter holds two of six triplets; the pattern written next still has six entries."""
    model = PeftModel.from_pretrained(base(Two), GOLDEN / "adalora_pruned", is_trainable=True)
    m = method(model)
    m.kept = torch.tensor([False, True])
    assert m.full_pattern() == [False, False, False, False, False, True]


def test_adalora_says_what_is_wrong():
    with pytest.raises(ValueError, match="total_step"):
        AdaLoraConfig(target_modules=["lin1"])
    with pytest.raises(ValueError, match="tfinal"):
        AdaLoraConfig(target_modules=["lin1"], total_step=10, tinit=5, tfinal=5)
    with pytest.warns(UserWarning, match="use_rslora"):
        AdaLoraConfig(target_modules=["lin1"], total_step=10, use_rslora=True)
    model = make(AdaLoraConfig(init_r=2, total_step=4, target_modules=["lin1"]), Two)
    with pytest.raises(RuntimeError, match="after backward"):
        model.base_model.update_and_allocate(0)
