"""What other libraries find in a model and switch its adapters by."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence

from torch import nn

from ...contract.method import Method
from ..acting.roster import Roster
from ..files.keys import load_map


@functools.lru_cache(maxsize=1024)
def escape(name: str) -> str:
    """An adapter's name as a module name: injective, without dots, and no attribute of nn.Module."""
    safe = re.sub(r"[%.()]", lambda m: f"%{ord(m[0]):02X}", name)  # parentheses: transformers takes names for patterns
    return "%" + safe if hasattr(nn.Module, safe) or safe in ("training", "") else safe


class Switch:
    """What other libraries find in a model and switch its adapters by.

    Which adapters act is one choice for the whole model. Whether they act can be said of each place alone.
    """

    roster: Roster
    merged_adapters: list[str]

    @property
    def active_adapter(self) -> str | list[str]:
        return list(self.roster.asked)

    @active_adapter.setter
    def active_adapter(self, names: str | Sequence[str]) -> None:
        self.roster.activate([names] if isinstance(names, str) else list(names))

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters, as they were asked for; where only companions hang, those that have one here."""
        return list(self.roster.asked)

    @property
    def disable_adapters(self) -> bool:
        return not self.roster.enabled or self.is_off()

    @disable_adapters.setter
    def disable_adapters(self, disabled: bool) -> None:
        self.enable_adapters(not disabled)

    _active_adapter, _disable_adapters = active_adapter, disable_adapters  # where upstream's layers keep the two

    def enable_adapters(self, enabled: bool) -> None:
        """Let the adapters act here, or not, and train or not; all other places stay as they are.

        Where they are disabled in the model as a whole, one place that is enabled enables the model.
        """
        if enabled and not self.roster.own_enabled:
            self.roster.enable(True)
        self.turn(enabled)
        for name in self.roster.adapters:
            for m in self.of(name):
                train(m, enabled and name in self.roster.training)
        self.roster.uneven = True

    def is_off(self) -> bool:
        """Whether what hangs here was switched off here alone."""
        return False

    def turn(self, on: bool) -> None:
        """Switch what hangs here on or off."""
        raise NotImplementedError(f"{type(self).__name__}.turn")

    def of(self, name: str) -> Iterator[Method]:
        """An adapter's methods here."""
        raise NotImplementedError(f"{type(self).__name__}.of")

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate for the whole model, training the named adapters: the mix is one object for all layers.

        Libraries call this on every layer of a model in turn; all calls but the first find it done. Names that this
        model has no adapter of are passed over: a pipeline sets the same list in each of its models.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if not self.roster.trains_only(names, inference_mode):
            self.roster.activate_present(names)
            self.roster.train_only(self.roster.chosen, inference_mode)

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """How keys of an adapter's file lead to its tensors below this module: what transformers' loader asks for."""
        adapter = self.roster.adapters.get(adapter_name)
        return {} if adapter is None else load_map(adapter, self.held())

    def held(self) -> Iterator[tuple[str, Method]]:
        """(name below this module, method) of what hangs here."""
        return iter(())


def train(method: Method, on: bool) -> None:
    """Let what trains of a method train, or not."""
    for attr, p in method.named_parameters():
        if attr not in method.table.frozen and (p.is_floating_point() or p.is_complex()):
            p.requires_grad_(on)
