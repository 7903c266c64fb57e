"""AdaLoRA: ΔW = s·B diag(E) A / (n + 1e-5), ranks given to the sites that need them (arXiv 2303.10512).

A[r, fan_in], B[out, r], E[r, 1] with r = n = `init_r`, s = `lora_alpha`; E starts at 0. While training, the triplets
(Aᵢ, Eᵢ, Bᵢ) of all sites are ranked by importance and the least important get Eᵢ = 0, until `target_r` per site are
left on average; files hold the kept triplets only, and n stays as it was. A and B are held near orthogonal by a term in
the loss. The training loop calls `model.update_and_allocate(step)` between backward and zero_grad.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config_fields import require
from ..contract.capabilities import Penalised, Scheduled
from ..contract.method import Method
from ..contract.site import Site
from ..contract.tensors import Shown, Stored
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
    rank_pattern: dict[str, list[bool]] | None = None  # type: ignore[assignment]
    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None

    def __post_init__(self) -> None:
        super(LoraConfig, self).__post_init__()
        for name in ("target_r", "init_r", "deltaT"):
            require(self, name)
        for name in ("tinit", "tfinal", "orth_reg_weight"):
            require(self, name, 0)
        for name in ("lora_dropout", "beta1", "beta2"):
            require(self, name, 0, 1)
        if self.total_step is None or self.total_step <= 0:
            raise ValueError("AdaLoRA does not work when `total_step` is None, supply a value > 0.")
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                f"tinit={self.tinit}, tfinal={self.tfinal} and total_step={self.total_step} leave no step in which the "
                "budget could fall: decrease `tfinal` or `tinit`, or increase `total_step`."
            )
        default = {"r": 8, "use_rslora": False, "lora_bias": False, "alpha_pattern": {}}
        unused = [n for n, value in default.items() if (getattr(self, n) or value) != value]
        if isinstance(self.init_lora_weights, str):
            unused.append("init_lora_weights")
        if unused:
            warnings.warn(f"AdaLoRA makes no use of {', '.join(unused)}; the rank is `init_r`.", stacklevel=3)


class AdaLora(Penalised, Scheduled, Method):
    peft_type = "ADALORA"
    config_class = AdaLoraConfig
    summary = "LoRA as a singular value decomposition whose ranks move to the layers that need them."
    formula = "W' = W + s·B diag(E) A / n"
    paper = "arXiv 2303.10512"
    prefix = "lora_"
    tensors = {
        "lora_A": Stored(shape="r fan_in"),
        "lora_B": Stored(shape="out r"),
        "lora_E": Stored(shape="r 1"),
    }
    shown = Shown(
        settings=("r", "lora_alpha", "scaling", "ranknum"),
        assignable=("lora_alpha",),
        dropout="lora_dropout",
        empty=("lora_embedding_A", "lora_embedding_B"),
    )
    role = "every_linear"
    examples = (
        {"init_r": 4, "target_r": 2, "total_step": 10},
        {"init_r": 4, "target_r": 2, "total_step": 10, "lora_dropout": 0.1, "use_dora": True},
    )

    def __init__(self, config: AdaLoraConfig, site: Site) -> None:
        super().__init__(config, site)
        self.dropout = config.lora_dropout
        self.lora_alpha = config.lora_alpha
        self.ranknum = float(config.init_r)
        self.pattern = [True] * config.init_r  # which of the initial triplets are held in memory
        self.path = site.path
        self.kept: Tensor
        self.register_buffer("kept", torch.ones(config.init_r, dtype=torch.bool), persistent=False)
        self.importance: dict[str, tuple[Tensor, Tensor]] = {}  # averages of |p·∂p|, and of their deviation
        self.lora_A = site.empty(config.init_r, site.geometry.fan_in)
        self.lora_B = site.empty(site.geometry.out, config.init_r)
        self.lora_E = site.empty(config.init_r, 1)

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        std = 0.02 if self.config.init_lora_weights else 1.0
        nn.init.normal_(self.lora_A, std=std, generator=rng)
        nn.init.normal_(self.lora_B, std=std, generator=rng)
        nn.init.normal_(self.lora_E, generator=rng)
        if self.config.init_lora_weights:
            nn.init.zeros_(self.lora_E)

    # -- the maths ----------------------------------------------------------------------------------------------------
    @property
    def r(self) -> int:
        return self.lora_A.shape[0]

    @property
    def scaling(self) -> float:
        return self.multiplier * (self.lora_alpha if self.lora_alpha > 0 else self.ranknum)

    def delta(self) -> tuple[Tensor, Tensor]:
        return self.lora_A * self.lora_E, self.scaling / (self.ranknum + 1e-5) * self.lora_B

    def rank(self) -> int:
        return int(self.kept.sum())

    def penalty(self) -> Tensor | None:
        """‖A Aᵀ − I‖ + ‖Bᵀ B − I‖."""
        if not self.lora_A.requires_grad:
            return None
        eye = torch.eye(self.r, device=self.lora_A.device, dtype=self.lora_A.dtype)
        return (self.lora_A @ self.lora_A.T - eye).norm() + (self.lora_B.T @ self.lora_B - eye).norm()

    @classmethod
    def total_penalty(cls, terms: list[Tensor], config: AdaLoraConfig) -> Tensor:
        """orth_reg_weight times the mean over all A and B."""
        return config.orth_reg_weight * super().total_penalty(terms, config) / (2 * len(terms))

    # -- the budget ---------------------------------------------------------------------------------------------------
    @classmethod
    def after_step(cls, methods: dict[str, AdaLora], config: AdaLoraConfig, global_step: int) -> None:  # type: ignore[override]
        last = config.total_step - config.tfinal
        if global_step < last:
            for m in methods.values():
                m.observe()
        due = config.tinit < global_step < last and global_step % config.deltaT == 0
        if due or global_step == last:
            have, want = sum(m.r for m in methods.values()), config.target_r * len(methods)
            share = 1 - (global_step - config.tinit) / (last - config.tinit)
            cls.prune(methods, have - int((have - want) * share**3 + want))
            config.rank_pattern = {f"{disk_path}.lora_E": m.full_pattern() for disk_path, m in methods.items()}
        for m in methods.values():
            if due or global_step >= last:  # between two allocations a pruned triplet may come back
                m.mask()
            if global_step == last:
                m.importance = {}

    @torch.no_grad()
    def observe(self) -> None:
        """Average this step's sensitivity |p·∂p| of every entry, and how much it deviates."""
        beta1, beta2 = self.config.beta1, self.config.beta2
        for name, p in self.named_parameters():
            if p.grad is None:
                raise RuntimeError(
                    f"update_and_allocate found no gradient at {self.path}.{name}: call it after backward and before "
                    "zero_grad."
                )
            now = (p * p.grad).abs()
            mean, deviation = self.importance.get(name, (torch.zeros_like(p), torch.zeros_like(p)))
            mean = beta1 * mean.to(now) + (1 - beta1) * now
            self.importance[name] = mean, beta2 * deviation.to(now) + (1 - beta2) * (now - mean).abs()

    def scores(self) -> Tensor:
        """One number per triplet: E's score, and the means of A's row and B's column."""
        A, B, E = (torch.mul(*self.importance[n]) for n in ("lora_A", "lora_B", "lora_E"))
        return E[:, 0] + A.mean(1) + B.mean(0)

    @classmethod
    def prune(cls, methods: dict[str, AdaLora], excess: int) -> None:
        """Keep all but the `excess` least important triplets of all sites."""
        if excess < 1:
            return
        scores = {disk_path: m.scores().float().cpu() for disk_path, m in methods.items()}
        threshold = torch.cat(list(scores.values())).kthvalue(excess).values
        for disk_path, m in methods.items():
            m.kept = (scores[disk_path] > threshold).to(m.kept.device)

    @torch.no_grad()
    def mask(self) -> None:
        self.lora_E[~self.kept] = 0.0

    def full_pattern(self) -> list[bool]:
        """`kept` in terms of the initial triplets, of which earlier pruning may have dropped some."""
        left = iter(self.kept.tolist())
        return [held and next(left) for held in self.pattern]

    # -- on disk ------------------------------------------------------------------------------------------------------
    def stored(self, attr: str, tensor: Tensor) -> Tensor:
        return tensor[:, self.kept] if attr == "lora_B" else tensor[self.kept]

    def resize(self, state: dict[str, Tensor]) -> None:
        """Take over the ranks that a file's pruning left."""
        A = state.get("lora_A")
        if A is None or A.shape[0] == self.r or A.shape[0] > len(self.pattern):
            return
        r = A.shape[0]
        known: dict[str, Any] = self.config.rank_pattern or {}
        found = next((p for k, p in known.items() if k.startswith(f"{self.path}.lora_E") and sum(p) == r), None)
        self.pattern = [bool(x) for x in found] if found else [True] * r
        self.kept = torch.ones(r, dtype=torch.bool, device=self.kept.device)
        for name, shape in (
            ("lora_A", (r, self.geometry.fan_in)),
            ("lora_B", (self.geometry.out, r)),
            ("lora_E", (r, 1)),
        ):
            old = getattr(self, name)
            setattr(self, name, nn.Parameter(old.new_empty(shape), requires_grad=old.requires_grad))
