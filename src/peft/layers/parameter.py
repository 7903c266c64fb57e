"""Bare parameters of any module, by `target_parameters`: the module runs with P' in the place of P.

P[out, in] is one matrix, P[E, out, in] one for each E, taken as they lie in the parameter. Only the matrix is in reach,
so each is changed whole (the dense way) and what needs an input or an output of its own is refused. A module whose
stack of matrices has a factored form has a kind of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..contract.kind import Examples, LayerKind
from ..contract.managed import present
from ..contract.method import Method
from ..contract.swapped import called_with
from ..contract.tree import Composite
from ..core.acting.mix import BASE
from ..core.anatomy.walk import kind_of
from ..errors import Refusal
from .slice import Slice, native
from .stacked import Stacked
from .weight_slice import WeightSlice


class RawSlice(WeightSlice):
    """A matrix that only its owner's forward uses."""


class Raw(Slice):
    name = "raw"
    summary = "one matrix of a bare parameter"
    priority = 20
    factored = False

    def claims(self, module: nn.Module) -> bool:
        return isinstance(module, RawSlice)

    def admit(self, module: WeightSlice, method: Method, path: str) -> None:
        super().admit(module, method, path)
        where = f"{path} (a bare parameter)"
        if method.dropout:
            raise Refusal(
                method.peft_type, where, "dropout acts on the input of the added term, and a parameter has no input"
            )
        if not method.mergeable:
            raise Refusal(
                method.peft_type, where, "its effect is no change of the weights, and there is no output here to act on"
            )


class Swapped(Stacked):
    """A module that runs with changed values of some of its parameters."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        roster = self.acting()
        if roster is None:
            return self.base_layer(*args, **kwargs)
        rows = roster.mix.rows
        if rows is None:
            return self._run(roster.mix.active, args, kwargs)
        if not args:  # the input by name
            first, *names = kwargs
            args, kwargs = (kwargs[first],), {n: kwargs[n] for n in names}
        x, *others = args
        where = self.adapted()[0].path
        if any(torch.is_tensor(a) for a in (*others, *kwargs.values())):
            raise Refusal(
                "adapter_names",
                where,
                "this block takes further tensors besides its input, which have no rows to split",
            )
        groups, undo = rows.groups(x.shape[0], where, x.device)
        outs = [self._run(() if name == BASE else (name,), (x[index], *others), kwargs) for name, index in groups]
        if not torch.is_tensor(outs[0]):
            raise Refusal("adapter_names", where, "this block gives no single tensor whose rows could be put together")
        return torch.cat(outs)[undo]

    def _run(self, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with present(self.base_layer):
            values = {n: v for n in self.single if (v := self._value(n, names)) is not None}
            return called_with(self.base_layer, values, args, kwargs)

    def _value(self, name: str, names: Sequence[str]) -> Tensor | None:
        """P', None where no adapter changes it."""
        acting = {id(m) for m in self.adapted(name) if m.active_methods(names) and not m.merged_adapters}
        if not acting:
            return None
        out = [native(part, names) for part in self.of(name)]
        return out[0] if self.single[name] else torch.stack(out)


class Parameter(LayerKind[nn.Module]):
    name = "parameter"
    summary = "a bare 2-D or 3-D parameter of any module, by target_parameters"
    for_parameters = True
    priority = -200

    def examples(self) -> Examples:
        two = {"target_parameters": ["site.first", "site.second"]}
        return {
            "two": lambda: (TwoMatrices(), torch.randn(4, 3, 16), two),
            "stack": lambda: (Mixture(), torch.randn(4, 3, 16), {"target_parameters": ["site.weights"]}),
        }

    def claims(self, module: nn.Module) -> bool:
        return any(p is not None and p.dim() in (2, 3) for p in module._parameters.values())

    def stand_in(self, module: nn.Module) -> Composite:
        kind = kind_of(module)
        if not kind.castable:
            raise Refusal(
                "target_parameters",
                type(module).__name__,
                "its parameter holds codes, which nothing can be added to; name the module in target_modules",
            )
        slices: dict[str, list[WeightSlice]] = {}
        for name, p in module._parameters.items():
            if p is not None and p.dim() == 2:
                slices[name] = [RawSlice(module, name)]
            elif p is not None and p.dim() == 3:
                flip = bool(getattr(module, "is_transposed", False))
                slices[name] = [RawSlice(module, name, index=e, transposed=flip) for e in range(p.shape[0])]
        return Swapped(module, slices)


class TwoMatrices(nn.Module):
    """An example: y = B tanh(A x)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(24, 16) * 0.2)
        self.second = nn.Parameter(torch.randn(16, 24) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.first.T) @ self.second.T


class Mixture(nn.Module):
    """An example: the mean of several matrices' tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3, 24, 16) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.einsum("eoi,...i->e...o", self.weights, x)).mean(0)


kinds = [Raw(), Parameter()]
