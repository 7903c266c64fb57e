"""Upstream's attributes on adapted layers: reading, calling and assigning them acts on what the next forward computes.

Every assignment is checked against the layer's formula with explicit matrices, or raises an error that names it.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from peft.tuners.lora import Linear, LoraLayer
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import peft
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from peft.core.adapted import views

IDS = torch.arange(12).reshape(2, 6)
SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
X = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, num_hidden_layers=1)).eval()


def lora(**more) -> LoraConfig:
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": False}
    return LoraConfig(**{**config, **more})


def adapted(config=None) -> tuple[nn.Module, nn.Module]:
    """(model, its adapted q_proj)."""
    model = get_peft_model(llama(), config or lora()).eval()
    return model, model.base_model.model.model.layers[0].self_attn.q_proj


def expected(layer: nn.Module, A: torch.Tensor, B: torch.Tensor, s: float, b: torch.Tensor | float = 0.0):
    return F.linear(X, layer.base_layer.weight + s * B @ A) + s * b


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).abs().max() <= tolerance)


# -- reading ------------------------------------------------------------------------------------------------------------------
def test_tensors_and_settings_by_adapter():
    model, layer = adapted(lora(lora_dropout=0.1))
    embed = model.base_model.model.model.embed_tokens
    assert layer.lora_A["default"].weight.shape == layer.lora_A.default.weight.shape == (4, 16)
    assert layer.lora_A["default"].in_features == layer.lora_B["default"].out_features == 16
    assert layer.lora_A["default"].bias is None and list(layer.lora_A.keys()) == ["default"]
    assert (dict(layer.scaling), dict(layer.r), dict(layer.lora_alpha)) == (
        {"default": 2.0},
        {"default": 4},
        {"default": 8},
    )
    assert dict(layer.use_dora) == dict(layer.use_rslora) == dict(layer.lora_bias) == {"default": False}
    assert layer.lora_dropout["default"].p == 0.1 and len(layer.lora_magnitude_vector) == 0
    assert list(layer.lora_embedding_A) == [] and list(embed.lora_A) == []
    assert embed.lora_embedding_A["default"].shape == (4, 64) and embed.lora_embedding_B["default"].shape == (16, 4)
    assert "lora_A" in layer.adapter_layer_names and "scaling" in layer.other_param_names
    assert layer.get_base_layer() is layer.base_layer and layer.bias is None
    with model.disable_adapter():  # with it, what the layer computes with: tests/core/acting/test_raw_reads.py
        assert layer.weight is layer.base_layer.weight
    assert (layer.in_features, layer.merged, layer.merged_adapters) == (16, False, [])
    assert (layer.active_adapters, layer.active_adapter, layer.disable_adapters) == (["default"], ["default"], False)
    assert torch.equal(layer.get_base_weight(), layer.base_layer.weight)
    with pytest.raises(AttributeError, match="ia3_l"):
        layer.ia3_l  # noqa: B018
    with pytest.raises(KeyError):
        layer.lora_A["other"]


def test_the_factors_can_be_called_as_people_do_in_their_own_forwards():
    _, layer = adapted()
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    with torch.no_grad():
        by_hand = layer.base_layer(X) + B(A(layer.lora_dropout["default"](X))) * layer.scaling["default"]
        assert close(by_hand, layer(X)) and not close(by_hand, layer.base_layer(X))


@pytest.mark.parametrize("dora", [False, True])
def test_the_delta_of_a_layer_is_the_explicit_product(dora):
    model, layer = adapted(lora(use_dora=dora))
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert close(layer.get_delta_weight("default"), 2 * B @ A, 1e-7)
    embed = model.base_model.model.model.embed_tokens
    C, D = embed.lora_embedding_A["default"], embed.lora_embedding_B["default"]
    assert close(embed.get_delta_weight("default"), 2 * (D @ C).T, 1e-7)


def test_the_delta_of_gpt2s_transposed_layer_lies_as_its_weight():
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_head=2, n_layer=1))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights=False))
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert isinstance(layer, Linear) and layer.get_delta_weight("default").shape == layer.weight.shape == (16, 48)
    assert close(layer.get_delta_weight("default"), 2 * (B @ A).T, 1e-7)


def test_a_rotation_has_no_delta():
    _, layer = adapted(OFTConfig(target_modules=["q_proj"], oft_block_size=4))
    with pytest.raises(peft.Refusal, match="no sum"):
        layer.get_delta_weight("default")


def test_doras_magnitude_has_a_weight():
    _, layer = adapted(lora(use_dora=True))
    m, A, B = (
        layer.lora_magnitude_vector["default"].weight,
        layer.lora_A["default"].weight,
        layer.lora_B["default"].weight,
    )
    V = layer.base_layer.weight + 2 * B @ A
    assert m.shape == (16,) and dict(layer.use_dora) == {"default": True}
    with torch.no_grad():
        m.mul_(1.5)
        assert close(layer(X), F.linear(X, (m / V.norm(dim=1))[:, None] * V))
        layer.lora_magnitude_vector["default"].weight = nn.Parameter(torch.ones(16))
        assert close(layer(X), F.linear(X, V / V.norm(dim=1)[:, None]))


def test_iterating_modules_and_filtering_parameters():
    model, layer = adapted()
    found = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert list(found) == ["base_model.model.model.embed_tokens", "base_model.model.model.layers.0.self_attn.q_proj"]
    assert isinstance(layer, Linear) and not isinstance(found["base_model.model.model.embed_tokens"], Linear)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if "lora_" in n} and len(trained) == 4
    assert model.base_model.model is model.get_base_model() and model.base_model.targeted_module_names == [
        n.removeprefix("base_model.model.") for n in found
    ]


# -- assigning ----------------------------------------------------------------------------------------------------------------
def set_data(layer, A, B):
    layer.lora_A["default"].weight.data.copy_(A)
    layer.lora_B["default"].weight.data = B.clone()


def set_parameter(layer, A, B):
    layer.lora_A["default"].weight = nn.Parameter(A)
    layer.lora_B.default.weight = nn.Parameter(B)


def set_module(layer, A, B):
    for view, value in ((layer.lora_A, A), (layer.lora_B, B)):
        view["default"] = nn.Linear(value.shape[1], value.shape[0], bias=False)
        with torch.no_grad():
            view["default"].weight.copy_(value)


def set_dictionary(layer, A, B):
    for name, value in (("lora_A", A), ("lora_B", B)):
        linear = nn.Linear(value.shape[1], value.shape[0], bias=False)
        linear.weight = nn.Parameter(value)
        setattr(layer, name, nn.ModuleDict({"default": linear}))


def set_by_init(layer, A, B):
    nn.init.ones_(layer.lora_A.default.weight)
    nn.init.constant_(layer.lora_B.default.weight, 0.5)
    A.fill_(1), B.fill_(0.5)


@pytest.mark.parametrize("assign", [set_data, set_parameter, set_module, set_dictionary, set_by_init])
@torch.no_grad()
def test_assigned_factors_act(assign):
    _, layer = adapted()
    A, B = torch.randn(4, 16), torch.randn(16, 4)
    before = layer(X)
    assign(layer, A, B)
    assert close(layer(X), expected(layer, A, B, 2.0)) and not close(layer(X), before, 1e-2)
    layer.merge()
    assert close(layer.weight, layer.get_base_weight(), 0) and close(F.linear(X, layer.weight), layer(X))
    layer.unmerge()
    assert close(layer(X), expected(layer, A, B, 2.0))


def test_an_assigned_parameter_stays_the_object_that_an_optimiser_knows():
    model, layer = adapted()
    mine = nn.Linear(16, 4, bias=False)
    layer.lora_A["default"] = mine
    optimizer = torch.optim.SGD(mine.parameters(), lr=1.0)
    before = mine.weight.detach().clone()
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert layer.lora_A["default"].weight is mine.weight and not torch.equal(before, mine.weight)
    assert any(p is mine.weight for p in model.parameters())


@torch.no_grad()
def test_an_embeddings_factors_and_single_vectors_are_plain_parameters():
    model, _ = adapted()
    embed = model.base_model.model.model.embed_tokens
    A, B = torch.randn(4, 64), torch.randn(16, 4)
    embed.lora_embedding_A["default"] = nn.Parameter(A)
    embed.lora_embedding_B["default"].copy_(B)
    assert close(embed(IDS), F.embedding(IDS, embed.base_layer.weight + 2 * (B @ A).T))
    _, layer = adapted(IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    layer.ia3_l["default"] = nn.Parameter(torch.full_like(layer.ia3_l["default"], 3.0))
    assert close(layer(X), 3 * layer.base_layer(X))


@torch.no_grad()
def test_bias_of_the_second_factor():
    _, layer = adapted(lora(lora_bias=True))
    A, B, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight, torch.randn(16)
    layer.lora_B["default"].bias = nn.Parameter(b)
    assert close(layer(X), expected(layer, A, B, 2.0, b))
    with pytest.raises(ValueError, match="bias"):
        layer.lora_B["default"] = nn.Linear(4, 16, bias=False)


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"use_rslora": True}])
@torch.no_grad()
def test_an_assigned_scaling_acts_and_is_read_back(config):
    _, layer = adapted(lora(target_modules=["q_proj"], **config))
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    own = layer.scaling["default"]
    for s in (0.5, 0.0, 3.0):
        layer.scaling["default"] = s
        assert layer.scaling["default"] == pytest.approx(s)
        V = layer.base_layer.weight + s * B @ A
        if config.get("use_dora"):
            V = (layer.lora_magnitude_vector["default"].weight / V.norm(dim=1))[:, None] * V
        assert close(layer(X), F.linear(X, V))
    layer.set_scale("default", 1.0)
    assert layer.scaling["default"] == own
    layer.scale_layer(2.0)
    assert layer.scaling["default"] == pytest.approx(2 * own)
    layer.unscale_layer()
    assert layer.scaling["default"] == own


@torch.no_grad()
def test_strengths_of_other_methods_can_be_assigned():
    for config in (LoHaConfig(target_modules=["q_proj"], r=4, init_weights=False), LoKrConfig(target_modules=["q_proj"], r=2, init_weights=False)):  # fmt: skip
        _, layer = adapted(config)
        delta = layer.get_delta_weight("default") / layer.scaling["default"]
        layer.scaling["default"] = 0.25
        assert close(layer(X), F.linear(X, layer.base_layer.weight + 0.25 * delta))


def test_an_assigned_dropout_acts():
    _, layer = adapted(lora(target_modules=["q_proj"]))
    with torch.no_grad():
        out = layer(X)
        layer.train()
        assert torch.equal(layer(X), out)
        layer.lora_dropout["default"] = nn.Dropout(0.5)
        dropped = layer(X)
        assert not close(dropped, out, 1e-3) and layer.lora_dropout["default"].p == 0.5
        layer.lora_dropout["default"].p = 0.999
        assert close(layer(X), layer.base_layer(X), 1e-6)
        layer.lora_dropout["default"] = nn.Identity()
        assert torch.equal(layer(X), out)


def test_dropout_of_a_wrapped_delta_follows():
    _, layer = adapted(lora(target_modules=["q_proj"], use_dora=True))
    layer.train()
    with torch.no_grad():
        out = layer(X)
        layer.lora_dropout["default"] = nn.Dropout(0.5)
        assert not close(layer(X), out, 1e-3)


@pytest.mark.parametrize(
    ("what", "error"),
    [
        (lambda q: q.r.__setitem__("default", 8), AttributeError),
        (lambda q: q.use_rslora.__setitem__("default", True), AttributeError),
        (lambda q: q.use_dora.__setitem__("default", True), AttributeError),
        (lambda q: q.scaling.__setitem__("other", 1.0), KeyError),
        (lambda q: q.lora_A.__setitem__("other", nn.Linear(16, 4, bias=False)), KeyError),
        (lambda q: q.lora_A.__setitem__("default", nn.Linear(16, 8, bias=False)), ValueError),
        (lambda q: q.lora_A.__setitem__("default", nn.Linear(16, 4)), ValueError),
        (lambda q: q.lora_A.__setitem__("default", torch.zeros(4, 16)), TypeError),
        (lambda q: setattr(q.lora_A["default"], "weight", torch.zeros(8, 16)), ValueError),
        (lambda q: setattr(q.lora_A["default"], "bias", torch.zeros(4)), AttributeError),
        (lambda q: setattr(q.lora_A["default"], "forward", lambda x: x), AttributeError),
        (lambda q: setattr(q, "lora_A", nn.Linear(16, 4)), AttributeError),
        (lambda q: setattr(q, "scaling", 0.5), AttributeError),
        (lambda q: setattr(q, "r", {"default": 8}), AttributeError),
        (lambda q: q.update_layer("default", 8, 8), peft.Refusal),
        (lambda q: q.lora_A.pop("default"), AttributeError),
    ],
)
def test_what_cannot_take_effect_raises_and_changes_nothing(what, error):
    _, layer = adapted()
    with torch.no_grad():
        out = layer(X)
        with pytest.raises(error):
            what(layer)
        assert torch.equal(layer(X), out)


def test_views_are_for_isinstance():
    with pytest.raises(TypeError, match="get_peft_model"):
        LoraLayer(nn.Linear(4, 4))
    with pytest.raises(AttributeError, match="view"):
        LoraLayer.forward = lambda self, x: x
    assert LoraLayer.merge is type(adapted()[1]).merge and "lora_embedding_A" in LoraLayer.adapter_layer_names


@torch.no_grad()
def test_a_base_weight_assigned_through_the_layer_is_the_base_layers():
    model, layer = adapted(lora(target_modules=["q_proj", "lm_head"]))
    A, B, W = layer.lora_A["default"].weight, layer.lora_B["default"].weight, torch.randn(16, 16)
    layer.weight = nn.Parameter(W)
    assert layer.base_layer.weight.data_ptr() == W.data_ptr() and close(layer(X), F.linear(X, W + 2 * B @ A))
    layer.set_base_weight(2 * W)
    assert close(layer(X), F.linear(X, 2 * W + 2 * B @ A), 1e-4)
    base = model.get_base_model()
    base.config.tie_word_embeddings = True
    base.lm_head.weight = base.model.embed_tokens.weight  # how transformers ties
    assert base.lm_head.base_layer.weight is base.model.embed_tokens.weight
    layer.merge()
    with pytest.raises(ValueError, match="merged"):
        layer.weight = nn.Parameter(W)


def test_heads_trained_whole_by_their_view():
    model, _ = adapted(lora(modules_to_save=["lm_head"]))
    head = model.base_model.model.lm_head
    assert head.original_module is head.base_layer and head.modules_to_save["default"].weight.shape == (64, 16)
    with torch.no_grad():
        head.modules_to_save.default.weight.fill_(0.5)
        assert close(head(X), 0.5 * X.sum(-1, keepdim=True).expand(5, 64))
        head.modules_to_save["default"] = fresh = nn.Linear(16, 64, bias=False)
        assert torch.equal(head(X), fresh(X))
        with pytest.raises(AttributeError):
            head.modules_to_save["default"] = nn.Identity()


def test_switching_through_attributes():
    model, layer = adapted()
    model.add_adapter("b", lora(lora_alpha=80))
    with torch.no_grad():
        a = layer(X)
        layer._active_adapter = "b"
        b = layer(X)
        assert not close(a, b, 1e-3) and model.active_adapters == ["b"]
        layer._disable_adapters = True
        assert torch.equal(layer(X), layer.base_layer(X)) and layer.disable_adapters
        layer._disable_adapters = False
        layer.set_adapter("default")
        assert torch.equal(layer(X), a)
        layer.set_adapter(["default", "b"])
        assert close(layer(X), a + b - layer.base_layer(X)) and layer.active_adapter == ["default", "b"]


def test_prompts_by_their_view():
    model = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    table = model.prompt_encoder["default"].embedding.weight
    assert table.shape == (3, 16) and isinstance(model.prompt_encoder["default"], peft.PromptEmbedding)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        model.prompt_encoder["default"].embedding.weight.data.mul_(-3)
        words = model.get_base_model().model.embed_tokens(IDS)
        embeds = torch.cat([table.expand(2, 3, 16), words], 1)
        assert close(model(input_ids=IDS).logits, llama()(inputs_embeds=embeds).logits)
        assert not close(model(input_ids=IDS).logits, before, 1e-3)


def test_inference_mode_in_the_config_is_free_to_set():
    model, _ = adapted()
    model.peft_config["default"].inference_mode = True
    assert model.peft_config["default"].inference_mode and model.active_peft_config.inference_mode


# -- copies and casts -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_views_of_a_copy_are_the_copys(how):
    model, layer = adapted()
    twin = how(model)
    other = twin.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        out = layer(X)
        assert torch.equal(other(X), out)
        other.lora_B["default"].weight.zero_()
        assert torch.equal(layer(X), out) and torch.equal(other(X), other.base_layer(X))


def test_casts_reach_the_views():
    model, layer = adapted()
    model.to(torch.float64)
    assert layer.lora_A["default"].weight.dtype == torch.float64 == layer(X.double()).dtype
    layer.lora_A.to(torch.float32)
    assert layer.lora_A["default"].weight.dtype == torch.float32
    assert [n for n, _ in layer.lora_A.named_parameters()] == ["default.weight"]
    layer.lora_B["default"].requires_grad_(False)
    assert {n.rpartition(".")[2] for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A_weight"}


# -- state dicts ------------------------------------------------------------------------------------------------------------------
SAVE = """
import sys, torch
sys.path[:0] = [sys.argv[1], sys.argv[2]]
import peft
assert peft.__version__ == "0.21.2", peft.__version__
import test_views_configs as shared
for name, config in shared.configs().items():
    torch.manual_seed(5)
    model = peft.get_peft_model(shared.llama(), config).eval()
    for n, p in sorted(model.named_parameters()):
        if p.requires_grad:
            p.data += 0.3 * torch.randn(p.shape)
    with torch.no_grad():
        torch.save((model.state_dict(), model(input_ids=shared.IDS).logits), f"{sys.argv[3]}/{name}.pt")
"""
SHARED = """
import torch
from peft import *
from transformers import LlamaConfig, LlamaForCausalLM
IDS = torch.arange(12).reshape(2, 6)
def llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, num_hidden_layers=1)).eval()
def configs():
    q = {"target_modules": ["q_proj"]}
    both = {"target_modules": ["q_proj", "embed_tokens"], "r": 4, "lora_alpha": 8}
    prompt = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    return {
        "lora": LoraConfig(**both), "lora_bias": LoraConfig(**q, lora_bias=True), "dora": LoraConfig(**both, use_dora=True),
        "heads": LoraConfig(**q, modules_to_save=["lm_head"]), "tokens": LoraConfig(**q, trainable_token_indices=[1, 2]),
        "ia3": IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "loha": LoHaConfig(**q, r=4), "lokr": LoKrConfig(**q, r=2), "hra": HRAConfig(**q, r=4),
        "oft": OFTConfig(**q, oft_block_size=4), "ln": LNTuningConfig(target_modules=["input_layernorm"]),
        "only_tokens": TrainableTokensConfig(token_indices=[1, 2]),
        "prompt": PromptTuningConfig(**prompt), "prefix": PrefixTuningConfig(**prompt),
    }
"""


@pytest.fixture(scope="module")
def upstreams(upstream_folder, tmp_path_factory):
    """Upstream's in-memory state dicts and logits, made in a process of its own."""
    folder = tmp_path_factory.mktemp("upstream")
    (folder / "test_views_configs.py").write_text(SHARED)
    env = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SAVE, str(upstream_folder), str(folder), str(folder)]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


NAMES = "lora lora_bias dora heads tokens ia3 loha lokr hra oft ln only_tokens prompt prefix".split()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_state_dicts_of_upstreams_models_load_by_name(name, upstreams):
    """Every name lands (strict), and the logits are upstream's; our own names differ, as one tensor, one name."""
    shared: dict = {}
    exec(SHARED, shared)  # the same models and configs as in the other process
    state, logits = torch.load(upstreams / f"{name}.pt")
    model = peft.get_peft_model(shared["llama"](), shared["configs"]()[name]).eval()
    with torch.no_grad():
        assert not close(model(input_ids=IDS).logits, logits, 1e-4)
        model.load_state_dict(state)
        assert close(model(input_ids=IDS).logits, logits)
        twin = peft.get_peft_model(shared["llama"](), shared["configs"]()[name]).eval()
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_every_method_shows_its_tensors_under_upstreams_names():
    q = {"target_modules": ["q_proj"]}
    shown = {
        "vera_lambda_b": (VeraConfig(**q, r=4), (16,)),
        "boft_R": (BOFTConfig(**q, boft_block_size=4), (1, 4, 4, 4)),
        "hra_u": (HRAConfig(**q, r=4), (16, 4)),
        "lora_E": (AdaLoraConfig(**q, total_step=9, init_r=4), (4, 1)),
        "hada_w1_a": (LoHaConfig(**q, r=4), (16, 4)),
    }
    for name, (config, shape) in shown.items():
        _, layer = adapted(config)
        assert getattr(layer, name)["default"].shape == shape and name in layer.adapter_layer_names
    _, layer = adapted(OFTConfig(**q, oft_block_size=4))
    assert layer.oft_R["default"].weight.shape == (4, 6) and layer.oft_block_size["default"] == 4
    model = get_peft_model(llama(), LNTuningConfig(target_modules=["input_layernorm"]))
    norm = model.get_base_model().model.layers[0].input_layernorm
    assert norm.ln_tuning_layers["default"].weight.shape == (16,)
    model = get_peft_model(llama(), TrainableTokensConfig(token_indices=[1, 2]))
    assert model.get_base_model().model.embed_tokens.trainable_tokens_delta["default"].shape == (2, 16)
    model = get_peft_model(llama(), lora(target_modules=["q_proj"], trainable_token_indices=[1]))
    embed = model.get_base_model().model.embed_tokens
    assert embed.token_adapter.trainable_tokens_delta["default"].shape == (1, 16)
    assert get_peft_model(llama(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).prompt_encoder[
        "default"
    ].embedding.weight.shape == (3, 32)


def test_a_view_is_of_names_that_the_layers_methods_show():
    _, layer = adapted(lora())
    (m,) = layer.methods["default"]
    shown = views.view(layer, "lora_A")
    assert isinstance(shown, views.AdapterView) and list(shown) == ["default"]
    assert views.view(layer, "weight") is None and views.view(layer, "oft_R") is None
    assert torch.allclose(
        views.delta_weight(layer, "default"), m.strength * m.lora_B_weight @ m.lora_A_weight, atol=1e-6
    )
    with pytest.raises(KeyError):
        views.delta_weight(layer, "another")
    with pytest.raises(AttributeError, match=r"lora_A\[adapter\]"):
        views.assign(layer, "lora_A", {"another": m.lora_A_weight})
