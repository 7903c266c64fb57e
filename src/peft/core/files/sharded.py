"""Adapters whose tensors are split over processes, or were gathered into a state dict of the whole model.

FSDP 1 keeps flat parameters, whose pieces are whole only inside its own functions; FSDP 2 and tensor parallelism keep
DTensors; ZeRO-3 leaves placeholders. What such tensors hold is taken from, and put back through, a state dict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from ...contract.managed import flat as kept_flat
from ...contract.managed import partitioned, split
from ...contract.method import Method
from ...contract.tree import WRAPPED, without_wrappers
from ...errors import CheckpointError
from ..acting.on_model import base_of


def unwrapped(model: nn.Module) -> nn.Module:
    return base_of(bare(model))


Gathered = Callable[[Method, str], Tensor | None]


def unwrapped_name(name: str) -> str:
    """A name in a state dict without the steps that wrappers add."""
    return without_wrappers(name).removeprefix("module.")


def bare(model: nn.Module) -> nn.Module:
    """What wrappers for several processes or compilation hold."""
    while True:
        held = model.__dict__.get("_modules", {})
        inner = next(
            (held[n] for n in (*WRAPPED, "module") if len(held) == 1 and isinstance(held.get(n), nn.Module)), None
        )
        if inner is None:
            return model
        model = inner


def names_of_methods(model: nn.Module) -> dict[int, str]:
    """id(method) -> its name in the model's state dict."""
    return {id(m): unwrapped_name(n) for n, m in model.named_modules() if isinstance(m, Method)}


def gathered(model: nn.Module, state_dict: Mapping[str, Tensor] | None) -> Gathered | None:
    """How to find a method's tensor among values gathered for the whole model."""
    if state_dict is None:
        return None
    where, values = names_of_methods(model), {unwrapped_name(k): v for k, v in state_dict.items()}

    def find(method: Method, attr: str) -> Tensor | None:
        return values.get(f"{where[id(method)]}.{attr}") if id(method) in where else None

    return find


def flat(model: nn.Module) -> bool:
    """Whether FSDP 1 holds the parameters of adapters in this model: those that came later are nobody's."""
    return any(hasattr(type(m), "summon_full_params") for m in model.modules()) and any(
        kept_flat(m) for m in model.modules() if isinstance(m, Method)
    )


def unreadable(t: Tensor) -> str:
    """Why a tensor holds no values that could be written here; "" where it does."""
    if t.is_meta:
        return "meta device"
    if split(t) or partitioned(t):
        return ""
    if hollow(t):
        return "zero elements"
    return "" if t.untyped_storage().size() or t.numel() == 0 else "freed until the next forward"


def hollow(t: Tensor) -> bool:
    """An emptied placeholder of a sharded parameter, which is flat; a matrix of rank 0 is no such thing."""
    return t.numel() == 0 and t.dim() < 2


def check_summoned(parameters: Iterable[Tensor], name: str) -> None:
    """Raise where FSDP 1 has but pieces of an adapter here; whole, one of its tensors has two axes."""
    if max((p.dim() for p in parameters), default=0) < 2:
        raise CheckpointError(
            f"Adapter {name!r} is kept in pieces by FSDP 1: save it on every process within "
            "FullyShardedDataParallel.summon_full_params(model), or pass state_dict=accelerator.get_state_dict(model)."
        )


def together(parameters: Iterable[Tensor]) -> bool:
    """Whether all processes have to take part in reading these."""
    return any(split(p) or partitioned(p) for p in parameters)


def first_of(main: bool) -> bool:
    """Whether this is the first of the processes that say they are the main one; all have to ask."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return main
    said = [False] * dist.get_world_size()
    dist.all_gather_object(said, main)
    return main and said.index(True) == dist.get_rank()


def wait_for_all() -> None:
    """Return when all processes have come here."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
