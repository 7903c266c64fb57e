"""Code that reads an adapted layer's weight: the values with their gradient, or the parameter, by what the code does."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn import init

from peft import BottleneckConfig, LoraConfig, Refusal, get_peft_model
from peft.core.acting.raw_reads import asks_for_parameter, reader
from tests.layers.holding import close, deltas, lora, shake


class Raw(nn.Module):
    """A model that calls one layer and reads the other's weight, as Mamba does."""

    def __init__(self):
        super().__init__()
        self.first, self.site = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.site.weight @ self.first(x).T + self.site.bias[:, None]


class Head(torch.autograd.Function):
    """A kernel that is given the weight itself, as fused losses are."""

    @staticmethod
    def forward(ctx, x, W):
        ctx.save_for_backward(x, W)
        return x @ W.T

    @staticmethod
    def backward(ctx, dy):
        x, W = ctx.saved_tensors
        return dy @ W, dy.T @ x


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = get_peft_model(Raw(), lora(("first", "site"))).eval()
    shake(model)
    return model


@pytest.fixture
def site(model):
    return model.get_base_model().site


@pytest.mark.parametrize("training", [False, True])
def test_a_model_that_reads_raw_gives_what_it_gives_merged(model, training):
    model.train(training)
    x = torch.randn(3, 6)
    out = model(x)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        with model.disable_adapter():
            assert not close(model(x), out)
        model.base_model.merge_adapter()
        assert close(model(x), out)
        model.base_model.unmerge_adapter()
        assert close(model.base_model.merge_and_unload()(x), out)


@pytest.mark.parametrize(
    "fields", [{"use_dora": True}, {"lora_bias": True}, {"bias": "lora_only"}, {"lora_dropout": 0.5}]
)
def test_the_values_are_those_of_a_merge(fields):
    model = get_peft_model(Raw(), lora(("first", "site"), **fields)).train()
    shake(model)
    site = model.get_base_model().site
    W, b = site.weight, site.bias
    site.merge()
    with torch.no_grad():
        assert close(W, site.base_layer.weight, 1e-6) and close(b, site.base_layer.bias, 1e-6)
    assert W.requires_grad


def test_half_precision_is_rounded_once():
    model = get_peft_model(nn.Sequential(nn.Linear(16, 8).bfloat16()), lora(("0",)))
    shake(model)
    layer = model.get_base_model()[0]
    W = layer.weight
    layer.merge()
    assert W.dtype == torch.bfloat16 and torch.equal(W, layer.base_layer.weight)


def test_a_kernel_is_given_a_tensor_with_a_gradient(model, site):
    x = torch.randn(5, 8)
    Head.apply(x, site.weight).square().sum().backward()
    expected = 2 * ((x @ (site.base_layer.weight + deltas(model)["site"]).T).T @ x)
    (_, first), (_, m) = model.roster.adapters["default"].methods
    assert close(m.lora_B.grad, 2.0 * expected @ m.lora_A.detach().T) and first.lora_B.grad is None


def test_a_graph_is_given_the_values(site):
    x = torch.randn(5, 8)
    with torch.no_grad():
        compiled = torch.compile(lambda x: F.linear(x, site.weight, site.bias), fullgraph=True, backend="eager")
        assert close(compiled(x), site(x))


def test_what_needs_no_values_gets_the_parameter(model, site, monkeypatch):
    monkeypatch.setattr(type(site), "_composed", lambda *a: pytest.fail("composed"))
    base = site.base_layer
    seen = (  # outside of assert, which pytest rewrites
        site.weight.dtype,
        site.weight.device.type,
        site.weight.shape,
        site.weight.size(0),
        site.weight.data.dtype,
        isinstance(site.weight, nn.Parameter),
        isinstance(model.get_base_model().get_submodule("site").weight, nn.Parameter),
        hasattr([site][0].weight, "data"),
        model.get_parameter("base_model.model.site.weight") is base.weight,
        site.bias is not None,
        site.weight is base.weight,
        base.weight is site.weight,
    )
    if site.bias is None:
        raise AssertionError
    assert seen[:5] == (torch.float32, "cpu", torch.Size([4, 8]), 4, torch.float32) and all(seen[5:])
    site.weight.requires_grad = False
    site.weight.some_mark = 3  # what libraries note on parameters
    assert base.weight.some_mark == 3


def test_writing_goes_into_the_parameter(model, site):
    base = site.base_layer.weight
    init.zeros_(site.weight)
    assert not base.any()
    nn.init.ones_(model.get_base_model().site.weight)
    assert base.sum() == 32
    for i, layers in enumerate([[site]]):
        init.constant_(layers[i].weight, 3.0)
    assert base.sum() == 96
    site.weight.data.fill_(2.0)
    assert base.sum() == 64
    with torch.no_grad():
        site.weight[0] = 0.0
        site.weight.data[1] = 0.0
        site.weight.mul_(2.0)
    assert base.sum() == 64 and not base[:2].any()
    site.weight = nn.Parameter(torch.full((4, 8), 5.0))
    assert site.base_layer.weight.sum() == 160
    site.weight.data = torch.zeros(4, 8)
    assert not site.base_layer.weight.any()


def test_without_an_acting_adapter_the_parameter_is_read(model, site):
    with model.disable_adapter():
        W = site.weight
    assert W is site.base_layer.weight
    site.merge()
    W = site.weight
    assert W is site.base_layer.weight


def test_several_adapters_in_one_batch_are_refused_where_one_weight_is_read(model):
    model.add_adapter("other", lora(("first", "site")))
    x = torch.randn(2, 6)
    same = model(x, adapter_names=["default", "default"])
    assert close(same, model(x))
    with pytest.raises(Refusal, match=r"site: Raw\.forward|site: forward"):
        model(x, adapter_names=["default", "other"])


def test_an_effect_that_is_no_change_of_weights_is_refused_naming_the_reader():
    model = get_peft_model(Raw(), BottleneckConfig(target_modules=["site"]))
    with pytest.raises(Refusal, match="forward .*reads its weight"):
        model(torch.randn(2, 6))
    with model.disable_adapter():
        model(torch.randn(2, 6))


def test_several_active_adapters_are_in_the_values(model, site):
    model.add_adapter("other", lora(("site",), init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    x = torch.randn(3, 8)
    with torch.no_grad():
        assert close(F.linear(x, site.weight, site.bias), site(x))


def test_a_tied_table_read_as_a_head():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(9, 6)

        def forward(self, ids):
            return F.linear(self.embed(ids), self.embed.weight)

    model = get_peft_model(Tied(), LoraConfig(target_modules=["embed"], init_lora_weights=False))
    ids = torch.arange(9)
    with torch.no_grad():
        out = model(ids)
        assert close(model.merge_and_unload()(ids), out)


def test_the_reader_is_named():
    def deeper():
        return reader(), asks_for_parameter()

    name, asks = deeper()
    assert "test_the_reader_is_named" in name and not asks


def test_stacks_and_projections_that_are_read_raw_are_changed_too():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
            self.experts = nn.Module()
            self.experts.stack = nn.Parameter(torch.randn(3, 4, 8))

        def forward(self, x):
            q = F.linear(x, self.attn.in_proj_weight[:8])
            return torch.einsum("eoi,bi->beo", self.experts.stack, q)

    model = get_peft_model(Reads(), lora(("attn",), target_parameters=["experts.stack"]))
    shake(model)
    x = torch.randn(5, 8)
    out = model(x)
    out.sum().backward()
    reached = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert len(reached) == 2 * (1 + 3)
    with torch.no_grad():
        with model.disable_adapter():
            assert not close(model(x), out)
        assert close(model.merge_and_unload()(x), out)
