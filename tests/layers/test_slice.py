"""Slices of a weight: views, writing, and shared parameters."""

from __future__ import annotations

import copy

import torch
from torch import nn

from peft.layers.slice import Slice, WeightSlice


class Stack(nn.Module):
    """Three experts' matrices `[in, out]` in one parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stack = nn.Parameter(torch.randn(3, 5, 4))
        self.offsets = nn.Parameter(torch.randn(3, 4))


def test_a_slice_is_a_linear_layer_without_parameters():
    owner = Stack()
    part = WeightSlice(owner, "stack", "offsets", index=1, rows=slice(1, 3), transposed=True)
    assert not list(part.parameters()) and not part.state_dict() and not list(part.children())
    x = torch.randn(2, 5)
    assert torch.equal(part(x), nn.functional.linear(x, owner.stack[1].T[1:3], owner.offsets[1, 1:3]))
    assert (part.out_features, part.in_features) == (2, 5)


def test_writing_a_slice_leaves_its_neighbours_and_restoring_brings_back_the_bits():
    owner, kind = Stack(), Slice()
    before = copy.deepcopy(owner.state_dict())
    parts = [WeightSlice(owner, "stack", "offsets", index=i, transposed=True) for i in (0, 2)]
    kept = []
    for n, part in enumerate(parts):
        kept.append(kind.keep(part, ["weight", "bias"]))
        kind.write(part, {"weight": torch.full((4, 5), float(n)), "bias": torch.full((4,), float(n))})
    assert torch.equal(owner.stack[1], before["stack"][1]) and torch.equal(owner.offsets[1], before["offsets"][1])
    assert (owner.stack[0] == 0).all() and (owner.stack[2] == 1).all() and (owner.offsets[2] == 1).all()
    for part, k in zip(parts, kept, strict=True):  # in the order of merging, not the reverse
        kind.restore(part, k)
    assert all(torch.equal(owner.state_dict()[n], v) for n, v in before.items())


def test_a_shared_parameter_is_copied_before_a_slice_of_it_is_written_and_shared_again_after():
    a, b, kind = Stack(), Stack(), Slice()
    b.stack = shared = a.stack
    before = shared.detach().clone()
    parts = [WeightSlice(a, "stack", index=i, transposed=True) for i in (0, 1)]
    kept = [kind.keep(p, ["weight"]) for p in parts]
    assert [kind.untie(p, ["weight"], {id(shared)}) for p in parts] == [True, False]
    for p in parts:
        kind.write(p, {"weight": torch.zeros(4, 5)})
    assert torch.equal(b.stack, before) and (a.stack[:2] == 0).all()
    for p, k in zip(parts, kept, strict=True):
        kind.restore(p, k)
    assert a.stack is shared and torch.equal(shared, before)
