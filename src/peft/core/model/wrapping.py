"""An adapter put into a model, also where the model holds adapters already: what get_peft_model and from_pretrained do."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from ...config import PeftConfig
from ..acting.on_model import roster_of
from ..acting.roster import Roster
from ..files.header import Loaded
from ..injection.commit import inject
from ..injection.plan import plan
from ..injection.replace import replace, unused_name
from ..load.hotswap import reload
from ..load.load import LoadResult, load_into


def holder_of_adapters(model: nn.Module) -> Roster | None:
    """The roster of a model that holds adapters already, with a warning that it does."""
    roster = roster_of(model)
    if roster is None or not roster.adapters:
        return None
    warnings.warn(
        f"You are about to modify a model with PEFT for a second time: it holds the adapters {', '.join(roster.adapters)}. "
        "To start from the base model, call `.unload()` on the PeftModel first.",
        stacklevel=5,
    )
    return roster


def wrap(
    model: nn.Module, config: PeftConfig, name: str, *, init: bool, meta: bool, autocast_adapter_dtype: bool
) -> None:
    """Put an adapter into a model. In one that holds adapters it is added to them, and acts and trains instead of them.

    An adapter of the same name is replaced by a fresh one, where that reaches all that the old one does. Where not, the
    old one would go on acting in the rest: ValueError, and the model is as it was.
    """
    roster = holder_of_adapters(model)
    options: dict[str, Any] = {"init": init, "meta": meta, "autocast_adapter_dtype": autocast_adapter_dtype}
    if roster is None or name not in roster.adapters:
        inject(model, config, name, **options)
    else:
        planned = plan(model, config, unused_name(roster), **options)
        old, new = roster.adapters[name], planned.adapter()
        places = {(path, part) for (path, _), part in zip(new.methods, new.brought_by, strict=True)}
        left = [p for (p, _), part in zip(old.methods, old.brought_by, strict=True) if (p, part) not in places]
        if left:
            raise ValueError(
                f"Adapter with name {name} already exists and reaches {', '.join(left[:5])}, which the new config does not. "
                "Use another name, delete the adapter first, or call unload()."
            )
        replace(model, roster, name, planned)
    if roster is not None:
        activate(roster, name, config)


def load_under(model: nn.Module, loaded: Loaded, name: str, strict: bool, **options: Any) -> LoadResult:
    """Bring in a saved adapter; one of that name has its weights replaced."""
    roster = roster_of(model)
    if roster is not None and name in roster.adapters:
        reload(model, loaded, name)
        return LoadResult([], [])
    return load_into(model, loaded, name, strict=strict, **options)


def activate(roster: Roster, name: str, config: PeftConfig) -> None:
    """Let one adapter act alone, and train unless it is for inference."""
    roster.activate([name])
    roster.train_only([name], config.inference_mode)
