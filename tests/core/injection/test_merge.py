"""Merging a whole model layer by layer: refusals before any write, and all or nothing."""

from __future__ import annotations

import pytest
import torch

from peft import LoReftConfig, Refusal, get_peft_model
from peft.core.adapted.layer import Adapted, adapted_layers
from peft.core.injection.merge import merge, unmerge
from tests.helpers.tiny_llama import llama, logits, lora


def adapted(**more):
    return get_peft_model(llama(), lora(**more)).get_base_model().eval()


def weights(model) -> list[torch.Tensor]:
    return [layer.base_layer.weight.data.clone() for layer in adapted_layers(model)]


def test_layers_are_merged_one_by_one_and_unmerged_to_the_bit():
    model = adapted()
    out, before = logits(model), weights(model)
    paths = list(merge(model))
    assert paths == [layer.path for layer in adapted_layers(model)]
    assert torch.allclose(logits(model), out, atol=1e-5) and all(layer.merged for layer in adapted_layers(model))
    unmerge(model)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


def test_an_error_at_a_later_layer_takes_back_the_earlier_ones(monkeypatch):
    model = adapted()
    before, plain, calls = weights(model), Adapted.write, []

    def write(self, *args, **kwargs):
        calls.append(self.path)
        if len(calls) == 3:
            raise ValueError("no room")
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Adapted, "write", write)
    with pytest.raises(ValueError, match="no room"):
        list(merge(model))
    assert len(calls) == 3 and not any(layer.merged for layer in adapted_layers(model))
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


def test_values_that_are_not_finite_are_named_before_anything_is_written():
    model = adapted()
    before = weights(model)
    list(adapted_layers(model))[2].methods["default"][0].lora_B_weight.data[0, 0] = torch.nan
    with pytest.raises(
        ValueError, match=r"layers\.1\.self_attn\.q_proj\.lora_B\.weight holds NaN or inf; nothing was merged"
    ):
        list(merge(model))
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


def test_what_cannot_be_merged_is_refused_and_models_without_adapters_too():
    model = get_peft_model(llama(), LoReftConfig(r=2, prefix_positions=1)).get_base_model()
    with pytest.raises(Refusal, match="no change of the base weights"):
        list(merge(model))
    with pytest.raises(ValueError, match="no adapters to merge"):
        list(merge(llama()))


def test_a_config_says_no_longer_tied_for_as_long_as_one_end_is_merged():
    base = llama(tie_word_embeddings=True)
    model = get_peft_model(base, lora(target_modules=["lm_head"])).get_base_model()
    list(merge(model))
    assert model.config.tie_word_embeddings is False
    unmerge(model)
    assert model.config.tie_word_embeddings is True
