"""Methods whose site is the whole model: virtual tokens before the input, or keys and values before every attention.

A model computes y = f(E(ids)). Two ways lead into it, and a method states one of them:

    prompt(tasks) -> P[n, d]                   f([P; E(ids)])            n further positions, in the output, too
    keys_values(i) -> K, V[heads, n, width]    layer i attends to [K; k(x)], [V; v(x)]; the output keeps its length

Both act where the base model itself runs, through forward pre-hooks on it, so that generation, heads, pipelines and
trainers need not know. A checkpointed layer drops its cache; there the attention itself is handed the layer's own
prefix, which is computed inside the block, so that every way of recomputing gives the same gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ...signatures import arguments_of
from ..acting.roster import Roster
from ..anatomy.language import CACHE, LAYER_CACHE, attentions, token_and_cache_stacks
from .arguments import Arguments, Call, batch, taken
from .keys_values import KeysValues
from .virtual_tokens import VirtualTokens


class Prompts(VirtualTokens, KeysValues):
    """The hooks of one model. Picklable: bound methods of this object, no closures."""

    def __init__(self, model: nn.Module, roster: Roster) -> None:
        super().__init__(model, roster)
        self.names: dict[type[nn.Module], tuple[str, ...]] = {}

    def install(self, model: nn.Module) -> None:
        """Hooks run before any other's: who counts tokens must see the virtual ones. The model's runs first."""
        first, last = token_and_cache_stacks(model)
        hooks: list[tuple[nn.Module, Callable[..., Call | None]]] = [
            (m, self.enter_attention) for m in attentions(last)
        ]
        if self.is_encoder_decoder:
            hooks += [(first, self.enter_encoder), (last, self.enter_decoder), (model, self.enter_pair)]
        else:
            hooks += [(first, self.enter_stack), (model, self.enter_model)]
            model.register_forward_hook(self.leave_model)
        last.register_forward_hook(self.leave_stack)
        for module, hook in hooks:
            self.names[type(module)] = arguments_of(type(module))
            module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)

    def remove(self, model: nn.Module) -> None:
        for module in model.modules():
            for key, hook in list(module._forward_pre_hooks.items()):
                if getattr(hook, "__self__", None) is self:
                    del module._forward_pre_hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
            for key, hook in list(module._forward_hooks.items()):
                if getattr(hook, "__self__", None) is self:
                    del module._forward_hooks[key]

    def enter_model(self, module: nn.Module, args: tuple[object, ...], kwargs: Arguments) -> Call:
        """Make room for virtual tokens in all that the model and its head are given."""
        kwargs = self.by_name(module, args, kwargs)
        self.call.entered, self.call.given, self.call.tasks = False, None, kwargs.pop("task_ids", None)
        front = self.front(batch(kwargs))
        if front is not None and front.S:
            self.widen(kwargs, front)
            self.call.entered = True
        self.call.awaited = front is not None
        return (), self.as_taken(module, kwargs)

    def leave_model(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        """A model that runs its token stack past its `__call__` would ignore the prompts."""
        if self.call.awaited:
            self.call.entered = self.call.awaited = False
            raise RuntimeError(
                f"{type(module).__name__} ran without calling {type(token_and_cache_stacks(module)[0]).__name__}: prompts have no way in."
            )

    def enter_stack(self, module: nn.Module, args: tuple[object, ...], kwargs: Arguments) -> Call | None:
        """Fill the room: virtual tokens into the embeddings, prefixes into the cache."""
        kwargs = self.by_name(module, args, kwargs)
        front = self.front(batch(kwargs))
        if front is None:
            return None
        if front.S:
            if not self.call.entered:
                self.widen(kwargs, front)
            self.place(module, kwargs, front)
        self.call.entered = self.call.awaited = False
        self.lead(module, kwargs, front)
        return (), self.as_taken(module, kwargs)

    def leave_stack(self, module: nn.Module, args: tuple[object, ...], output: object) -> object:
        """A cache that only carried the prefix in is not the caller's: a next call would continue after this text."""
        if not self.call.lent:
            return None
        self.call.lent = False
        if not isinstance(output, dict) or not {CACHE, "cache"} & output.keys():
            return None
        return type(output)(**{k: v for k, v in output.items() if k not in (CACHE, "cache")})

    def enter_pair(self, module: nn.Module, args: tuple[object, ...], kwargs: Arguments) -> Call:
        """An encoder-decoder model as a whole: tokens before the decoder's, where a method has them.

        They stand where the decoder is given its whole text, in training and evaluation; generation, which hands over
        the encoder's output, goes without them, as upstream's does.
        """
        kwargs = self.by_name(module, args, kwargs)
        self.call.given, self.call.tasks = None, kwargs.pop("task_ids", None)
        front = self.front(batch(kwargs))
        if front is not None and kwargs.get("encoder_outputs") is None and kwargs.get(CACHE) is None:
            self.before_decoder(module, kwargs, front)
        return (), self.as_taken(module, kwargs)

    def enter_encoder(self, module: nn.Module, args: tuple[object, ...], kwargs: Arguments) -> Call | None:
        kwargs = self.by_name(module, args, kwargs)
        front = self.front(batch(kwargs))
        if front is None or not front.S:
            return None
        front.P, front.keyed = 0, [0] * len(front.groups)
        self.widen(kwargs, front)
        self.place(module, kwargs, front)
        self.lead(module, kwargs, front)
        return (), self.as_taken(module, kwargs)

    def enter_decoder(self, module: nn.Module, args: tuple[object, ...], kwargs: Arguments) -> Call | None:
        kwargs = self.by_name(module, args, kwargs)
        front = self.front(batch(kwargs))
        if front is None:
            return None
        encoded, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        if encoded is not None and front.S and (mask is not None or front.uneven):
            real = encoded.shape[1] - front.S
            mask = torch.ones(front.rows, real, device=encoded.device).long() if mask is None else mask
            if mask.shape[1] == real:
                seen = front.visible(front.soft, front.S, mask.device).to(mask.dtype)
                order = front.order(mask, front.S + real, trailing=False)
                wide = torch.cat([seen, mask], 1)
                kwargs["encoder_attention_mask"] = wide if order is None else taken(wide, order)
        front.S, front.soft = 0, [0] * len(front.groups)
        front.uneven = len(set(front.keyed)) > 1
        self.lead(module, kwargs, front)
        return (), self.as_taken(module, kwargs)

    def enter_attention(self, module: nn.Module, args: tuple[object, ...], kwargs: Arguments) -> Call | None:
        """A layer that checkpointing took the cache from gets its own prefix back."""
        if not module.training or not self.methods:
            return None
        kwargs = self.by_name(module, args, kwargs)
        hidden = kwargs.get("hidden_states")
        name = next(n for n in self.names[type(module)] if n in LAYER_CACHE)
        name = CACHE if name == "cache" else name
        if kwargs.get(name) is not None or hidden is None:
            return None
        front = self.front(hidden.shape[0])
        if front is None or not front.P:
            return None
        kwargs[name] = self.empty_cache()
        self.fill(kwargs[name], [module], front, hidden.dtype)
        return (), self.as_taken(module, kwargs)

    def by_name(self, module: nn.Module, args: tuple[object, ...], kwargs: Arguments) -> Arguments:
        """All arguments of a call by their names."""
        names = self.names[type(module)]
        named = {
            names[i]: arg for i, arg in enumerate(args[: len(names)])
        }  # no zip: torch 2.6 does not compile `strict`
        kwargs = {**named, **kwargs}
        if renamed(names) and "cache" in kwargs:
            kwargs[CACHE] = kwargs.pop("cache")
        return kwargs

    def as_taken(self, module: nn.Module, kwargs: Arguments) -> Arguments:
        """Back to the names that the module has for them."""
        if renamed(self.names[type(module)]) and CACHE in kwargs:
            kwargs["cache"] = kwargs.pop(CACHE)
        return kwargs


def renamed(names: tuple[str, ...]) -> bool:
    """Whether a module calls `past_key_values` its `cache`, as from transformers 5.24."""
    return "cache" in names and CACHE not in names
