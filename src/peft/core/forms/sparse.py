"""Trained values at chosen positions of a module's own tensors."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...contract.method import Method
from ...contract.site import Site
from ...contract.tensors import TensorTable
from .copies import put, take


class SparseCopies(Method):
    """P' = P with some entries replaced by trained values, kept as flat positions (fixed) and one number for each."""

    form = "replace"
    holder: ClassVar[str] = ""  # the attribute that holds the tree: <name>.values and <name>.indices

    def __init__(self, config: Any, site: Site) -> None:
        super().__init__(config, site)
        self.shapes = {n: p.shape for n, p in site.parameters().items() if p.is_floating_point()}
        self.replaced_names = tuple(self.shapes)

    @classmethod
    def prepare(cls, config: Any, model: nn.Module) -> None:
        """All linear layers by default."""
        if config.target_modules is None and not config.target_parameters:
            config.target_modules = "all-linear"

    def make_room(self, share: float, device: torch.device, dtype: torch.dtype) -> None:
        """Entries for this share of each tensor, at least one."""
        self.add_module(self.holder, nn.Module())
        for name, shape in self.shapes.items():
            count = max(1, round(share * shape.numel()))
            values = nn.Parameter(torch.empty(count, device=device, dtype=dtype))
            self.put_entries(name, values, torch.zeros(count, dtype=torch.int64, device=device))
        keys = {k: k for n in self.shapes for k in (f"{self.holder}.{n}.{t}" for t in TABLES)}
        self.set(table=TensorTable(keys=keys, own=keys))

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
