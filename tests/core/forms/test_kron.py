"""One Kronecker product at a site: the sizes of its factors, their start, and their scale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft.contract.geometry import Geometry, plain_geometry
from peft.contract.site import Site
from peft.contract.tensors import Stored
from peft.core.forms.kron import Kronecker, KroneckerConfig, sizes


class Product(Kronecker):
    pair_names = ("left", "right")
    tensors = {"left": Stored(shape="a1 a2"), "right": Stored(shape="b1 b2")}

    def delta(self) -> tuple[Tensor]:
        return (torch.kron(*self.scaled()),)


def site(geometry: Geometry, path: str = "here") -> Site:
    empty = torch.zeros(geometry.out, geometry.fan_in)
    return Site(path, geometry, lambda: empty, dict, dict, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (None, ((4, 6), (3, 4))),  # 24 = 4 · 6 and 12 = 3 · 4: nearest to the square roots
        ((2, 12), ((2, 12), (12, 1))),
        ([24, 1], ((24, 1), (1, 12))),
    ],
)
def test_the_factors_sizes_multiply_to_the_layers(shape, expected):
    config = KroneckerConfig(a_shape=shape)
    assert sizes(config, site(plain_geometry(24, 12))) == expected
    method = Product(config, site(plain_geometry(24, 12)))
    (a1, b1), (a2, b2) = expected
    assert tuple(method.left.shape) == (a1, a2) and tuple(method.right.shape) == (b1, b2)


def test_a_module_without_a_weight_is_sized_by_its_input():
    assert sizes(KroneckerConfig(), site(Geometry(out=24, fan_in=0, inputs=12))) == ((4, 6), (3, 4))


@pytest.mark.parametrize("shape", [(5, 3), (4, 5)])
def test_a_shape_that_does_not_divide_the_layer_is_refused_with_its_place(shape):
    with pytest.raises(ValueError, match=r"does not divide the layer here, which is 24 x 12"):
        Product.check(KroneckerConfig(a_shape=shape), site(plain_geometry(24, 12)))


@pytest.mark.parametrize("shape", [(4,), (4, 3, 1), (0, 3), (2.5, 3)])
def test_a_shape_is_two_positive_numbers(shape):
    with pytest.raises(ValueError, match="a_shape"):
        KroneckerConfig(a_shape=shape)


@pytest.mark.parametrize("init_weights", [True, False])
def test_the_start_changes_nothing_unless_it_is_drawn(init_weights):
    place = site(plain_geometry(400, 900))  # A[20, 30], B[20, 30]
    method = Product(KroneckerConfig(init_weights=init_weights), place)
    method.reset(torch.Generator().manual_seed(3), place)
    bound = 30**-0.5
    for factor in (method.left, method.right) if not init_weights else (method.left,):
        assert factor.abs().max() <= bound and factor.abs().max() > 0.9 * bound
        assert abs(factor.mean().item()) < 5 * bound / (3 * 600) ** 0.5  # σ of a uniform is bound/√3
    assert bool(method.right.any()) is not init_weights and bool(method.dense().any()) is not init_weights


def test_the_scale_stands_at_the_first_factor():
    place = site(plain_geometry(24, 12))
    method = Product(KroneckerConfig(scale=2.5, init_weights=False), place)
    method.reset(torch.Generator().manual_seed(3), place)
    method.multiplier = 0.5
    A, B = method.scaled()
    assert method.strength == 1.25 and torch.equal(A, 1.25 * method.left) and B is method.right
