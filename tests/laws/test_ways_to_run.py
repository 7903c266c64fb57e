"""However a plain layer may be run, an adapted one may: written into, traced, exported, differentiated in every mode,
vectorised, given nested tensors. Every method on nn.Linear, and one of each on a composite where torch can do it there.
"""

from __future__ import annotations

import contextlib
import copy
import io

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from peft import registry
from tests.helpers.cells import NOISE, Cell, close, refusal
from tests.helpers.prompts import every_method, prompted

METHODS = {n: m for n, m in registry.methods().items() if m.form != "prompt"}
VARIANTS = [Cell(n, dict(c), "linear", e) for n, m in METHODS.items() for c in m.examples for e in ("bias", "sequence")]
LINEAR = [c for c in VARIANTS if refusal(c) is None]
FIRST = [c for c in LINEAR if c.config == METHODS[c.method].examples[0]]
ATTENTION = [Cell(n, dict(m.examples[0]), "multihead_attention", "batch_first") for n, m in METHODS.items()]
COMPOSITE = [c for c in ATTENTION if refusal(c) is None]
# what ONNX's operators cannot say: solving, QR, and torch's own exporter of `index_add` on another axis than the first
BEYOND_ONNX = {"BOFT": "solve", "HRA": "qr", "LOREFT": "qr", "TRAINABLE_TOKENS": "index_add"}


def over(*groups: list[Cell]):
    chosen = [c for g in groups for c in g]
    return pytest.mark.parametrize("cell", chosen, ids=[f"{c.id}" for c in chosen])


def trained(model) -> dict[str, torch.Tensor]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def reverse(model, inputs, v):
    """vᵀ J over the trained parameters and the first input, by the backward of the layer as it runs by itself."""
    x = inputs[0].clone().requires_grad_()
    wanted = [x, *trained(model).values()]
    return torch.autograd.grad(model(x, *inputs[1:]), wanted, v)


@over(LINEAR, COMPOSITE)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_the_output_may_be_written_into_in_place(cell, train):
    def gradients(inplace: bool):
        model, inputs = cell.model()
        torch.manual_seed(5)
        x = inputs[0].clone().requires_grad_()
        y = model.train(train)(x, *inputs[1:])
        y = y.mul_(2).relu_() if inplace else (y * 2).relu()
        return torch.autograd.grad(y.square().sum(), [x, *trained(model).values()])

    for a, b in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(a, b)


@over(LINEAR, COMPOSITE)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_a_trace_is_saved_and_computes_for_other_inputs(cell, grad):
    model, inputs = cell.model()
    others = tuple(x.flip(0) * 2 + 0.1 for x in inputs)
    with torch.set_grad_enabled(grad):
        file = io.BytesIO()
        torch.jit.save(torch.jit.trace(model, inputs, check_trace=False), file)
        file.seek(0)
        traced = torch.jit.load(file)
        for given in (inputs, others):
            assert close(traced(*given).detach(), model(*given).detach(), 1e-5)


@over([c for c in FIRST if c.example == "bias"])
def test_torch_export(cell):
    model, inputs = cell.model()
    program = torch.export.export(model, inputs)
    assert close(program.module()(*inputs).detach(), model(*inputs).detach(), 1e-5)


@over([c for c in LINEAR if c.example == "bias"])
def test_legacy_onnx_export(cell, monkeypatch):
    exporter = pytest.importorskip("torch.onnx._internal.torchscript_exporter.onnx_proto_utils")
    monkeypatch.setattr(
        exporter, "_add_onnxscript_fn", lambda graph, *_: graph
    )  # needs the package onnx, for what is not used
    model, inputs = cell.model()
    file = io.BytesIO()
    beyond = BEYOND_ONNX.get(cell.method) or cell.config.get("use_cayley_neumann") is False
    if beyond and cell.config.get("variant") not in ("noreft", "direft"):
        with torch.no_grad():  # these are merged before they are exported
            model = model.merge_and_unload() if all(m.mergeable for _, m in methods(model)) else None
    if model is None:
        return
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(model, inputs, file, dynamo=False)
    assert len(file.getvalue()) > 500


def methods(model):
    return [pair for a in model.roster.adapters.values() for pair in a.methods]


@over(LINEAR)
def test_forward_mode_derivatives_equal_those_of_backward(cell):
    model, inputs = cell.model()
    rng = torch.Generator().manual_seed(1)
    tangents = [torch.randn(t.shape, generator=rng) for t in (inputs[0], *trained(model).values())]
    with forward_ad.dual_level():
        x, *parameters = map(forward_ad.make_dual, (inputs[0], *trained(model).values()), tangents)
        y = torch.func.functional_call(model, dict(zip(trained(model), parameters, strict=True)), (x,))
        got = forward_ad.unpack_dual(y).tangent
    v = torch.randn(got.shape, generator=rng)
    by_reverse = sum((g * t).sum() for g, t in zip(reverse(model, inputs, v), tangents, strict=True))
    assert torch.allclose((v * got).sum(), by_reverse, rtol=1e-4, atol=1e-3)
    # the same by torch.func
    state = {n: p.detach() for n, p in trained(model).items()}

    def call(x, state):
        return torch.func.functional_call(model, state, (x,))

    _, again = torch.func.jvp(call, (inputs[0], state), (tangents[0], dict(zip(state, tangents[1:], strict=True))))
    assert close(again, got.detach(), 1e-5)


@over(LINEAR)
def test_function_transforms(cell):
    model, inputs = cell.model()
    state = {n: p.detach() for n, p in trained(model).items()}

    def loss(state, x):
        return torch.func.functional_call(model, state, (x,)).square().sum()

    v = 2 * model(*inputs).detach()
    for got, expected in zip(
        torch.func.grad(loss)(state, *inputs).values(), reverse(model, inputs, v)[1:], strict=True
    ):
        assert close(got, expected, 1e-4)
    with torch.no_grad():
        stack = torch.stack([inputs[0], 2 * inputs[0].flip(0)])
        assert close(torch.func.vmap(model)(stack), torch.stack([model(x) for x in stack]), 1e-5)
        # an ensemble: two sets of the adapter's parameters
        other = {n: p + NOISE * torch.randn_like(p) for n, p in state.items()}
        both = {n: torch.stack([p, other[n]]) for n, p in state.items()}

        def call(state):
            return torch.func.functional_call(model, state, inputs)

        assert close(torch.func.vmap(call)(both), torch.stack([call(state), call(other)]), 1e-5)


@over(LINEAR)
def test_derivatives_of_derivatives(cell):
    """Those of the layer as it runs by itself equal those of the plain operations, under which a node steps aside."""
    model, inputs = cell.model()
    model = model.double()
    x = inputs[0].double().requires_grad_()
    wanted = [x, *trained(model).values()]
    state = trained(model)

    def second(y):
        first = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), wanted)

    expected, vjp = torch.func.vjp(
        lambda x, s: torch.func.grad(
            lambda x, s: torch.func.functional_call(model, s, (x,)).square().sum(), argnums=(0, 1)
        )(x, s),
        x.detach(),
        {n: p.detach() for n, p in state.items()},
    )
    dx, ds = vjp((2 * expected[0], {n: 2 * g for n, g in expected[1].items()}))
    for got, by_plain in zip(second(model(x)), (dx, *ds.values()), strict=True):
        assert torch.allclose(got, by_plain, rtol=1e-6, atol=1e-6 * float(by_plain.abs().max()))


@over([c for c in LINEAR if c.example == "bias"])
def test_gradients_of_many_outputs_at_once(cell):
    model, inputs = cell.model()
    y = model(*inputs)
    many = torch.randn(3, *y.shape)
    wanted = list(trained(model).values())
    together = torch.autograd.grad(y, wanted, many, is_grads_batched=True, retain_graph=True)
    for i, v in enumerate(many):
        for a, b in zip(together, torch.autograd.grad(y, wanted, v, retain_graph=True), strict=True):
            assert close(a[i], b, 1e-5)


@over([c for c in LINEAR if c.example == "bias"])
def test_saved_tensors_may_be_kept_elsewhere_and_inference_mode(cell):
    model, inputs = cell.model()
    v = torch.randn_like(model(*inputs))
    expected = reverse(model, inputs, v)
    with torch.autograd.graph.save_on_cpu():
        assert all(map(torch.equal, reverse(model, inputs, v), expected))
    with torch.inference_mode():
        y = model(*inputs)
    assert close(y, model(*inputs).detach(), 1e-6)


@over([c for c in LINEAR if c.example == "sequence"])
@pytest.mark.parametrize("rows", [False, True], ids=["one adapter", "an adapter per row"])
def test_nested_tensors(cell, rows):
    """Sequences of several lengths give what each gives alone; what acts on positions is refused."""
    model, inputs = cell.model(names=("default", "b"))
    sequences = [inputs[0][0], inputs[0][:2].flatten(0, 1), inputs[0][3][:1]]
    x = torch.nested.nested_tensor(sequences, layout=torch.jagged)
    names = {"adapter_names": ["default", "b", "default"]} if rows else {}
    if any(m.form == "after" and not m.mergeable and hasattr(m, "edits") for _, m in methods(model)):
        with pytest.raises(ValueError, match="positions"):
            model(x, **names)
        return
    y = model(x, **names)
    assert torch.equal(y.offsets(), x.offsets())
    twin = copy.deepcopy(model)
    for name, s, got in zip(("default", "b" if rows else "default", "default"), sequences, y.unbind(), strict=True):
        twin.set_adapter(name)
        assert close(got.detach(), twin(s[None]).detach()[0], 1e-5)
    (y + y).values().sum().backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


@over(LINEAR, COMPOSITE)
def test_autocast(cell):
    model, inputs = cell.model()
    base, _ = cell.base()
    expected = model(*inputs).detach()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(*inputs)
        assert y.dtype == base(*inputs).dtype
    assert close(y.detach().float(), expected, 6e-2)
    y.float().square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained(model).values())


class Logits(nn.Module):
    """A language model as a function of token ids."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


@every_method
@torch.backends.mkldnn.flags(enabled=False)  # its LSTM has no forward mode
def test_prompt_methods_in_every_way(method, example):
    """A trace, forward-mode derivatives, those of derivatives, an ensemble: of a model behind a prompt."""
    ids = torch.arange(12).view(2, 6)
    model = Logits(prompted(method, example))
    model.model.get_base_model().set_attn_implementation("eager")  # torch's fused one has no forward mode
    y = model(ids)
    assert close(
        torch.jit.trace(model, (ids,), check_trace=False)(ids.flip(1)).detach(), model(ids.flip(1)).detach(), 1e-5
    )
    state = trained(model)
    tangents = {n: torch.randn_like(p) for n, p in state.items()}

    def call(state):
        return torch.func.functional_call(model, state, (ids,))

    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(call({n: forward_ad.make_dual(p, tangents[n]) for n, p in state.items()})).tangent
    v = torch.randn_like(y)
    reverse = torch.autograd.grad(y, list(state.values()), v, create_graph=True)
    by_reverse = sum((g * t).sum() for g, t in zip(reverse, tangents.values(), strict=True))
    assert torch.allclose((v * got).sum(), by_reverse, rtol=1e-3, atol=1e-3)
    sum(g.square().sum() for g in reverse).backward()
    if any(isinstance(m, nn.LSTM) for m in model.modules()):
        return  # torch cannot vectorise one
    with torch.no_grad():
        both = {n: torch.stack([p, p + tangents[n]]) for n, p in state.items()}
        others = {n: p + tangents[n] for n, p in state.items()}
        assert close(torch.func.vmap(call)(both), torch.stack([call(state), call(others)]), 1e-4)
