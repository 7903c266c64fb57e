"""Trees of trained copies that mirror the paths of their originals, and which tensors are biases."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from peft.core.forms.copies import is_bias, outermost, put, take


def test_a_tensor_hangs_at_its_dotted_name_parameters_as_such_and_the_rest_as_state():
    tree, p, b = nn.Module(), nn.Parameter(torch.zeros(2)), torch.ones(3)
    put(tree, "a.b.weight", p)
    put(tree, "a.running", b)
    assert take(tree, "a.b.weight") is p and take(tree, "a.running") is b
    assert dict(tree.named_parameters()) == {"a.b.weight": p} and dict(tree.named_buffers()) == {"a.running": b}


@pytest.mark.parametrize("name", ["bias", "a.bias", "in_proj_bias", "a.q_bias", "bias_k"])
def test_names_of_biases(name):
    assert is_bias(name)


@pytest.mark.parametrize("name", ["weight", "bias.weight", "biased", "unbiased"])
def test_names_of_other_tensors(name):
    assert not is_bias(name)


def test_places_inside_others_are_left_out():
    places = [SimpleNamespace(path=p) for p in ("a", "a.b", "ab", "c.d", "c.d.e.f")]
    assert [p.path for p in outermost(places)] == ["a", "ab", "c.d"]
