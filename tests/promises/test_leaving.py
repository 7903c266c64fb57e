"""Promise 35: disabling, deleting and unloading give back the base."""

from __future__ import annotations

import pytest
import torch

from peft import get_peft_model
from peft.core.adapted.layer import adapted_layers
from tests.promises.models import PROMPTS, adapted, call, each_method, llama, logits, lora, prompted, same, state


@each_method
def test_promise_35_disable_delete_and_unload_give_back_the_base(cell):
    def fresh():
        return cell.model(names=("default", "b"))

    base, inputs = cell.base()
    with torch.no_grad():
        expected = base(*inputs)
        model, _ = fresh()
        grads = [p.requires_grad for p in model.parameters()]
        with model.disable_adapter():
            assert torch.equal(model(*inputs), expected)
        assert [p.requires_grad for p in model.parameters()] == grads
        model.delete_adapter("default")
        assert model.active_adapters == ["b"]
        model.delete_adapter("b")
        assert torch.equal(model(*inputs), expected)
        model, _ = fresh()
        back = model.unload()
        assert torch.equal(back(*inputs), expected)
        assert same(state(back), state(base)) and [type(m) for m in back.modules()] == [type(m) for m in base.modules()]


def test_promise_35_disable_unmerges_and_merges_again_and_survives_errors():
    model = adapted()
    base = logits(llama())
    out = logits(model)
    model.base_model.merge_adapter()
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        assert torch.equal(logits(model), base)
        raise ZeroDivisionError
    assert torch.allclose(logits(model), out, atol=1e-5) and all(layer.merged for layer in adapted_layers(model))
    assert model.roster.enabled


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_promise_35_starts_from_the_weight_leave_the_weight_alone(start):
    base = llama()
    before = state(base)
    model = get_peft_model(base, lora(init_lora_weights=start))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))
    assert same(state(model.unload()), before)


@pytest.mark.parametrize(("cls", "config"), PROMPTS)
def test_promise_35_prompts_are_disabled_deleted_and_unloaded(cls, config):
    expected = logits(llama())
    model = prompted(cls, config)
    with torch.no_grad():
        with model.disable_adapter():
            assert torch.equal(call(model).logits, expected)
        model.add_adapter("b", lora())
        model.delete_adapter("default")
        assert torch.equal(logits(model), expected), "a fresh LoRA is the identity"
        back = prompted(cls, config).base_model.unload()
        assert torch.equal(logits(back), expected) and same(state(back), state(llama()))
