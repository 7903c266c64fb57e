"""Bottleneck adapters: y ← y + s·W_up f(W_down h + b_down) + s·b_up, with W_down[b, width], W_up[out, b].

    pfeiffer   h = y, after each FFN                                  arXiv 2005.00247
    houlsby    h = y, after each attention and each FFN               arXiv 1902.00751
    parallel   h = x: beside each FFN, reading what the FFN reads     arXiv 2110.04366

y is the output of the module that the adapter hangs at, x its input. W_up and b_up start at 0, so a fresh adapter is
the identity. f is not linear, so nothing merges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config_fields import among, ranged
from ..contract.site import Site
from ..contract.tensors import Stored
from ..core.forms.branch import Branch, BranchConfig
from ..maths.networks import ACTIVATIONS, affine

__all__ = ["BottleneckConfig"]


@dataclass
class BottleneckConfig(BranchConfig):
    """Bottleneck adapters (arXiv 1902.00751, 2005.00247, 2110.04366).

    variant: "pfeiffer", "houlsby" or "parallel": the input of the adapter, and where it goes if `target_modules` is not
    given. bottleneck_size: b; if not given, b = width / reduction_factor. non_linearity: f. scaling: s, a number,
    "learned" (one trained number), or "gated" (a sigmoid of a trained projection of h, for each token). layer_norm:
    normalise h first. dropout: after f. init_weights: W_down from N(0, 0.02²) ("bert"), or Kaiming-uniform ("mam",
    "lora"). The parallel paper uses scaling=4, reduction_factor=2, init_weights="mam".
    """

    # variant -> role of the default targets
    roles: ClassVar[dict[str, str]] = {"pfeiffer": "mlps", "houlsby": "attention_and_mlps", "parallel": "mlp_blocks"}

    own_type = "BOTTLENECK"
    variant: str = among("pfeiffer", roles)
    bottleneck_size: int | None = ranged(None)
    reduction_factor: float = ranged(16.0, 1e-6)
    non_linearity: str = among("relu", ACTIVATIONS)
    layer_norm: bool = False
    dropout: float = ranged(0.0, 0, 1)
    init_weights: str = among("bert", ("bert", "mam", "lora"))

    @property
    def role(self) -> str:
        return self.roles[self.variant]

    @property
    def parallel(self) -> bool:
        return self.variant == "parallel"

    def size(self, width: int) -> int:
        """b for inputs of `width` channels."""
        return self.bottleneck_size or max(1, int(width / self.reduction_factor))


BESIDE_THE_MATRICES = {
    "adapter_down_bias": Stored("adapter_down.bias", "size"),
    "adapter_up_bias": Stored("adapter_up.bias", "out"),
    "adapter_scaling_weight": Stored("adapter_scaling", shape="1", when="learned"),
    "adapter_gate_weight": Stored("adapter_gate.weight", "1 channels", when="gated"),
    "adapter_gate_bias": Stored("adapter_gate.bias", "1", when="gated"),
    "adapter_norm_weight": Stored("adapter_norm.weight", "channels", when="config.layer_norm"),
    "adapter_norm_bias": Stored("adapter_norm.bias", "channels", when="config.layer_norm"),
}
START_AT_ONE = ("adapter_scaling_weight", "adapter_norm_weight")  # the others at 0


class Bottleneck(Branch):
    peft_type = "BOTTLENECK"
    config_class = BottleneckConfig
    summary = "Adds a small two-layer network with a residual after (or beside) attention and FFN."
    formula = "y ← y + s·W_up f(W_down h), h = y, or x in parallel"
    paper = "arXiv 1902.00751, 2005.00247, 2110.04366"
    prefix = "adapter_"
    tensors = {
        "adapter_down_weight": Stored("adapter_down.weight", "size channels"),
        "adapter_up_weight": Stored("adapter_up.weight", "out size"),
        **BESIDE_THE_MATRICES,
    }
    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"bottleneck_size": 4, "scaling": 2.0},
        {"bottleneck_size": 4, "non_linearity": "gelu", "layer_norm": True, "scaling": "learned", "dropout": 0.1},
        {"bottleneck_size": 4, "variant": "parallel", "scaling": "gated", "init_weights": "mam"},
    )

    learned_name, gate_names = "adapter_scaling_weight", ("adapter_gate_weight", "adapter_gate_bias")

    def __init__(self, config: BottleneckConfig, site: Site) -> None:
        super().__init__(config, site)
        self.size = config.size(self.channels)
        self.create(site, site.shared)

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        self.start(rng)
        for name in BESIDE_THE_MATRICES:
            if name in self._parameters:
                self.tensor(name).fill_(name in START_AT_ONE)

    def start(self, rng: torch.Generator) -> None:
        """Draw the two matrices."""
        down, up = self.matrices()
        if self.config.init_weights == "bert":
            nn.init.normal_(down, std=0.02, generator=rng)
        else:
            nn.init.kaiming_uniform_(down, a=5**0.5, generator=rng)
        nn.init.zeros_(up)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """(W_down[b, width], W_up[out, b]); the PHM adapters have others, and their own `start`."""
        return self.tensor("adapter_down_weight"), self.tensor("adapter_up_weight")

    def normalised(self, h: Tensor) -> Tensor:
        if not self.config.layer_norm:
            return h
        W, b = (self.tensor(n).to(h.dtype) for n in ("adapter_norm_weight", "adapter_norm_bias"))
        return F.layer_norm(h, (self.channels,), W, b)

    def branch(self, h: Tensor) -> Tensor:
        down, up = self.matrices()
        z = ACTIVATIONS[self.config.non_linearity](affine(h, down, self.tensor("adapter_down_bias")))
        z = F.dropout(z, self.config.dropout, self.training)
        return affine(z, up, self.tensor("adapter_up_bias"))
