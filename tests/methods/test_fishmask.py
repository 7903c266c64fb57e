"""The FISH mask against the empirical Fisher information, entry by entry."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from peft import LNTuningConfig, PeftModel, compute_fish_mask, get_peft_model
from peft.methods.fishmask import FishMaskConfig
from tests.helpers.selective import bits, llama, tiny, train


def test_the_fish_mask_takes_the_top_of_the_empirical_fisher(tmp_path):
    base, x, y = tiny(), torch.randn(7, 6), torch.randint(3, (7,))

    def loss(model, example):
        return nn.functional.cross_entropy(model(example[0]), example[1])

    fisher = {n: torch.zeros_like(p) for n, p in base.named_parameters()}
    for i in range(7):
        grads = torch.autograd.grad(loss(base, (x[i : i + 1], y[i : i + 1])), list(base.parameters()))
        for n, g in zip(fisher, grads, strict=True):
            fisher[n] += g**2
    total = sum(f.numel() for f in fisher.values())
    cut = torch.cat([f.flatten() for f in fisher.values()]).sort(descending=True).values[round(0.3 * total) - 1]
    wanted = {n: set((f.flatten() >= cut).nonzero().flatten().tolist()) for n, f in fisher.items()}
    count = sum(len(w) or 1 for w in wanted.values())
    wanted = {n: w or {int(fisher[n].argmax())} for n, w in wanted.items()}  # each tensor keeps its best entry
    assert round(0.3 * total) <= count <= round(0.3 * total) + 1
    before = bits(base)
    model = get_peft_model(base, FishMaskConfig(keep_ratio=0.3, target_modules=["0", "2"]))
    compute_fish_mask(model, [(x[:4], y[:4]), (x[4:], y[4:])], loss)
    found = {}
    for stem, m in model.roster.adapters["default"].methods:
        for n in m.replaced_names:
            values, indices = m.entries(n)
            found[f"{stem}.{n}"] = set(indices.tolist())
            assert torch.equal(values, before[f"{stem}.{n}"].flatten()[indices])
    assert found == wanted
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    train(model, lambda m: loss(m, (x, y)))
    out = model(x)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for k, t in tensors.items() if k.endswith(".values")) == count
    assert all(t.dtype == torch.int32 for k, t in tensors.items() if k.endswith(".indices"))
    assert torch.equal(PeftModel.from_pretrained(tiny(), tmp_path)(x), out)
    merged = model.merge_and_unload().state_dict()
    for n, old in before.items():
        changed = set((merged[n].flatten() != old.flatten()).nonzero().flatten().tolist())
        assert changed and changed <= wanted[n]


def test_a_fish_mask_before_data_is_a_seeded_random_choice_and_keep_ratio_is_checked():
    def chosen(seed):
        model = get_peft_model(tiny(), FishMaskConfig(keep_ratio=0.2, seed=seed, target_modules=["0", "2"]))
        return [m.entries("weight")[1].tolist() for _, m in model.roster.adapters["default"].methods]

    assert chosen(1) == chosen(1) != chosen(2)
    assert [len(c) for c in chosen(1)] == [6, 3]
    for ratio in (0, 1.5):
        with pytest.raises(ValueError, match="keep_ratio"):
            FishMaskConfig(keep_ratio=ratio)
    with pytest.raises(ValueError, match="no mask to compute"):
        compute_fish_mask(get_peft_model(llama(), LNTuningConfig()), [])
