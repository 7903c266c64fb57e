"""Every module of the base model whose forward takes `input_ids` is watched: during its call its thread has a `Span`,
which a checkpointed recompute finds again, as it finds the adapters.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ...contract.tree import tree
from ...signatures import arguments_of
from .roster import Roster
from .span import Span


def read(arguments: Mapping[str, object], outer: Span | None) -> Span:
    """The span of a call of a model, from its arguments; without tokens it fits nothing."""
    tokens = arguments.get("input_ids")
    tokens = arguments.get("inputs_embeds") if tokens is None else tokens
    if not torch.is_tensor(tokens) or tokens.dim() < 2:
        return Span(0, 0, outer=outer)
    rows, length = tokens.shape[:2]
    cache = arguments.get("past_key_values", arguments.get("cache"))  # `cache`: transformers from 5.24
    offset = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
    mask, labels = arguments.get("attention_mask"), arguments.get("labels")
    number = None
    if (
        torch.is_tensor(mask)
        and mask.dim() == 2
        and mask.shape[0] == rows
        and mask.shape[1] in (length, offset + length)
    ):
        before = offset if mask.shape[1] == length else 0  # a mask of this call alone: what the cache holds is real
        number = torch.where(mask != 0, (mask != 0).long().cumsum(1) - 1 + before, -1)[:, mask.shape[1] - length :]
    prompt = None
    if torch.is_tensor(labels) and labels.shape == (rows, length):
        prompt = (labels != -100).long().cumsum(1) == 0
    elif outer is not None and (outer.rows, outer.length) == (rows, length):
        prompt = outer.prompt
    return Span(rows, length, offset, number, prompt, outer)


class Watch:
    """Hooks that keep the span of a call while it runs; picklable, unlike closures."""

    def __init__(self, roster: Roster, names: tuple[str, ...]) -> None:
        self.roster, self.names = roster, names

    def enter(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        here = self.roster.here
        here.span = read({**dict(zip(self.names, args, strict=False)), **kwargs}, here.span)

    def leave(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        here = self.roster.here
        if here.span is not None:
            here.span = here.span.outer


def watch(model: nn.Module, roster: Roster) -> None:
    """Watch `model` and every module below it that takes token ids; once."""
    if "_peft_watch" in model.__dict__:
        return
    handles = []
    for module in tree(model):
        names = arguments_of(type(module))
        if "input_ids" in names and "attention_mask" in names:
            eyes = Watch(roster, names)
            handles.append(module.register_forward_pre_hook(eyes.enter, with_kwargs=True))
            handles.append(module.register_forward_hook(eyes.leave, always_call=True))
    model.__dict__["_peft_watch"] = handles


def unwatch(model: nn.Module) -> None:
    for handle in model.__dict__.pop("_peft_watch", ()):
        handle.remove()
