"""The contract of methods: one stated form, what follows from it, and calls whose results outlive gathered tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from peft import Refusal
from peft.contract.geometry import Geometry
from peft.contract.method import Method, declared, listeners, own_copies, product
from peft.contract.site import Op, Site
from peft.core.anatomy.walk import kind_of

LAYER = nn.Linear(3, 2)
W, B = LAYER.weight.detach(), LAYER.bias.detach()
OP = Op(kind_of(LAYER), LAYER, kind_of(LAYER).geometry(LAYER))
SITE = Site("site", OP.geometry, lambda: W, dict, dict, torch.device("cpu"), torch.float32)


class Add(Method):
    """A delta of three factors and a bias, of no registered name."""

    def __init__(self) -> None:
        super().__init__(None, SITE)
        torch.manual_seed(0)
        self.first, self.second = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5, 4))
        self.third, self.shift = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(2))

    def delta(self) -> tuple[Tensor, ...]:
        return self.first, self.second, self.third

    def bias_change(self) -> Tensor:
        return self.shift


class Halve(Method):
    def before(self, x: Tensor) -> Tensor:
        return x / 2


class Louder(Method):
    def after(self, y: Tensor, x: Tensor) -> Tensor:
        return y * 2


def test_the_form_is_the_function_that_a_class_states_and_is_inherited():
    class Child(Add):
        pass

    assert (Add.form, Halve.form, Louder.form, Child.form) == ("delta", "before", "after", "delta")
    assert Add.plain_delta and not Halve.plain_delta


def test_every_new_class_is_told():
    told: list[type] = []
    listeners.append(told.append)
    try:

        class New(Method):
            pass
    finally:
        listeners.remove(told.append)
    assert told == [New] and declared[-1] is New


@torch.no_grad()
def test_a_delta_is_added_factor_by_factor_and_folds_to_the_same():
    m, x = Add().eval(), torch.randn(4, 3)
    dense = m.third @ m.second @ m.first
    assert torch.allclose(m.dense(), dense, atol=1e-5) and torch.allclose(product(m.delta()), dense, atol=1e-5)
    folded, bias = m.fold(W, B)
    assert torch.allclose(folded, W + dense, atol=1e-5) and torch.equal(bias, B + m.shift)
    assert torch.allclose(m.add(x, LAYER(x), OP), x @ folded.T + bias, atol=1e-4)
    assert torch.equal(m.fold(W, None)[1], m.shift) and m.shifts and m.mergeable
    assert m.fused_term(OP) is None, "three factors are no pair"


def test_an_input_transform_folds_as_what_it_makes_of_the_identity():
    m = Halve(None, SITE)
    folded, bias = m.fold(W, B)
    assert torch.allclose(folded, W / 2) and bias is B


def test_an_output_transform_without_a_fold_cannot_be_merged():
    m = Louder(None, SITE)
    assert not m.mergeable
    with pytest.raises(Refusal, match="no change of the weights"):
        m.fold(W, B)


def test_a_site_without_a_weight_is_refused_by_what_needs_one():
    nothing = Site("block", Geometry(0, 0, 0), lambda: W, dict, dict, torch.device("cpu"), torch.float32)
    with pytest.raises(Refusal, match="no single weight matrix"):
        Add.check(None, nothing)
    Louder.check(None, nothing)


def test_what_hooks_gather_is_copied_out_of_a_call():
    m = Add()
    assert m.never_gathered and m("delta")[0] is m.first
    m.register_forward_pre_hook(lambda *_: None)
    out = m("delta")
    assert not m.never_gathered and all(a.data_ptr() != b.data_ptr() for a, b in zip(out, m.delta(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(out, m.delta(), strict=True))
    fresh = torch.ones(2)
    assert own_copies((fresh, m.shift), m)[0] is fresh
