"""Taking adapters out: one by its name, all with their wrappers, and where that would leave weights that nobody gathers."""

from __future__ import annotations

import pytest
import torch

from peft import Refusal, get_peft_model
from peft.core.adapted.layer import adapted_layers
from peft.core.injection.remove import check_unloadable, delete, unload
from tests.helpers.tiny_llama import llama, logits, lora


def test_without_its_wrappers_the_model_is_the_base():
    base = get_peft_model(llama(), lora()).get_base_model()
    assert unload(base) is base and not list(adapted_layers(base))
    assert torch.equal(logits(base), logits(llama()))


def test_an_unknown_adapter_is_named_with_those_that_are_there():
    with pytest.raises(ValueError, match="other does not exist.*default"):
        delete(get_peft_model(llama(), lora()).get_base_model(), "other")


def test_what_fsdp_1_keeps_in_pieces_cannot_be_taken_out():
    model = get_peft_model(llama(), lora())
    for m in model.modules():
        m._is_fsdp_managed_module = True  # as its wrapper marks all modules below
    out = logits(model)
    for call in (lambda: check_unloadable(model.get_base_model()), model.merge_and_unload, model.unload):
        with pytest.raises(Refusal, match="FSDP 1 gathers its weights"):
            call()
    assert torch.equal(logits(model), out)
