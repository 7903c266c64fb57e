"""Subclasses with a forward of their own: it runs on W + ΔW, or the layer is refused by name; never taken for its parent."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from peft import LoraConfig, Refusal, dry_run, get_peft_model
from peft.core.anatomy.walk import kind_of
from peft.layers.own_forward import CausalConv, CosineLinear, NormalisedEmbedding, OwnLinear
from tests.helpers.layer_kind_cases import Holder
from tests.layers.holding import adapted, close, deltas, lora, shake


class Scaled(nn.Linear):
    def forward(self, x):
        return 3.0 * F.linear(x, self.weight, self.bias)


class Grouped(nn.Linear):
    """[…, 2, 8] -> […, 2, 6], each group by its own half of the rows."""

    def forward(self, x):
        return torch.einsum("...gi,goi->...go", x, self.weight.view(2, -1, 8))


class Router(nn.Linear):
    """As Llama 4's: what it makes of the scores, and the scores."""

    def forward(self, hidden_states):
        scores = super().forward(hidden_states)
        return torch.sigmoid(scores), scores


class StandardisedConv(nn.Conv2d):
    def forward(self, x):
        W = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        W = W / (W.var((1, 2, 3), keepdim=True) + 1e-5).sqrt()
        return self._conv_forward(x, W, self.bias)


class Positions(nn.Embedding):
    def forward(self, mask):
        return super().forward(mask.cumsum(1))


class OwnKernel(nn.Conv2d):
    """The forward is the parent's; what the forward is made of is not."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 2 * weight, bias)


class Transposed(nn.ConvTranspose1d):
    def forward(self, x):
        return super().forward(x)[..., :-1]


class First(Holder):
    def forward(self, x):
        return self.site(x)[0]


CASES = {
    "scaled": (Scaled(16, 6), torch.randn(4, 16)),
    "cosine": (CosineLinear(16, 6), torch.randn(4, 3, 16)),
    "grouped": (Grouped(8, 12, bias=False), torch.randn(4, 2, 8)),
    "causal": (CausalConv(4, 6, 3), torch.randn(2, 4, 7)),
    "standardised": (StandardisedConv(4, 6, 3), torch.randn(2, 4, 5, 5)),
    "kernel": (OwnKernel(4, 6, 3), torch.randn(2, 4, 5, 5)),
    "transposed": (Transposed(4, 6, 3, groups=2), torch.randn(2, 4, 5)),
    "positions": (Positions(10, 8), torch.ones(2, 5, dtype=torch.long)),
    "normalised": (NormalisedEmbedding(10, 8), torch.arange(10).view(2, 5)),
}


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("name", CASES)
def test_the_forward_is_its_own_on_the_changed_weight(name, fields):
    layer, x = CASES[name]
    model = adapted(layer, **fields)
    out = model(x)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    site = model.get_base_model().site
    with torch.no_grad():
        if not fields:  # the layer itself, with another weight in it
            changed = torch.func.functional_call(
                layer, {"weight": layer.weight + site.kind.native(deltas(model)["site"], layer)}, (x,)
            )
            assert close(out, changed)
        with model.disable_adapter():
            assert torch.equal(model(x), layer(x))
        model.base_model.merge_adapter()
        assert close(model(x), out) and not torch.allclose(out, layer(x))
        merged = model.base_model.merge_and_unload()
        assert type(merged.site) is type(layer) and close(merged(x), out)


def test_a_router_gives_all_that_it_gives():
    layer = Router(16, 6, bias=False)
    model = adapted(layer, wrap=First)
    x = torch.randn(5, 16)
    with torch.no_grad():
        best, scores = model.get_base_model().site(x)
        W = layer.weight + deltas(model)["site"]
        assert close(scores, x @ W.T) and close(best, torch.sigmoid(x @ W.T))


def test_rows_with_adapters_of_their_own_have_their_own_weights():
    model = adapted(CosineLinear(16, 6))
    model.add_adapter("other", lora(init_lora_weights=False))
    x = torch.randn(4, 16)
    with torch.no_grad():
        mixed = model(x, adapter_names=["default", "other", "__base__", "default"])
        alone = {}
        for name in ("default", "other"):
            model.set_adapter(name)
            alone[name] = model(x)
        with model.disable_adapter():
            alone["base"] = model(x)
    expected = torch.stack([alone[n][i] for i, n in enumerate(("default", "other", "base", "default"))])
    assert close(mixed, expected)


def test_rows_of_a_router_keep_each_of_their_outputs():
    model = adapted(Router(16, 6, bias=False))
    site = model.get_base_model().site
    x, seen = torch.randn(4, 16), []
    site.register_forward_hook(lambda m, a, out: seen.append(out))
    model.get_base_model().forward = lambda x: site(x)[0]
    with torch.no_grad():
        model(x, adapter_names=["default", "__base__", "default", "__base__"])
        model(x)
    mixed, whole = seen
    assert mixed[1].shape == whole[1].shape
    assert close(mixed[1][[0, 2]], whole[1][[0, 2]]) and not close(mixed[1][1], whole[1][1])


def test_a_forward_on_the_instance_is_a_forward_of_its_own():
    layer = nn.Linear(8, 6)
    layer.forward = types.MethodType(lambda self, x: 5.0 * F.linear(x, self.weight, self.bias), layer)
    assert isinstance(kind_of(layer), OwnLinear)
    model = get_peft_model(Holder(layer), lora(init_lora_weights=False))
    x = torch.randn(3, 8)
    with torch.no_grad():
        out = model(x)
        assert close(out, 5.0 * F.linear(x, layer.weight + deltas(model)["site"], layer.bias))
        assert close(model.merge_and_unload()(x), out)


def test_what_keeps_codes_is_refused_by_name_and_passed_over_by_all_linear():
    class Coded(nn.Linear):
        def __init__(self):
            super().__init__(8, 6, bias=False)
            self.weight = nn.Parameter(torch.zeros(6, 8, dtype=torch.int8), requires_grad=False)

        def forward(self, x):
            return F.linear(x, self.weight.to(x.dtype))

    net = nn.Sequential(Coded(), nn.Linear(6, 4), nn.Linear(4, 4))
    with pytest.raises(Refusal, match=r"on 0 .*Coded has a forward of its own.*int8"):
        get_peft_model(net, LoraConfig(target_modules=["0"]))
    rows = dry_run(net, LoraConfig(target_modules="all-linear"))
    assert [r.path for r in rows] == ["1", "2"] and "int8" in rows.passed_over["0"]
    with pytest.warns(UserWarning, match="passes over 1 layer"):
        model = get_peft_model(net, LoraConfig(target_modules="all-linear"))
    assert sorted(model.peft_config["default"].target_modules) == ["1", "2"]


def test_all_linear_passes_over_what_a_method_cannot_do_there():
    from peft import BottleneckConfig

    net = nn.Sequential(CosineLinear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(Refusal, match="CosineLinear"):
        get_peft_model(net, BottleneckConfig(target_modules=["0"]))
    assert type(net[0]) is CosineLinear
    rows = dry_run(net, BottleneckConfig(target_modules="all-linear"))
    assert [r.path for r in rows] == ["1", "2"] and "CosineLinear" in rows.passed_over["0"]


def test_dropout_that_cannot_act_is_said():
    with pytest.warns(UserWarning, match="dropout does not act"):
        get_peft_model(Holder(CosineLinear(8, 6)), lora(lora_dropout=0.1))


def test_what_a_forward_notes_on_itself_stays():
    class Counting(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return 2 * super().forward(x)

    model = adapted(Counting(8, 6))
    model(torch.randn(2, 8)), model(torch.randn(2, 8))
    assert model.get_base_model().site.base_layer.calls == 2


def test_a_subclass_of_attention_that_reads_its_projection_raw_sees_it_changed():
    class Doubled(nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            out, weights = super().forward(*args, **kwargs)
            return 2 * out, weights

    layer = Doubled(8, 2, batch_first=True).eval()
    model = get_peft_model(Holder(layer), LoraConfig(target_modules=["out_proj"], init_lora_weights=False)).eval()
    shake(model)
    x = torch.randn(2, 3, 8)
    out = model(x)
    out.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    assert close(model.merge_and_unload()(x), out)
