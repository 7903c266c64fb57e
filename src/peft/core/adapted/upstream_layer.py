"""What other libraries call, read and assign on a layer with adapters, under upstream's names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...contract.capabilities import Companion, can
from ...contract.composition import by_form
from ...errors import Refusal
from . import views
from .merge import Merging
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
            # code that reads a parameter instead of calling the module sees what the module computes with
            methods = () if self.merged_adapters else self.active_methods(self.roster.mix.active)
            replacing = by_form(methods).replaced
            brought = [m for m in methods if can(m, Companion)]
            if name == "weight" and any(m.mergeable for m in brought if m not in replacing):
                W, _ = self.compose(brought, self.kind.dtype(self.base_layer))
                return self.kind.native(W, self.base_layer)
            replaced = [m for m in replacing if name in m.replaced_names]
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
