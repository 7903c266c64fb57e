"""Attention computed between two projections: torch's own result, by whichever of its arguments.

`test_attention` changes the projections; here the parts hold the module's own weights, so that torch's own forward is
the expected value.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from peft.layers.attention_between_parts import Attention, _additive, acts_below
from peft.layers.weight_slice import WeightSlice
from tests.layers.holding import adapted

LAYERS = {
    "batch_first": {"batch_first": True},
    "sequence_first": {},
    "no_bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    "own_sizes": {"kdim": 12, "vdim": 6},
}
HIDE = torch.tensor([[False] * 5, [False, True, True, False, False]])
LOOK = torch.ones(4, 5).triu(2).bool()
CALLS = {
    "weights": {},
    "each head's weights": {"average_attn_weights": False},
    "no weights": {"need_weights": False},
    "bool mask": {"attn_mask": LOOK},
    "float mask": {"attn_mask": torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), "need_weights": False},
    "mask of heads": {"attn_mask": LOOK.repeat(4, 1, 1)},
    "padding": {"key_padding_mask": HIDE},
    "causal and padding": {
        **{"attn_mask": torch.ones(4, 5).triu(1).bool(), "is_causal": True},
        **{"key_padding_mask": HIDE, "need_weights": False},
    },
}


def plain(**fields: object) -> nn.MultiheadAttention:
    layer = nn.MultiheadAttention(8, 2, **fields).eval()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p) * 0.5)  # torch starts biases at 0
    return layer


def inputs(layer: nn.MultiheadAttention) -> list[Tensor]:
    given = [torch.randn(2, 4, 8), torch.randn(2, 5, layer.kdim), torch.randn(2, 5, layer.vdim)]
    return given if layer.batch_first else [t.transpose(0, 1) for t in given]


def same(found: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor | None]) -> bool:
    return all(
        (a is None and b is None) or (a.shape == b.shape and torch.allclose(a, b, atol=1e-6))
        for a, b in zip(found, expected, strict=True)
    )


@torch.no_grad()
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", LAYERS)
def test_between_its_own_projections_it_is_torchs_attention(name, call):
    layer = plain(**LAYERS[name])
    given = inputs(layer)
    assert same(Attention(layer)._attend(*given, **CALLS[call]), layer(*given, **CALLS[call]))


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_without_a_batch_axis_too(name):
    layer = plain(**LAYERS[name])
    q, k, v = torch.randn(4, 8), torch.randn(5, layer.kdim), torch.randn(5, layer.vdim)
    for more in ({}, {"key_padding_mask": HIDE[1], "attn_mask": LOOK, "average_attn_weights": False}):
        assert same(Attention(layer)._attend(q, k, v, **more), layer(q, k, v, **more))


def test_while_nothing_acts_the_original_is_called():
    layer = plain()
    stand_in, given, asked = Attention(layer), inputs(layer), []
    layer.register_forward_hook(lambda module, args, kwargs, out: asked.append(kwargs), with_kwargs=True)
    expected = layer(*given)
    assert torch.equal(stand_in(*given, need_weights=True)[0], expected[0]) and asked[1] == {"need_weights": True}
    assert not acts_below(stand_in)
    model = adapted(plain(batch_first=True))
    site = model.get_base_model().site
    assert acts_below(site)
    with model.disable_adapter():
        assert not acts_below(site)
    model.base_model.merge_adapter()
    assert not acts_below(site)  # what is merged needs no detour


def test_parts_have_the_paths_of_upstreams_files():
    """One fused projection has the composite's own path; projections apart and the output have paths of their own."""
    fused = Attention(plain())
    assert {n: p.disk_path for n, p in fused.parts().items()} == {"in_proj": "", "out_proj": "base_layer.out_proj"}
    apart = Attention(plain(kdim=12, vdim=6))
    expected = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "out_proj": "base_layer.out_proj"}
    assert {n: p.disk_path for n, p in apart.parts().items()} == expected
    for stand_in in (fused, apart):
        for name, part in stand_in.parts().items():
            held = part.parent._modules[part.attr]
            assert held is stand_in.base_layer.out_proj if name == "out_proj" else isinstance(held, WeightSlice)


def test_projections_apart_share_one_bias():
    layer = plain(kdim=12, vdim=6)
    stand_in = Attention(layer)
    for i, part in enumerate((stand_in.q_proj, stand_in.k_proj, stand_in.v_proj)):
        assert torch.equal(part.bias, layer.in_proj_bias[8 * i : 8 * i + 8]) and part.bias_size == 24
    assert torch.equal(stand_in.k_proj.weight, layer.k_proj_weight)


@pytest.mark.parametrize(("share", "times"), [("all", 1), ("keys and values", 2), ("none", 3)])
def test_the_fused_projection_runs_once_per_different_input(share, times):
    layer = plain(batch_first=True)
    stand_in, runs, x, y, z = Attention(layer), [], *(torch.randn(2, 5, 8) for _ in range(3))
    stand_in.in_proj.register_forward_hook(lambda *a: runs.append(1))
    given = {"all": (x, x, x), "keys and values": (x, y, y), "none": (x, y, z)}[share]
    with torch.no_grad():
        assert same(stand_in._attend(*given), layer(*given))
    assert len(runs) == times


def test_weights_are_dropped_in_training_only():
    layer = plain(dropout=0.5, batch_first=True)
    stand_in, given = Attention(layer), inputs(layer)
    for need in (True, False):
        with torch.no_grad():
            stand_in.eval()
            assert torch.equal(*(stand_in._attend(*given, need_weights=need)[0] for _ in range(2)))
            stand_in.train()
            assert not torch.equal(*(stand_in._attend(*given, need_weights=need)[0] for _ in range(2)))


def test_what_it_cannot_take_is_said():
    stand_in = Attention(plain(batch_first=True))
    x = torch.randn(2, 4, 8)
    with pytest.raises(RuntimeError, match="pass the mask, too"):
        stand_in._attend(x, x, x, is_causal=True)
    nested = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(2, 8)], layout=torch.jagged)
    with pytest.raises(ValueError, match="padded tensors with a mask, not nested ones"):
        stand_in._attend(nested, nested, nested)


def test_true_hides_in_a_boolean_mask_and_numbers_are_added():
    found = _additive(torch.tensor([True, False]), torch.float16)
    assert found.tolist() == [float("-inf"), 0.0] and found.dtype == torch.float16
    assert torch.equal(_additive(torch.tensor([1.5]), torch.float64), torch.tensor([1.5], dtype=torch.float64))
