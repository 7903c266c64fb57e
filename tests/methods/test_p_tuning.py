"""P-tuning: the prompt is the output of a small network, an MLP or an LSTM followed by one."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from peft import get_peft_model
from peft.methods.p_tuning import PromptEncoderConfig, PTuning
from tests.helpers.tiny_llama import llama, logits


def made(**more):
    shape = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3, "encoder_hidden_size": 8}
    model = get_peft_model(llama(), PromptEncoderConfig(**shape, **more)).eval()
    ((_, method),) = model.roster.adapters["default"].methods
    assert isinstance(method, PTuning)
    return model, method


def test_the_mlp_has_three_layers_with_relu_between():
    model, m = made()
    first, second, third = (m.mlp_head[i] for i in (0, 2, 4))
    assert [tuple(layer.weight.shape) for layer in (first, second, third)] == [(8, 16), (8, 8), (16, 8)]
    expected = third(F.relu(second(F.relu(first(m.embedding.weight)))))
    assert torch.allclose(m.prompt(None), expected, atol=1e-6) and expected.shape == (3, 16)
    assert logits(model).shape[1] == 3 + 6


def test_the_lstm_reads_the_table_both_ways_before_its_mlp():
    _, m = made(encoder_reparameterization_type="LSTM", encoder_num_layers=1)
    assert m.lstm_head.bidirectional and m.lstm_head.num_layers == 1
    hidden, _ = m.lstm_head(m.embedding.weight[None])
    expected = m.mlp_head[2](F.relu(m.mlp_head[0](hidden[0])))
    assert hidden.shape == (1, 3, 16) and torch.allclose(m.prompt(None), expected, atol=1e-6)


@pytest.mark.parametrize("save_encoder", [True, False])
def test_the_file_holds_the_result_and_the_network_where_it_is_asked_to(save_encoder, tmp_path):
    model, m = made(save_encoder=save_encoder)
    assert m.table.keys["prompt_embeddings"] == "prompt_embeddings"
    assert ("mlp_head.0.weight" in m.table.keys) is save_encoder
    model.save_pretrained(tmp_path)
    from peft import PeftModel

    again = PeftModel.from_pretrained(llama(), tmp_path).eval()
    ((_, other),) = again.roster.adapters["default"].methods
    assert other.lacks_network is not save_encoder
    assert torch.allclose(logits(again), logits(model), atol=1e-6)


def test_settings_of_the_other_network_are_told():
    with pytest.warns(UserWarning, match="encoder_num_layers is for the LSTM"):
        PromptEncoderConfig(num_virtual_tokens=2, encoder_num_layers=3)
    with pytest.raises(ValueError, match="encoder_reparameterization_type"):
        PromptEncoderConfig(num_virtual_tokens=2, encoder_reparameterization_type="GRU")
