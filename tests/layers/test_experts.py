"""Experts and other bare parameters: upstream's files give upstream's logits, and no delta of a stack ever exists.

tests/golden/experts: adapters saved by huggingface/peft 0.21.2 (LoRA r=2, alpha=4 on experts.gate_up_proj and
experts.down_proj) on the models of `base`, with the logits it computed for `IDS`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft import LoraConfig, PeftModel, Refusal, get_peft_model
from peft.core.adapted.layer import adapted_layers

transformers = pytest.importorskip("transformers")
GOLDEN = Path(__file__).parent / "golden" / "experts"
IDS = torch.arange(24).reshape(2, 12) * 5 % 64
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "intermediate_size": 24,
}
MODELS = {
    "mixtral": ("Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("GptOss", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "llama4": (
        "Llama4",
        {
            "intermediate_size_mlp": 24,
            "num_local_experts": 3,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
        },
    ),
}


def base(name: str, implementation: str = "eager") -> nn.Module:
    family, more = MODELS[name]
    config = getattr(transformers, f"{family}{'Text' if name == 'llama4' else ''}Config")(**SIZES, **more)
    config._attn_implementation, config._experts_implementation = "eager", implementation
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    rng = torch.Generator().manual_seed(0)
    for n, p in sorted(model.named_parameters()):
        if p.dim() > 1 or "norm" not in n:
            p.data = torch.randn(p.shape, generator=rng) * 0.3
    return model.eval()


def adapted(model: nn.Module, *names: str, **fields) -> PeftModel:
    config = {"r": 2, "target_modules": [], "target_parameters": BOTH, "init_lora_weights": False, **fields}
    for i, name in enumerate(names or ("default",)):
        torch.manual_seed(7 + i)
        if i == 0:
            model = get_peft_model(model, LoraConfig(**config), adapter_name=name)
        else:
            model.add_adapter(name, LoraConfig(**config))
    return model.eval()


CASES = [(name, how) for name in MODELS for how in ("eager", "batched_mm", "grouped_mm")]
CASES = [(name, how) for name, how in CASES if name != "llama4" or how == "eager"]  # the model offers no other


@pytest.mark.parametrize(("name", "implementation"), CASES)
@torch.no_grad()
def test_upstream_files_give_upstream_logits_live_and_merged(name, implementation, tmp_path):
    logits = load_file(GOLDEN / name / "logits.safetensors")["logits"]
    model = PeftModel.from_pretrained(base(name, implementation), GOLDEN / name).eval()
    assert (model(IDS).logits - logits).abs().max() < 1e-5
    assert (base(name)(IDS).logits - logits).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    ours, theirs = (load_file(p / "adapter_model.safetensors") for p in (tmp_path, GOLDEN / name))
    assert ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())
    assert (model.merge_and_unload()(IDS).logits - logits).abs().max() < 1e-5


@torch.no_grad()
def test_the_wrappers_nest_in_the_modules_order_and_one_parameter_has_the_plain_key(tmp_path):
    for i, (targets, below) in enumerate([(BOTH[::-1], ("base_layer.", "")), (BOTH[:1], ("",)), (BOTH[1:], ("",))]):
        model = adapted(base("mixtral"), target_parameters=targets)
        model.save_pretrained(tmp_path / str(i))
        keys = load_file(tmp_path / str(i) / "adapter_model.safetensors").keys()
        stem = "base_model.model.model.layers.0.mlp.experts."
        assert {k for k in keys if "layers.0" in k} == {f"{stem}{b}lora_{ab}.weight" for b in below for ab in "AB"}
        again = PeftModel.from_pretrained(base("mixtral"), tmp_path / str(i)).eval()
        assert torch.equal(again(IDS).logits, model(IDS).logits)


class Sizes(TorchDispatchMode):
    """The sizes of all tensors that operations give, without views of the model's own weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if torch.is_tensor(t) and t.untyped_storage().data_ptr() not in self.own:
                self.seen.add(tuple(t.shape))
        return out


def test_no_delta_of_an_expert_or_a_stack_is_made_in_forward_or_backward():
    model = adapted(base("mixtral"), "default", "b").train()
    model.base_model.set_adapter(["default", "b"])
    with Sizes(model) as sizes:
        model(IDS[:, :5]).logits.sum().backward()  # 10 tokens: no activation has a weight's shape
    weights = {(48, 16), (16, 48), (16, 24), (24, 16)}
    assert not {s for s in sizes.seen if s in weights or s[1:] in weights}
    assert (2, 16) in sizes.seen or (16, 2) in sizes.seen  # a factor's gradient: the mode sees what happens


def test_a_backward_reaches_the_factors_of_the_experts_that_were_used_and_agrees_with_the_dense_delta():
    model = adapted(base("mixtral"), r=3)
    model(IDS).logits.square().mean().backward()
    layer = model.base_model.model.model.layers[0].mlp.experts
    part = layer.parts()["gate_up_proj[1]"]
    lora = part.parent._modules[part.attr].methods["default"][0]
    # the same through the merged weight: dL/dB = s dL/dW Aᵀ
    plain = base("mixtral")
    with torch.no_grad():
        merged = adapted(base("mixtral"), r=3).merge_and_unload().state_dict()
        plain.load_state_dict(merged)
    plain(IDS).logits.square().mean().backward()
    dW = plain.model.layers[0].mlp.experts.gate_up_proj.grad[1]
    assert torch.allclose(lora.lora_B.grad, lora.scaling * dW @ lora.lora_A.T, atol=1e-6)
    assert torch.allclose(lora.lora_A.grad, lora.scaling * lora.lora_B.T @ dW, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_rows_of_a_batch_use_their_own_adapters(name):
    model = adapted(base(name), "default", "b")
    each = {}
    for adapter in ("default", "b"):
        model.set_adapter(adapter)
        each[adapter] = model(IDS).logits
    with model.disable_adapter():
        each["__base__"] = model(IDS).logits
    for names in (["b", "default"], ["__base__", "b"]):
        mixed = model(IDS, adapter_names=names).logits
        for i, n in enumerate(names):
            assert (mixed[i] - each[n][i]).abs().max() < 1e-5
        assert (each[names[0]][1] - each[names[1]][1]).abs().max() > 1e-2


@torch.no_grad()
def test_several_adapters_add_up_and_merge_together():
    model = adapted(base("qwen3_moe"), "default", "b", "c")
    model.base_model.set_adapter(["default", "c"])
    out = model(IDS).logits
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.merge_adapter()
    assert (model(IDS).logits - out).abs().max() < 1e-5
    model.unmerge_adapter()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert (model.merge_and_unload()(IDS).logits - out).abs().max() < 1e-5


@torch.no_grad()
def test_a_merged_stack_leaves_the_adapters_of_the_other_acting():
    model = adapted(base("mixtral"), target_parameters=BOTH[:1])
    torch.manual_seed(9)
    model.add_adapter("b", LoraConfig(r=2, target_modules=[], target_parameters=BOTH[1:], init_lora_weights=False))
    model.base_model.set_adapter(["default", "b"])
    out = model(IDS).logits
    model.merge_adapter(["default"])
    assert (model(IDS).logits - out).abs().max() < 1e-5


@torch.no_grad()
def test_without_an_acting_adapter_the_blocks_own_forward_runs():
    model = adapted(base("mixtral", "grouped_mm"))
    expected = base("mixtral", "grouped_mm")(IDS).logits
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, expected)
    assert torch.equal(model.unload()(IDS).logits, expected)


@torch.no_grad()
def test_rank_patterns_name_the_stack_and_layers_can_be_chosen():
    model = adapted(base("mixtral"), rank_pattern={"experts.down_proj": 5}, layers_to_transform=[1])
    ranks = {x.path: x.methods["default"][0].r for x in adapted_layers(model)}
    assert set(ranks.values()) == {2, 5} and all(".layers.1." in p for p in ranks) and len(ranks) == 6
    assert all((r == 5) == ("down_proj" in p) for p, r in ranks.items())


def test_training_with_checkpointing_gives_the_same_gradients():
    def grads(checkpointing):
        model = adapted(base("mixtral"))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()(IDS, labels=IDS).loss.backward()
        return [p.grad for p in model.adapter_parameters("default") if p.grad is not None]

    plain, again = grads(False), grads(True)
    assert plain and len(plain) == len(again)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(plain, again, strict=True))


def test_bare_parameters_refuse_what_needs_an_input_or_output():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Parameter(torch.randn(8, 4))

        def forward(self, x):
            return x @ self.first.T

    net = nn.Sequential(Block())
    for fields, why in (({"lora_dropout": 0.1}, "no input"), ({"lora_bias": True}, "bias")):
        with pytest.raises(Refusal, match=why):
            get_peft_model(net, LoraConfig(target_modules=[], target_parameters=["first"], **fields))
        assert type(net[0]) is Block
    with pytest.raises(ValueError, match="experts.down_prj"):
        get_peft_model(base("mixtral"), LoraConfig(target_modules=[], target_parameters=["experts.down_prj"]))


def test_a_parameter_of_a_wrapped_module_is_refused():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    with pytest.raises(Refusal, match="wrap this module"):
        model.add_adapter("b", LoraConfig(target_modules=[], target_parameters=["0.weight"]))


@torch.no_grad()
def test_a_linear_layers_weight_and_a_conv1ds_are_matrices_as_they_lie(tmp_path):
    from transformers.pytorch_utils import Conv1D

    for layer, shapes in ((nn.Linear(6, 4), ((2, 6), (4, 2))), (Conv1D(4, 6), ((2, 4), (6, 2)))):
        model = adapted(nn.Sequential(layer), target_parameters=["0.weight"])
        x = torch.randn(3, 6)
        out, W = model(x), layer.weight.clone()
        model.save_pretrained(tmp_path)
        state = load_file(tmp_path / "adapter_model.safetensors")
        A, B = state["base_model.model.0.lora_A.weight"], state["base_model.model.0.lora_B.weight"]
        assert (tuple(A.shape), tuple(B.shape)) == shapes
        merged = model.merge_and_unload()
        assert torch.allclose(merged[0].weight, W + 8 / 2 * B @ A, atol=1e-6)
        assert torch.allclose(merged(x), out, atol=1e-5)
