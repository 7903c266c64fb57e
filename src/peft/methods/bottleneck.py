"""Bottleneck adapters: y ← y + s·W_up f(W_down h + b_down) + s·b_up, with W_down[b, width], W_up[out, b].

    pfeiffer   h = y, after each FFN                                  arXiv 2005.00247
    houlsby    h = y, after each attention and each FFN               arXiv 1902.00751
    parallel   h = x: beside each FFN, reading what the FFN reads     arXiv 2110.04366

y is the output of the module that the adapter hangs at, x its input. W_up and b_up start at 0, so a fresh adapter is
the identity. f is not linear, so nothing merges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import TunerConfig
from ..config_fields import one_of, require
from ..contract.method import Method
from ..contract.refusals import refusal, require_channels
from ..contract.site import Site
from ..contract.tensors import Stored
from ..errors import Refusal
from ..maths.networks import ACTIVATIONS, affine

__all__ = ["BottleneckConfig"]


@dataclass
class BottleneckConfig(TunerConfig):
    """Bottleneck adapters (arXiv 1902.00751, 2005.00247, 2110.04366).

    variant: "pfeiffer", "houlsby" or "parallel": the input of the adapter, and where it goes if `target_modules` is not
    given. bottleneck_size: b; if not given, b = width / reduction_factor. non_linearity: f. scaling: s, a number,
    "learned" (one trained number), or "gated" (a sigmoid of a trained projection of h, for each token). layer_norm:
    normalise h first. dropout: after f. init_weights: W_down from N(0, 0.02²) ("bert"), or Kaiming-uniform ("mam",
    "lora"). The parallel paper uses scaling=4, reduction_factor=2, init_weights="mam".
    """

    own_type = "BOTTLENECK"
    variant: str = "pfeiffer"
    bottleneck_size: int | None = None
    reduction_factor: float = 16.0
    non_linearity: str = "relu"
    scaling: float | str = 1.0
    layer_norm: bool = False
    dropout: float = 0.0
    init_weights: str = "bert"

    # variant -> role of the default targets
    roles: ClassVar[dict[str, str]] = {
        "pfeiffer": "mlps",
        "houlsby": "attention_and_mlps",
        "parallel": "mlp_blocks",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "variant", self.roles)
        one_of(self, "non_linearity", ACTIVATIONS)
        one_of(self, "init_weights", ("bert", "mam", "lora"))
        if isinstance(self.scaling, str):
            one_of(self, "scaling", ("learned", "gated"))
        if self.bottleneck_size is not None:
            require(self, "bottleneck_size")
        require(self, "reduction_factor", 1e-6)
        require(self, "dropout", 0, 1)

    @property
    def role(self) -> str:
        return self.roles[self.variant]

    def size(self, width: int) -> int:
        """b for inputs of `width` channels."""
        return self.bottleneck_size or max(1, int(width / self.reduction_factor))


BESIDE_THE_MATRICES = {
    "adapter_down_bias": Stored("adapter_down.bias", "size"),
    "adapter_up_bias": Stored("adapter_up.bias", "out"),
    "adapter_scaling": Stored(shape="1", when="learned"),
    "adapter_gate": Stored("adapter_gate.weight", "1 channels", when="gated"),
    "adapter_gate_bias": Stored("adapter_gate.bias", "1", when="gated"),
    "adapter_norm": Stored("adapter_norm.weight", "channels", when="config.layer_norm"),
    "adapter_norm_bias": Stored("adapter_norm.bias", "channels", when="config.layer_norm"),
}


class Bottleneck(Method):
    peft_type = "BOTTLENECK"
    config_class = BottleneckConfig
    summary = "Adds a small two-layer network with a residual after (or beside) attention and FFN."
    formula = "y ← y + s·W_up f(W_down h), h = y, or x in parallel"
    paper = "arXiv 1902.00751, 2005.00247, 2110.04366"
    prefix = "adapter_"
    tensors: ClassVar[dict[str, Stored]] = {
        "adapter_down": Stored("adapter_down.weight", "size channels"),
        "adapter_up": Stored("adapter_up.weight", "out size"),
        **BESIDE_THE_MATRICES,
    }
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"bottleneck_size": 4, "scaling": 2.0},
        {"bottleneck_size": 4, "non_linearity": "gelu", "layer_norm": True, "scaling": "learned", "dropout": 0.1},
        {"bottleneck_size": 4, "variant": "parallel", "scaling": "gated", "init_weights": "mam"},
    )

    adapter_down: Tensor
    adapter_up: Tensor
    adapter_down_bias: Tensor
    adapter_up_bias: Tensor
    adapter_scaling: Tensor | None
    adapter_gate: Tensor | None
    adapter_gate_bias: Tensor | None
    adapter_norm: Tensor | None
    adapter_norm_bias: Tensor | None

    def __init__(self, config: BottleneckConfig, site: Site) -> None:
        super().__init__(config, site)
        g = site.geometry
        self.parallel = config.variant == "parallel"
        self.channels = g.inputs if self.parallel else g.out
        self.size = config.size(self.channels)
        self.make(site)
        self.gated, self.learned = config.scaling == "gated", config.scaling == "learned"
        self.create(site)

    # -- the two matrices: what the PHM adapters state in another way -------------------------------------------------
    def make(self, site: Site) -> None:
        """Tensors that the table does not make."""

    def start(self, rng: torch.Generator) -> None:
        if self.config.init_weights == "bert":
            nn.init.normal_(self.adapter_down, std=0.02, generator=rng)
        else:
            nn.init.kaiming_uniform_(self.adapter_down, a=5**0.5, generator=rng)
        nn.init.zeros_(self.adapter_up)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """(W_down[b, width], W_up[out, b])."""
        return self.adapter_down, self.adapter_up

    # -- the method -----------------------------------------------------------------------------------------------------
    @classmethod
    def check(cls, config: Any, site: Site) -> None:
        super().check(config, site)
        require_channels(cls, site)
        if config.variant == "parallel" and site.geometry.indexed:
            raise refusal(cls, site, "its input holds indices, and W_down needs vectors to project")
        if config.variant == "parallel" and site.geometry.kernel > 1:
            reason = "its kernel gathers several positions, so no position of the input is an output's"
            raise refusal(cls, site, reason)

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        self.start(rng)
        biases = (self.adapter_down_bias, self.adapter_up_bias, self.adapter_gate_bias, self.adapter_norm_bias)
        for value, tensors in ((0, (*biases, self.adapter_gate)), (1, (self.adapter_norm, self.adapter_scaling))):
            for p in tensors:
                if p is not None:
                    p.fill_(value)

    def after(self, y: Tensor, x: Any) -> Tensor:
        h = x.to(y.dtype) if self.parallel else y
        if self.parallel and h.shape[:-1] != y.shape[:-1]:
            reason = f"{tuple(h.shape)} does not go to {tuple(y.shape)} row by row"
            raise Refusal(self.peft_type, "a parallel branch", reason)
        if self.adapter_norm is not None and self.adapter_norm_bias is not None:
            h = F.layer_norm(h, (self.channels,), self.adapter_norm.to(h.dtype), self.adapter_norm_bias.to(h.dtype))
        down, up = self.matrices()
        z = ACTIVATIONS[self.config.non_linearity](affine(h, down, self.adapter_down_bias))
        z = affine(F.dropout(z, self.config.dropout, self.training), up, self.adapter_up_bias)
        return y + self.multiplier * self.scaled(z, h)

    def scaled(self, z: Tensor, h: Tensor) -> Tensor:
        """s z."""
        if self.adapter_scaling is not None:
            return z * self.adapter_scaling.to(z.dtype)
        if self.adapter_gate is not None and self.adapter_gate_bias is not None:
            return z * torch.sigmoid(affine(h, self.adapter_gate, self.adapter_gate_bias))
        return z * self.config.scaling
