"""What is particular to a kind of layer: geometry, fast paths, layouts on disk. The laws run every method on every kind.

The adapters and outputs in `golden/layer_kinds` were made by upstream (see make.py there). Everywhere else the expected
output comes from a plain torch module whose weight the test itself changed by s·B A.
"""

import copy
import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPConfig, CLIPModel, GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

from peft import LoraConfig, PeftModel, Refusal, get_peft_model
from peft.core.anatomy.walk import kind_of
from peft.errors import CheckpointError
from peft.layers.slice import Slice, WeightSlice
from tests.helpers.layer_kind_cases import CASES, Holder

GOLDEN = Path(__file__).parent / "golden" / "layer_kinds"
SAME_AS_UPSTREAM = ["embedding", "embedding_dora", "scaled", "conv1d", "conv2d", "conv2d_dora", "conv3d", "gpt2_conv1d"]


def lora(targets=("site",), **fields):
    return LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": list(targets), **fields})


def adapted(layer, targets=("site",), seed=3, wrap=Holder, **fields):
    """A randomised LoRA on a copy of the layer, so that the original stays a plain module to compare with."""
    torch.manual_seed(seed)
    model = get_peft_model(wrap(copy.deepcopy(layer)), lora(targets, **fields)).eval()
    shake(model)
    return model


def shake(model, size=0.3):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * size)


def deltas(model):
    """Each site as upstream writes it to disk -> s·B A, from the adapter's own tensors."""
    with torch.no_grad():
        return {path: 2.0 * m.lora_B @ m.lora_A for path, m in model.roster.adapters["default"].methods}


def close(a, b, tolerance=1e-5):
    return float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


def golden(name):
    case = load_file(GOLDEN / name / "case.safetensors")
    net = Holder(CASES[name.removesuffix("_dora")][0]()).eval()
    net.load_state_dict({k: v for k, v in case.items() if k.startswith("site.")})
    return net, case["x"], case["y"]


# -- upstream's files -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SAME_AS_UPSTREAM)
def test_upstreams_adapter_gives_upstreams_output_and_is_written_back_alike(name, tmp_path):
    net, x, y = golden(name)
    with torch.no_grad():
        plain = net(x)
        model = PeftModel.from_pretrained(net, GOLDEN / name).eval()
        assert close(model(x), y)
        assert not close(plain, y, 1e-2)
        assert close(copy.deepcopy(model).merge_and_unload()(x), y)
    model.save_pretrained(tmp_path)
    theirs = load_file(GOLDEN / name / "adapter_model.safetensors")
    ours = load_file(tmp_path / "adapter_model.safetensors")
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert all(torch.equal(ours[k], v) for k, v in theirs.items())


def test_attentions_output_delta_is_added_once_where_upstream_adds_it_twice(tmp_path):
    # Let h be the heads' outputs joined, Δ = s·B A of out_proj. The module should give h (W + Δ)ᵀ + b.
    # Upstream's wrapper of the whole module writes Δ into out_proj's weight for the length of the call (and takes it
    # out afterwards), but what it writes into is a layer that already holds W + Δ by the same means: h (W + 2Δ)ᵀ + b.
    # So upstream's output is what a plain module gives with W_in + Δ_in and W + 2Δ, and ours with W_in + Δ_in and W + Δ.
    net, x, upstream = golden("attention")
    once, twice = copy.deepcopy(net), copy.deepcopy(net)
    model = PeftModel.from_pretrained(net, GOLDEN / "attention").eval()
    file = load_file(GOLDEN / "attention" / "adapter_model.safetensors")
    stem = "base_model.model.site."
    d_in = 2.0 * file[stem + "lora_B.weight"] @ file[stem + "lora_A.weight"]
    d_out = 2.0 * file[stem + "base_layer.out_proj.lora_B.weight"] @ file[stem + "base_layer.out_proj.lora_A.weight"]
    with torch.no_grad():
        for plain, times in ((once, 1), (twice, 2)):
            plain.site.in_proj_weight += d_in
            plain.site.out_proj.weight += times * d_out
        assert close(twice(x), upstream)
        assert not close(once(x), upstream, 1e-1)
        assert close(model(x), once(x))
    model.save_pretrained(tmp_path)
    ours = load_file(tmp_path / "adapter_model.safetensors")
    assert ours.keys() == file.keys() and all(torch.equal(ours[k], v) for k, v in file.items())


def test_upstreams_grouped_convolution_is_not_taken_for_a_change_of_the_weight():
    # Upstream's A reads all inputs and its B is grouped: outputs then depend on inputs of other groups, which no
    # grouped weight can express. Its file has other shapes and is refused; the model stays as it was.
    net, x, _ = golden("grouped")
    with torch.no_grad():
        before = net(x)
        with pytest.raises(CheckpointError, match="size mismatch"):
            PeftModel.from_pretrained(net, GOLDEN / "grouped")
        assert type(net.site) is nn.Conv2d and torch.equal(net(x), before)


# -- convolutions: the layer's own geometry (promise 33) ------------------------------------------------------------------
GEOMETRIES = {
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular"), (2, 4, 6, 5)),
    "reflect": (lambda: nn.Conv1d(4, 6, 5, padding=2, padding_mode="reflect"), (2, 4, 9)),
    "replicate": (lambda: nn.Conv3d(2, 6, (1, 3, 3), padding=1, padding_mode="replicate"), (2, 2, 3, 4, 4)),
    "dilation": (lambda: nn.Conv2d(4, 6, 3, dilation=2), (2, 4, 7, 7)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv1d(6, 6, 3, groups=6, padding="same"), (2, 6, 7)),
    "same": (lambda: nn.Conv2d(4, 6, (2, 3), padding="same", dilation=(1, 2)), (2, 4, 6, 7)),
    "valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid", stride=(2, 1)), (2, 4, 7, 7)),
    "unbatched": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 5, 5)),
}


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_lora_on_a_convolution_is_the_convolution_with_another_weight(name, fields):
    make, shape = GEOMETRIES[name]
    torch.manual_seed(0)
    layer, x = make(), torch.randn(shape)
    model = adapted(layer, **fields)
    with torch.no_grad():
        out = model(x)
        _, m = model.roster.adapters["default"].methods[0]
        inner = m.inner if fields.get("use_dora") else m
        W = layer.weight.flatten(1) + 2.0 * inner.lora_B @ inner.lora_A
        if fields.get("use_dora"):
            W = m.lora_magnitude_vector[:, None] * W / W.norm(dim=1, keepdim=True)
        layer.weight.copy_(W.view_as(layer.weight))
        if fields.get("lora_bias"):
            layer.bias += 2.0 * m.lora_bias
        assert close(out, layer(x))
        model.base_model.merge_adapter()
        assert close(model(x), out)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolutions_matrix_is_its_linear_map(groups):
    # W[o, (i, tap)] is the weight that input channel i sends to output o through a tap; torch keeps [i, o / groups, tap].
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 6, (2, 3), groups=groups, stride=2)
    kind = kind_of(layer)
    W = kind.read(layer)
    assert W.shape == (6, 4 // groups * 6)
    for o in range(6):
        g = o // (6 // groups)
        mine = layer.weight[g * (4 // groups) : (g + 1) * (4 // groups), o % (6 // groups)]
        assert torch.equal(W[o], mine.flatten())
    assert torch.equal(kind.native(W, layer), layer.weight)


def test_a_convolution_with_a_forward_of_its_own_is_refused_by_weight_methods():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return self._conv_forward(x, w, self.bias)

    net = Holder(Standardised(4, 6, 3))
    with pytest.raises(Refusal, match="no single weight matrix"):
        get_peft_model(net, lora())
    assert type(net.site) is Standardised


# -- embeddings -----------------------------------------------------------------------------------------------------------
def test_the_padding_token_trains_nothing_and_gradients_are_dense():
    model = adapted(nn.Embedding(10, 8, padding_idx=1, sparse=True)).train()
    model(torch.tensor([[0, 1, 2]])).square().sum().backward()
    _, m = model.roster.adapters["default"].methods[0]
    assert not m.lora_A.grad.is_sparse
    assert m.lora_A.grad[:, 1].abs().sum() == 0
    assert (m.lora_A.grad[:, [0, 2]].abs().sum(0) > 0).all()


@pytest.mark.parametrize("scale", [None, 4.0])
def test_what_is_added_to_an_embeddings_output_moves_into_its_rows(scale):
    layer = nn.Embedding(10, 8) if scale is None else CASES["scaled"][0]()
    x = torch.arange(10).view(2, 5)
    model = adapted(layer, lora_bias=True)
    with torch.no_grad():
        out = model(x)
        _, m = model.roster.adapters["default"].methods[0]
        s = getattr(layer, "embed_scale", torch.tensor(1.0))
        expected = s * (layer.weight + (2.0 * m.lora_B @ m.lora_A).T)[x] + 2.0 * m.lora_bias
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


def test_an_embedding_that_makes_its_own_indices_is_refused():
    class Positions(nn.Embedding):
        def forward(self, mask):
            return super().forward(mask.cumsum(1))

    with pytest.raises(Refusal, match="no single weight matrix"):
        get_peft_model(Holder(Positions(10, 8)), lora())


# -- attention (promise 13) -----------------------------------------------------------------------------------------------
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


# -- torch's fused encoder (every adapted site takes effect in train and eval) --------------------------------------------
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


# -- slices ---------------------------------------------------------------------------------------------------------------
class Stack(nn.Module):
    """Three experts' matrices `[in, out]` in one parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stack = nn.Parameter(torch.randn(3, 5, 4))
        self.offsets = nn.Parameter(torch.randn(3, 4))


def test_a_slice_is_a_linear_layer_without_parameters():
    owner = Stack()
    part = WeightSlice(owner, "stack", "offsets", index=1, rows=slice(1, 3), transposed=True)
    assert not list(part.parameters()) and not part.state_dict() and not list(part.children())
    x = torch.randn(2, 5)
    assert torch.equal(part(x), nn.functional.linear(x, owner.stack[1].T[1:3], owner.offsets[1, 1:3]))
    assert (part.out_features, part.in_features) == (2, 5)


def test_writing_a_slice_leaves_its_neighbours_and_restoring_brings_back_the_bits():
    owner, kind = Stack(), Slice()
    before = copy.deepcopy(owner.state_dict())
    parts = [WeightSlice(owner, "stack", "offsets", index=i, transposed=True) for i in (0, 2)]
    kept = []
    for n, part in enumerate(parts):
        kept.append(kind.keep(part, ["weight", "bias"]))
        kind.write(part, {"weight": torch.full((4, 5), float(n)), "bias": torch.full((4,), float(n))})
    assert torch.equal(owner.stack[1], before["stack"][1]) and torch.equal(owner.offsets[1], before["offsets"][1])
    assert (owner.stack[0] == 0).all() and (owner.stack[2] == 1).all() and (owner.offsets[2] == 1).all()
    for part, k in zip(parts, kept, strict=True):  # in the order of merging, not the reverse
        kind.restore(part, k)
    assert all(torch.equal(owner.state_dict()[n], v) for n, v in before.items())


def test_a_shared_parameter_is_copied_before_a_slice_of_it_is_written_and_shared_again_after():
    a, b, kind = Stack(), Stack(), Slice()
    b.stack = shared = a.stack
    before = shared.detach().clone()
    parts = [WeightSlice(a, "stack", index=i, transposed=True) for i in (0, 1)]
    kept = [kind.keep(p, ["weight"]) for p in parts]
    assert [kind.untie(p, ["weight"], {id(shared)}) for p in parts] == [True, False]
    for p in parts:
        kind.write(p, {"weight": torch.zeros(4, 5)})
    assert torch.equal(b.stack, before) and (a.stack[:2] == 0).all()
    for p, k in zip(parts, kept, strict=True):
        kind.restore(p, k)
    assert a.stack is shared and torch.equal(shared, before)


# -- whole models ---------------------------------------------------------------------------------------------------------
def gpt2():
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=40, n_positions=16)
    return GPT2LMHeadModel(config), {"input_ids": torch.arange(12).view(2, 6)}, "all-linear", 8


def vit():
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    )
    return ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 8, 8)}, ["q_proj", "projection"], 3


def clip():
    side = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    text = {**side, "vocab_size": 40, "max_position_embeddings": 8, "eos_token_id": 39, "bos_token_id": 38}
    config = CLIPConfig(text_config=text, vision_config={**side, "image_size": 8, "patch_size": 4}, projection_dim=8)
    inputs = {"pixel_values": torch.randn(2, 3, 8, 8), "input_ids": torch.tensor([[1, 2, 39, 39], [3, 4, 5, 39]])}
    return CLIPModel(config), inputs, ["token_embedding", "patch_embedding", "q_proj", "text_projection"], 5


def convnet():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, padding_mode="circular"),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=4, dilation=2, padding="same"),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2, stride=2),
        nn.Flatten(),
        nn.Linear(4 * 8 * 8, 3),
    )
    return net, {"input": torch.randn(4, 3, 8, 8)}, ["0", "3", "5"], 3


@pytest.mark.parametrize("make", [gpt2, vit, clip, convnet])
def test_whole_models(make, tmp_path):
    torch.manual_seed(0)
    base, inputs, targets, sites = make()
    base.eval()
    fields = {"target_modules": targets, "r": 2, "lora_alpha": 4}

    def run(model):
        out = model(**inputs)
        return out if torch.is_tensor(out) else out.logits if hasattr(out, "logits") else out.logits_per_image

    with torch.no_grad():
        plain = run(base)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**fields)).eval()
    assert len(model.roster.adapters["default"].methods) == sites
    with torch.no_grad():
        assert close(run(model), plain, 1e-6)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(5):  # away from what the model gives now
        optimizer.zero_grad()
        loss = -(run(model) - plain).square().mean() - 1e-3 * run(model).mean()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
    shake(model)
    with torch.no_grad():
        out = run(model)
        assert not close(out, plain, 1e-3)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        assert torch.equal(run(again), out)
        with model.disable_adapter():
            assert torch.equal(run(model), plain)
        assert close(run(model.merge_and_unload()), out)
