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
    """What other libraries find in a model and switch its adapters by; it acts on the whole model."""

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
        return list(self.roster.asked)

    @property
    def disable_adapters(self) -> bool:
        return not self.roster.enabled

    @disable_adapters.setter
    def disable_adapters(self, disabled: bool) -> None:
        self.roster.enable(not disabled)

    _active_adapter, _disable_adapters = active_adapter, disable_adapters  # where upstream's layers keep the two

    def enable_adapters(self, enabled: bool) -> None:
        self.roster.enable(enabled)

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
