"""Rotations in blocks: how many of what size, which layers fit, and a start that changes nothing."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from peft import Refusal
from peft.contract.geometry import Geometry, plain_geometry
from peft.contract.site import Site
from peft.contract.tensors import Stored
from peft.core.forms.rotation import BlockRotation, BlockRotationConfig


@dataclass
class Config(BlockRotationConfig):
    own_type = "OFT"  # any that is known
    block_fields = ("count", "size")
    count: int = 0
    size: int = 4

    def blocks(self, width: int) -> tuple[int, int]:
        return (self.count, width // self.count) if self.count else (width // self.size, self.size)

    def misfit(self, width: int) -> str:
        return f"{width} channels are not that many" if width % getattr(self, self.stated) else ""


class Blocks(BlockRotation):
    tensors = {"turned": Stored(shape="number size size"), "grown": Stored(shape="out")}
    starts = {"turned": 0.0, "grown": 1.0}


def site(out: int = 6, inputs: int = 8) -> Site:
    empty = torch.zeros(out, inputs)
    return Site("here", plain_geometry(out, inputs), lambda: empty, dict, dict, torch.device("cpu"), torch.float32)


def started(place: Site, **more: object) -> Blocks:
    method = Blocks(Config(**more), place)
    method.reset(torch.Generator().manual_seed(0), place)
    return method


@pytest.mark.parametrize("both", [{"count": 0, "size": 0}, {"count": 2, "size": 4}])
def test_one_of_number_and_size_is_stated(both):
    with pytest.raises(ValueError, match="OFT takes either count .* or size .* the other must be 0") as e:
        Config(**both)
    assert f"got count={both['count']}, size={both['size']}" in str(e.value)


def test_the_other_of_the_two_follows_from_the_layer():
    by_size, by_count = Config(size=2), Config(count=2, size=0)
    assert (by_size.stated, by_count.stated) == ("size", "count")
    for config, expected in ((by_size, (4, 2)), (by_count, (2, 4))):
        method = Blocks(config, site())
        assert (method.number, method.size) == expected
        assert tuple(method.turned.shape) == (expected[0], expected[1], expected[1])


def test_a_kernel_is_rotated_over_its_columns():
    place = site()
    place.geometry = Geometry(out=6, fan_in=24, inputs=8, kernel=3, shape=(3,))
    method = Blocks(Config(size=4), place)
    assert (method.number, method.size) == (6, 4) and method.rank() == 6


def test_a_layer_that_does_not_fit_is_refused_with_the_reason():
    Blocks.check(Config(size=4), site())
    with pytest.raises(Refusal, match="8 channels are not that many"):
        Blocks.check(Config(size=3), site())


def test_it_starts_as_the_identity_or_around_it():
    fresh = started(site())
    assert fresh.identity and not fresh.turned.any() and (fresh.grown == 1).all()
    place = site(out=2000)
    drawn = started(place, init_weights=False)
    assert not drawn.identity and drawn.turned.any()
    assert abs(drawn.grown.mean().item() - 1) < 5 * 0.1 / 2000**0.5
    assert abs(drawn.grown.std().item() - 0.1) < 5 * 0.1 / (2 * 2000) ** 0.5
    assert torch.equal(started(place, init_weights=False).grown, drawn.grown)  # by the generator's seed


def test_blocks_are_left_out_in_training_only():
    method, eye = started(site()), torch.eye(4)
    blocks = 2 * eye.expand(400, 4, 4)
    assert torch.equal(method.eval().with_dropout(blocks, 0.5), blocks)
    found = method.train().with_dropout(blocks, 0.5)
    left_out = (found == eye).flatten(1).all(1)
    assert (left_out | (found == blocks).flatten(1).all(1)).all()  # each one whole
    assert abs(float(left_out.float().mean()) - 0.5) < 5 * 0.5 / 400**0.5


def test_the_rank_is_that_of_a_change_of_the_whole_weight():
    assert started(site(6, 8)).rank() == 6 and started(site(20, 8)).rank() == 8
