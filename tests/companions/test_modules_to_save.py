"""Whole modules that train as copies."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from peft import LoraConfig, PeftModel, get_peft_model
from peft.companions.modules_to_save import ModulesToSave
from tests.helpers.selective import bits, same, shake, train


class Classifier(nn.Module):
    """A trunk and a head that has parts, running statistics, and a weight that is read without a call."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(8, 8)
        self.head = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
        self.last = nn.Linear(3, 3, bias=False)

    def forward(self, x):
        return nn.functional.linear(self.head(torch.relu(self.trunk(x))), self.last.weight)


def with_head(**more):
    return LoraConfig(r=2, target_modules=["trunk"], modules_to_save=["head", "last"], **more)


def test_saved_modules_train_as_copies_and_the_base_never_changes(tmp_path):
    base = Classifier()
    x, before = torch.randn(12, 8), bits(base)
    expected = copy.deepcopy(base).eval()(x)
    model = get_peft_model(base, with_head())
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    train(model.train(), lambda m: (m(x) - 1).square().mean())
    assert all(not torch.equal(p, start[n]) for n, p in model.named_parameters() if n in start and "lora_A" not in n)
    with model.disable_adapter():
        torch.testing.assert_close(model.eval()(x), expected, rtol=0, atol=0)
    assert same(copy.deepcopy(model).base_model.unload(), before)
    statistics = model.base_model.model.head.modules_to_save["default"]._modules["1"].running_mean
    assert not torch.equal(statistics, before["head.1.running_mean"])
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert {k.removeprefix("base_model.model.") for k in keys if "lora" not in k} == {
        k for k in before if k.startswith(("head.", "last."))
    }
    with torch.no_grad():
        again = PeftModel.from_pretrained(Classifier(), tmp_path).eval()
        assert torch.equal(again(x), model(x))
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(x), again(x))
        assert type(merged.head) is nn.Sequential and torch.equal(merged.head[1].running_mean, statistics)


def test_two_adapters_have_their_own_heads():
    model = shake(get_peft_model(Classifier().eval(), with_head()))
    model.add_adapter("other", with_head())
    x = torch.randn(4, 8)
    one = model(x)
    model.set_adapter("other")
    assert torch.equal(model(x), Classifier().eval()(x))
    train(model, lambda m: m(x).square().mean())
    other = model(x)
    model.set_adapter("default")
    assert torch.equal(model(x), one) and not torch.equal(other, one)


def test_saved_modules_look_like_upstreams_wrapper():
    model = shake(get_peft_model(Classifier().eval(), with_head()))
    last = model.base_model.model.last
    assert list(last.modules_to_save) == ["default"] and "default" in last.modules_to_save
    assert torch.equal(last.modules_to_save["default"].weight, last.weight)
    assert not torch.equal(last.original_module.weight, last.weight)
    with model.disable_adapter():
        assert torch.equal(last.original_module.weight, last.weight)


@pytest.mark.parametrize("first", ["inside", "whole"])
def test_a_saved_module_and_another_adapters_layer_inside_it(first, tmp_path):
    inside = LoraConfig(r=2, target_modules=["head.0"], seed=3)
    configs = {"inside": inside, "whole": with_head(seed=3)}
    second = next(n for n in configs if n != first)
    x = torch.randn(4, 8)
    alone = {}
    for name, config in configs.items():
        model = shake(get_peft_model(Classifier().eval(), copy.deepcopy(config), adapter_name=name), name)
        alone[name] = model(x).detach()
    model = shake(get_peft_model(Classifier().eval(), configs[first], adapter_name=first), first)
    model.add_adapter(second, configs[second])
    shake(model, second)
    with torch.no_grad():
        for name in configs:
            model.set_adapter(name)
            assert torch.equal(model(x), alone[name])
        model.save_pretrained(tmp_path)
        for name in configs:
            loaded = PeftModel.from_pretrained(Classifier().eval(), tmp_path / name).eval()
            assert torch.equal(loaded(x), alone[name])
        model.set_adapter(["inside", "whole"])
        both = model(x)
        assert not torch.equal(both, alone["whole"])
        assert torch.equal(model.base_model.unload()(x), Classifier().eval()(x))


def test_an_attention_module_can_be_saved_whole_and_adapted_by_another():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
            self.out = nn.Linear(8, 8)

        def forward(self, x):
            return self.out(self.attn(x, x, x, need_weights=False)[0])

    x = torch.randn(2, 3, 8)
    whole = LoraConfig(r=2, target_modules=["out"], modules_to_save=["attn"], seed=3)
    parts = LoraConfig(r=2, target_modules=["attn"], seed=3)
    for names in (("whole", "parts"), ("parts", "whole")):
        configs = {"whole": copy.deepcopy(whole), "parts": copy.deepcopy(parts)}
        model = shake(get_peft_model(Net().eval(), configs[names[0]], adapter_name=names[0]), names[0])
        model.add_adapter(names[1], configs[names[1]])
        shake(model, names[1])
        with torch.no_grad():
            for name in names:
                single = shake(get_peft_model(Net().eval(), copy.deepcopy(configs[name]), adapter_name=name), name)
                model.set_adapter(name)
                torch.testing.assert_close(model(x), single(x))
                assert not torch.allclose(model(x), Net().eval()(x))
            assert torch.equal(model.base_model.unload()(x), Net().eval()(x))


def test_a_head_is_shown_as_the_module_that_it_is():
    """upstream 0.21.2: modules_to_save["default"] is a Linear of the head's sizes, which is called and assigned to."""
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    model = get_peft_model(base, LoraConfig(target_modules=["0"], modules_to_save=["1"]))
    head, x = base[1], torch.randn(2, 4)
    assert isinstance(head.methods["default"][0], ModulesToSave)
    held = head.modules_to_save["default"]
    assert type(held) is nn.Linear and (held.in_features, held.out_features) == (4, 3)
    assert torch.equal(held(x), head(x)) and list(head.modules_to_save) == ["default"]
    assert held.weight is next(p for n, p in model.named_parameters() if "modules_to_save" in n and "weight" in n)
    held.weight = nn.Parameter(torch.zeros(3, 4))
    held.bias.data.fill_(2.0)
    assert torch.equal(head(x), torch.full((2, 3), 2.0)) and not torch.equal(head.original_module(x), head(x))
