"""Which modules a config means: names, patterns, all-linear, layer numbers; and clear errors where none is meant."""

from __future__ import annotations

import pytest

from peft import LoraConfig, NoMatchingPeftModuleError, get_peft_model
from peft.core.anatomy.targets import exactly, find, find_whole, in_layers, short_names
from tests.helpers.tiny_llama import llama


def found(model=None, **fields) -> list[str]:
    return [p.path for p in find(model if model is not None else llama(), LoraConfig(**fields))]


def test_names_are_last_components_and_strings_are_patterns_of_whole_paths():
    assert found(target_modules=["q_proj"]) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert found(target_modules=r".*1\.self_attn\.[qk]_proj") == [f"model.layers.1.self_attn.{p}_proj" for p in "qk"]
    with pytest.raises(NoMatchingPeftModuleError, match=r"write target_modules=\['q_proj'\]"):
        found(target_modules="q_proj")


def test_all_linear_leaves_out_the_head_and_what_is_saved_whole():
    paths = found(target_modules="all-linear", modules_to_save=["mlp"])
    assert len(paths) == 2 * 4 and all("self_attn" in p for p in paths)


def test_layers_are_counted_by_the_number_behind_their_list():
    assert found(target_modules=["q_proj"], layers_to_transform=[1]) == ["model.layers.1.self_attn.q_proj"]
    only = LoraConfig(target_modules=["q"], layers_to_transform=1, layers_pattern="h")
    assert in_layers(only, "a.h.1.q") and not in_layers(only, "a.h.2.q") and not in_layers(only, "a.layers.1.q")
    assert in_layers(LoraConfig(target_modules=["q"]), "anything")
    assert in_layers(LoraConfig(target_modules=["1"], layers_to_transform=1), "a.layers.1"), "a block is in its layer"


def test_the_wrappers_of_other_adapters_do_not_appear():
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).get_base_model()
    assert found(model, target_modules=["q_proj"]) == found(target_modules=["q_proj"])


def test_a_name_that_matches_nothing_is_an_error_or_a_warning():
    with pytest.raises(NoMatchingPeftModuleError, match=r"'q_porj' not found.*q_proj"):
        found(target_modules=["v_proj", "q_porj"])
    with pytest.warns(UserWarning, match="'q_porj' not found"):
        assert len(find(llama(), LoraConfig(target_modules=["v_proj", "q_porj"]), strict=False)) == 2
    with pytest.raises(NoMatchingPeftModuleError, match="matches 2 modules, but"):
        found(target_modules=["q_proj"], exclude_modules=["q_proj"])


def test_paths_are_found_exactly_and_shortened_where_they_are_all_of_their_name():
    model = llama()
    both = exactly(model, {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)} | {"not.there"})
    assert short_names(model, both) == ["q_proj"]
    one = exactly(model, {"model.layers.1.self_attn.q_proj"})
    assert short_names(model, one) == ["model.layers.1.self_attn.q_proj"]
    with pytest.raises(NoMatchingPeftModuleError):
        exactly(model, {"not.there"})


def test_modules_named_for_a_purpose_must_all_be_there():
    assert [p.path for p in find_whole(llama(), ["lm_head"], "modules_to_save")] == ["lm_head"]
    with pytest.raises(NoMatchingPeftModuleError, match="modules_to_save must name modules"):
        find_whole(llama(), ["lm_head", "lm_haed"], "modules_to_save")
