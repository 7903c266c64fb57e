"""Which modules an adapter goes to: names, regex, `all-linear`, bare parameters; and the dry run that shows it.

Paths are the names of the *base* model: the wrappers of adapters that are already there do not appear in them.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Collection, Iterator

from torch import nn

from ...config import TunerConfig
from ...config_values import shown
from ...contract.tree import Composite, without_wrappers
from ...errors import NoMatchingPeftModuleError, near
from .heads import output_heads
from .patterns import Expression, endings, expression, matcher, means
from .walk import Place, splitter_of, walk

ALL_LINEAR = "all-linear"


def in_layers(config: TunerConfig, path: str) -> bool:
    """`layers_to_transform`: whether the path is in one of these layers, or is targeted as a whole, not by its ending.

    The layer is the number after the first list of modules in the path, or after the components that one of the regular
    expressions in `layers_pattern` fits.
    """
    wanted = getattr(config, "layers_to_transform", None)
    if wanted is None or wanted == []:
        return True
    targets = config.target_modules
    if "." not in path if targets == ALL_LINEAR else not isinstance(targets, str) and path in (targets or ()):
        return True
    pattern = getattr(config, "layers_pattern", None)
    lists = [pattern] if isinstance(pattern, str) else list(pattern or [])
    if any(lists):
        found = next((m for p in lists if p and (m := _after(p).run("match", path + "."))), None)
    else:
        found = re.match(r".*?[^.]*\.(?P<layer_>\d+)\.", path + ".")  # a block is in its own layer
    return found is not None and int(found["layer_"]) in ([wanted] if isinstance(wanted, int) else wanted)


@functools.lru_cache(maxsize=64)
def _after(pattern: str) -> Expression:
    """The number after whole path components that a regular expression fits."""
    expression(pattern, "layers_pattern")  # whole by itself
    return Expression(rf"(?:.*\.)?(?:{pattern})\.(?P<layer_>\d+)\.", "layers_pattern")


def exactly(model: nn.Module, paths: Collection[str]) -> list[Place]:
    """The places of just these paths, in model order; paths that this model does not have are passed over."""

    def meant(p: Place | None) -> bool:
        return p is not None and any(without_wrappers(path) in paths for path in (p.path, p.disk_path))

    places = list(walk(model))
    found = [p for p in places if not _composed(p) and (meant(p) or meant(p.owner))]
    if not found:
        _fail("target_modules", sorted(paths), places)
    return found


def find(model: nn.Module, config: TunerConfig, strict: bool = True) -> list[Place]:
    """The places that `config` targets, in model order. Raises before anything changes, naming what did not match.

    strict=False: names of which some match nothing give a warning.
    """
    places = list(walk(model))
    whole = list(getattr(config, "modules_to_save", None) or [])

    def inside_saved(path: str) -> bool:
        return bool(whole) and any(means(w, p) for w in whole for p in _prefixes(path))

    targets = config.target_modules
    excluded = getattr(config, "exclude_modules", None)
    if targets == ALL_LINEAR:
        heads = output_heads(model)
        chosen = [
            p
            for p in places
            if p.owner is None and p.kind.linear and not _matches_any(heads, p.path) and not inside_saved(p.path)
        ]
        if not chosen:
            raise NoMatchingPeftModuleError("target_modules='all-linear' found no linear layer in this model.")
    else:
        meant = matcher(targets, "target_modules")
        chosen = [
            p for p in places if (meant(p.path) or (p.owner is not None and meant(p.owner.path))) and not _composed(p)
        ]
        if not isinstance(targets, str):
            ends = {p.path.rpartition(".")[2] for p in chosen}  # nearly all names are last components
            unmatched = [t for t in targets or [] if t not in ends]
            if unmatched:
                known = {end for p in places for end in endings(p.path)}
                unmatched = [t for t in unmatched if without_wrappers(t) not in known]
            if unmatched and (strict or not chosen):
                _fail("target_modules", unmatched, places)
            elif unmatched:
                warnings.warn(
                    f"Target modules {', '.join(map(repr, unmatched))} not found in the base model.", stacklevel=4
                )
        if isinstance(targets, str) and not chosen and any(means(targets, p.path) for p in places):
            raise NoMatchingPeftModuleError(
                f"Target modules {targets!r} not found in the base model: a string is a regular expression for whole paths. "
                f"To target the modules of this name, write target_modules=[{targets!r}]."
            )
        if not chosen and targets:
            _fail("target_modules", [str(targets)], places)
    barred = matcher(excluded, "exclude_modules")
    kept = [p for p in chosen if not barred(p.path) and in_layers(config, p.path) and not inside_saved(p.path)]
    if chosen and not kept:
        why = "exclude_modules, layers_to_transform and modules_to_save leave none of them"
        raise NoMatchingPeftModuleError(
            f"No modules were targeted for adaptation: target_modules={targets!r} matches {len(chosen)} modules, but {why}."
        )
    if excluded and not isinstance(excluded, str):
        known = {end for p in places for end in endings(p.path)}
        unused = [e for e in excluded if e not in known]
        if unused:
            _fail("exclude_modules", unused, places)
    return kept


def unfit(model: nn.Module) -> dict[str, str]:
    """Linear layers that no kind with a matrix takes, and why: what `all-linear` passes over."""
    places = (p for p in walk(model) if p.owner is None and isinstance(p.module, nn.Linear) and not p.kind.linear)
    return {p.path: p.kind.why_opaque(p.module) for p in places}


def _composed(place: Place) -> bool:
    """Whether the place stands for parts that follow it in the walk."""
    if isinstance(place.held, Composite) or place.owner is not None:
        return isinstance(place.held, Composite)
    kind = splitter_of(place.module)
    return kind is not None and kind.stands_in


def _matches_any(paths: set[str], path: str) -> bool:
    return any(path == h or path.startswith(h + ".") for h in paths)


def _prefixes(path: str) -> Iterator[str]:
    steps = path.split(".")
    return (".".join(steps[: i + 1]) for i in range(len(steps)))


def _fail(what: str, missing: list[str], places: list[Place]) -> None:
    leaves = list(dict.fromkeys(p.path.rsplit(".", 1)[-1] for p in places if not p.path.rsplit(".", 1)[-1].isdigit()))
    paths = [p.path for p in places]
    hints = "".join(near(m, leaves) or near(m, paths) for m in missing[:5])
    named = ", ".join(shown(m) for m in missing[:20]) + (" …" if len(missing) > 20 else "")
    raise NoMatchingPeftModuleError(
        f"Target modules {named} not found in the base model: {what} must name modules of it."
        f"{hints} Its modules are called: {', '.join(leaves[:40])}{' …' if len(leaves) > 40 else ''}."
    )


def short_names(model: nn.Module, chosen: list[Place]) -> list[str]:
    """Names that match just these places: the last component where all modules called so are among them."""
    paths = {p.path for p in chosen}
    other = {p.path.rpartition(".")[2] for p in walk(model) if p.path not in paths}
    leaves = {path: path.rpartition(".")[2] for path in paths}
    return sorted({p if leaf in other or leaf.isdigit() else leaf for p, leaf in leaves.items()})


def find_whole(model: nn.Module, wanted: list[str], what: str) -> list[Place]:
    """Places of modules named for a special purpose (modules_to_save), each of which must exist."""
    places = [p for p in walk(model) if p.owner is None]
    missing = [w for w in wanted if not any(means(w, p.path) for p in places)]
    if missing:
        _fail(what, missing, places)
    return [p for p in places if any(means(w, p.path) for w in wanted)]
