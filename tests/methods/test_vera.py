"""VeRA: sites share their banks."""

from __future__ import annotations

import math

import torch
from safetensors.torch import load_file

from peft import PeftModel
from peft.methods.vera import VeraConfig
from tests.helpers.additive import base, inputs, make, method


def test_vera_sites_share_their_banks(tmp_path):
    model = make(VeraConfig(r=8, target_modules=["lin1", "lin2"]))
    first, second = method(model), method(model, "lin2")
    assert (
        first.vera_A_weight is second.vera_A_weight
        and first.vera_A_weight.shape == (8, 24)
        and first.vera_B_weight.shape == (24, 8)
    )
    expected = (
        first.vera_lambda_b_weight.diag()
        @ first.vera_B_weight
        @ first.vera_lambda_d_weight.diag()
        @ first.vera_A_weight[:, :12]
    )
    assert torch.allclose(first.dense(), expected, atol=1e-5)
    assert not first.vera_A_weight.requires_grad and float(first.vera_A_weight.abs().max()) <= math.sqrt(6 / 24)
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 6  # two vectors a site, two banks
    bare = make(VeraConfig(r=8, save_projection=False, projection_prng_key=3, target_modules=["lin1"]))
    bare.save_pretrained(tmp_path / "bare")
    assert len(load_file(tmp_path / "bare" / "adapter_model.safetensors")) == 2
    again = PeftModel.from_pretrained(base(), tmp_path / "bare").eval()
    with torch.no_grad():
        assert torch.equal(again(*inputs())[0], bare(*inputs())[0])
