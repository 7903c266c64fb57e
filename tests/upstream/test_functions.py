"""Functions that other libraries import: the base's state under the adapters, small tensor functions, FSDP's units."""

from __future__ import annotations

import pytest
import torch

from peft import CheckpointError, get_peft_model
from peft.upstream import functions
from tests.helpers.tiny_llama import llama, logits, lora


def adapted():
    return get_peft_model(llama(), lora(modules_to_save=["lm_head"]))


def test_the_bases_state_has_the_names_that_it_has_without_adapters():
    plain, found = llama().state_dict(), functions.get_base_model_state_dict(adapted())
    assert found.keys() == plain.keys() and all(torch.equal(found[k], v) for k, v in plain.items())


def test_values_are_set_under_the_adapters_or_nothing_is():
    model, other = adapted(), llama(seed=1).state_dict()
    missing, extra = functions.set_base_model_state_dict(model, other)
    assert not missing and not extra
    with model.disable_adapter():
        assert torch.equal(logits(model.eval()), logits(llama(seed=1)))
    short = {k: v for k, v in llama().state_dict().items() if "lm_head" not in k}
    with pytest.raises(CheckpointError, match=r"missing \['lm_head.weight'\], unknown \['x'\]"):
        functions.set_base_model_state_dict(model, {**short, "x": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"other shape \['lm_head.weight'\]"):
        functions.set_base_model_state_dict(model, {"lm_head.weight": torch.zeros(2, 2)}, strict=False)
    now = functions.get_base_model_state_dict(model)
    assert all(torch.equal(now[k], v) for k, v in other.items()), "an error changes nothing"


def test_a_path_is_its_parent_module_and_name():
    model = llama()
    parent, module, name = functions.get_submodules(model, "model.layers.1.mlp")
    assert (parent, module, name) == (model.model.layers[1], model.model.layers[1].mlp, "mlp")


def test_prefixes_as_blooms_old_cache():
    layers, rows, heads, tokens, dim = 2, 3, 4, 5, 6
    given = torch.randn(2 * layers, rows, heads, tokens, dim)
    found = functions.bloom_model_postprocess_past_key_value(tuple(given.split(2)))
    assert len(found) == layers
    for i, (keys, values) in enumerate(found):
        assert keys.shape == (rows * heads, dim, tokens) and values.shape == (rows * heads, tokens, dim)
        assert torch.equal(values, given[layers + i].reshape(rows * heads, tokens, dim))
        laid_out = given[i].permute(0, 2, 1, 3).reshape(rows * heads, dim, tokens)
        assert torch.equal(keys, laid_out)


def test_prefixes_as_starcoders_old_cache():
    given = torch.randn(2, 3, 4, 5, 6)
    (found,) = functions.starcoder_model_postprocess_past_key_value((given,))
    assert found.shape == (3, 5, 2 * 6)
    assert torch.equal(found[1, 2], torch.cat([given[0, 1, 0, 2], given[1, 1, 0, 2]])), "keys and values of one head"


def test_a_named_block_that_the_model_lacks_is_told(monkeypatch):
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaDecoderLayer,NoSuchBlock")
    with pytest.raises(ValueError, match="names NoSuchBlock, which this model does not have"):
        functions.fsdp_auto_wrap_policy(adapted())
