"""The objects that stand for upstream's modules and containers, made by themselves: what they hold is the method's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from peft.core.acting.adapted_layer import AdaptedLayer
from peft.core.adapted.view_names import leaves
from peft.core.adapted.view_objects import AdapterView, DropoutView, ModuleView, rescale

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))


def adapted(config: PeftConfig) -> AdaptedLayer:
    layer = get_peft_model(nn.Sequential(nn.Linear(6, 4)), config).get_base_model()[0]
    assert isinstance(layer, AdaptedLayer)
    return layer


def lora(**more: object) -> LoraConfig:
    return LoraConfig(target_modules=["0"], r=2, lora_alpha=4, init_lora_weights=False, **more)


def test_a_module_view_holds_the_very_parameters_and_runs_its_factor():
    layer = adapted(lora())
    (m,) = layer.methods["default"]
    A, B = (ModuleView(layer, m, n, leaves(m, n)) for n in ("lora_A", "lora_B"))
    assert A.weight is m.lora_A_weight and A.bias is None and (A.in_features, A.out_features) == (6, 2)
    assert torch.equal(B(A(X)), X @ m.lora_A_weight.T @ m.lora_B_weight.T)
    assert list(A.parameters()) == [m.lora_A_weight] and list(A.state_dict()) == ["weight"]
    assert not A.requires_grad_(False).weight.requires_grad
    assert B.to(torch.float64) is B and m.lora_B_weight.dtype == torch.float64
    with pytest.raises(AttributeError, match="no 'bias' to assign"):
        A.bias = torch.zeros(2)
    with pytest.raises(AttributeError, match="has no 'scale', only weight"):
        _ = A.scale


def test_only_a_sum_with_the_weight_has_factors_to_call():
    layer = adapted(IA3Config(target_modules=["0"], feedforward_modules=[]))
    (m,) = layer.methods["default"]
    with pytest.raises(TypeError, match="ia3_l of IA3 is no layer"):
        ModuleView(layer, m, "ia3_l", {"weight": "ia3_l_weight"})(X)


def test_a_dropout_view_reads_and_sets_the_rate():
    (m,) = adapted(lora(lora_dropout=0.5)).methods["default"]
    view = DropoutView(m)
    assert view.p == 0.5 and repr(view) == "Dropout(p=0.5)"
    view.p = 0
    assert m.dropout == 0.0 and torch.equal(view(X), X)
    with pytest.raises(AttributeError, match="has p, but no 'inplace'"):
        view.inplace = True


def test_an_adapter_view_is_a_mapping_over_the_adapters_that_hold_the_name():
    layer = adapted(lora())
    view = AdapterView(layer, "lora_A")
    assert list(view) == ["default"] and "other" not in view and isinstance(view.default, ModuleView)
    assert [n for n, _ in view.named_parameters()] == ["default.weight"]
    with pytest.raises(KeyError, match="no adapter of this layer holds it"):
        view["other"] = nn.Linear(6, 2)
    with pytest.raises(TypeError, match="is a module with weight; got float"):
        view["default"] = 1.0
    assert len(AdapterView(layer, "oft_R")) == 0


def test_a_strength_of_zero_cannot_be_rescaled():
    (m,) = adapted(lora()).methods["default"]
    rescale(m, 6.0)
    assert m.strength == pytest.approx(6)
    m.set(own_alpha=0)
    with pytest.raises(ValueError, match="a strength of 0 cannot be rescaled"):
        rescale(m, 2.0)
