"""Methods whose site is the whole model: virtual tokens before the input, or keys and values before every attention.

A model computes y = f(E(ids)). Two ways lead into it, and a method states one of them:

    prompt(tasks) -> P[n, d]                   f([P; E(ids)])            n further positions, in the output, too
    keys_values(i) -> K, V[heads, n, width]    layer i attends to [K; k(x)], [V; v(x)]; the output keeps its length

Both act where the base model itself runs, through forward pre-hooks on it, so that generation, heads, pipelines and
trainers need not know. Prompts are put before the embeddings that the token stack sees. Prefixes are put into the
cache that the stack is given: positions, masks and decoding then follow from the cache's length, as for any text that
went before. A checkpointed layer drops its cache; there the attention itself is handed the layer's own prefix, which is
computed inside the block, so that every way of recomputing gives the same gradients.

Several active methods stand side by side, in activation order. Rows of a batch may have different ones: the shorter
fronts are padded and masked, and positions are counted per row. The padding lies on the left, where generation wants
it; in bidirectional encoders, whose heads read the first position, it lies behind the text: a row of the mixed batch
ends, or in encoders begins, with what the row gives alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import Refusal
from ...signatures import arguments_of
from ..acting.mix import BASE
from ..acting.roster import Roster
from ..anatomy.embeddings import token_embeddings
from ..anatomy.language import (
    CACHE,
    LAYER_CACHE,
    attentions,
    bidirectional,
    counting,
    first_position,
    floating,
    is_encoder_decoder,
    placeholder,
    token_and_cache_stacks,
    where,
)
from ..forms.prompt import PromptMethod
from .front import Front, batch, before, flat_mask, refuse_gap, refuse_packed, seen, spread


class Prompts:
    """The hooks of one model. Picklable: bound methods of this object, no closures."""

    def __init__(self, model: nn.Module, roster: Roster) -> None:
        self.roster = roster
        self.methods: dict[str, PromptMethod] = {}
        self.is_encoder_decoder = is_encoder_decoder(model)
        self.trailing = not self.is_encoder_decoder and bidirectional(
            token_and_cache_stacks(model)[0]
        )  # padding lies behind the text
        self.config = token_and_cache_stacks(model)[1].config
        self.filler = placeholder(model)
        self.names: dict[type[nn.Module], tuple[str, ...]] = {}
        self.entered = False  # the model's hook has made room in this call; the stack's fills it
        self.awaited = False  # and the stack's has not run yet
        self.lent = False  # this call's cache is ours: the caller asked for none
        self.given: Tensor | None = None  # position_ids that the caller gave
        self.tasks: Tensor | None = None

    # -- installing -----------------------------------------------------------------------------------------------------
    def install(self, model: nn.Module) -> None:
        """Hooks run before any other's: who counts tokens must see the virtual ones. The model's runs first."""
        first, last = token_and_cache_stacks(model)
        hooks: list[tuple[nn.Module, Any]] = [(m, self.enter_attention) for m in attentions(last)]
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

    # -- which methods act ------------------------------------------------------------------------------------------------
    def front(self, rows: int) -> Front | None:
        mix = self.roster.mix
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

    # -- the hooks --------------------------------------------------------------------------------------------------------
    def enter_model(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Make room for virtual tokens in all that the model and its head are given."""
        kwargs = self.by_name(module, args, kwargs)
        self.entered, self.given, self.tasks = False, None, kwargs.pop("task_ids", None)
        front = self.front(batch(kwargs))
        if front is not None and front.S:
            self.widen(kwargs, front)
            self.entered = True
        self.awaited = front is not None
        return (), kwargs

    def leave_model(self, module: nn.Module, args: Any, output: Any) -> None:
        """A model that runs its token stack past its `__call__` would ignore the prompts."""
        if self.awaited:
            self.entered = self.awaited = False
            raise RuntimeError(
                f"{type(module).__name__} ran without calling {type(token_and_cache_stacks(module)[0]).__name__}: prompts have no way in."
            )

    def enter_stack(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Fill the room: virtual tokens into the embeddings, prefixes into the cache."""
        kwargs = self.by_name(module, args, kwargs)
        front = self.front(batch(kwargs))
        if front is None:
            return None
        if front.S:
            if not self.entered:
                self.widen(kwargs, front)
            self.place(module, kwargs, front)
        self.entered = self.awaited = False
        self.lead(module, kwargs, front)
        return (), kwargs

    def leave_stack(self, module: nn.Module, args: Any, output: Any) -> Any:
        """A cache that only carried the prefix in is not the caller's: a next call would continue after this text."""
        if not self.lent:
            return None
        self.lent = False
        kept = {k: v for k, v in output.items() if k != CACHE} if hasattr(output, CACHE) else None
        return None if kept is None else type(output)(**kept)

    def enter_pair(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """An encoder-decoder model as a whole: tokens before the decoder's, where a method has them.

        They stand where the decoder is given its whole text, in training and evaluation; generation, which hands over
        the encoder's output, goes without them, as upstream's does.
        """
        kwargs = self.by_name(module, args, kwargs)
        self.given, self.tasks = None, kwargs.pop("task_ids", None)
        front = self.front(batch(kwargs))
        if front is not None and kwargs.get("encoder_outputs") is None and kwargs.get(CACHE) is None:
            self.before_decoder(module, kwargs, front)
        return (), kwargs

    def enter_encoder(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        kwargs = self.by_name(module, args, kwargs)
        front = self.front(batch(kwargs))
        if front is None or not front.S:
            return None
        front.P, front.keyed = 0, [0] * len(front.groups)
        self.widen(kwargs, front)
        self.place(module, kwargs, front)
        self.lead(module, kwargs, front)
        return (), kwargs

    def enter_decoder(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
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
                kwargs["encoder_attention_mask"] = torch.cat([seen, mask], 1)
        front.S, front.soft = 0, [0] * len(front.groups)
        front.uneven = len(set(front.keyed)) > 1
        self.lead(module, kwargs, front)
        return (), kwargs

    def enter_attention(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A layer that checkpointing took the cache from gets its own prefix back."""
        if not module.training or not self.methods:
            return None
        kwargs = self.by_name(module, args, kwargs)
        hidden = kwargs.get("hidden_states")
        name = next(n for n in self.names[type(module)] if n in LAYER_CACHE)
        if kwargs.get(name) is not None or hidden is None:
            return None
        front = self.front(hidden.shape[0])
        if front is None or not front.P:
            return None
        kwargs[name] = self.empty_cache()
        self.fill(kwargs[name], [module], front, hidden.dtype)
        return (), kwargs

    def by_name(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.names[type(module)], args, strict=False)), **kwargs}

    # -- virtual tokens ------------------------------------------------------------------------------------------------------
    def widen(self, kwargs: dict[str, Any], front: Front) -> None:
        """Room for `front.S` tokens before the text, or, when the cache has them already, in the mask."""
        S, past = front.S, seen(kwargs.get(CACHE))
        self.given = kwargs.pop("position_ids", None)
        tokens = kwargs.get("inputs_embeds") if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        length = tokens.shape[1]
        refuse_packed(self.given, kwargs.get("attention_mask"), past)
        mask = flat_mask(kwargs.get("attention_mask"), length if not past else past - front.width + length)
        if not past:
            for name, fill in (("input_ids", self.filler), ("inputs_embeds", 0), ("token_type_ids", 0)):
                if torch.is_tensor(kwargs.get(name)):
                    kwargs[name] = before(kwargs[name], S, fill)
            for name in ("labels", "shift_labels"):
                labels = kwargs.get(name)
                if torch.is_tensor(labels) and labels.shape == tokens.shape[:2] and not labels.is_floating_point():
                    kwargs[name] = before(labels, S, -100)
        if mask is None and front.uneven:
            real = length if not past else past - front.width + length
            mask = torch.ones(front.rows, real, device=tokens.device).long()
        if mask is not None:
            kwargs["attention_mask"] = torch.cat([front.visible(front.soft, S, mask.device).to(mask.dtype), mask], 1)
        if self.trailing and front.uneven:
            for name in ("input_ids", "inputs_embeds", "token_type_ids", "labels", "shift_labels", "attention_mask"):
                t = kwargs.get(name)
                if torch.is_tensor(t) and t.shape[:2] == (front.rows, length + S):
                    kwargs[name] = front.turn(t)
        rows = self.roster.mix.rows
        if rows is not None and rows.tokens is not None and not past and not self.is_encoder_decoder:
            rows.tokens = length + S

    def place(self, module: nn.Module, kwargs: dict[str, Any], front: Front) -> None:
        """The virtual tokens themselves, in the room that `widen` made."""
        if seen(kwargs.get(CACHE)):
            return
        x = kwargs.get("inputs_embeds")
        if x is None:
            table = token_embeddings(module)
            assert table is not None
            x = table(kwargs["input_ids"])
        turned = self.trailing and front.uneven
        x = front.turn(x, back=True) if turned else x
        x = torch.cat([self.soft(front, x), x[:, front.S :]], 1)
        kwargs["input_ids"], kwargs["inputs_embeds"] = None, front.turn(x) if turned else x

    def soft(self, front: Front, x: Tensor, decoder: bool = False) -> Tensor:
        """[rows, S, d]: each row's virtual tokens, padded on the left."""
        tasks = self.tasks if self.tasks is not None else self.roster.mix.tasks
        if tasks is not None:
            tasks = torch.stack(spread(list(tasks.reshape(-1)), front.rows, "task_ids")).to(x.device)
        parts = []
        for methods in front.groups:
            pieces = [x.new_zeros(front.rows, 0, x.shape[-1])]
            for m in methods:
                if m.inputs and (not decoder or m.prompts_decoder):
                    p = m("prompt", tasks).to(x.device, x.dtype)
                    p = p[..., m.inputs :, :] if decoder else p[..., : m.inputs, :]
                    pieces.append(p.expand(front.rows, -1, -1))
            part = torch.cat(pieces, 1)
            parts.append(part if decoder else F.pad(part, (0, 0, front.S - part.shape[1], 0)))
        return front.choose(parts)

    def before_decoder(self, module: nn.Module, kwargs: dict[str, Any], front: Front) -> None:
        counts = [
            sum(m.inputs for m in g if m.prompts_decoder and m.config.num_transformer_submodules == 2)
            for g in front.groups
        ]
        if not max(counts):
            return
        if len(set(counts)) > 1:
            raise Refusal(
                "adapter_names",
                type(module).__name__,
                "rows would get different numbers of tokens before the decoder's text",
            )
        n, labels = counts[0], kwargs.get("labels")
        x = kwargs.get("decoder_inputs_embeds")
        if x is None:
            ids = kwargs.pop("decoder_input_ids", None)
            ids = module.prepare_decoder_input_ids_from_labels(labels) if ids is None else ids  # type: ignore[operator]
            table = token_embeddings(module.get_decoder())  # type: ignore[operator]
            assert table is not None
            x = table(ids)
        kwargs["decoder_inputs_embeds"] = torch.cat([self.soft(front, x, decoder=True), x], 1)
        if labels is not None:
            kwargs["labels"] = before(labels, n, -100)
        if kwargs.get("decoder_attention_mask") is not None:
            kwargs["decoder_attention_mask"] = before(kwargs["decoder_attention_mask"], n, 1)

    # -- keys and values ---------------------------------------------------------------------------------------------------------
    def lead(self, module: nn.Module, kwargs: dict[str, Any], front: Front) -> None:
        """Prefixes into the cache and the mask; positions, where the model would count them wrongly."""
        tokens = kwargs.get("inputs_embeds") if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        length, past = tokens.shape[1], seen(kwargs.get(CACHE))
        given: Tensor | None = self.given if front.S else kwargs.get("position_ids")
        made: Tensor | None = None
        if front.P:
            total = length if not past else past - front.P + length
            refuse_packed(given, kwargs.get("attention_mask"), past)
            mask = flat_mask(kwargs.get("attention_mask"), total)
            if not past:
                dtype = tokens.dtype if tokens.is_floating_point() else floating(module)
                self.lent = kwargs.get(CACHE) is None and kwargs.get("use_cache") is False
                kwargs[CACHE] = self.roomy(kwargs.get(CACHE), front)
                refuse_gap(module, kwargs[CACHE], front)
                self.fill(kwargs[CACHE], attentions(module), front, dtype)
            if mask is None and front.uneven:
                mask = torch.ones(front.rows, total, device=tokens.device).long()
            if mask is not None:
                kwargs["attention_mask"] = torch.cat(
                    [front.visible(front.keyed, front.P, mask.device).to(mask.dtype), mask], 1
                )
            made = given + front.P if given is not None and not front.uneven and not front.S else None
        elif front.S and not past and kwargs.get(CACHE) is not None:
            kwargs[CACHE] = self.roomy(kwargs[CACHE], front)
        if front.uneven:
            made = self.positions(module, kwargs, front, length, past, given)
        if made is not None:
            kwargs["position_ids"] = made

    def positions(
        self, module: nn.Module, kwargs: dict[str, Any], front: Front, length: int, past: int, given: Tensor | None
    ) -> Tensor | None:
        """[rows, length]: positions as each row would have them alone. None where the model's own count is right."""
        how = counting(module)
        if how == "own":
            raise Refusal(
                "adapter_names",
                type(module).__name__,
                "its rows have different numbers of virtual tokens, and it counts positions itself (no position_ids)",
            )
        if how != "given":
            kwargs.pop("position_ids", None)
            return None
        device, index = kwargs["attention_mask"].device, torch.arange(length, device=kwargs["attention_mask"].device)
        if self.trailing:
            return index + front.per_row(front.keyed, device)[:, None] + first_position(module)
        own = front.per_row([s + p for s, p in zip(front.soft, front.keyed, strict=True)], device)
        counted = index[None] + (past or front.P) - (front.width - own)[:, None]
        counted = counted.clamp(min=0) + first_position(module)
        if given is not None and given.dim() == 2:
            own = given.to(device).expand(front.rows, -1) + front.per_row(front.keyed, device)[:, None]
            own = F.pad(own, (length - own.shape[1], 0))
            plain = front.per_row(front.soft, device)[:, None] == 0
            counted = torch.where(plain, own, counted)
        return counted

    def fill(self, cache: Any, modules: Any, front: Front, dtype: torch.dtype) -> None:
        """Each layer's prefix into the cache; shared by the batch until the cache lays out its own memory."""
        own = getattr(cache, "self_attention_cache", cache)
        done: set[int] = set()
        for module in modules:
            layer: int = module.layer_idx
            if layer in done:
                continue
            done.add(layer)
            device = where(module)
            parts = []
            for methods in front.groups:
                pairs = [m("keys_values", layer) for m in methods if m.keyed]
                parts.append([torch.cat([p[i] for p in pairs], 1) if pairs else None for i in (0, 1)])
            like = next(t for part in parts for t in part if t is not None)
            states = []
            for i in (0, 1):
                each = [
                    like.new_zeros(like.shape[0], 0, like.shape[2]) if part[i] is None else part[i] for part in parts
                ]
                each = [F.pad(t, (0, 0, front.P - t.shape[1], 0)).expand(front.rows, -1, -1, -1) for t in each]
                states.append(front.choose(each).to(device, dtype))
            own.update(*states, layer)

    def empty_cache(self) -> Any:
        from transformers import DynamicCache, EncoderDecoderCache

        one: Callable[[], Any] = lambda: DynamicCache(config=self.config)  # noqa: E731
        return EncoderDecoderCache(one(), one()) if self.is_encoder_decoder else one()

    def roomy(self, cache: Any, front: Front) -> Any:
        """The cache to fill: one of fixed size was made without knowing of virtual tokens, so it gets a larger one."""
        if cache is None:
            return self.empty_cache()
        if getattr(cache, "is_compileable", False) and not self.is_encoder_decoder:
            longest = max(getattr(x, "max_cache_len", 0) for x in cache.layers)
            return type(cache)(config=self.config, max_cache_len=longest + front.width)
        return cache
