"""Trained values at chosen positions of a module's own tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ...config import TunerConfig
from ...contract.method import Method
from ...contract.site import Site
from .copies import as_they_are, hang, put, take

K = TypeVar("K")
Entries = tuple[str, str]  # disk path of a method, name of a parameter there
TABLES = ("values", "indices")


class SparseCopies(Method):
    """P' = P with some entries replaced by trained values, kept as flat positions (fixed) and one number for each."""

    form = "replace"
    holder: ClassVar[str] = ""  # the attribute that holds the tree: <name>.values and <name>.indices

    def __init__(self, config: object, site: Site) -> None:
        super().__init__(config, site)
        self.shapes = {n: p.shape for n, p in site.parameters().items() if p.is_floating_point()}
        self.replaced_names = tuple(self.shapes)

    @classmethod
    def prepare(cls, config: TunerConfig, model: nn.Module) -> None:
        """All linear layers by default."""
        if config.names_no_target:
            config.target_modules = "all-linear"

    def make_room(self, share: float, device: torch.device, dtype: torch.dtype) -> None:
        """Entries for this share of each tensor, at least one."""
        hang(self, self.holder, {})
        for name, shape in self.shapes.items():
            count = max(1, round(share * shape.numel()))
            values = nn.Parameter(torch.empty(count, device=device, dtype=dtype))
            self.put_entries(name, values, torch.zeros(count, dtype=torch.int64, device=device))
        self.set(table=as_they_are(f"{self.holder}.{n}.{t}" for n in self.shapes for t in TABLES))

    def put_entries(self, name: str, values: nn.Parameter, indices: Tensor) -> None:
        put(getattr(self, self.holder), f"{name}.values", values)
        put(getattr(self, self.holder), f"{name}.indices", indices)

    def entries(self, name: str) -> tuple[Tensor, Tensor]:
        tree = getattr(self, self.holder)
        return take(tree, f"{name}.values"), take(tree, f"{name}.indices")

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
            if stored is None:
                continue
            values, indices = self.entries(name)
            if stored.shape != values.shape:
                new = nn.Parameter(values.new_empty(stored.shape), requires_grad=values.requires_grad)
                self.put_entries(name, new, indices.new_zeros(stored.shape))

    def stored(self, attr: str, tensor: Tensor) -> Tensor:
        small = attr.endswith(".indices") and all(s.numel() < 2**31 for s in self.shapes.values())
        return tensor.to(torch.int32) if small else tensor


def distinct(n: int, count: int, rng: torch.Generator) -> Tensor:
    """`count` different positions below n, in order."""
    if count * 4 > n:
        return torch.randperm(n, generator=rng)[:count].sort().values
    drawn = torch.empty(0, dtype=torch.int64)
    while len(drawn) < count:
        drawn = torch.cat([drawn, torch.randint(n, (2 * count,), generator=rng)]).unique()
    return drawn[torch.randperm(len(drawn), generator=rng)[:count]].sort().values


def top_entries(scores: Mapping[K, Tensor], share: float) -> dict[K, Tensor]:
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


def choose(
    methods: Mapping[str, SparseCopies],
    entries: Mapping[Entries, Tensor],
    start: Callable[[str], Mapping[str, Tensor]],
) -> dict[str, int]:
    """Let methods (by disk path) train these entries of their parameters, and tell how many those are, by path.

    start: the values, by parameter, from which the entries of the method at a path start.
    """
    found = dict.fromkeys(methods, 0)
    for path, method in methods.items():
        values = start(path)
        for name in method.shapes:
            at = entries[path, name]
            method.choose(name, at, values[name])
            found[path] += len(at)
    return found


def require_share(config: object, name: str, purpose: str) -> None:
    """Raise a clear error unless the field is a share of parameters: above 0, and at most 1."""
    value = getattr(config, name)
    if not 0 < value <= 1:
        raise ValueError(f"`{name}` is the share of parameters to {purpose}, in (0, 1]; got {value}.")
