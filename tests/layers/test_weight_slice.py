"""A slice of another module's parameter as a layer: which entries it takes, and that it owns none of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft.layers.weight_slice import WeightSlice


class Owner(nn.Module):
    """Stacks and fused projections in single parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 6, 4))
        self.turned = nn.Parameter(torch.randn(3, 4, 6))
        self.offsets = nn.Parameter(torch.randn(3, 6))
        self.grid = nn.Parameter(torch.randn(2, 3, 6, 4))
        self.query = nn.Parameter(torch.randn(2, 4))
        self.all_three = nn.Parameter(torch.randn(6))
        self.none = None


SLICES = {
    "an expert": ({"weight_name": "stack", "bias_name": "offsets", "index": 1}, lambda o: (o.stack[1], o.offsets[1])),
    "transposed": (
        {"weight_name": "turned", "bias_name": "offsets", "index": 2, "transposed": True},
        lambda o: (o.turned[2].T, o.offsets[2]),
    ),
    "rows": (
        {"weight_name": "stack", "bias_name": "offsets", "index": 0, "rows": slice(2, 4)},
        lambda o: (o.stack[0, 2:4], o.offsets[0, 2:4]),
    ),
    "rows of a transposed one": (
        {"weight_name": "turned", "index": 0, "transposed": True, "rows": slice(4, None)},
        lambda o: (o.turned[0, :, 4:].T, None),
    ),
    "two leading axes": ({"weight_name": "grid", "index": (1, 2)}, lambda o: (o.grid[1, 2], None)),
    "a shared bias": (
        {"weight_name": "query", "bias_name": "all_three", "bias_rows": slice(2, 4), "bias_size": 6},
        lambda o: (o.query, o.all_three[2:4]),
    ),
    "a bias that is not there": ({"weight_name": "query", "bias_name": "none"}, lambda o: (o.query, None)),
}
every = pytest.mark.parametrize("name", SLICES)


def made(name: str) -> tuple[Owner, WeightSlice, Tensor, Tensor | None]:
    owner, (fields, expected) = Owner(), SLICES[name]
    return owner, WeightSlice(owner, **fields), *expected(owner)


@every
def test_it_is_a_linear_layer_with_these_entries(name):
    _, part, weight, bias = made(name)
    assert torch.equal(part.weight, weight) and (part.out_features, part.in_features) == tuple(weight.shape)
    assert (part.bias is None) if bias is None else torch.equal(part.bias, bias)
    x = torch.randn(2, 3, 4)
    assert torch.equal(part(x), F.linear(x, weight, bias))


@every
def test_it_owns_nothing_and_shows_the_owners_memory(name):
    owner, part, weight, _ = made(name)
    assert not list(part.parameters()) and not part.state_dict() and len(list(part.modules())) == 1
    with torch.no_grad():
        part.weight.fill_(7.0)
    assert (weight == 7).all() and part.owner is owner


@every
def test_gradients_arrive_in_the_owners_parameter_and_only_there(name):
    owner, part, _, _ = made(name)
    x = torch.randn(5, 4)
    part(x).sum().backward()
    fields, _ = SLICES[name]
    whole = getattr(owner, fields["weight_name"])
    assert torch.allclose(part.of_weight(whole.grad), x.sum(0).expand(part.out_features, -1))
    assert whole.grad.count_nonzero() == part.out_features * 4  # no neighbour got any
    if part.bias is not None:
        bias = getattr(owner, fields["bias_name"]).grad
        assert torch.equal(part.of_bias(bias), torch.full((part.out_features,), 5.0))
        assert bias.count_nonzero() == part.out_features


@every
def test_a_place_is_the_owners_parameter_and_where_in_it(name):
    owner, part, weight, bias = made(name)
    where, take = part.place("weight")
    assert torch.equal(take(getattr(owner, where)), weight)
    if part.bias_name is None:
        with pytest.raises(ValueError, match=rf"Owner\.{where} has no bias that could be changed"):
            part.place("bias")
    elif bias is not None:
        where, take = part.place("bias")
        assert torch.equal(take(getattr(owner, where)), bias)


def test_the_size_of_the_whole_bias_is_the_weights_outputs_unless_stated():
    assert made("an expert")[1].bias_size == 6 and made("transposed")[1].bias_size == 6
    assert made("rows")[1].bias_size == 6  # all of it, of which it takes two
    assert made("a shared bias")[1].bias_size == 6 and made("a bias that is not there")[1].bias_size == 2


def test_it_follows_a_parameter_that_is_replaced():
    owner, part, _, _ = made("an expert")
    owner.stack = nn.Parameter(torch.ones(3, 6, 4))
    assert torch.equal(part.weight, torch.ones(6, 4))


def test_a_copied_tree_has_slices_of_its_own_owner():
    tree = nn.Module()
    tree.owner = Owner()
    tree.part = WeightSlice(tree.owner, "stack", index=0)
    twin = copy.deepcopy(tree)
    assert twin.part.owner is twin.owner
    with torch.no_grad():
        twin.owner.stack.zero_()
    assert not twin.part.weight.any() and tree.part.weight.any()


def test_it_starts_in_the_owners_mode_and_says_where_it_lies():
    owner = Owner().eval()
    part = WeightSlice(owner, "stack", index=1, rows=slice(0, 2))
    assert not part.training and WeightSlice(Owner(), "query").training
    assert repr(part) == "WeightSlice(Owner.stack[1][slice(0, 2, None)], 4 -> 2)"
