"""AdaLoRA: ΔW = s·B diag(E) A / (n + 1e-5), ranks given to the sites that need them (arXiv 2303.10512).

A[r, fan_in], B[out, r], E[r, 1] with r = n = `init_r`, s = `lora_alpha`; E starts at 0. While training, the triplets
(Aᵢ, Eᵢ, Bᵢ) of all sites are ranked by importance and the least important get Eᵢ = 0, until `target_r` per site are
left on average; files hold the kept triplets only, and n stays as it was. A and B are held near orthogonal by a term in
the loss. The training loop calls `model.update_and_allocate(step)` between backward and zero_grad.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config_fields import ranged
from ..contract.capabilities import Penalised, Scheduled
from ..contract.site import Site
from ..contract.tensors import Shown, Stored
from ..core.forms.pruned import Pruned
from .lora import LoraConfig

__all__ = ["AdaLoraConfig"]


@dataclass
class AdaLoraConfig(LoraConfig):
    """AdaLoRA (arXiv 2303.10512).

    init_r, target_r: rank of each site at the start, and on average at the end. total_step: steps of the whole
    training; the first `tinit` prune nothing, the last `tfinal` train the ranks that are left; between them the budget
    falls with the cube of the remaining share, every `deltaT` steps. beta1, beta2: averaging of the importance and of
    its uncertainty. orth_reg_weight: weight of the orthogonality term. rank_pattern: filled in by the pruning.
    """

    own_type = "ADALORA"
    r: int = 8  # not used, so anything goes
    rank_pattern: dict[str, list[bool]] | None = None  # type: ignore[assignment]
    target_r: int = ranged(8)
    init_r: int = ranged(12)
    tinit: int = ranged(0, 0)
    tfinal: int = ranged(0, 0)
    deltaT: int = ranged(1)
    beta1: float = ranged(0.85, 0, 1)
    beta2: float = ranged(0.85, 0, 1)
    orth_reg_weight: float = ranged(0.5, 0)
    total_step: int | None = None

    def __post_init__(self) -> None:
        super(LoraConfig, self).__post_init__()
        if self.total_step is None or self.total_step <= 0:
            raise ValueError("AdaLoRA does not work when `total_step` is None, supply a value > 0.")
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                f"tinit={self.tinit}, tfinal={self.tfinal} and total_step={self.total_step} leave no step in which the "
                "budget could fall: decrease `tfinal` or `tinit`, or increase `total_step`."
            )
        default = {"r": 8, "use_rslora": False, "lora_bias": False, "alpha_pattern": {}, "init_lora_weights": True}
        unused = [n for n, value in default.items() if (getattr(self, n) or value) != value]
        if unused:
            warnings.warn(f"AdaLoRA makes no use of {', '.join(unused)}; the rank is `init_r`.", stacklevel=3)


class AdaLora(Penalised, Pruned, Scheduled):
    peft_type = "ADALORA"
    config_class = AdaLoraConfig
    summary = "LoRA as a singular value decomposition whose ranks move to the layers that need them."
    formula = "W' = W + s·B diag(E) A / n"
    paper = "arXiv 2303.10512"
    prefix = "lora_"
    tensors = {
        "lora_A_weight": Stored("lora_A", shape="own_r fan_in"),
        "lora_B_weight": Stored("lora_B", shape="out own_r"),
        "lora_E_weight": Stored("lora_E", shape="own_r 1"),
    }
    shown = Shown(
        settings=("r", "lora_alpha", "scaling", "ranknum"),
        paths={"r": "own_r", "lora_alpha": "own_alpha", "scaling": "strength", "ranknum": "count"},
        assignable=("lora_alpha",),
        dropout="lora_dropout",
        layer="adalora.SVD{}",
        empty=("lora_embedding_A", "lora_embedding_B"),
    )
    role = "every_linear"
    examples = (
        {"init_r": 4, "target_r": 2, "total_step": 10},
        {"init_r": 4, "target_r": 2, "total_step": 10, "lora_dropout": 0.1, "use_dora": True},
    )
    part_axes, gates = {"lora_E_weight": 0, "lora_A_weight": 0, "lora_B_weight": 1}, "lora_E_weight"
    config: AdaLoraConfig
    lora_A_weight: Tensor
    lora_B_weight: Tensor
    lora_E_weight: Tensor
    own_alpha: float
    count: float

    def __init__(self, config: AdaLoraConfig, site: Site) -> None:
        super().__init__(config, site)
        self.set(dropout=config.lora_dropout, own_alpha=config.lora_alpha, count=float(config.init_r))
        self.keep_all(config.init_r, site)
        self.create(site)

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        std = 0.02 if self.config.init_lora_weights else 1.0
        self.lora_A_weight.normal_(std=std, generator=rng)
        self.lora_B_weight.normal_(std=std, generator=rng)
        self.lora_E_weight.normal_(generator=rng)
        if self.config.init_lora_weights:
            self.lora_E_weight.zero_()

    # -- the maths ----------------------------------------------------------------------------------------------------
    @property
    def strength(self) -> float:
        return self.multiplier * (self.own_alpha if self.own_alpha > 0 else self.count)

    def delta(self) -> tuple[Tensor, Tensor]:
        return self.lora_A_weight * self.lora_E_weight, self.strength / (self.count + 1e-5) * self.lora_B_weight

    def penalty(self) -> Tensor | None:
        """‖A Aᵀ − I‖ + ‖Bᵀ B − I‖."""
        if not self.lora_A_weight.requires_grad:
            return None
        eye = torch.eye(self.own_r, device=self.lora_A_weight.device, dtype=self.lora_A_weight.dtype)
        A, B = self.lora_A_weight, self.lora_B_weight
        return (A @ A.T - eye).norm() + (B.T @ B - eye).norm()

    @classmethod
    def total_penalty(cls, terms: list[Tensor], config: AdaLoraConfig) -> Tensor:
        """orth_reg_weight times the mean over all A and B."""
        return config.orth_reg_weight * super().total_penalty(terms, config) / (2 * len(terms))

    # -- the budget ---------------------------------------------------------------------------------------------------
    @classmethod
    def after_step(cls, methods: dict[str, AdaLora], config: AdaLoraConfig, global_step: int) -> None:
        assert config.total_step is not None
        last = config.total_step - config.tfinal
        if global_step < last:
            for m in methods.values():
                m.observe(config.beta1, config.beta2)
        due = config.tinit < global_step < last and global_step % config.deltaT == 0
        if due or global_step == last:
            have, want = sum(m.own_r for m in methods.values()), config.target_r * len(methods)
            share = 1 - (global_step - config.tinit) / (last - config.tinit)
            cls.prune(methods, have - int((have - want) * share**3 + want))
            config.rank_pattern = cls.patterns(methods)
        for m in methods.values():
            if due or global_step >= last:  # between two allocations a pruned triplet may come back
                m.mask()
            if global_step == last:
                m.importance = {}
