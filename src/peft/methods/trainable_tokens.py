"""Trainable tokens: some rows of an embedding, or of an output head, get trained values; all other rows stay as they are.

    W'[i] = δ_k  for the k-th token index i,    δ[n, dim] trained, from δ_k = W[i]

The forward touches only those rows: it adds (δ_k − W[i]) where token i is looked up, or x·(δ_k − W[i]) to logit i. The
original rows are kept beside δ and not saved. Where embedding and head are tied, both ends use one δ, saved once. The
config field `trainable_token_indices` brings the same along with any other method.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import TunerConfig
from ..config_fields import own_field
from ..contract.capabilities import NeedsTokens
from ..contract.method import Method
from ..contract.site import Op, Site
from ..contract.tensors import Stored
from ..core.anatomy.embeddings import embedding_name
from ..core.anatomy.ties import other_ends
from ..core.anatomy.walk import Place

__all__ = ["TrainableTokensConfig"]


def check_indices(indices: Any, field: str) -> None:
    whole = isinstance(indices, (list, tuple)) and all(isinstance(i, int) and not isinstance(i, bool) for i in indices)
    if not whole or not indices or min(indices) < 0 or len(set(indices)) != len(indices):
        raise ValueError(f"`{field}` should be a list of different token indices from 0 on, but got {indices!r}.")


@dataclass
class TrainableTokensConfig(TunerConfig):
    """Trainable tokens.

    token_indices: the tokens to train. target_modules: embeddings (and heads); the input embedding by default.
    init_weights: False starts the rows from random values.
    """

    own_type = "TRAINABLE_TOKENS"
    token_indices: list[int] = dataclasses.field(default_factory=list)
    init_weights: bool = True
    bias: str = own_field("none")
    exclude_modules: list[str] | str | None = own_field(None)
    layers_to_transform: list[int] | int | None = own_field(None)
    layers_pattern: list[str] | str | None = own_field(None)
    modules_to_save: list[str] | None = own_field(None)

    def indices_at(self, path: str) -> list[int]:
        return self.token_indices


class TrainableTokens(NeedsTokens, Method):
    peft_type = "TRAINABLE_TOKENS"
    config_class = TrainableTokensConfig
    summary = "Trains the embeddings of chosen tokens only."
    formula = "W'[i] = δ_k for chosen rows i"
    prefix = "trainable_tokens_"
    tensors: ClassVar[dict[str, Stored]] = {"trainable_tokens_delta": Stored()}
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"token_indices": [0, 1, 2, 3, 4, 5, 7]},)

    def __init__(self, config: Any, site: Site) -> None:
        super().__init__(config, site)
        self.token_indices = list(config.indices_at(site.path))
        order = torch.tensor(sorted(range(len(self.token_indices)), key=self.token_indices.__getitem__))
        self.order: Tensor
        self.known: Tensor
        self.original: Tensor
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("known", torch.tensor(sorted(self.token_indices)), persistent=False)
        self.register_buffer("original", torch.empty(0), persistent=False)
        self.trainable_tokens_delta = site.shared[self.source(config, site)]
        self.follows = self.source(config, site) != site.path
        if self.follows:
            self.set(table=self.table.of_another("trainable_tokens_delta"))

    @classmethod
    def source(cls, config: Any, site: Site) -> str:
        """The path of the site whose rows this one uses: of the other end, where the weights are tied."""
        together = site.tied and config.indices_at(site.tied) == config.indices_at(site.path)
        return site.tied if together else site.path

    @classmethod
    def shared_tensors(cls, config: Any, sites: list[Site], rng: torch.Generator) -> dict[str, nn.Parameter]:
        own = [s for s in sites if cls.source(config, s) == s.path]
        return {s.path: s.empty(len(config.indices_at(s.path)), _width(s)) for s in own}

    @classmethod
    def prepare(cls, config: TrainableTokensConfig, model: nn.Module) -> None:
        check_indices(config.token_indices, "token_indices")
        if config.target_modules is None and not config.target_parameters:
            config.target_modules = [embedding_name(model)]

    @classmethod
    def tokens_needed(cls, config: Any) -> int:
        return max(config.token_indices, default=-1) + 1

    @classmethod
    def followers(cls, config: Any, model: nn.Module, places: list[Place]) -> list[Place]:
        return other_ends(model, places)

    @classmethod
    def check(cls, config: Any, site: Site) -> None:
        super().check(config, site)
        rows = site.geometry.fan_in if site.geometry.indexed else site.geometry.out
        indices = config.indices_at(site.path)
        if max(indices) >= rows:
            raise ValueError(
                f"Token index {max(indices)} is out of range: {site.path} has {rows} rows. Add the tokens to the tokenizer "
                "and call model.resize_token_embeddings(len(tokenizer)) first."
            )

    def derive(self, rng: torch.Generator, site: Site) -> None:
        self.original = self.rows(site.read())

    def rows(self, W: Tensor) -> Tensor:
        chosen = (W.T if self.geometry.indexed else W)[self.token_indices]
        return chosen.detach().to(self.trainable_tokens_delta.dtype, copy=True)

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        if self.follows:
            return
        if self.config.init_weights:
            self.trainable_tokens_delta.copy_(self.original)
        else:
            self.trainable_tokens_delta.copy_(torch.randn(self.original.shape, generator=rng))

    def weight(self, W: Tensor) -> Tensor:
        at = torch.tensor(self.token_indices, device=W.device)
        rows = self.trainable_tokens_delta.to(W.dtype)
        return W.index_copy(1, at, rows.T) if self.geometry.indexed else W.index_copy(0, at, rows)

    def add(self, x: Tensor, y: Tensor, op: Op) -> Tensor:
        if not len(self.original):  # made without values, on the meta device
            self.original = self.rows(op.read())
        change = self.trainable_tokens_delta - self.original
        if op.geometry.indexed:  # a small table: the changed rows in the order of their tokens, then rows of zeros
            n = len(self.known)
            zeros = change.new_zeros(2 if n + 1 == op.geometry.fan_in else 1, change.shape[1])
            place = torch.searchsorted(self.known, x).clamp(max=n - 1)
            place = torch.where(self.known[place] == x, place, n)
            return y + op(place, torch.cat([change[self.order], zeros]).T.to(y.dtype))
        if not op.geometry.factored:
            W = change.new_zeros(op.geometry.out, change.shape[1])
            return y + op(x, W.index_copy(0, self.known, change[self.order]).to(y.dtype))
        last = op.kind.channels_last(y)
        logits = op.kind.channels_last(op(x, change[self.order].to(y.dtype)))
        return op.kind.channels_back(last.index_add(-1, self.known, logits.to(last.dtype)))

    def rank(self) -> int:
        return min(len(self.token_indices), self.geometry.out, self.geometry.fan_in)


def _width(site: Site) -> int:
    return site.geometry.out if site.geometry.indexed else site.geometry.fan_in
