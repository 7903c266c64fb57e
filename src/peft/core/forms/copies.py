"""Trained copies of a module's own tensors: what the selective methods hold.

A copy hangs in a tree of plain modules that mirrors the path of its original, so names with dots need no escaping and
a view of the tree looks like the module that it copies.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...contract.method import Method
from ...contract.site import Site
from ...contract.tensors import TensorTable
from ..anatomy.walk import Place


def put(tree: nn.Module, name: str, tensor: Tensor | None) -> None:
    """Hang a tensor at a dotted name: parameters as parameters, all else as buffers of the state."""
    *path, leaf = name.split(".")
    for step in path:
        if step not in tree._modules:
            tree.add_module(step, nn.Module())
        tree = tree._modules[step]  # type: ignore[assignment]
    if isinstance(tensor, nn.Parameter):
        tree.register_parameter(leaf, tensor)
    else:
        tree.register_buffer(leaf, tensor)


def take(tree: nn.Module, name: str) -> Tensor:
    return attrgetter(name)(tree)


def is_bias(name: str) -> bool:
    """Whether a parameter is an additive bias, by the names that PyTorch and transformers give it."""
    leaf = name.rpartition(".")[2]
    return leaf == "bias" or leaf.endswith("_bias") or leaf.startswith("bias_")


class Copies(Method):
    """P' = the trained copy of P. Subclasses say which tensors, and where the copies hang."""

    form = "replace"
    holder: ClassVar[str] = ""  # the attribute that holds the tree
    repeats: ClassVar[tuple[str, ...]] = ()  # starts of keys under which a file may hold the copies once more
    keep_state: ClassVar[bool] = True  # copy the buffers that belong to the state, too

    def __init__(self, config: Any, site: Site) -> None:
        super().__init__(config, site)
        tree = nn.Module()
        originals = {n: p for n, p in site.parameters().items() if p.is_floating_point()}
        shapes = {n: originals[n] for n in self.chosen(list(originals))}
        for name, p in shapes.items():
            put(tree, name, self.room(name, p, config, site))
        state = site.buffers() if self.keep_state else {}
        for name, b in state.items():
            put(tree, name, b.detach().clone().to(site.device))
        self.add_module(self.holder, tree)
        self.replaced_names = (*shapes, *state)
        keys = {f"{self.holder}.{n}": self.key(n) for n in self.replaced_names}
        self.set(table=TensorTable(keys=keys, own=keys, repeats=self.repeats))

    @classmethod
    def chosen(cls, names: list[str]) -> list[str]:
        """Which of the module's parameters to train."""
        return names

    def room(self, name: str, P: Tensor, config: Any, site: Site) -> nn.Parameter:
        """The parameter that will hold the copy of P."""
        return site.empty(*P.shape)

    def key(self, name: str) -> str:
        return f"{self.holder}.{name}"

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        originals = site.parameters()
        for name in self.replaced_names:
            if name in originals:
                take(getattr(self, self.holder), name).copy_(originals[name])

    def replace(self, name: str, P: Tensor) -> Tensor:
        return take(getattr(self, self.holder), name)


def outermost(places: Iterable[Place]) -> list[Place]:
    """The places that stand in no other of them."""
    found: list[Place] = []
    for p in places:
        if not any(p.path == q.path or p.path.startswith(q.path + ".") for q in found):
            found.append(p)
    return found
