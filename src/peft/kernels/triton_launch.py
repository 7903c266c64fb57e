"""Triton kernels built for a GPU or for the interpreter, and launched: modes, block sizes, types.

Triton is imported at first use. Under TRITON_INTERPRET=1 tensors on the CPU run through Triton's interpreter.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import types
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import triton_kernels
from .triton_kernels import Function

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def kernels(interpret: bool) -> dict[str, Any]:
    """The kernels of one mode, in a scope of their own where helpers and `tl` are that mode's."""
    import triton.language

    if interpret:
        from triton.runtime.interpreter import InterpretedFunction
    else:
        from triton.runtime.jit import JITFunction

    home = triton_kernels
    scope: dict[str, Any] = {"__name__": home.__name__, "__file__": home.__file__, "tl": triton.language}

    def bound(fn: Function) -> types.FunctionType:
        copy = types.FunctionType(fn.__code__, scope, fn.__name__, fn.__defaults__)
        copy.__annotations__, copy.__module__, copy.__qualname__ = fn.__annotations__, fn.__module__, fn.__qualname__
        return copy

    for fn in home.HELPERS:
        scope[fn.__name__] = bound(fn) if interpret else JITFunction(bound(fn))
    for fn in home.KERNELS:
        free = [name for name in home.FREE if name in fn.__code__.co_varnames[: fn.__code__.co_argcount]]
        made = bound(fn)
        scope[fn.__name__] = InterpretedFunction(made) if interpret else JITFunction(made, do_not_specialize=free)
    return scope


@functools.cache
def _installed() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        import triton.language
    except Exception:  # a build for another platform: as good as none
        return False
    return hasattr(triton.language, "mul")  # products that may wrap around: from Triton 3.3


@functools.cache
def _capable(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= (8, 0)


@functools.cache
def processors(device: torch.device) -> int:
    """How many programs run side by side. The interpreter's number makes small tests split their sums, too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def available(x: Tensor) -> bool:
    """Whether the kernels take x: on a GPU with Triton 3.3 installed, or interpreted under TRITON_INTERPRET=1.

    The interpreter multiplies bfloat16 wrongly: numpy does not know the type.
    """
    if x.dtype not in DTYPES:
        return False
    if x.is_cuda:
        return _installed() and _capable(x.device.index or 0)
    interpreted = x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return interpreted and x.dtype != torch.bfloat16 and _installed()


def launch(name: str, grid: tuple[int, ...], like: Tensor, *args: object, **constants: object) -> None:
    kernel = kernels(not like.is_cuda)[name]
    elsewhere = like.is_cuda and like.device.index != torch.cuda.current_device()
    with torch.cuda.device(like.device) if elsewhere else nullcontext():
        kernel[grid](*args, **constants)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def padded_rank(r: int) -> int:
    """Ranks as the matrix units take them: a power of two, 16 or more."""
    return max(16, 1 << (r - 1).bit_length())


def precision(like: Tensor) -> str:
    """How fp32 is multiplied. Three TF32 products keep fp32's accuracy and use the matrix units."""
    if not like.is_cuda or torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def triton_type(dtype: torch.dtype) -> object:
    import triton.language as language

    return {torch.float16: language.float16, torch.bfloat16: language.bfloat16, torch.float32: language.float32}[dtype]


class Blocks(NamedTuple):
    """A launch's tile of rows and columns, and the kernel's warps and pipeline stages."""

    rows: int
    columns: int
    warps: int
    stages: int


def blocks(kernel: str, width: int, itemsize: int) -> Blocks:
    """By padded rank and bytes an element: tiles that leave registers and shared memory for several programs at once.

    Chosen by compiling for sm_80 and sm_90 and looking at registers, spills and shared memory.
    """
    wide = itemsize > 2
    warps = 4 if width < 128 else 8
    if kernel == "_both":
        return Blocks(64, 32, 4, 2) if wide else Blocks(128, 64, 4, 3)
    if kernel == "_expand":
        return Blocks(64, 32 if wide else 64, 4, 2)
    rows = 32 if wide and width > 64 and kernel == "_grad" else 64
    columns = (32 if wide else 64) if width < 256 else (16 if wide else 32)
    return Blocks(rows, columns, warps, 3 if kernel == "_shrink" and not wide else 2)


def drop_arguments(p: float, seed: int) -> tuple[bool, tuple[int, int, int], float]:
    """(whether to drop, (seed's low and high half, threshold), 1/(1 − p)) with p as the 16 bits can say it."""
    if p <= 0:
        return False, (0, 0, 0), 1.0
    threshold = min(round(p * 65536), 65536)
    halves = [((seed >> shift) & 0xFFFFFFFF) for shift in (0, 32)]
    lo, hi = (v - (1 << 32) if v >> 31 else v for v in halves)  # always int32, which keeps the kernel's type
    return True, (lo, hi, threshold), 0.0 if threshold == 65536 else 65536 / (65536 - threshold)
