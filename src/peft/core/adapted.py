"""The one layer wrapper: a base layer, its kind, and any number of adapters of any methods.

    y = after( op( before(x), W + Σ ΔW_i + Σ (f_j(W) − W) ) + b )

Two ways lead there, with one meaning. The factored way adds each term to the base layer's output; the dense way
composes W' and runs the layer's geometry on it, and is also what merging writes. The dense way is taken where the
factored one does not exist: an input transform on a kernel larger than 1, a raw parameter.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import lowrank
from . import fused, views
from .errors import Refusal
from .inflow import load_map
from .layer import Geometry, LayerKind, Slots, Wrapper, named, on_device, tree
from .method import Method, Op
from .mix import Hub, Rows
from .weights import finite


@functools.lru_cache(maxsize=1024)
def escape(name: str) -> str:
    """An adapter's name as a module name: injective, without dots, and no attribute of nn.Module."""
    safe = re.sub(r"[%.()]", lambda m: f"%{ord(m[0]):02X}", name)  # parentheses: transformers takes names for patterns
    return "%" + safe if hasattr(nn.Module, safe) or safe in ("training", "") else safe


class Switch:
    """What other libraries find in a model and switch its adapters by; it acts on the whole model."""

    hub: Hub
    merged_adapters: list[str]

    @property
    def active_adapter(self) -> str | list[str]:
        return list(self.hub.asked)

    @active_adapter.setter
    def active_adapter(self, names: str | Sequence[str]) -> None:
        self.hub.activate([names] if isinstance(names, str) else list(names))

    @property
    def active_adapters(self) -> list[str]:
        return list(self.hub.asked)

    @property
    def disable_adapters(self) -> bool:
        return not self.hub.enabled

    @disable_adapters.setter
    def disable_adapters(self, disabled: bool) -> None:
        self.hub.enable(not disabled)

    _active_adapter, _disable_adapters = active_adapter, disable_adapters  # where upstream's layers keep the two

    def enable_adapters(self, enabled: bool) -> None:
        self.hub.enable(enabled)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate for the whole model, training the named adapters: the mix is one object for all layers.

        Libraries call this on every layer of a model in turn; all calls but the first find it done. Names that this
        model has no adapter of are passed over: a pipeline sets the same list in each of its models.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if not self.hub.trains_only(names, inference_mode):
            self.hub.activate_present(names)
            self.hub.train_only(self.hub.chosen, inference_mode)

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """How keys of an adapter's file lead to its tensors below this module: what transformers' loader asks for."""
        adapter = self.hub.adapters.get(adapter_name)
        return {} if adapter is None else load_map(adapter, self.held())

    def held(self) -> Iterator[tuple[str, Method]]:
        """(name below this module, method) of what hangs here."""
        return iter(())


class Companions(Slots, Switch):
    """The companions of one sort at a layer: what libraries switch where only companions hang. The layer does the work."""

    def __init__(self, layer: Adapted) -> None:
        super().__init__()
        self.hub, self.merged_adapters = layer.hub, []
        self.__dict__["layer"] = layer  # no child of this

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        self.layer.merge(safe_merge, adapter_names)

    def unmerge(self) -> None:
        self.layer.unmerge()

    def delete_adapter(self, adapter_name: str) -> None:
        self.layer.delete_adapter(adapter_name)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Strengths are the targeted layers' alone."""

    def scale_layer(self, scale: float) -> None:
        """See `set_scale`."""

    def unscale_layer(self, scale: float | None = None) -> None:
        """See `set_scale`."""


SET_FIRST = ("base_layer", "methods", "adapters", "hub", "merged_adapters", "former")  # what looking up a view reads
Record = dict[str, list[tuple[Method, float]]]  # adapter -> its methods with the multipliers they were merged at


class Adapted(Switch, Wrapper):
    """A base layer with adapters. Reads which of them act from the model's shared `Hub`."""

    adapters: Slots
    former: set[str]  # names that adapters no longer here had: their views are empty
    record: Record  # what was merged under these names
    kind: LayerKind
    path: str
    geometry: Geometry
    op: Op
    methods: dict[str, tuple[Method, ...]]
    _kept: Any
    _last: tuple[Any, Sequence[Method]]
    _input_name: str

    def __init__(self, base_layer: nn.Module, kind: LayerKind, hub: Hub, path: str, geometry: Geometry) -> None:
        super().__init__()
        slots = Slots()
        slots.__dict__["layer"] = self  # no child of it
        self._modules.update(base_layer=base_layer, adapters=slots)
        self.set(
            kind=kind,
            hub=hub,
            path=path,
            geometry=geometry,
            op=Op(kind, base_layer, geometry),
            former=set(),
            methods={},
            merged_adapters=[],
            record={},
            _kept=None,
            _last=(None, ()),
            _input_name=first_parameter(base_layer),
            training=base_layer.training,
        )

    # -- adapters -------------------------------------------------------------------------------------------------------
    def attach(self, adapter: str, part: str, method: Method) -> None:
        """Hang a method at `adapters.<adapter>`, a companion at `adapters.%<part>.<adapter>`."""
        if part and f"%{part}" not in self.adapters._modules:
            self.adapters.put(f"%{part}", Companions(self))
        self._slots(part).put(escape(adapter), method)
        self.set(_last=(None, ()))
        held = self.methods
        held[adapter] = (*held.get(adapter, ()), method)

    def detach(self, adapter: str) -> None:
        self._last = (None, ())
        for m in (inner for outer in self.methods.pop(adapter, ()) for inner in outer.nested()):
            self.former.update((*m.adapter_layer_names, *m.other_param_names))
        for part in ("", *self.parts):
            slots = self._slots(part)
            if escape(adapter) in slots._modules:
                slots.drop(escape(adapter))
            if part and not slots._modules:
                self.adapters.drop(f"%{part}")

    def held(self) -> Iterator[tuple[str, Method]]:
        own = {id(m) for methods in self.methods.values() for m in methods}
        return ((f"adapters.{n}", m) for n, m in self.adapters.named_modules() if id(m) in own)  # type: ignore[misc]

    def _slots(self, part: str) -> Slots:
        slots: Any = self._modules["adapters"]
        return slots._modules[f"%{part}"] if part else slots  # type: ignore[no-any-return]

    @property
    def parts(self) -> list[str]:
        """The config fields that brought companions here."""
        return [n[1:] for n, m in self.adapters._modules.items() if isinstance(m, Companions)]

    @property
    def targeted(self) -> bool:
        """Whether an adapter's own method hangs here, not only companions; also when nothing hangs here any more."""
        return len(self.parts) < len(self.adapters._modules) or not self.adapters._modules

    def active_methods(self, names: Sequence[str]) -> list[Method]:
        table = self.methods
        return [m for name in names if name in table for m in table[name]]

    @property
    def acting(self) -> bool:
        """Whether the next forward differs from the base layer's."""
        mix = self.hub.mix
        names = mix.active if mix.rows is None else mix.rows.distinct
        return not self.merged_adapters and any(n in self.methods for n in names)

    # -- forward ----------------------------------------------------------------------------------------------------------
    def forward(self, *args: Any, rows: Tensor | None = None, **kwargs: Any) -> Any:
        """The base layer's forward with the acting adapters. `rows`: the batch row of each input, where x lost it."""
        mix = self.hub.mix
        if mix.rows is not None and not self.merged_adapters:
            return self._mixed(mix.rows, rows, args, kwargs)
        methods = () if self.merged_adapters else self._acting(mix.active)
        if not methods:
            return self.kind.run(self.base_layer, *args, **kwargs)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.hub.check_recompute()
        if len(args) == 1 and not kwargs and (y := fused.run(self, methods, args[0])) is not None:
            return y
        return self._run(methods, args, kwargs)

    def _acting(self, names: tuple[str, ...]) -> Sequence[Method]:
        """`active_methods`, remembered for as long as the same names act and nothing is attached or detached."""
        if torch.compiler.is_compiling():
            return self.active_methods(names)
        known, methods = self._last
        if known is not names:
            methods = self.active_methods(names)
            self.__dict__["_last"] = (names, methods)
        return methods

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._modules["base_layer"]._forward_hooks:  # type: ignore[union-attr]
            move_recorders(self.base_layer, self)
        return nn.Module.__call__(self, *args, **kwargs)  # looked up anew: tracers put their own there

    def _input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Callable[[Any], Any]]:
        """The layer's input, and the arguments of a call that has another one in its place."""
        if args:
            return args[0], lambda x: ((x, *args[1:]), kwargs)
        name = self._input_name if self._input_name in kwargs else next(iter(kwargs))
        return kwargs[name], lambda x: ((), {**kwargs, name: x})

    def _run(self, methods: Sequence[Method], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, call = self._input(args, kwargs)
        given = x  # what `after` sees: the layer's own input, so that the parallel branch merges as it stands
        indexed = self.geometry.indexed  # an embedding's rows are what an input transform acts on
        late = [m for m in methods if m.form == "after"]
        if self._dense(methods):
            whole = [m for m in methods if m.form != "after"]
            while not self.kind.factored and late and late[0].mergeable:  # what the layer does to W' comes after it
                whole.append(late.pop(0))
            W, b = self.compose(whole, self.kind.dtype(self.base_layer))
            out: Any = self.op(x, W)
            if b is not None:
                out = self.kind.unlast(self.kind.last(out) + b)
        else:
            for m in methods:
                if m.form == "before" and not indexed:
                    x = self._wide(m, lambda v, m=m: self._channels(m, v), x)  # type: ignore[misc]
            replaced = [m for m in methods if m.form == "replace"]
            out = self._base(replaced, *call(x))
            for m in methods:
                if m.form in ("delta", "weight"):
                    out = self._wide(m, lambda v, y, m=m: m("add", v, y, self.op), x, out)  # type: ignore[misc]
            for m in methods:
                if m.form == "before" and indexed:
                    out = self._wide(m, lambda v, m=m: self._channels(m, v), out)  # type: ignore[misc]
        for m in late:
            out = _first(out, lambda y, m=m: self._wide(m, lambda v: self._after(m, v, given), y))  # type: ignore[misc]
        return out

    def _wide(self, m: Method, fn: Callable[..., Any], *tensors: Any) -> Any:
        """`fn` of the tensors; in the exact mode cast up to the method's parameters first, and its result back."""
        last = tensors[-1]
        if not self.hub.exact or not torch.is_tensor(last):
            return fn(*tensors)
        dtype = next((p.dtype for p in m.parameters() if p.is_floating_point()), last.dtype)
        dtype = torch.promote_types(dtype, last.dtype)
        return fn(*(t.to(dtype) if torch.is_tensor(t) and t.is_floating_point() else t for t in tensors)).to(last.dtype)

    def _base(self, replaced: Sequence[Method], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
        with on_device(self.base_layer):
            values = {held[n]: v for n, v in self.replaced(replaced).items()}
            with over_attributes(self.base_layer, values):
                return torch.func.functional_call(self.base_layer, values, args, kwargs)

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

    def _channels(self, m: Method, x: Tensor) -> Tensor:
        return self.kind.unlast(m("before", self.kind.last(x)))

    def _after(self, m: Method, y: Tensor, x: Any, index: Tensor | None = None, axis: int = 0) -> Tensor:
        """`index`: y holds only these of the `axis` rows that the call has. Contiguous, because torch chooses between
        two matrix products by layout and `requires_grad`: the same bits, whether the adapter is trained or loaded."""
        if torch.is_tensor(x) and x.is_floating_point():
            x = self.kind.last(x).contiguous()
        y = self.kind.last(y).contiguous()
        if not m.located:
            return self.kind.unlast(m("after", y, x))
        span = self.hub.mix.span
        if span is not None and index is not None:
            span = span.take(index, axis)
        return self.kind.unlast(m("after", y, x, span))

    def _dense(self, methods: Sequence[Method]) -> bool:
        if not self.kind.factored:
            return any(m.mergeable for m in methods)
        if self.geometry.pointwise or self.geometry.indexed:
            return False
        return any(m.form == "before" and not m.channelwise for m in methods)

    def _mixed(self, rows: Rows, row: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Per-row adapters: the base call once where no adapter changes what goes into it."""
        x, _ = self._input(args, kwargs)
        if self.methods.keys().isdisjoint(rows.distinct):
            return self.kind.run(self.base_layer, *args, **kwargs)
        if (y := fused.run_rows(self, rows, row, x)) is not None:
            return y
        table = {n: list(self.methods.get(n, ())) for n in rows.distinct}
        groups, undo = rows.of(row) if row is not None else rows.groups(x.shape[0], self.path, x.device)

        def joined(fn: Callable[[list[Method], Tensor], Any]) -> Any:
            parts = [fn(table[name], index) for name, index in groups]
            first = parts[0]
            if isinstance(first, (tuple, list)):
                return type(first)([torch.cat([p[0] for p in parts])[undo], *first[1:]])
            return torch.cat(parts)[undo]

        forms = {m.form for ms in table.values() for m in ms}
        if forms <= {"delta", "weight", "after"} and not any(self._dense(ms) for ms in table.values()):
            out = self.kind.run(self.base_layer, *args, **kwargs)
            y = out[0] if isinstance(out, (tuple, list)) else out

            def late(methods: list[Method], index: Tensor) -> Tensor:
                xi, yi = x[index], y[index]
                for m in methods:
                    if m.form != "after":
                        yi = m("add", xi, yi, self.op)
                for m in methods:
                    if m.form == "after":
                        yi = self._after(m, yi, xi, index, len(y))
                return yi

            return _first(out, lambda _: joined(late))
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

    # -- merging ------------------------------------------------------------------------------------------------------------
    def compose(self, methods: Sequence[Method], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """(W', b') of these methods together: what the dense way runs and what a merge writes."""
        replaced = [m for m in methods if m.form == "replace"]
        W0, b0 = self.kind.read(self.base_layer).to(dtype), self.kind.bias(self.base_layer)
        W, b = W0, b0 if b0 is None else b0.to(dtype)
        if replaced:
            values = self.replaced(replaced)
            W = self.kind.matrix(values["weight"], self.base_layer).to(dtype) if "weight" in values else W
            b = values["bias"].to(dtype) if b is not None and "bias" in values else b
        for m in methods:
            if m.form in ("delta", "weight"):
                change, b = m("fold", W0, b)
                W = W + (change - W0)
        before = [m for m in methods if m.form == "before"]
        for m in before if self.geometry.indexed else reversed(before):
            W, b = (m("before", W.T).T, b) if self.geometry.indexed else m("fold", W, b)
        for m in methods:
            if m.form == "after":
                W, b = m("fold", W, b)
        return self.kind.absorb(self.base_layer, W, b)

    def merged_values(self, methods: Sequence[Method]) -> dict[str, Tensor]:
        """The native parameter values a merge would write; raises `Refusal` or on NaN before anything changes."""
        for m in methods:
            if not m.mergeable:
                raise Refusal(
                    m.peft_type, f"{self.path} (merge)", "its effect on the output is no change of the weights"
                )
        with torch.no_grad():
            if {m.form for m in methods} <= {"replace"}:
                names = {n for m in methods for n in m.replaced_names}
                values = {n: v for n, v in self.replaced(methods).items() if n in names}
            elif (found := fused.products(self, methods)) is not None:
                values = {"weight": lowrank.merged(*found)}
            else:
                W, b = self.compose(methods, _wide(self.kind.dtype(self.base_layer)))
                values = {"weight": self.kind.native(W, self.base_layer)}
                if b is not None:
                    values["bias"] = b
        held = dict(self.base_layer.named_parameters())
        for name, value in values.items():
            kept = held[name].dtype if name in held and held[name].is_floating_point() else value.dtype
            if not finite(value.to(kept)):
                raise ValueError(f"Merging into {self.path}.{name} would write NaN or inf; nothing was changed.")
        return {n: v.detach().contiguous() for n, v in values.items()}

    def write(
        self,
        values: dict[str, Tensor],
        names: Sequence[str],
        keep: bool = True,
        tied: frozenset[int] | set[int] = frozenset(),
    ) -> bool:
        """Write merged values. A parameter that others hold, too, gets a copy of its own; returns whether one did."""
        with torch.no_grad():
            if keep and self._kept is None:
                self._kept = (self.base_layer, self.kind.keep(self.base_layer, list(values)))
            untied = self.kind.untie(self.base_layer, list(values), tied)
            self.base_layer = self.kind.write(self.base_layer, values)
        self.op.base = self.base_layer
        self.merged_adapters = [*self.merged_adapters, *names]
        return untied

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Write the adapters into the base weight. Checks for NaN and inf always; `safe_merge` is kept for callers."""
        self.merge_also(list(adapter_names if adapter_names is not None else self.hub.chosen))

    def merge_also(
        self, names: Sequence[str], keep: bool = True, tied: frozenset[int] | set[int] = frozenset()
    ) -> bool:
        """Merge these besides those merged already, which stay as strong as they were then; as `write` returns."""
        fresh = [n for n in names if n in self.methods and n not in self.merged_adapters]
        record = {n: [(m, m.multiplier) for m in self.methods[n]] for n in fresh}
        return self.merge_as({**self.record, **record}, keep, tied) if fresh else False

    def merge_as(self, record: Record, keep: bool = True, tied: frozenset[int] | set[int] = frozenset()) -> bool:
        """Merge just what the record says; the composition is stated on the original W, whatever was merged before."""
        before = self.record
        self.unmerge()
        if not record:
            return False
        then = [entry for entries in record.values() for entry in entries]
        now = [(m, m.multiplier) for m, _ in then]
        try:
            for m, multiplier in then:
                m.multiplier = multiplier
            values = self.merged_values([m for m, _ in then])
        except ValueError:
            self.merge_as(before)
            raise
        finally:
            for m, multiplier in now:
                m.multiplier = multiplier
        self.record = record
        return self.write(values, list(record), keep=keep, tied=tied)

    def merge_in_place(self, names: Sequence[str], taken: set[int]) -> bool:
        """Add the named adapters to W where it stands, keeping nothing; False, and nothing done, where that takes more.

        taken: addresses of weights that more than one parameter lies at, which must not change for the others.
        """
        fresh = [n for n in names if n in self.methods]
        found = None if self.record else fused.products(self, self.active_methods(fresh))
        if found is None or found[0].untyped_storage().data_ptr() in taken or not lowrank.merge_(*found):
            return False
        self.record = {n: [(m, m.multiplier) for m in self.methods[n]] for n in fresh}
        self.merged_adapters = fresh
        return True

    def unmerge(self) -> None:
        """Bring back the very bits of the base weight."""
        if self._kept is not None:
            original, kept = self._kept
            self.base_layer = self.kind.restore(original, kept)
            self.op.base = self.base_layer
        self._kept, self.merged_adapters, self.record = None, [], {}

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    # -- what other libraries use -----------------------------------------------------------------------------------------
    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    def get_base_weight(self) -> Tensor:
        """The base layer's weight in floating point and its own layout, wherever it is kept."""
        return self.kind.native(self.kind.read(self.base_layer), self.base_layer)

    def set_base_weight(self, weight_data: Tensor) -> None:
        """Write the base layer's weight."""
        if self.merged:
            raise ValueError(
                f"{self.path} is merged with {self.merged_adapters}: call unmerge() before writing its weight."
            )
        self.base_layer = self.op.base = self.kind.write(self.base_layer, {"weight": weight_data})

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an adapter adds to the weight, in the weight's layout."""
        return views.delta_weight(self, adapter)

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        raise Refusal(
            "update_layer",
            self.path,
            "an adapter is not remade layer by layer: add one with another config, whose rank_pattern and alpha_pattern "
            "give single layers their own rank and strength",
        )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def _get_available_adapters(self) -> set[str]:
        return set(self.methods)

    def nested_methods(self) -> Iterator[Method]:
        return (inner for methods in self.methods.values() for m in methods for inner in m.nested())

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """Upstream's names of the tensors that the adapters hold here."""
        return tuple(dict.fromkeys(n for m in self.nested_methods() for n in m.adapter_layer_names))

    @property
    def other_param_names(self) -> tuple[str, ...]:
        """Upstream's names of their settings."""
        return tuple(dict.fromkeys(n for m in self.nested_methods() for n in m.other_param_names))

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for m in self.methods.get(name, ()):
                m.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take the adapter out of this layer; out of the last one, it is gone from the model."""
        methods = self.methods.get(adapter_name, ())
        self.detach(adapter_name)
        self.hub.released(adapter_name, methods)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply the adapter's effect at this layer by `scale`, from its configured strength."""
        for m in self.methods.get(adapter, ()):
            m.multiplier = float(scale)

    def scale_layer(self, scale: float) -> None:
        for m in self.active_methods(self.hub.chosen):
            m.multiplier *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        for m in self.active_methods(self.hub.chosen):
            m.multiplier = 1.0 if scale is None else m.multiplier / scale

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name in SET_FIRST:
                raise  # private names are the base layer's own: hooks that libraries put there are not the wrapper's
            found = views.view(self, name)
            if found is not None:
                return found
            # code that reads a parameter instead of calling the module sees what the module computes with
            methods = () if self.merged_adapters else self.active_methods(self.hub.mix.active)
            replaced = [m for m in methods if m.form == "replace" and name in m.replaced_names]
            if name == "weight" and any(m.companion and m.form != "replace" and m.mergeable for m in methods):
                W, _ = self.compose([m for m in methods if m.companion], self.kind.dtype(self.base_layer))
                return self.kind.native(W, self.base_layer)
            return self.replaced(replaced)[name] if replaced else getattr(self.base_layer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Assignments go where the next forward reads: to the adapters, or to the base layer's own tensors."""
        own = name in self.__dict__ or hasattr(type(self), name) or "methods" not in self.__dict__
        if own or name in self._modules:
            super().__setattr__(name, value)
        elif views.view(self, name) is not None:
            views.assign(self, name, value)
        elif any(name in table for table in (self.base_layer._parameters, self.base_layer._buffers)):
            if self.merged:
                raise ValueError(f"{self.path} is merged with {self.merged_adapters}: unmerge before assigning {name}.")
            setattr(self.base_layer, name, value)
        else:
            super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        views.from_upstream(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[no-untyped-call]

    @property
    def original_module(self) -> nn.Module:
        """The module of the base model, under the name that upstream's wrapper of whole modules has for it."""
        return self.base_layer

    def extra_repr(self) -> str:
        return f"kind={self.kind.name}, adapters={list(self.methods)}"


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A layer's input, given by position or as the first keyword, and the other arguments."""
    if args:
        return args[0], args[1:], kwargs
    first = next(iter(kwargs))
    return kwargs[first], (), {k: v for k, v in kwargs.items() if k != first}


@contextmanager
def over_attributes(module: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """Within, plain attributes that stand before parameters of these names hold the values, too: FSDP 1 puts its views
    of flat parameters there, and they would win over what `functional_call` swaps in."""
    swapped = []
    for name, value in values.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if leaf in owner.__dict__:
            swapped.append((owner, leaf, owner.__dict__[leaf]))
            owner.__dict__[leaf] = value
    try:
        yield
    finally:
        for owner, leaf, before in swapped:
            owner.__dict__[leaf] = before


def first_parameter(module: nn.Module) -> str:
    """The name of the first argument of a module's forward: its input where a caller names all arguments."""
    if "forward" not in module.__dict__:
        return _first_argument(type(module).forward, True)
    forward = module.forward
    return _first_argument(getattr(forward, "__func__", forward), hasattr(forward, "__func__"))


@functools.lru_cache(maxsize=256)
def _first_argument(function: Callable[..., Any], bound: bool) -> str:
    try:
        return next(itertools.islice(inspect.signature(function).parameters, int(bound), None), "")
    except (TypeError, ValueError):
        return ""


def move_recorders(source: nn.Module, target: nn.Module) -> None:
    """Take over the hooks by which transformers records hidden states and attentions from modules of a class.

    They belong where the block's output leaves: on the wrapper, which gives the adapted output, and once per call.
    """
    for key, hook in list(source._forward_hooks.items()):
        if getattr(hook, "__module__", "") == "transformers.utils.output_capturing":
            target._forward_hooks[key] = source._forward_hooks.pop(key)


def _first(out: Any, fn: Callable[[Any], Any]) -> Any:
    """`fn` applied to a block's main output, which may come first in a tuple."""
    if isinstance(out, (tuple, list)):
        return type(out)([fn(out[0]), *out[1:]])
    return fn(out)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def adapted_layers(model: nn.Module) -> Iterator[Adapted]:
    return (m for m in tree(model, wrappers=True) if isinstance(m, Adapted))
