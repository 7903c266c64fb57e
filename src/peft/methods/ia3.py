"""(IA)³: y' = l ⊙ y, or for feed-forward modules y = W (l ⊙ x), with a trained vector l = 1 at the start
(arXiv 2205.05638).

The output form scales the bias, too: W' = diag(l) W, b' = l ⊙ b. The input form is W' = W diag(l).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import LayoutConfig, as_bias
from ..config_fields import own_field, reading
from ..config_values import AtLeast0
from ..contract.capabilities import Blends, ScalesChannels
from ..contract.method import Method
from ..contract.refusals import refusal
from ..contract.site import Site
from ..contract.tensors import Shown, Stored
from ..core.anatomy.language import model_type
from ..core.anatomy.patterns import matches
from ..core.anatomy.roles import default_targets, fill_targets

__all__ = ["IA3Config"]


@dataclass
class IA3Config(LayoutConfig):
    """(IA)³ (arXiv 2205.05638).

    feedforward_modules: names or a regex of the targets whose input is scaled instead of the output, among
    target_modules; [] for none. init_ia3_weights: False starts from random vectors.
    """

    own_type = "IA3"
    sets = (*LayoutConfig.sets, "feedforward_modules")
    feedforward_modules: list[str] | str | None = None
    init_ia3_weights: bool = True
    bias: str = reading(as_bias, "none", own=True)
    layers_to_transform: list[AtLeast0] | AtLeast0 | None = own_field(None)
    layers_pattern: list[str] | str | None = own_field(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        names, targets = self.feedforward_modules, self.target_modules
        if names and targets and not isinstance(names, str) and not isinstance(targets, str):
            if strange := sorted(set(names) - set(targets)):
                raise ValueError(f"`feedforward_modules` should be a subset of `target_modules`; {strange} are not.")

    def scales_input(self, path: str) -> bool:
        names = self.feedforward_modules or []
        return matches(names, path, "feedforward_modules") if isinstance(names, str) else path.endswith(tuple(names))


class IA3(Blends, ScalesChannels, Method):
    peft_type = "IA3"
    config_class = IA3Config
    form = "after"  # `before` at feed-forward sites
    summary = "Scales keys, values and feed-forward activations by trained vectors."
    formula = "y' = l ⊙ y (feed-forward: y = W (l ⊙ x))"
    paper = "arXiv 2205.05638"
    prefix = "ia3_"
    shown = Shown(layer="{}")
    tensors = {"ia3_l_weight": Stored("ia3_l")}
    role = "keys_values_ffn"
    examples = ({"feedforward_modules": []}, {"feedforward_modules": ".*"})

    config: IA3Config
    ia3_l_weight: Tensor

    def __init__(self, config: IA3Config, site: Site) -> None:
        super().__init__(config, site)
        g = site.geometry
        self.is_feedforward = config.scales_input(site.path)
        self.form = "before" if self.is_feedforward else "after"
        size = g.inputs if self.is_feedforward else g.out
        row = self.is_feedforward or g.shape
        self.ia3_l_weight = site.empty(*((1, size) if row else (size, 1)), *(1 for _ in g.shape))
        self.identity = config.init_ia3_weights

    @classmethod
    def prepare(cls, config: IA3Config, model: nn.Module) -> None:
        fill_targets(config, cls.role, model_type(model), cls.peft_type)
        if config.feedforward_modules is None:
            asked = "`feedforward_modules` in `peft_config` ([] for none)"
            config.feedforward_modules = default_targets("ffn", model_type(model), cls.peft_type, asked)

    @classmethod
    def check(cls, config: IA3Config, site: Site) -> None:
        super().check(config, site)
        if config.scales_input(site.path) and site.geometry.weightless:
            reason = (
                "the width of this module's input is not known, so it cannot be scaled; scale its output instead by "
                "leaving it out of feedforward_modules"
            )
            raise refusal(cls, site, reason)

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        self.ia3_l_weight.fill_(1) if self.config.init_ia3_weights else self.ia3_l_weight.normal_(generator=rng)

    def before(self, x: Tensor) -> Tensor:
        return (x * self.ia3_l_weight.flatten()).to(x.dtype)

    def after(self, y: Tensor, x: object) -> Tensor:
        return (y * self.ia3_l_weight.flatten()).to(y.dtype)

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale = self.ia3_l_weight.flatten().to(W.dtype)
        if self.is_feedforward:
            return W * self.geometry.spread(scale), b
        return W * scale[:, None], None if b is None else b * scale

    def blend(self, methods: Sequence[Method], weights: Sequence[float]) -> dict[str, Tensor]:
        """Σ wᵢ lᵢ: the effect is linear in l."""
        return {
            "ia3_l_weight": torch.stack([w * m.get_parameter("ia3_l_weight") for m, w in zip(methods, weights)]).sum(0)
        }

    def rank(self) -> int | None:
        return None if self.geometry.weightless else min(self.geometry.out, self.geometry.fan_in)
