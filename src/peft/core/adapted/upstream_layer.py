"""What other libraries call, read and assign on a layer with adapters, under upstream's names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...contract.capabilities import Companion
from ...contract.composition import by_form
from ...contract.method import Method
from ...errors import Refusal
from ..acting.raw_reads import asks_for_parameter, reader
from . import views
from .merge import Merging, merge_dtype
from .switch import train

SET_FIRST = ("base_layer", "methods", "adapters", "roster", "merged_adapters", "former")  # what looking up a view reads


class UpstreamLayer(Merging):
    """A layer as upstream's users know it."""

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

    def update_layer(self, adapter_name: str, *args: object, **kwargs: object) -> None:
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

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """Upstream's names of the tensors that the adapters hold here."""
        return tuple(dict.fromkeys(n for m in self.nested_methods() for n in m.table.layer_names()))

    @property
    def other_param_names(self) -> tuple[str, ...]:
        """Upstream's names of their settings."""
        return tuple(dict.fromkeys(n for m in self.nested_methods() for n in m.shown.names))

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for m in self.methods.get(name, ()):
                train(m, requires_grad)
        self.roster.uneven = True

    def delete_adapter(self, adapter_name: str) -> None:
        """Take the adapter out of this layer; out of the last one, it is gone from the model."""
        methods = self.methods.get(adapter_name, ())
        self.detach(adapter_name)
        self.roster.released(adapter_name, methods)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply the adapter's effect at this layer by `scale`, from its configured strength."""
        for m in self.methods.get(adapter, ()):
            m.multiplier = float(scale)

    def scale_layer(self, scale: float) -> None:
        for m in self.active_methods(self.roster.chosen):
            m.multiplier *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        for m in self.active_methods(self.roster.chosen):
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
            if name in ("weight", "bias") and self.acting and not self.geometry.weightless:
                if not asks_for_parameter():
                    return self._composed(name, reader())
            elif replaced := [m for m in by_form(self._reading()).replaced if name in m.replaced_names]:
                return self.replaced(replaced)[name]
            return getattr(self.base_layer, name)

    def _reading(self, by: str = "") -> Sequence[Method]:
        """The methods that act on what a reading gives."""
        rows = self.roster.mix.rows
        if self.merged_adapters:
            return ()
        if rows is None:
            return self.active_methods(self.roster.mix.active)
        if by and len(rows.distinct) > 1:
            raise Refusal(
                "adapter_names",
                self.path,
                f"{by} reads its weight instead of calling it, and the rows of this batch have several; run them one by one",
            )
        return self.active_methods(rows.distinct[:1])

    def _composed(self, name: str, by: str) -> Tensor | None:
        """What the layer computes with: the base's tensor and what the acting adapters make of it, with its gradient."""
        methods = self._reading(by)
        for m in methods:
            if not m.mergeable:
                raise Refusal(
                    m.peft_type,
                    self.path,
                    f"{by} reads its {name} instead of calling it, and the effect of this method is no change of weights; "
                    "leave the layer out of target_modules",
                )
        held: Tensor | None = getattr(self.base_layer, name)
        before, replaced, added, after = by_form(methods)
        if name == "bias" and not (before or after or any(m.shifts for m in added)):
            return self.replaced(replaced)["bias"] if any("bias" in m.replaced_names for m in replaced) else held
        dtype = self.kind.dtype(self.base_layer)
        W, b = self.compose(methods, merge_dtype(dtype))
        if name == "bias":
            return None if b is None else b.to(dtype)
        return self.kind.native(W, self.base_layer).to(dtype)

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

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: object, **kwargs: object
    ) -> None:
        views.from_upstream(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @property
    def original_module(self) -> nn.Module:
        """The module of the base model, under the name that upstream's wrappers of heads and embeddings have for it."""
        if not any(isinstance(m, Companion) for m in self.nested_methods()):
            raise AttributeError("original_module")
        return self.base_layer

    @property
    def in_features(self) -> int:
        """The base layer's; of one that has none, the size of W's input: channels, or the vocabulary."""
        return self._size("in_features", self.geometry.fan_in if self.geometry.indexed else self.geometry.inputs)

    @property
    def out_features(self) -> int:
        """The base layer's; of one that has none, its output channels."""
        return self._size("out_features", self.geometry.out)

    def _size(self, name: str, size: int) -> int:
        found = getattr(self.base_layer, name, None)
        if found is None and self.geometry.weightless:
            raise AttributeError(f"{self.path}, {type(self.base_layer).__name__}, has no {name}.")
        return size if found is None else int(found)
