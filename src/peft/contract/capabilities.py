"""What some methods can do besides the contract: classes to derive from beside `Method`, asked for by `isinstance`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import Refusal


def can(method: Any, capability: type) -> bool:
    """Whether a method at a layer has this capability: also one that something has put a stand-in around (FSDP 1's units),
    which forwards attributes and calls but is no instance of the method's class."""
    return isinstance(method.nested()[0], capability)


class TwoFactors:
    """ΔW is any product of two thin matrices, so that such adapters combine, swap into padded twins and convert."""

    def two_factors(self) -> tuple[Tensor, Tensor, float]:
        """(A[r, fan_in], B[out, r], s) with ΔW = s·B A."""
        raise NotImplementedError(f"{type(self).__name__}.two_factors")

    def set_factors(self, A: Tensor, B: Tensor, bias: Tensor | None) -> None:
        """Become ΔW = B A, and `bias` added to the layer's; for the configs that `config_for_ranks` returns."""
        raise NotImplementedError(f"{type(self).__name__}.set_factors")

    @classmethod
    def config_for_ranks(cls, config: Any, ranks: dict[str, int]) -> Any:
        """A copy of `config` for adapters that hold any two factors of the given ranks (path -> r) with ΔW = B A."""
        raise NotImplementedError(f"{cls.__name__}.config_for_ranks")

    @classmethod
    def join(cls, config: Any, path: str, former: list[str]) -> None:
        """Let `config` give the matrix at `path` what it gives the matrices `former` that lie in it, one above the other."""
        raise NotImplementedError(f"{cls.__name__}.join")


class Blends:
    """The effect is linear in the parameters, so that a weighted sum of adapters is one of their kind."""

    def blend(self, methods: Sequence[Any], weights: Sequence[float]) -> dict[str, Tensor]:
        """The parameters that give this one, at the same site, the weighted sum of these ones' effects."""
        raise NotImplementedError(f"{type(self).__name__}.blend")

    @classmethod
    def widen(cls, config: Any, configs: Sequence[Any], model: nn.Module) -> None:
        """Let `config` reach, within a site, what any of `configs` reaches."""


class Penalised:
    """The loss gets a term in training: AdaLoRA's orthogonality, an L0 penalty."""

    def penalty(self) -> Tensor | None:
        """This site's term."""
        raise NotImplementedError(f"{type(self).__name__}.penalty")

    @classmethod
    def total_penalty(cls, terms: list[Tensor], config: Any) -> Tensor:
        """The sites' penalties as one number added to the loss."""
        return torch.stack([t.to(terms[0].device) for t in terms]).sum()


class Scheduled:
    """The method follows the steps of the optimiser: a budget that falls."""

    @classmethod
    def after_step(cls, methods: dict[str, Any], config: Any, global_step: int) -> None:
        """Called once per optimiser step, after backward, with the adapter's methods by path."""
        raise NotImplementedError(f"{cls.__name__}.after_step")

    def progress(self) -> dict[str, Any]:
        """What it has learnt on the way that no file of an adapter holds: tensors and plain values, for a checkpoint."""
        return {}

    def take_up(self, progress: dict[str, Any]) -> None:
        """Go on from what `progress` gave."""


class NeedsTokens:
    """It trains words that the base's vocabulary may lack."""

    @classmethod
    def tokens_needed(cls, config: Any) -> int:
        """How many word embeddings the base must have for what `config` asks, as far as the config says."""
        raise NotImplementedError(f"{cls.__name__}.tokens_needed")


class Companion:
    """A method that a field of any other method's config brings along."""

    companion: ClassVar[str] = ""  # the field

    @classmethod
    def accompany(cls, config: Any, model: nn.Module) -> tuple[list[Any], Any]:
        """(places, config of this method) for what `config` asks by the field."""
        raise NotImplementedError(f"{cls.__name__}.accompany")

    @classmethod
    def bring_all(cls, config: Any, configs: Sequence[Any], model: nn.Module) -> None:
        """Let `config` bring along what any of `configs`, which all have the field set, does."""
        values = [getattr(c, cls.companion) for c in configs]
        if all(isinstance(v, (list, tuple, set)) for v in values):
            values = [list(dict.fromkeys(x for v in values for x in v))]
        if any(v != values[0] for v in values):
            raise Refusal(cls.companion, "a combination", f"the adapters ask for {', '.join(map(repr, values))}")
        setattr(config, cls.companion, values[0])


class Exclusive:
    """Of what it trains at its site only one adapter's can act: the sum of two replacements is neither."""

    def held_alone(self) -> frozenset[object]:
        """What of the site that is: names of parameters, numbers of rows."""
        raise NotImplementedError(f"{type(self).__name__}.held_alone")


class Derives:
    """It computes frozen state that depends on W and is not saved: PiSSA's initial factors, the original rows of tokens."""

    @property
    def derives(self) -> bool:
        """Whether there is such state under this config."""
        return True

    def derive(self, rng: torch.Generator, site: Any) -> None:
        """Compute it; called before `reset`, and wherever weights are loaded."""
        raise NotImplementedError(f"{type(self).__name__}.derive")


class Follows:
    """The other ends of a tied weight can change along."""

    follows = False  # what it trains was made for another end, and is used here

    @classmethod
    def followers(cls, config: Any, model: nn.Module, places: list[Any]) -> list[Any]:
        """Further places that must change along with the targeted ones."""
        raise NotImplementedError(f"{cls.__name__}.followers")


class ScalesChannels:
    """A `before` that only scales channels: it commutes with any kernel, so needs no detour through W."""


class TakesSpan:
    """`after(y, x, span)` is told which tokens of their sequences the call holds: core/acting/span.py."""
