"""Trained copies of a module's own tensors: what the selective methods hold.

A copy hangs in a tree of plain modules that mirrors the path of its original, so names with dots need no escaping and
a view of the tree looks like the module that it copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...contract.method import Method
from ...contract.site import Site
from ...contract.tensors import COPY, TensorTable
from ..anatomy.walk import Place


def put(tree: nn.Module, name: str, tensor: Tensor | None) -> None:
    """Hang a tensor at a dotted name: parameters as parameters, all else as buffers of the state."""
    *path, leaf = name.split(".")
    for step in path:
        below = tree._modules.get(step)
        if below is None:
            below = nn.Module()
            tree.add_module(step, below)
        tree = below
    if isinstance(tensor, nn.Parameter):
        tree.register_parameter(leaf, tensor)
    else:
        tree.register_buffer(leaf, tensor)


def hang(method: nn.Module, holder: str, tensors: Mapping[str, Tensor]) -> None:
    """Give a method the attribute `holder`, a tree of these tensors."""
    tree = nn.Module()
    for name, tensor in tensors.items():
        put(tree, name, tensor)
    method.add_module(holder, tree)


def as_they_are(paths: Iterable[str]) -> TensorTable:
    """The table of tensors whose keys are their attribute paths."""
    keys = {p: p for p in paths}
    return TensorTable(keys=keys, own=keys)


def take(tree: nn.Module, name: str) -> Tensor:
    return attrgetter(name)(tree)


def is_bias(name: str) -> bool:
    """Whether a parameter is an additive bias, by the names that PyTorch and transformers give it."""
    leaf = name.rpartition(".")[2]
    return leaf == "bias" or leaf.endswith("_bias") or leaf.startswith("bias_")


class Copies(Method):
    """P' = the trained copy of P. Subclasses say which tensors, and where the copies hang."""

    form = "replace"
    holder: ClassVar[str] = ""  # upstream's name of what holds the copies by adapter
    repeats: ClassVar[tuple[str, ...]] = ()  # starts of keys under which a file may hold the copies once more
    keep_state: ClassVar[bool] = True  # copy the buffers that belong to the state, too

    def __init__(self, config: object, site: Site) -> None:
        super().__init__(config, site)
        originals = {n: p for n, p in site.parameters().items() if p.is_floating_point()}
        copies: dict[str, Tensor] = {n: self.room(n, originals[n], site) for n in self.chosen(list(originals))}
        if self.keep_state:
            copies |= {n: b.detach().clone().to(site.device) for n, b in site.buffers().items()}
        hang(self, self.tree, copies)
        self.replaced_names = tuple(copies)
        keys = {f"{self.tree}.{n}": self.key(n) for n in self.replaced_names}
        self.set(table=TensorTable(keys=keys, own=keys, repeats=self.repeats))

    @property
    def tree(self) -> str:
        """The attribute that holds the copies."""
        return f"{self.holder}{COPY}"

    @classmethod
    def chosen(cls, names: list[str]) -> list[str]:
        """Which of the module's parameters to train."""
        return names

    def room(self, name: str, P: Tensor, site: Site) -> nn.Parameter:
        """The parameter that will hold the copy of P."""
        return site.empty(*P.shape)

    def key(self, name: str) -> str:
        return f"{self.holder}.{name}"

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        originals = site.parameters()
        for name in self.replaced_names:
            if name in originals:
                take(getattr(self, self.tree), name).copy_(originals[name])

    def replace(self, name: str, P: Tensor) -> Tensor:
        return take(getattr(self, self.tree), name)


def outermost(places: Iterable[Place]) -> list[Place]:
    """The places that stand in no other of them."""
    found: list[Place] = []
    for p in places:
        if not any(p.path == q.path or p.path.startswith(q.path + ".") for q in found):
            found.append(p)
    return found
