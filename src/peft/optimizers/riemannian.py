"""Preconditioned gradients for ΔW = s·B A: ∇A ← (BᵀB + εI)⁻¹∇A, ∇B ← ∇B (A Aᵀ + εI)⁻¹ (arXiv 2402.02347)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .factors import pairs


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 0.01, **kwargs: Any
) -> Optimizer:
    """`optimizer_cls` on everything that trains; each step first puts the gradients of A and B into their metric.

    An optimizer whose step computes the gradients itself (a closure) is refused at the step.
    """
    found = pairs(model)
    optimizer = optimizer_cls([p for p in model.parameters() if p.requires_grad], **{"lr": lr, **kwargs})

    @torch.no_grad()
    def precondition(_: Optimizer, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if any(callable(a) for a in (*args, *kwargs.values())):
            raise ValueError("The gradients are preconditioned before the step; a closure would compute them in it.")
        for pair in found:
            a, b = pair.A.grad, pair.B.grad  # both metrics are those of the values before the step
            if a is not None:
                a.copy_(torch.linalg.solve(_metric(pair.B.T, reg), a.float()))
            if b is not None:
                b.copy_(torch.linalg.solve(_metric(pair.A, reg), b.float(), left=False))

    optimizer.register_step_pre_hook(precondition)
    return optimizer


def _metric(factor: Tensor, reg: float) -> Tensor:
    """factor·factorᵀ + reg·I, [r, r]."""
    wide = factor.float()
    return wide @ wide.T + reg * torch.eye(len(wide), device=wide.device)
