"""Rotations and reflections against the formulas that define them, written out with explicit matrices."""

from __future__ import annotations

import math

import pytest
import torch

from peft.maths.rotations import (
    ball_factors,
    butterfly,
    butterfly_places,
    cayley,
    cayley_neumann,
    compact_wy,
    leave_out,
    nearest_divisor,
    orthonormal_rows,
    reflect,
    reflect_orthonormalised,
    rotate_blocks,
    skew_symmetric,
)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def eye(n: int) -> torch.Tensor:
    return torch.eye(n, dtype=torch.float64)


def skew(*shape: int, seed: int = 0) -> torch.Tensor:
    M = drawn(*shape, shape[-1], seed=seed)
    return (M - M.mT) / 2


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


# -- skew-symmetric matrices --------------------------------------------------------------------------------------------
def test_the_upper_triangle_is_filled_row_by_row():
    upper = torch.tensor([[1.0, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 7]])
    Q = skew_symmetric(upper, 4)
    assert torch.equal(Q[0], torch.tensor([[0.0, 1, 2, 3], [-1, 0, 4, 5], [-2, -4, 0, 6], [-3, -5, -6, 0]]))
    assert torch.equal(Q, -Q.mT)
    assert Q[1, 2, 3] == 7 and Q[1].count_nonzero() == 2


def test_a_ball_bounds_the_norm_of_the_matrix_and_leaves_what_lies_inside():
    upper = torch.tensor([[3.0, 4.0, 0.0], [0.1, 0.0, 0.0]])  # ‖Q‖ = √2·5 and √2·0.1
    factors = ball_factors(upper, 1.0)
    torch.testing.assert_close(factors, torch.tensor([[1 / (5 * math.sqrt(2))], [1.0]]))
    norms = torch.linalg.matrix_norm(skew_symmetric(upper * factors, 3))
    torch.testing.assert_close(norms, torch.tensor([1.0, math.sqrt(2) * 0.1]))
    assert not ball_factors(upper.requires_grad_(), 1.0).requires_grad


# -- the Cayley transform -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("q", [0.0, 0.25, -1.0, 3.0])
def test_in_the_plane_cayley_is_the_rotation_by_twice_the_arc_tangent(q):
    """Q = [[0, q], [−q, 0]]: R = [[1 − q², −2q], [2q, 1 − q²]] / (1 + q²)."""
    R = cayley(torch.tensor([[0.0, q], [-q, 0.0]], dtype=torch.float64))
    close(R, torch.tensor([[1 - q * q, -2 * q], [2 * q, 1 - q * q]], dtype=torch.float64) / (1 + q * q))
    angle = 2 * math.atan(q)
    close(R[:, 0], torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64))


def test_cayley_is_its_definition_for_every_matrix_and_inverts_itself():
    Q = skew(2, 3, 5)
    R = cayley(Q)
    for q, r in zip(Q.flatten(0, 1), R.flatten(0, 1), strict=True):
        close(r, (eye(5) - q) @ torch.linalg.inv(eye(5) + q))
        close(r @ r.T, eye(5))
        close(torch.linalg.det(r), torch.tensor(1.0, dtype=torch.float64))
    close(cayley(-Q), R.mT)
    close((eye(5) - R) @ torch.linalg.inv(eye(5) + R), Q)


def test_the_series_has_the_terms_that_its_formula_says():
    Q = skew(2, 4)
    Q2, Q3, Q4, Q5 = (torch.linalg.matrix_power(Q, n) for n in (2, 3, 4, 5))
    one = eye(4).expand(2, 4, 4)
    expected = {
        1: one,
        2: one + 2 * Q,
        3: one + 2 * Q + 2 * Q2 + Q3,
        4: one + 2 * Q + 2 * Q2 + Q3,
        5: one + 2 * Q + 2 * Q2 + 2 * Q3 + Q4,
        6: one + 2 * Q + 2 * Q2 + 2 * Q3 + 2 * Q4 + Q5,
    }
    for terms, R in expected.items():
        close(cayley_neumann(Q, terms), R)


def test_the_series_falls_short_of_the_inverse_rotation_by_its_first_missing_power():
    Q = skew(4)
    Q = Q * 0.5 / torch.linalg.matrix_norm(Q, 2)
    for terms in (4, 5, 8):
        close(cayley_neumann(Q, terms), cayley(Q).T @ (eye(4) - torch.linalg.matrix_power(Q, terms - 1)))
    errors = [float((cayley_neumann(Q, terms) - cayley(Q).T).abs().max()) for terms in (4, 6, 8, 30)]
    assert errors[0] > errors[1] > errors[2] > errors[3] and errors[3] < 1e-8


# -- blocks and butterflies ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("leading", [(), (3,), (2, 0), (2, 3)])
def test_blocks_act_as_one_block_diagonal_matrix(leading):
    blocks, x = drawn(4, 3, 3), drawn(*leading, 12, seed=1)
    close(rotate_blocks(x, blocks), x @ torch.block_diag(*blocks))
    close(rotate_blocks(x, blocks[:1]), x @ torch.block_diag(*[blocks[0]] * 4))


def test_half_blocks_meet_where_they_lie_a_power_of_two_apart():
    """n = 16, b = 4: half-blocks 0 … 7 of two channels; which of them share a block at each level."""
    met = {}
    for level in range(3):
        places = butterfly_places(16, 4, level, torch.device("cpu"))
        assert sorted(places.tolist()) == list(range(16))
        block = (places // 4)[::2]
        assert torch.equal(block, (places // 4)[1::2])  # the channels of a half-block stay together
        met[level] = sorted(tuple((block == b).nonzero().flatten().tolist()) for b in range(4))
    assert met[0] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert met[1] == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert met[2] == [(0, 4), (1, 5), (2, 6), (3, 7)]


@pytest.mark.parametrize(("n", "b", "m"), [(12, 3, 1), (8, 4, 2), (16, 4, 3), (16, 2, 4)])
def test_a_butterfly_is_the_product_of_its_explicit_factors(n, b, m):
    blocks = drawn(m, n // b, b, b)
    B = eye(n)
    for level, own in enumerate(blocks):
        P = eye(n)
        if level:
            P = torch.zeros(n, n, dtype=torch.float64)
            half, run = b // 2, 2**level * b
            for c in range(n):
                start, (h, rest) = c - c % run, divmod(c % run, half)  # the h-th half-block of its run
                place = 2 * h if h < 2**level else 2 * (h - 2**level) + 1
                P[c, start + place * half + rest] = 1
        B = P @ torch.block_diag(*own) @ P.T @ B
    x = drawn(2, 5, n, seed=1)
    torch.testing.assert_close(butterfly(x, blocks), x @ B.T)


def test_a_full_butterfly_is_orthogonal_and_joins_every_input_with_every_output():
    blocks = cayley(skew(3, 4, 4))
    for m, reached in ((1, 4), (2, 8), (3, 16)):
        B = butterfly(eye(16), blocks[:m]).T
        close(B @ B.T, eye(16))
        assert ((B.abs() > 1e-9).sum(1) == reached).all()


def test_of_two_divisors_as_near_the_smaller_is_taken():
    assert [nearest_divisor(12, n) for n in (1, 3, 5, 7, 9, 100)] == [1, 3, 4, 6, 6, 12]  # 9 lies between 6 and 12
    assert nearest_divisor(15, 4) == 3


def test_a_share_of_the_blocks_is_left_out_rounded_down_and_of_one_factor_only():
    blocks = drawn(2, 4, 3, 3)
    thinned = leave_out(blocks, 0.6)
    gone = (thinned == eye(3)).all(-1).all(-1)
    assert sorted(gone.sum(1).tolist()) == [0, 2] and torch.equal(thinned[~gone], blocks[~gone])
    assert (leave_out(blocks[0], 0.75) == eye(3)).all(-1).all(-1).sum() == 3
    assert leave_out(blocks, 0.2) is blocks


# -- reflections --------------------------------------------------------------------------------------------------------
def chain(columns: torch.Tensor) -> torch.Tensor:
    """H₁ H₂ … H_r, reflection by reflection."""
    H = eye(len(columns))
    for u in columns.T:
        H = H @ (eye(len(columns)) - 2 * torch.outer(u, u) / (u @ u))
    return H


def test_one_reflection_turns_its_direction_round_and_keeps_what_is_orthogonal_to_it():
    u = torch.tensor([[3.0], [4.0]])
    torch.testing.assert_close(reflect(torch.tensor([3.0, 4.0]), u), torch.tensor([-3.0, -4.0]))
    torch.testing.assert_close(reflect(torch.tensor([-4.0, 3.0]), u), torch.tensor([-4.0, 3.0]))


@pytest.mark.parametrize("r", [1, 2, 5, 9])  # 9 > n: more reflections than dimensions are a product all the same
def test_reflections_are_multiplied_in_their_order(r):
    u, x = drawn(7, r), drawn(2, 3, 7, seed=1)
    H = chain(u)
    close(H @ H.T, eye(7))
    close(reflect(x, u), x @ H.T)
    if r > 1:
        assert not torch.allclose(reflect(x, u), x @ H)
    U = u / u.norm(dim=0)
    T = compact_wy(U)
    assert torch.equal(T, T.triu())
    close(eye(7) - U @ T @ U.T, H)


def test_two_equal_reflections_cancel():
    u, x = drawn(6, 1), drawn(4, 6, seed=1)
    close(reflect(x, u.expand(6, 2)), x)


def test_orthonormalised_directions_are_those_of_gram_schmidt():
    u, x = drawn(6, 3), drawn(4, 6, seed=1)
    basis: list[torch.Tensor] = []
    for column in u.T:
        for v in basis:
            column = column - (v @ column) * v
        basis.append(column / column.norm())
    close(reflect_orthonormalised(x, u), x @ chain(torch.stack(basis, dim=1)).T)
    assert not torch.allclose(reflect_orthonormalised(x, u), reflect(x, u))


# -- orthonormal rows ---------------------------------------------------------------------------------------------------
def test_rows_are_orthonormal_and_what_turns_them_into_the_matrix_is_triangular_and_positive():
    V = drawn(2, 3, 8)
    R = orthonormal_rows(V)
    close(R @ R.mT, eye(3).expand(2, 3, 3))
    L = V @ R.mT
    close(L @ R, V)
    close(L, L.tril())
    assert (L.diagonal(dim1=-2, dim2=-1) > 0).all()


def test_the_rows_are_those_of_gram_schmidt():
    R = orthonormal_rows(torch.tensor([[3.0, 4.0, 0.0], [0.0, 5.0, 5.0]]))
    second = torch.tensor([0.0, 5.0, 5.0]) - 4 * torch.tensor([0.6, 0.8, 0.0])  # its part along the first row is 4
    torch.testing.assert_close(R, torch.stack([torch.tensor([0.6, 0.8, 0.0]), second / second.norm()]))


def test_orthonormal_rows_stay_what_they_are():
    R = orthonormal_rows(drawn(3, 8))
    close(orthonormal_rows(R), R)
    close(orthonormal_rows(-R), -R)  # a bare QR could turn the signs round


HALVES = (torch.float16, torch.bfloat16)


def made(dtype):
    """A rotation of every sort, as the matrix that it multiplies rows by, from numbers of this dtype."""
    torch.manual_seed(0)
    Q = skew_symmetric(0.05 * torch.randn(3, 28), 8).to(dtype)
    eye, U = torch.eye(24, dtype=dtype), torch.randn(24, 5, dtype=torch.float32).to(dtype)
    yield "cayley", cayley(Q)
    yield "neumann", cayley_neumann(Q, 12)
    yield "blocks", rotate_blocks(eye, cayley(Q))
    yield (
        "butterfly",
        butterfly(
            torch.eye(32, dtype=dtype), cayley(skew_symmetric(torch.randn(3 * 8, 6), 4).to(dtype).view(3, 8, 4, 4))
        ),
    )
    yield "reflections", reflect(eye, U)
    yield "orthonormalised", reflect_orthonormalised(eye, U)
    yield "rows", orthonormal_rows(U.T)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_rotation_is_one_in_every_precision(dtype, autocast):
    """From numbers in half precision and under autocast, R Rᵀ = I up to what fp32 gives, in fp32 at least."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = dict(made(dtype))
    for name, R in found.items():
        assert R.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), name
        assert (R @ R.mT - torch.eye(R.shape[-2])).abs().max() < 1e-5, name
