"""Weights that somebody manages: read whole, and written so that they stay.

FSDP 2 and tensor parallelism keep a piece of each tensor in every process (a DTensor). FSDP 2 lays out whole ones for a
forward and drops them some time later, with all that was written into them. ZeRO-3 leaves empty placeholders outside of a
forward. FSDP 1 keeps views of one flat tensor, of which a process has a part. What accelerate's hooks bring in is in
`offload`. Reading and writing pieces is collective: every process makes the same calls in the same order.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from . import offload
from .tree import tree

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_MADE = ("torch.distributed.", "torch.nn.utils.")  # where the classes are made that others put in front of a module's
Table = dict[str, nn.Parameter | None]


M = TypeVar("M", bound=nn.Module)


# -- what a tensor is --------------------------------------------------------------------------------------------------
def split(t: Tensor) -> TypeGuard[DTensor]:
    """Whether each process has a piece of this tensor (a DTensor)."""
    return type(t) is not Tensor and type(t) is not nn.Parameter and hasattr(t, "full_tensor")


def partitioned(t: Tensor) -> bool:
    """Whether ZeRO-3 keeps this parameter."""
    return hasattr(t, "ds_id")


def whole(t: Tensor) -> Tensor:
    """All values of a tensor of which this process may have a part, without its history; collective for such tensors."""
    if split(t):
        local, mesh = t.to_local().detach(), t.device_mesh
        if local.device.type == mesh.device_type:
            return t.full_tensor().detach()
        from torch.distributed.tensor import DTensor

        moved = DTensor.from_local(
            local.to(mesh.device_type), mesh, t.placements, run_check=False, shape=t.shape, stride=t.stride()
        )
        return moved.full_tensor().to(local.device)
    if partitioned(t):
        with _gathered(t, None):
            return t.detach().clone()
    return t.detach()


def like(value: Tensor, old: Tensor) -> Tensor:
    """`value`, which every process has, split as `old` is."""
    if not split(old) or split(value):
        return value
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    value = value.detach().to(old.device_mesh.device_type)
    if all(p.is_replicate() for p in old.placements):
        return DTensor.from_local(value, old.device_mesh, [Replicate()] * len(old.placements), run_check=False)
    return distribute_tensor(value, old.device_mesh, old.placements, src_data_rank=None)


@torch.no_grad()
def fill(t: Tensor, value: Tensor) -> None:
    """The values of `t` from a tensor that every process has whole, in place, whoever manages it."""
    if split(t):
        t.to_local().copy_(_piece(value, t))
    elif partitioned(t):
        with _gathered(t, 0):
            t.data.copy_(value)
    else:
        t.data.copy_(value)


def _piece(value: Tensor, t: DTensor) -> Tensor:
    split_as_t = like(value.to(t.dtype), t)
    assert split(split_as_t)
    return split_as_t.to_local()


def _gathered(t: Tensor, writer: int | None) -> AbstractContextManager[None]:
    """Within, ZeRO-3 has all of a parameter here; what the process `writer` changes is then everybody's."""
    import deepspeed  # type: ignore[import-not-found,unused-ignore]

    found: AbstractContextManager[None] = deepspeed.zero.GatheredParameters([t], modifier_rank=writer)
    return found


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module, without those that sharding, replicating or parametrising put in front of it.

    They are made on the spot, as classes of their own with the module's class as a base.
    """
    cls = type(module)
    while cls.__module__.startswith(_MADE):
        bases = [b for b in cls.__bases__ if issubclass(b, nn.Module) and b is not nn.Module]
        if len(bases) != 1:
            break
        cls = bases[0]
    return cls


# -- reading -----------------------------------------------------------------------------------------------------------
def present(module: nn.Module) -> AbstractContextManager[None]:
    """A context in which all tensors at and below `module` are here and whole, whoever manages them; to be read only."""
    away = False
    for m in module.modules():
        if "_hf_hook" in m.__dict__:
            away = True
            break
        for p in m._parameters.values():
            if type(p) is not nn.Parameter and p is not None and split(p) or hasattr(p, "ds_id"):
                away = True
                break
    return _present(module) if away else nullcontext()


@contextmanager
def _present(module: nn.Module, kept: bool = False) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(offload.on_device(module))
        replaced: list[tuple[Table, str, nn.Parameter]] = []
        made: dict[int, nn.Parameter] = {}
        try:
            for m in module.modules():
                for leaf, p in m._parameters.items():
                    if p is not None and (split(p) or partitioned(p)):
                        if id(p) not in made:
                            made[id(p)] = nn.Parameter(whole(p), requires_grad=False)
                        replaced.append((m._parameters, leaf, p))
            for table, leaf, p in replaced:
                table[leaf] = made[id(p)]
            yield
        finally:
            for table, leaf, p in replaced:
                table[leaf] = p
        if kept:
            for p in {id(p): p for _, _, p in replaced}.values():
                fill(p, made[id(p)])


@contextmanager
def changing(module: nn.Module) -> Iterator[None]:
    """As `present`, and what is written into the parameters meanwhile is put into the pieces."""
    settle([module])
    with _present(module, kept=True):
        yield


def inner(module: M) -> M:
    """What FSDP 1 has put a unit around: its tensors may be read where they are whole, while a call would release them."""
    while (held := module._modules.get("_fsdp_wrapped_module")) is not None:
        module = held  # type: ignore[assignment]
    return module


@contextmanager
def uncalled(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within, calling these modules runs no hooks: their tensors are here, so there is nothing to gather for a call."""
    names = ("_forward_pre_hooks", "_forward_hooks")
    kept = [(m.__dict__, n, m.__dict__[n]) for m in modules for n in names if m.__dict__.get(n)]
    for fields, name, hooks in kept:
        fields[name] = type(hooks)()
    try:
        yield
    finally:
        for fields, name, hooks in kept:
            fields[name] = hooks


# -- writing -----------------------------------------------------------------------------------------------------------
def units(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The units of FSDP 2 at, above and below these modules."""
    states = sys.modules.get("torch.distributed._composable_state")
    known = [m for m in list(getattr(states, "_module_state_mapping", ())) if hasattr(m, "reshard")]
    if not known:
        return []
    ids = {id(m) for m in modules}
    return [u for u in known if any(id(m) in ids for m in u.modules())]


def settle(modules: Iterable[nn.Module]) -> None:
    """Let the parameters of these modules be the ones that stay, not copies that FSDP 2 laid out for a forward."""
    for unit in units(modules):
        unit.reshard()  # type: ignore[operator]


def flat(module: nn.Module) -> bool:
    """Whether FSDP 1 keeps the parameters of this module."""
    return bool(module.__dict__.get("_is_fsdp_managed_module")) and not units([module])


def held(owner: nn.Module, leaf: str) -> Tensor:
    """The parameter or buffer of that name."""
    found = owner._parameters.get(leaf)
    return owner._buffers[leaf] if found is None else found  # type: ignore[return-value]


def write(owner: nn.Module, leaf: str, value: Tensor) -> None:
    """The values of a tensor of `owner`, in place, through whoever manages it."""
    settle([owner])
    with offload.on_device(owner):
        fill(held(owner, leaf), value)
        offload.store(owner, [leaf])


def copy_of(t: Tensor) -> Tensor:
    """A copy of what this process has of a tensor, for `fill_back`: the piece alone where it is split."""
    return t.to_local().clone() if split(t) else whole(t).clone()


@torch.no_grad()
def fill_back(t: Tensor, kept: Tensor) -> None:
    """The very bits that `copy_of` took."""
    if split(t) and t.to_local().shape == kept.shape:
        t.to_local().copy_(kept)
    else:
        fill(t, kept)


def in_place(owner: nn.Module, t: Tensor) -> bool:
    """Whether the manager of `owner` sees what is written only where the present tensor lies."""
    return split(t) or partitioned(t) or flat(owner)


def refusal(module: nn.Module, replaced: bool, tied: frozenset[int] | set[int] = frozenset()) -> str:
    """Why a change of the parameters of `module` would be lost, or reach further than it may; "" where it would not.

    replaced: writing puts another module in the place of this one.
    """
    weight = getattr(module, "weight", None)
    if not replaced and isinstance(weight, Tensor) and not {"weight"} & {*module._parameters, *module._buffers}:
        return (
            f"the weight of this {type(module).__name__} is computed from other tensors in each forward and cannot be "
            "written; make it a parameter first (torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, "
            "prune.remove; with FSDP use_orig_params=True)"
        )
    for m in tree(module):
        held = [p for p in m._parameters.values() if p is not None]
        kept = [p for p in held if in_place(m, p)]
        if not kept:
            continue
        if replaced:
            return "its codes are split over processes, and the merged layer would be nobody's; merge in one process"
        if any(id(p) in tied for p in kept):
            return "it is tied to another weight, and what shards them cannot give it one of its own; untie it before sharding"
        odd = [
            p for p in kept if split(p) and any(type(x).__name__ not in ("Shard", "Replicate") for x in p.placements)
        ]
        if odd:
            return f"nothing can be written into a tensor split as {odd[0].placements}; merge in one process"  # type: ignore[attr-defined]
        if flat(m) and not _summoned(m):
            return (
                "FSDP 1 keeps it in pieces; call this on every process within "
                "FullyShardedDataParallel.summon_full_params(model)"
            )
    return ""


def _summoned(module: nn.Module) -> bool:
    """Whether FSDP 1 has whole tensors here, as far as can be told: a piece of a matrix has one axis."""
    weight: Any = module._parameters.get("weight")
    return weight is None or weight.dim() > 1


def hand_over(unit: nn.Module, module: nn.Module) -> None:
    """Let `module`, which `unit` ran, gather and release by its own calls what a unit of FSDP 2 manages in it."""
    for found, ask in (
        (unit._forward_pre_hooks, unit._forward_pre_hooks_with_kwargs),
        (unit._forward_hooks, unit._forward_hooks_with_kwargs),
    ):
        for key, hook in list(found.items()):
            if getattr(hook, "__module__", "").startswith("torch.distributed."):
                put = (
                    module.register_forward_pre_hook
                    if found is unit._forward_pre_hooks
                    else module.register_forward_hook
                )
                put(hook, with_kwargs=key in ask)  # type: ignore[operator]
    module.__dict__["_sharded_by"] = unit  # what is managed is found from the unit for as long as it lives
