"""The laws, for every method on every layer kind. A cell that is refused is refused with a reason, before any change.

Every law first randomises the adapter and shows that the output moved.
"""

from __future__ import annotations

import io

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from peft import PeftModel, Refusal, get_peft_model, get_peft_model_state_dict, registry
from peft.contract.capabilities import Derives, Exclusive
from tests.helpers.cells import Cell, cells, clone, close, randomise, refusal, same_bits

CELLS = cells()
REASONS = {c.id: refusal(c) for c in CELLS}
BUILT = [c for c in CELLS if REASONS[c.id] is None]
REFUSED = [c for c in CELLS if REASONS[c.id] is not None]


def over(chosen: list[Cell]):
    return pytest.mark.parametrize("cell", chosen, ids=[c.id for c in chosen])


law = over(BUILT)


def moved(cell: Cell, out: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> bool:
    base, _ = cell.base()
    with torch.no_grad():
        return not torch.equal(out, base(*inputs))


def mergeable(model) -> bool:
    return all(m.mergeable for a in model.roster.adapters.values() for _, m in a.methods)


@pytest.mark.parametrize("cell", REFUSED, ids=[c.id for c in REFUSED])
def test_a_refusal_gives_a_reason_and_changes_nothing(cell):
    base, inputs = cell.base()
    before = {k: v.clone() for k, v in base.state_dict().items() if torch.is_tensor(v)}
    types = [type(m) for m in base.modules()]
    with pytest.raises(Refusal) as e:
        get_peft_model(base, cell.peft_config())
    assert len(e.value.reason) > 15 and "not implemented" not in str(e.value).lower()
    assert [type(m) for m in base.modules()] == types
    assert all(same_bits(v, before[k]) for k, v in base.state_dict().items() if torch.is_tensor(v))


@over([c for c in BUILT if registry.methods()[c.method].identity])
def test_fresh_adapter_is_the_identity(cell):
    base, inputs = cell.base()
    with torch.no_grad():
        expected = base(*inputs)
        model = get_peft_model(base, cell.peft_config()).eval()
        promised = all(m.identity for _, m in model.roster.adapters["default"].methods)  # some variants cannot
        assert close(model(*inputs), expected, max(cell.tolerance, 2e-6)) == promised


@law
def test_forward_equals_merged_and_unmerge_restores_the_bits(cell):
    model, inputs = cell.model()
    with torch.no_grad():
        out = model(*inputs)
        assert moved(cell, out, inputs)
        before = {k: v.clone() for k, v in model.get_base_model().state_dict().items() if torch.is_tensor(v)}
        if not mergeable(model):
            with pytest.raises(Refusal):
                model.base_model.merge_adapter()
            assert torch.equal(model(*inputs), out)
            return
        model.base_model.merge_adapter()
        assert close(model(*inputs), out, cell.tolerance)
        model.base_model.unmerge_adapter()
        after = model.get_base_model().state_dict()
        assert all(same_bits(after[k], v) for k, v in before.items())
        assert close(model.base_model.merge_and_unload()(*inputs), out, cell.tolerance)


@law
def test_disable_and_unload_give_back_the_base(cell):
    model, inputs = cell.model()
    base, _ = cell.base()
    with torch.no_grad():
        expected = base(*inputs)
        grads = [p.requires_grad for p in model.parameters()]
        with model.disable_adapter():
            assert torch.equal(model(*inputs), expected)
        assert [p.requires_grad for p in model.parameters()] == grads
        back = model.base_model.unload()
        assert torch.equal(back(*inputs), expected)
        assert [n for n, _ in back.named_parameters()] == [n for n, _ in base.named_parameters()]


@law
def test_save_and_load_give_the_same_output(cell, tmp_path):
    model, inputs = cell.model(names=("default", "q_proj"))
    with torch.no_grad():
        out = model(*inputs)
        model.save_pretrained(tmp_path)
        base, _ = cell.base()
        loaded = PeftModel.from_pretrained(base, tmp_path).eval()
        loaded.load_adapter(tmp_path / "q_proj", "0")
        for saved, name in (("default", "default"), ("q_proj", "0")):
            theirs = get_peft_model_state_dict(loaded, adapter_name=name)
            mine = get_peft_model_state_dict(model, adapter_name=saved)
            assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
        # the same bits; a product over memory of another alignment may still round its last bit differently
        assert close(loaded(*inputs), out, 1e-6)
        loaded.set_adapter("0")
        model.set_adapter("q_proj")
        assert close(loaded(*inputs), model(*inputs), 1e-6)


@law
def test_only_adapter_parameters_get_gradients(cell):
    model, inputs = cell.model()
    model.train()
    model(*inputs).float().square().mean().backward()
    own = {id(p) for p in model.adapter_parameters("default")}
    trained = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert trained
    assert all(id(p) in own for p in model.parameters() if p.grad is not None)
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, f"no gradient reaches {missing}"


@law
def test_rows_of_a_batch_are_independent(cell):
    model, inputs = cell.model(names=("default", "b"))
    with torch.no_grad():
        each = {}
        for name in ("default", "b"):
            model.set_adapter(name)
            each[name] = model(*inputs)
        with model.disable_adapter():
            each["__base__"] = model(*inputs)
        n = inputs[0].shape[0]
        names = [("b", "default", "__base__")[i % 3] for i in range(n)]
        try:
            mixed = model(*inputs, adapter_names=names)
        except Refusal as e:
            assert len(e.reason) > 15
            return
        for i, name in enumerate(names):
            assert close(mixed[i], each[name][i], max(cell.tolerance, 1e-6))


@law
def test_several_active_equal_merged_together(cell):
    model, inputs = cell.model(names=("default", "b"))
    with torch.no_grad():
        one = model(*inputs)
        if any(m.held_alone() for _, m in model.roster.adapters["b"].methods if isinstance(m, Exclusive)):
            with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
                model.set_adapter(["default", "b"])
            assert torch.equal(model(*inputs), one)
            return
        model.set_adapter(["default", "b"])
        out = model(*inputs)
        assert not torch.equal(out, one)
        if mergeable(model):
            model.base_model.merge_adapter()
            assert close(model(*inputs), out, cell.tolerance)


@over([c for c in BUILT if registry.kinds()[c.kind].compiles and c.first])
def test_compiles_without_graph_breaks(cell):
    model, inputs = cell.model()
    torch._dynamo.reset()
    with torch.no_grad():
        out = model(*inputs)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert close(compiled(*inputs), out, max(cell.tolerance, 1e-5))


@law
def test_gradient_checkpointing_gives_the_same_gradients(cell):
    def grads(run):
        model, inputs = cell.model()
        inputs = tuple(x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs)
        torch.manual_seed(5)
        run(model, inputs).float().square().mean().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain = grads(lambda m, x: m(*x))
    again = grads(lambda m, x: checkpoint(m, *x, use_reentrant=False))
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[n], again[n]) for n in plain)


@law
def test_deepcopy_and_pickle(cell):
    model, inputs = cell.model()
    with torch.no_grad():
        out = model(*inputs)
        twin = clone(model)
        assert torch.equal(twin(*inputs), out)
        randomise(twin, "default", 9)
        assert torch.equal(model(*inputs), out)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(*inputs), out)


@over([c for c in BUILT if registry.kinds()[c.kind].castable])
def test_half_precision_bases_get_fp32_masters_and_keep_their_dtype(cell):
    model, inputs = cell.model(dtype=torch.bfloat16)
    with torch.no_grad():
        out = model(*inputs)
    base, _ = cell.base()
    assert out.dtype == base.to(torch.bfloat16)(*inputs).dtype
    floats = [p for p in model.adapter_parameters("default") if p.is_floating_point()]
    assert floats and all(p.dtype == torch.float32 for p in floats)


# a row of the matrix for each dtype: (how far a merged layer may be from its forward, relative to the output)
DTYPES = {torch.float64: 1e-9, torch.bfloat16: 6e-2, torch.float16: 1e-2}


CAST = [(c, d) for c in BUILT if registry.kinds()[c.kind].castable for d in DTYPES if c.first or d == torch.bfloat16]


@pytest.mark.parametrize(("cell", "dtype"), CAST, ids=[f"{c.id}-{d}" for c, d in CAST])
def test_forward_equals_merged_in_every_precision(cell, dtype):
    """With parameters in fp32 at least, and with everything cast, where decompositions still compute in fp32."""
    expected, _ = cell.model()
    try:
        base, inputs = cell.base()
        cast = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
        base.to(dtype)(*cast)
    except RuntimeError:
        return  # the base layer itself knows no such numbers
    whole = cell.model()[0].to(dtype)
    for model in (cell.model(dtype=dtype)[0], whole):
        y = model(*cast)
        assert y.dtype == dtype
        derived = any(isinstance(m, Derives) and m.derives for m in model.modules())
        if model is whole or not (derived or dtype == torch.float64):  # of rounded weights, or drawn in double: others
            assert close(y.detach().float(), expected(*inputs).detach(), 3 * DTYPES[torch.bfloat16])
        y.float().square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        if mergeable(model):
            model.base_model.merge_adapter()
            merged = model(*cast)
            assert merged.dtype == dtype and close(merged.detach().double(), y.detach().double(), DTYPES[dtype])


def emptied(cell: Cell, inputs: tuple[torch.Tensor, ...]):
    """The inputs without rows, and where they are of sequences without tokens, as far as the base layer takes them."""
    ways = [tuple(x[:0] for x in inputs)]
    marks = torch.empty(2, 3, 4, 5)
    indices = not inputs[0].is_floating_point()
    if len(inputs) == 1 and inputs[0].dim() + indices > 2 and registry.kinds()[cell.kind].channels_last(marks) is marks:
        ways.append(tuple(x[:, :0] for x in inputs))
    for way in ways:
        try:
            yield way, cell.base()[0](*way)
        except (RuntimeError, ValueError, IndexError):
            continue


# bitsandbytes' kernels for CPUs divide by the number of rows, which ends the process
@over([c for c in BUILT if not c.kind.startswith("bitsandbytes")])
def test_no_rows_give_no_rows_and_gradients_of_zero(cell):
    """An expert without tokens, an empty batch: not None, which distributed training would wait for."""
    for inputs, expected in emptied(cell, cell.base()[1]):
        for train in (True, False):
            model, _ = cell.model()
            y = model.train(train)(*inputs)
            assert y.shape == expected.shape and y.dtype == expected.dtype
            y.float().sum().backward()
            grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
            assert grads and not [n for n, g in grads.items() if g is None or g.any()]
            with torch.no_grad():
                assert model(*inputs).shape == expected.shape
