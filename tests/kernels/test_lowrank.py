"""The fused low-rank nodes against the plain formulas."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from peft.kernels.banked import banked_linear
from peft.kernels.lowrank import lowrank_linear
from peft.kernels.merging import row_norms
from peft.kernels.rows import Scratch, rows_linear
from peft.kernels.scaled import scaled_linear
from peft.kernels.terms import Banks, Thin
from tests.helpers.lowrank import mask, setting


@pytest.mark.parametrize("ranks", [(2,), (2, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_equal_the_plain_formula(ranks, bias):
    x, W, b, factors = setting(ranks=ranks)
    b = b if bias else None
    leaves = [x, *(t for pair in factors for t in pair)]
    fused = lowrank_linear(x, W, b, [Thin(A, B) for A, B in factors])
    plain = F.linear(x, W, b) + sum(F.linear(F.linear(x, A), B) for A, B in factors)
    assert torch.allclose(fused, plain, atol=1e-12)
    g = torch.randn_like(plain)
    for a, e in zip(torch.autograd.grad(fused, leaves, g), torch.autograd.grad(plain, leaves, g), strict=True):
        assert torch.allclose(a, e, atol=1e-12)


def test_gradients_with_dropout_follow_the_drawn_mask():
    x, W, b, factors = setting(ranks=(2,))
    torch.manual_seed(4)
    out = lowrank_linear(x, W, b, [Thin(*factors[0])], [0.5])
    torch.manual_seed(4)
    seed = int(torch.randint(2**62, (1,)).item())
    keep = mask((15, 7), 0.5, seed).view(3, 5, 7).double()
    A, B = factors[0]
    plain = F.linear(x, W, b) + F.linear(F.linear(x * keep, A), B)
    assert torch.allclose(out, plain, atol=1e-12)
    g = torch.randn_like(plain)
    for a, e in zip(torch.autograd.grad(out, (x, A, B), g), torch.autograd.grad(plain, (x, A, B), g), strict=True):
        assert torch.allclose(a, e, atol=1e-12)


def test_only_x_and_the_thin_products_are_saved():
    saved = []
    x, W, b, factors = setting(torch.float32, (2, 64), 32, 48, (4,))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lowrank_linear(x, W, b, [Thin(*factors[0])], [0.1])
    known = {x.data_ptr(), W.data_ptr(), *(t.data_ptr() for pair in factors for t in pair)}
    new = [t for t in saved if t.data_ptr() not in known]
    thin, bits = 2 * 64 * 4 * 4, 2 * 64 * 32 // 8
    assert sum(t.nbytes for t in new) == thin + bits


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("bias", [True, False])
def test_scaled_rows_equal_the_plain_formula(bias, p):
    """Dropout is on the input of the change, (c − 1) ⊙ W + c ⊙ ΔW."""
    x, W, b, [(A, B)] = setting(ranks=(2,))
    b = b if bias else None
    c = torch.rand(6, dtype=torch.float64).requires_grad_()
    torch.manual_seed(4)
    fused = scaled_linear(x, W, b, Thin(A, B, 0.7, c), p)
    torch.manual_seed(4)
    keep = mask((15, 7), p, int(torch.randint(2**62, (1,)).item())).view(3, 5, 7).double() if p else 1.0
    plain = F.linear(x, W, b) + F.linear(x * keep, c[:, None] * (W + 0.7 * B @ A) - W)
    assert torch.allclose(fused, plain, atol=1e-12)
    g = torch.randn_like(plain)
    for a, e in zip(
        torch.autograd.grad(fused, (x, A, B, c), g), torch.autograd.grad(plain, (x, A, B, c), g), strict=True
    ):
        assert torch.allclose(a, e, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_frozen_banks_equal_the_plain_formula(bias):
    x, W, b, [(A, B)] = setting(ranks=(2,))
    A, B, b = A.detach(), B.detach(), b if bias else None
    d, e = torch.randn(2, dtype=x.dtype).requires_grad_(), torch.randn(6, dtype=x.dtype).requires_grad_()
    fused = banked_linear(x, W, b, Banks(A, B, d, e, 0.7))
    plain = F.linear(x, W, b) + 0.7 * F.linear(F.linear(x, A) * d, B) * e
    assert torch.allclose(fused, plain, atol=1e-12)
    g = torch.randn_like(plain)
    for a, expected in zip(
        torch.autograd.grad(fused, (x, d, e), g), torch.autograd.grad(plain, (x, d, e), g), strict=True
    ):
        assert torch.allclose(a, expected, atol=1e-12)


def nodes():
    """name -> (node, the same in plain operations, leaves)."""
    x, W, b, [(A, B), (C, D)] = setting(batch=(4,), ranks=(2, 2))
    c, d, e = (torch.rand(n, dtype=x.dtype).requires_grad_() for n in (6, 2, 6))
    two = [Thin(A, B, 0.5), Thin(C, D, 0.5)]
    halves = [slice(0, 2), slice(2, 4)]
    top = torch.tensor([1.0, 1, 0, 0], dtype=x.dtype)[:, None]

    def delta(A, B):
        return 0.5 * F.linear(F.linear(x, A), B)

    return {
        "thin": (lambda: lowrank_linear(x, W, b, two), lambda: F.linear(x, W, b) + delta(A, B) + delta(C, D), (x, A, B, C, D)),
        "rows": (
            lambda: lowrank_linear(x, W, b, two, where=[torch.tensor([0, 1]), slice(2, 4)]),
            lambda: F.linear(x, W, b) + top * delta(A, B) + (1 - top) * delta(C, D),
            (x, A, B, C, D),
        ),
        "even rows": (
            lambda: rows_linear(x, W, b, two, halves, None, Scratch()),
            lambda: F.linear(x, W, b) + top * delta(A, B) + (1 - top) * delta(C, D),
            (x, A, B, C, D),
        ),
        "scaled": (
            lambda: scaled_linear(x, W, b, Thin(A, B, 0.5, c)),
            lambda: F.linear(x, c[:, None] * (W + 0.5 * B @ A), b),
            (x, A, B, c),
        ),
        "banks": (
            lambda: banked_linear(x, W, b, Banks(A.detach(), B.detach(), d, e, 0.7)),
            lambda: F.linear(x, W, b) + 0.7 * F.linear(F.linear(x, A.detach()) * d, B.detach()) * e,
            (x, d, e),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["thin", "rows", "even rows", "scaled", "banks"])
def test_second_derivatives_equal_those_of_the_plain_formula(name):
    """Gradient penalties and Hessian products differentiate a backward; what forward kept must not cut that off."""
    *both, leaves = nodes()[name]
    found = []
    for run in both:
        first = torch.autograd.grad(run().pow(3).sum(), leaves, create_graph=True)
        found.append((first, torch.autograd.grad(sum(g.square().sum() for g in first), leaves)))
    for ours, plain in zip(*found, strict=True):
        assert all(torch.allclose(a, e, rtol=1e-9, atol=1e-9) for a, e in zip(ours, plain, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_second_derivatives_see_the_mask_of_the_forward(p):
    x, W, b, [(A, B)] = setting(ranks=(2,))
    c = torch.rand(6, dtype=x.dtype).requires_grad_()
    for run, leaves in (
        (lambda: lowrank_linear(x, W, b, [Thin(A, B)], [p]), (x, A, B)),
        (lambda: scaled_linear(x, W, b, Thin(A, B, 0.5, c), p), (x, A, B, c)),
    ):
        y = run().square().sum()
        once = torch.autograd.grad(y, leaves, retain_graph=True)
        again = torch.autograd.grad(y, leaves, create_graph=True)
        assert all(torch.allclose(a, e, atol=1e-12) for a, e in zip(again, once, strict=True))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_one_token_without_gradients_equals_the_plain_formula(dtypes):
    """The path of decoding; in half precision the change is computed in the factors' own precision."""
    of_x, of_factors = dtypes
    x, W, b, factors = setting(torch.float32, (1, 1), 64, 48, (4, 2))
    x, W, b = x.detach().to(of_x), W.to(of_x), b.to(of_x)
    terms = [Thin(A.detach().to(of_factors), B.detach().to(of_factors), 0.5) for A, B in factors]
    with torch.no_grad():
        found = lowrank_linear(x, W, b, terms)
    exact = F.linear(x.double(), W.double(), b.double())
    for t in terms:
        exact = exact + 0.5 * F.linear(F.linear(x.double(), t.A.double()), t.B.double())
    assert found.dtype is of_x
    assert torch.allclose(found.double(), exact, rtol=4 * torch.finfo(of_x).eps, atol=40 * torch.finfo(of_x).eps)


def test_row_norms_equal_those_of_the_sum_even_where_rows_cancel():
    _, W, _, [(A, B)] = setting(torch.float32, k=64, n=48, ranks=(4,))
    A, B = A.detach(), B.detach()
    W[3] = -0.5 * (B @ A)[3] * (1 + 1e-4)
    W[4] = -0.5 * (B @ A)[4]
    expected = (W.double() + 0.5 * B.double() @ A.double()).norm(dim=1)
    found = row_norms(W, A, B, 0.5).double()
    assert torch.allclose(found[:3], expected[:3], rtol=1e-6) and torch.allclose(found[5:], expected[5:], rtol=1e-6)
    assert abs(found[3] / expected[3] - 1) < 1e-2 and found[4] < 1e-5


def test_low_precision_input_keeps_its_dtype_and_masters_get_their_own():
    x, W, b, factors = setting(torch.float32)
    x16 = x.detach().to(torch.bfloat16).requires_grad_()
    out = lowrank_linear(x16, W.bfloat16(), b.bfloat16(), [Thin(A, B) for A, B in factors])
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and x16.grad.dtype == torch.bfloat16
    assert all(t.grad.dtype == torch.float32 for pair in factors for t in pair)
