"""Clipping the gradients and an AdamW step over 4,004 small tensors (r=16 on 2,002 layers of width 64).

Against one tensor at a time: torch's foreach and fused paths, and what the library offers. A candidate's parameters
after three steps are compared with those of one tensor at a time before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..case import Case, Figure, at_least
from ..measure import Turns
from ..models import noise

TITLE = "Optimiser step and clipping over all adapter tensors"
SETTINGS = {"lr": 1e-3, "weight_decay": 0.01}


def parameters(n: int) -> list[nn.Parameter]:
    shapes = [(16, 64), (64, 16)] * (n // 2)
    out = [nn.Parameter(noise(f"value {i}", s, 0.1)) for i, s in enumerate(shapes)]
    for i, p in enumerate(out):
        p.grad = noise(f"gradient {i}", p.shape, 1.0)
    return out


def torchs(params: list[nn.Parameter], **how: bool) -> Callable[[], None]:
    optimiser = torch.optim.AdamW(params, **SETTINGS, **how)  # type: ignore[arg-type]
    together = any(how.values())

    def run() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=together)
        optimiser.step()

    return run


def offered(params: list[nn.Parameter]) -> Callable[[], None] | None:
    """What the library has for this, if anything."""
    from peft import optimizers

    make = getattr(optimizers, "create_flat_optimizer", None)
    if make is None:
        return None
    optimiser = make(params, torch.optim.AdamW, max_norm=1.0, **SETTINGS)
    return lambda: optimiser.step()


class Optimiser(Case):
    name = "AdamW"

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.figures = {
            "speed-up": Figure("× faster", (at_least(5),), "the library's best ÷ one tensor at a time"),
            "one at a time": Figure("ms"),
            "foreach": Figure("ms"),
            "fused": Figure("ms"),
            "offered": Figure("ms", what="what the library offers"),
        }

    def build(self, folder: Path) -> None:
        n = 40 if self.quick else 4004
        ways: dict[str, Callable[[list[nn.Parameter]], Callable[[], None] | None]] = {
            "one at a time": lambda p: torchs(p, foreach=False),
            "foreach": lambda p: torchs(p, foreach=True),
            "fused": lambda p: torchs(p, fused=True),
            "offered": offered,
        }
        self.run: dict[str, Callable[[], None]] = {}
        self.result: dict[str, Tensor] = {}
        first: Tensor | None = None
        for name, make in ways.items():
            params = parameters(n)
            try:
                run = make(params)
            except ImportError:
                run = None
            if run is None:
                continue
            given = [p.grad.clone() for p in params]  # type: ignore[union-attr]
            for _ in range(3):
                for p, g in zip(params, given):
                    p.grad.copy_(g)  # type: ignore[union-attr]
                run()
            found = torch.cat([p.detach().flatten() for p in params])
            first = found if first is None else first
            error = ((found - first).norm() / first.norm()).item()
            if error > 1e-5:
                raise AssertionError(f"{name}: {error:.1e} away from one tensor at a time after three steps")
            self.run[name] = run
        assert first is not None
        self.result = {"parameters": first}

    def outputs(self) -> dict[str, Tensor]:
        return self.result

    def sample(self) -> dict[str, float]:
        turns = Turns(2 if self.quick else 5, **self.run)
        out = {name: 1e3 * turns.median(name) for name in self.run}
        best = "offered" if "offered" in self.run else "one at a time"
        return {"speed-up": 1 / turns.ratio(best, "one at a time"), **out}


def cases(quick: bool) -> list[Case]:
    return [Optimiser(quick)]
