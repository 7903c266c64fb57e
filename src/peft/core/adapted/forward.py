"""The forward of one base layer with adapters.

    y = after( op( before(x), W + Σ ΔW_i + Σ (f_j(W) − W) ) + b )

Two ways lead there, with one meaning. The factored way adds each term to the base layer's output; the dense way
composes W' and runs the layer's geometry on it, and is also what merging writes. The dense way is taken where the
factored one does not exist: an input transform on a kernel larger than 1, a raw parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...contract.capabilities import ScalesChannels, TakesSpan, can
from ...contract.composition import by_form
from ...contract.managed import present
from ...contract.method import Method
from ...contract.own_forward import run_with
from ...contract.swapped import called_with
from ...contract.tree import named
from ...errors import Refusal
from ..acting.adapted_layer import AdaptedLayer
from ..acting.rows import Rows
from . import fused
from .calls import Args, Kwargs, Output, nested, on_first, over_sequences, sequence_of


class Forward(AdaptedLayer):
    """How a layer runs with the adapters that act, and what they compose."""

    # the names that acted last, the table they were looked up in, and their methods
    _last: tuple[tuple[str, ...] | None, object, Sequence[Method]]
    _input_name: str

    def forward(self, *args: object, rows: Tensor | None = None, **kwargs: object) -> Output:
        """The base layer's forward with the acting adapters. `rows`: the batch row of each input, where x lost it."""
        compiling = torch.compiler.is_compiling()
        mix = self.roster.mix if compiling else self.roster.outside_graphs()
        if mix.rows is not None and not self.merged_adapters:
            return self._mixed(mix.rows, rows, args, kwargs)
        methods = () if self.merged_adapters else self._acting(mix.active, compiling)
        if not methods:
            return self.kind.run(self.base_layer, *args, **kwargs)
        if torch.is_grad_enabled() and not compiling:
            self.roster.check_recompute()
        if len(args) == 1 and not kwargs and (y := fused.run(self, methods, args[0])) is not None:
            return y
        return self._run(methods, args, kwargs)

    def _acting(self, names: tuple[str, ...], compiling: bool) -> Sequence[Method]:
        """`active_methods`, remembered for as long as the same names act and nothing is attached or detached."""
        if compiling:
            return self.active_methods(names)
        known, table, methods = self._last
        if known is not names or table is not self.methods:
            table = self.methods
            methods = self.active_methods(names)
            self.__dict__["_last"] = (names, table, methods)
        return methods

    def _input(self, args: Args, kwargs: Kwargs) -> tuple[Tensor, Callable[[Tensor], tuple[Args, Kwargs]]]:
        """The layer's input, and the arguments of a call that has another one in its place."""
        if args:
            return args[0], lambda x: ((x, *args[1:]), kwargs)
        name = self._input_name if self._input_name in kwargs else next(iter(kwargs))
        return kwargs[name], lambda x: ((), {**kwargs, name: x})

    def _run(self, methods: Sequence[Method], args: Args, kwargs: Kwargs) -> Output:
        x, call = self._input(args, kwargs)
        if nested(x) and (self.geometry.pointwise or self.geometry.indexed):
            return self._sequences(methods, x, call, None)
        given = x  # what `after` sees: the layer's own input, so that the parallel branch merges as it stands
        indexed = self.geometry.indexed  # an embedding's rows are what an input transform acts on
        before, replaced, added, late = by_form(methods)
        out: Output
        if self._dense(methods):
            whole = [*before, *replaced, *added]
            while not self.kind.factored and late and late[0].mergeable:  # what the layer does to W' comes after it
                whole.append(late.pop(0))
            W, b = self.compose(whole, self.kind.dtype(self.base_layer))
            if self.kind.own_forward:
                values = {**(self.replaced(replaced) if replaced else {}), **self._native(W, b)}
                out = run_with(self.base_layer, values, args, kwargs)
            else:
                out = self.op(x, W)
                if b is not None:
                    out = self.kind.channels_back(self.kind.channels_last(out) + b)
        else:
            for m in () if indexed else before:
                x = self._in_parameter_dtype(m, lambda v, m=m: self._channels(m, v), x)
            out = self._base(replaced, *call(x))
            for m in added:
                out = self._in_parameter_dtype(m, lambda v, y, m=m: m("add", v, y, self.op), x, out)
            for m in before if indexed else ():
                out = self._in_parameter_dtype(m, lambda v, m=m: self._channels(m, v), out)
        for m in late:
            out = on_first(out, partial(self._late, m, given))
        return out

    def _sequences(
        self, methods: Iterable[Method], x: Tensor, call: Callable[[Tensor], tuple[Args, Kwargs]], row: Tensor | None
    ) -> Output:
        """A jagged nested tensor's rows, one sequence after the other: what acts on each of them alone takes them so."""
        for m in methods:
            if can(m, TakesSpan) and not m.mergeable:
                raise Refusal(m.peft_type, self.path, "it acts on positions, which are not known in nested tensors")

        def run(values: Tensor) -> Output:
            args, kwargs = call(values)
            return self.forward(*args, rows=row, **kwargs)

        return over_sequences(x, run)

    def _late(self, m: Method, given: Tensor, y: Tensor) -> Tensor:
        return self._in_parameter_dtype(m, lambda v: self._after(m, v, given), y)

    def _in_parameter_dtype(self, m: Method, fn: Callable[..., Tensor], *tensors: Output) -> Tensor:
        """`fn` of the tensors; in the exact mode cast up to the method's parameters first, and its result back."""
        last = tensors[-1]
        if not self.roster.exact or not torch.is_tensor(last):
            return fn(*tensors)
        dtype = next((p.dtype for p in m.parameters() if p.is_floating_point()), last.dtype)
        dtype = torch.promote_types(dtype, last.dtype)
        return fn(*(t.to(dtype) if torch.is_tensor(t) and t.is_floating_point() else t for t in tensors)).to(last.dtype)

    def _base(self, replaced: Sequence[Method], args: Args, kwargs: Kwargs) -> Output:
        if not replaced:
            return self.kind.run(self.base_layer, *args, **kwargs)
        if self.kind.factored and not self.geometry.weightless and all(m.replaced_names == ("bias",) for m in replaced):
            out = self.kind.run(self.base_layer, *args, **kwargs)  # a shift of the output, which reads no weight
            return self.op.shift(out, self._bias_change(replaced).to(out.dtype))
        if not self.kind.swappable(self.base_layer):
            W, b = self.compose(replaced, self.kind.dtype(self.base_layer))
            out = self.op(self._input(args, kwargs)[0], W)
            return out if b is None else self.op.shift(out, b)
        held = {n: h for table in ("_parameters", "_buffers") for n, h, _ in named(self.base_layer, table)}
        with present(self.base_layer):
            values = {held[n]: v for n, v in self.replaced(replaced).items()}
            return called_with(self.base_layer, values, args, kwargs)

    def _bias_change(self, methods: Sequence[Method]) -> Tensor:
        b = self.kind.bias(self.base_layer)
        assert b is not None
        return torch.stack([m("replace", "bias", b).to(b.dtype) - b for m in methods]).sum(0)

    def replaced(self, methods: Sequence[Method]) -> dict[str, Tensor]:
        """P + Σ (P'_i − P) for every parameter that a `replace` method changes, and the others as they are."""
        base = self.kind.parameters(self.base_layer)
        state = {**base, **self.kind.buffers(self.base_layer)}
        out = dict(base)
        seen: set[str] = set()
        for m in methods:
            for name, value in m("replacements", state).items():
                P, value = state[name], value.to(state[name].dtype)
                out[name] = out[name] + (value - P) if name in seen else value
                seen.add(name)
        return out

    def _native(self, W: Tensor, b: Tensor | None) -> dict[str, Tensor]:
        """A composed (W, b) as values of the base layer's parameters."""
        values = {"weight": self.kind.native(W, self.base_layer)}
        return values if b is None else {**values, "bias": b}

    def _channels(self, m: Method, x: Tensor) -> Tensor:
        return self.kind.channels_back(m("before", self.kind.channels_last(x)))

    def _after(self, m: Method, y: Tensor, x: object, index: Tensor | None = None, axis: int = 0) -> Tensor:
        """`index`: y holds only these of the `axis` rows that the call has. Contiguous, because torch chooses between
        two matrix products by layout and `requires_grad`: the same bits, whether the adapter is trained or loaded."""
        if torch.is_tensor(x) and x.is_floating_point():
            x = self.kind.channels_last(x).contiguous()
        y = self.kind.channels_last(y).contiguous()
        if not can(m, TakesSpan):
            return self.kind.channels_back(m("after", y, x))
        span = self.roster.span
        if span is not None and index is not None:
            span = span.take(index, axis)
        return self.kind.channels_back(m("after", y, x, span))

    def _dense(self, methods: Sequence[Method]) -> bool:
        if not self.kind.factored:
            return any(m.mergeable and not (self.kind.own_forward and m.form == "replace") for m in methods)
        if self.geometry.pointwise or self.geometry.indexed:
            return False
        return any(not can(m, ScalesChannels) for m in by_form(methods).before)

    def _mixed(self, rows: Rows, row: Tensor | None, args: Args, kwargs: Kwargs) -> Output:
        """Per-row adapters: the base call once where no adapter changes what goes into it."""
        x, call = self._input(args, kwargs)
        table = {n: self.active_methods((n,)) for n in rows.distinct}
        if not any(table.values()):
            return self.kind.run(self.base_layer, *args, **kwargs)
        if nested(x) and (self.geometry.pointwise or self.geometry.indexed):
            acting = (m for held in table.values() for m in held)
            return self._sequences(acting, x, call, sequence_of(x))
        if (y := fused.run_rows(self, table, rows, row, x)) is not None:
            return y
        groups, undo = rows.of(row) if row is not None else rows.groups(x.shape[0], self.path, x.device)

        def joined(fn: Callable[[list[Method], Tensor], Output]) -> Output:
            parts: list[Any] = [fn(table[name], index) for name, index in groups]
            first = parts[0]
            if isinstance(first, (tuple, list)):
                return type(first)([self._joined([p[i] for p in parts], groups, undo) for i in range(len(first))])
            return torch.cat(parts)[undo]

        each = [by_form(methods) for methods in table.values()]
        if not any(c.before or c.replaced for c in each) and not any(self._dense(ms) for ms in table.values()):
            out = self.kind.run(self.base_layer, *args, **kwargs)
            y = out[0] if isinstance(out, (tuple, list)) else out

            def late(methods: list[Method], index: Tensor) -> Tensor:
                xi, yi = x[index], y[index]
                _, _, added, after = by_form(methods)
                for m in added:
                    yi = m("add", xi, yi, self.op)
                for m in after:
                    yi = self._after(m, yi, xi, index, len(y))
                return yi

            return on_first(out, lambda _: joined(late))
        if sum(torch.is_tensor(a) for a in (*args, *kwargs.values())) > 1:
            raise Refusal(
                "adapter_names",
                self.path,
                "this block takes further tensors besides its input, which have no rows to split",
            )
        return joined(
            lambda methods, index: (
                self._run(methods, (x[index],), {}) if methods else self.kind.run(self.base_layer, x[index])
            )
        )

    def _joined(self, parts: list[Any], groups: Sequence[tuple[str, Tensor]], undo: Tensor) -> Any:
        """One of a block's outputs from those of each group of rows."""
        sizes = [len(index) for _, index in groups]
        if all(torch.is_tensor(p) and p.dim() and len(p) == n for p, n in zip(parts, sizes, strict=True)):
            return torch.cat(parts)[undo]
        if all(p is parts[0] for p in parts):
            return parts[0]
        raise Refusal("adapter_names", self.path, "this block gives more than tensors with one entry a row")

    def compose(self, methods: Sequence[Method], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """(W', b') of these methods together: what the dense way runs and what a merge writes."""
        before, replaced, added, after = by_form(methods)
        W0, b0 = self.kind.read(self.base_layer).to(dtype), self.kind.bias(self.base_layer)
        W, b = W0, b0 if b0 is None else b0.to(dtype)
        if replaced:
            values = self.replaced(replaced)
            W = self.kind.matrix(values["weight"], self.base_layer).to(dtype) if "weight" in values else W
            b = values["bias"].to(dtype) if b is not None and "bias" in values else b
        for m in added:
            change, b = m("fold", W0, b)
            W = change if W is W0 else W + (change - W0)
        for m in before if self.geometry.indexed else reversed(before):
            W, b = (m("before", W.T).T, b) if self.geometry.indexed else m("fold", W, b)
        for m in after:
            W, b = m("fold", W, b)
        return self.kind.absorb(self.base_layer, W, b)
