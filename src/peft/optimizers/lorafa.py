"""LoRA-FA: A stays as it is, B trains with the gradient of ΔW projected on what A can reach (arXiv 2308.03303).

∇B ← ∇B (A Aᵀ)⁻¹ / s², and then AdamW. The activations that A's gradient would need are not kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from .factors import TrainedFactors, pairs


class LoraFAOptimizer(Optimizer):
    """AdamW whose gradients are projected first, for the last factors of the given pairs."""

    def __init__(
        self,
        params: ParamsT,
        found: list[TrainedFactors],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._pairs = {id(pair.B): pair for pair in found}

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, self._projected(p), group)
        return loss

    def _projected(self, p: Tensor) -> Tensor:
        grad, pair = p.grad, self._pairs.get(id(p))
        assert grad is not None
        if pair is None:
            return grad
        A = pair.A.float()
        metric = A @ A.T + 1e-8 * torch.eye(len(A), device=A.device)
        return (grad.float() @ torch.linalg.pinv(metric) / pair.strength**2).to(grad.dtype)

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        b1, b2 = group["betas"]
        state["exp_avg"].lerp_(grad, 1 - b1)
        state["exp_avg_sq"].mul_(b2).addcmul_(grad, grad, value=1 - b2)
        correction = math.sqrt(1 - b2 ** state["step"]) / (1 - b1 ** state["step"])
        p.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-group["lr"] * correction)
        if group["weight_decay"]:
            p.mul_(1 - group["lr"] * group["weight_decay"])


def create_lorafa_optimizer(
    model: nn.Module,
    r: int,
    lora_alpha: int,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> Optimizer:
    """Freeze every A and give an optimizer for the rest. r, lora_alpha, use_rslora: each adapter knows its own."""
    found = pairs(model)
    for pair in found:
        pair.A.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    return LoraFAOptimizer(trained, found, lr=lr, weight_decay=weight_decay)
