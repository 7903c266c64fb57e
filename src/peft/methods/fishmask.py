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

from torch import Tensor, nn

from ..config import TunerConfig
from ..config_fields import ranged
from ..contract.site import Site
from ..core.acting.mix import Mix
from ..core.acting.on_model import methods_of, originals
from ..core.forms.sparse import SparseCopies, choose, require_share, top_entries
from ..measure.gradients import Batch, probing, squared_gradients

__all__ = ["FishMaskConfig", "compute_fish_mask"]


@dataclass
class FishMaskConfig(TunerConfig):
    """FISH mask (arXiv 2111.09839).

    keep_ratio: share of the targeted modules' parameters that train. target_modules: all linear layers by default.
    """

    own_type = "FISHMASK"
    keep_ratio: float = ranged(0.005, 0, own=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_share(self, "keep_ratio", "train")


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
        self.probes: dict[str, Tensor] = {}  # added to whole parameters while their gradients are measured

    def replace(self, name: str, P: Tensor) -> Tensor:
        if name in self.probes:
            return P + self.probes[name].to(P.dtype)
        return super().replace(name, P)


def compute_fish_mask(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Callable[[nn.Module, Batch], Tensor] | None = None,
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
    roster, methods = methods_of(model, adapter_name, FishMask)
    config = roster.configs[adapter_name]
    if not isinstance(config, FishMaskConfig):
        raise ValueError(f"Adapter {adapter_name!r} has no mask to compute: its method is {config.peft_type}.")
    with probing(methods) as probes, roster.using(Mix((adapter_name,))):
        fisher = squared_gradients(model, probes, batches, loss, num_samples)
    base = originals(model)
    return choose(methods, top_entries(fisher, config.keep_ratio), lambda path: base[methods[path]]())
