"""Prefixes against their definition: keys and values that a text left in a cache act as this text.

What the plain model keeps of a b, put before c d as a prefix, must give what it makes of a b c d.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from peft import Refusal
from peft.core.acting.roster import Roster
from peft.core.anatomy.language import attentions, token_and_cache_stacks
from peft.core.prompts.front import Front
from peft.core.prompts.keys_values import KeysValues
from tests.golden.prompt import make

IDS = torch.tensor([[11, 12, 13, 14], [21, 22, 23, 24]])


class Kept:
    """A prefix of what a model kept of a text."""

    inputs = 0

    def __init__(self, model: nn.Module, words: list[int]) -> None:
        with torch.no_grad():
            self.layers = model(input_ids=torch.tensor([words]), use_cache=True).past_key_values.layers
        self.words, self.keyed = words, len(words)

    def __call__(self, stage: str, layer: int) -> tuple[Tensor, Tensor]:
        assert stage == "keys_values"
        return self.layers[layer].keys[0], self.layers[layer].values[0]  # [heads, n, width]


class Soft:
    """Virtual tokens, which something else puts before the text."""

    keyed = 0

    def __init__(self, inputs: int) -> None:
        self.inputs = inputs


def front(*groups: list[object], row: list[int] | None = None, rows: int = 2) -> Front:
    return Front(rows, list(groups), None if row is None else torch.tensor(row))


def led(model: nn.Module, front: Front, **kwargs: object) -> tuple[KeysValues, dict[str, object]]:
    """What is given to the stack, made from what the call is given."""
    state = KeysValues(model, Roster())
    state.lead(token_and_cache_stacks(model)[1], kwargs, front)
    return state, kwargs


def text(*words: int, row: int | None = None) -> Tensor:
    after = IDS if row is None else IDS[row : row + 1]
    return torch.cat([torch.tensor([words], dtype=torch.long).expand(len(after), -1), after], 1)


# -- what they do -----------------------------------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "opt"])
def test_what_a_text_left_acts_as_this_text(name, masked):
    model = make.build(name)
    more = {"attention_mask": torch.ones_like(IDS)} if masked else {}
    _, kwargs = led(model, front([Kept(model, [5, 6, 7])]), input_ids=IDS, **more)
    expected = model(input_ids=text(5, 6, 7)).logits[:, 3:]
    assert torch.allclose(model(**kwargs).logits, expected, atol=1e-5)
    assert not torch.allclose(model(input_ids=IDS).logits, expected, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama_gqa", "gpt2"])
def test_rows_with_prefixes_of_different_lengths_act_as_alone(name):
    """GPT-2 adds a vector per position, so each row's must be counted as its own prefix has it."""
    model = make.build(name)
    groups = [[Kept(model, [5, 6, 7])], [Kept(model, [8])]]
    _, kwargs = led(model, front(*groups, row=[1, 0]), input_ids=IDS)
    assert kwargs["attention_mask"].tolist() == [[0, 0, 1, 1, 1, 1, 1], [1] * 7]
    found = model(**kwargs).logits
    for row, words in ((0, [8]), (1, [5, 6, 7])):
        assert torch.allclose(found[row], model(input_ids=text(*words, row=row)).logits[0, -4:], atol=1e-5)


@torch.no_grad()
def test_a_row_without_a_prefix_is_the_base_models():
    model = make.build("gpt2")
    _, kwargs = led(model, front([Kept(model, [5, 6, 7])], [], row=[1, 0]), input_ids=IDS)
    found = model(**kwargs).logits
    assert torch.allclose(found[0], model(input_ids=IDS[:1]).logits[0], atol=1e-5)
    assert torch.allclose(found[1], model(input_ids=text(5, 6, 7, row=1)).logits[0, 3:], atol=1e-5)


@torch.no_grad()
def test_decoding_goes_on_behind_a_prefix():
    model = make.build("gpt2")
    whole = front([Kept(model, [5, 6, 7])], [Kept(model, [8])], row=[0, 1])
    state, kwargs = led(model, whole, input_ids=IDS[:, :3], use_cache=True)
    cache = model(**kwargs).past_key_values
    step = {"input_ids": IDS[:, 3:], "past_key_values": cache, "attention_mask": torch.ones_like(IDS)}
    state.lead(model.transformer, step, whole)
    assert cache.get_seq_length() == 3 + 3 and step["past_key_values"] is cache  # filled once
    found = model(**step).logits[:, 0]
    for row, words in ((0, [5, 6, 7]), (1, [8])):
        assert torch.allclose(found[row], model(input_ids=text(*words, row=row)).logits[0, -1], atol=1e-5)


# -- cache, mask and positions ----------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_each_layer_has_its_own_prefix_shared_by_the_rows_and_padded_on_the_left():
    model = make.build("llama_gqa")
    state, cache = KeysValues(model, Roster()), DynamicCache()
    long, more, short = Kept(model, [5, 6]), Kept(model, [9]), Kept(model, [8])
    whole = front([long, more], [short], row=[0, 1, 0], rows=3)
    state.fill(cache, attentions(model.model), whole, torch.float64)
    for i, layer in enumerate(cache.layers):
        for k, kept in enumerate((layer.keys, layer.values)):
            pair = torch.cat([long("keys_values", i)[k], more("keys_values", i)[k]], 1).double()  # in this order
            assert kept.shape == (3, 2, 3, 4) and kept.dtype == torch.float64
            assert torch.equal(kept[0], pair) and torch.equal(kept[2], pair)
            assert torch.equal(kept[1, :, 2:], short("keys_values", i)[k].double())
            assert not kept[1, :, :2].any()


def test_a_cache_that_nobody_asked_for_is_lent():
    model = make.build("llama_gqa")
    prefix = front([Kept(model, [5, 6])])
    assert led(model, prefix, input_ids=IDS, use_cache=False)[0].call.lent
    assert not led(model, prefix, input_ids=IDS, use_cache=True)[0].call.lent
    assert not led(model, prefix, input_ids=IDS, use_cache=False, past_key_values=DynamicCache())[0].call.lent


@pytest.mark.parametrize(("longest", "room"), [(8, 10), (20, 22)])
def test_a_cache_of_fixed_size_becomes_larger_by_the_front(longest, room):
    model = make.build("llama_gqa")
    fixed = StaticCache(config=model.config, max_cache_len=longest)
    _, kwargs = led(model, front([Kept(model, [5, 6])]), input_ids=IDS, past_key_values=fixed)
    made = kwargs["past_key_values"]
    assert type(made) is StaticCache and {x.max_cache_len for x in made.layers} == {room}
    _, kwargs = led(model, front([Soft(3)]), input_ids=IDS, past_key_values=fixed)  # of virtual tokens, too
    assert {x.max_cache_len for x in kwargs["past_key_values"].layers} == {longest + 3}
    growing = DynamicCache()
    _, kwargs = led(model, front([Kept(model, [5, 6])]), input_ids=IDS, past_key_values=growing)
    assert kwargs["past_key_values"] is growing


def test_positions_that_the_caller_gave_are_behind_the_prefix():
    model = make.build("llama_gqa")
    given = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    _, kwargs = led(model, front([Kept(model, [5, 6, 7])]), input_ids=IDS, position_ids=given)
    assert torch.equal(kwargs["position_ids"], given + 3)
    _, kwargs = led(model, front([Kept(model, [5, 6, 7])]), input_ids=IDS)
    assert "position_ids" not in kwargs  # the model counts from the cache's length


def test_positions_of_uneven_rows_count_what_each_has():
    model = make.build("gpt2")
    _, kwargs = led(model, front([Kept(model, [5, 6, 7])], [], [Kept(model, [8])], row=[0, 1], rows=2), input_ids=IDS)
    assert kwargs["position_ids"].tolist() == [[3, 4, 5, 6], [0, 1, 2, 3]]


def test_a_model_that_counts_positions_itself_cannot_mix_lengths():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position_embeddings = nn.Embedding(8, 4)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> None: ...

    model = make.build("gpt2")
    whole = front([Soft(2)], [], row=[0, 1])
    with pytest.raises(Refusal, match="it counts positions itself"):
        KeysValues(model, Roster()).lead(Own(), {"input_ids": IDS}, whole)
    KeysValues(model, Roster()).lead(Own(), {"input_ids": IDS}, front([Soft(2)]))  # all rows alike


def test_packed_texts_have_one_place_for_a_prefix():
    model = make.build("llama_gqa")
    with pytest.raises(ValueError, match="start again within a row"):
        led(model, front([Kept(model, [5])]), input_ids=IDS, position_ids=torch.tensor([[0, 1, 0, 1]] * 2))


def test_without_prefixes_the_call_stays_as_it_is():
    model = make.build("llama_gqa")
    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "position_ids": torch.arange(4)[None]}
    _, kwargs = led(model, front([]), **given)
    assert kwargs.keys() == given.keys() and all(kwargs[k] is v for k, v in given.items())


def test_an_empty_cache_is_the_models_own_sort():
    for name, sort in (("llama_gqa", "DynamicCache"), ("t5", "EncoderDecoderCache")):
        cache = KeysValues(make.build(name), Roster()).empty_cache()
        assert type(cache).__name__ == sort and cache.get_seq_length() == 0
