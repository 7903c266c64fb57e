"""Models that hold adapters get another one: what happens, and what upstream 0.21.2 does, run with the same calls."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import peft
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.core.model import wrapping
from tests.helpers.tiny_llama import llama, logits, lora

SECOND = "modify a model with PEFT for a second time"  # words that upstream's warning has


def trained(model: nn.Module) -> set[str]:
    return {n.partition(".adapters.")[2].partition(".")[0] for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("again", ["the PeftModel", "the base"])
def test_another_name_is_added_and_acts(again):
    base = llama()
    model = get_peft_model(base, lora())
    with pytest.warns(UserWarning, match=SECOND):
        second = get_peft_model(model if again == "the PeftModel" else base, lora(), adapter_name="b")
    assert list(second.peft_config) == ["default", "b"] and second.active_adapters == ["b"] and trained(second) == {"b"}


def test_the_same_name_starts_afresh():
    base = llama()
    model = get_peft_model(base, lora(r=2, init_lora_weights=False))
    plain = logits(llama())
    assert not torch.equal(logits(model), plain)
    with pytest.warns(UserWarning, match=SECOND):
        model = get_peft_model(base, lora(r=4, init_lora_weights=True))
    assert list(model.peft_config) == ["default"] and model.peft_config["default"].r == 4
    assert torch.allclose(logits(model.eval()), plain, atol=1e-6) and trained(model) == {"default"}
    assert model.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"].weight.shape[0] == 4


def test_an_adapter_that_would_go_on_acting_elsewhere_is_not_replaced():
    model = get_peft_model(llama(), lora(init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
    before = logits(model)
    with (
        pytest.warns(UserWarning, match=SECOND),
        pytest.raises(ValueError, match=r"already exists and reaches .*v_proj"),
    ):
        get_peft_model(model, lora(target_modules=["q_proj"]))
    assert torch.equal(logits(model), before) and model.active_adapters == ["default"]


def test_a_saved_adapter_takes_the_place_of_one_of_its_name(tmp_path):
    base = llama()
    model = get_peft_model(base, lora(init_lora_weights=False))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    other = llama()
    get_peft_model(other, lora(init_lora_weights=False, seed=5))
    with pytest.warns(UserWarning, match=SECOND):
        assert torch.equal(logits(PeftModel.from_pretrained(other, tmp_path)), expected)
    with pytest.warns(UserWarning, match=SECOND):
        third = PeftModel.from_pretrained(other, tmp_path, adapter_name="b")
    assert third.active_adapter == "b" and list(third.peft_config) == ["default", "b"]


def test_a_bare_model_gives_no_warning_and_neither_does_an_unloaded_one():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(llama(), lora())
        get_peft_model(model.unload(), lora())
    assert wrapping.holder_of_adapters(llama()) is None


# -- adapters that hold the same whole module ---------------------------------------------------------------------------------
@pytest.mark.parametrize("field", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 2]}], ids=str)
def test_two_adapters_that_replace_the_same_do_not_act_together(field):
    model = get_peft_model(llama(), lora(**field))
    model.add_adapter("b", LoHaConfig(target_modules=["q_proj"], **field))
    head = model.get_base_model().lm_head if "modules_to_save" in field else model.get_base_model().model.embed_tokens
    for call in (model.set_adapter, model.base_model.set_adapter, head.set_adapter):
        with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
            call(["default", "b"])
    with pytest.raises(ValueError, match="Only one adapter"):
        model.base_model.merge_adapter(["default", "b"])
    assert model.active_adapters == ["default"] and not model.roster.merged_at
    model.add_adapter("c", lora())
    model.set_adapter(["default", "c"])
    assert model.active_adapters == ["default", "c"]


def test_token_rows_that_differ_act_together():
    model = get_peft_model(llama(), lora(trainable_token_indices=[1, 2]))
    model.add_adapter("b", lora(trainable_token_indices=[3]))
    model.set_adapter(["default", "b"])


@pytest.mark.parametrize("made", [nn.ModuleList, nn.ParameterList], ids=lambda c: c.__name__)
def test_containers_are_not_saved_whole(made):
    net = nn.Module()
    net.lin = nn.Linear(2, 2)
    net.held = made([nn.Linear(2, 2) if made is nn.ModuleList else nn.Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match="cannot be applied to modules of type"):
        get_peft_model(net, LoraConfig(target_modules=["lin"], modules_to_save=["held"]))
    assert type(net.lin) is nn.Linear and type(net.held) is made


# -- merged models ---------------------------------------------------------------------------------------------------------------
def test_merging_again_warns_and_setting_another_adapter_unmerges():
    model = get_peft_model(llama(), lora(init_lora_weights=False))
    model.add_adapter("b", lora(init_lora_weights=False, seed=7))
    model.set_adapter("b")
    expected = logits(model)
    model.set_adapter("default")
    model.base_model.merge_adapter()
    with pytest.warns(UserWarning, match="already merged, nothing to do"):
        model.base_model.merge_adapter()
    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) .*unmerge first"):
        model.delete_adapter("default")
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("b")
    assert torch.equal(logits(model), expected)
    with pytest.warns(UserWarning, match="[Aa]lready unmerged"):
        model.base_model.unmerge_adapter()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.merge(adapter_names=["default"])
    with pytest.warns(UserWarning, match="additionally merging b"):
        layer.merge(adapter_names=["default", "b"])


def test_several_adapters_are_deleted_together_or_none():
    model = get_peft_model(llama(), lora(), mixed=True)
    for name in "bc":
        model.add_adapter(name, LoHaConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="nope does not exist"):
        model.delete_adapter(["b", "nope"])
    assert list(model.peft_config) == ["default", "b", "c"]
    with pytest.warns(UserWarning, match="was active"):
        model.delete_adapter(["default", "b"])
    assert list(model.peft_config) == ["c"] == model.active_adapters


# -- small things that upstream's users call -------------------------------------------------------------------------------------
def test_a_compiled_base_takes_a_plain_state_dict_and_back():
    config = lora()
    state = peft.get_peft_model_state_dict(peft.inject_adapter_in_model(config, llama()))
    compiled = {f"_orig_mod.{k}": v for k, v in state.items()}
    for base, tensors in ((torch.compile(llama()), state), (llama(), compiled), (torch.compile(llama()), compiled)):
        peft.inject_adapter_in_model(lora(), base, state_dict=tensors)
        assert sum(hasattr(m, "lora_A") for m in base.modules()) == 4


def test_a_state_dict_that_reaches_other_modules_warns():
    state = peft.get_peft_model_state_dict(peft.inject_adapter_in_model(lora(target_modules=["q_proj"]), llama()))
    with pytest.warns(RuntimeWarning, match=r"inconsistency .*state_dict.*v_proj"):
        peft.inject_adapter_in_model(lora(target_modules=["q_proj", "v_proj"]), llama(), state_dict=state)


def test_shapes_are_told_on_the_meta_device():
    with torch.device("meta"):
        base = llama()
    state = peft.get_peft_model_state_dict(get_peft_model(base, lora(modules_to_save=["lm_head"])))
    assert state and all(t.is_meta for t in state.values())
    model = peft.inject_adapter_in_model(lora(), llama(), state_dict=state)
    assert any(hasattr(m, "lora_A") for m in model.modules())


def test_dora_caching_is_called_as_upstreams():
    from peft.helpers import DoraCaching

    caching = DoraCaching()
    caching(enabled=True)
    with DoraCaching(), DoraCaching(enabled=False):
        pass
    caching(enabled=False)


def test_padding_keeps_what_trains():
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    model = get_peft_model(llama(), lora(r=2))
    for n, p in model.named_parameters():
        if "lora_A" in n:
            p.requires_grad = False
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    assert {("lora_B" in n, p.requires_grad) for n, p in model.named_parameters() if "lora" in n} == {
        (True, True),
        (False, False),
    }


def test_gaussian_starts_embeddings_at_one():
    """upstream 0.21.2 on Embedding(5000, 64), r=16: A has std 0, B 0.97."""
    net = nn.Sequential(nn.Embedding(5000, 64))
    get_peft_model(net, LoraConfig(r=16, target_modules=["0"], init_lora_weights="gaussian", seed=1))
    layer = net[0]
    A, B = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    assert not A.any() and abs(float(B.detach().std()) - 1) < 0.1
