"""One tensor for all that an adapter trains: an optimizer step costs a pass over it and not a call a matrix.

The parameters become views of one buffer for each dtype and device, and so do their gradients, into which backward
accumulates as ever. Elementwise optimizers (SGD, Adam, AdamW, Lion, …) do to the buffer what they would do to its
parts. Optimizers that look at a matrix as a whole (Adafactor, LAMB, Muon) do not: give those the parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


class Buffer:
    """The parameters of one dtype and device, in one."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        flat = torch.cat([p.detach().reshape(-1) for p in parameters])
        self.whole = nn.Parameter(flat)
        self.whole.grad = torch.zeros_like(flat)
        sizes = [p.numel() for p in parameters]
        shapes = [p.shape for p in parameters]
        self.values = [v.view(s) for v, s in zip(flat.split(sizes), shapes, strict=True)]
        self.grads = [v.view(s) for v, s in zip(self.whole.grad.split(sizes), shapes, strict=True)]
        for p, value, grad in zip(parameters, self.values, self.grads, strict=True):
            if p.grad is not None:
                grad.copy_(p.grad)
            p.data, p.grad = value, grad

    @torch.no_grad()
    def gather(self) -> None:
        """Take in what was put beside the buffer since: values that were loaded, gradients that were set or cleared."""
        for p, value, grad in zip(self.parameters, self.values, self.grads, strict=True):
            if p.data_ptr() != value.data_ptr():
                value.copy_(p.data)
                p.data = value
            if p.grad is not grad:
                if p.grad is None:
                    grad.zero_()
                elif p.grad.data_ptr() != grad.data_ptr():
                    grad.copy_(p.grad)
                p.grad = grad

    def zero(self) -> None:
        assert self.whole.grad is not None
        self.whole.grad.zero_()


def create_flat_optimizer(
    model: nn.Module | Iterable[nn.Parameter],
    optimizer_cls: type[Optimizer] = torch.optim.AdamW,
    *,
    max_norm: float | None = None,
    **kwargs: Any,
) -> Optimizer:
    """`optimizer_cls(buffers, **kwargs)` over all parameters of `model` (or those given) that require gradients.

    max_norm: clip their joint gradient norm before each step, as `clip_grad_norm_` does. `zero_grad` keeps the
    gradients as views and sets them to 0, also where it is asked for None. A parameter without a gradient counts as one
    with gradient 0: with momentum or weight decay it moves, where a separate optimizer would leave it.

    Raises ValueError where nothing requires gradients, and where tensors are sharded or share memory.
    """
    given = model.parameters() if isinstance(model, nn.Module) else model
    wanted = [p for p in {id(p): p for p in given}.values() if p.requires_grad]
    if not wanted:
        raise ValueError(
            "create_flat_optimizer: nothing here requires gradients; activate an adapter for training first."
        )
    odd = [p for p in wanted if type(p) is not nn.Parameter or p.is_meta]
    if odd:
        raise ValueError(
            f"create_flat_optimizer: {len(odd)} parameters are {type(odd[0]).__name__} on {odd[0].device}; sharded or "
            "empty ones cannot lie in one buffer. Use the optimizer itself."
        )
    if len({p.untyped_storage().data_ptr() for p in wanted if p.numel()}) < sum(p.numel() > 0 for p in wanted):
        raise ValueError("create_flat_optimizer: some parameters share memory (is there a flat optimizer already?).")
    by_place: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for p in wanted:
        by_place.setdefault((p.dtype, p.device), []).append(p)
    buffers = [Buffer(ps) for ps in by_place.values()]
    wholes = [b.whole for b in buffers]
    optimizer = optimizer_cls(wholes, **kwargs)

    def before(*_: object) -> None:
        for b in buffers:
            b.gather()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(wholes, max_norm)

    def zero_grad(set_to_none: bool = True) -> None:
        for b in buffers:
            b.gather()
            b.zero()

    optimizer.register_step_pre_hook(before)
    optimizer.zero_grad = zero_grad  # type: ignore[method-assign]
    return optimizer
