"""Trained copies of a module's own tensors: what the selective methods hold.

A copy hangs in a tree of plain modules that mirrors the path of its original, so names with dots need no escaping and
a view of the tree looks like the module that it copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .adapted import adapted_layers
from .method import Method, Site
from .targets import Place


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
        self.keys = {f"{self.holder}.{n}": self.key(n) for n in self.replaced_names}  # type: ignore[misc]

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


class SparseCopies(Method):
    """P' = P with some entries replaced by trained values, kept as flat positions (fixed) and one number for each."""

    form = "replace"
    holder: ClassVar[str] = ""  # the attribute that holds the tree: <name>.values and <name>.indices

    def __init__(self, config: Any, site: Site) -> None:
        super().__init__(config, site)
        self.shapes = {n: p.shape for n, p in site.parameters().items() if p.is_floating_point()}
        self.replaced_names = tuple(self.shapes)

    def make_room(self, share: float, device: torch.device, dtype: torch.dtype) -> None:
        """Entries for this share of each tensor, at least one."""
        self.add_module(self.holder, nn.Module())
        for name, shape in self.shapes.items():
            count = max(1, round(share * shape.numel()))
            values = nn.Parameter(torch.empty(count, device=device, dtype=dtype))
            self.put_entries(name, values, torch.zeros(count, dtype=torch.int64, device=device))
        self.keys = {f"{self.holder}.{n}.{t}": f"{self.holder}.{n}.{t}" for n in self.shapes for t in TABLES}  # type: ignore[misc]

    def put_entries(self, name: str, values: nn.Parameter, indices: Tensor) -> None:
        put(getattr(self, self.holder), f"{name}.values", values)
        put(getattr(self, self.holder), f"{name}.indices", indices)

    def entries(self, name: str) -> tuple[nn.Parameter, Tensor]:
        tree = getattr(self, self.holder)
        return take(tree, f"{name}.values"), take(tree, f"{name}.indices")  # type: ignore[return-value]

    def choose(self, name: str, indices: Tensor, P: Tensor) -> None:
        """Take other entries: these positions, starting from P's values there."""
        old, _ = self.entries(name)
        indices = indices.to(old.device)
        values = P.detach().flatten().to(old.device, old.dtype)[indices]
        self.put_entries(name, nn.Parameter(values, requires_grad=old.requires_grad), indices)

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        """Random positions, P's own values."""
        for name, P in site.parameters().items():
            if name in self.shapes:
                values, indices = self.entries(name)
                indices.copy_(distinct(P.numel(), len(indices), rng))
                values.copy_(P.flatten()[indices.to(P.device)])

    def replace(self, name: str, P: Tensor) -> Tensor:
        values, indices = self.entries(name)
        return P.flatten().scatter(0, indices, values.to(P.dtype)).view(P.shape)

    def resize(self, state: dict[str, Tensor]) -> None:
        """A file may hold more or fewer entries of a tensor: the share is taken of all tensors together."""
        for name in self.shapes:
            stored = state.get(f"{self.holder}.{name}.values")
            values, indices = self.entries(name)
            if stored is not None and stored.shape != values.shape:
                new = nn.Parameter(values.new_empty(stored.shape), requires_grad=values.requires_grad)
                self.put_entries(name, new, indices.new_zeros(stored.shape))

    def stored(self, attr: str, tensor: Tensor) -> Tensor:
        small = attr.endswith(".indices") and all(s.numel() < 2**31 for s in self.shapes.values())
        return tensor.to(torch.int32) if small else tensor


TABLES = ("values", "indices")


def distinct(n: int, count: int, rng: torch.Generator) -> Tensor:
    """`count` different positions below n, in order."""
    if count * 4 > n:
        return torch.randperm(n, generator=rng)[:count].sort().values
    drawn = torch.empty(0, dtype=torch.int64)
    while len(drawn) < count:
        drawn = torch.cat([drawn, torch.randint(n, (2 * count,), generator=rng)]).unique()
    return drawn[torch.randperm(len(drawn), generator=rng)[:count]].sort().values


def top_entries(scores: dict[Any, Tensor], share: float) -> dict[Any, Tensor]:
    """The positions of the largest `share` of all entries together, by tensor; each tensor keeps its largest one.

    Ties are broken by position, so that exactly the share is taken (and the forced ones).
    """
    flat = torch.cat([s.flatten().float().cpu() for s in scores.values()])
    count = max(1, round(share * flat.numel()))
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.topk(count).indices] = True
    out, at = {}, 0
    for key, s in scores.items():
        mine = chosen[at : at + s.numel()]
        if not mine.any():
            mine[s.flatten().argmax()] = True
        out[key] = mine.nonzero().flatten()
        at += s.numel()
    return out


def examples_of(batch: Any) -> Iterator[Any]:
    """The examples of a batch (a tensor, or a dict or tuple of tensors), each as a batch of one."""
    if torch.is_tensor(batch):
        yield from batch.split(1)
    elif hasattr(batch, "items"):
        first = next(v for v in batch.values() if torch.is_tensor(v))
        for i in range(len(first)):
            yield {k: v[i : i + 1] if torch.is_tensor(v) else v for k, v in batch.items()}
    else:
        first = next(v for v in batch if torch.is_tensor(v))
        for i in range(len(first)):
            yield tuple(v[i : i + 1] if torch.is_tensor(v) else v for v in batch)


def originals(model: nn.Module) -> dict[Method, Callable[[], dict[str, Tensor]]]:
    """For every method in a model: its module's own parameters, as the base has them."""
    return {
        m: (lambda layer=layer: layer.kind.parameters(layer.base_layer))  # type: ignore[misc]
        for layer in adapted_layers(model)
        for methods in layer.methods.values()
        for m in methods
    }
