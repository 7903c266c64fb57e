"""The node of a stack of matrices against the plain formula, group by group."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from peft.kernels.grouped import Deal, Stack, grouped_linear
from peft.kernels.terms import Thin
from tests.helpers.lowrank import mask

COUNTS = [3, 0, 1, 4]  # rows of each matrix: one has none


def setting(transposed: bool = False) -> tuple[Tensor, Stack, list[list[Thin]]]:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x = draw(8, 7).requires_grad_()
    W = draw(4, 7, 5).mT if transposed else draw(4, 5, 7)
    terms = [
        [Thin(draw(r, 7).requires_grad_(), draw(5, r).requires_grad_(), 0.5 + e) for e in range(4)] for r in (2, 3)
    ]
    return x, Stack(W, draw(4, 5)), terms


def by_formula(x: Tensor, stack: Stack, terms: list[list[Thin]], dropped: list[Tensor]) -> Tensor:
    owner = torch.repeat_interleave(torch.arange(4), torch.tensor(COUNTS))
    rows = []
    for s, e in enumerate(owner.tolist()):
        y = F.linear(x[s], stack.W[e], None if stack.b is None else stack.b[e])
        for term, xs in zip(terms, dropped, strict=True):
            y = y + term[e].scale * F.linear(F.linear(xs[s], term[e].A), term[e].B)
        rows.append(y)
    return torch.stack(rows)


def leaves(x: Tensor, terms: list[list[Thin]]) -> list[Tensor]:
    return [x, *(f for term in terms for t in term for f in (t.A, t.B))]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradients_equal_the_formula_and_matrices_without_rows_have_zeros(transposed, bias):
    x, stack, terms = setting(transposed)
    stack = stack if bias else Stack(stack.W, None)
    fused = grouped_linear(x, stack, COUNTS, terms, [0.0, 0.0])
    plain = by_formula(x, stack, terms, [x, x])
    assert torch.allclose(fused, plain, atol=1e-12)
    g = torch.randn_like(plain)
    found = torch.autograd.grad(fused, leaves(x, terms), g)
    expected = torch.autograd.grad(plain, leaves(x, terms), g, materialize_grads=True)
    for a, e in zip(found, expected, strict=True):
        assert torch.allclose(a, e, atol=1e-12)
    assert sum(not a.any() for a in found) == 2 * len(terms)


def test_dropout_acts_on_its_own_term_and_backward_has_the_mask_of_forward():
    x, stack, terms = setting()
    torch.manual_seed(4)
    fused = grouped_linear(x, stack, COUNTS, terms, [0.5, 0.0])
    torch.manual_seed(4)
    keep = mask((8, 7), 0.5, int(torch.randint(2**62, (1,)).item())).double()
    plain = by_formula(x, stack, terms, [x * keep, x])
    assert torch.allclose(fused, plain, atol=1e-12)
    g = torch.randn_like(plain)
    found = torch.autograd.grad(fused, leaves(x, terms), g)
    expected = torch.autograd.grad(plain, leaves(x, terms), g, materialize_grads=True)
    for a, e in zip(found, expected, strict=True):
        assert torch.allclose(a, e, atol=1e-12)


def test_gradients_and_second_gradients_by_differences():
    x, stack, terms = setting()
    terms = terms[:1]

    def run(x: Tensor, *flat: Tensor) -> Tensor:
        built = [[Thin(flat[2 * e], flat[2 * e + 1], terms[0][e].scale) for e in range(4)]]
        return grouped_linear(x, stack, COUNTS, built, [0.0])

    assert torch.autograd.gradcheck(run, leaves(x, terms))
    assert torch.autograd.gradgradcheck(run, leaves(x, terms))


def test_frozen_factors_and_inputs_get_none_and_no_rows_give_zeros():
    x, stack, terms = setting()
    for t in terms[0]:
        t.A.requires_grad_(False)
    grouped_linear(x.detach(), stack, COUNTS, terms, [0.0, 0.0]).sum().backward()
    assert all(t.A.grad is None and t.B.grad is not None for t in terms[0])
    for f in leaves(x, terms):
        f.grad = None
    y = grouped_linear(x[:0], stack, [0] * 4, terms, [0.0, 0.5])
    y.sum().backward()
    assert y.shape == (0, 5) and all(t.B.grad is not None and not t.B.grad.any() for term in terms for t in term)


def test_factors_are_cast_to_the_rows_dtype_and_keep_gradients_of_their_own():
    x, stack, terms = setting()
    half = Stack(stack.W.bfloat16(), None)
    masters = [[Thin(t.A.detach().float().requires_grad_(), t.B.detach().float().requires_grad_()) for t in terms[0]]]
    y = grouped_linear(x.detach().bfloat16(), half, COUNTS, masters, [0.0])
    plain = by_formula(x.detach(), Stack(stack.W, None), [[Thin(t.A, t.B) for t in terms[0]]], [x.detach()])
    assert y.dtype == torch.bfloat16 and (y.double() - plain).abs().max() < 0.02 * plain.abs().max()
    y.sum().backward()
    assert all(f.grad.dtype == torch.float32 for t in masters[0] for f in (t.A, t.B))


def test_dealing_and_its_adjoint_follow_their_formulas():
    index = torch.tensor([[2, 0], [1, 2], [0, 2]])
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    deal = Deal.of(torch.argsort(index.reshape(-1), stable=True), 2)
    assert torch.equal(deal.out(x), x[[0, 2, 1, 0, 1, 2]])
    y = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    expected = torch.zeros(3, 4, dtype=torch.float64).index_add(0, torch.tensor([0, 2, 1, 0, 1, 2]), y.detach())
    assert torch.allclose(deal.back(y), expected)
    assert torch.autograd.gradcheck(deal.out, (x,)) and torch.autograd.gradcheck(deal.back, (y,))
    assert torch.autograd.gradgradcheck(deal.back, (y,))
