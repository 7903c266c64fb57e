"""Virtual tokens before a model's own.

Room is made in all that a call is given: ids, embeddings, labels, mask. The vectors themselves are put before the
embeddings that the token stack sees.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import Refusal
from ..anatomy.embeddings import token_embeddings
from ..anatomy.language import CACHE, decoder_ids, identity_inputs, token_and_cache_stacks
from .arguments import Arguments, before, flat_mask, recount, refuse_packed, seen, spread, taken, tokens_of
from .front import Front
from .state import PromptState

BESIDE_TOKENS = (
    ("token_type_ids", 0),
    ("mm_token_type_ids", 0),
    ("per_layer_inputs", 0),
)  # a value per token, and a virtual one's
LABELS = ("labels", "shift_labels")


class VirtualTokens(PromptState):
    """Room for the virtual tokens of a call, and what is put into it."""

    def widen(self, kwargs: Arguments, front: Front) -> None:
        """Room for `front.S` tokens before the text, or, when the cache has them already, in the mask."""
        S, past = front.S, seen(kwargs.get(CACHE))
        self.call.given = kwargs.pop("position_ids", None)
        tokens = tokens_of(kwargs)
        recount(kwargs)
        length = tokens.shape[1]
        refuse_packed(self.call.given, kwargs.get("attention_mask"), past)
        mask = flat_mask(kwargs.get("attention_mask"), length if not past else past - front.width + length)
        if not past:
            for name, fill in (("input_ids", self.filler), ("inputs_embeds", 0), *BESIDE_TOKENS):
                if torch.is_tensor(kwargs.get(name)):
                    kwargs[name] = before(kwargs[name], S, fill)
            for name in LABELS:
                labels = kwargs.get(name)
                if torch.is_tensor(labels) and labels.shape == tokens.shape[:2] and not labels.is_floating_point():
                    kwargs[name] = before(labels, S, -100)
        real = length if not past else past - front.width + length
        if mask is None and front.uneven:
            mask = torch.ones(front.rows, real, device=tokens.device).long()
        self.call.order = front.order(mask, S + real, self.trailing)
        if mask is not None:
            kwargs["attention_mask"] = torch.cat([front.visible(front.soft, S, mask.device).to(mask.dtype), mask], 1)
        if self.call.order is not None:
            names = ("input_ids", "inputs_embeds", "attention_mask", *(n for n, _ in BESIDE_TOKENS), *LABELS)
            for name in names if not past else ("attention_mask",):
                t = kwargs.get(name)
                if torch.is_tensor(t) and t.shape[:2] == self.call.order.shape:
                    kwargs[name] = taken(t, self.call.order)
        rows = self.roster.mix.rows
        if rows is not None and rows.tokens is not None and not past and not self.is_encoder_decoder:
            rows.tokens = length + S

    def place(self, module: nn.Module, kwargs: Arguments, front: Front) -> None:
        """The virtual tokens themselves, in the room that `widen` made."""
        if seen(kwargs.get(CACHE)):
            return
        ids, x = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        looked_up = kwargs.get("per_layer_inputs")
        if looked_up is None:
            looked_up = identity_inputs(module, ids, x if x is None else x[:, front.S :])
        if x is None:
            table = token_embeddings(module)
            assert table is not None
            x = table(ids)
        kwargs["input_ids"], kwargs["inputs_embeds"] = None, self.put(front, self.soft(front, x), x)
        if looked_up is not None:  # virtual tokens have no entry there
            nothing = looked_up.new_zeros(front.rows, front.S, *looked_up.shape[2:])
            if looked_up.shape[1] == x.shape[1] - front.S:
                looked_up = torch.cat([nothing, looked_up], 1)
                looked_up = looked_up if self.call.order is None else taken(looked_up, self.call.order)
            kwargs["per_layer_inputs"] = self.put(front, nothing, looked_up)

    def put(self, front: Front, values: Tensor, x: Tensor) -> Tensor:
        """x[rows, columns, …] with values[rows, S, …] where the virtual tokens stand."""
        if self.call.order is None:
            return torch.cat([values, x[:, front.S :]], 1)
        order = self.call.order.to(x.device)
        chosen = (order < front.S).reshape(*order.shape, *(1 for _ in x.shape[2:]))
        return torch.where(chosen, taken(values, order.clamp(max=front.S - 1)), x)

    def soft(self, front: Front, x: Tensor, decoder: bool = False) -> Tensor:
        """[rows, S, d]: each row's virtual tokens, padded on the left."""
        tasks = self.call.tasks if self.call.tasks is not None else self.roster.mix.tasks
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

    def before_decoder(self, module: nn.Module, kwargs: Arguments, front: Front) -> None:
        """The second half of a prompt, before the text that the decoder of `module` is given."""
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
            ids = decoder_ids(module, labels) if ids is None else ids
            table = token_embeddings(token_and_cache_stacks(module)[1])
            assert table is not None
            x = table(ids)
        kwargs["decoder_inputs_embeds"] = torch.cat([self.soft(front, x, decoder=True), x], 1)
        if labels is not None:
            kwargs["labels"] = before(labels, n, -100)
        if kwargs.get("decoder_attention_mask") is not None:
            kwargs["decoder_attention_mask"] = before(kwargs["decoder_attention_mask"], n, 1)
