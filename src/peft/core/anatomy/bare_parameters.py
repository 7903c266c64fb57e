"""`target_parameters`: bare parameters (expert stacks) by the name `module.parameter`."""

from __future__ import annotations

from torch import nn

from ...config import TunerConfig
from ...contract.tree import Composite
from ...errors import NoMatchingPeftModuleError, Refusal, near
from ...registry import kinds
from .patterns import matches, means
from .targets import in_layers
from .walk import Place, parts, walk


def find_parameters(model: nn.Module, config: TunerConfig) -> list[Place]:
    """The places of the weights that `config.target_parameters` names; every name must match."""
    targets = config.target_parameters or []
    bare = [k for k in kinds().values() if k.for_parameters]
    found: list[Place] = []
    known: list[str] = []
    hit: set[str] = set()
    for place in list(walk(model)):
        if place.owner is not None:
            continue
        module = place.module
        own = [n for n, p in module._parameters.items() if p is not None and p.dim() in (2, 3)]
        wanted = []
        for n in own:
            path = f"{place.path}.{n}"
            known.append(path)
            for t in targets:
                if means(t, path):
                    hit.add(t)
                    if not matches(
                        getattr(config, "exclude_modules", None), place.path, "exclude_modules"
                    ) and in_layers(config, path):
                        wanted.append(n)
        if not wanted:
            continue
        if place.adapted is not None and place.adapted.methods:
            raise Refusal(
                "target_parameters",
                place.path,
                f"adapters {list(place.adapted.methods)} wrap this module, and its parameters are theirs to change; "
                "name the module in target_modules",
            )
        composite = (
            place.held
            if isinstance(place.held, Composite)
            else next(k for k in bare if k.claims(module)).stand_in(module)
        )
        assert composite is not None
        for part in parts(composite, place):
            below = part.path.removeprefix(place.path + ".")
            if any(below == n or below.startswith((n + ".", n + "[")) for n in wanted):
                found.append(part)
    missing = [t for t in targets if t not in hit]
    if missing:
        hints = "".join(near(m, [k.split(".", k.count(".") - 1)[-1] for k in known]) or near(m, known) for m in missing)
        raise NoMatchingPeftModuleError(
            f"target_parameters {', '.join(map(repr, missing))} match no parameter of the base model.{hints}"
        )
    return found
