"""The base model with adapters in it: what `peft_model.base_model` is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ...config import PeftConfig
from ...contract.capabilities import Penalised
from ...contract.managed import present
from ...registry import method
from ..acting.mix import Mix
from ..acting.roster import Roster
from ..adapted.layer import Adapted, adapted_layers
from ..injection.commit import inject
from ..injection.merge import merge, pause, resume, set_active, unmerge
from ..injection.remove import check_unloadable, delete_all, unload
from ..injection.schedules import update_and_allocate
from ..load.combine import add_weighted_adapter


class Tuner(nn.Module):
    """The base model with adapters in it: `peft_model.base_model`. Works for adapters of any methods at once."""

    tuner_layer_cls = Adapted

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def roster(self) -> Roster:
        roster = self.model.__dict__.get("_peft_roster")
        if roster is None:
            raise ValueError("This model has no adapters (they were unloaded).")
        return roster

    def forward(self, *args: object, **kwargs: object) -> Any:
        if (
            torch.compiler.is_compiling()
        ):  # nothing waits in a graph; torch 2.6 cannot enter a generator's context in one
            return self._run(args, kwargs)
        with self.roster.gate.call(), self.steady():
            return self._run(args, kwargs)

    def _run(self, args: tuple[object, ...], kwargs: dict[str, object]) -> Any:
        out = self.model(*args, **kwargs)
        return add_penalties(self.roster, out) if self.training and torch.is_grad_enabled() else out

    def generate(self, *args: object, **kwargs: object) -> Any:
        with self.roster.gate.call(), self.steady():
            return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    def steady(self) -> AbstractContextManager[None]:
        """Within, whoever acts now acts, whatever the model is switched to meanwhile."""
        roster = self.roster
        roster.known(roster.mix.active)  # a context may have been opened before its adapter was deleted
        return roster.steady()

    @contextmanager
    def use_adapter(self, adapter_name: str | Sequence[str]) -> Iterator[None]:
        """Within, this adapter (or several together) acts in the calls of this thread or task, and in no others.

        Neither what trains nor the model's own choice changes (`set_adapter` does that). A disabled model stays so.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self.roster.known(names)
        with self.roster.using(Mix(tuple(dict.fromkeys(names))) if self.roster.enabled else Mix(), held=True):
            yield

    # -- which adapters act -------------------------------------------------------------------------------------------
    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        return self.roster.configs

    @property
    def active_adapter(self) -> str | list[str]:
        chosen = self.roster.chosen
        return chosen[0] if len(chosen) == 1 else list(chosen)

    @property
    def active_adapters(self) -> list[str]:
        return list(self.roster.chosen)

    @property
    def prefix(self) -> str:
        """What tells adapter parameters by their names: what the method's begin with, or the container where further parts hang."""
        prefix = method(next(iter(self.roster.configs.values())).peft_type).prefix
        for adapter in self.roster.adapters.values():  # companions come last; all sites of one method are named alike
            for _, first in adapter.methods[:1]:
                named = all(prefix in n for n, _ in first.named_parameters())
                if adapter.brought_by[-1] or not (named or adapter.whole_model):
                    return ".adapters."
        return prefix

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate one adapter or several together, and train exactly those."""
        set_active(self.model, adapter_name, inference_mode)

    def enable_adapter_layers(self) -> None:
        self.roster.enable(True)

    def disable_adapter_layers(self) -> None:
        """No adapter acts any more; merged ones are taken out of the base."""
        if any(layer.merged for layer in adapted_layers(self.model)):
            self.unmerge_adapter()
        self.roster.enable(False)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Say which adapters train, whatever is active."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.roster.known(names)
        for name in names:
            self.roster.set_trainable(name, requires_grad)

    @property
    def targeted_module_names(self) -> list[str]:
        """Paths of the modules that the adapters' own methods change."""
        return list(dict.fromkeys(path for a in self.roster.adapters.values() for path in a.targeted if path))

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, object]:
        """The model's config as a dictionary; where it has none, one that says so."""
        config = getattr(model, "config", None)
        listed = getattr(config, "to_dict", None)
        found = config if listed is None else listed()
        return dict(found) if isinstance(found, dict) else {"model_type": "custom"}

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Remove one adapter, or several: all of them or, where one cannot be removed, none."""
        delete_all(self.model, adapter_name)

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, config: PeftConfig | None = None, **options: Any
    ) -> None:
        inject(model, config if config is not None else self.peft_config[adapter_name], adapter_name, **options)

    # -- merging --------------------------------------------------------------------------------------------------------
    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write the active (or named) adapters into the base weights; `unmerge_adapter` restores the same bits."""
        for _ in merge(self.model, adapter_names, safe=safe_merge):
            pass

    def unmerge_adapter(self) -> None:
        unmerge(self.model)

    def pause_merging(self) -> bool:
        """Take merged adapters out of the base until `resume_merging` was called as often; False: none is merged."""
        return pause(self.model)

    def resume_merging(self) -> None:
        resume(self.model)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        requantize: bool = False,
    ) -> nn.Module:
        """The base model with the adapters written in. A quantised base gives a dequantised model.

        requantize: store merged weights in the base's quantised format; the error this introduces is returned as
        `model.requantization_error` (path -> largest absolute difference of a weight).
        """
        from tqdm import tqdm

        check_unloadable(self.model)
        layers = [m for m in adapted_layers(self.model)]
        bar = tqdm(total=len(layers), desc="Merging", disable=not progressbar)
        for _ in merge(self.model, adapter_names, safe=safe_merge, keep=requantize):
            bar.update()
        bar.close()
        errors = {}
        if requantize:
            for layer in layers:
                if layer.merged and layer._kept is not None:
                    layer.base_layer, errors[layer.path] = layer.kind.requantize(layer._kept[0], layer.base_layer)
        model = unload(self.model)
        if requantize:
            model.__dict__["requantization_error"] = errors
        return model

    def unload(self) -> nn.Module:
        """The base model as it was, bit for bit."""
        if any(layer.merged for layer in adapted_layers(self.model)):
            unmerge(self.model)
        return unload(self.model)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str | None = None,
        **options: Any,
    ) -> None:
        """A new adapter that combines others; by default their exact sum. See `core/load/combine.py`."""
        with ExitStack() as whole:  # what is split over processes is put together meanwhile
            for adapter in (self.roster.adapters[n] for n in adapters if n in self.roster.adapters):
                for _, m in adapter.methods:
                    whole.enter_context(present(m))
            add_weighted_adapter(self.model, adapters, weights, adapter_name, combination_type, **options)

    def update_and_allocate(self, global_step: int) -> None:
        """After the optimizer's step and before zero_grad: lets methods with a budget schedule (AdaLoRA) follow it."""
        update_and_allocate(self.model, global_step)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)


def add_penalties(roster: Roster, out: Any) -> Any:
    """The loss plus what the acting adapters' methods ask for (AdaLoRA's orthogonality, L0)."""
    loss = getattr(out, "loss", None)
    if loss is None:
        return out
    for name in roster.mix.active:
        adapter = roster.adapters[name]
        terms = []
        for _, m in adapter.methods:  # no comprehension: torch.compile has no cells for what it assigns
            if isinstance(m.nested()[-1], Penalised) and (term := m("penalty")) is not None:
                terms.append(term)
        if terms and issubclass(cls := method(adapter.config.peft_type), Penalised):
            loss = loss + cls.total_penalty(terms, adapter.config).to(loss.device)
    out.loss = loss
    return out
