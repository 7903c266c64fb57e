"""Trainable tokens: some rows of an embedding, or of an output head, get trained values; all other rows stay as they are.

    W'[i] = δ_k  for the k-th token index i,    δ[n, dim] trained, from δ_k = W[i]

The forward touches only those rows: it adds (δ_k − W[i]) where token i is looked up, or x·(δ_k − W[i]) to logit i. The
original rows are kept beside δ and not saved. Where embedding and head are tied, both ends use one δ, saved once. The
config field `trainable_token_indices` brings the same along with any other method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import TunerConfig, as_bias
from ..config_fields import own_field, reading
from ..config_values import AtLeast0
from ..contract.capabilities import Blends, Derives, Exclusive, Follows, NeedsTokens
from ..contract.method import Method
from ..contract.site import Op, Site
from ..contract.tensors import Shown, Stored
from ..core.anatomy.embeddings import embedding_name
from ..core.anatomy.ties import other_ends
from ..core.anatomy.walk import Place
from ..core.forms.row_sparse import ChoosesRows, add_rows, check_rows, rows_of, with_rows

__all__ = ["TrainableTokensConfig"]


@dataclass
class TrainableTokensConfig(TunerConfig):
    """Trainable tokens.

    token_indices: the tokens to train. target_modules: embeddings (and heads); the input embedding by default.
    init_weights: False starts the rows from random values.
    """

    own_type = "TRAINABLE_TOKENS"
    sets = ("exclude_modules",)
    token_indices: list[int] = field(default_factory=list)
    init_weights: bool = True
    bias: str = reading(as_bias, "none", own=True)
    exclude_modules: list[str] | str | None = own_field(None)
    layers_to_transform: list[AtLeast0] | AtLeast0 | None = own_field(None)
    layers_pattern: list[str] | str | None = own_field(None)
    modules_to_save: list[str] | None = own_field(None)

    def indices_at(self, path: str) -> list[int]:
        return self.token_indices


class TrainableTokens(Blends, Derives, Exclusive, Follows, NeedsTokens, Method):
    peft_type = "TRAINABLE_TOKENS"
    config_class = TrainableTokensConfig
    summary = "Trains the embeddings of chosen tokens only."
    formula = "W'[i] = δ_k for chosen rows i"
    prefix = "trainable_tokens_"
    tensors = {"trainable_tokens_delta_weight": Stored("trainable_tokens_delta")}
    shown = Shown(
        layer="TrainableTokensLayer",
        settings=("token_indices", "trainable_tokens_original"),
        paths={"token_indices": "indices", "trainable_tokens_original": "original"},
    )
    examples: ClassVar[tuple[dict[str, object], ...]] = ({"token_indices": [0, 1, 2, 3, 4, 5, 7]},)

    trainable_tokens_delta_weight: Tensor
    order: Tensor  # of the tokens, and with it the tokens sorted
    known: Tensor
    original: Tensor  # W[i], one below the other; empty until W has values

    def __init__(self, config: ChoosesRows, site: Site) -> None:
        super().__init__(config, site)
        self.indices = list(config.indices_at(site.path))
        known, order = torch.tensor(self.indices).sort()
        for name, buffer in (("order", order), ("known", known), ("original", torch.empty(0))):
            self.register_buffer(name, buffer, persistent=False)
        source = self.source(config, site)
        self.trainable_tokens_delta_weight = site.shared[source]
        if source != site.path:
            self.set(follows=True, table=self.table.of_another("trainable_tokens_delta_weight"))

    @classmethod
    def source(cls, config: ChoosesRows, site: Site) -> str:
        """The path of the site whose rows this one uses: of the other end, where the weights are tied."""
        together = site.tied and config.indices_at(site.tied) == config.indices_at(site.path)
        return site.tied if together else site.path

    @classmethod
    def shared_tensors(cls, config: ChoosesRows, sites: list[Site], rng: torch.Generator) -> dict[str, nn.Parameter]:
        own = [s for s in sites if cls.source(config, s) == s.path]
        return {s.path: s.empty(len(config.indices_at(s.path)), s.geometry.width) for s in own}

    @classmethod
    def prepare(cls, config: TrainableTokensConfig, model: nn.Module) -> None:
        check_rows(config.token_indices, "token_indices", "token indices")
        if config.names_no_target:
            config.target_modules = [embedding_name(model)]

    @classmethod
    def tokens_needed(cls, config: TrainableTokensConfig) -> int:
        return max(config.token_indices, default=-1) + 1

    @classmethod
    def followers(cls, config: object, model: nn.Module, places: list[Place]) -> list[Place]:
        return other_ends(model, places)

    @classmethod
    def check(cls, config: ChoosesRows, site: Site) -> None:
        super().check(config, site)
        rows = site.geometry.fan_in if site.geometry.indexed else site.geometry.out
        if (last := max(config.indices_at(site.path))) >= rows:
            raise ValueError(
                f"Token index {last} is out of range: {site.path} has {rows} rows. Add the tokens to the tokenizer "
                "and call model.resize_token_embeddings(len(tokenizer)) first."
            )

    def rows(self, W: Tensor) -> Tensor:
        return rows_of(W, self.indices, self.geometry).to(self.trainable_tokens_delta_weight.dtype, copy=True)

    def derive(self, rng: torch.Generator, site: Site) -> None:
        self.original = self.rows(site.read())

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        if self.source(self.config, site) == site.path:
            start = self.original if self.config.init_weights else torch.randn(self.original.shape, generator=rng)
            self.trainable_tokens_delta_weight.copy_(start)

    def weight(self, W: Tensor) -> Tensor:
        return with_rows(W, self.indices, self.trainable_tokens_delta_weight, self.geometry)

    def add(self, x: Tensor, y: Tensor, op: Op) -> Tensor:
        if not len(self.original):  # made without values, on the meta device
            self.original = self.rows(op.read())
        change = self.trainable_tokens_delta_weight - self.original
        return add_rows(x, y, op, self.known, change[self.order])

    def blend(self, methods: Sequence[Any], weights: Sequence[float]) -> dict[str, Tensor]:
        """W[i] + Σ w (δ_i − W[i]) over those of `methods` that train row i."""
        rows, place = self.original.clone(), {token: k for k, token in enumerate(self.indices)}
        for m, w in zip(methods, weights, strict=True):
            at = torch.tensor([place[i] for i in m.indices], device=rows.device)
            rows[at] += w * (m.trainable_tokens_delta_weight.to(rows) - self.original[at])
        return {"trainable_tokens_delta_weight": rows}

    @classmethod
    def widen(cls, config: Any, configs: Sequence[Any], model: nn.Module) -> None:
        config.token_indices = list(dict.fromkeys(i for c in configs for i in c.token_indices))

    def held_alone(self) -> frozenset[object]:
        return frozenset(self.indices)

    def rank(self) -> int:
        return min(len(self.indices), self.geometry.out, self.geometry.fan_in)
