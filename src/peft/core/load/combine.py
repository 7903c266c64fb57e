"""A new adapter out of existing ones: `add_weighted_adapter`.

`cat` stacks the factors, A = [w₁s₁A₁; w₂s₂A₂; …], B = [B₁ B₂ …], so that B A = Σ wᵢ ΔWᵢ exactly; it is the default.
`svd` keeps the r largest singular directions of that sum. `linear` and the pruning types work on the factors
themselves, weighted by √|wᵢsᵢ| each, which brings cross terms BᵢAⱼ with it; with the ending `_svd` they work on
the dense ΔWᵢ instead. TIES: arXiv 2306.01708; DARE: arXiv 2311.03099.

Token rows become W[i] + Σ wᵢ (δᵢ − W[i]) over the union of the indices, whatever is done with the factors.

Methods meet this file by `TwoFactors` (two thin factors), or `Blends` (effects linear in the
parameters).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...config import PeftConfig, TunerConfig
from ...contract.capabilities import Blends, Companion, TwoFactors
from ...contract.method import Method
from ...errors import Refusal, near
from ...registry import companions, method
from ..acting.on_model import roster_of
from ..acting.roster import Adapter, Roster
from ..anatomy.targets import find
from ..anatomy.walk import walk
from ..injection.commit import commit
from ..injection.plan import check_name, plan

Pairs = list[tuple[Tensor, Tensor, float, float]]  # (A, B, s, w) of each adapter at one site


def add_weighted_adapter(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str | None = None,
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> None:
    """Put a new, frozen adapter into the model that combines others; it does not act until it is activated.

    combination_type: None is `cat` for factored deltas (the exact sum; upstream's default is `svd`) and `linear` for
    methods that scale. svd_rank: rank of the result (the largest source rank). svd_clamp: quantile to clamp at.
    density: share of entries that the pruning types keep. majority_sign_method: `total` or `frequency`, for TIES.

    Raises Refusal where the sum is no adapter of the sources' method; the model is then as it was.
    """
    roster = roster_of(model)
    if roster is None:
        raise ValueError("This model has no adapters to combine.")
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"Expected one weight per adapter, got {len(adapters)} adapters and {len(weights)} weights.")
    if unknown := [n for n in adapters if n not in roster.adapters]:
        raise ValueError(
            f"Adapter {unknown[0]} does not exist: {unknown[0]!r} is not loaded. Loaded: {sorted(roster.adapters)}."
            f"{near(unknown[0], roster.adapters)}"
        )
    check_name(roster, adapter_name)
    kind, svd = _kind(combination_type, density, majority_sign_method)
    classes = {roster.configs[n].own_type for n in adapters}
    if len(classes) > 1:
        raise Refusal(
            " and ".join(sorted(classes)),
            "a combination",
            "the sum of deltas of different methods is an adapter of neither; activate them together instead",
        )
    sources = [(roster.adapters[n], float(w)) for n, w in zip(adapters, weights)]
    sites = _by_disk_path(sources)
    config = copy.deepcopy(roster.configs[adapters[0]])
    paths = {p.disk_path: p.path for p in walk(model)}
    mix = _merger(kind, density, majority_sign_method)
    fill: dict[str, Callable[[Method], None]] = {}
    written: dict[int, Tensor] = {}
    ranks: dict[str, int] = {}
    every = {
        id(m): m.two_factors() if isinstance(m, TwoFactors) else None for found in sites.values() for m, _ in found
    }
    largest_rank = max((p[0].shape[0] for p in every.values() if p is not None), default=0)
    for disk_path, found in sites.items():
        pairs = [every[id(m)] for m, _ in found]
        if all(p is not None for p in pairs):
            group: Pairs = [(*p, w) for p, (_, w) in zip(pairs, found)]  # type: ignore[misc]
            with torch.no_grad():
                A, B = (
                    _svd(group, mix, svd_rank or largest_rank, svd_clamp, svd_full_matrices, svd_driver)
                    if svd
                    else mix(group, disk_path)
                )
            ranks[paths[disk_path]] = A.shape[0]
            fill[disk_path] = _holder(A, B, _bias(found))
        elif combination_type in (None, "linear") and isinstance(found[0][0], Blends):
            fill[disk_path] = functools.partial(_blend, found, disk_path, written)
        else:
            m = found[[p is None for p in pairs].index(True)][0]
            if isinstance(m, Blends):
                raise Refusal(
                    str(m.peft_type), f"combination_type={combination_type!r}", "its adapters are summed: 'linear'"
                )
            raise Refusal(
                str(m.peft_type),
                f"{disk_path} (a combination)",
                "a weighted sum of its effects is not an adapter of this form; activate the adapters together, or merge them",
            )
    if ranks:
        cls = method(config.peft_type)
        assert issubclass(cls, TwoFactors)
        config = cls.config_for_ranks(config, ranks)
    assert isinstance(config, TunerConfig)
    configs = [roster.configs[n] for n in adapters]
    if issubclass(own := method(config.peft_type), Blends):
        own.widen(config, configs, model)
    for name, companion in companions().items():
        if asking := [c for c in configs if getattr(c, name, None) not in (None, "none", [], {})]:
            assert issubclass(companion, Companion)
            companion.bring_all(config, asking, model)
    _target(model, config, configs, {paths[s] for s in sites})
    config.inference_mode = True
    dtypes = {p.dtype for a, _ in sources for p in a.parameters()}
    planned = plan(
        model, config, adapter_name, init=False, autocast_adapter_dtype=torch.float32 in dtypes or len(dtypes) > 1
    )
    others = _companions(roster, adapters)
    for item in planned.items:
        assert item.place is not None and item.method is not None
        if not item.brought_by:
            if item.place.disk_path not in fill:
                raise Refusal(
                    config.own_type,
                    f"{item.place.disk_path} (a combination)",
                    "add_weighted_adapter does not support targeting nn.Parameter in one adapter and its module in "
                    "another; activate the adapters together, or merge them",
                )
            fill.pop(item.place.disk_path)(item.method)
        else:
            _carry(
                item.method,
                item.place.disk_path,
                item.brought_by,
                others.pop((item.place.disk_path, type(item.method)), []),
                sources,
                written,
            )
    if fill:
        raise ValueError(f"The combined config does not reach {', '.join(list(fill)[:5])}.")
    for disk_path, left in others:
        assert issubclass(left, Companion)
        raise Refusal(left.companion, f"{disk_path} (a combination)", "the combined config would not bring it along")
    commit(model, planned)


def _kind(combination_type: str | None, density: float | None, sign: str) -> tuple[str, bool]:
    """(what is done, whether on dense deltas)."""
    name = combination_type or "cat"
    known = ("cat", "svd", *(k + e for k in MERGERS for e in ("", "_svd") if k + e != "linear_svd"))
    if name not in known:
        raise ValueError(f"Invalid combination_type: {name!r}. Expected one of: {', '.join(known)}.{near(name, known)}")
    kind = "linear" if name == "svd" else name.removesuffix("_svd")
    if kind not in ("cat", "linear") and (density is None or not 0 <= density <= 1):
        raise ValueError(f"combination_type={name!r} needs a density between 0 and 1, got {density!r}.")
    if sign not in ("total", "frequency"):
        raise ValueError(f"majority_sign_method should be 'total' or 'frequency', got {sign!r}.")
    return kind, name.endswith("svd")


def _by_disk_path(sources: list[tuple[Adapter, float]]) -> dict[str, list[tuple[Method, float]]]:
    """The adapters' own methods at each place, in the order of the first that is there."""
    sites: dict[str, list[tuple[Method, float]]] = {}
    for adapter, w in sources:
        for disk_path, m in adapter.own():
            sites.setdefault(disk_path, []).append((m, w))
    return sites


def _target(model: nn.Module, config: TunerConfig, configs: list[PeftConfig], wanted: set[str]) -> None:
    """Let `config` reach what any of the sources reaches: their names joined where that suffices, else full paths."""
    for f in dataclasses.fields(config):
        if f.name.endswith(("_modules", "_parameters")) and f.name != "exclude_modules":
            values = [getattr(c, f.name) for c in configs]
            if all(isinstance(v, (list, tuple, set)) for v in values):
                setattr(config, f.name, list(dict.fromkeys(x for v in values for x in v)))
    if getattr(config, "target_parameters", None) or {p.path for p in find(model, config)} == wanted:
        return
    config.target_modules = sorted(wanted)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None


# -- the arithmetic -------------------------------------------------------------------------------------------------------
def linear(tensors: list[Tensor], weights: list[float]) -> Tensor:
    return torch.stack([w * t for t, w in zip(tensors, weights)]).sum(0)


def largest(t: Tensor, density: float) -> Tensor:
    """The entries of largest magnitude, a share `density` of them; the others 0."""
    k = int(density * t.numel())
    flat = t.reshape(-1)
    keep = flat.abs().topk(k).indices
    return torch.zeros_like(flat).scatter(0, keep, flat[keep]).reshape(t.shape)


def dropped(t: Tensor, density: float) -> Tensor:
    """Each entry kept with probability `density` and divided by it."""
    return t * torch.bernoulli(torch.full_like(t, density)) / density if density else torch.zeros_like(t)


def elected(tensors: list[Tensor], weights: list[float], sign: str) -> Tensor:
    """TIES: each entry's mean over the adapters that agree with its elected sign."""
    stack = torch.stack(tensors)
    votes = (stack if sign == "total" else stack.sign()).sum(0)
    agree = stack.sign() == torch.where(votes >= 0, 1.0, -1.0)
    scaled = stack * torch.tensor(weights, dtype=stack.dtype, device=stack.device).view(-1, *[1] * tensors[0].dim())
    return (scaled * agree).sum(0) / agree.sum(0).clamp(min=1)


MERGERS: dict[str, Callable[..., Tensor]] = {
    "linear": lambda t, w, d, s: linear(t, w),
    "magnitude_prune": lambda t, w, d, s: linear([largest(x, d) for x in t], w),
    "ties": lambda t, w, d, s: elected([largest(x, d) for x in t], w, s),
    "dare_linear": lambda t, w, d, s: linear([dropped(x, d) for x in t], w),
    "dare_ties": lambda t, w, d, s: elected([dropped(x, d) for x in t], w, s),
}


def _merger(kind: str, density: float | None, sign: str) -> Any:
    """How the factors at one site become (A, B), or with dense=True their deltas one ΔW."""

    def run(group: Pairs, where: str, dense: bool = False) -> Any:
        if kind == "cat":
            return torch.cat([w * s * A for A, _, s, w in group]), torch.cat([B for _, B, _, _ in group], 1)
        if dense:
            return MERGERS[kind]([s * B @ A for A, B, s, _ in group], [w for *_, w in group], density, sign)
        if len({A.shape[0] for A, *_ in group}) > 1:
            raise Refusal(
                kind,
                where,
                f"All adapters must have the same r value, but factors of ranks {[A.shape[0] for A, *_ in group]} do not add: use 'cat' (exact) or a type ending in 'svd'",
            )
        root = [math.sqrt(abs(w * s)) for _, _, s, w in group]
        signed = [math.copysign(r, w * s) for r, (_, _, s, w) in zip(root, group)]
        return (
            MERGERS[kind]([A for A, *_ in group], signed, density, sign),
            MERGERS[kind]([B for _, B, *_ in group], root, density, sign),
        )

    return run


def _svd(
    group: Pairs, mix: Any, rank: int, clamp: float | None, full: bool, driver: str | None
) -> tuple[Tensor, Tensor]:
    """The `rank` largest singular directions of the combined ΔW: A = Vᵀ, B = U Σ."""
    delta = mix(group, "", dense=True)
    r = min(rank, *delta.shape)
    wide = delta if delta.dtype == torch.float64 else delta.float()
    U, S, Vh = torch.linalg.svd(wide, full_matrices=full, driver=driver)
    A, B = Vh[:r], U[:, :r] * S[:r]
    if clamp is not None:
        high = torch.quantile(torch.cat([B.reshape(-1), A.reshape(-1)]), clamp)
        A, B = A.clamp(-high, high), B.clamp(-high, high)
    return A, B


def _bias(found: list[tuple[Method, float]]) -> Tensor | None:
    changes = [(c, w) for m, w in found if (c := m.bias_change()) is not None]
    return linear([c.detach() for c, _ in changes], [w for _, w in changes]) if changes else None


def _blend(found: list[tuple[Any, float]], disk_path: str, written: dict[int, Tensor], m: Method) -> None:
    """Give the new adapter's method the weighted sum, unless the other end of a tied weight has got another one."""
    assert isinstance(m, Blends)
    with torch.no_grad():
        state = m.blend([x for x, _ in found], [w for _, w in found])
    for attr, value in state.items():
        if not torch.equal(written.setdefault(id(m.get_parameter(attr)), value), value):
            raise Refusal(
                str(m.peft_type) or "trainable_token_indices",
                f"{disk_path} (a combination)",
                "the sums at the ends of a tied weight differ, and the new adapter has one set for them",
            )
    _writer(state)(m)


# -- filling the new adapter ------------------------------------------------------------------------------------------------
def _holder(A: Tensor, B: Tensor, bias: Tensor | None) -> Callable[[Method], None]:
    def hold(m: Method) -> None:
        assert isinstance(m, TwoFactors)
        m.set_factors(A, B, bias)

    return hold


def _writer(state: dict[str, Tensor]) -> Callable[[Method], None]:
    def write(m: Method) -> None:
        with torch.no_grad():
            for attr, value in state.items():
                m.get_parameter(attr).copy_(value)

    return write


def _companions(roster: Roster, names: Sequence[str]) -> dict[tuple[str, type[Method]], list[int]]:
    """(place, class) -> which of the adapters bring a companion (a head trained whole, …) there."""
    found: dict[tuple[str, type[Method]], list[int]] = {}
    for i, name in enumerate(names):
        for disk_path, m in roster.adapters[name].brought():
            found.setdefault((disk_path, type(m)), []).append(i)
    return found


def _carry(
    m: Method,
    disk_path: str,
    brought_by: str,
    which: list[int],
    sources: list[tuple[Adapter, float]],
    written: dict[int, Tensor],
) -> None:
    """A companion's weights: summed where its effect is linear, else taken from the one adapter that has it."""
    found = [
        (x, sources[i][1]) for i in which for s, x in sources[i][0].methods if s == disk_path and type(x) is type(m)
    ]
    if isinstance(m, Blends):
        return _blend(found, disk_path, written, m)
    if len(found) != 1:
        raise Refusal(
            brought_by,
            f"{disk_path} (a combination)",
            f"Cannot add weighted adapters: {len(found)} of the adapters bring it, and copies trained whole have no sum",
        )
    _writer(dict(found[0][0].named_parameters()))(m)
