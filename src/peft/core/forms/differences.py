"""Differences that are learned densely first, and of which the largest entries are kept then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...config import TunerConfig
from ...config_fields import own_field
from ...contract.site import Site
from ..acting.on_model import methods_of, originals
from .copies import as_they_are, hang
from .sparse import SparseCopies, choose, require_share, top_entries


@dataclass
class PrunedConfig(TunerConfig):
    """density: share of the targeted modules' parameters that is kept. pruned: whether that has happened."""

    density: float = own_field(0.005)
    pruned: bool = own_field(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_share(self, "density", "keep")


class PrunedDifference(SparseCopies):
    """P' = P + D with a dense D, until `prune` keeps some entries of it as values at fixed positions.

    A subclass states `learned`, `start` and `difference`.
    """

    def __init__(self, config: PrunedConfig, site: Site) -> None:
        super().__init__(config, site)
        if config.pruned:
            self.make_room(config.density, site.device, site.dtype)
            return
        trees = self.learned(site)
        for holder, tensors in trees.items():
            hang(self, holder, tensors)
        self.set(table=as_they_are(f"{holder}.{n}" for holder, tensors in trees.items() for n in tensors))

    def learned(self, site: Site) -> Mapping[str, Mapping[str, nn.Parameter]]:
        """What D is made of: the trees of tensors, by attribute."""
        raise NotImplementedError(f"{type(self).__name__}.learned")

    def start(self, rng: torch.Generator) -> None:
        """Draw the initial values of these."""
        raise NotImplementedError(f"{type(self).__name__}.start")

    def difference(self, name: str) -> Tensor:
        """D of one tensor."""
        raise NotImplementedError(f"{type(self).__name__}.difference")

    @property
    def pruned(self) -> bool:
        return self.holder in self._modules

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        if self.pruned:
            super().reset(rng, site)
        else:
            self.start(rng)

    def replace(self, name: str, P: Tensor) -> Tensor:
        return super().replace(name, P) if self.pruned else P + self.difference(name).to(P.dtype)


@torch.no_grad()
def prune(model: nn.Module, adapter_name: str, cls: type[PrunedDifference], density: float | None) -> dict[str, int]:
    """Keep the largest entries of D, a share `density` (or the config's) of all tensors' together, and drop the rest.

    Returns the number of kept entries by module.
    """
    roster, methods = methods_of(model, adapter_name, cls)
    config = roster.configs[adapter_name]
    if not methods or not isinstance(config, PrunedConfig) or any(m.pruned for m in methods.values()):
        raise ValueError(f"Adapter {adapter_name!r} holds no learned difference to prune, or is pruned already.")
    share = config.density if density is None else density
    changes = {}
    for path, m in methods.items():
        was_training = m.training
        m.eval()
        changes.update({(path, n): m.difference(n) for n in m.shapes})
        m.train(was_training)
    kept = top_entries({key: change.abs() for key, change in changes.items()}, share)
    for m in methods.values():
        some, former = next(m.parameters()), list(m._modules)
        m.make_room(share, some.device, some.dtype)
        for holder in former:
            del m._modules[holder]
    base = originals(model)

    def moved(path: str) -> dict[str, Tensor]:
        P = base[methods[path]]()
        return {n: P[n].to(change.dtype) + change for (at, n), change in changes.items() if at == path}

    found = choose(methods, kept, moved)
    config.density, config.pruned = share, True
    roster.set_trainable(adapter_name, adapter_name in roster.training)
    return found
