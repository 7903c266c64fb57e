"""What holds for one call: arguments by position, an adapter per row, a task per row, no adapter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from peft import get_peft_model
from peft.core.acting.mix import Mix
from peft.core.model.running import by_name, check_rows, disabled, for_copies, rows, tasks
from peft.core.model.tuner import Tuner
from tests.helpers.tiny_llama import TOKENS, llama, logits, lora

NAMES = ("inputs_embeds", "labels", "return_dict")


def two() -> Tuner:
    """A Llama with the adapters a and b; a acts."""
    model = get_peft_model(llama(), lora(), adapter_name="a")
    model.add_adapter("b", lora(r=2))
    return model.base_model.eval()


# -- arguments --------------------------------------------------------------------------------------------------------------
def test_arguments_after_the_first_two_get_their_names():
    assert by_name(NAMES, ("ids", "mask"), {}) == (("ids", "mask"), {})
    assert by_name(NAMES, ("ids", "mask", None, "labels"), {"x": 1}) == (("ids", "mask"), {"labels": "labels", "x": 1})
    assert by_name(NAMES, ("ids", "mask", "embeds", "labels", True), {})[1] == dict(
        zip(NAMES, ("embeds", "labels", True), strict=True)
    )
    assert by_name(NAMES, ("ids", "mask", None), {"labels": "given"})[1] == {"labels": "given"}


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [(("i", "m", 1, 2, 3, 4), {}), (("i", "m", 1, 2), {"labels": 3}), (("i", "m", None), {"inputs_embeds": 1})],
)
def test_an_argument_too_many_or_twice_is_refused_with_their_order(args, kwargs):
    with pytest.raises(TypeError, match="takes inputs_embeds, labels, return_dict after the first two by position"):
        by_name(NAMES, args, kwargs)


def test_there_is_a_name_for_each_row():
    ids, mask, number = torch.zeros(3, 4), torch.ones(3, 4), torch.tensor(1.0)
    assert check_rows(["a"] * 3, (ids, "text"), {"mask": mask, "n": number}) == [ids, mask]  # a number has no rows
    assert check_rows(["a"] * 7, (), {"n": number}) == []  # nothing to count
    with pytest.raises(ValueError, match="should be the same as the number of inputs, but got 2 and 3"):
        check_rows(["a"] * 2, (), {"ids": ids})


@pytest.mark.parametrize(
    ("asked", "copies"),
    [
        ({}, 1),
        ({"num_beams": 1}, 1),
        ({"num_beams": 3}, 3),
        ({"num_return_sequences": 2}, 2),
        ({"num_beams": 3, "num_return_sequences": 2}, 3),  # the sequences are taken from the beams
        ({"generation_config": SimpleNamespace(num_beams=2)}, 2),
        ({"generation_config": SimpleNamespace(num_beams=2), "num_beams": 4}, 4),
        ({"num_beams": None, "num_return_sequences": None}, 1),
    ],
)
def test_each_name_stands_once_per_copy_of_its_row(asked, copies):
    expected = ["a"] * copies + ["b"] * copies
    assert list(for_copies(["a", "b"], (torch.zeros(2, 3),), asked)) == expected
    with pytest.raises(ValueError, match="1 and 2"):
        for_copies(["a"], (torch.zeros(2, 3),), asked)


# -- an adapter per row -----------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_within_rows_each_row_has_the_adapter_of_its_name():
    tuner = two()
    alone = {}
    for name in ("a", "b"):
        tuner.set_adapter(name)
        alone[name] = logits(tuner)
    with disabled(tuner):
        alone["__base__"] = logits(tuner)
    before = tuner.roster.mix
    for names in (("a", "b"), ("b", "__base__")):
        with rows(tuner, names, (), {"input_ids": TOKENS}):
            assert tuner.roster.mix.rows.names == names and tuner.roster.mix.rows.tokens == TOKENS.shape[1]
            found = logits(tuner)
        assert tuner.roster.mix is before
        for i, n in enumerate(names):
            assert torch.allclose(found[i], alone[n][i], atol=1e-5)


def test_without_names_the_mix_stays():
    tuner = two()
    before = tuner.roster.mix
    with rows(tuner, None, (TOKENS,), {}), tasks(tuner, None):
        assert tuner.roster.mix is before


@pytest.mark.parametrize(
    ("inputs", "tokens"),
    [
        ({"input_ids": TOKENS}, 6),
        ({"inputs_embeds": torch.zeros(2, 5, 16)}, 5),
        ({"x": torch.zeros(2)}, None),  # one number a row
        ({"pixel_values": torch.zeros(2, 3, 8, 8)}, None),  # an image's second axis counts no tokens
        ({}, None),
    ],
)
def test_tokens_per_row_are_known_where_the_input_tells(inputs, tokens):
    tuner = two()
    with rows(tuner, ("a", "b"), (), inputs):
        assert tuner.roster.mix.rows.tokens == tokens


def test_rows_of_a_disabled_model_have_no_adapter():
    tuner = two()
    tuner.disable_adapter_layers()
    with rows(tuner, ("a", "b"), (), {"input_ids": TOKENS}):
        assert tuner.roster.mix == Mix() and tuner.roster.mix.rows is None


def test_unknown_names_and_merged_adapters_are_refused():
    tuner = two()
    with pytest.raises(ValueError, match="gone"), rows(tuner, ("a", "gone"), (), {}):
        pass
    tuner.merge_adapter(["a"])
    with pytest.raises(ValueError, match="call unmerge_adapter"), rows(tuner, ("a", "b"), (), {}):
        pass


# -- a task per row, no adapter -----------------------------------------------------------------------------------------------
def test_within_tasks_who_acts_stays_and_rows_have_their_tasks():
    tuner, ids = two(), torch.tensor([1, 0])
    before = tuner.roster.mix
    with pytest.raises(KeyError), tasks(tuner, ids):
        assert tuner.roster.mix.tasks is ids and tuner.roster.mix.active == ("a",)
        with rows(tuner, ("a", "b"), (), {}), tasks(tuner, ids):
            assert tuner.roster.mix.tasks is ids and tuner.roster.mix.rows.names == ("a", "b")
        raise KeyError
    assert tuner.roster.mix is before


@torch.no_grad()
@pytest.mark.parametrize("merged", [[], ["a"], ["a", "b"]])
def test_within_disabled_the_base_runs_bit_by_bit_and_all_is_put_back(merged):
    tuner, base = two(), logits(llama())
    if merged:
        tuner.set_adapter(merged)
        tuner.merge_adapter()
    expected = logits(tuner)
    with pytest.raises(KeyError), disabled(tuner):
        assert torch.equal(logits(tuner), base)
        raise KeyError
    assert torch.equal(logits(tuner), expected) and not torch.allclose(expected, base)
    layer = tuner.model.model.layers[0].self_attn.q_proj
    assert layer.merged_adapters == merged and tuner.roster.enabled


def test_a_disabled_model_stays_disabled():
    tuner = two()
    tuner.disable_adapter_layers()
    with disabled(tuner):
        assert not tuner.roster.enabled
    assert not tuner.roster.enabled


def test_rows_stay_chosen_after_a_pause_within_them():
    tuner = two()
    with rows(tuner, ("a", "b"), (), {"input_ids": TOKENS}):
        inside = tuner.roster.mix
        with disabled(tuner):
            assert tuner.roster.mix.rows is None
        assert tuner.roster.mix is inside


def test_one_string_is_no_list_of_names():
    """Its letters would be taken for the rows' adapters."""
    with pytest.raises(TypeError, match="list of names, one per row"):
        check_rows("ab", (torch.zeros(2, 3),), {})
