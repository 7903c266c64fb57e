"""The Triton kernels against their formulas: interpreted on the CPU in fp32, and on a GPU where there is one.

The kernels choose their mode by the tensors' device, so nothing here sets Triton's mode for the process that other
tests run in; TRITON_INTERPRET is read when `available` is asked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", minversion="3.3")

from peft.kernels import triton_launch  # noqa: E402
from peft.kernels import triton_lowrank as K  # noqa: E402
from tests.helpers.lowrank_triton import close, draw  # noqa: E402

SEED = 0x123456789ABCDEF

SHAPES = [  # T, k, n, r: one row, one rank, ragged and whole tiles, more tiles than one, every padded rank
    (1, 8, 16, 1),
    (3, 40, 33, 1),
    (64, 128, 64, 16),
    (70, 100, 91, 3),
    (130, 65, 200, 20),
    (33, 600, 40, 64),
    (65, 72, 530, 100),
    (20, 90, 70, 256),
]


def check(t, p, s=0.7, seed=SEED):
    """Every operation of one adapter against its formula, with the mask that `mask` tells."""
    x, A, B, dy = t["x"], t["A"], t["B"], t["dy"]
    M = K.mask(x.shape, p, seed, x.device)
    h = K.shrink(x, A, p, seed)
    close(h, (M * x) @ A.T)
    y = t["y"].clone()
    assert K.expand_(y, h, B, s) is None
    close(y, t["y"] + s * h @ B.T)
    dh, dB = K.grad_h_B(dy, h, B, s)
    close(dh, s * dy @ B)
    close(dB, s * dy.T @ h)
    close(K.grad_A(dh, x, p, seed), dh.T @ (M * x))
    dx = t["dx"].clone()
    K.grad_x_(dx, dh, A, p, seed)
    close(dx, t["dx"] + M * (dh @ A))
    dx = t["dx"].clone()
    close(K.grad_A_x_(dx, dh, x, A, p, seed), dh.T @ (M * x))
    close(dx, t["dx"] + M * (dh @ A))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_operation_is_its_formula(shape, p):
    check(draw(*shape), p)


@settings(max_examples=15, deadline=None)
@given(
    T=st.integers(1, 140), k=st.integers(1, 150), n=st.integers(1, 150), r=st.integers(1, 40), p=st.floats(0.0, 0.9),
    seed=st.integers(0, 2**63 - 1),
)  # fmt: skip
def test_any_shape_rate_and_seed(T, k, n, r, p, seed):
    check(draw(T, k, n, r), p, seed=seed)


def test_the_chain_has_autograds_gradients():
    """y = base + s drop(x) Aᵀ Bᵀ: forward and backward calls in a step's order against autograd through the formula."""
    t, p, s = draw(90, 70, 60, 5), 0.2, 1.5
    x, A, B = (t[name].clone().requires_grad_() for name in "xAB")
    y = t["y"] + s * ((K.mask(x.shape, p, SEED, "cpu") * x) @ A.T) @ B.T
    y.backward(t["dy"])
    out = t["y"].clone()
    h = K.shrink(t["x"], t["A"], p, SEED)
    K.expand_(out, h, t["B"], s)
    close(out, y.detach())
    dh, dB = K.grad_h_B(t["dy"], h, t["B"], s)
    dx = torch.zeros_like(t["x"])
    dA = K.grad_A_x_(dx, dh, t["x"], t["A"], p, SEED)
    for ours, leaf in ((dx, x), (dA, A), (dB, B)):
        close(ours, leaf.grad)


def test_rows_need_not_follow_each_other():
    """Inputs are contiguous along their last axis only: slices of wider tensors are taken as they lie."""
    t = draw(40, 48, 50, 4)
    wide = {name: torch.randn(v.shape[0], v.shape[1] + 24) for name, v in t.items()}
    sliced = {name: w[:, 8 : 8 + t[name].shape[1]] for name, w in wide.items()}
    for name, v in sliced.items():
        v.copy_(t[name])
    edges = wide["y"][:, :8].clone(), wide["y"][:, 58:].clone()
    check(sliced, 0.25)
    K.expand_(sliced["y"], torch.ones(40, 4), sliced["B"], 1.0)
    close(sliced["y"], t["y"] + t["B"].sum(1))
    assert torch.equal(wide["y"][:, :8], edges[0]) and torch.equal(wide["y"][:, 58:], edges[1])


@pytest.mark.parametrize("shape", [(0, 8, 8, 4), (5, 8, 0, 4)], ids=str)
def test_nothing_to_do(shape):
    check(draw(*shape), 0.1)


def test_gradients_come_in_the_dtype_asked_for_and_weights_may_be_wider_than_x():
    t = draw(70, 40, 50, 6)
    half = {name: v.half() for name, v in t.items()}
    h = K.shrink(half["x"], t["A"], 0.0, 0)  # an fp32 master next to a half-precision activation
    assert h.dtype == torch.float16
    close(h.float(), half["x"].float() @ half["A"].float().T, 2e-3)
    dh, dB = K.grad_h_B(half["dy"], h, t["B"], 1.0, torch.float32)
    assert (dh.dtype, dB.dtype) == (torch.float16, torch.float32)
    close(dB, half["dy"].float().T @ h.float(), 1e-5)  # not rounded to half precision on its way
    assert K.grad_A(dh, half["x"], 0.0, 0).dtype == torch.float16
    assert K.grad_A(dh, half["x"], 0.0, 0, torch.float32).dtype == torch.float32


def philox(counter, key):
    """Philox4x32-10 as its paper defines it, in Python's integers."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k1, a & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


def test_the_reference_generator_gives_the_published_vectors():
    assert philox((0, 0, 0, 0), (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert philox((ones,) * 4, (ones, ones)) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("seed", [0, 1, SEED, 2**63 - 1, 0xFFFFFFFF])
def test_the_mask_is_philox_of_seed_row_and_column(seed):
    T, k, p = 5, 83, 0.4
    M = K.mask((T, k), p, seed, "cpu")
    threshold = round(p * 65536)
    for t in range(T):
        for c in range(k):
            words = philox((c // 8, t, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))
            lane = c % 8
            order = (0, 2, 1, 3)  # how the draws of a group are laid side by side
            bits = words[sorted(range(4), key=order.index)[lane // 2]] >> (16 * (lane % 2)) & 0xFFFF
            want = 65536 / (65536 - threshold) if bits >= threshold else 0.0
            assert M[t, c].item() == pytest.approx(want), (t, c)


def test_the_mask_has_its_rate_everywhere_and_no_pattern():
    n, p = 256, 0.3
    M = K.mask((n, n), p, SEED, "cpu")
    assert M.unique().tolist() == pytest.approx([0.0, 1 / (1 - round(p * 65536) / 65536)])
    keep = (M > 0).double()
    sigma = (p * (1 - p)) ** 0.5

    def near(mean, count, expected=1 - p, s=sigma):
        assert abs(mean - expected) < 5 * s / count**0.5

    near(keep.mean(), n * n)
    for lane in range(8):  # each of the eight columns that share a draw
        near(keep[:, lane::8].mean(), n * n / 8)
    z = (keep - keep.mean()) / sigma
    for dt, dc in [(0, 1), (0, 2), (0, 3), (0, 4), (0, 7), (0, 8), (1, 0), (8, 0), (1, 1), (64, 0), (0, 64)]:
        near((z[: n - dt, : n - dc] * z[dt:, dc:]).mean(), (n - dt) * (n - dc), 0.0, 1.0)
    for other in (SEED + 1, SEED + 2**32):  # both halves of the seed count
        near((z * ((K.mask((n, n), p, other, "cpu") > 0).double() - (1 - p)) / sigma).mean(), n * n, 0.0, 1.0)


def test_forward_and_both_backwards_draw_the_same_mask():
    """With identities for factors the kernels show their masks; the shapes take several of every kernel's blocks."""
    k, p = 136, 0.25
    eye, ones = torch.eye(k), torch.ones(k, k)
    M = K.mask((k, k), p, SEED, "cpu")
    assert 0.2 < (M == 0).float().mean() < 0.3
    assert torch.equal(K.shrink(ones, eye, p, SEED), M)
    assert torch.equal(K.grad_A(eye, ones, p, SEED), M)
    dx = torch.zeros(k, k)
    K.grad_x_(dx, eye, ones, p, SEED)
    assert torch.equal(dx, M)
    dx = torch.zeros(k, k)
    assert torch.equal(K.grad_A_x_(dx, eye, ones, ones, p, SEED), M)
    assert torch.equal(dx, M)


def test_the_mask_depends_on_row_and_column_not_on_the_shape():
    big = K.mask((150, 300), 0.5, SEED, "cpu")
    assert torch.equal(K.mask((70, 100), 0.5, SEED, "cpu"), big[:70, :100])
    assert torch.equal(K.mask((3, 50, 300), 0.5, SEED, "cpu"), big.view(3, 50, 300))


def test_the_ends_of_the_range_of_p():
    t = draw(30, 40, 20, 4)
    assert torch.equal(K.mask((30, 40), 0.0, SEED, "cpu"), torch.ones(30, 40))
    assert not K.mask((30, 40), 1.0, SEED, "cpu").any()
    assert not K.shrink(t["x"], t["A"], 1.0, SEED).any()
    assert not K.grad_A(torch.ones(30, 4), t["x"], 1.0, SEED).any()
    dx = t["dx"].clone()
    K.grad_x_(dx, torch.ones(30, 4), t["A"], 1.0, SEED)
    assert torch.equal(dx, t["dx"])


def outputs(t, p):
    h = K.shrink(t["x"], t["A"], p, SEED)
    dh, dB = K.grad_h_B(t["dy"], h, t["B"], 0.5)
    dx = t["dx"].clone()
    return [h, dh, dB, K.grad_A_x_(dx, dh, t["x"], t["A"], p, SEED), dx]


def test_the_same_call_gives_the_same_bits():
    t = draw(130, 520, 530, 8)
    for a, b in zip(outputs(t, 0.1), outputs(t, 0.1)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("processors", [1, 64])
def test_how_sums_are_split_changes_rounding_only(processors, monkeypatch):
    t = draw(130, 520, 530, 8)
    want = outputs(t, 0.1)
    monkeypatch.setattr(K, "processors", lambda device: processors)
    for a, b in zip(outputs(t, 0.1), want):
        close(a, b)


CASES = {  # ranks, rows of each, rows before and after that are nobody's
    "one": ([4], [30], 0, 0),
    "ragged": ([4, 1, 16, 7], [3, 70, 1, 65], 0, 0),
    "an adapter without rows, and rows of the base": ([4, 8, 0, 2], [20, 0, 9, 5], 0, 0),
    "rows that are nobody's": ([3, 5], [10, 12], 4, 6),
    "decode": ([8, 4, 2, 8, 1], [1, 1, 1, 1, 1], 0, 0),
    "wide": ([40, 64, 33], [17, 20, 80], 0, 0),
}


def grouped(case, k=90, n=75, device="cpu"):
    ranks, rows, before, after = CASES[case]
    g = torch.Generator().manual_seed(len(case))
    A = [torch.randn(r, k, generator=g).to(device) for r in ranks]
    B = [torch.randn(n, r, generator=g).to(device) for r in ranks]
    offsets = [before]
    for count in rows:
        offsets.append(offsets[-1] + count)
    T = offsets[-1] + after
    t = {name: torch.randn(T, c, generator=g).to(device) for name, c in dict(x=k, y=n, dy=n, dx=k).items()}
    scales = (torch.rand(len(ranks), generator=g) + 0.5).to(device)
    return A, B, torch.tensor(ranks, dtype=torch.int32, device=device), scales, torch.tensor(offsets).int(), t


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("case", CASES)
def test_each_row_has_its_own_adapter(case, p):
    A, B, ranks, scales, offsets, t = grouped(case)
    R = max(CASES[case][0])
    segments = K.Segments(offsets, t["x"].device)
    pa, pb = K.pointers(A), K.pointers(B)
    M = K.mask(t["x"].shape, p, SEED, "cpu")

    leaves = {name: t[name].clone().requires_grad_() for name in ("x",)}
    As, Bs = [a.clone().requires_grad_() for a in A], [b.clone().requires_grad_() for b in B]
    want, hidden = t["y"].clone(), torch.zeros(len(t["x"]), R)
    for i, (lo, hi) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:])):
        hi_i = (M * leaves["x"])[lo:hi] @ As[i].T
        hidden[lo:hi, : As[i].shape[0]] = hi_i.detach()
        want = torch.cat([want[:lo], want[lo:hi] + scales[i] * hi_i @ Bs[i].T, want[hi:]])
    torch.autograd.backward(want, t["dy"])

    for given_offsets in (segments, offsets):
        h = K.grouped_shrink(t["x"], pa, ranks, given_offsets, R, p, SEED)
        close(h, hidden)
        y = t["y"].clone()
        K.grouped_expand_(y, h, pb, ranks, scales, given_offsets)
        close(y, want.detach())
    dx = t["dx"].clone()
    dA, dB = K.grouped_grads(t["dy"], t["x"], h, pa, pb, ranks, scales, segments, dx, p, SEED)
    close(dx, t["dx"] + leaves["x"].grad)
    for i, r in enumerate(CASES[case][0]):
        zero_A, zero_B = torch.zeros_like(A[i]), torch.zeros_like(B[i])
        close(dA[i, :r], zero_A if As[i].grad is None else As[i].grad)
        close(dB[i, :, :r], zero_B if Bs[i].grad is None else Bs[i].grad)
        assert not dA[i, r:].any() and not dB[i, :, r:].any()
    again = K.grouped_grads(t["dy"], t["x"], h, pa, pb, ranks, scales, segments, None, p, SEED)
    assert torch.equal(again[0], dA) and torch.equal(again[1], dB)


def test_one_adapter_for_all_rows_is_the_plain_operation():
    A, B, ranks, scales, offsets, t = grouped("one")
    h = K.grouped_shrink(t["x"], K.pointers(A), ranks, offsets, 4)
    close(h, K.shrink(t["x"], A[0], 0.0, 0))
    plain, many = t["y"].clone(), t["y"].clone()
    K.expand_(plain, h, B[0], scales[0].item())
    K.grouped_expand_(many, h, K.pointers(B), ranks, scales, offsets)
    close(many, plain)


def test_addresses_are_of_weights_that_the_kernels_can_read():
    good = torch.randn(4, 8)
    assert K.pointers([good, None, good[:0]]).tolist() == [good.data_ptr(), 0, 0]
    with pytest.raises(ValueError, match="contiguous"):
        K.pointers([good.T])
    with pytest.raises(ValueError, match="16 bytes"):
        K.pointers([torch.randn(33)[1:].view(4, 8)])
    with pytest.raises(ValueError, match="dtype"):
        K.pointers([good, good.half()])


def test_tiles_cover_every_segment_once():
    segments = K.Segments([2, 2, 140, 141], torch.device("cpu"))
    table, first = segments.tiles(64)
    assert table.tolist() == [[1, 2, 66], [1, 66, 130], [1, 130, 140], [2, 140, 141]]
    assert first.tolist() == [0, 0, 3, 4]
    assert segments.tiles(64)[0] is table  # made once a batch, not once a layer


def test_available_on_the_cpu_under_the_interpreter_alone(monkeypatch):
    x = torch.zeros(2, 2)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not triton_launch.available(x)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_launch.available(x) and triton_launch.available(x.half())
    assert (
        not triton_launch.available(x.double())
        and not triton_launch.available(x.bfloat16())
        and not triton_launch.available(x.int())
    )


def test_the_module_imports_without_triton():
    code = """
        import sys
        sys.modules["triton"] = None  # importing it raises
        import torch
        from peft.kernels import triton_launch, triton_lowrank
        assert not triton_launch.available(torch.zeros(2, 2))
    """
    env_code = 'import os; os.environ["TRITON_INTERPRET"] = "1"\n' + textwrap.dedent(code)
    subprocess.run([sys.executable, "-c", env_code], check=True)


def specimens():
    """Each kernel plain, and with everything that can be compiled in: in both widths, and for sizes of one."""
    for name in ("_mask", "_total", "_shrink", "_expand", "_both", "_grad"):
        options = tuple(o for o in ("GROUPED", "DROP", "ADD") if o in triton_launch.kernels(False)[name].arg_names)
        yield name, (), torch.bfloat16, 16
        if options:
            yield from (
                (name, options, *rest) for rest in ((torch.bfloat16, 16), (torch.bfloat16, 1), (torch.float32, 16))
            )


@pytest.mark.slow
@pytest.mark.parametrize("name,options,dtype,ints", list(specimens()), ids=str)
def test_the_kernels_compile_for_a_gpu(name, options, dtype, ints):
    """Compiled for sm_80, which needs no GPU, and small enough for the shared memory of the smallest such GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    fn, width = triton_launch.kernels(False)[name], 32
    b = K.blocks(name, width, dtype.itemsize)
    element = "*bf16" if dtype == torch.bfloat16 else "*fp32"
    many, add = "GROUPED" in options, "ADD" in options
    constants = dict(
        GROUPED=many, DROP="DROP" in options, ADD=add, RANK_ROWS=name != "_expand", W_TYPE=triton_launch.triton_type(dtype),
        PRECISION="tf32x3", BLOCK_T=b.rows, BLOCK_C=b.columns, BLOCK_R=width, STEP=width, BLOCK=512,
    )  # fmt: skip
    pointers = dict.fromkeys(("x", "y", "dy", "h", "out"), element) | dict.fromkeys(("dh", "dw", "part"), "*fp32")
    pointers |= dict(
        w="*i64" if many else element, tiles="*i32", ranks="*i32", first="*i32", scales="*fp32", dx=element
    )
    absent = (() if many else ("tiles", "ranks", "first", "scales")) + (() if add or name != "_grad" else ("dx", "w"))
    free = ("seed_lo", "seed_hi", "threshold", "count")
    signature, values, hints = {}, {}, {}
    for i, arg in enumerate(fn.arg_names):
        if arg in constants or arg in absent:
            signature[arg], values[(i,)] = "constexpr", constants.get(arg)
        elif arg in pointers:
            signature[arg], hints[(i,)] = pointers[arg], [["tt.divisibility", 16]]
        elif arg == "scale":
            signature[arg] = "fp32"
        elif ints == 1 and arg not in free:  # what a launch makes of sizes of one
            signature[arg], values[(i,)] = "constexpr", 1
        else:
            signature[arg] = "i32"
            if arg not in free:
                hints[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=fn, signature=signature, constexprs=values, attrs=hints)
    made = compile(source, target=GPUTarget("cuda", 80, 32), options=dict(num_warps=b.warps, num_stages=b.stages))
    assert made.asm["cubin"] and made.metadata.shared <= 99 * 1024


@pytest.mark.slow
def test_the_benchmark_for_a_gpu_runs_dry(tmp_path):
    root, out = Path(__file__).resolve().parents[2], tmp_path / "gpu.json"
    library = str(Path(K.__file__).resolve().parents[2])
    paths = os.pathsep.join([library, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "decode",
        "ops",
        "--upstream",
        "none",
        "--out",
        str(out),
        "--dry-run",
    ]
    subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": paths}, check=True, timeout=600)
    results = json.loads(out.read_text())["results"]
    assert [r["job"]["variant"] for r in results] == ["ours, torch", "ours, Triton", "ours, Triton"]
    assert not any({"error", "refused"} & set(r["found"]) for r in results)
    assert {r["op"] for r in results[-1]["found"]["rows"]} >= {"shrink", "expand_", "grad_h_B", "grad_A", "grad_x_"}
    assert "grouped_shrink" in out.with_suffix(".md").read_text()


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


class TestGPU:
    pytestmark = gpu

    @pytest.mark.parametrize("p", [0.0, 0.05])
    @pytest.mark.parametrize("shape", [*SHAPES, (1000, 4096, 1024, 16), (513, 1024, 4096, 200)], ids=str)
    def test_fp32(self, shape, p):
        t = {name: v / v.shape[1] ** 0.5 for name, v in draw(*shape, "cuda").items()}
        assert triton_launch.available(t["x"])
        check(t, p)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("p", [0.0, 0.05])
    @pytest.mark.parametrize("shape", [*SHAPES, (1000, 4096, 1024, 16), (513, 1024, 4096, 200)], ids=str)
    def test_half_precision_against_fp32(self, shape, p, dtype):
        t = {name: (v / v.shape[1] ** 0.5).to(dtype) for name, v in draw(*shape, "cuda").items()}
        f = {name: v.float() for name, v in t.items()}
        M = K.mask(t["x"].shape, p, SEED, "cuda")
        tol = 2e-2 if dtype == torch.bfloat16 else 3e-3
        h = K.shrink(t["x"], t["A"], p, SEED)
        close(h.float(), (M * f["x"]) @ f["A"].T, tol)
        y = t["y"].clone()
        K.expand_(y, h, t["B"], 0.7)
        close(y.float(), f["y"] + 0.7 * h.float() @ f["B"].T, tol)
        dh, dB = K.grad_h_B(t["dy"], h, t["B"], 0.7, torch.float32)
        close(dh.float(), 0.7 * f["dy"] @ f["B"], tol)
        close(dB, 0.7 * f["dy"].T @ h.float(), tol)
        dx = t["dx"].clone()
        dA = K.grad_A_x_(dx, dh, t["x"], t["A"], p, SEED, torch.float32)
        close(dA, dh.float().T @ (M * f["x"]), tol)
        close(dx.float(), f["dx"] + M * (dh.float() @ f["A"]), tol)
        close(K.grad_A(dh, t["x"], p, SEED, torch.float32), dA, 1e-5)

    def test_the_mask_is_the_interpreters(self):
        assert torch.equal(K.mask((100, 333), 0.3, SEED, "cuda").cpu(), K.mask((100, 333), 0.3, SEED, "cpu"))

    def test_the_same_call_gives_the_same_bits(self):
        t = {name: v.bfloat16() for name, v in draw(3000, 4096, 1024, 16, "cuda").items()}
        for a, b in zip(outputs(t, 0.1), outputs(t, 0.1)):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("case", CASES)
    def test_adapters_of_a_batch(self, case):
        A, B, ranks, scales, offsets, t = grouped(case, 256, 320, "cuda")
        R = max(CASES[case][0])
        pa, pb = K.pointers(A), K.pointers(B)
        h = K.grouped_shrink(t["x"], pa, ranks, offsets, R)
        dx = t["dx"].clone()
        y = t["y"].clone()
        K.grouped_expand_(y, h, pb, ranks, scales, offsets)
        dA, dB = K.grouped_grads(t["dy"], t["x"], h, pa, pb, ranks, scales, offsets, dx)
        for i, (lo, hi) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:])):
            r = CASES[case][0][i]
            x, dy = t["x"][lo:hi], t["dy"][lo:hi]
            close(h[lo:hi, :r], x @ A[i].T, 1e-4)
            close(y[lo:hi], t["y"][lo:hi] + scales[i] * (x @ A[i].T) @ B[i].T, 1e-4)
            dh = scales[i] * dy @ B[i]
            close(dA[i, :r], dh.T @ x, 1e-4)
            close(dB[i, :, :r], scales[i] * dy.T @ h[lo:hi, :r], 1e-4)
            close(dx[lo:hi], t["dx"][lo:hi] + dh @ A[i], 1e-4)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_fused_node_takes_these_kernels_where_they_run(monkeypatch, p, frozen):
    from peft.kernels.lowrank import lowrank_linear
    from peft.kernels.terms import Thin

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    t = draw(20, 24, 18, 5)
    x, A, B = t["x"].requires_grad_(not frozen), t["A"].requires_grad_(), t["B"].requires_grad_()
    W, b = torch.randn(18, 24), torch.randn(18)
    asked = []
    monkeypatch.setattr(K, "shrink", lambda *a, f=K.shrink: asked.append(a) or f(*a))
    y = lowrank_linear(x, W, b, [Thin(A, B, 0.7)], [p])
    (seed,) = [a[3] for a in asked]
    plain = x @ W.T + b + 0.7 * (K.mask(x.shape, p, seed, x.device) * x) @ A.T @ B.T
    close(y, plain)
    leaves = [A, B] if frozen else [x, A, B]
    for a, e in zip(torch.autograd.grad(y, leaves, t["dy"]), torch.autograd.grad(plain, leaves, t["dy"]), strict=True):
        close(a, e)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "a slice"])
def test_entries_of_a_row_need_not_lie_side_by_side(monkeypatch, layout):
    """What comes from a transpose, and the gradient that a sum sends back, which is one number for all entries."""
    from peft.kernels.lowrank import lowrank_linear
    from peft.kernels.terms import Thin

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    t = draw(20, 24, 18, 5)
    x = {
        "transposed": t["x"].T.contiguous().T,
        "expanded": t["x"][:, :1].expand(20, 24),
        "a slice": torch.randn(20, 48)[:, ::2],
    }[layout]
    x, A, B = x.requires_grad_(), t["A"].requires_grad_(), t["B"].T.contiguous().T.requires_grad_()
    W = torch.randn(18, 24)
    y, plain = lowrank_linear(x, W, None, [Thin(A, B, 0.7)]), x @ W.T + 0.7 * x @ A.T @ B.T
    close(y, plain)
    for loss in (lambda y: y.sum(), lambda y: (y.T.contiguous().T * t["dy"]).sum()):
        found, wanted = (torch.autograd.grad(loss(v), [x, A, B], retain_graph=True) for v in (y, plain))
        for a, e in zip(found, wanted, strict=True):
            close(a, e)
    with pytest.raises(ValueError, match="side by side"):
        K.expand_(torch.zeros(18, 20).T, torch.ones(20, 5), B, 1.0)
