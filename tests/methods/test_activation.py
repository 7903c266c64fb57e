"""Bottlenecks, Compacter, PHM and LoReFT on whole models: rows, checkpointing, recorded states, generation, compiling."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

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
from tests.helpers.activation import CONFIGS, IDS, MODELS, D, Net, adapted, base, inputs
from tests.helpers.cells import clone, randomise
from tests.helpers.versions import compiles_models

WHOLE_FFN = ("llama", "t5", "gpt2", "vit")  # model types with one module for the FFN

CASES = [(m, c) for m in MODELS for c in CONFIGS if c != "parallel" or m in WHOLE_FFN]

on_models = pytest.mark.parametrize(("name", "which"), CASES)


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
    z = (
        torch.relu(seen["x"] @ m.adapter_down_weight.T + m.adapter_down_bias) @ m.adapter_up_weight.T
        + m.adapter_up_bias
    )
    assert torch.allclose(seen["out"], seen["y"] + z, atol=1e-5)


def test_a_wrapped_block_still_has_its_attributes():
    model = adapted("llama", CONFIGS["loreft"]()).get_base_model()
    block = model.model.layers[0]
    assert isinstance(block, Adapted) and block.self_attn.layer_idx == 0
    assert block.hidden_size == D and block.mlp.gate_proj.in_features == D
    t5_block = adapted("t5", CONFIGS["loreft"]()).get_base_model().encoder.block[0]
    assert t5_block.layer[0].SelfAttention.has_relative_attention_bias


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


@compiles_models
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
