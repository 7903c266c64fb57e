"""Optimizers that know the two factors of ΔW = s·B A, for every method whose ΔW has two; and one step for all of them."""

from .flat import create_flat_optimizer
from .lorafa import create_lorafa_optimizer
from .loraplus import create_loraplus_optimizer
from .riemannian import create_riemannian_optimizer

__all__ = [
    "create_flat_optimizer",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "create_riemannian_optimizer",
]
