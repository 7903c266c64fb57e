"""Low-rank edits of every token, or of the first and last ones, each once; the first kind merges."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from peft import Refusal
from peft.contract.geometry import Geometry, plain_geometry
from peft.contract.site import Site
from peft.core.acting.span import Span
from peft.core.forms.edits import Edits

LINEAR = plain_geometry(3, 4)


class Fixed(Edits):
    def maps(self):
        rng = torch.Generator().manual_seed(0)
        P, R = torch.randn(2, self.edits, 2, 3, generator=rng)
        return P, R, torch.randn(self.edits, 2, generator=rng)


def at(geometry=LINEAR, r=2, **more):
    config = {"r": r, "all_positions": False, "tied_weights": False, "prefix_positions": 1, "suffix_positions": 2}
    config = SimpleNamespace(**{**config, "dropout": 0.0, "task_type": None, **more})
    site = Site("site", geometry, torch.zeros, dict, dict, torch.device("cpu"), torch.float32)
    Fixed.check(config, site)
    return Fixed(config, site)


def edited(method, y, i=0):
    P, R, b = (t[i] for t in method.maps())
    return y + (y @ P.T + b) @ R


def test_first_and_last_tokens_are_edited_once_and_the_others_left_alone():
    y, method = torch.randn(2, 5, 3), at()
    out = method.after(y, None)
    torch.testing.assert_close(out[:, :1], edited(method, y)[:, :1])
    torch.testing.assert_close(out[:, 3:], edited(method, y, 1)[:, 3:])
    assert torch.equal(out[:, 1:3], y[:, 1:3])
    torch.testing.assert_close(method.after(y[:, :1], None), edited(method, y[:, :1]))  # first and last: as the first


def test_tied_edits_are_one_and_positions_are_those_of_the_call():
    y, method = torch.randn(2, 5, 3), at(tied_weights=True, prefix_positions=3, suffix_positions=0)
    out = method.after(y, None, Span(2, 5, offset=2))
    assert method.edits == 1 and torch.equal(out[:, 1:], y[:, 1:])
    torch.testing.assert_close(out[:, :1], edited(method, y)[:, :1])


@pytest.mark.parametrize("geometry", [plain_geometry(3, 4), Geometry(3, 9, 3, indexed=True)])
def test_an_edit_of_every_token_merges(geometry):
    method = at(geometry, all_positions=True)
    method.multiplier = 0.7
    W, b = torch.randn(3, geometry.fan_in), None if geometry.indexed else torch.randn(3)
    x = torch.eye(geometry.fan_in)  # an index picks a column
    y = x @ W.T + (0 if b is None else b)
    V, c = method.fold(W, b)
    torch.testing.assert_close(x @ V.T + (0 if c is None else c), method.after(y, None))
    assert method.mergeable and method.shifts is not geometry.indexed and not at(geometry).mergeable


def test_a_subspace_needs_channels():
    with pytest.raises(Refusal, match="no subspace of r=4"):
        at(r=4)
