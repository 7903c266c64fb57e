"""Activations against their formulas, and affine maps in the input's precision."""

from __future__ import annotations

import math

import pytest
import torch

from peft.maths.networks import ACTIVATIONS, affine

FORMULAS = {
    "relu": lambda t: max(t, 0.0),
    "gelu": lambda t: t * (1 + math.erf(t / math.sqrt(2))) / 2,
    "gelu_new": lambda t: t * (1 + math.tanh(math.sqrt(2 / math.pi) * (t + 0.044715 * t**3))) / 2,
    "silu": lambda t: t / (1 + math.exp(-t)),
    "swish": lambda t: t / (1 + math.exp(-t)),
    "tanh": math.tanh,
    "leaky_relu": lambda t: t if t > 0 else 0.01 * t,
    "linear": lambda t: t,
}


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_a_name_means_its_function(name):
    t = torch.linspace(-3, 3, 13, dtype=torch.float64)
    expected = torch.tensor([FORMULAS[name](float(v)) for v in t], dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[name](t), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_affine_map_is_computed_in_the_precision_of_its_input(dtype):
    W, b = torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, -1.0]]), torch.tensor([0.5, 0.0, 1.0])
    result = affine(torch.tensor([[1.0, -1.0]], dtype=dtype), W, b)
    assert torch.equal(result, torch.tensor([[-0.5, -1.0, 2.0]], dtype=dtype))
