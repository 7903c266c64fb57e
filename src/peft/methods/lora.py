"""LoRA: ΔW = s·B A with A[r, fan_in], B[out, r] and s = α/r, or α/√r with rsLoRA (arXiv 2106.09685, 2312.03732).

B starts at 0, so a fresh adapter is the identity. PiSSA and OLoRA start from factors of W instead; W itself is never
changed: the layer subtracts the frozen initial product, ΔW = s(B A − B₀ A₀).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import DeltaConfig, require_ranks
from ..config_fields import require, unavailable
from ..contract.site import Site
from ..contract.tensors import Shown, Stored
from ..core.anatomy.patterns import for_path, to_patterns, with_value
from ..core.forms.low_rank import LowRank
from ..errors import Refusal
from ..inits import find as find_init

__all__ = ["LoraConfig", "LoraRuntimeConfig"]


@dataclass
class LoraRuntimeConfig:
    """Settings that are not saved. ephemeral_gpu_offload: accepted; base weights are aligned on reading anyway."""

    ephemeral_gpu_offload: bool = False


@dataclass
class LoraConfig(DeltaConfig):
    """LoRA (arXiv 2106.09685).

    r: rank. lora_alpha: strength, s = lora_alpha / r (use_rslora: / √r). lora_dropout: on the input of A.
    rank_pattern, alpha_pattern: name or regex -> value, overriding r and lora_alpha. init_lora_weights: True (A
    Kaiming-uniform, B 0), False (both random), "gaussian", "orthogonal", "pissa", "pissa_niter_N", "olora".
    lora_bias: a trainable bias added after B. use_dora: DoRA over this delta (arXiv 2402.09353). ensure_weight_tying: the
    other ends of a targeted tied weight share its delta.
    """

    own_type = "LORA"
    r: int = 8
    lora_alpha: int = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False  # the layer kind knows its layout; kept for checkpoints
    use_rslora: bool = False
    init_lora_weights: bool | str | Literal["gaussian", "orthogonal", "pissa", "olora"] = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    use_dora: bool = False
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    lora_bias: bool = False
    megatron_config: dict[str, Any] | None = unavailable()
    megatron_core: str | None = "megatron.core"
    loftq_config: Any = unavailable({})
    eva_config: Any = unavailable()
    corda_config: Any = unavailable()
    lora_ga_config: Any = unavailable()
    velora_config: Any = unavailable()
    alora_invocation_tokens: list[int] | None = unavailable()
    use_qalora: bool = unavailable(False)
    qalora_group_size: int = 16
    monteclora_config: Any = unavailable()
    layer_replication: list[tuple[int, int]] | None = unavailable()
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig, metadata={"transient": True})
    use_bdlora: Any = unavailable()
    arrow_config: Any = unavailable()
    kasa_config: Any = unavailable()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "r")
        require(self, "lora_dropout", 0, 1)
        find_init(self.init_lora_weights)
        require_ranks(self)


class Lora(LowRank):
    peft_type = "LORA"
    config_class = LoraConfig
    summary = "Adds a trainable product of two thin matrices to frozen weights."
    formula = "W' = W + (α/r)·B A"
    paper = "arXiv 2106.09685"
    prefix = "lora_"
    pair_names = ("lora_A", "lora_B")
    tensors = {
        "lora_A": Stored(
            *("lora_A.weight", "r fan_in"),
            kernel="r -1 taps",
            indexed="lora_embedding_A",
            join="rows",
            stack=(0, 0),  # A[E·r, in]
            turned="lora_B",  # ΔWᵀ = Aᵀ Bᵀ
        ),
        "lora_B": Stored(
            *("lora_B.weight", "out r"),
            kernel="-1 r ones",
            indexed="lora_embedding_B",
            join="blocks",
            stack=(2, 1),  # B[out, r·E]
            turned="lora_A",
        ),
        "lora_bias": Stored("lora_B.bias", "out", when="config.lora_bias"),
    }
    shown = Shown(
        settings=("r", "lora_alpha", "scaling", "use_dora", "use_rslora", "lora_bias"),
        paths={"use_dora": "config.use_dora", "lora_bias": "config.lora_bias"},
        assignable=("lora_alpha",),
        dropout="lora_dropout",
        empty=("lora_magnitude_vector",),
    )
    examples = (
        {"r": 4, "lora_alpha": 8},
        {"r": 4, "use_rslora": True, "lora_bias": True, "init_lora_weights": "orthogonal"},
        {"r": 4, "use_dora": True},
        {"r": 4, "init_lora_weights": "pissa"},
        {"r": 4, "init_lora_weights": "olora", "lora_dropout": 0.1},
    )
    lora_A: Tensor
    lora_B: Tensor
    lora_bias: Tensor | None
    r: int
    lora_alpha: float
    use_rslora: bool
    first_A: Tensor | None
    first_B: Tensor | None

    def __init__(self, config: LoraConfig, site: Site) -> None:
        super().__init__(config, site)
        named = site.tied if config.ensure_weight_tying and site.tied else site.path
        alpha = for_path(config.alpha_pattern, named, config.lora_alpha)
        self.set(r=self.rank_at(config, named), lora_alpha=alpha, use_rslora=config.use_rslora)
        self.set(dropout=config.lora_dropout)
        self._buffers.update(first_A=None, first_B=None)  # PiSSA, OLoRA: the initial factors, subtracted; not saved
        self.create(site)

    @classmethod
    def rank_at(cls, config: LoraConfig, path: str) -> int:
        return for_path(config.rank_pattern, path, config.r)

    @property
    def scaling(self) -> float:
        """s, times what set_scale and scale_layer asked for."""
        return self.multiplier * self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def derives(self) -> bool:
        return find_init(self.config.init_lora_weights)[2]

    def derive(self, rng: torch.Generator, site: Site) -> None:
        start, argument, _ = find_init(self.config.init_lora_weights)
        if self.follows:
            why = f"ensure_weight_tying shares a pair with {site.tied}, but this start decomposes each end's own weight"
            raise Refusal(self.peft_type, f"{site.path} ({site.layer})", why)
        first = start(self.lora_A, self.lora_B, rng, site, self.scaling, argument)
        for name, value in zip(("first_A", "first_B"), first, strict=True):
            self.register_buffer(name, value.to(site.device, site.dtype), persistent=False)

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        if self.first_A is not None:
            self.lora_A.copy_(self.first_A)
            self.lora_B.copy_(self.first_B)
        elif not self.follows:
            start, _, _ = find_init(self.config.init_lora_weights)
            start(self.lora_A, self.lora_B, rng, site)
        if self.lora_bias is not None:
            self.lora_bias.zero_()

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) with ΔW = s·B A."""
        A, B = self.tensor("lora_A"), self.tensor("lora_B")
        if self.turned:
            return B.T, A.T
        first_A, first_B = self._buffers["first_A"], self._buffers["first_B"]
        if first_A is None or first_B is None:
            return A, B
        return torch.cat([A, first_A]), torch.cat([B, -first_B], 1)

    def delta(self) -> tuple[Tensor, Tensor]:
        A, B = self.factors()
        return A, self.scaling * B

    def bias_change(self) -> Tensor | None:
        return None if self.lora_bias is None else self.scaling * self.lora_bias

    def two_factors(self) -> tuple[Tensor, Tensor, float]:
        return (*self.factors(), self.scaling)

    @classmethod
    def config_for_ranks(cls, config: LoraConfig, ranks: dict[str, int]) -> LoraConfig:
        r, pattern = to_patterns(ranks)
        plain: dict[str, Any] = {"use_rslora": False, "init_lora_weights": True}
        return replace(config, r=r, lora_alpha=r, rank_pattern=pattern, alpha_pattern=dict(pattern), **plain)

    @classmethod
    def join(cls, config: LoraConfig, path: str, former: list[str]) -> None:
        ranks = [for_path(config.rank_pattern, p, config.r) for p in former]
        alphas = [for_path(config.alpha_pattern, p, config.lora_alpha) for p in former]
        if len({a / (math.sqrt(r) if config.use_rslora else r) for a, r in zip(alphas, ranks, strict=True)}) > 1:
            raise ValueError(f"{path} holds {', '.join(former)} at one strength, but alpha/r differs for them.")
        r = sum(ranks)
        alpha = alphas[0] * math.sqrt(r / ranks[0]) if config.use_rslora and len(former) > 1 else sum(alphas)
        config.rank_pattern = with_value(config.rank_pattern, path, config.r, r)
        config.alpha_pattern = with_value(config.alpha_pattern, path, config.lora_alpha, alpha)

    @torch.no_grad()
    def set_factors(self, A: Tensor, B: Tensor, bias: Tensor | None) -> None:
        if not self.follows:
            self.lora_A.copy_(A)
            self.lora_B.copy_(B)
        if self.lora_bias is not None:
            self.lora_bias.zero_() if bias is None else self.lora_bias.copy_(bias)

    def rank(self) -> int:
        return min(self.r * (1 if self.first_A is None else 2), self.geometry.out, self.geometry.fan_in)
