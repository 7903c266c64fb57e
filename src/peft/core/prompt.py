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

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import require
from . import offload
from .adapted import Slots, Switch, escape
from .errors import Refusal
from .layer import on_device
from .method import Method, Site
from .mix import BASE, Hub
from .span import arguments_of

CACHE = "past_key_values"
LAYER_CACHE = {CACHE, "past_key_value", "layer_past"}  # what attention modules call it


class Table(nn.Module):
    """Rows of trainable vectors: `weight[rows, width]`."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class Encoders(Slots, Switch):
    """The container of a model's prompt methods, `prompt_encoder.<adapter>`."""

    def __init__(self, hub: Hub) -> None:
        super().__init__()
        self.hub, self.merged_adapters = hub, []

    def held(self) -> Iterator[tuple[str, Method]]:
        return ((n, m) for n, m in self._modules.items() if isinstance(m, Method))

    def replaced(self, held: nn.Module, value: nn.Module) -> None:
        methods = self.__dict__["prompts"].methods
        methods.update({n: value for n, m in methods.items() if m is held})

    # -- by adapter name, as in a dictionary ----------------------------------------------------------------------------
    def __getitem__(self, adapter: str) -> Method:
        return self.__dict__["prompts"].methods[adapter]  # type: ignore[no-any-return]

    def __contains__(self, adapter: object) -> bool:
        return adapter in self.__dict__["prompts"].methods

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dict__["prompts"].methods)

    def __len__(self) -> int:
        return len(self.__dict__["prompts"].methods)

    def keys(self) -> Iterable[str]:
        return self.__dict__["prompts"].methods.keys()  # type: ignore[no-any-return]


class PromptMethod(Method):
    """What the methods of the whole model share: the sizes they take from it, and what the file holds."""

    form = "prompt"
    prefix = "prompt_encoder"
    identity = False
    keys: ClassVar[dict[str, str]] = {"embedding.weight": "prompt_embeddings"}
    embedding: Table

    # -- the maths: one of the two ----------------------------------------------------------------------------------------
    def prompt(self, tasks: Tensor | None) -> Tensor:
        """P[n, d], or [rows, n, d] when it depends on the row's task; n·2 rows for an encoder and its decoder."""
        raise AttributeError(f"{type(self).__name__} puts no tokens before the input")

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V[heads, n, width] that layer `layer` attends to before its own."""
        raise AttributeError(f"{type(self).__name__} puts no keys and values before the attention")

    prompts_decoder: ClassVar[bool] = False  # the second half of `prompt` goes before the decoder's tokens

    @property
    def inputs(self) -> int:
        """Virtual tokens before the input."""
        return self.config.num_virtual_tokens if type(self).prompt is not PromptMethod.prompt else 0

    @property
    def keyed(self) -> int:
        """Virtual keys and values before each attention."""
        return self.config.num_virtual_tokens if type(self).keys_values is not PromptMethod.keys_values else 0

    @property
    def prompt_embeddings(self) -> Tensor:
        """What upstream's file holds under this name."""
        return self.embedding.weight

    # -- sizes --------------------------------------------------------------------------------------------------------------
    @classmethod
    def prepare(cls, config: Any, model: nn.Module) -> None:
        """Read num_layers, token_dim, num_attention_heads and num_transformer_submodules from the base model."""
        require(config, "num_virtual_tokens")
        text = text_config(model)
        if text is None or token_embeddings(model) is None:
            raise Refusal(
                cls.peft_type,
                type(model).__name__,
                "virtual tokens stand before token embeddings, and this model has none (no get_input_embeddings())",
            )
        task = getattr(config.task_type, "value", config.task_type)
        if config.num_transformer_submodules is None:
            pair = task == "SEQ_2_SEQ_LM" or (task is None and is_pair(model))
            config.num_transformer_submodules = 2 if pair else 1
        for name, value in cls.sizes(text, model).items():
            if getattr(config, name) is None:
                setattr(config, name, value)
        if getattr(config, "encoder_hidden_size", 0) is None:
            config.encoder_hidden_size = config.token_dim
        cls.fits(config, model)

    @classmethod
    def sizes(cls, text: Any, model: nn.Module) -> dict[str, int]:
        width = getattr(token_embeddings(model), "embedding_dim", None) or number(text, "hidden_size")
        return {
            "num_layers": number(text, "num_hidden_layers"),
            "token_dim": width,
            "num_attention_heads": number(text, "num_attention_heads", "encoder_attention_heads"),
        }

    @classmethod
    def fits(cls, config: Any, model: nn.Module) -> None:
        """Raise when the sizes that the config states are not this model's."""
        width = cls.sizes(text_config(model), model)["token_dim"]
        if config.token_dim != width:
            raise ValueError(
                f"{cls.peft_type}: token_dim={config.token_dim}, but the embeddings of this model have {width} entries. "
                "Is this the right base model? Leave token_dim at None to read it from the model."
            )

    def rank(self) -> int | None:
        return None


class Encoded(PromptMethod):
    """A prompt that is trained through a small network and saved as the network's result, `prompt_embeddings`.

    The file also holds the network (`save_encoder`), so that training goes on after a reload where it stopped. A file
    without it gives a plain table that holds the result, which acts the same and trains directly.
    """

    networks: ClassVar[tuple[str, ...]] = ()  # attributes with the network's modules

    def encode(self, table: Tensor, part: slice | None = None) -> Tensor:
        """The network on the table; `part` asks for some columns of the result only."""
        raise AttributeError(f"{type(self).__name__} has no network")

    @property
    def plain(self) -> bool:
        return all(getattr(self, n) is None for n in self.networks)

    def result(self, part: slice | None = None) -> Tensor:
        table = self.embedding.weight
        if not self.plain:
            return self.encode(table, part)
        return table if part is None else table[:, part]

    @property
    def prompt_embeddings(self) -> Tensor:
        return self.result()

    def disk_keys(self) -> dict[str, str]:
        if self.plain:
            return self.keys
        own = {"prompt_embeddings": "prompt_embeddings"}
        if self.config.save_encoder:
            own |= {n: f"base_model.prompt_encoder.{n}" for n, _ in self.named_parameters()}
        return own

    def resize(self, state: dict[str, Tensor]) -> None:
        held = [n for n, _ in self.named_parameters()]
        if self.plain or "prompt_embeddings" not in state or all(n in state for n in held):
            return
        old = self.embedding.weight
        weight = state["prompt_embeddings"].to(old.dtype)
        weight = weight if old.device.type == "meta" else weight.to(old.device)
        self.embedding = Table(nn.Parameter(weight.clone(), requires_grad=old.requires_grad))
        for name in self.networks:
            setattr(self, name, None)

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        self.embedding.weight.normal_(generator=rng)
        for name in self.networks:
            network = getattr(self, name)
            for module in () if network is None else network.modules():
                if isinstance(module, (nn.Linear, nn.LSTM)):
                    fan_in = module.in_features if isinstance(module, nn.Linear) else module.hidden_size
                    for p in module.parameters():
                        p.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=rng)


# -- what a model looks like -------------------------------------------------------------------------------------------------
def text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return getattr(config, "text_config", None) or config


def number(config: Any, *names: str) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    raise ValueError(f"This model's config has no {names[0]}: state it in the adapter's config.")


def token_embeddings(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_input_embeddings", None)
    try:
        return get() if callable(get) else None
    except (NotImplementedError, AttributeError):
        return None


def embed(model: nn.Module, ids: Tensor) -> Tensor:
    """The base model's own embeddings of token ids, as floats: what prompts can start from."""
    table = token_embeddings(model)
    assert table is not None
    with torch.no_grad(), on_device(table):
        device = next((p.device for p in table.parameters()), torch.device("cpu"))
        return table(ids.to(device)).detach().float().cpu()


def is_pair(model: nn.Module) -> bool:
    """Whether this is an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def stacks(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """(where input tokens enter, where a cache enters): one module, or an encoder and a decoder."""
    if is_pair(model):
        return model.get_encoder(), model.get_decoder()  # type: ignore[operator]
    stack: nn.Module | None = model
    inner: nn.Module | None = model
    while inner is not None:
        stack, names = inner, ("language_model", "decoder", getattr(inner, "base_model_prefix", ""))
        children = [getattr(inner, n, None) for n in names if n]
        children = [c for c in children if isinstance(c, nn.Module) and c is not stack]
        inner = next((c for c in children if "inputs_embeds" in arguments_of(type(c))), None)
    assert stack is not None
    return stack, stack


def attentions(stack: nn.Module) -> Iterator[nn.Module]:
    """The modules that read and write the cache: they know their layer and hold no other that does."""
    found = [
        m
        for m in stack.modules()
        if isinstance(getattr(m, "layer_idx", None), int) and LAYER_CACHE & set(arguments_of(type(m)))
    ]
    inner = {id(d) for m in found for d in m.modules() if d is not m}
    holders = {id(m) for m in found if any(id(d) in inner and d in found for d in m.modules() if d is not m)}
    return (m for m in found if id(m) not in holders)


def takes_prefix(model: nn.Module) -> str:
    """Why no keys and values can be put before this model's attention; "" where they can."""
    _, stack = stacks(model)
    if CACHE not in arguments_of(type(stack)) or next(attentions(stack), None) is None:
        return "its attention takes no keys and values from outside (no past_key_values), so a prefix has no way in"
    return ""


# -- one call --------------------------------------------------------------------------------------------------------------
@dataclass
class Front:
    """What stands before the tokens of one call: groups of methods, and which group each row of the batch has."""

    rows: int
    groups: list[list[PromptMethod]]
    row: Tensor | None = None  # [rows]: index of the row's group; None: all rows have the first

    def __post_init__(self) -> None:
        self.soft = [sum(m.inputs for m in g) for g in self.groups]
        self.keyed = [sum(m.keyed for m in g) for g in self.groups]
        self.S, self.P = max(self.soft), max(self.keyed)
        self.uneven = len(set(zip(self.soft, self.keyed, strict=True))) > 1

    @property
    def width(self) -> int:
        return self.S + self.P

    def per_row(self, values: Sequence[int], device: torch.device) -> Tensor:
        """[rows]: each row's value."""
        table = torch.tensor(values, device=device)
        return table.expand(self.rows) if self.row is None else table[self.row.to(device)]

    def visible(self, lengths: Sequence[int], width: int, device: torch.device) -> Tensor:
        """[rows, width]: 1 where the front holds something, 0 where it is padding, which lies on the left."""
        return (torch.arange(width, device=device) >= width - self.per_row(lengths, device)[:, None]).long()

    def turn(self, t: Tensor, back: bool = False) -> Tensor:
        """Each row of t[rows, tokens, …] with the padding of its virtual tokens moved from the left to the end."""
        pads = self.per_row([self.S - s for s in self.soft], t.device)[:, None]
        index = (torch.arange(t.shape[1], device=t.device) + (-pads if back else pads)) % t.shape[1]
        return torch.gather(t, 1, index.reshape(*index.shape, *(1 for _ in t.shape[2:])).expand(t.shape))

    def choose(self, parts: list[Tensor]) -> Tensor:
        """Each row's own from one tensor [rows, …] per group."""
        if self.row is None:
            return parts[0]
        at = torch.arange(self.rows, device=parts[0].device)
        return torch.stack(parts)[self.row.to(parts[0].device), at]


class Prompts:
    """The hooks of one model. Picklable: bound methods of this object, no closures."""

    def __init__(self, model: nn.Module, hub: Hub) -> None:
        self.hub = hub
        self.methods: dict[str, PromptMethod] = {}
        self.pair = is_pair(model)
        self.trailing = not self.pair and bidirectional(stacks(model)[0])  # padding lies behind the text
        self.config = stacks(model)[1].config
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
        first, last = stacks(model)
        hooks: list[tuple[nn.Module, Any]] = [(m, self.enter_attention) for m in attentions(last)]
        if self.pair:
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
        mix = self.hub.mix
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
                f"{type(module).__name__} ran without calling {type(stacks(module)[0]).__name__}: prompts have no way in."
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
        rows = self.hub.mix.rows
        if rows is not None and rows.tokens is not None and not past and not self.pair:
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
        tasks = self.tasks if self.tasks is not None else self.hub.mix.tasks
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
        return EncoderDecoderCache(one(), one()) if self.pair else one()

    def roomy(self, cache: Any, front: Front) -> Any:
        """The cache to fill: one of fixed size was made without knowing of virtual tokens, so it gets a larger one."""
        if cache is None:
            return self.empty_cache()
        if getattr(cache, "is_compileable", False) and not self.pair:
            longest = max(getattr(x, "max_cache_len", 0) for x in cache.layers)
            return type(cache)(config=self.config, max_cache_len=longest + front.width)
        return cache


# -- small things ----------------------------------------------------------------------------------------------------------------
def before(t: Tensor, n: int, fill: float) -> Tensor:
    """`t` with n columns of `fill` before its second axis."""
    return torch.cat([t.new_full((t.shape[0], n, *t.shape[2:]), fill), t], 1)


def batch(kwargs: dict[str, Any]) -> int:
    for name in ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "labels"):
        if torch.is_tensor(kwargs.get(name)):
            return int(kwargs[name].shape[0])
    return 1


def spread(values: list[Any], rows: int, what: str) -> list[Any]:
    """One value per row, where there is one per sequence of a beam search, or one per beam of its input."""
    if rows % len(values) == 0:
        return [v for v in values for _ in range(rows // len(values))]
    if len(values) % rows == 0:
        return values[:: len(values) // rows]
    raise ValueError(f"{what} has {len(values)} entries for {rows} rows: pass one per row of the batch.")


def seen(cache: Any) -> int:
    """Positions that a cache holds."""
    return int(cache.get_seq_length()) if cache is not None else 0


def flat_mask(mask: Any, length: int) -> Tensor | None:
    """The mask as [rows, length]. Generation with a cache of fixed size hands over the full one, made from it."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None or mask.dim() == 2:
        return mask
    last = mask[:, 0, -1, :length]
    flat = last if last.dtype == torch.bool else last == 0
    causal = torch.ones_like(mask[:, 0], dtype=torch.bool).tril(length - mask.shape[2])[..., :length]
    full = mask[:, 0, :, :length] if mask.dtype == torch.bool else mask[:, 0, :, :length] == 0
    if not torch.compiler.is_compiling() and not torch.equal(full & flat[:, None], causal & flat[:, None]):
        raise ValueError(
            "attention_mask has a shape of its own [rows, heads, queries, keys], in which virtual tokens have no place: "
            "pass a mask [rows, tokens]."
        )
    return flat.long()


def refuse_packed(positions: Tensor | None, mask: Any, past: int) -> None:
    """Several texts in one row would all see a prompt that stands before the first."""
    if positions is None or mask is not None or past or torch.compiler.is_compiling():
        return
    if bool((positions.diff(dim=-1) < 0).any()):
        raise ValueError(
            "position_ids start again within a row (packed texts, no attention_mask): virtual tokens stand before the "
            "row's first text only. Pass one text per row, padded, for prompt methods."
        )


def refuse_gap(stack: nn.Module, cache: Any, front: Front) -> None:
    """In a window, the padding between a row's prefix and its text would count as distance."""
    apart = any(p and s < front.S for s, p in zip(front.soft, front.keyed, strict=True))
    if apart and any(getattr(cache, "is_sliding", ())):
        raise Refusal(
            "adapter_names",
            type(stack).__name__,
            "its attention has a window, in which the room for other rows' virtual tokens would push this row's prefix "
            "further away. Put rows with prefixes and rows with prompts into different batches.",
        )


def bidirectional(stack: nn.Module) -> bool:
    """Whether every token sees all others: an encoder."""
    causal = {bool(m.is_causal) for m in stack.modules() if isinstance(getattr(m, "is_causal", None), bool)}
    return causal == {False}


def floating(stack: nn.Module) -> torch.dtype:
    return next((p.dtype for p in stack.parameters() if p.is_floating_point()), torch.get_default_dtype())


def where(module: nn.Module) -> torch.device:
    """Where a layer computes: its keys and values must be there."""
    for m in module.modules():
        found = offload.home(m)
        if found is not None:
            return found
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def counting(stack: nn.Module) -> str:
    """What tells a stack its positions: "given" (position_ids), the "mask", only distances, or an own count."""
    tables = [(n, m) for n, m in stack.named_modules() if "position" in n.rsplit(".", 1)[-1] and "relative" not in n]
    if any("attention_mask" in arguments_of(type(m)) for _, m in tables):
        return "mask"
    if "position_ids" in arguments_of(type(stack)):
        return "given"
    return "own" if any(isinstance(m, nn.Embedding) for _, m in tables) else "distance"


def first_position(stack: nn.Module) -> int:
    """RoBERTa and its like number positions from behind the padding index."""
    for m in stack.modules():
        if hasattr(m, "create_position_ids_from_inputs_embeds"):
            return int(m.padding_idx) + 1  # type: ignore[arg-type]
    return 0


def placeholder(model: nn.Module) -> int:
    """A token id that stands in for virtual tokens where a model looks at ids: none of its special ones."""
    special = set()
    for config in (getattr(model, "config", None), text_config(model)):
        for name, value in vars(config).items() if config is not None else ():
            if name.endswith(("token_id", "token_index")):
                special |= set(value) if isinstance(value, (list, tuple)) else {value}
    return next(i for i in range(len(special) + 1) if i not in special)


# -- adapters in a model ---------------------------------------------------------------------------------------------------------
def hooks_of(model: nn.Module) -> Prompts | None:
    return model.__dict__.get("_peft_prompts")


def attach(model: nn.Module, hub: Hub, name: str, method: Method) -> None:
    """Hang a method into the model as `prompt_encoder.<name>`; the first one installs the hooks."""
    assert isinstance(method, PromptMethod)
    prompts = hooks_of(model)
    if prompts is None:
        prompts = model.__dict__["_peft_prompts"] = Prompts(model, hub)
        model.add_module("prompt_encoder", Encoders(hub))
        model.prompt_encoder.__dict__["prompts"] = prompts
        prompts.install(model)
    model.prompt_encoder.put(escape(name), method)  # type: ignore[union-attr,operator]
    prompts.methods[name] = method
    method.train(model.training)


def detach(model: nn.Module, hub: Hub, name: str) -> None:
    """Take a method out; the last one takes the hooks along."""
    prompts = hooks_of(model)
    if prompts is None or name not in prompts.methods:
        return
    del prompts.methods[name]
    model.prompt_encoder.drop(escape(name))  # type: ignore[union-attr,operator]
    if not prompts.methods:
        prompts.remove(model)
        del model._modules["prompt_encoder"]
        del model.__dict__["_peft_prompts"]


def get_prompt(model: nn.Module, rows: int, tasks: Tensor | None = None) -> Any:
    """What acts now for a batch of `rows`: virtual tokens [rows, n, d], or a cache that holds the prefixes."""
    prompts = hooks_of(model)
    front = prompts.front(rows) if prompts is not None else None
    if prompts is None or front is None:
        raise ValueError("No prompt method is active: there is no prompt to get.")
    last = stacks(model)[1]
    if front.S:
        prompts.tasks = tasks
        pieces = [m("prompt", None if tasks is None else tasks) for m in front.groups[0] if m.inputs]
        return torch.cat([p.expand(rows, -1, -1) for p in pieces], 1)
    cache = prompts.empty_cache()
    prompts.fill(cache, attentions(last), front, floating(last))
    return cache


def embedding_to_save(hub: Hub, name: str) -> Tensor:
    """The tensor that upstream's file calls `prompt_embeddings`."""
    hub.known([name])
    method = hub.adapters[name].methods[0][1]
    if not isinstance(method, PromptMethod):
        raise ValueError(f"Adapter {name!r} ({method.peft_type}) has no prompt.")
    return method.prompt_embeddings.detach().cpu()
