"""The field `trainable_token_indices`: which rows of which embedding train along, and what contradicts it."""

from __future__ import annotations

import pytest
import torch

from peft import LoraConfig, get_peft_model
from peft.companions.token_rows import TokenRows, TokensAlong
from tests.helpers.tiny_llama import TOKENS, llama, logits


def config(rows, **more) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=rows, **more)


def test_rows_are_of_the_input_embedding_unless_another_is_named():
    places, along = TokensAlong.accompany(config([3, 5]), llama())
    assert [p.path for p in places] == ["model.embed_tokens"] and along == TokenRows({"embed_tokens": [3, 5]})
    places, along = TokensAlong.accompany(config({"embed_tokens": [1], "lm_head": [2]}), llama())
    assert {p.path: along.indices_at(p.path) for p in places} == {"model.embed_tokens": [1], "lm_head": [2]}
    assert along.indices_at("the.other.end") == [1]


def test_as_many_tokens_are_needed_as_the_largest_index_says():
    assert TokensAlong.tokens_needed(config([3, 70])) == 71
    assert TokensAlong.tokens_needed(config({"embed_tokens": [3], "lm_head": [9]})) == 10


def test_rows_train_beside_the_method_and_the_table_stays():
    base = llama()
    table = base.model.embed_tokens.weight.detach().clone()
    row = int(TOKENS[0, 0])
    model = get_peft_model(base, config([row])).eval()
    before = logits(model)
    companion = next(m for _, m in model.roster.adapters["default"].brought())
    with torch.no_grad():
        companion.trainable_tokens_delta_weight.add_(1.0)
    assert not torch.equal(logits(model)[0], before[0])
    assert torch.equal(model.get_base_model().model.embed_tokens.base_layer.weight, table)


def test_a_table_cannot_be_trained_whole_and_by_rows():
    with pytest.raises(ValueError, match="in both modules_to_save.*choose one"):
        TokensAlong.accompany(config([3], modules_to_save=["embed_tokens"]), llama())


def test_the_ends_of_a_tied_table_need_the_same_rows():
    tied = llama(tie_word_embeddings=True)
    with pytest.raises(ValueError, match="trainable_token_indices differ for"):
        TokensAlong.accompany(config({"embed_tokens": [1], "lm_head": [2]}, ensure_weight_tying=True), tied)
