"""Routed experts against their formula, token by token: y_t = Σ_{e in top-k(t)} p_te · D_e g(U_e x_t)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft import LoraConfig, Refusal, get_peft_model
from peft.core.acting.mix import Mix
from peft.core.acting.rows import Rows
from peft.layers.experts import ExpertStack
from peft.layers.routed_experts import DOWN, Experts, SortedExperts
from tests.helpers.cells import Net

pytest.importorskip("transformers")

UP = "gate_up_proj"
HIDDEN, INNER = 16, 24  # of the examples: three experts


def block(name: str, *adapters: str) -> tuple[nn.Module, Experts, tuple[Tensor, ...]]:
    """A block of the kind's examples with LoRA on both stacks: (model, its stand-in, inputs)."""
    layer, given, target = ExpertStack().examples()[name]()
    config = {"r": 2, "lora_alpha": 4, "target_modules": [], "init_lora_weights": False, **target}
    model = get_peft_model(Net(layer), LoraConfig(**config), adapter_name=(adapters or ("default",))[0])
    for more in adapters[1:]:
        model.add_adapter(more, LoraConfig(**config))
    return model.eval(), model.get_base_model().site, given if isinstance(given, tuple) else (given,)


def weight(site: Experts, name: str, e: int, *adapters: str) -> Tensor:
    """An expert's matrix [out, in] with its adapters: W + Σ s B A."""
    part = site.of(name)[e]
    methods = [m for a in adapters for m in part.methods[a]]
    return part.base_layer.weight + sum(2.0 * m.lora_B_weight @ m.lora_A_weight for m in methods)


def gated(site: Experts, e: int, x: Tensor, *adapters: str) -> Tensor:
    """D (silu(G x) ⊙ U x), with G and U one above the other in one matrix (Mixtral)."""
    gate, up = (weight(site, UP, e, *adapters) @ x).chunk(2)
    return weight(site, DOWN, e, *adapters) @ (F.silu(gate) * up)


def by_formula(site: Experts, x: Tensor, index: Tensor, p: Tensor, *adapters: str) -> Tensor:
    return torch.stack(
        [
            sum(p[t, i] * gated(site, int(e), x[t], *adapters) for i, e in enumerate(index[t]))
            for t in range(len(x))
        ]
    )  # fmt: skip


@torch.no_grad()
def test_each_token_has_the_weighted_sum_of_its_experts():
    model, site, (x, index, p) = block("mixtral")
    expected = by_formula(site, x, index, p, "default")
    assert torch.allclose(model(x, index, p), expected, atol=1e-5)
    assert not torch.allclose(by_formula(site, x, index, p), expected, atol=1e-2)
    shaped = model(x.view(2, 2, HIDDEN), index, p)  # a batch of texts keeps its shape
    assert shaped.shape == (2, 2, HIDDEN) and torch.allclose(shaped.reshape(4, HIDDEN), expected, atol=1e-5)


@torch.no_grad()
def test_arguments_by_name_are_the_same_call():
    model, site, (x, index, p) = block("mixtral")
    by_name = site(top_k_weights=p, hidden_states=x, top_k_index=index)
    assert torch.equal(by_name, model(x, index, p))


@torch.no_grad()
def test_experts_without_tokens_are_not_run_and_those_of_other_ranks_are_passed_over():
    model, site, (x, _, p) = block("mixtral")
    ran: list[int] = []
    for e, part in enumerate(site.of(UP)):
        part.register_forward_pre_hook(lambda module, args, kwargs, e=e: ran.append(e), with_kwargs=True)
    index = torch.tensor([[0, 3], [0, 3], [3, 0], [0, 2]])  # there are three experts: 3 is somewhere else
    found = model(x, index, p)
    assert sorted(ran) == [0, 2]
    expected = by_formula(site, x, index.clamp(max=2), p * (index < 3), "default")
    assert torch.allclose(found, expected, atol=1e-5)


def test_routes_hold_each_pair_of_token_and_expert_once():
    _, site, _ = block("mixtral")
    index, p = torch.tensor([[0, 1], [2, 0], [0, 2]]), torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    found = {e: (token.tolist(), weight.tolist()) for e, token, weight in site._routes(index, p)}
    assert found.keys() == {0, 1, 2}
    assert found[0] == ([0, 1, 2], pytest.approx([0.1, 0.4, 0.5]))
    assert found[1] == ([0], pytest.approx([0.2])) and found[2] == ([1, 2], pytest.approx([0.3, 0.6]))


@torch.no_grad()
def test_in_a_compiled_graph_all_tokens_run_with_weight_0_where_routed_elsewhere(monkeypatch):
    model, site, (x, index, p) = block("mixtral")
    expected = model(x, index, p)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    routes = list(site._routes(index, p))
    assert [(e, token) for e, token, _ in routes] == [(0, None), (1, None), (2, None)]
    for e, _, found in routes:
        assert torch.equal(found, torch.where(index == e, p, 0.0).sum(-1))
    assert torch.allclose(site(x, index, p), expected, atol=1e-5)


@torch.no_grad()
def test_a_tokens_row_has_its_own_adapter_wherever_it_is_routed():
    model, site, (x, index, p) = block("mixtral", "a", "b")
    names = ["b", "a", "__base__", "b"]
    found = model(x, index, p, adapter_names=names)
    for t, name in enumerate(names):
        own = (name,) if name != "__base__" else ()
        expected = by_formula(site, x[t : t + 1], index[t : t + 1], p[t : t + 1], *own)[0]
        assert torch.allclose(found[t], expected, atol=1e-5)


@torch.no_grad()
def test_while_no_adapter_acts_the_blocks_own_forward_runs():
    for name in ("mixtral", "llama4"):
        model, site, given = block(name)
        asked: list[int] = []
        site.base_layer.register_forward_hook(lambda *a, asked=asked: asked.append(1))
        model(*given)
        assert not asked
        with model.disable_adapter():
            found = model(*given)
        assert asked == [1] and torch.equal(found, site.base_layer(*given))


# -- a stack at once ------------------------------------------------------------------------------------------------------------
def called(site: Experts) -> list[int]:
    """The experts that are called by themselves from now on. Hooks would be called, too; this asks on the way."""
    ran: list[int] = []
    whole = site.expert
    site.__dict__["expert"] = lambda e, *args: (ran.append(e), whole(e, *args))[1]
    return ran


def gradients(model: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
    leaf = given[0].clone().requires_grad_()
    weights = [g.clone().requires_grad_(g.is_floating_point()) for g in given[1:]]
    y = model(leaf, *weights)
    parameters = [p for n in model.roster.chosen for p in model.adapter_parameters(n)]
    wanted = [leaf, *(w for w in weights if w.requires_grad), *parameters]
    g = torch.linspace(-1, 1, y.numel()).view(y.shape)
    return y.detach(), list(torch.autograd.grad(y, wanted, g, materialize_grads=True))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4"])
@pytest.mark.parametrize("adapters", [("a",), ("a", "b")], ids=len)
def test_a_stack_at_once_is_the_same_as_expert_by_expert(name, adapters):
    model, site, given = block(name, *adapters)
    model.base_model.set_adapter(list(adapters))
    ran = called(site)
    at_once = gradients(model, given)
    assert not ran, "no expert by itself"
    site.of(UP)[1].register_forward_hook(lambda *_: None)  # a hook on an expert's part wants to see it called
    by_expert = gradients(model, given)
    assert ran == [0, 1, 2]
    for found, expected in zip((at_once[0], *at_once[1]), (by_expert[0], *by_expert[1]), strict=True):
        assert torch.allclose(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("why", ["rows", "dora", "bias", "trained weight", "autocast", "a foreign expert"])
@torch.no_grad()
def test_what_is_more_than_products_goes_expert_by_expert(why):
    model, site, (x, index, p) = block("mixtral", "a", "b")
    more = {"dora": {"use_dora": True}, "bias": {"lora_bias": True}}.get(why)
    if why == "bias":
        model, site, (x, index, p) = block("gpt_oss", "a")
    if more:
        target = {"target_parameters": [f"site.{UP}", "site.down_proj"]}
        model.add_adapter("c", LoraConfig(r=2, target_modules=[], init_lora_weights=False, **more, **target))
        model.set_adapter("c")
    if why == "trained weight":
        site.base_layer._parameters[UP].requires_grad_(True)
    ran = called(site)
    index = torch.where(index == 2, 3, index) if why == "a foreign expert" else index
    names = {"adapter_names": ["a", "b", "a", "b"]} if why == "rows" else {}
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        model(x, index, p, **names)
    assert ran


# -- experts that are each given all tokens ---------------------------------------------------------------------------------------
@torch.no_grad()
def test_sorted_experts_each_take_their_share_of_the_rows():
    """Llama 4: x[E · T, h], already weighted; the first T rows are the first expert's."""
    model, site, (x,) = block("llama4")
    assert isinstance(site, SortedExperts)
    each = x.reshape(3, 2, HIDDEN)
    expected = torch.stack([gated(site, e, each[e, t], "default") for e in range(3) for t in range(2)])
    assert torch.allclose(model(x), expected, atol=1e-5)
    assert torch.equal(site(hidden_states=x), model(x))


@torch.no_grad()
def test_rows_of_sorted_experts_are_those_of_the_batch_and_must_come_out_even():
    model, site, (x,) = block("llama4", "a", "b")
    roster = model.roster
    each = x.reshape(3, 2, HIDDEN)  # for each expert one token of each row
    with roster.using(Mix((), Rows(["b", "a"]))):
        found = site(x).reshape(3, 2, HIDDEN)
    for e in range(3):
        for row, name in enumerate("ba"):
            assert torch.allclose(found[e, row], gated(site, e, each[e, row], name), atol=1e-5)
    with roster.using(Mix((), Rows(["a", "b", "a"]))), pytest.raises(Refusal, match="2 tokens, which 3 rows"):
        site(x)
