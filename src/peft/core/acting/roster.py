"""The adapters of a model and which of them act: one object shared by all adapted layers.

Switching replaces one immutable `Mix`; no module is visited. A forward reads the mix once per layer. What a context
changes for a call lies over the model's own mix (`calls`): a switch that is made inside it is the model's, shows to all
others at once, and in that call when the context closes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from operator import getitem
from typing import Any, TypeAlias

from torch import nn

from ...config import PeftConfig
from ...contract.capabilities import Exclusive
from ...contract.method import Method
from ...contract.tree import Composite
from ...errors import near
from .mix import BASE, Mix
from .recompute import Recompute

Table: TypeAlias = dict[str, nn.Parameter | None]  # the parameters that a module holds itself, by name


def entries(module: nn.Module, prefix: str = "") -> list[tuple[str, Table, str]]:
    """(dotted name, table that holds it, its name there) of the floating parameters of a module."""
    table = module._parameters
    found = [
        (prefix + leaf, table, leaf)
        for leaf, p in table.items()
        if p is not None and (p.is_floating_point() or p.is_complex())
    ]
    for name, child in module._modules.items():
        if child is not None:
            found += entries(child, f"{prefix}{name}.")
    return found


@dataclass
class Adapter:
    """What one adapter name stands for: its config and the methods it put into the model, by path."""

    config: PeftConfig
    methods: list[tuple[str, Method]] = field(default_factory=list)  # (disk path below the base model, method)
    # "" for the config's own method, else the field that brought it
    brought_by: list[str] = field(default_factory=list)
    shared: dict[str, nn.Parameter] = field(default_factory=dict)
    targeted: list[str] = field(default_factory=list)
    padded: bool = False  # its methods are padded twins, for swaps that recompile nothing: core/load/hotswap.py
    _leaves: tuple[list[Table], list[str]] = field(default_factory=lambda: ([], []))
    walked: int = 0  # how many methods `_leaves` knows
    _alone: list[tuple[str, frozenset[object]]] = field(default_factory=list)
    searched: int = 0  # how many methods `_alone` knows

    @property
    def whole_model(self) -> bool:
        """Whether its method hangs at the whole model, not in layers."""
        return any(m.form == "prompt" for _, m in self.methods[:1])

    def leaves(self) -> tuple[list[Table], list[str]]:
        """Table and name of each parameter that trains when the adapter does; walked once, so that switching need not.

        The table and not the parameter: loading and moving a model may put another parameter there.
        """
        if self.walked != len(self.methods):
            found: list[tuple[Table, str]] = []
            for _, method in self.methods:
                frozen = method.table.frozen
                found += [(table, leaf) for attr, table, leaf in entries(method) if attr not in frozen]
            self._leaves = [table for table, _ in found], [leaf for _, leaf in found]
            self.walked = len(self.methods)
        return self._leaves

    def train(self, on: bool) -> None:
        tables, leaves = self.leaves()
        parameters = map(getitem, tables, leaves)
        deque(map(setattr, parameters, repeat("requires_grad"), repeat(on)), maxlen=0)  # the whole loop in C

    def own(self) -> Iterator[tuple[str, Method]]:
        """The methods that the config is about, without companions (heads, biases, token rows trained along)."""
        return (entry for entry, part in zip(self.methods, self.brought_by, strict=True) if not part)

    def brought(self) -> Iterator[tuple[str, Method]]:
        """The companions."""
        return (entry for entry, part in zip(self.methods, self.brought_by, strict=True) if part)

    def held_alone(self) -> list[tuple[str, frozenset[object]]]:
        """(disk path, what there) of all that cannot act together with another adapter's; found once."""
        if self.searched != len(self.methods):
            self._alone = [(p, m.held_alone()) for p, m in self.methods if isinstance(m, Exclusive)]
            self.searched = len(self.methods)
        return self._alone

    def drop(self, methods: Sequence[Method]) -> int:
        """Strike methods off the record; returns how many are left."""
        gone = {id(m) for m in methods}
        kept = [(e, p) for e, p in zip(self.methods, self.brought_by, strict=True) if id(e[1]) not in gone]
        own = [id(m) not in gone for _, m in self.own()]
        self.targeted = [path for path, stays in zip(self.targeted, own, strict=True) if stays]
        self.methods, self.brought_by = [e for e, _ in kept], [p for _, p in kept]
        return len(kept)

    def parameters(self) -> Iterator[nn.Parameter]:
        seen: set[int] = set()
        for _, method in self.methods:
            for p in method.parameters():
                if id(p) not in seen:
                    seen.add(id(p))
                    yield p


class Configs(dict[str, PeftConfig]):
    """The configs by adapter, as `peft_config` shows them.

    Libraries end by popping a name here when they took an adapter out of each layer, or when loading it failed halfway:
    the name is free then, and one that never came to be is no error, which would hide why.
    """

    def __init__(self, roster: Roster) -> None:
        super().__init__()
        self.roster = roster

    def pop(self, name: str, default: Any = None) -> Any:
        config = super().pop(name, default)
        self.roster.forget(name, everywhere=False)
        return config


class Roster(Recompute):
    """The adapters of one model: the mix that acts and the record of each name."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen: tuple[str, ...] = ()  # what acts when nothing is disabled
        self.asked: tuple[str, ...] = ()  # what was asked for: layer by layer, that may name adapters of other models
        self.adapters: dict[str, Adapter] = {}
        self.training: set[str] = set()  # the names of those that train
        self.uneven = False  # a layer was told by itself what trains there
        self.forgotten: set[str] = set()  # names that are free, though layers may still hold something under them
        self.configs: dict[str, PeftConfig] = Configs(self)  # the same configs, as `peft_config` shows them
        self.composites: dict[str, Composite] = {}  # disk path -> stand-in that translates its parts' keys
        self.unmerged: tuple[str, ...] | None = None  # what stands for merged weights while a call has the bare base
        self.paused = 0  # how many such calls there are
        self.off_by_layer = object()  # layers that hold this very object are switched off by themselves
        self.exact = False  # adapters compute in their parameters' dtype, not in the layer's
        self.merged_at: set[str] = set()  # the paths of layers into which adapters are merged
        self.untied = False  # a merge had to untie the word embeddings

    @property
    def placed(self) -> bool:
        """Whether an adapter hangs in layers, not only at the whole model."""
        return any(a.methods and not a.whole_model for a in self.adapters.values())

    def known(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.adapters and name != BASE:
                raise ValueError(
                    f"Adapter {name} not found: {name!r} is not loaded. Loaded: {sorted(self.adapters) or 'none'}."
                    f"{near(name, self.adapters)}"
                )

    def activate(self, names: Sequence[str]) -> None:
        """Make these adapters act, in this order. O(1) in the number of layers."""
        self.known(names)
        self.activate_present(names)

    def activate_present(self, names: Sequence[str]) -> None:
        """The same for names of which some may be adapters of another part of a pipeline."""
        self.require_apart(names)
        self.asked = tuple(dict.fromkeys(names))
        self.chosen = tuple(n for n in self.asked if n in self.adapters or n == BASE)
        self.switch()

    def require_apart(self, names: Sequence[str]) -> None:
        """Raise ValueError where two of these adapters replace the same: whole modules, or the same token rows."""
        held: dict[tuple[str, object], str] = {}
        for name in dict.fromkeys(names) if len(names) > 1 else ():
            for path, there in self.adapters[name].held_alone() if name in self.adapters else ():
                for what in there:
                    first = held.setdefault((path, what), name)
                    if first != name:
                        raise ValueError(
                            f"Only one adapter can be set at a time here: {first!r} and {name!r} both train {what} of "
                            f"{path} whole, and the sum of two copies is neither. Activate one of them."
                        )

    def enable(self, enabled: bool) -> None:
        """For the model as a whole: layers that were switched off by themselves are as all others again."""
        self.own_enabled = enabled
        self.off_by_layer = object()
        self.chosen = tuple([*self.chosen])  # another object: what layers remember is of those that were on
        self.switch()

    def switch(self) -> None:
        """Let what is chosen act; while a call has the bare base of a merged model, what was merged."""
        self.own = Mix(self.chosen if self.unmerged is None else self.unmerged) if self.own_enabled else Mix()

    def trains_only(self, names: Sequence[str], inference_mode: bool = False) -> bool:
        """Whether exactly these are chosen, and train (or, with inference_mode, none does)."""
        wanted = set() if inference_mode else {n for n in names if n in self.adapters}
        return self.asked == tuple(dict.fromkeys(names)) and self.training == wanted and not self.uneven

    def forget(self, name: str, everywhere: bool = True) -> None:
        """The name is free, and where the adapter acted alone, the first of the others acts. everywhere: no layer holds
        anything of it any more."""
        if name not in self.adapters:
            return
        if not everywhere:
            self.forgotten.add(name)
        del self.adapters[name]
        self.training.discard(name)
        dict.pop(self.configs, name, None)
        if self.unmerged is not None:
            self.unmerged = tuple(n for n in self.unmerged if n != name)
            self.switch()
        if name in self.asked:
            self.activate_present([n for n in self.asked if n != name] or list(self.adapters)[:1])

    def released(self, name: str, methods: Sequence[Method]) -> None:
        """A layer let go of an adapter's methods; with the last of them the name is free."""
        if name in self.adapters and not self.adapters[name].drop(methods):
            self.forget(name)

    def train_only(self, names: Sequence[str], inference_mode: bool = False) -> None:
        """Let the named adapters train and freeze the others."""
        self.known(names)
        wanted = set() if inference_mode else set(names)
        self.uneven = False
        for name in (*self.training.difference(wanted), *wanted):
            if name != BASE:
                self.set_trainable(name, name in wanted)

    def set_trainable(self, name: str, trainable: bool) -> None:
        adapter = self.adapters[name]
        (self.training.add if trainable else self.training.discard)(name)
        try:
            adapter.train(trainable)
        except (KeyError, TypeError):  # something took parameters out of their modules (FSDP's flat ones): look again
            adapter.walked = 0
            adapter.train(trainable)
