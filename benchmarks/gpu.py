"""python -m benchmarks.gpu: Llama-3-8B's layers on a GPU, with and without the Triton kernels, beside upstream.

Needs CUDA. One process per library and variant, so that peaks of memory do not mix. Each checks its outputs against
those of the first before it times anything. Times are medians of CUDA events around a call.

  step      forward and backward of 1 and 4 decoder layers (hidden 4096, 8 key-value heads of 32, inner 14336), T=8192,
            r=16 on all seven projections, bf16, without and with dropout: ÷ the frozen layers, and the peak of memory
            above what lies there before the step
  grouped   a batch whose rows use 16 or 64 adapters ÷ the same batch with one
  decode    host time per layer at T=1, beyond the frozen layer's
  ops       every kernel beside the same formula in torch operations, over T
  tune      (only when named) every kernel with other block sizes, best first
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .models import Stack, gradients, lora, randomise
from .session import ROOT, our_library

SECTIONS = ("step", "grouped", "decode", "ops")
TORCH, TRITON, UPSTREAM, UPSTREAM_HALF = "ours, torch", "ours, Triton", "upstream", "upstream, bf16 adapters"
VARIANTS = (TORCH, TRITON, UPSTREAM, UPSTREAM_HALF)


# -- sizes and clocks --------------------------------------------------------------------------------------------------
class Setting:
    """What differs between a measurement and a dry run, which shows on a CPU that everything runs."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.dtype = torch.float32 if dry else torch.bfloat16
        self.hidden, self.inner, self.heads, self.groups = (64, 96, 4, 2) if dry else (4096, 14336, 32, 8)
        self.batch, self.length = (2, 16) if dry else (4, 2048)
        self.repeats, self.warm = (2, 1) if dry else (20, 4)

    def sync(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def times(self, call: Callable[[], Any]) -> list[float]:
        """Milliseconds of each repeat on the device."""
        for _ in range(self.warm):
            call()
        self.sync()
        found = []
        for _ in range(self.repeats):
            if self.dry:
                start = time.perf_counter()
                call()
                found.append(1e3 * (time.perf_counter() - start))
                continue
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end))
        return found

    def host(self, call: Callable[[], Any], times: int = 50) -> list[float]:
        """Microseconds that the host is busy with one call; the device is waited for outside."""
        for _ in range(self.warm):
            call()
        found = []
        for _ in range(self.repeats):
            self.sync()
            start = time.perf_counter()
            for _ in range(2 if self.dry else times):
                call()
            found.append(1e6 * (time.perf_counter() - start) / (2 if self.dry else times))
        return found

    def peak(self, call: Callable[[], Any]) -> float:
        """MiB above what is allocated before the call."""
        if self.dry:
            call()
            return 0.0
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def randn(self, *shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
        """From the CPU's generator: the same values in every process."""
        g = torch.Generator().manual_seed(seed)
        return (torch.randn(shape, generator=g) * scale).to(self.device, self.dtype)


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"median": statistics.median(ordered), "low": ordered[0], "high": ordered[-1]}


# -- in a worker -------------------------------------------------------------------------------------------------------
class Differs(Exception):
    """This variant computes something else than the first; its times would mean nothing."""


@contextlib.contextmanager
def kernels(variant: str) -> Iterator[list[str]]:
    """Let the library use its Triton kernels, or not; lists the kernels that it launched."""
    launched: list[str] = []
    if variant not in (TORCH, TRITON):
        yield launched
        return
    from peft.kernels import triton_launch, triton_lowrank

    available, launch = triton_launch.available, triton_lowrank.launch

    def counted(name: str, *args: Any, **kwargs: Any) -> None:
        launched.append(name)
        launch(name, *args, **kwargs)

    triton_lowrank.launch = counted
    if variant == TORCH:
        triton_launch.available = lambda x: False
    try:
        yield launched
    finally:
        triton_launch.available, triton_lowrank.launch = available, launch


def same(found: dict[str, Tensor], reference: Path, tolerance: float) -> float:
    """The largest relative difference to the first variant's outputs, which are written if this is the first."""
    found = {k: v.detach().float().cpu() for k, v in found.items()}
    if any(not v.isfinite().all() for v in found.values()):
        raise Differs("not finite")
    if not reference.exists():
        torch.save(found, reference)
        return 0.0
    want = torch.load(reference)
    if found.keys() != want.keys():
        raise Differs(f"other keys: {sorted(found.keys() ^ want.keys())[:4]}")
    errors = {k: float((found[k] - want[k]).norm() / want[k].norm().clamp_min(1e-30)) for k in found}
    worst = max(errors, key=lambda k: errors[k])
    if errors[worst] > tolerance:
        raise Differs(f"{worst} differs by {errors[worst]:.1e} relative, at most {tolerance:g} is allowed")
    return errors[worst]


def adapt(base: Any, variant: str, **settings: Any) -> Any:
    from peft import get_peft_model

    model = get_peft_model(base, lora(16, **settings), autocast_adapter_dtype=variant != UPSTREAM_HALF)
    return randomise(model.train())


def decoder(s: Setting, layers: int) -> Any:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=s.hidden,
        num_hidden_layers=layers,
        intermediate_size=s.inner,
        num_attention_heads=s.heads,
        num_key_value_heads=s.groups,
        vocab_size=128,
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with torch.device(s.device):
        return LlamaModel(config).to(s.dtype).requires_grad_(False).train()


def measure_step(s: Setting, job: dict[str, Any]) -> dict[str, Any]:
    x = s.randn(s.batch, s.length, s.hidden, seed=1)
    x.requires_grad_()  # as in the middle of a model: a gradient is handed on
    dy = s.randn(s.batch, s.length, s.hidden, seed=2)
    base = decoder(s, job["layers"])

    def measured(model: Any) -> dict[str, Any]:
        def step() -> None:
            model(inputs_embeds=x).last_hidden_state.backward(dy)
            x.grad = None
            for p in trained:
                p.grad = None

        trained = [p for p in model.parameters() if p.requires_grad]
        return {"ms": spread(s.times(step)), "MiB": s.peak(step)}

    found = {"floor": measured(base)}
    model = adapt(base, job["variant"], lora_dropout=job["dropout"])
    with kernels(job["variant"]) as launched:
        model.eval()
        y = model(inputs_embeds=x).last_hidden_state
        y.backward(dy)
        outputs = {"y": y, "dx": x.grad, **gradients(model)}
        found["difference"] = same(outputs, Path(job["reference"]), 1e-3 if s.dry else 6e-2)
        del outputs
        x.grad = None
        model.train()
        if job["dropout"]:
            with torch.no_grad():
                draws = [model(inputs_embeds=x).last_hidden_state.float() for _ in range(16)]
            one, mean = (draws[0] - y).norm(), (torch.stack(draws).mean(0) - y).norm()
            if not 0 < mean < 0.6 * one:  # a quarter if draws are independent and right in the mean
                raise Differs(f"the mean of 16 dropouts is {mean / one:.2f} as far from no dropout as one of them")
            del draws
        del y
        launched.clear()
        found["adapted"] = measured(model)
    found["ratio"] = found["adapted"]["ms"]["median"] / found["floor"]["ms"]["median"]
    found["kernels"] = sorted(set(launched))
    return found


def measure_grouped(s: Setting, job: dict[str, Any]) -> dict[str, Any]:
    from peft import get_peft_model

    n, settings = job["adapters"], {"target_modules": r".*layers\.\d+"}
    names = [f"a{i}" for i in range(n)]
    with torch.device(s.device):
        base = Stack([s.hidden] * 5, s.dtype)
    model = get_peft_model(base, lora(16, **settings), adapter_name="a0")
    for name in names[1:]:
        model.add_adapter(name, lora(16, **settings))
    for name in names:
        randomise(model, name, salt=name)
    model.eval()  # upstream mixes adapters in eval mode only
    model.set_adapter("a0")
    model.set_requires_grad(names, True)
    trained = [p for p in model.parameters() if p.requires_grad]
    x = s.randn(n, job["length"], s.hidden, seed=1)

    def clear() -> None:
        for p in trained:
            p.grad = None

    def forward(**rows: Any) -> None:
        with torch.no_grad():
            model(x, **rows)

    def both(**rows: Any) -> None:
        model(x, **rows).sum().backward()
        clear()

    with kernels(job["variant"]) as launched:
        y = model(x, adapter_names=names)
        y.float().square().sum().backward()
        found: dict[str, Any] = {
            "difference": same(
                {"y": y, **{f"{m} {k}": v for m in names[:2] for k, v in own(model, m).items()}},
                Path(job["reference"]),
                1e-3 if s.dry else 6e-2,
            )
        }
        clear()
        launched.clear()
        for name, call in (("forward", forward), ("forward and backward", both)):
            one, many = spread(s.times(call)), spread(s.times(lambda call=call: call(adapter_names=names)))
            found[name] = {"one": one, "many": many, "ratio": many["median"] / one["median"]}
    found["kernels"] = sorted(set(launched))
    return found


def own(model: Any, name: str) -> dict[str, Tensor]:
    """An adapter's gradients, leaving those of the others where they are."""
    held = [(p, p.grad) for p in model.parameters()]
    found = gradients(model, name)
    for p, g in held:
        p.grad = g
    return found


def measure_decode(s: Setting, job: dict[str, Any]) -> dict[str, Any]:
    """Narrow layers, so that the device is never behind the host."""
    width, layers = (16, 4) if s.dry else (512, 32)
    with torch.device(s.device):
        base = Stack([width] * (layers + 1), s.dtype).eval()
    x = s.randn(1, width)
    A, B = s.randn(16, width), s.randn(width, 16)

    def products() -> None:
        for _ in range(layers):
            F.linear(F.linear(x, A), B)

    with torch.no_grad():
        floor = spread(s.host(lambda: base(x)))
        two = spread(s.host(products))
        model = adapt(base, job["variant"], target_modules=r".*layers\.\d+").eval()
        with kernels(job["variant"]) as launched:
            found: dict[str, Any] = {
                "difference": same({"y": model(x)}, Path(job["reference"]), 1e-3 if s.dry else 3e-2)
            }
            launched.clear()
            adapted = spread(s.host(lambda: model(x)))
    beyond = (adapted["median"] - floor["median"]) / layers
    found |= {"us a layer beyond the frozen one": beyond, "two products": two["median"] / layers}
    found |= {"us a layer beyond the two products": beyond - two["median"] / layers, "kernels": sorted(set(launched))}
    return found


def operations(s: Setting, T: int, p: float) -> dict[str, tuple[Callable[[], Any], Callable[[], Any], int]]:
    """By name: the Triton call, the same in torch operations (with a mask drawn anew, too), the bytes it must move."""
    from peft.kernels import triton_lowrank as K

    k = n = s.hidden
    r, seed, scale = 16, 1234567, 0.5
    x, dy, y, dx = (s.randn(T, k, seed=i) for i in range(4))
    A, B = s.randn(r, k, seed=4, scale=k**-0.5), s.randn(n, r, seed=5, scale=r**-0.5)
    h, dh = s.randn(T, r, seed=6), s.randn(T, r, seed=7)
    size = T * k * x.element_size()

    def dropped() -> Tensor:
        return F.dropout(x, p) if p else x

    def add_dropped() -> None:
        dx.add_(F.dropout(dh @ A, p)) if p else dx.addmm_(dh, A)

    def both() -> Any:
        add_dropped()
        return dh.T @ dropped()

    table: dict[str, tuple[Callable[[], Any], Callable[[], Any], int]] = {
        "shrink": (lambda: K.shrink(x, A, p, seed), lambda: dropped() @ A.T, size),
        "grad_A": (lambda: K.grad_A(dh, x, p, seed), lambda: dh.T @ dropped(), size),
        "grad_x_": (lambda: K.grad_x_(dx, dh, A, p, seed), add_dropped, 2 * size),
        "grad_A_x_": (lambda: K.grad_A_x_(dx, dh, x, A, p, seed), both, 3 * size),
    }
    if not p:
        table["expand_"] = (lambda: K.expand_(y, h, B, scale), lambda: y.addmm_(h, B.T, alpha=scale), 2 * size)
        table["grad_h_B"] = (
            lambda: K.grad_h_B(dy, h, B, scale),
            lambda: ((dy @ B) * scale, (dy.T @ h) * scale),
            size,
        )
        for N in (2,) if s.dry else (16, 64):
            if T % N == 0:
                table |= grouped_operations(s, N, x, y, h, A, B, size)
    return table


def grouped_operations(
    s: Setting, N: int, x: Tensor, y: Tensor, h: Tensor, A: Tensor, B: Tensor, size: int
) -> dict[str, tuple[Callable[[], Any], Callable[[], Any], int]]:
    from peft.kernels import triton_lowrank as K

    rows = len(x) // N
    offsets = list(range(0, len(x) + 1, rows))
    segments = K.Segments(offsets, x.device)
    As, Bs = [A.clone() for _ in range(N)], [B.clone() for _ in range(N)]
    pa, pb = K.pointers(As), K.pointers(Bs)
    ranks = torch.full((N,), A.shape[0], dtype=torch.int32, device=x.device)
    scales = torch.full((N,), 0.5, device=x.device)

    def shrink(hold: Any = (As, Bs)) -> Tensor:  # the weights live as long as their addresses
        return K.grouped_shrink(x, pa, ranks, segments, A.shape[0])

    def expand() -> None:
        for i in range(N):
            y[offsets[i] : offsets[i + 1]].addmm_(h[offsets[i] : offsets[i + 1]], Bs[i].T, alpha=0.5)

    return {
        f"grouped_shrink, N={N}": (
            shrink,
            lambda: torch.cat([x[offsets[i] : offsets[i + 1]] @ As[i].T for i in range(N)]),
            size,
        ),
        f"grouped_expand_, N={N}": (
            lambda: K.grouped_expand_(y, h, pb, ranks, scales, segments),
            expand,
            2 * size,
        ),
    }


def measure_ops(s: Setting, job: dict[str, Any]) -> dict[str, Any]:
    from peft.kernels import triton_launch

    probe = s.randn(8, 8)
    if not triton_launch.available(probe):
        raise Differs("Triton is not installed, or does not know this device")
    big = s.randn(job["T"][-1], s.hidden)
    copy = spread(s.times(lambda: big.clone()))["median"]
    found: dict[str, Any] = {"copy GB/s": 2 * big.numel() * big.element_size() / copy / 1e6, "rows": []}
    for p in (0.0, 0.05):
        for T in job["T"]:
            check(s, T, p)
            for name, (triton, plain, size) in operations(s, T, p).items():
                a, b = spread(s.times(triton)), spread(s.times(plain))
                entry = {"op": name, "T": T, "p": p, "triton": a, "torch": b, "ratio": b["median"] / a["median"]}
                found["rows"].append(entry | {"GB/s": size / a["median"] / 1e6})
    return found


def check(s: Setting, T: int, p: float) -> None:
    """The kernels against their formulas, before they are timed."""
    from peft.kernels import triton_lowrank as K

    x, dy, A = s.randn(T, s.hidden), s.randn(T, s.hidden, seed=1), s.randn(16, s.hidden, seed=4, scale=s.hidden**-0.5)
    B, seed = s.randn(s.hidden, 16, seed=5, scale=0.25), 99
    M = K.mask(x.shape, p, seed, x.device)
    h = K.shrink(x, A, p, seed)
    y = torch.zeros_like(x)
    K.expand_(y, h, B, 0.5)
    dh, dB = K.grad_h_B(dy, h, B, 0.5)
    dx = torch.zeros_like(x)
    dA = K.grad_A_x_(dx, dh, x, A, p, seed)
    f = [t.float() for t in (x, dy, A, B, h, dh)]
    want = {
        "h": (h, (M * f[0]) @ f[2].T),
        "y": (y, 0.5 * f[4] @ f[3].T),
        "dh": (dh, 0.5 * f[1] @ f[3]),
        "dB": (dB, 0.5 * f[1].T @ f[4]),
        "dA": (dA, f[5].T @ (M * f[0])),
        "dx": (dx, M * (f[5] @ f[2])),
    }
    for name, (got, formula) in want.items():
        error = float((got.float() - formula).norm() / formula.norm())
        if not error < (1e-4 if s.dry else 1e-2):
            raise Differs(f"{name} is {error:.1e} relative from its formula at T={T}, p={p}")


def measure_tune(s: Setting, job: dict[str, Any]) -> dict[str, Any]:
    """Other block sizes than `blocks` gives. Those that do not compile or fit are left out."""
    from peft.kernels import triton_launch
    from peft.kernels import triton_lowrank as K

    kernel_of = {
        "shrink": "_shrink",
        "expand_": "_expand",
        "grad_h_B": "_both",
        "grad_A": "_grad",
        "grad_A_x_": "_grad",
    }
    chosen, found = K.blocks, []
    sizes = [(64, 64)] if s.dry else [(32, 64), (64, 64), (64, 128), (128, 64), (128, 128), (256, 64)]
    try:
        for p in (0.0, 0.05):
            for name, (triton, _, size) in operations(s, job["T"][-1], p).items():
                if name not in kernel_of:
                    continue
                tried = [
                    triton_launch.Blocks(*rc, w, st)
                    for rc in sizes
                    for w in (4, 8)
                    for st in ((2,) if s.dry else (2, 3, 4))
                ]
                usual = chosen(kernel_of[name], 16, torch.finfo(s.dtype).bits // 8)
                for b in [usual, *tried]:
                    K.blocks = lambda kernel, width, itemsize, b=b: b
                    try:
                        ms = spread(s.times(triton))
                    except Exception as e:  # too much shared memory, mostly
                        found.append({"op": name, "p": p, "blocks": list(b), "error": str(e)[:200]})
                        continue
                    entry = {"op": name, "p": p, "blocks": list(b), "usual": b is usual, "triton": ms}
                    found.append(entry | {"GB/s": size / ms["median"] / 1e6})
    finally:
        K.blocks = chosen
    return {"rows": found}


MEASURES: dict[str, Callable[[Setting, dict[str, Any]], dict[str, Any]]] = {
    "step": measure_step,
    "grouped": measure_grouped,
    "decode": measure_decode,
    "ops": measure_ops,
    "tune": measure_tune,
}


def work(job: dict[str, Any]) -> dict[str, Any]:
    import peft

    s = Setting(job["dry"])
    found = Path(peft.__file__).resolve().parent.parent
    if found != Path(job["library"]).resolve():
        return {"error": f"expected the library in {job['library']}, imported {found}"}
    try:
        return MEASURES[job["section"]](s, job)
    except Differs as e:
        return {"refused": str(e)}
    except Exception as e:  # out of memory, or what a library cannot do: the other variants still have their turn
        return {"error": f"{type(e).__name__}: {e}"[:2000]}


# -- the run -----------------------------------------------------------------------------------------------------------
def jobs(sections: list[str], dry: bool) -> list[dict[str, Any]]:
    """What is measured, in order; of the jobs that share a `name`, the first writes the outputs that all must have."""
    out: list[dict[str, Any]] = []
    for layers in (1, 2) if dry else (1, 4):
        for dropout in (0.0, 0.05):
            if "step" in sections:
                name = f"step, {layers} layers, dropout {dropout}"
                out += [dict(section="step", name=name, layers=layers, dropout=dropout, variant=v) for v in VARIANTS]
    for n, length in ((2, 4), (3, 1)) if dry else ((16, 128), (64, 128), (16, 1), (64, 1)):
        if "grouped" in sections:
            name = f"grouped, {n} adapters, {length} tokens a row"
            out += [dict(section="grouped", name=name, adapters=n, length=length, variant=v) for v in VARIANTS[:3]]
    if "decode" in sections:
        out += [dict(section="decode", name="decode, T=1", variant=v) for v in VARIANTS]
    T = [6, 70] if dry else [64, 512, 2048, 8192]
    out += [dict(section=part, name=part, T=T, variant=TRITON) for part in ("ops", "tune") if part in sections]
    return out


def in_process(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a job in a process that has its library on the path."""
    answer = folder / "answer.json"
    answer.unlink(missing_ok=True)
    paths = [job["library"], *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    environment["TRANSFORMERS_VERBOSITY"] = "error"
    if job["dry"]:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "benchmarks.gpu", "--job", json.dumps(job), "--answer", str(answer)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if answer.exists():
        found: dict[str, Any] = json.loads(answer.read_text())
        return found
    return {"error": f"the process ended with {done.returncode}: {done.stderr[-2000:]}"}


def machine(dry: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "host": platform.machine(),
    }
    with contextlib.suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    if dry:
        return found | {"device": "dry run on the CPU: times mean nothing", "dtype": "fp32"}
    held = torch.cuda.get_device_properties(0)
    found |= {"device": held.name, "memory GiB": round(held.total_memory / 2**30, 1)}
    return found | {"processors": held.multi_processor_count, "cuda": torch.version.cuda, "dtype": "bf16"}


def table(results: dict[str, Any]) -> str:
    """The results as markdown."""
    where = results["machine"]
    lines = [
        f"{where['device']}, torch {where['torch']}, Triton {where.get('triton', 'none')}, {where['dtype']}, r=16.",
        "",
    ]
    by_section: dict[str, list[dict[str, Any]]] = {}
    for entry in results["results"]:
        by_section.setdefault(entry["job"]["section"], []).append(entry)

    def rows(section: str, head: list[str], cells: Callable[[dict[str, Any]], list[str]]) -> None:
        if section not in by_section:
            return
        lines.extend(["| " + " | ".join(head) + " |", "|" + "---|" * len(head)])
        for entry in by_section[section]:
            found, label = entry["found"], [entry["job"]["name"], entry["job"]["variant"]]
            problem = found.get("refused") or found.get("error")
            if problem:
                values = [problem.splitlines()[0][:100].replace("|", "\\|")] + [""] * (len(head) - 3)
            else:
                values = cells(found)
            lines.append("| " + " | ".join([*label, *values]) + " |")
        lines.append("")

    def ms(found: dict[str, float]) -> str:
        return f"{found['median']:.2f} ({found['low']:.2f}–{found['high']:.2f})"

    def used(found: dict[str, Any]) -> str:
        return ", ".join(k.lstrip("_") for k in found["kernels"]) or "none"

    rows(
        "step",
        ["case", "variant", "÷ floor", "step ms", "floor ms", "peak MiB", "floor MiB", "Triton kernels"],
        lambda f: [
            f"{f['ratio']:.3f}",
            ms(f["adapted"]["ms"]),
            ms(f["floor"]["ms"]),
            f"{f['adapted']['MiB']:.0f}",
            f"{f['floor']['MiB']:.0f}",
            used(f),
        ],
    )
    rows(
        "grouped",
        ["case", "variant", "forward ÷ one adapter", "ms", "with backward ÷ one", "ms", "Triton kernels"],
        lambda f: [
            *(
                v
                for part in ("forward", "forward and backward")
                for v in (f"{f[part]['ratio']:.2f}", ms(f[part]["many"]))
            ),
            used(f),
        ],
    )
    rows(
        "decode",
        ["case", "variant", "µs a layer beyond the frozen one", "beyond the two products", "Triton kernels"],
        lambda f: [
            f"{f['us a layer beyond the frozen one']:.1f}",
            f"{f['us a layer beyond the two products']:.1f}",
            used(f),
        ],
    )
    for entry in by_section.get("ops", []) + by_section.get("tune", []):
        found = entry["found"]
        if "rows" not in found:
            lines.extend([f"{entry['job']['name']}: {found.get('refused') or found.get('error')}", ""])
        elif entry["job"]["section"] == "ops":
            lines.append(f"Single operations, width 4096; a copy moves {found['copy GB/s']:.0f} GB/s here.")
            lines.extend(
                ["", "| operation | T | dropout | Triton ms | torch ms | torch ÷ Triton | GB/s |", "|" + "---|" * 7]
            )
            for r in found["rows"]:
                cells = [r["op"], r["T"], r["p"], f"{r['triton']['median']:.4f}", f"{r['torch']['median']:.4f}"]
                lines.append("| " + " | ".join(map(str, [*cells, f"{r['ratio']:.2f}", f"{r['GB/s']:.0f}"])) + " |")
            lines.append("")
        else:
            lines.extend(["| operation | dropout | rows, columns, warps, stages | ms | GB/s |", "|" + "---|" * 5])
            timed = [r for r in found["rows"] if "triton" in r]
            for r in sorted(timed, key=lambda r: (r["op"], r["p"], r["triton"]["median"])):
                label = f"{r['blocks']}{' (in use)' if r['usual'] else ''}"
                lines.append(f"| {r['op']} | {r['p']} | {label} | {r['triton']['median']:.4f} | {r['GB/s']:.0f} |")
            lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"by default {', '.join(SECTIONS)}")
    parser.add_argument("--upstream", default=str(ROOT / ".venv" / "upstream"), help="its folder, or `none`")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    parser.add_argument("--dry-run", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.job is not None:
        options.answer.write_text(json.dumps(work(json.loads(options.job))))
        return 0
    unknown = [x for x in options.sections if x not in MEASURES]
    if unknown:
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(MEASURES)}")
    if not options.dry_run and not torch.cuda.is_available():
        print("No CUDA device here: nothing was measured. `python -m benchmarks` measures on the CPU.")
        return 0
    libraries = {TORCH: our_library(), TRITON: our_library()}
    upstream = Path(options.upstream)
    if options.upstream != "none" and (upstream / "peft").is_dir():
        libraries |= {UPSTREAM: upstream.resolve(), UPSTREAM_HALF: upstream.resolve()}
    else:
        print(f"upstream is left out: nothing in {options.upstream}")
    results: dict[str, Any] = {"machine": machine(options.dry_run), "dry": options.dry_run, "results": []}
    with tempfile.TemporaryDirectory() as folder:
        for job in jobs(options.sections or list(SECTIONS), options.dry_run):
            if job["variant"] not in libraries:
                continue
            job |= {"dry": options.dry_run, "library": str(libraries[job["variant"]])}
            reference = Path(folder) / (job["name"].replace(" ", "_").replace(",", "") + ".pt")
            start = time.perf_counter()
            found = in_process({**job, "reference": str(reference)}, Path(folder))
            results["results"].append({"job": {k: job[k] for k in job if k != "library"}, "found": found})
            verdict = found.get("refused") or found.get("error") or "ok"
            print(f"{job['name']}: {job['variant']}: {verdict} ({time.perf_counter() - start:.0f} s)", flush=True)
            options.out.parent.mkdir(parents=True, exist_ok=True)  # after each job: what is measured is not lost
            options.out.write_text(json.dumps(results, indent=1) + "\n")
            options.out.with_suffix(".md").write_text(table(results))
    print(table(results))
    print(f"wrote {options.out} and {options.out.with_suffix('.md')}")
    return 1 if any("error" in r["found"] or "refused" in r["found"] for r in results["results"]) else 0


if __name__ == "__main__":
    sys.exit(main())
