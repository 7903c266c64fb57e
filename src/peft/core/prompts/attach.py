"""Prompt methods in a model: hung in, taken out, shown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...contract.method import Method
from ...contract.tree import AdapterContainer
from ..acting.roster import Roster
from ..adapted.switch import Switch, escape
from ..anatomy.language import attentions, floating, token_and_cache_stacks
from ..forms.prompt import PromptMethod
from .hooks import Prompts

if TYPE_CHECKING:
    from transformers import Cache

ENCODERS = "prompt_encoder"  # where the container of the methods hangs in a model


class Encoders(AdapterContainer, Switch):
    """The container of a model's prompt methods, `prompt_encoder.<adapter>`."""

    prompts: Prompts

    def __init__(self, prompts: Prompts) -> None:
        super().__init__()
        self.roster, self.merged_adapters = prompts.roster, []
        self.__dict__["prompts"] = prompts

    def is_off(self) -> bool:
        return self.prompts.off is self.roster.off_by_layer

    def turn(self, on: bool) -> None:
        self.prompts.off = None if on else self.roster.off_by_layer

    def of(self, name: str) -> Iterator[Method]:
        return (m for n, m in self.prompts.methods.items() if n == name)

    def held(self) -> Iterator[tuple[str, Method]]:
        return ((n, m) for n, m in self._modules.items() if isinstance(m, Method))

    def replaced(self, held: nn.Module, value: nn.Module) -> None:
        methods: dict[str, nn.Module] = self.__dict__["prompts"].methods
        methods.update({n: value for n, m in methods.items() if m is held})

    def __getitem__(self, adapter: str) -> Method:
        return self.prompts.methods[adapter]

    def __contains__(self, adapter: object) -> bool:
        return adapter in self.prompts.methods

    def __iter__(self) -> Iterator[str]:
        return iter(self.prompts.methods)

    def __len__(self) -> int:
        return len(self.prompts.methods)

    def keys(self) -> Iterable[str]:
        return self.prompts.methods.keys()


def hooks_of(model: nn.Module) -> Prompts | None:
    return model.__dict__.get("_peft_prompts")


def _encoders(model: nn.Module) -> Encoders:
    found: Encoders = getattr(model, ENCODERS)
    return found


def attach(model: nn.Module, roster: Roster, name: str, method: Method) -> None:
    """Hang a method into the model as `prompt_encoder.<name>`; the first one installs the hooks."""
    assert isinstance(method, PromptMethod)
    prompts = hooks_of(model)
    if prompts is None:
        prompts = model.__dict__["_peft_prompts"] = Prompts(model, roster)
        model.add_module(ENCODERS, Encoders(prompts))
        prompts.install(model)
    _encoders(model).put(escape(name), method)
    prompts.methods = {**prompts.methods, name: method}
    method.train(model.training)


def detach(model: nn.Module, roster: Roster, name: str) -> None:
    """Take a method out; the last one takes the hooks along."""
    prompts = hooks_of(model)
    if prompts is None or name not in prompts.methods:
        return
    prompts.methods = {n: m for n, m in prompts.methods.items() if n != name}
    _encoders(model).drop(escape(name))
    if not prompts.methods:
        prompts.remove(model)
        del model._modules[ENCODERS]
        del model.__dict__["_peft_prompts"]


def get_prompt(model: nn.Module, rows: int, tasks: Tensor | None = None) -> Tensor | Cache:
    """What acts now for a batch of `rows`: virtual tokens [rows, n, d], or a cache that holds the prefixes."""
    prompts = hooks_of(model)
    front = prompts.front(rows) if prompts is not None else None
    if prompts is None or front is None:
        raise ValueError("No prompt method is active: there is no prompt to get.")
    last = token_and_cache_stacks(model)[1]
    if front.S:
        prompts.call.tasks = tasks
        pieces = [m("prompt", tasks) for m in front.groups[0] if m.inputs]
        return torch.cat([p.expand(rows, -1, -1) for p in pieces], 1)
    cache = prompts.empty_cache()
    prompts.fill(cache, attentions(last), front, floating(last))
    return cache


def embedding_to_save(roster: Roster, name: str) -> Tensor:
    """The tensor that upstream's file calls `prompt_embeddings`."""
    roster.known([name])
    method = roster.adapters[name].methods[0][1]
    if not isinstance(method, PromptMethod):
        raise ValueError(f"Adapter {name!r} ({method.peft_type}) has no prompt.")
    return method.prompt_embeddings.detach().cpu()
