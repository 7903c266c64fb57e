"""The config field `trainable_token_indices`: rows of the embedding that train along with any method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..config import TunerConfig
from ..contract.capabilities import Companion
from ..contract.tensors import Stored
from ..core.anatomy.embeddings import embedding_name
from ..core.anatomy.patterns import means
from ..core.anatomy.targets import find_whole
from ..core.anatomy.walk import Place
from ..core.forms.row_sparse import check_rows
from ..methods.trainable_tokens import TrainableTokens


@dataclass
class TokenRows:
    """`trainable_token_indices` as this method reads it."""

    by_name: dict[str, list[int]]
    init_weights: bool = True

    def indices_at(self, path: str) -> list[int]:
        default = next(iter(self.by_name.values()))  # the other end of a tied weight
        return next((v for k, v in self.by_name.items() if means(k, path)), default)


class TokensAlong(Companion, TrainableTokens):
    companion = "trainable_token_indices"
    peft_type = ""
    tensors = {"trainable_tokens_delta_weight": Stored("token_adapter.trainable_tokens_delta")}
    examples = ()

    @classmethod
    def tokens_needed(cls, config: TunerConfig) -> int:
        asked = config.trainable_token_indices or []
        lists = asked.values() if isinstance(asked, dict) else [asked]
        return max((i for some in lists for i in some), default=-1) + 1

    @classmethod
    def accompany(cls, config: TunerConfig, model: nn.Module) -> tuple[list[Place], TokenRows]:
        asked = config.trainable_token_indices or []
        by_name = asked if isinstance(asked, dict) else {embedding_name(model): asked}
        for name, indices in by_name.items():
            check_rows(indices, f"trainable_token_indices[{name!r}]", "token indices")
            if any(means(name, m) or means(m, name) for m in config.modules_to_save or ()):
                raise ValueError(
                    f"{name} is in both modules_to_save, which trains it whole, and trainable_token_indices: choose one."
                )
        places = find_whole(model, list(by_name), "trainable_token_indices")
        places += cls.followers(config, model, places)
        along = TokenRows(by_name)
        if config.ensure_weight_tying:
            for weight in {id(p.module._parameters.get("weight")) for p in places}:
                ends = [p.path for p in places if id(p.module._parameters.get("weight")) == weight]
                if len({tuple(along.indices_at(path)) for path in ends}) > 1:
                    raise ValueError(
                        f"ensure_weight_tying=True, but trainable_token_indices differ for {', '.join(ends)}, which hold one "
                        "tied weight: give them the same indices."
                    )
        return places, along

    @classmethod
    def bring_all(cls, config: Any, configs: Sequence[Any], model: nn.Module) -> None:
        """The union: of plain lists one list, else by the paths of the embeddings and heads."""
        lists = [c.trainable_token_indices for c in configs]
        if all(isinstance(some, list) for some in lists):
            config.trainable_token_indices = list(dict.fromkeys(i for some in lists for i in some))
            return
        rows: dict[str, list[int]] = {}
        for c in configs:
            places, along = cls.accompany(c, model)
            for p in places:
                rows[p.path] = list(dict.fromkeys([*rows.get(p.path, []), *along.indices_at(p.path)]))
        config.trainable_token_indices = rows
