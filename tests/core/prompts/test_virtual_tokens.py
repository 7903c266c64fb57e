"""Virtual tokens against their definition: vectors that are the embeddings of words act as these words.

A prompt of E(a b) before the text c d must give what the plain model makes of a b c d.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from peft import Refusal
from peft.core.acting.mix import Mix
from peft.core.acting.roster import Roster
from peft.core.acting.rows import Rows
from peft.core.prompts.front import Front
from peft.core.prompts.virtual_tokens import VirtualTokens
from tests.golden.prompt import make

IDS = torch.tensor([[11, 12, 13, 14], [21, 22, 23, 24]])
MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])


class Words:
    """A prompt that consists of words; of a pair's, the second half stands before the decoder's text."""

    keyed = 0

    def __init__(self, model: nn.Module, words: list[int], decoder: list[int] | None = None) -> None:
        self.table, self.words, self.inputs = model.get_input_embeddings(), [*words, *(decoder or [])], len(words)
        self.prompts_decoder = decoder is not None
        self.config = type("Config", (), {"num_transformer_submodules": 1 + self.prompts_decoder})

    def __call__(self, stage: str, tasks: Tensor | None) -> Tensor:
        assert stage == "prompt"
        found = self.table(torch.tensor(self.words)).detach()
        return found if tasks is None else found[None] + tasks.reshape(-1, 1, 1)


def front(*groups: list[Words], row: list[int] | None = None, rows: int = 2) -> Front:
    return Front(rows, list(groups), None if row is None else torch.tensor(row))


def prompts(model: nn.Module, mix: Mix | None = None) -> VirtualTokens:
    roster = Roster()
    roster.mix = mix or roster.mix
    return VirtualTokens(model, roster)


def filled(state: VirtualTokens, model: nn.Module, front: Front, **kwargs: Tensor) -> dict[str, Tensor]:
    state.widen(kwargs, front)
    state.place(model, kwargs, front)
    return kwargs


# -- what they do ---------------------------------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "bert_feat"])
def test_the_embeddings_of_words_act_as_these_words(name):
    model = make.build(name)
    words = [Words(model, [5, 6]), Words(model, [7])]  # side by side, in this order
    found = make.main_output(model(**filled(prompts(model), model, front(words), input_ids=IDS)))
    text = torch.cat([torch.tensor([[5, 6, 7]]).expand(2, -1), IDS], 1)
    assert torch.allclose(found, make.main_output(model(input_ids=text)), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("name", "trailing"), [("llama_gqa", False), ("bert_feat", True)])
def test_rows_with_prompts_of_different_lengths_end_or_begin_as_they_do_alone(name, trailing):
    model = make.build(name)
    mixed = front([Words(model, [5, 6, 7])], [Words(model, [8])], row=[0, 1])
    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    out = make.main_output(model(**filled(prompts(model), model, mixed, **given)))
    for row, words in ((0, [5, 6, 7]), (1, [8])):
        text = torch.tensor([[*words, *IDS[row].tolist()]])
        alone = make.main_output(model(input_ids=text))[0]
        n = text.shape[1]
        assert torch.allclose(out[row, :n] if trailing else out[row, -n:], alone, atol=1e-5)


@torch.no_grad()
def test_the_second_half_of_a_prompt_stands_before_the_decoders_text():
    model = make.build("t5")
    labels = torch.tensor([[31, 32, 33], [34, 35, 36]])
    kwargs = {"input_ids": IDS, "labels": labels, "decoder_attention_mask": torch.ones_like(labels)}
    prompts(model).before_decoder(model, kwargs, front([Words(model, [5, 6], decoder=[8, 9])]))
    assert kwargs["labels"].tolist() == [[-100, -100, 31, 32, 33], [-100, -100, 34, 35, 36]]
    assert kwargs["decoder_attention_mask"].tolist() == [[1] * 5] * 2
    start = torch.zeros(2, 1, dtype=torch.long)  # T5 starts with the padding token 0, then the labels but the last
    expected = model.get_input_embeddings()(torch.cat([torch.tensor([[8, 9]]).expand(2, -1), start, labels[:, :-1]], 1))
    assert torch.equal(kwargs["decoder_inputs_embeds"], expected)


def test_a_decoder_gets_equally_many_tokens_in_all_rows_or_none():
    model = make.build("t5")
    state, labels = prompts(model), torch.ones(2, 3, dtype=torch.long)
    kwargs = {"labels": labels}
    state.before_decoder(model, kwargs, front([Words(model, [5])]))
    assert kwargs == {"labels": labels}
    uneven = front([Words(model, [5], decoder=[8])], [Words(model, [5, 6], decoder=[8, 9])], row=[0, 1])
    with pytest.raises(Refusal, match="different numbers of tokens before the decoder's text"):
        state.before_decoder(model, kwargs, uneven)


# -- the room for them --------------------------------------------------------------------------------------------------------
def test_room_is_made_in_all_that_the_call_is_given():
    model = make.build("llama_gqa")
    state = prompts(model)
    kwargs = {
        "input_ids": IDS,
        "attention_mask": MASK,
        "token_type_ids": torch.ones_like(IDS),
        "labels": IDS,
        "shift_labels": IDS,
        "position_ids": (positions := torch.arange(4)[None]),
        "other": (other := torch.zeros(2, 4)),
    }
    state.widen(kwargs, front([Words(model, [5, 6])]))

    def widened(room: int) -> list[list[int]]:  # behind the first row's padding of one
        first, second = IDS.tolist()
        return [[first[0], room, room, *first[1:]], [room, room, *second]]

    assert kwargs["input_ids"].tolist() == widened(state.filler) and state.filler != 0  # 0 is the padding
    assert kwargs["attention_mask"].tolist() == [[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]
    assert kwargs["token_type_ids"].tolist() == [[1, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]]
    for name in ("labels", "shift_labels"):
        assert kwargs[name].tolist() == widened(-100)
    assert kwargs["other"] is other and "position_ids" not in kwargs and state.call.given is positions


@pytest.mark.parametrize("labels", [torch.tensor([0, 1]), torch.zeros(2, 3).long(), torch.zeros(2, 4)])
def test_labels_that_stand_for_no_tokens_stay(labels):
    """One a row, another number of them, or numbers to predict."""
    model = make.build("bert_cls")
    kwargs = {"input_ids": IDS, "labels": labels}
    prompts(model).widen(kwargs, front([Words(model, [5, 6])]))
    assert kwargs["labels"] is labels and kwargs["input_ids"].shape == (2, 6)


def test_once_the_cache_holds_them_only_the_mask_is_widened():
    model = make.build("llama_gqa")
    cache = type("Cache", (), {"get_seq_length": lambda self: 6})()  # two virtual tokens and the first four
    kwargs = {"input_ids": IDS[:, :1], "attention_mask": torch.cat([MASK, MASK[:, -1:]], 1), "past_key_values": cache}
    state, before = prompts(model), dict(kwargs)
    wide = front([Words(model, [5, 6])])
    state.widen(kwargs, wide)
    state.place(model, kwargs, wide)
    assert kwargs["attention_mask"].tolist() == [[0, 1, 1, 1, 1, 1, 1], [1] * 7]
    assert kwargs["input_ids"] is before["input_ids"] and "inputs_embeds" not in kwargs


def test_shorter_fronts_are_hidden_on_the_left_or_behind_the_text():
    for name, expected in (("llama_gqa", [[1] * 6, [0, 1, 1, 1, 1, 1]]), ("bert_feat", [[1] * 6, [1, 1, 1, 1, 1, 0]])):
        model = make.build(name)
        kwargs = {"input_ids": IDS}  # no mask: one is made
        prompts(model).widen(kwargs, front([Words(model, [5, 6])], [Words(model, [7])], row=[0, 1]))
        assert kwargs["attention_mask"].tolist() == expected, name


def test_layers_that_see_flattened_tokens_are_told_of_the_virtual_ones():
    model = make.build("llama_gqa")
    rows = Rows(["a", "b"], tokens=4)
    prompts(model, Mix((), rows)).widen({"input_ids": IDS}, front([Words(model, [5, 6])]))
    assert rows.tokens == 6


@torch.no_grad()
def test_each_row_has_its_tasks_prompt():
    model = make.build("llama_gqa")
    state, prompt, x = prompts(model), Words(model, [5, 6]), torch.zeros(4, 1, 16)
    state.call.tasks = torch.tensor([3.0, 1.0])
    plain = prompt("prompt", None)
    found = state.soft(front([prompt], rows=4), x)  # two beams a row
    assert torch.equal(found, torch.stack([plain + 3, plain + 3, plain + 1, plain + 1]))
    state.call.tasks = torch.tensor([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="task_ids has 3 entries for 4 rows"):
        state.soft(front([prompt], rows=4), x)
