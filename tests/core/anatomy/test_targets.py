"""Which modules a config means: names, patterns, all-linear, layer numbers; and clear errors where none is meant."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from peft import LoraConfig, NoMatchingPeftModuleError, get_peft_model
from peft.core.anatomy.targets import exactly, find, find_whole, in_layers, short_names
from peft.errors import ConfigError
from peft.tuners.tuners_utils import check_target_module_exists
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


GOLDEN = json.loads((Path(__file__).parents[2] / "golden/targets/layers_to_transform.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("pattern", sorted({str(c["layers_pattern"]) for c in GOLDEN["cases"]}))
def test_layers_to_transform_means_what_it_means_upstream(pattern):
    """Beyond it, a list of layers may begin the path: the base may be the stack itself."""
    paths = GOLDEN["paths"]
    for case in (c for c in GOLDEN["cases"] if str(c["layers_pattern"]) == pattern):
        config = LoraConfig(**{k: v for k, v in case.items() if k != "adapted"})
        mine = [p for p in paths if check_target_module_exists(config, p)]
        theirs = [paths[i] for i in case["adapted"]]
        assert set(theirs) <= set(mine), case
        assert all(re.match(r"[^.]+\.\d+\.", p) for p in set(mine) - set(theirs)), case


def test_a_pattern_of_alternatives_fits_whole_components():
    for pattern in ("h|layers", "(h|layers)"):
        config = LoraConfig(target_modules=["q"], layers_to_transform=[1], layers_pattern=pattern)
        for path, is_in in {
            "a.h.1.q": True,
            "a.layers.1.b.0.q": True,
            "a.xh.1.q": False,
            "a.layers.0.h.2.q": False,
        }.items():
            assert in_layers(config, path) is is_in, (pattern, path)
    with pytest.raises(ConfigError, match=r"layers_pattern='\(' is no regular expression"):
        in_layers(LoraConfig(target_modules=["q"], layers_to_transform=[1], layers_pattern="("), "a.h.1.q")


def test_what_is_in_no_layer_stays_adapted_where_it_is_named_as_a_whole():
    assert found(target_modules=["q_proj", "lm_head"], layers_to_transform=[1]) == [
        "model.layers.1.self_attn.q_proj",
        "lm_head",
    ]
    both = torch.nn.ModuleDict(
        {"proj": torch.nn.Linear(2, 2), "layers": torch.nn.ModuleList([torch.nn.Linear(2, 2)] * 2)}
    )
    assert found(both, target_modules="all-linear", layers_to_transform=[7]) == ["proj"]


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
