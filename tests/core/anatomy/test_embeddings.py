"""The embeddings of a model of language: their name, their size, and rows of them to start from."""

from __future__ import annotations

import torch
import transformers as tf
from torch import nn

from peft.core.anatomy import embeddings
from tests.helpers.tiny_llama import llama


def test_vocabularies_and_the_embeddings_name():
    bert = tf.BertModel(tf.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    assert embeddings.vocab_size(llama()) == 64 and embeddings.vocab_size(nn.Linear(2, 2)) is None
    assert embeddings.embedding_name(llama()) == "embed_tokens"
    assert embeddings.embedding_name(bert) == "word_embeddings"
    assert embeddings.embedding_name(nn.Linear(2, 2)) == "embed_tokens"


def test_prompts_may_start_from_the_models_own_embeddings():
    model = llama().to(torch.bfloat16)
    found = embeddings.embed(model, torch.tensor([3, 5]))
    assert found.dtype is torch.float32 and not found.requires_grad
    assert torch.equal(found, model.model.embed_tokens.weight[[3, 5]].float())
