"""LoRA: ΔW = s·B A with A[r, fan_in], B[out, r] and s = α/r, or α/√r with rsLoRA (arXiv 2106.09685, 2312.03732).

B starts at 0, so a fresh adapter is the identity. PiSSA and OLoRA start from factors of W instead; W itself is never
changed: the layer subtracts the frozen initial product, ΔW = s(B A − B₀ A₀).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from ..config import DeltaConfig
from ..config_fields import ranged, unavailable
from ..config_values import AtLeast1
from ..contract.site import Site
from ..contract.tensors import Shown, Stored
from ..core.anatomy.patterns import for_path
from ..core.forms.low_rank import LowRank, Start
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
    r: int = ranged(8)
    lora_alpha: float = 8
    lora_dropout: float = ranged(0.0, 0, 1)
    fan_in_fan_out: bool = False  # the layer kind knows its layout; kept for checkpoints
    use_rslora: bool = False
    init_lora_weights: bool | str | Literal["gaussian", "orthogonal", "pissa", "olora"] = True
    rank_pattern: dict[str, AtLeast1] | None = field(default_factory=dict)
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)
    use_dora: bool = False
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    lora_bias: bool = False
    megatron_config: dict[str, object] | None = unavailable()
    megatron_core: str | None = "megatron.core"
    loftq_config: object = unavailable({})
    eva_config: object = unavailable()
    corda_config: object = unavailable()
    lora_ga_config: object = unavailable()
    velora_config: object = unavailable()
    alora_invocation_tokens: list[int] | None = unavailable()
    use_qalora: bool = unavailable(False)
    qalora_group_size: int = 16
    monteclora_config: object = unavailable()
    layer_replication: list[tuple[int, int]] | None = unavailable()
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig, metadata={"transient": True})
    use_bdlora: object = unavailable()
    arrow_config: object = unavailable()
    kasa_config: object = unavailable()

    def __post_init__(self) -> None:
        super().__post_init__()
        find_init(self.init_lora_weights)

    def _register_custom_module(self, mapping: object) -> None:
        """Raises Refusal: layers of new types are told as a `LayerKind`, for every method at once."""
        raise Refusal(
            "LORA",
            "a custom layer class",
            "layers hold adapters of any method; register the base layer's class by peft.registry.register_kind and a "
            "LayerKind (see peft/layers), or target its nn.Linear parts",
        )


class Lora(LowRank):
    peft_type = "LORA"
    config_class = LoraConfig
    summary = "Adds a trainable product of two thin matrices to frozen weights."
    formula = "W' = W + (α/r)·B A"
    paper = "arXiv 2106.09685"
    prefix = "lora_"
    tensors = {
        "lora_A_weight": Stored(
            *("lora_A.weight", "own_r fan_in"),
            kernel="own_r -1 taps",
            indexed="lora_embedding_A",
            join="rows",
            stack=(0, 0),  # A[E·r, in]
            turned="lora_B_weight",  # ΔWᵀ = Aᵀ Bᵀ
        ),
        "lora_B_weight": Stored(
            *("lora_B.weight", "out own_r"),
            kernel="-1 own_r ones",
            indexed="lora_embedding_B",
            join="blocks",
            stack=(2, 1),  # B[out, r·E]
            turned="lora_A_weight",
        ),
        "lora_B_bias": Stored("lora_B.bias", "out", when="config.lora_bias"),
    }
    shown = Shown(
        settings=("r", "lora_alpha", "scaling", "use_dora", "use_rslora", "lora_bias"),
        paths={
            **{"r": "own_r", "lora_alpha": "own_alpha", "scaling": "strength", "use_rslora": "by_root"},
            **{"use_dora": "config.use_dora", "lora_bias": "config.lora_bias"},
        },
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
    pair_names, bias_name = ("lora_A_weight", "lora_B_weight"), "lora_B_bias"
    alpha_field, root_field = "lora_alpha", "use_rslora"
    any_factors = {"init_lora_weights": True}
    config: LoraConfig
    lora_B_bias: Tensor | None
    own_alpha: float
    by_root: bool

    def __init__(self, config: LoraConfig, site: Site) -> None:
        super().__init__(config, site)
        named = site.tied if config.ensure_weight_tying and site.tied else site.path
        self.set(
            own_r=self.rank_at(config, named),
            own_alpha=for_path(config.alpha_pattern, named, config.lora_alpha, "alpha_pattern"),
            by_root=config.use_rslora,
            dropout=config.lora_dropout,
        )
        self.create(site)

    @property
    def strength(self) -> float:
        return self.multiplier * self.own_alpha / (math.sqrt(self.own_r) if self.by_root else self.own_r)

    @property
    def start(self) -> Start:
        return find_init(self.config.init_lora_weights)

    def bias_change(self) -> Tensor | None:
        return None if self.lora_B_bias is None else self.strength * self.lora_B_bias
