"""The cells of the matrix: every method's examples on every layer kind's examples, and the models they make.

Methods and kinds state their own examples (`Method.examples`, `LayerKind.examples`), so a new file in `peft/methods/`
or `peft/layers/` is under test without an edit here.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peft import Refusal, dry_run, get_peft_model, registry
from peft.core.adapted.layer import adapted_layers

NOISE = 0.3  # how far parameters are moved from their start


class Net(nn.Module):
    """One layer of a kind, between nothing: what the layer gives is what the model gives."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.site = layer

    def forward(self, *x: torch.Tensor) -> torch.Tensor:
        out = self.site(*x)
        return out[0] if isinstance(out, tuple) else out


@dataclass
class Cell:
    method: str
    config: dict[str, Any]
    kind: str
    example: str
    first: bool = True  # the first example of its kind: the slow laws run on these

    @property
    def id(self) -> str:
        settings = ",".join(f"{k}={v}" for k, v in self.config.items() if k not in ("r", "target_modules"))
        return f"{self.method}[{settings}]-{self.kind}[{self.example}]"

    # -- making things ------------------------------------------------------------------------------------------------
    def source(self) -> tuple[nn.Module, tuple[torch.Tensor, ...], dict[str, Any]]:
        """(layer, inputs, targeting fields) of the kind's example, the same at every call."""
        torch.manual_seed(1)
        made = registry.kinds()[self.kind].examples()[self.example]()
        layer, inputs, target = made if len(made) == 3 else (*made, {"target_modules": ["site"]})
        return layer, inputs if isinstance(inputs, tuple) else (inputs,), target

    def base(self) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        layer, inputs, _ = self.source()
        return Net(layer).eval(), inputs

    def peft_config(self, **more: Any) -> Any:
        _, _, target = self.source()
        cls = registry.methods()[self.method].config_class
        return cls(**{**target, **self.config, **more})

    def model(self, names: tuple[str, ...] = ("default",), dtype: torch.dtype | None = None):
        """A PeftModel with adapters of these names, randomised so that each has an effect."""
        base, inputs = self.base()
        if dtype is not None:
            base = base.to(dtype)
            inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
        torch.manual_seed(2)
        model = get_peft_model(base, self.peft_config(), adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, self.peft_config())
        for i, name in enumerate(names):
            randomise(model, name, 3 + i)
        return model.eval(), inputs

    @property
    def tolerance(self) -> float:
        return registry.kinds()[self.kind].tolerance


def randomise(model: Any, name: str, seed: int) -> None:
    """Give every trainable tensor of an adapter values away from its start, in a range its maths keeps stable."""
    rng = torch.Generator().manual_seed(seed)
    for _, method in model.roster.adapters[name].methods:
        frozen = method.table.frozen
        for attr, p in method.named_parameters():
            if attr not in frozen and p.is_floating_point():
                with torch.no_grad():
                    p.add_(torch.randn(p.shape, generator=rng).to(p) * NOISE)


def refusal(cell: Cell) -> str | None:
    """The reason why this cell is refused, None when it is built."""
    try:
        base, _ = cell.base()
        dry_run(base, cell.peft_config())
    except Refusal as e:
        return e.reason
    return None


def cells() -> list[Cell]:
    """Each method's first variant on every example of every kind; its further variants on each kind's first example."""
    found = []
    for name, method in registry.methods().items():
        if method.form == "prompt":
            continue
        for variant, config in enumerate(method.examples):
            for kind_name, kind in registry.kinds().items():
                for n, example in enumerate(kind.examples()):
                    if variant == 0 or n == 0:
                        found.append(Cell(name, dict(config), kind_name, example, first=n == 0))
    return found


def sites(model: nn.Module) -> list[Any]:
    return list(adapted_layers(model))


def clone(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit; of a tensor subclass, all the tensors it is made of."""
    if hasattr(a, "__tensor_flatten__"):
        names = [n for n in a.__tensor_flatten__()[0]]
        return type(a) is type(b) and all(same_bits(getattr(a, n), getattr(b, n)) for n in names)
    return torch.equal(a, b)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    scale = max(1.0, float(b.abs().max()))
    return bool(torch.isfinite(a).all()) and float((a.float() - b.float()).abs().max()) <= tolerance * scale
