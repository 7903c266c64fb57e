"""Methods that act on a module's output (bottleneck adapters, PHM, Compacter, LoReFT), and the blocks they sit on."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from peft import (
    BottleneckConfig,
    CompacterConfig,
    LoraConfig,
    LoReftConfig,
    PeftModel,
    PhmConfig,
    Refusal,
    get_peft_model,
)
from peft.core.adapted.layer import Adapted, adapted_layers
from peft.core.anatomy.walk import kind_of
from peft.layers.opaque import Opaque
from tests.helpers.cells import clone, randomise

V, D = 40, 32
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17, 18], [19, 20, 21, 22, 23, 24, 25]])


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            hidden_size=D,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        )
    )


def bert():
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=V,
            hidden_size=D,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            hidden_dropout_prob=0,
            attention_probs_dropout_prob=0,
        )
    )


def t5():
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=V,
            d_model=D,
            d_ff=48,
            d_kv=16,
            num_layers=2,
            num_heads=4,
            dropout_rate=0,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=None,
        )
    )


def gpt2():
    off = {k: 0 for k in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=V, n_embd=D, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=None, pad_token_id=0, **off
        )
    )


def opt():
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=V,
            hidden_size=D,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=D,
            dropout=0,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        )
    )


def vit():
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=D, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
        )
    )


def mixtral():
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=V,
            hidden_size=D,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=2,
        )
    )


MODELS = {"llama": llama, "bert": bert, "t5": t5, "gpt2": gpt2, "opt": opt, "vit": vit}
DECODERS = ("llama", "gpt2", "opt")


def base(name):
    torch.manual_seed(0)
    return MODELS[name]().eval() if name in MODELS else globals()[name]().eval()


def inputs(name, rows=3):
    if name == "vit":
        torch.manual_seed(1)
        return {"pixel_values": torch.randn(rows, 3, 16, 16)}
    given = {"input_ids": IDS[:rows]}
    if name == "t5":
        given["decoder_input_ids"] = IDS[:rows, :4]
    return given


def adapted(name, config, names=("default",), noise=True):
    model = get_peft_model(base(name), config, adapter_name=names[0])
    for other in names[1:]:
        model.add_adapter(other, copy.deepcopy(config))
    for i, one in enumerate(names if noise else ()):
        randomise(model, one, 3 + i)
    return model.eval()


CONFIGS = {
    "pfeiffer": lambda **k: BottleneckConfig(bottleneck_size=4, **k),
    "houlsby": lambda **k: BottleneckConfig(variant="houlsby", bottleneck_size=4, non_linearity="gelu", **k),
    "parallel": lambda **k: BottleneckConfig(variant="parallel", bottleneck_size=4, scaling=4.0, **k),
    "phm": lambda **k: PhmConfig(bottleneck_size=4, **k),
    "compacter": lambda **k: CompacterConfig(bottleneck_size=4, **k),
    "loreft": lambda **k: LoReftConfig(r=2, **k),
}
WHOLE_FFN = ("llama", "t5", "gpt2", "vit")  # model types with one module for the FFN
CASES = [(m, c) for m in MODELS for c in CONFIGS if c != "parallel" or m in WHOLE_FFN]
on_models = pytest.mark.parametrize(("name", "which"), CASES)


def only(model):
    """The method at the single site of a small model."""
    (layer,) = adapted_layers(model)
    return layer.methods["default"][0]


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.site = layer

    def forward(self, x):
        return self.site(x)


def on_layer(layer, config):
    torch.manual_seed(0)
    model = get_peft_model(Net(layer).eval(), config).eval()
    randomise(model, "default", 1)
    return model, only(model)


# -- the formulas, written out again ---------------------------------------------------------------------------------------
def test_the_sequential_adapter_is_the_paper_s_formula():
    layer = nn.Linear(12, 16)
    config = BottleneckConfig(target_modules=["site"], bottleneck_size=3, non_linearity="tanh", scaling=0.5)
    model, m = on_layer(layer, config)
    x = torch.randn(2, 5, 12)
    h = layer(x)
    z = torch.tanh(h @ m.adapter_down.T + m.adapter_down_bias)
    expected = h + 0.5 * (z @ m.adapter_up.T + m.adapter_up_bias)
    assert torch.allclose(model(x), expected, atol=1e-6)


def test_the_parallel_adapter_reads_the_input():
    layer = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16))
    config = BottleneckConfig(target_modules=["site"], variant="parallel", bottleneck_size=3, scaling=4.0)
    model, m = on_layer(layer, config)
    x = torch.randn(2, 5, 12)
    z = torch.relu(x @ m.adapter_down.T + m.adapter_down_bias)
    expected = layer(x) + 4 * (z @ m.adapter_up.T + m.adapter_up_bias)
    assert torch.allclose(model(x), expected, atol=1e-5)


def test_learned_and_gated_scaling_and_the_layer_norm():
    layer, x = nn.Linear(16, 16), torch.randn(2, 16)
    for scaling in ("learned", "gated"):
        config = BottleneckConfig(target_modules=["site"], bottleneck_size=3, scaling=scaling, layer_norm=True)
        model, m = on_layer(layer, config)
        y = layer(x)
        h = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        h = h * m.adapter_norm + m.adapter_norm_bias
        z = torch.relu(h @ m.adapter_down.T + m.adapter_down_bias) @ m.adapter_up.T + m.adapter_up_bias
        if scaling == "learned":
            s = m.adapter_scaling
        else:
            s = 1 / (1 + torch.exp(-(h @ m.adapter_gate.T + m.adapter_gate_bias)))
        assert torch.allclose(model(x), y + s * z, atol=1e-5)


def test_phm_matrices_are_sums_of_kronecker_products():
    layer, x = nn.Linear(8, 16), torch.randn(2, 8)
    model, m = on_layer(layer, PhmConfig(target_modules=["site"], bottleneck_size=8, phm_dim=4))
    down = sum(torch.kron(m.adapter_down_A[i], m.adapter_down_B[i]) for i in range(4))
    up = sum(torch.kron(m.adapter_up_A[i], m.adapter_up_B[i]) for i in range(4))
    y = layer(x)
    z = F.gelu(y @ down.T + m.adapter_down_bias)
    assert down.shape == (8, 16)
    assert torch.allclose(model(x), y + z @ up.T + m.adapter_up_bias, atol=1e-5)


def test_compacter_shares_its_rule_and_has_the_paper_s_count():
    model = adapted("llama", CompacterConfig(bottleneck_size=8, phm_dim=4, phm_rank=2))
    methods = [m for _, m in model.roster.adapters["default"].methods]
    assert len(methods) == 4  # after attention and FFN of two layers
    assert len({id(m.adapter_phm_rule) for m in methods}) == 1
    n, b, k = 4, 8, 2
    each = k * (b + D) + k * (D + b) + b + D  # s and t of both matrices: n·k·(rows + columns)/n, and two biases
    assert model.get_nb_trainable_parameters()[0] == n**3 + 4 * each
    m = methods[0]
    down = sum(torch.kron(m.adapter_phm_rule[i], m.adapter_down_s[i] @ m.adapter_down_t[i]) for i in range(n))
    assert torch.allclose(m.matrices()[0], down, atol=1e-6)
    assert torch.linalg.matrix_rank(m.adapter_down_s[0] @ m.adapter_down_t[0]) == k
    plus = get_peft_model(base("llama"), CompacterConfig(variant="compacter++", bottleneck_size=8))
    assert {layer.path.rsplit(".", 1)[-1] for layer in adapted_layers(plus)} == {"mlp"}


@pytest.mark.parametrize("variant", ["loreft", "noreft", "direft"])
def test_the_edit_is_the_paper_s_formula_and_only_at_its_positions(variant):
    layer = nn.Linear(12, 16)
    config = LoReftConfig(target_modules=["site"], r=3, variant=variant, prefix_positions=2, suffix_positions=1)
    model, m = on_layer(layer, config)
    x = torch.randn(2, 6, 12)
    h = layer(x)
    R = m.rotation()[0]
    inner = h @ m.reft_W[0].T + m.reft_b[0] - (0 if variant == "direft" else h @ R.T)
    edited = h + inner @ R
    out = model(x)
    assert torch.allclose(out[:, [0, 1, 5]], edited[:, [0, 1, 5]], atol=1e-5)
    assert torch.equal(out[:, 2:5], h[:, 2:5])
    if variant == "loreft":
        assert torch.allclose(R @ R.T, torch.eye(3), atol=1e-6)


def test_untied_edits_differ_and_a_token_that_is_first_and_last_is_edited_once():
    layer = nn.Linear(12, 16)
    config = LoReftConfig(target_modules=["site"], r=2, tied_weights=False, prefix_positions=2, suffix_positions=2)
    model, m = on_layer(layer, config)
    x = torch.randn(2, 3, 12)
    h, R = layer(x), m.rotation()

    def edit(i):
        return h + (h @ m.reft_W[i].T + m.reft_b[i] - h @ R[i].T) @ R[i]

    out = model(x)
    assert torch.allclose(out[:, :2], edit(0)[:, :2], atol=1e-5)
    assert torch.allclose(out[:, 2], edit(1)[:, 2], atol=1e-5)
    assert not torch.allclose(edit(0)[:, 2], edit(1)[:, 2])


def test_rows_of_r_stay_orthonormal_in_training():
    config = LoReftConfig(target_modules=["site"], r=4, all_positions=True, init_weights="random")
    model = get_peft_model(Net(nn.Linear(12, 16)), config)
    m = only(model)
    start = m.rotation().detach().clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    x, target = torch.randn(8, 12), torch.randn(8, 16)
    losses = []
    for _ in range(40):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    R = m.rotation()[0]
    assert losses[-1] < 0.8 * losses[0]
    assert float((R @ R.T - torch.eye(4)).abs().max().detach()) < 1e-5
    assert float((R - start[0]).abs().max().detach()) > 0.05
    assert torch.equal(copy.deepcopy(m).rotation(), m.rotation())
    assert torch.equal(pickle.loads(pickle.dumps(m)).rotation(), m.rotation())


def test_the_random_start_is_the_paper_s_and_no_identity():
    layer, x = nn.Linear(12, 16), torch.randn(2, 4, 12)
    fresh = get_peft_model(Net(layer), LoReftConfig(target_modules=["site"], r=2, init_weights="random"))
    assert not torch.allclose(fresh(x), layer(x), atol=1e-3)


def test_an_edit_of_every_token_merges_into_an_embedding_and_a_layer_without_bias():
    for layer, x in ((nn.Linear(12, 16, bias=False), torch.randn(2, 12)), (nn.Embedding(9, 16), torch.arange(6))):
        model, _ = on_layer(layer, LoReftConfig(target_modules=["site"], r=2, all_positions=True))
        out = model(x)
        assert torch.allclose(model.merge_and_unload()(x), out, atol=1e-5)


# -- where they go ------------------------------------------------------------------------------------------------------
def paths(model):
    return {layer.path for layer in adapted_layers(model)}


def test_pfeiffer_is_after_the_ffn_only_and_houlsby_after_attention_too():
    pfeiffer, houlsby = (paths(adapted("bert", CONFIGS[v]())) for v in ("pfeiffer", "houlsby"))
    assert pfeiffer == {f"bert.encoder.layer.{i}.output.dense" for i in (0, 1)}
    assert houlsby == pfeiffer | {f"bert.encoder.layer.{i}.attention.output.dense" for i in (0, 1)}
    assert len(paths(adapted("t5", CONFIGS["houlsby"]()))) == 2 * 2 + 2 * 3  # cross-attention, too
    assert paths(adapted("opt", CONFIGS["pfeiffer"]())) == {f"model.decoder.layers.{i}.fc2" for i in (0, 1)}


def test_blocks_can_be_chosen_by_number():
    config = LoReftConfig(r=2, target_modules=["layers.0", "layers.1"], layers_to_transform=[1])
    assert paths(adapted("llama", config)) == {"model.layers.1"}


def test_parallel_needs_vectors_in_the_places_of_the_outputs():
    config = BottleneckConfig(target_modules=["site"], variant="parallel", bottleneck_size=2)
    for layer, why in ((nn.Embedding(9, 16), "indices"), (nn.Conv1d(4, 8, 3), "positions")):
        with pytest.raises(Refusal, match=why):
            get_peft_model(Net(layer), copy.deepcopy(config))
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(base("bert"), CONFIGS["parallel"]())


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: BottleneckConfig(variant="pfeifer"), "variant"),
        (lambda: BottleneckConfig(bottleneck_size=0), "bottleneck_size"),
        (lambda: BottleneckConfig(scaling="learnt"), "scaling"),
        (lambda: BottleneckConfig(non_linearity="step"), "non_linearity"),
        (lambda: BottleneckConfig(dropout=1.0), "dropout"),
        (lambda: PhmConfig(bottleneck_size=6, phm_dim=4), "bottleneck_size"),
        (lambda: CompacterConfig(phm_rank=0), "phm_rank"),
        (lambda: LoReftConfig(r=0), "r"),
        (lambda: LoReftConfig(variant="reft"), "variant"),
        (lambda: LoReftConfig(prefix_positions=0, suffix_positions=0), "prefix_positions"),
    ],
)
def test_bad_fields_are_named(make, field):
    with pytest.raises(ValueError, match=field):
        make()


def test_sizes_that_no_matrix_has_are_refused():
    with pytest.raises(Refusal, match="multiple of 4"):
        get_peft_model(Net(nn.Linear(8, 6)), PhmConfig(target_modules=["site"], bottleneck_size=4, phm_dim=4))
    with pytest.raises(Refusal, match="subspace"):
        get_peft_model(Net(nn.Linear(8, 6)), LoReftConfig(target_modules=["site"], r=7))
    with pytest.raises(Refusal, match="channels"):
        get_peft_model(Net(nn.Dropout()), BottleneckConfig(target_modules=["site"]))


# -- on models ------------------------------------------------------------------------------------------------------------
@on_models
def test_fresh_is_the_identity_and_reload_gives_the_same_logits(name, which, tmp_path):
    given = inputs(name)
    with torch.no_grad():
        expected = base(name)(**given).logits
        model = adapted(name, CONFIGS[which](), noise=False)
        assert float((model(**given).logits - expected).abs().max()) < 1e-5
        randomise(model, "default", 3)
        out = model(**given).logits
        assert float((out - expected).abs().max()) > 1e-3
        model.save_pretrained(tmp_path)
        assert torch.equal(PeftModel.from_pretrained(base(name), tmp_path).eval()(**given).logits, out)
        light = PeftModel.from_pretrained(base(name), tmp_path, low_cpu_mem_usage=True).eval()
        assert torch.equal(light(**given).logits, out)
        with model.disable_adapter():
            assert torch.equal(model(**given).logits, expected)
        assert torch.equal(model.unload()(**given).logits, expected)


@on_models
def test_rows_of_a_batch_use_their_own_adapters(name, which):
    model, given = adapted(name, CONFIGS[which](), names=("a", "b")), inputs(name)
    if name != "vit":
        given["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7, [1, 1, 1, 1, 1, 1, 0]])
    with torch.no_grad():
        each = {}
        for adapter in ("a", "b"):
            model.set_adapter(adapter)
            each[adapter] = model(**given).logits
        names = ["b", "a", "b"]
        mixed = model(**given, adapter_names=names).logits
    for i, adapter in enumerate(names):
        assert float((mixed[i] - each[adapter][i]).abs().max()) < 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("name", "which"), [(m, c) for m in MODELS for c in ("pfeiffer", "loreft")])
def test_checkpointing_gives_the_same_gradients(name, which, when, reentrant):
    def gradients(checkpointed):
        model = base(name)
        switch = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        if checkpointed and when == "before":
            model.gradient_checkpointing_enable(**switch)
        model = get_peft_model(model, CONFIGS[which]())
        randomise(model, "default", 3)
        if checkpointed and when == "after":
            model.gradient_checkpointing_enable(**switch)
            model.enable_input_require_grads()
        model.train()
        torch.manual_seed(0)
        model(**inputs(name)).logits.square().mean().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys() and plain
    for n in plain:
        assert plain[n] is not None and again[n] is not None, n
        assert torch.allclose(plain[n], again[n], atol=1e-7, rtol=1e-5), n


def test_checkpointing_inside_a_block_remembers_positions():
    """The edit sits inside the recomputed block: without the span its recompute would count padding as tokens."""

    def gradients(checkpointed):
        model = adapted("llama", LoReftConfig(r=2, target_modules=["mlp"], prefix_positions=1, suffix_positions=1))
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7, [1, 1, 1, 1, 1, 0, 0]])
        model(input_ids=IDS, attention_mask=mask).logits.square().mean().backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for a, b in zip(gradients(False), gradients(True), strict=True):
        assert torch.allclose(a, b, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_recorded_hidden_states_are_the_adapted_ones(name):
    """transformers records by hooks on modules of a class, which would see the block inside its wrapper."""
    given = inputs(name)
    key = "decoder_hidden_states" if name == "t5" else "hidden_states"
    with torch.no_grad():
        plain = base(name)
        before = plain(**given, output_hidden_states=True)[key]
        model = adapted(name, LoReftConfig(r=2, all_positions=True, seed=1))
        blocks = sorted(layer.path for layer in adapted_layers(model))
        states = model(**given, output_hidden_states=True)[key]
        assert len(states) == len(before) == 3
        again = model(**given, output_hidden_states=True)[key]
        assert all(torch.equal(a, b) for a, b in zip(states, again, strict=True))
        first = model.get_base_model().get_submodule([b for b in blocks if "encoder.block" not in b][0])
        seen = []
        handle = first.register_forward_hook(lambda m, a, o: seen.append(o[0] if isinstance(o, tuple) else o))
        model(**given)
        handle.remove()
        assert torch.equal(states[1], seen[0])
        assert not torch.allclose(states[1], before[1], atol=1e-3)
        back = model.unload()
        restored = back(**given, output_hidden_states=True)[key]
        assert len(restored) == 3 and all(torch.equal(a, b) for a, b in zip(restored, before, strict=True))
        # hooks that were there before the adapter came
        model = get_peft_model(plain, LoReftConfig(r=2, all_positions=True, seed=1)).eval()
        randomise(model, "default", 3)
        assert all(
            torch.equal(a, b) for a, b in zip(model(**given, output_hidden_states=True)[key], states, strict=True)
        )


@pytest.mark.parametrize("name", MODELS)
def test_recorded_attentions_keep_their_number(name):
    given, model = inputs(name), base(name)
    model.set_attn_implementation("eager")
    key = "decoder_attentions" if name == "t5" else "attentions"
    with torch.no_grad():
        before = model(**given, output_attentions=True)[key]
        for config in (CONFIGS["loreft"](), CONFIGS["houlsby"]()):
            wrapped = get_peft_model(copy.deepcopy(model), config).eval()
            after = wrapped(**given, output_attentions=True)[key]
            assert len(before) == len(after) == 2
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(before, after, strict=True))


def test_attention_modules_called_by_keyword_can_be_wrapped():
    config = BottleneckConfig(target_modules=["self_attn"], variant="parallel", bottleneck_size=4)
    model = adapted("llama", config)
    assert all(layer.kind.name == "opaque" for layer in adapted_layers(model))
    layer = next(adapted_layers(model))
    m = layer.methods["default"][0]
    seen = {}
    layer.base_layer.register_forward_hook(
        lambda mod, a, k, o: seen.update(x=k["hidden_states"], y=o[0]), with_kwargs=True
    )
    layer.register_forward_hook(lambda mod, a, o: seen.update(out=o[0]))
    model(input_ids=IDS)
    z = torch.relu(seen["x"] @ m.adapter_down.T + m.adapter_down_bias) @ m.adapter_up.T + m.adapter_up_bias
    assert torch.allclose(seen["out"], seen["y"] + z, atol=1e-5)


def test_a_wrapped_block_still_has_its_attributes():
    model = adapted("llama", CONFIGS["loreft"]()).get_base_model()
    block = model.model.layers[0]
    assert isinstance(block, Adapted) and block.self_attn.layer_idx == 0
    assert block.hidden_size == D and block.mlp.gate_proj.in_features == D
    t5_block = adapted("t5", CONFIGS["loreft"]()).get_base_model().encoder.block[0]
    assert t5_block.layer[0].SelfAttention.has_relative_attention_bias


# -- generation and positions -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("which", ["pfeiffer", "parallel", "loreft"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generation_with_and_without_a_cache(name, which):
    config = CONFIGS[which]() if which != "loreft" else LoReftConfig(r=2, prefix_positions=9, suffix_positions=0)
    model = adapted(name, config)  # 9 first positions: some of them are generated
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7, [1] * 7])
    runs = [model.generate(input_ids=IDS, attention_mask=mask, use_cache=c, **settings) for c in (True, False)]
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    for a, b in zip(runs[0].logits, runs[1].logits, strict=True):
        assert float((a - b).abs().max()) < 1e-4


@pytest.mark.parametrize("name", DECODERS)
def test_padding_on_either_side_does_not_move_the_positions(name):
    model = adapted(name, LoReftConfig(r=2, prefix_positions=2, suffix_positions=2))
    pads = torch.zeros(3, 4, dtype=torch.long)
    with torch.no_grad():
        alone = model(input_ids=IDS).logits
        ones = torch.ones_like(IDS)
        left = model(
            input_ids=torch.cat([pads, IDS], 1),
            attention_mask=torch.cat([pads, ones], 1),
            position_ids=torch.cat([pads, torch.arange(7).expand(3, -1)], 1),
        ).logits[:, 4:]
        right = model(input_ids=torch.cat([IDS, pads], 1), attention_mask=torch.cat([ones, pads], 1)).logits[:, :7]
    assert float((left - alone).abs().max()) < 1e-4
    assert float((right - alone).abs().max()) < 1e-4


def test_decoding_steps_are_not_edited_at_the_end():
    """With suffix positions a cached decode equals a forward whose edits are at the prompt's end, by hand."""
    model = adapted("llama", LoReftConfig(r=2, prefix_positions=1, suffix_positions=2))
    prompt, more = IDS[:, :5], IDS[:, 5:]
    with torch.no_grad():
        cache = model(input_ids=prompt, use_cache=True).past_key_values
        steps = []
        for t in range(2):
            out = model(input_ids=more[:, t : t + 1], past_key_values=cache, use_cache=True)
            steps.append(out.logits)
        # labels say where the prompt ends, so a forward over everything edits the same tokens
        causal = adapted("llama", LoReftConfig(r=2, prefix_positions=1, suffix_positions=2, task_type="CAUSAL_LM"))
        labels = IDS.clone()
        labels[:, :5] = -100
        whole = causal(input_ids=IDS, labels=labels).logits
        assert float((torch.cat(steps, 1) - whole[:, 5:]).abs().max()) < 1e-4
        assert float((causal(input_ids=IDS).logits - whole)[:, 3:].abs().max()) > 1e-3  # else the ends are elsewhere


def test_a_continued_prompt_with_suffix_positions_is_refused():
    model = adapted("llama", CONFIGS["loreft"]())
    cache = model(input_ids=IDS[:, :4], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="suffix_positions"):
        model(input_ids=IDS[:, 4:], past_key_values=cache)
    assert model.roster.mix.span is None  # nothing is left behind by the failed call
    prefix = adapted("llama", LoReftConfig(r=2, prefix_positions=6, suffix_positions=0))
    with torch.no_grad():
        whole = prefix(input_ids=IDS).logits
        cache = prefix(input_ids=IDS[:, :4], use_cache=True).past_key_values
        rest = prefix(input_ids=IDS[:, 4:], past_key_values=cache).logits
    assert float((rest - whole[:, 4:]).abs().max()) < 1e-4


def test_flattened_tokens_keep_their_positions():
    """OPT gives its fc2 all tokens of the batch in one axis."""
    model = adapted("opt", LoReftConfig(r=2, target_modules=["fc2"], prefix_positions=1, suffix_positions=0))
    layer = next(adapted_layers(model))
    seen = {}
    layer.base_layer.register_forward_hook(lambda m, a, o: seen.update(y=o))
    layer.register_forward_hook(lambda m, a, o: seen.update(out=o))
    model(input_ids=IDS)
    changed = (seen["out"] != seen["y"]).any(-1).reshape(3, 7)
    assert changed[:, 0].all() and not changed[:, 1:].any()


@pytest.mark.parametrize("which", ["pfeiffer", "loreft"])
def test_models_compile_in_one_graph(which):
    model = adapted("llama", CONFIGS[which]())
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7, [1] * 7])
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(input_ids=IDS, attention_mask=mask, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        out = compiled(input_ids=IDS, attention_mask=mask, use_cache=False).logits
    assert float((out - expected).abs().max()) < 1e-5


def test_copies_have_their_own_positions():
    model = adapted("llama", CONFIGS["loreft"]())
    twin = clone(model)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7, [1] * 7])
    with torch.no_grad():
        out = model(input_ids=IDS, attention_mask=mask).logits
        assert torch.equal(twin(input_ids=IDS, attention_mask=mask).logits, out)
        model.unload()
        assert not any(m._forward_pre_hooks for m in model.modules())
        assert torch.equal(twin(input_ids=IDS, attention_mask=mask).logits, out)


def test_different_methods_act_together_in_activation_order():
    layer = nn.Linear(12, 16)
    model = get_peft_model(Net(layer).eval(), BottleneckConfig(target_modules=["site"], bottleneck_size=3))
    model.add_adapter("edit", LoReftConfig(target_modules=["site"], r=2, all_positions=True))
    model.add_adapter("low", LoraConfig(target_modules=["site"], r=2))
    for i, name in enumerate(("default", "edit", "low")):
        randomise(model, name, i)
    model.eval()
    (site,) = adapted_layers(model)
    first, second, low = (site.methods[n][0] for n in ("default", "edit", "low"))
    x = torch.randn(2, 3, 12)
    y = layer(x) + x @ low.dense().T
    for names, (f, g) in ((["default", "edit", "low"], (first, second)), (["edit", "default", "low"], (second, first))):
        model.base_model.set_adapter(names)
        assert torch.allclose(model(x), g.after(f.after(y, x), x), atol=1e-5)


# -- the opaque kind ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [*MODELS, "mixtral"])
def test_widths_of_blocks_are_what_they_give(name):
    """Every block with parameters, by running the model and looking at what goes in and out."""
    model, seen = base(name), {}

    def look(path):
        def hook(module, args, kwargs, out):
            x = args[0] if args else next(iter(kwargs.values()))
            y = out[0] if isinstance(out, (tuple, list)) else out
            seen[path] = (module, x, y)

        return hook

    for path, module in model.named_modules():
        if path:
            module.register_forward_hook(look(path), with_kwargs=True)
    model(**inputs(name))
    checked = 0
    for path, (module, x, y) in seen.items():
        kind = kind_of(module)
        if not isinstance(kind, Opaque) or not torch.is_tensor(y) or not list(module.parameters()):
            continue
        g = kind.geometry(module)
        assert g.out == y.shape[-1], (path, type(module).__name__)
        if torch.is_tensor(x) and x.is_floating_point() and g.kernel == 1 and not g.indexed:
            assert g.inputs == x.shape[-1], (path, type(module).__name__)
        checked += 1
    assert checked > 5


def test_maps_have_their_channels_second():
    stage = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6))
    model, m = on_layer(stage, BottleneckConfig(target_modules=["site"], bottleneck_size=2))
    x = torch.randn(2, 3, 6, 6)  # as wide as it has channels: the wrong axis would not show in the shape
    y = stage(x).permute(0, 2, 3, 1)
    z = torch.relu(y @ m.adapter_down.T + m.adapter_down_bias) @ m.adapter_up.T + m.adapter_up_bias
    assert torch.allclose(model(x), (y + z).permute(0, 3, 1, 2), atol=1e-5)


def test_recurrent_layers_give_tuples():
    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.GRU(8, 6, batch_first=True, bidirectional=True), nn.Linear(12, 2)

        def forward(self, x):
            return self.head(self.rnn(x)[0])

    model = get_peft_model(Sequence(), BottleneckConfig(target_modules=["rnn"], bottleneck_size=2))
    randomise(model, "default", 1)
    x = torch.randn(2, 5, 8)
    m = only(model)
    h = model.get_base_model().rnn.base_layer(x)[0]
    z = torch.relu(h @ m.adapter_down.T + m.adapter_down_bias) @ m.adapter_up.T + m.adapter_up_bias
    assert torch.allclose(model(x), model.get_base_model().head(h + z), atol=1e-5)
