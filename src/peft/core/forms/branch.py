"""A branch at a module: y ← y + s·z(h), where h is the module's output y, or in parallel its input x.

s is a number, one trained number ("learned"), or a sigmoid of a trained projection of h, for each token ("gated").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...config import TunerConfig
from ...contract.method import Method
from ...contract.refusals import refusal, require_channels
from ...contract.site import Site
from ...errors import Refusal
from ...maths.networks import affine


@dataclass
class BranchConfig(TunerConfig):
    """scaling: s, a number, "learned" or "gated"."""

    scaling: float | Literal["learned", "gated"] = 1.0

    @property
    def parallel(self) -> bool:
        """Whether h is the module's input."""
        return False


class Branch(Method):
    """A subclass states z as `branch(h)`, and in its table the tensors that a trained s takes.

    The table asks `learned` and `gated` whether they are made, and `channels` for the size of h.
    """

    learned_name: ClassVar[str]  # the attribute of the one number [1]
    gate_names: ClassVar[tuple[str, str]]  # of the projection [1, channels] and its bias [1]
    channels: int  # of h

    def __init__(self, config: BranchConfig, site: Site) -> None:
        super().__init__(config, site)
        self.parallel = config.parallel
        self.channels = site.geometry.inputs if self.parallel else site.geometry.out
        self.gated, self.learned = config.scaling == "gated", config.scaling == "learned"

    @classmethod
    def check(cls, config: Any, site: Site) -> None:
        super().check(config, site)
        require_channels(cls, site)
        if config.parallel and site.geometry.indexed:
            raise refusal(cls, site, "its input holds indices, and W_down needs vectors to project")
        if config.parallel and site.geometry.kernel > 1:
            reason = "its kernel gathers several positions, so no position of the input is an output's"
            raise refusal(cls, site, reason)

    def branch(self, h: Tensor) -> Tensor:
        """z[..., out] for h[..., channels]."""
        raise NotImplementedError(f"{type(self).__name__}.branch")

    def after(self, y: Tensor, x: Tensor) -> Tensor:
        h = x.to(y.dtype) if self.parallel else y
        if self.parallel and h.shape[:-1] != y.shape[:-1]:
            reason = f"{tuple(h.shape)} does not go to {tuple(y.shape)} row by row"
            raise Refusal(self.peft_type, "a parallel branch", reason)
        h = self.normalised(h)
        return y + self.multiplier * (self.branch(h) * self.strength(h))

    def normalised(self, h: Tensor) -> Tensor:
        """What takes the place of h in z and s."""
        return h

    def strength(self, h: Tensor) -> Tensor | float:
        """s, or s[..., 1] for h[..., channels]."""
        if self.learned:
            return self.tensor(self.learned_name).to(h.dtype)
        if self.gated:
            W, b = map(self.tensor, self.gate_names)
            return torch.sigmoid(affine(h, W, b))
        return float(self.config.scaling)
