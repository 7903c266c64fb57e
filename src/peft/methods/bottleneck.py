"""Bottleneck adapters: y ← y + s·W_up f(W_down h + b_down) + s·b_up, with W_down[b, width], W_up[out, b].

    pfeiffer   h = y, after each FFN                                  arXiv 2005.00247
    houlsby    h = y, after each attention and each FFN               arXiv 1902.00751
    parallel   h = x: beside each FFN, reading what the FFN reads     arXiv 2110.04366

y is the output of the module that the adapter hangs at, x its input. W_up and b_up start at 0, so a fresh adapter is
the identity. f is not linear, so nothing merges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import TunerConfig, require
from ..contract.method import Method
from ..contract.site import Site
from ..core.anatomy.language import model_type
from ..core.anatomy.roles import default_targets
from ..errors import Refusal

__all__ = ["BottleneckConfig"]

NON_LINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda h: F.gelu(h, approximate="tanh"),
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "leaky_relu": F.leaky_relu,
    "linear": lambda h: h,
}
STARTS = ("bert", "mam", "lora")


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
        one_of(self, "non_linearity", NON_LINEARITIES)
        one_of(self, "init_weights", STARTS)
        if isinstance(self.scaling, str):
            one_of(self, "scaling", ("learned", "gated"))
        if self.bottleneck_size is not None:
            require(self, "bottleneck_size")
        require(self, "reduction_factor", 1e-6)
        require(self, "dropout", 0, 1)

    def size(self, width: int) -> int:
        """b for inputs of `width` channels."""
        return self.bottleneck_size or max(1, int(width / self.reduction_factor))


def one_of(config: Any, name: str, allowed: Any) -> None:
    value = getattr(config, name)
    if value not in allowed:
        raise ValueError(f"`{name}` should be one of {', '.join(map(repr, allowed))} but the value passed is {value!r}")


class Bottleneck(Method):
    peft_type = "BOTTLENECK"
    config_class = BottleneckConfig
    summary = "Adds a small two-layer network with a residual after (or beside) attention and FFN."
    formula = "y ← y + s·W_up f(W_down h), h = y, or x in parallel"
    paper = "arXiv 1902.00751, 2005.00247, 2110.04366"
    prefix = "adapter_"
    keys = {
        "adapter_down": "adapter_down.weight",
        "adapter_up": "adapter_up.weight",
        "adapter_down_bias": "adapter_down.bias",
        "adapter_up_bias": "adapter_up.bias",
        "adapter_scaling": "adapter_scaling",
        "adapter_gate": "adapter_gate.weight",
        "adapter_gate_bias": "adapter_gate.bias",
        "adapter_norm": "adapter_norm.weight",
        "adapter_norm_bias": "adapter_norm.bias",
    }
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"bottleneck_size": 4, "scaling": 2.0},
        {"bottleneck_size": 4, "non_linearity": "gelu", "layer_norm": True, "scaling": "learned", "dropout": 0.1},
        {"bottleneck_size": 4, "variant": "parallel", "scaling": "gated", "init_weights": "mam"},
    )

    def __init__(self, config: BottleneckConfig, site: Site) -> None:
        super().__init__(config, site)
        g = site.geometry
        self.parallel = config.variant == "parallel"
        self.width = g.inputs if self.parallel else g.out
        self.size = config.size(self.width)
        self.make(site)
        self.adapter_down_bias, self.adapter_up_bias = site.empty(self.size), site.empty(g.out)
        gated, learned = config.scaling == "gated", config.scaling == "learned"
        self.adapter_scaling = site.empty(1) if learned else None
        self.adapter_gate = site.empty(1, self.width) if gated else None
        self.adapter_gate_bias = site.empty(1) if gated else None
        self.adapter_norm = site.empty(self.width) if config.layer_norm else None
        self.adapter_norm_bias = site.empty(self.width) if config.layer_norm else None

    # -- the two matrices: what the PHM adapters state in another way -------------------------------------------------
    def make(self, site: Site) -> None:
        self.adapter_down, self.adapter_up = site.empty(self.size, self.width), site.empty(site.geometry.out, self.size)

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
    def prepare(cls, config: BottleneckConfig, model: nn.Module) -> None:
        if config.target_modules is None and not config.target_parameters:
            config.target_modules = default_targets(config.roles[config.variant], model_type(model), cls.peft_type)

    @classmethod
    def check(cls, config: Any, site: Site) -> None:
        super().check(config, site)
        g, where = site.geometry, f"{site.path} ({site.layer})"
        if g.out == 0:
            raise Refusal(cls.peft_type, where, "the number of channels of its output cannot be told from the module")
        if config.variant == "parallel" and g.indexed:
            raise Refusal(cls.peft_type, where, "its input holds indices, and W_down needs vectors to project")
        if config.variant == "parallel" and g.kernel > 1:
            raise Refusal(
                cls.peft_type, where, "its kernel gathers several positions, so no position of the input is an output's"
            )

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        self.start(rng)
        for p in (self.adapter_down_bias, self.adapter_up_bias, self.adapter_gate, self.adapter_gate_bias):
            if p is not None:
                p.zero_()
        if self.adapter_norm is not None and self.adapter_norm_bias is not None:
            self.adapter_norm.fill_(1)
            self.adapter_norm_bias.zero_()
        if self.adapter_scaling is not None:
            self.adapter_scaling.fill_(1)

    def after(self, y: Tensor, x: Any) -> Tensor:
        def to(p: Tensor | None) -> Tensor | None:
            return None if p is None else p.to(y.dtype)

        h = x.to(y.dtype) if self.parallel else y
        if self.parallel and h.shape[:-1] != y.shape[:-1]:
            raise Refusal(
                self.peft_type, "a parallel branch", f"{tuple(h.shape)} does not go to {tuple(y.shape)} row by row"
            )
        if self.adapter_norm is not None:
            h = F.layer_norm(h, (self.width,), to(self.adapter_norm), to(self.adapter_norm_bias))
        down, up = self.matrices()
        z = NON_LINEARITIES[self.config.non_linearity](F.linear(h, down.to(y.dtype), to(self.adapter_down_bias)))
        z = F.linear(F.dropout(z, self.config.dropout, self.training), up.to(y.dtype), to(self.adapter_up_bias))
        return y + self.multiplier * self.scaled(z, h)

    def scaled(self, z: Tensor, h: Tensor) -> Tensor:
        """s z."""
        if self.adapter_scaling is not None:
            return z * self.adapter_scaling.to(z.dtype)
        if self.adapter_gate is not None and self.adapter_gate_bias is not None:
            return z * torch.sigmoid(F.linear(h, self.adapter_gate.to(z.dtype), self.adapter_gate_bias.to(z.dtype)))
        return z * self.config.scaling
