"""nn.MultiheadAttention against the plain module with explicitly changed weights, and torch's fused encoder."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from peft import get_peft_model
from peft.layers.attention import Attention
from tests.layers.holding import adapted, close, deltas, lora, shake


def attention_inputs(layer, unbatched=False):
    torch.manual_seed(1)
    q, k, v = torch.randn(3, 4, 16), torch.randn(3, 5, layer.kdim), torch.randn(3, 5, layer.vdim)
    if unbatched:
        return q[0], k[0], v[0]
    return (q, k, v) if layer.batch_first else tuple(t.transpose(0, 1) for t in (q, k, v))


def changed(layer, model):
    """The plain module with the adapter written into its weights by hand."""
    plain = copy.deepcopy(layer)
    size = plain.embed_dim
    with torch.no_grad():
        for path, d in deltas(model).items():
            if path.endswith("out_proj"):
                plain.out_proj.weight += d
            elif plain.in_proj_weight is not None:
                plain.in_proj_weight += d
                assert d.shape == (3 * size, size)
            else:
                getattr(plain, f"{path[-1 - len('_proj')]}_proj_weight").add_(d)
    return plain


LAYERS = {
    "batch_first": {"batch_first": True},
    "sequence_first": {},
    "no_bias": {"bias": False, "batch_first": True},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True, "add_bias_kv": True, "batch_first": True},
    "own_sizes": {"kdim": 24, "vdim": 8, "batch_first": True},
    "own_sizes_sequence_first": {"kdim": 24, "vdim": 8},
}

hide = torch.tensor([[False] * 5, [False, False, True, True, False], [False, False, False, False, True]])

look = torch.ones(4, 5).triu(2).bool()

causal = torch.ones(4, 5).triu(1).bool()

CALLS = {
    "plain": {},
    "no_weights": {"need_weights": False},
    "each_head": {"average_attn_weights": False},
    "bool_mask": {"attn_mask": look},
    "float_mask": {"attn_mask": torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), "need_weights": False},
    "mask_of_heads": {"attn_mask": torch.randn(12, 4, 5, generator=torch.Generator().manual_seed(0))},
    "padding": {"key_padding_mask": hide},
    "both": {"key_padding_mask": hide, "attn_mask": look, "need_weights": False},
    "causal": {"attn_mask": causal, "is_causal": True, "need_weights": False},
    "causal_padding": {"attn_mask": causal, "is_causal": True, "key_padding_mask": hide, "need_weights": False},
}


class Whole(nn.Module):
    """A model of one attention layer, with all its arguments and both outputs."""

    def __init__(self, layer):
        super().__init__()
        self.site = layer

    def forward(self, *args, **kwargs):
        return self.site(*args, **kwargs)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", LAYERS)
def test_attention_is_the_plain_module_with_other_weights(name, call):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 4, **LAYERS[name]).eval().requires_grad_(False)  # as torch rounds by that
    model = adapted(layer, wrap=Whole)
    inputs = attention_inputs(layer)
    with torch.no_grad():
        y, w = model(*inputs, **CALLS[call])
        expected, weights = changed(layer, model)(*inputs, **CALLS[call])
        base, _ = layer(*inputs, **CALLS[call])
        assert close(y, expected, 2e-6) and not close(y, base, 1e-2)
        assert (w is None) == (weights is None)
        assert w is None or (w.shape == weights.shape and close(w, weights, 2e-6))
        with model.disable_adapter():
            assert torch.equal(model(*inputs, **CALLS[call])[0], base)
        model.base_model.merge_adapter()
        assert close(model(*inputs, **CALLS[call])[0], expected, 2e-6)
        model.base_model.unmerge_adapter()
        assert torch.equal(model.base_model.unload().site(*inputs, **CALLS[call])[0], base)


@pytest.mark.parametrize("fields", [{}, {"kdim": 24, "vdim": 8}], ids=["fused", "own_sizes"])
def test_attention_without_a_batch_axis(fields):
    layer = nn.MultiheadAttention(16, 4, **fields).eval()
    model = adapted(layer, wrap=Whole)
    inputs = attention_inputs(layer, unbatched=True)
    with torch.no_grad():
        mine = model(*inputs, key_padding_mask=hide[1], attn_mask=look)
        plain = changed(layer, model)(*inputs, key_padding_mask=hide[1], attn_mask=look)
    assert all(a.shape == b.shape and close(a, b, 2e-6) for a, b in zip(mine, plain, strict=True))


def test_self_attention_projects_its_input_once():
    layer = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    model = adapted(layer)
    calls = []
    model.get_base_model().site.in_proj.register_forward_hook(lambda *a: calls.append(1))
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        assert close(model(x), changed(layer, model)(x, x, x)[0], 2e-6)
    assert len(calls) == 1


def test_attention_drops_weights_in_training_only():
    layer = nn.MultiheadAttention(16, 4, dropout=0.5, batch_first=True)
    model = adapted(layer)
    x = torch.randn(2, 6, 16)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        model.train()
        assert not torch.equal(model(x), model(x))
        many = model(x.repeat(5000, 1, 1)).unflatten(0, (5000, 2)).mean(0)
        assert close(many, model.eval()(x), 0.1)


def test_sequence_first_attention_gives_each_row_its_adapter():
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 4).eval()
    model = adapted(layer, wrap=Whole)
    model.add_adapter("b", lora())
    model.set_adapter("b")
    shake(model)
    x = torch.randn(3, 3, 16)  # [positions, rows, channels]
    with torch.no_grad():
        each = {}
        for name in ("default", "b"):
            model.set_adapter(name)
            each[name] = model(x, x, x, need_weights=False)[0]
        rows = ["b", "default", "b"]
        mixed = model(x, x, x, need_weights=False, adapter_names=rows)[0]
        for i, name in enumerate(rows):
            assert close(mixed[:, i], each[name][:, i], 1e-6)
        assert not close(each["b"], each["default"], 1e-2)


def test_one_projection_alone_can_be_adapted():
    layer = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x = torch.randn(2, 3, 16)
    for target in ("in_proj", "out_proj"):
        model = adapted(layer, [f"site.{target}"])
        assert set(deltas(model)) == {{"in_proj": "site", "out_proj": "site.base_layer.out_proj"}[target]}
        with torch.no_grad():
            assert close(model(x), changed(layer, model)(x, x, x)[0], 2e-6)
            assert not close(model(x), layer(x, x, x)[0], 1e-2)


def test_a_merged_bias_that_was_not_there_goes_again_with_the_last_part():
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 4, kdim=24, vdim=8, bias=False, batch_first=True).eval()
    model = adapted(layer, wrap=Whole, lora_bias=True)
    inputs = attention_inputs(layer)
    mha = model.get_base_model().site.base_layer
    with torch.no_grad():
        out, _ = model(*inputs)
        model.base_model.merge_adapter()
        assert mha.in_proj_bias.shape == (48,)
        assert close(model(*inputs)[0], out, 2e-6)
        model.base_model.unmerge_adapter()
        assert mha.in_proj_bias is None
        before, after = layer.state_dict(), model.base_model.unload().site.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(after[k], v) for k, v in before.items())


class Encoder(nn.Module):
    def __init__(self, **fields):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True, **fields)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x, **kwargs):
        return self.encoder(x, **kwargs)


PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])


@pytest.mark.parametrize(
    "targets", [["linear1"], ["linear2"], ["self_attn"], ["out_proj"], ["self_attn", "linear1"]], ids=str
)
@pytest.mark.parametrize("masked", [False, True], ids=["", "padded"])
def test_adapters_in_an_encoder_take_effect_in_eval(targets, masked, monkeypatch):
    torch.manual_seed(0)
    base = Encoder().eval()
    x = torch.randn(3, 5, 16)
    kwargs = {"src_key_padding_mask": PADDING} if masked else {}
    seen = ~PADDING if masked else torch.ones(3, 5, dtype=torch.bool)
    model = get_peft_model(copy.deepcopy(base), lora(targets)).eval()
    shake(model)
    fused = []
    kernel = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a: fused.append(1) or kernel(*a))
    with torch.no_grad():
        plain = base(x, **kwargs)
        assert len(fused) == 2  # without adapters torch takes its fused kernel
        out = model(x, **kwargs)
        trained = model.train()(x, **kwargs)
        model.eval()
        assert len(fused) == 2
        assert not close(out[seen], plain[seen], 1e-2)
        assert close(out[seen], trained[seen], 1e-5)
        with model.disable_adapter():
            assert torch.equal(model(x, **kwargs), plain)  # through the fused kernel again, so the very bits
        assert len(fused) == 4
        model.base_model.merge_adapter()
        assert close(model(x, **kwargs)[seen], out[seen], 1e-5)
        assert len(fused) == 6
        model.base_model.unmerge_adapter()
        rows = model(x, **kwargs, adapter_names=["default", "__base__", "default"])
        assert close(rows[1][seen[1]], plain[1][seen[1]], 1e-5) and close(rows[2][seen[2]], out[2][seen[2]], 1e-5)
        back = model.base_model.unload()
        assert torch.equal(back(x, **kwargs), plain)
        for new, old in zip(back.modules(), base.modules(), strict=True):
            assert type(new) is type(old)
            for flag in ("activation_relu_or_gelu", "use_nested_tensor"):
                assert type(new.__dict__.get(flag)) is type(old.__dict__.get(flag))


def test_an_adapted_encoder_copies_pickles_and_compiles():
    torch.manual_seed(0)
    model = get_peft_model(Encoder().eval(), lora(["self_attn", "linear1"])).eval()
    shake(model)
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        out = model(x)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), out)
        shake(twin)
        assert torch.equal(model(x), out) and not torch.equal(twin(x), out)
        with twin.disable_adapter():
            assert not torch.equal(twin(x), out)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x), out)
        torch._dynamo.reset()
        layer = model.get_base_model().encoder.layers[0]
        assert close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_projections_of_one_width_are_one_part_and_of_several_are_three():
    def parts(**more):
        return {n: p.disk_path for n, p in Attention(nn.MultiheadAttention(8, 2, **more)).parts().items()}

    assert parts() == {"in_proj": "", "out_proj": "base_layer.out_proj"}
    assert parts(kdim=6, vdim=4) == {
        **{f"{p}_proj": f"{p}_proj" for p in "qkv"},
        "out_proj": "base_layer.out_proj",
    }
