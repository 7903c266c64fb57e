"""What methods share that rotate channels in blocks: number · size = width, the identity at the start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...config import LayoutConfig
from ...contract.method import Method
from ...contract.refusals import refusal
from ...contract.site import Site
from ...maths.rotations import leave_out


@dataclass
class BlockRotationConfig(LayoutConfig):
    """Two fields, `block_fields`, stand for the number of the blocks and for their size: one of the two is 0."""

    block_fields: ClassVar[tuple[str, str]]
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        number, size = self.block_fields
        n, b = getattr(self, number), getattr(self, size)
        if (n == 0) == (b == 0):
            raise ValueError(
                f"{self.own_type} takes either {number} (number of blocks) or {size} (their size), the other must be 0, "
                f"because their product is the layer's width; got {number}={n}, {size}={b}."
            )

    @property
    def stated(self) -> str:
        """The field that is not 0."""
        number, size = self.block_fields
        return size if getattr(self, size) else number

    def blocks(self, width: int) -> tuple[int, int]:
        """(number, size) of the blocks of a layer that can be rotated."""
        raise NotImplementedError(f"{type(self).__name__}.blocks")

    def misfit(self, width: int) -> str:
        """Why a layer of this width cannot be rotated, "" if it can."""
        raise NotImplementedError(f"{type(self).__name__}.misfit")


class BlockRotation(Method):
    """`number` blocks of the size `size` at a site."""

    number: int
    size: int
    starts: ClassVar[Mapping[str, float]]  # the tensors, and the value at which each changes nothing
    config: BlockRotationConfig

    def __init__(self, config: BlockRotationConfig, site: Site) -> None:
        super().__init__(config, site)
        self.number, self.size = config.blocks(site.geometry.width)
        self.create(site)
        self.identity = config.init_weights

    @classmethod
    def check(cls, config: BlockRotationConfig, site: Site) -> None:
        super().check(config, site)
        if reason := config.misfit(site.geometry.width):
            raise refusal(cls, site, reason)

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        """The identity, or normal with σ = 0.1 around it where `init_weights` is False."""
        for name, value in self.starts.items():
            tensor = self.get_parameter(name)
            tensor.fill_(value) if self.config.init_weights else tensor.normal_(value, 0.1, generator=rng)

    def with_dropout(self, blocks: Tensor, share: float) -> Tensor:
        """blocks[…, k, b, b], in training with a share of them left out."""
        return leave_out(blocks, share) if self.training else blocks

    def rank(self) -> int:
        return min(self.geometry.out, self.geometry.width)
