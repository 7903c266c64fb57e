"""FISH mask: train only the parameters that matter most, by their empirical Fisher information (arXiv 2111.09839).

    F_j = 1/N Σ_i (∂ log p(y_i | x_i) / ∂θ_j)²,   trained: the top `keep_ratio` of all θ_j together, the mask then fixed

The values at the chosen positions are trained and saved with their positions; all others stay as they are. Every
parameter keeps at least its best entry, so that a file that lacks one can be told from a mask that does. Gradients
need data, so the mask is made by `compute_fish_mask(model, batches)` before training. Until then the adapter holds a
random choice of the same size (the paper's baseline), drawn from the adapter's seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TunerConfig
from ..config_fields import own_field, require
from ..contract.site import Site
from ..core.acting.mix import Mix
from ..core.forms.sparse import SparseCopies, top_entries
from ..measure.examples import examples_of, originals

__all__ = ["FishMaskConfig", "compute_fish_mask"]


@dataclass
class FishMaskConfig(TunerConfig):
    """FISH mask (arXiv 2111.09839).

    keep_ratio: share of the targeted modules' parameters that train. target_modules: all linear layers by default.
    """

    own_type = "FISHMASK"
    keep_ratio: float = own_field(0.005)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "keep_ratio", 0)
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(f"`keep_ratio` is the share of parameters to train, in (0, 1]; got {self.keep_ratio}.")


class FishMask(SparseCopies):
    peft_type = "FISHMASK"
    config_class = FishMaskConfig
    summary = "Trains the small share of parameters with the largest Fisher information."
    formula = "θ' = θ except at the top-k of F = E[(∂ log p/∂θ)²]"
    paper = "arXiv 2111.09839"
    prefix = "fish_"
    holder = "fish_mask"
    examples = ({"keep_ratio": 0.25},)

    def __init__(self, config: FishMaskConfig, site: Site) -> None:
        super().__init__(config, site)
        self.make_room(config.keep_ratio, site.device, site.dtype)
        self.probes: dict[str, Tensor] = {}  # zeros added to whole parameters while their gradients are measured

    def replace(self, name: str, P: Tensor) -> Tensor:
        if name in self.probes:
            return P + self.probes[name].to(P.dtype)
        return super().replace(name, P)


def compute_fish_mask(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    *,
    adapter_name: str = "default",
    num_samples: int = 1024,
) -> dict[str, int]:
    """Choose the adapter's mask from data: the top share of all targeted parameters by squared gradients.

    batches: tensors, or dicts or tuples of tensors, with examples along the first axis; each example is differentiated
    alone, up to num_samples of them. loss: `loss(model, example)`, by default `model(**example).loss`. The chosen values
    start from the base's. Make the optimiser afterwards: the adapter's parameters are new ones. Returns the number of
    chosen entries by module.
    """
    roster = model.roster  # type: ignore[union-attr]
    roster.known([adapter_name])
    methods = {disk_path: m for disk_path, m in roster.adapters[adapter_name].methods if isinstance(m, FishMask)}
    if not methods:
        raise ValueError(
            f"Adapter {adapter_name!r} has no mask to compute: its method is {roster.configs[adapter_name].peft_type}."
        )
    loss = loss or (lambda m, example: m(**example).loss)
    for m in methods.values():
        device = next(m.parameters()).device
        m.probes = {n: torch.zeros(shape, device=device, requires_grad=True) for n, shape in m.shapes.items()}
    probes = {(disk_path, n): p for disk_path, m in methods.items() for n, p in m.probes.items()}
    fisher = {key: torch.zeros_like(p, requires_grad=False) for key, p in probes.items()}
    count, was_training = 0, model.training
    try:
        with roster.using(Mix((adapter_name,))):
            model.eval()
            for example in islice((e for batch in batches for e in examples_of(batch)), num_samples):
                grads = torch.autograd.grad(loss(model, example), list(probes.values()), allow_unused=True)
                for f, g in zip(fisher.values(), grads, strict=True):
                    if g is not None:
                        f += g**2
                count += 1
    finally:
        for m in methods.values():
            m.probes = {}
        model.train(was_training)
    if not count:
        raise ValueError("compute_fish_mask was given no examples.")
    base = originals(model)
    found = dict.fromkeys(methods, 0)
    for (disk_path, n), at in top_entries(fisher, roster.configs[adapter_name].keep_ratio).items():
        methods[disk_path].choose(n, at, base[methods[disk_path]]()[n])
        found[disk_path] += len(at)
    return found
