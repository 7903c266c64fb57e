"""The grouped kernels as a model's rows take them: an adapter per row."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", minversion="3.3")

from peft.kernels import triton_lowrank as K  # noqa: E402
from tests.helpers.lowrank_triton import close, draw  # noqa: E402

ROWS = {  # which rows of 24 each of three terms has: slices, or positions that need not follow each other
    "in order": [slice(0, 10), slice(10, 18), slice(18, 24)],
    "with rows of the base": [slice(2, 5), slice(12, 14), slice(20, 23)],
    "interleaved": [torch.arange(0, 24, 3), torch.arange(1, 24, 3), torch.arange(2, 24, 3)],
    "mixed": [torch.tensor([0, 1, 2, 9, 11]), slice(3, 7), torch.tensor([7, 8, 20])],
    "one has none": [torch.tensor([0, 5, 6]), torch.tensor([1, 2]), torch.tensor([], dtype=torch.int64)],
}


def terms_of(ranks=(2, 5, 3), scales=(0.5, 2.0, -1.0), k=24, n=18):
    from peft.kernels.terms import Thin

    g = torch.Generator().manual_seed(4)
    factors = [(torch.randn(r, k, generator=g), torch.randn(n, r, generator=g)) for r in ranks]
    return [Thin(A.requires_grad_(), B.requires_grad_(), s) for (A, B), s in zip(factors, scales, strict=True)]


def mixed(x, W, b, terms, where, M=1.0):
    """The formula: row by row its own term."""
    y = x @ W.T + b
    for t, at in zip(terms, where, strict=True):
        rows = torch.arange(len(x))[at]
        y = y.index_add(0, rows, t.scale * ((M * x)[rows] @ t.A.T) @ t.B.T)
    return y


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("case", ROWS)
def test_mixed_rows_take_the_grouped_kernels(monkeypatch, case, p):
    from peft.kernels.rows import Scratch, rows_linear

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    terms, where = terms_of(), ROWS[case]
    t = draw(24, 24, 18, 1)
    x, W, b = t["x"].requires_grad_(), torch.randn(18, 24), torch.randn(18)
    asked = []
    monkeypatch.setattr(K, "grouped_shrink", lambda *a, f=K.grouped_shrink: asked.append(a) or f(*a))
    y = rows_linear(x, W, b, terms, where, [p] * 3 if p else None, Scratch())
    ((*_, seed, _),) = asked
    plain = mixed(x, W, b, terms, where, K.mask(x.shape, p, seed, "cpu"))
    close(y, plain)
    leaves = [x, *(f for term in terms for f in (term.A, term.B))]
    found, wanted = (torch.autograd.grad(v, leaves, t["dy"], allow_unused=True) for v in (y, plain))
    for a, e, leaf in zip(found, wanted, leaves, strict=True):
        close(a, torch.zeros_like(leaf) if e is None else e)
        assert a.is_contiguous()


@pytest.mark.parametrize("trained", ["x", "factors"])
@pytest.mark.parametrize("ranks", [(1, 1, 1), (40, 3, 64), (0, 2, 5)], ids=str)
def test_mixed_rows_of_any_rank_shape_and_what_trains(monkeypatch, ranks, trained):
    """In half precision with factors in fp32, three axes, transposed; with only x or only the factors to train."""
    from peft.kernels.rows import Scratch, rows_linear

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    terms, where = terms_of(ranks), ROWS["interleaved"]
    x = torch.randn(24, 12, 2, generator=torch.Generator().manual_seed(1)).half().permute(2, 1, 0)
    x.requires_grad_(trained == "x")
    for t in terms:
        t.A.requires_grad_(trained == "factors"), t.B.requires_grad_(trained == "factors")
    W, b = torch.randn(18, 24).half() / 5, torch.randn(18).half()
    y = rows_linear(x, W, b, terms, where, None, Scratch())
    plain = mixed(x.float().reshape(24, 24), W.float(), b.float(), terms, where).view(2, 12, 18)
    close(y.float(), plain, 5e-3)
    leaves = [x] if trained == "x" else [f for t in terms for f in (t.A, t.B) if f.numel()]
    found, wanted = (torch.autograd.grad(v.square().sum(), leaves) for v in (y.float(), plain))
    for a, e in zip(found, wanted, strict=True):
        assert a.dtype is (torch.float16 if trained == "x" else torch.float32)
        close(a.float(), e.float(), 2e-2)


@pytest.mark.parametrize("case", ["interleaved", "one has none", "with rows of the base"])
def test_second_derivatives_of_mixed_rows(monkeypatch, case):
    from peft.kernels.rows import Scratch, rows_linear

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    terms, where = terms_of(), ROWS[case]
    t = draw(24, 24, 18, 1)
    x, W, b = t["x"].requires_grad_(), torch.randn(18, 24), torch.randn(18)
    second = []
    for y in (rows_linear(x, W, b, terms, where, None, Scratch()), mixed(x, W, b, terms, where)):
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(dx.square().sum(), [x, terms[1].A, terms[1].B]))
    for a, e in zip(*second, strict=True):
        close(a, e, 1e-4)
    y = rows_linear(x, W, b, terms, where, [0.5] * 3, Scratch())
    with pytest.raises(NotImplementedError, match="dropout"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_what_the_grouped_kernels_leave_to_others(monkeypatch):
    from peft.kernels import rows
    from peft.kernels.rows import Scratch, rows_linear
    from peft.kernels.triton_rows import grouped_linear, runs_of

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    cpu, x, W = torch.device("cpu"), torch.randn(24, 24), torch.randn(18, 24)
    runs = runs_of(ROWS["in order"], cpu)
    terms = terms_of()
    assert grouped_linear(x, W, None, terms, runs) is not None
    monkeypatch.setattr(rows, "grouped_linear", lambda *a: pytest.fail("too few rows"))
    assert rows_linear(x[:3], W, None, terms, [slice(i, i + 1) for i in range(3)], None, Scratch()) is None
    first = terms[0]
    for other in (first._replace(A=first.A.half()), first._replace(B=torch.randn(2, 18).T)):
        assert grouped_linear(x, W, None, [other, *terms[1:]], runs) is None  # two dtypes; not by rows
    assert runs_of([slice(0, 4), slice(3, 6)], cpu) is None  # rows with two terms
    assert runs_of([None], cpu) is None
    scratch = Scratch()
    where = ROWS["mixed"]
    assert scratch.of(runs_of, where, x) is scratch.of(runs_of, list(where), x)  # once a batch, not once a layer
    other = scratch.of(runs_of, where, x.to("meta"))
    assert other.device.type == "meta"


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_model_whose_rows_differ_takes_them_throughout(monkeypatch, dropout):
    from peft import LoraConfig, get_peft_model

    def run(names):
        torch.manual_seed(1)
        model = get_peft_model(
            torch.nn.Sequential(torch.nn.Linear(24, 18), torch.nn.Tanh(), torch.nn.Linear(18, 24)),
            LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False, lora_dropout=dropout, seed=0),
            "a",
        )
        for name, r in (("b", 5), ("c", 3)):
            model.add_adapter(
                name,
                LoraConfig(
                    r=r, target_modules=["0"], init_lora_weights=False, lora_dropout=dropout, lora_alpha=3, seed=r
                ),
            )
            model.set_requires_grad(name)
        model.train(dropout > 0)
        x = torch.randn(len(names), 6, 24, generator=torch.Generator().manual_seed(2), requires_grad=True)
        torch.manual_seed(3)
        y = model(x, adapter_names=names)
        y.square().sum().backward()
        return y.detach(), x.grad, *(p.grad for n, p in model.named_parameters() if p.requires_grad)

    names = ["a", "b", "a", "__base__", "c", "b"]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    launched, rows = [], []
    monkeypatch.setattr(K, "launch", lambda name, *a, f=K.launch, **k: launched.append(name) or f(name, *a, **k))
    monkeypatch.setattr(K, "grouped_shrink", lambda *a, f=K.grouped_shrink: rows.append(a) or f(*a))
    found = run(names)
    assert launched.count("_shrink") >= 2 and launched.count("_expand") >= 2
    if not dropout:
        monkeypatch.delenv("TRITON_INTERPRET")
        launched.clear()
        for a, e in zip(found, run(names), strict=True):
            close(a, e, 1e-4)
        assert not launched
    else:  # each layer with a mask of its own, at the rate asked for
        seeds = [a[6] for a in rows]
        assert [a[5] for a in rows] == [dropout] * 2 and len(set(seeds)) == 2
        again = run(names)
        assert [a[6] for a in rows[2:]] == seeds and torch.equal(again[0], found[0])
        assert not torch.allclose(run(["__base__"] * 6)[0], found[0])
