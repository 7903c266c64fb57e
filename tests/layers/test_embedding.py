"""Embeddings: padding, scale, max_norm, outputs that move into rows."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from peft.layers.embedding import Embedding, ScaledEmbedding
from tests.helpers.layer_kind_cases import CASES
from tests.layers.holding import adapted, close, deltas


def test_the_padding_token_trains_nothing_and_gradients_are_dense():
    model = adapted(nn.Embedding(10, 8, padding_idx=1, sparse=True)).train()
    model(torch.tensor([[0, 1, 2]])).square().sum().backward()
    _, m = model.roster.adapters["default"].methods[0]
    assert not m.lora_A_weight.grad.is_sparse
    assert m.lora_A_weight.grad[:, 1].abs().sum() == 0
    assert (m.lora_A_weight.grad[:, [0, 2]].abs().sum(0) > 0).all()


@pytest.mark.parametrize("scale", [None, 4.0])
def test_what_is_added_to_an_embeddings_output_moves_into_its_rows(scale):
    layer = nn.Embedding(10, 8) if scale is None else CASES["scaled"][0]()
    x = torch.arange(10).view(2, 5)
    model = adapted(layer, lora_bias=True)
    with torch.no_grad():
        out = model(x)
        _, m = model.roster.adapters["default"].methods[0]
        s = getattr(layer, "embed_scale", torch.tensor(1.0))
        expected = s * (layer.weight + (2.0 * m.lora_B_weight @ m.lora_A_weight).T)[x] + 2.0 * m.lora_B_bias
        assert close(out, expected)
        model.base_model.merge_adapter()
        assert close(model(x), expected)
        model.base_model.unmerge_adapter()
        assert torch.equal(model.get_base_model().site.base_layer.weight, layer.weight)


def test_an_embedding_with_max_norm_keeps_its_weight_and_clips_the_changed_rows():
    torch.manual_seed(0)
    layer = nn.Embedding(10, 8, max_norm=2.0)
    x = torch.arange(10)
    model = adapted(layer)
    frozen = model.get_base_model().site.base_layer.weight
    with torch.no_grad():
        out = model(x)
        with model.disable_adapter():
            assert torch.equal(model(x), copy.deepcopy(layer)(x))
        assert torch.equal(frozen, layer.weight)  # the plain layer would have rewritten it
        rows = layer.weight + deltas(model)["site"].T
        clipped = rows * (2.0 / rows.norm(dim=1, keepdim=True)).clamp(max=1.0)
        assert close(out, clipped)
        assert (rows.norm(dim=1) > 2.0).any() and (rows.norm(dim=1) < 2.0).any()


def test_the_matrix_of_a_table_has_a_column_for_each_token():
    kind, layer = Embedding(), ScaledEmbedding(5, 3, None, embed_scale=2.0)
    g = kind.geometry(layer)
    assert (g.out, g.fan_in, g.indexed) == (3, 5, True) and torch.equal(kind.read(layer), layer.weight.T)
    ids, matrix = torch.tensor([4, 0]), torch.randn(3, 5)
    assert torch.allclose(kind.op(layer, ids, matrix), 2 * matrix.T[ids])
    assert torch.equal(kind.native(matrix, layer), matrix.T)
    assert kind.claims(layer) and not kind.claims(nn.Embedding(5, 3, max_norm=1.0))
