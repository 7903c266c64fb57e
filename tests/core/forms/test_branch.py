"""A branch at a module's output or beside it: how strong it is, and what it reads."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from peft import Refusal
from peft.contract.geometry import Geometry, plain_geometry
from peft.contract.site import Site
from peft.core.forms.branch import Branch, BranchConfig

LINEAR = plain_geometry(3, 4)


@dataclasses.dataclass
class Beside(BranchConfig):
    @property
    def parallel(self):
        return True


class Doubled(Branch):
    """z = 2 h, cut to the output's channels."""

    learned_name, gate_names = "s", ("gate", "shift")

    def branch(self, h):
        return 2 * h[..., : self.geometry.out]


def at(config, geometry=LINEAR):
    site = Site("site", geometry, torch.zeros, dict, dict, torch.device("cpu"), torch.float32)
    Doubled.check(config, site)
    method = Doubled(config, site)
    method.s = nn.Parameter(torch.tensor([3.0]))
    method.gate, method.shift = nn.Parameter(torch.ones(1, method.channels)), nn.Parameter(torch.tensor([-1.0]))
    return method


def test_it_reads_the_output_or_in_parallel_the_input():
    x, y = torch.randn(5, 4), torch.randn(5, 3)
    torch.testing.assert_close(at(BranchConfig()).after(y, x), y + 2 * y)
    torch.testing.assert_close(at(Beside()).after(y, x), y + 2 * x[:, :3])


@pytest.mark.parametrize(("scaling", "s"), [(0.5, lambda h: 0.5), ("learned", lambda h: 3.0), ("gated", None)])
def test_its_strength_is_a_number_a_trained_one_or_a_gate_for_each_token(scaling, s):
    x, y = torch.randn(5, 4), torch.randn(5, 3)
    gate = torch.sigmoid(x.sum(1, keepdim=True) - 1)
    method = at(Beside(scaling=scaling))
    torch.testing.assert_close(method.after(y, x), y + 2 * x[:, :3] * (gate if s is None else s(x)))
    method.multiplier = 0.0
    assert torch.equal(method.after(y, x), y)


def test_what_cannot_be_beside_a_module_is_refused():
    for geometry, why in ((Geometry(3, 9, 3, indexed=True), "indices"), (Geometry(3, 12, 4, kernel=3), "positions")):
        with pytest.raises(Refusal, match=why):
            at(Beside(), geometry)
        at(BranchConfig(), geometry)
    with pytest.raises(Refusal, match="channels"):
        at(BranchConfig(), Geometry(0, 0, 4))
    with pytest.raises(Refusal, match="row by row"):
        at(Beside()).after(torch.zeros(2, 3), torch.zeros(5, 4))
    with pytest.raises(ValueError, match="scaling"):
        BranchConfig(scaling="learnt")
