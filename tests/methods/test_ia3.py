"""IA³: scales of outputs and of feed-forward inputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft import OFTConfig, get_peft_model
from peft.methods.ia3 import IA3Config
from tests.helpers.one_layer import adapted


def test_ia3_scales_outputs_with_their_bias_and_feedforward_inputs():
    for feedforward in ([], ["site"]):
        model, m = adapted(IA3Config(target_modules=["site"], feedforward_modules=feedforward))
        base = model.base_model.model.site.base_layer
        x, s = torch.randn(5, 16), m.ia3_l_weight.detach().flatten()
        W, b = base.weight.detach().clone(), base.bias.detach().clone()
        expected = (x * s) @ W.T + b if feedforward else s * (x @ W.T + b)
        assert m.ia3_l_weight.shape == ((1, 16) if feedforward else (24, 1))
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected)
            plain = model.base_model.merge_and_unload().site
        torch.testing.assert_close(plain.bias, b if feedforward else s * b)
        torch.testing.assert_close(plain.weight, W * s if feedforward else W * s[:, None])


def test_ia3_finds_keys_values_and_feedforward_of_known_models():
    from transformers import LlamaConfig, LlamaForCausalLM

    small = dict(vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**small)), IA3Config())
    forms = {stem.rsplit(".", 1)[1]: m.form for stem, m in model.roster.adapters["default"].methods}
    assert forms == {"k_proj": "after", "v_proj": "after", "down_proj": "before"}
    with pytest.raises(ValueError, match="specify `feedforward_modules`"):
        adapted(IA3Config(target_modules=["site"]))
    with pytest.raises(ValueError, match="subset of `target_modules`"):
        IA3Config(target_modules=["k"], feedforward_modules=["wo"])


def test_input_and_output_transforms_on_one_convolution_act_once_each():
    """The rotation makes the layer go through its dense weight; the scaling must not be applied there and again."""
    torch.manual_seed(0)
    base = nn.Sequential()
    base.site = nn.Conv2d(4, 8, 3)
    model = get_peft_model(base, OFTConfig(oft_block_size=4, target_modules=["site"]), adapter_name="turn").eval()
    model.add_adapter("scale", IA3Config(target_modules=["site"], feedforward_modules=[]))
    for name in ("turn", "scale"):
        for p in model.adapter_parameters(name):
            p.data += 0.3 * torch.randn_like(p)
    model.set_adapter(["turn"])
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        turned = model(x)
        scale = next(model.adapter_parameters("scale"))
        model.set_adapter(["turn", "scale"])
        torch.testing.assert_close(model(x), turned * scale)


def test_a_model_of_unknown_type_asks_for_targets_before_their_kinds():
    base = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        get_peft_model(base, IA3Config())
