"""Expert stacks: upstream's files give upstream's logits, and no delta of a stack ever exists.

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

from peft import LoraConfig, PeftModel, get_peft_model
from peft.layers.experts import Experts, ExpertStack
from tests.helpers.experts import BOTH, IDS, MODELS, adapted, base

GOLDEN = Path(__file__).parents[1] / "golden" / "experts"


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
    assert torch.allclose(lora.lora_B_weight.grad, lora.strength * dW @ lora.lora_A_weight.T, atol=1e-6)
    assert torch.allclose(lora.lora_A_weight.grad, lora.strength * lora.lora_B_weight.T @ dW, atol=1e-6)


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


def test_blocks_that_say_nothing_of_a_gate_have_one():
    """As in transformers 5.0."""
    block = base("mixtral").model.layers[0].mlp.experts
    vars(block).pop("has_gate", None)
    kind = ExpertStack()
    assert kind.claims(block) and type(kind.stand_in(block)) is Experts
    model = base("mixtral")
    for layer in model.model.layers:
        vars(layer.mlp.experts).pop("has_gate", None)
    assert torch.equal(adapted(model)(IDS).logits, adapted(base("mixtral"))(IDS).logits)


def test_tokens_are_dealt_to_the_experts_that_the_router_chose():
    block = base("mixtral").model.layers[0].mlp.experts
    kind = ExpertStack()
    assert kind.claims(block) and not kind.claims(nn.Linear(2, 2))
    stand_in = kind.stand_in(block)
    assert isinstance(stand_in, Experts)
    index, weights = torch.tensor([[2, 0], [0, 2], [2, 3]]), torch.arange(6.0).view(3, 2)
    with torch.no_grad():
        dealt = [(e, tokens.tolist(), w.tolist()) for e, tokens, w in stand_in._routes(index, weights)]
    assert dealt == [(0, [0, 1], [1.0, 2.0]), (2, [0, 1, 2], [0.0, 3.0, 4.0])], "expert 3 is another rank's"


@pytest.mark.parametrize("gathered", [False, True], ids=["", "parameters are there in calls only"])
@pytest.mark.parametrize("rows", [False, True], ids=["one adapter", "an adapter per row"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("model", ["gpt_oss", "mixtral"])
def test_experts_without_tokens_have_gradients_of_zero(model, dropout, rows, gathered):
    """Not None: DDP waits for every parameter's gradient, and the ranks' routers choose differently."""
    layer, (x, index, weights), target = ExpertStack().examples()[model]()
    net = Holder(layer)
    target = {"target_parameters": [t.replace("site.", "layer.") for t in target["target_parameters"]]}
    config = LoraConfig(r=2, lora_dropout=dropout, init_lora_weights=False, **target)
    peft = get_peft_model(net, config).train()
    peft.add_adapter("b", config)
    for name in ("default", "b"):
        peft.set_requires_grad(name)
    for _, m in peft.roster.adapters["default"].methods if gathered else ():
        m.register_forward_hook(lambda *_: None)
    index = torch.zeros_like(index)  # all tokens to the first expert
    with torch.no_grad():
        expected = peft.eval()(x, index, weights)
    names = {"adapter_names": ["default"] * 2 + ["b"] * 2} if rows else {}
    peft.train()(x, index, weights, **names).square().sum().backward()
    assert expected.shape == x.shape
    acting = [p for n in (("default", "b") if rows else ("default",)) for p in peft.adapter_parameters(n)]
    grads = [p.grad for p in acting]
    assert grads and all(g is not None for g in grads)
    assert 0 < sum(bool(g.any()) for g in grads) < len(grads), "the first expert's alone are not zero"
    peft.zero_grad(set_to_none=True)
    peft(x[:0], index[:0], weights[:0]).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in peft.adapter_parameters("default"))


class Holder(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args):
        return self.layer(*args)
