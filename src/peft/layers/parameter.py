"""Bare parameters of any module, by `target_parameters`: the module runs with P' in the place of P.

P[out, in] is one matrix, P[E, out, in] one for each E, taken as they lie in the parameter. Only the matrix is in reach,
so each is changed whole (the dense way) and what needs an input or an output of its own is refused. A module whose
stack of matrices has a factored form has a kind of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..contract.kind import LayerKind
from ..contract.method import Method
from ..contract.offload import on_device
from ..contract.tree import Composite, Part
from ..core.acting.adapted_layer import AdaptedLayer
from ..core.acting.mix import BASE
from ..core.acting.roster import Roster
from ..core.anatomy.walk import kind_of
from ..errors import Refusal
from .slice import Slice, WeightSlice


class Stacked(Composite):
    """A stand-in whose parts are the matrices of some parameters: `name` for a 2-D one, `name[e]` for each of a stack.

    On disk upstream nests one wrapper for each adapted parameter, in the module's order, the last one outermost: the
    keys of the others stand below `base_layer.`, and the tensors of a stack are one tensor (`Stored.stack`).
    """

    def __init__(self, module: nn.Module, slices: dict[str, list[WeightSlice]]) -> None:
        super().__init__()
        self.base_layer = module
        self.slices = nn.Module()
        self.slices._modules.update({n: nn.ModuleList(s) for n, s in slices.items()})  # any name a parameter may have
        self.single = {n: s[0].index is None for n, s in slices.items()}
        self.flipped = False  # whether the file holds each ΔW transposed
        self.training = module.training

    def of(self, name: str) -> nn.ModuleList:
        return self.slices._modules[name]  # type: ignore[return-value]

    def part_names(self, name: str) -> list[str]:
        return [name] if self.single[name] else [f"{name}[{e}]" for e in range(len(self.of(name)))]

    def parts(self) -> dict[str, Part]:
        return {
            part: Part(self.of(name), str(e), part)
            for name in self.single
            for e, part in enumerate(self.part_names(name))
        }

    # -- which adapters act ---------------------------------------------------------------------------------------------
    def adapted(self, name: str | None = None) -> list[AdaptedLayer]:
        held = self.of(name) if name else [m for n in self.single for m in self.of(n)]  # type: ignore[union-attr]
        return [m for m in held if isinstance(m, AdaptedLayer)]

    def acting(self) -> Roster | None:
        """The roster, if any of its acting adapters has something here."""
        roster = next((x.roster for x in self.adapted() if x.acting), None)  # what is merged is in the parameter
        if roster is None:
            return None
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            roster.check_recompute()
        return roster

    # -- on disk ----------------------------------------------------------------------------------------------------------
    def _nest(self, methods: dict[str, Method]) -> dict[str, str]:
        present = [n for n in self.single if any(p in methods for p in self.part_names(n))]
        return {n: "base_layer." * (len(present) - 1 - i) for i, n in enumerate(present)}

    def to_disk(self, state: dict[str, Tensor], methods: dict[str, Method]) -> dict[str, Tensor]:
        out = {}
        for name, prefix in self._nest(methods).items():
            parts = self.part_names(name)
            like = methods[parts[0]]
            for key in [k.removeprefix(parts[0] + ".") for k in state if k.startswith(parts[0] + ".")]:
                tensors = [state[f"{p}.{key}"] for p in parts]
                target = key
                if self.flipped and key in like.table.turned:
                    target, tensors = like.table.turned[key], [t.T for t in tensors]
                out[prefix + target] = (
                    tensors[0] if self.single[name] else _stack(tensors, like.table.stacks.get(target))
                )
        return out

    def from_disk(self, state: dict[str, Tensor], methods: dict[str, Method]) -> dict[str, Tensor]:
        out = dict(state)
        for name, prefix in self._nest(methods).items():
            parts = self.part_names(name)
            like = methods[parts[0]]
            for key in like.table.keys.values():
                flip = self.flipped and key in like.table.turned
                source = like.table.turned[key] if flip else key
                whole = out.pop(prefix + source, None) if prefix + source in state else None
                if whole is None:
                    continue
                tensors = [whole] if self.single[name] else _unstack(whole, len(parts), like.table.stacks.get(source))
                out.update({f"{p}.{key}": t.T if flip else t for p, t in zip(parts, tensors, strict=True)})
        return out


def _stack(tensors: list[Tensor], how: tuple[int, int] | None) -> Tensor:
    """One tensor with a new axis for the expert; `how`: (where that axis goes, which axis is joined with the next)."""
    if how is None:
        return torch.stack(tensors)
    axis, joined = how
    return torch.stack(tensors, axis).flatten(joined, joined + 1)


def _unstack(whole: Tensor, experts: int, how: tuple[int, int] | None) -> Sequence[Tensor]:
    if how is None:
        return whole.unbind(0)
    axis, joined = how
    if whole.shape[joined] % experts:
        raise ValueError(f"a stacked tensor of shape {tuple(whole.shape)} does not divide among {experts} experts")
    sizes = (experts, -1) if axis == joined else (-1, experts)
    return whole.unflatten(joined, sizes).unbind(axis)


class RawSlice(WeightSlice):
    """A matrix that only its owner's forward uses."""


class Raw(Slice):
    name = "raw"
    summary = "one matrix of a bare parameter"
    priority = 20
    factored = False

    def claims(self, module: nn.Module) -> bool:
        return isinstance(module, RawSlice)

    def admit(self, module: nn.Module, method: Method, path: str) -> None:
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
        x, *args = args  # type: ignore[assignment]
        where = self.adapted()[0].path
        if any(torch.is_tensor(a) for a in (*args, *kwargs.values())):
            raise Refusal(
                "adapter_names",
                where,
                "this block takes further tensors besides its input, which have no rows to split",
            )
        groups, undo = rows.groups(x.shape[0], where, x.device)
        outs = [self._run(() if name == BASE else (name,), (x[index], *args), kwargs) for name, index in groups]
        if not torch.is_tensor(outs[0]):
            raise Refusal("adapter_names", where, "this block gives no single tensor whose rows could be put together")
        return torch.cat(outs)[undo]

    def _run(self, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with on_device(self.base_layer):
            values = {n: v for n in self.single if (v := self._value(n, names)) is not None}
            return torch.func.functional_call(self.base_layer, values, args, kwargs)

    def _value(self, name: str, names: Sequence[str]) -> Tensor | None:
        """P', None where no adapter changes it."""
        acting = {id(m) for m in self.adapted(name) if m.active_methods(names) and not m.merged_adapters}
        if not acting:
            return None
        out: list[Tensor] = []
        for held in self.of(name):
            part = held.base_layer if isinstance(held, AdaptedLayer) else held
            assert isinstance(part, RawSlice)
            W = part.weight
            if isinstance(held, AdaptedLayer) and id(held) in acting:
                W, _ = held.compose(held.active_methods(names), W.dtype)
            out.append(W.T if part.transposed else W)
        return out[0] if self.single[name] else torch.stack(out)


class Parameter(LayerKind):
    name = "parameter"
    summary = "a bare 2-D or 3-D parameter of any module, by target_parameters"
    for_parameters = True
    priority = -200

    def examples(self) -> dict[str, Callable[[], tuple[Any, ...]]]:
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
