"""Small functions around models: rescaling for a while, signatures, telling an adapter folder."""

from __future__ import annotations

import pytest
import torch

from peft import get_peft_model, helpers
from tests.helpers.tiny_llama import llama, logits, lora


def test_rescaling_is_undone_also_after_an_error():
    model = get_peft_model(llama(), lora())
    base, out = logits(llama()), logits(model)
    with pytest.raises(ZeroDivisionError), helpers.rescale_adapter_scale(model, 0.0):
        assert torch.equal(logits(model), base)
        raise ZeroDivisionError
    assert torch.equal(logits(model), out)
    with pytest.raises(TypeError), helpers.rescale_adapter_scale(model, "much"):
        pass
    with pytest.raises(ValueError), helpers.rescale_adapter_scale(llama(), 2.0):
        pass


def test_signatures_show_the_base_models_arguments():
    import inspect

    model = get_peft_model(llama(), lora())
    out = logits(model)
    helpers.update_signature(model)
    assert "input_ids" in inspect.signature(model.forward).parameters
    assert "generation_config" in inspect.signature(model.generate).parameters
    assert torch.equal(logits(model), out)
    model.add_adapter("b", lora())
    assert not torch.equal(logits(model, adapter_names=["b", "default"]), out)


def test_telling_an_adapter_folder(tmp_path):
    get_peft_model(llama(), lora()).save_pretrained(tmp_path / "a")
    assert helpers.check_if_peft_model(tmp_path / "a") and not helpers.check_if_peft_model(tmp_path)
    assert not helpers.check_if_peft_model("nobody/nothing-here")
