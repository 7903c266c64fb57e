"""Which modules an adapter goes to: names, regex, `all-linear`, bare parameters; and the dry run that shows it.

Paths are the names of the *base* model: the wrappers of adapters that are already there do not appear in them.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..registry import kind_of, splitter_of
from .adapted import Adapted, Slots
from .errors import NoMatchingPeftModuleError, near
from .layer import Composite, LayerKind, Wrapper

ALL_LINEAR = "all-linear"
HEADS = ("classifier", "score", "qa_outputs")  # names that transformers gives newly initialised heads


@dataclass(slots=True)
class Place:
    """One place of the base model's tree: where a module hangs, wrapped or not."""

    path: str
    parent: nn.Module
    attr: str
    stem: str  # the path as upstream writes it to disk
    owner: Place | None = None  # for a part: where its composite stands or will stand
    composite: Composite | None = None
    _kind: LayerKind | None = None
    _module: nn.Module | None = None

    @property
    def kind(self) -> LayerKind:
        """The kind of the base layer there."""
        if self._kind is None:
            held = self.held
            self._kind = held.kind if isinstance(held, Adapted) else kind_of(self.module)
        return self._kind

    @property
    def module(self) -> nn.Module:
        """The base layer, without any wrapper."""
        if self._module is None:
            held = self.held
            while isinstance(held, Wrapper):
                held = held.base_layer
            self._module = held
        return self._module

    @property
    def held(self) -> nn.Module:
        return self.parent._modules[self.attr]  # type: ignore[return-value]

    @property
    def adapted(self) -> Adapted | None:
        return held if isinstance(held := self.held, Adapted) else None

    @property
    def key(self) -> tuple[int, str]:
        return (id(self.parent), self.attr)


def walk(model: nn.Module) -> Iterator[Place]:
    """All modules below `model`, by base path; goes through wrappers.

    A module made of several weights is followed by its parts (of a stand-in that is not installed yet), never by its
    children: it reads their weights raw, so wrapping them would do nothing.
    """
    yield from _children(model, "", "")


def _children(module: nn.Module, path: str, stem: str) -> Iterator[Place]:
    for attr, child in list(module._modules.items()):
        if child is None or isinstance(child, Slots):
            continue
        place = Place(f"{path}{attr}", module, attr, f"{stem}{attr}")
        yield place
        yield from _below(child, place)


def _below(child: nn.Module, place: Place) -> Iterator[Place]:
    if isinstance(child, Adapted):
        yield from _below(child.base_layer, place)
    elif isinstance(child, Composite):
        yield from parts(child, place)
    elif (kind := splitter_of(child)) is not None and (composite := kind.split(child)) is not None:
        yield from parts(composite, place)
    elif child._modules:
        yield from _children(child, place.path + ".", place.stem + ".")


def parts(composite: Composite, place: Place) -> Iterator[Place]:
    for name, part in composite.parts().items():
        path = f"{place.path}.{name}" if name else place.path
        stem = f"{place.stem}.{part.stem}" if part.stem else place.stem
        yield Place(path, part.parent, part.attr, stem, owner=place, composite=composite)


# -- matching -----------------------------------------------------------------------------------------------------------
def names(pattern: str, path: str) -> bool:
    """Whether a target name means this path: the whole path or its last components."""
    return path == pattern or path.endswith("." + pattern)


def matcher(patterns: Collection[str] | str | None) -> Callable[[str], bool]:
    """Whether a path is among the target names, or the regular expression fits all of it."""
    if not patterns:
        return lambda path: False
    if isinstance(patterns, str):
        fits = re.compile(patterns).fullmatch
        return lambda path: fits(path) is not None
    whole, ends = frozenset(patterns), tuple(f".{p}" for p in patterns)
    return lambda path: path in whole or path.endswith(ends)


def matches(patterns: Collection[str] | str | None, path: str) -> bool:
    return matcher(patterns)(path)


def for_path(patterns: dict[str, Any] | None, path: str, default: Any) -> Any:
    """The value of the first pattern (a name, path or regex) that matches a path, else the default.

    One matrix of a stack, `experts.down_proj[3]`, goes by the name of its stack.
    """
    if not patterns:
        return default
    path = path.partition("[")[0] if path.endswith("]") else path
    for pattern, value in patterns.items():
        if names(pattern, path) or re.fullmatch(rf"(.*\.)?(?:{pattern})", path):
            return value
    return default


def with_value(patterns: dict[str, Any] | None, path: str, default: Any, value: Any) -> dict[str, Any]:
    """`patterns` that give this path `value`: by its last name for all paths alike, by the path where that is taken."""
    patterns, leaf = dict(patterns or {}), rf".*\.{path.rpartition('.')[2]}"
    if for_path(patterns, path, default) == value:
        return patterns
    return {path: value, **patterns} if leaf in patterns else {**patterns, leaf: value}


def to_patterns(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(default, patterns) from which `for_path` gives each of these paths its value."""
    found = list(values.values())
    default = max(set(found), key=found.count)
    other = {p for p, v in values.items() if v != default}
    clash = {p for p in values if any(p.endswith(f".{o}") for o in other)}  # patterns match the ends of paths
    return default, {p: values[p] for p in sorted(other | clash, key=lambda p: -len(p))}


def in_layers(config: Any, path: str) -> bool:
    """`layers_to_transform`: the number that follows a layer list's name in the path."""
    wanted = getattr(config, "layers_to_transform", None)
    if wanted is None or wanted == []:
        return True
    pattern = getattr(config, "layers_pattern", None)
    lists = [pattern] if isinstance(pattern, str) else list(pattern or [])
    if lists:
        found = next((m for p in lists if (m := re.match(rf".*\.?{re.escape(p)}\.(\d+)\.", path + "."))), None)
    else:
        found = re.match(r".*?[^.]*\.(\d+)\.", path + ".")  # a block is in its own layer
    return found is not None and int(found.group(1)) in ([wanted] if isinstance(wanted, int) else wanted)


def shared_parameters(model: nn.Module) -> set[int]:
    """ids of parameters that more than one module holds (tied weights)."""
    count: Counter[int] = Counter()
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                count[id(p)] += 1
    return {i for i, n in count.items() if n > 1}


def shared_storages(model: nn.Module) -> set[int]:
    """Addresses of memory that more than one parameter lies in, tied or as views of one buffer."""
    count = Counter(
        p.untyped_storage().data_ptr()
        for m in model.modules()
        for p in m._parameters.values()
        if type(p) is nn.Parameter  # subclasses (quantised, sharded) may have no storage of their own
    )
    return {at for at, n in count.items() if n > 1}


def output_heads(model: nn.Module) -> set[str]:
    """Paths of the output embedding and of classification heads: what `all-linear` leaves alone."""
    heads = set()
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    for name, module in model.named_modules():
        if head is not None and (module is head or getattr(head, "base_layer", None) is module):
            heads.add(name.removesuffix(".base_layer"))
    return heads | {name for name, _ in model.named_children() if name in HEADS}


def input_embedding(model: nn.Module) -> str:
    """The name of the model's input embedding: short where it is the only module of that name."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        embedding = get() if callable(get) else None
    except (NotImplementedError, AttributeError):
        embedding = None
    paths = {p.path: p for p in walk(model)}
    path = next((n for n, p in paths.items() if embedding is not None and embedding in (p.held, p.module)), None)
    if path is None:
        return "embed_tokens"
    leaf = path.rpartition(".")[2]
    return leaf if sum(names(leaf, p) for p in paths) == 1 else path


def exactly(model: nn.Module, paths: Collection[str]) -> list[Place]:
    """The places of just these paths, in model order; paths that this model does not have are passed over."""

    def meant(p: Place | None) -> bool:
        return p is not None and (p.path in paths or p.stem in paths)

    places = list(walk(model))
    found = [p for p in places if not _composed(p) and (meant(p) or meant(p.owner))]
    if not found:
        _fail("target_modules", sorted(paths), places)
    return found


def find(model: nn.Module, config: Any, strict: bool = True) -> list[Place]:
    """The places that `config` targets, in model order. Raises before anything changes, naming what did not match.

    strict=False: names of which some match nothing give a warning.
    """
    places = list(walk(model))
    whole = list(getattr(config, "modules_to_save", None) or [])

    def inside_saved(path: str) -> bool:
        return bool(whole) and any(names(w, p) for w in whole for p in _prefixes(path))

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
        meant = matcher(targets)
        chosen = [
            p for p in places if (meant(p.path) or (p.owner is not None and meant(p.owner.path))) and not _composed(p)
        ]
        if not isinstance(targets, str):
            ends = {p.path.rpartition(".")[2] for p in chosen}  # nearly all names are last components
            unmatched = [t for t in targets or [] if t not in ends and not any(names(t, p.path) for p in places)]
            if unmatched and (strict or not chosen):
                _fail("target_modules", unmatched, places)
            elif unmatched:
                warnings.warn(
                    f"Target modules {', '.join(map(repr, unmatched))} not found in the base model.", stacklevel=4
                )
        if isinstance(targets, str) and not chosen and any(names(targets, p.path) for p in places):
            raise NoMatchingPeftModuleError(
                f"Target modules {targets!r} not found in the base model: a string is a regular expression for whole paths. "
                f"To target the modules of this name, write target_modules=[{targets!r}]."
            )
        if not chosen and targets:
            _fail("target_modules", [str(targets)], places)
    barred = matcher(excluded)
    kept = [p for p in chosen if not barred(p.path) and in_layers(config, p.path) and not inside_saved(p.path)]
    if chosen and not kept:
        why = "exclude_modules, layers_to_transform and modules_to_save leave none of them"
        raise NoMatchingPeftModuleError(f"target_modules={targets!r} matches {len(chosen)} modules, but {why}.")
    if excluded and not isinstance(excluded, str):
        unused = [e for e in excluded if not any(names(e, p.path) for p in places)]
        if unused:
            _fail("exclude_modules", unused, places)
    return kept


def _composed(place: Place) -> bool:
    """Whether the place stands for parts that follow it in the walk."""
    if isinstance(place.held, Composite) or place.owner is not None:
        return isinstance(place.held, Composite)
    kind = splitter_of(place.module)
    return kind is not None and kind.composes


def _matches_any(paths: set[str], path: str) -> bool:
    return any(path == h or path.startswith(h + ".") for h in paths)


def _prefixes(path: str) -> Iterator[str]:
    steps = path.split(".")
    return (".".join(steps[: i + 1]) for i in range(len(steps)))


def _fail(what: str, missing: list[str], places: list[Place]) -> None:
    leaves = list(dict.fromkeys(p.path.rsplit(".", 1)[-1] for p in places if not p.path.rsplit(".", 1)[-1].isdigit()))
    paths = [p.path for p in places]
    hints = "".join(near(m, leaves) or near(m, paths) for m in missing)
    raise NoMatchingPeftModuleError(
        f"Target modules {', '.join(map(repr, missing))} not found in the base model: {what} must name modules of it."
        f"{hints} Its modules are called: {', '.join(leaves[:40])}{' …' if len(leaves) > 40 else ''}."
    )


def short_names(model: nn.Module, chosen: list[Place]) -> list[str]:
    """Names that match just these places: the last component where all modules called so are among them."""
    paths = {p.path for p in chosen}
    other = {p.path.rpartition(".")[2] for p in walk(model) if p.path not in paths}
    leaves = {path: path.rpartition(".")[2] for path in paths}
    return sorted({p if leaf in other or leaf.isdigit() else leaf for p, leaf in leaves.items()})


def other_ends(model: nn.Module, places: list[Place]) -> list[Place]:
    """Further modules that hold the very weights of these: the other ends of tied weights."""
    weights = {id(w) for p in places if (w := p.module._parameters.get("weight")) is not None}
    have = {p.path for p in places}
    return [p for p in walk(model) if p.path not in have and id(p.module._parameters.get("weight")) in weights]


def find_whole(model: nn.Module, wanted: list[str], what: str) -> list[Place]:
    """Places of modules named for a special purpose (modules_to_save), each of which must exist."""
    places = [p for p in walk(model) if p.owner is None]
    missing = [w for w in wanted if not any(names(w, p.path) for p in places)]
    if missing:
        _fail(what, missing, places)
    return [p for p in places if any(names(w, p.path) for w in wanted)]
