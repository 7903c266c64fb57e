"""What the hooks of one model share: its methods, what the model looks like, and the call that runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..acting.mix import BASE
from ..acting.per_thread import PerThread
from ..acting.roster import Roster
from ..anatomy.language import bidirectional, is_encoder_decoder, placeholder, token_and_cache_stacks
from ..forms.prompt import PromptMethod
from .arguments import spread
from .front import Front

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class InCall:
    """What several hooks must know of the call that runs in their thread."""

    def __init__(self) -> None:
        self.entered = False  # the model's hook has made room in this call; the stack's fills it
        self.awaited = False  # and the stack's has not run yet
        self.lent = False  # this call's cache is ours: the caller asked for none
        self.given: Tensor | None = None  # position_ids that the caller gave
        self.order: Tensor | None = None  # which column of [virtual tokens; text] stands where, in each row
        self.tasks: Tensor | None = None


class PromptState:
    """The prompt methods of a model, and of the running call what several of its hooks must know."""

    def __init__(self, model: nn.Module, roster: Roster) -> None:
        tokens, cached = token_and_cache_stacks(model)
        self.roster = roster
        self.methods: dict[str, PromptMethod] = {}
        self.is_encoder_decoder = bool(is_encoder_decoder(model))
        self.trailing = not self.is_encoder_decoder and bidirectional(tokens)  # padding lies behind the text
        self.config: PreTrainedConfig | None = getattr(cached, "config", None)
        self.filler = placeholder(model)
        self.off: object = None  # the roster's `off_by_layer` while prompts are switched off by themselves
        self.threads = PerThread(InCall)

    @property
    def call(self) -> InCall:
        return self.threads.held

    def front(self, rows: int) -> Front | None:
        """What the methods that act now put before a batch of `rows`."""
        mix = self.roster.mix
        if self.off is not None and self.off is self.roster.off_by_layer:
            return None
        if mix.rows is None:
            acting = [self.methods[n] for n in mix.active if n in self.methods]
            return Front(rows, [acting]) if acting else None
        names = mix.rows.names
        if not any(n in self.methods for n in names):
            return None
        names = tuple(spread(list(names), rows, "adapter_names"))
        distinct = list(dict.fromkeys(names))
        groups = [[self.methods[n]] if n in self.methods and n != BASE else [] for n in distinct]
        return Front(rows, groups, torch.tensor([distinct.index(n) for n in names]))
