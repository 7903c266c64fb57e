"""Merging at one layer: composed values written into the base weight, and its very bits brought back."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...contract import managed
from ...contract.composition import by_form
from ...contract.method import Method
from ...errors import Refusal
from ...kernels.merging import merge_, merged
from ..files.tensors import finite
from . import fused
from .forward import Forward

Record = dict[str, list[tuple[Method, float]]]  # adapter -> its methods with the multipliers they were merged at


def merge_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 or dtype.is_complex else torch.float32


def tell_of_merged(merged: Sequence[str], wanted: Sequence[str]) -> None:
    """Warn that some of these adapters are in the weights already."""
    new = [n for n in wanted if n not in merged]
    if merged and not new and wanted:
        warnings.warn(f"{', '.join(wanted)}: already merged, nothing to do.", stacklevel=3)
    elif merged and new:
        text = f"Already merged: {', '.join(merged)}. You are now additionally merging {', '.join(new)}."
        warnings.warn(text, stacklevel=3)


class Merging(Forward):
    """A layer whose adapters can be written into its base weight."""

    record: Record  # what was merged, under these names
    _kept: tuple[nn.Module, object] | None  # the base layer, and what its kind keeps of it

    def merged_values(self, methods: Sequence[Method]) -> dict[str, Tensor]:
        """The native parameter values a merge would write; raises `Refusal` or on NaN before anything changes."""
        # whole tensors lie here meanwhile, so that nothing is to be gathered for a call
        methods = [managed.inner(m) for m in methods]
        with managed.present(self), managed.uncalled(n for m in methods for n in m.modules()):
            return self._merged_values(methods)

    def _merged_values(self, methods: Sequence[Method]) -> dict[str, Tensor]:
        for m in methods:
            if not m.mergeable:
                raise Refusal(
                    m.peft_type, f"{self.path} (merge)", "its effect on the output is no change of the weights"
                )
        with torch.no_grad():
            if len(by_form(methods).replaced) == len(methods):
                names = {n for m in methods for n in m.replaced_names}
                values = {n: v for n, v in self.replaced(methods).items() if n in names}
            elif (found := fused.products(self, methods)) is not None:
                values = {"weight": merged(*found)}
            else:
                W, b = self.compose(methods, merge_dtype(self.kind.dtype(self.base_layer)))
                replaced = by_form(methods).replaced
                names = {n for m in replaced for n in m.replaced_names}
                values = {n: v for n, v in self.replaced(replaced).items() if n in names} if replaced else {}
                values = {**values, **self._native(W, b)}
        held = dict(self.base_layer.named_parameters())
        for name, value in values.items():
            kept = held[name].dtype if name in held and held[name].is_floating_point() else value.dtype
            if not finite(value.to(kept)):
                raise ValueError(
                    f"NaNs detected: merging into {self.path}.{name} would write NaN or inf; nothing was changed."
                )
        return {n: v.detach().contiguous() for n, v in values.items()}

    def check_writable(self, tied: frozenset[int] | set[int] = frozenset()) -> None:
        """Raise `Refusal` where a change of the base weight would be lost, or reach further than this layer."""
        kind, base = self.kind, self.base_layer
        why = kind.merge_refusal(base) or managed.refusal(kind.holder(base), kind.replaces, tied)
        if why:
            raise Refusal("merge", self.path, why)

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
        self.roster.merged_at.add(self.path)
        return untied

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Write the adapters into the base weight. Checks for NaN and inf always; `safe_merge` is kept for callers."""
        names = list(adapter_names if adapter_names is not None else self.roster.chosen)
        tell_of_merged(self.merged_adapters, names)
        with self.roster.gate.change():
            self.merge_also(names)

    def merge_also(
        self, names: Sequence[str], keep: bool = True, tied: frozenset[int] | set[int] = frozenset()
    ) -> bool:
        """Merge these besides those merged already, which stay as strong as they were then; as `write` returns."""
        fresh = [n for n in names if n in self.methods and n not in self.merged_adapters]
        record = {n: [(m, m.multiplier) for m in map(managed.inner, self.methods[n])] for n in fresh}
        return self.merge_as({**self.record, **record}, keep, tied) if fresh else False

    def merge_as(self, record: Record, keep: bool = True, tied: frozenset[int] | set[int] = frozenset()) -> bool:
        """Merge just what the record says; the composition is stated on the original W, whatever was merged before."""
        before = self.record
        if record:
            managed.settle([self.kind.holder(self.base_layer)])
            self.check_writable(tied)
        self.restore()
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
        if found is None or managed.in_place(self.base_layer, found[0]):
            return False
        if found[0].untyped_storage().data_ptr() in taken or not merge_(*found):
            return False
        self.record = {n: [(m, m.multiplier) for m in self.methods[n]] for n in fresh}
        self.merged_adapters = fresh
        self.roster.merged_at.add(self.path)
        return True

    def unmerge(self) -> None:
        """Bring back the very bits of the base weight."""
        with self.roster.gate.change():
            self.restore()

    def restore(self) -> None:
        if self._kept is not None:
            original, kept = self._kept
            self.base_layer = self.kind.restore(original, kept)
            self.op.base = self.base_layer
        self._kept, self.merged_adapters, self.record = None, [], {}
        self.roster.merged_at.discard(self.path)
