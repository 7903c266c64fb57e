"""What models of language look like, asked of small ones: stacks, attentions, positions, embeddings."""

from __future__ import annotations

import pytest
import transformers as tf
from torch import nn

from peft.core.anatomy import language
from tests.helpers.tiny_llama import llama

SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def bert() -> nn.Module:
    return tf.BertModel(tf.BertConfig(**SMALL))


def distilbert() -> nn.Module:
    return tf.DistilBertModel(tf.DistilBertConfig(vocab_size=64, dim=16, hidden_dim=32, n_layers=2, n_heads=2))


def roberta() -> nn.Module:
    return tf.RobertaModel(tf.RobertaConfig(**SMALL, pad_token_id=1))


def opt() -> nn.Module:
    return tf.OPTModel(
        tf.OPTConfig(vocab_size=64, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2)
    )


def t5() -> nn.Module:
    return tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    )


def test_tokens_and_caches_enter_the_innermost_stack_or_a_pair():
    model = llama()
    assert language.token_and_cache_stacks(model) == (model.model, model.model)
    pair = t5()
    assert language.token_and_cache_stacks(pair) == (pair.encoder, pair.decoder)
    assert language.is_encoder_decoder(pair) and not language.is_encoder_decoder(model)


def test_attentions_are_those_that_read_the_cache_one_a_layer():
    model = llama()
    assert list(language.attentions(model.model)) == [layer.self_attn for layer in model.model.layers]
    assert language.takes_prefix(model) == "" and "takes no keys and values" in language.takes_prefix(distilbert())


@pytest.mark.parametrize(("make", "expected"), [(llama, "given"), (bert, "given"), (opt, "mask")])
def test_how_a_stack_learns_its_positions(make, expected):
    assert language.counting(language.token_and_cache_stacks(make())[0]) == expected


def test_robertas_positions_begin_behind_the_padding_index():
    assert language.first_position(roberta()) == 2 and language.first_position(bert()) == 0


def test_the_placeholder_is_none_of_the_special_tokens():
    model = llama(pad_token_id=0, bos_token_id=1, eos_token_id=[2, 4])
    assert language.placeholder(model) == 3


def test_a_number_that_no_config_has_is_asked_for_by_name():
    assert language.number(llama().config, "no_such", "hidden_size") == 16
    with pytest.raises(ValueError, match="has no encoder_layers: state it"):
        language.number(llama().config, "encoder_layers")
