"""Adapters that come after a model was split over processes or replicated: nobody keeps their parameters equal."""

from __future__ import annotations

import gc
import warnings

import torch.distributed as dist
from torch import nn

# where the classes are made of what keeps parameters equal
WRAPPERS = ("torch.distributed.fsdp.", "torch.distributed._composable.", "torch.nn.parallel.", "deepspeed.runtime.")


def warn_if_late(model: nn.Module, name: str) -> None:
    """Warn where several processes train and `model` is already in the hands of what keeps their parameters equal."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    manager = _manager(model)
    if manager is not None:
        warnings.warn(
            f"The adapter {name!r} is added to a model that {manager} already manages, which does not know the adapter's "
            "parameters: each process trains them on its own rows alone, and they drift apart. Add adapters first, then "
            "shard or wrap the model; or have the modules of the adapters managed, too.",
            stacklevel=4,
        )


def _manager(model: nn.Module) -> str | None:
    """What shards or replicates this model, a part of it, or a model that it is a part of."""
    for module in model.modules():
        if (found := _name(module)) is not None:
            return found
    # a wrapper knows its model, while the model knows nothing of it
    for o in gc.get_objects():
        if issubclass(type(o), nn.Module) and (found := _name(o)) is not None and any(m is model for m in o.modules()):
            return found
    return None


def _name(module: nn.Module) -> str | None:
    cls = type(module)
    if not cls.__module__.startswith(WRAPPERS):
        return None
    return "fully_shard" if any(c.__name__ == "FSDPModule" for c in cls.__mro__) else cls.__name__
