"""The kernels themselves, interpreted: their formulas in whatever tiles, and what keeps them free of Triton's mode.

`test_triton_lowrank` runs them in the tiles that launches choose.
"""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", minversion="3.3")

from peft.kernels import triton_kernels  # noqa: E402
from peft.kernels.triton_kernels import FREE, HELPERS, KERNELS  # noqa: E402
from peft.kernels.triton_launch import drop_arguments, kernels, triton_type  # noqa: E402
from tests.helpers.lowrank_triton import close, draw  # noqa: E402

TILES = [(16, 16), (32, 64), (128, 16)]  # rows and columns; the tensors have more of both, or fewer
PLAIN = {"GROUPED": False, "PRECISION": "ieee"}


def launch(name: str, grid: tuple[int, ...], *args: object, **constants: object) -> None:
    """A kernel run by Triton's interpreter."""
    kernels(True)[name][grid](*args, **constants)


def drawn() -> tuple[dict[str, Tensor], dict[str, object], int]:
    t = draw(70, 50, 40, 5)
    return t, {"W_TYPE": triton_type(torch.float32), **PLAIN, "BLOCK_R": 16}, 5


def masked(shape: torch.Size, p: float, seed: int, rows: int = 32, columns: int = 64) -> Tensor:
    out = torch.full(shape, float("nan"))
    _, random, undo = drop_arguments(p, seed)
    T, k = shape
    launch("_mask", (-(-T // rows), -(-k // columns)), out, T, k, *random, undo, BLOCK_T=rows, BLOCK_C=columns)
    return out


# -- formulas -------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("rows", "columns"), TILES)
def test_the_mask_is_the_same_in_all_tiles(rows, columns):
    whole, p = masked(torch.Size((70, 50)), 0.25, 7), 0.25
    assert torch.equal(masked(torch.Size((70, 50)), p, 7, rows, columns), whole)
    assert whole.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)])
    assert abs(float((whole == 0).float().mean()) - p) < 5 * (p * (1 - p) / 3500) ** 0.5


@pytest.mark.parametrize(("rows", "columns"), TILES)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_shrink_is_its_formula_in_parts(rows, columns, p):
    """h[part] = s (M ⊙ x) Aᵀ over the part's columns; the parts add up to all of it."""
    t, more, r = drawn()
    x, A, span, s = t["x"], t["A"], columns, 0.7
    parts = -(-50 // span)
    h = torch.full((parts, 70, r), float("nan"))
    drop, random, undo = drop_arguments(p, 7)
    launch(
        "_shrink", (-(-70 // rows), parts), x, A, h, None, None, None, 70, 50, r, r, 50, 50, span, s * undo, *random,
        RANK_ROWS=True, DROP=drop, BLOCK_T=rows, BLOCK_C=columns, **more,
    )  # fmt: skip
    M = masked(x.shape, p, 7) if p else torch.ones_like(x)
    for i, part in enumerate(h):
        at = slice(i * span, (i + 1) * span)
        close(part, s * (M * x)[:, at] @ A[:, at].T)
    close(h.sum(0), s * (M * x) @ A.T)


@pytest.mark.parametrize(("rows", "columns"), TILES)
@pytest.mark.parametrize("rank_rows", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_expand_adds_its_formula(rows, columns, rank_rows, p):
    """y += s M ⊙ (h w), with the weight as [rank, columns] or as [columns, rank]."""
    t, more, r = drawn()
    h, y = torch.randn(70, r), t["y"].clone()
    w = t["B"].T.contiguous() if rank_rows else t["B"]
    drop, random, undo = drop_arguments(p, 7)
    launch(
        "_expand", (-(-70 // rows), -(-40 // columns)), y, h, w, None, None, None, 70, 40, r, 40, r, w.stride(0),
        0.7 * undo, *random, RANK_ROWS=rank_rows, DROP=drop, BLOCK_T=rows, BLOCK_C=columns, STEP=16, **more,
    )  # fmt: skip
    M = masked(y.shape, p, 7) if p else torch.ones_like(y)
    close(y, t["y"] + 0.7 * M * (h @ t["B"].T))


@pytest.mark.parametrize(("rows", "columns"), TILES)
def test_both_gradients_come_from_one_read(rows, columns):
    """dh = s dy B over all columns, and dB = dyᵀ h tile by tile of rows."""
    t, more, r = drawn()
    dy, B, h, tiles = t["dy"], t["B"], torch.randn(70, r), -(-70 // rows)
    dh, dB = torch.full((1, 70, r), float("nan")), torch.full((tiles, 40, r), float("nan"))
    launch(
        "_both", (tiles, 1), dy, h, B, dh, dB, None, None, None, 70, 40, r, r, 40, r, r, 40 + columns, 0.7,
        BLOCK_T=rows, BLOCK_C=columns, **more,
    )  # fmt: skip
    close(dh[0], 0.7 * dy @ B)
    for i, tile in enumerate(dB):
        at = slice(i * rows, (i + 1) * rows)
        close(tile, dy[at].T @ h[at])


@pytest.mark.parametrize(("rows", "columns"), TILES)
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("rank_rows", [True, False])
def test_a_weights_gradient_and_what_is_added_to_the_inputs(rows, columns, add, rank_rows):
    """dA = s dhᵀ (M ⊙ x) per chunk of rows, or its transpose; with ADD also dx += s M ⊙ (dh A)."""
    t, more, r = drawn()
    x, A, dx, dh, chunk, p = t["x"], t["A"], t["dx"].clone(), torch.randn(70, r), 48, 0.25
    dA = torch.full((2, r, 50) if rank_rows else (2, 50, r), float("nan"))
    drop, random, undo = drop_arguments(p, 7)
    launch(
        "_grad", (2, -(-50 // columns)), x, dh, dA, dx, A, None, None, 70, 50, r, r, chunk, 50, r, 50, 50, 0.7 * undo,
        *random, RANK_ROWS=rank_rows, DROP=drop, ADD=add, BLOCK_T=rows, BLOCK_C=columns, **more,
    )  # fmt: skip
    M = masked(x.shape, p, 7)
    for part, at in ((dA[0], slice(0, 48)), (dA[1], slice(48, 70))):
        expected = 0.7 * dh[at].T @ (M * x)[at]
        close(part, expected if rank_rows else expected.T)
    close(dx, t["dx"] + 0.7 * M * (dh @ A) if add else t["dx"])


def test_partial_sums_are_added_up_per_adapter():
    part = torch.randn(7, 21)
    out = torch.full((21,), float("nan"))
    launch("_total", (2, 1), part, out, None, None, 21, 7, 0.5, GROUPED=False, BLOCK=16)
    close(out, 0.5 * part.sum(0))
    first, scales = torch.tensor([0, 2, 2, 7], dtype=torch.int32), torch.tensor([2.0, 3.0, -1.0])
    each = torch.full((3, 21), float("nan"))
    launch("_total", (2, 3), part, each, first, scales, 21, 7, 0.5, GROUPED=True, BLOCK=16)
    close(each, torch.stack([part[:2].sum(0), torch.zeros(21), -0.5 * part[2:].sum(0)]))  # the second has no rows


# -- what keeps them free of a mode -----------------------------------------------------------------------------------------------
TREE = ast.parse(inspect.getsource(triton_kernels))


def test_every_function_is_listed():
    defined = [n.name for n in TREE.body if isinstance(n, ast.FunctionDef)]
    assert sorted(defined) == sorted(f.__name__ for f in (*HELPERS, *KERNELS))


def test_only_primitives_of_the_language_are_used():
    """Its library functions are bound to one mode when Triton is imported."""
    from triton.language.core import constexpr, is_builtin

    used = {n.attr for n in ast.walk(TREE) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "tl"}
    known = {name: getattr(triton.language, name) for name in used}
    assert {"load", "store", "dot"} <= used
    library = {n for n, f in known.items() if not (is_builtin(f) or isinstance(f, (triton.language.dtype, type)))}
    assert not library and known["constexpr"] is constexpr


def test_capitals_are_constants_and_what_is_free_is_none():
    for f in KERNELS:
        for name, parameter in inspect.signature(f).parameters.items():
            constant = str(parameter.annotation) == "tl.constexpr"
            assert constant == (name.isupper() and len(name) > 1), (f.__name__, name)
            assert not (constant and name in FREE)
    assert set(FREE) <= {n for f in KERNELS for n in inspect.signature(f).parameters}


def test_reading_them_imports_no_triton():
    code = "import sys, peft.kernels.triton_kernels as k; assert k.tl is None; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
