"""bitsandbytes' 4-bit layers, NF4 and FP4 (arXiv 2305.14314): W~ = table[code] · absmax per block of weights.

On CPUs with AVX512-BF16 the first inference call rewrites the layer for its kernel: codes are interleaved by blocks of
32 rows, absmax becomes a transposed bf16 matrix, and `quant_state.packing_format_for_cpu` says so. The kernel has no
backward, and the library's own way back (which `state_dict()` takes) leaves absmax transposed; `unpacked` undoes both.

The library is never imported here unless the model already holds its layers.
"""

from __future__ import annotations

import copy
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..contract.kind import Example, Examples
from ..contract.own_forward import runs_as
from .coded import Quantised

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit, Params4bit

    class State(QuantState):
        """With what packing adds; `before_packing` is what this file remembers of it."""

        packing_format_for_cpu: bool
        original_dtype: torch.dtype
        original_nested: bool
        before_packing: State

    class Layer(Linear4bit):
        weight: Params4bit
        quant_state: State | None


class FourBit(Quantised["Layer"]):
    name = "bitsandbytes_4bit"
    summary = "bitsandbytes' Linear4bit (NF4 and FP4)"
    # The CPU kernel rounds activations, absmax and table to bf16 (2^-9 each); the merged layer computes in fp32.
    tolerance = 2e-2
    compiles = False  # the library's forward rewrites the layer's state

    def examples(self) -> Examples:
        if find_spec("bitsandbytes") is None:
            return {}

        def make() -> Example:
            import bitsandbytes.nn as bnb

            layer = bnb.Linear4bit(
                64, 32, compute_dtype=torch.float32, compress_statistics=False, quant_type="nf4"
            )  # sizes that the CPU kernel takes: rows in 32s, columns in blocks of 64
            layer.load_state_dict(nn.Linear(64, 32).state_dict())
            return layer.to("cpu").requires_grad_(False), torch.randn(4, 64)

        return {"bias": make}

    def claims(self, module: nn.Module) -> bool:
        bnb = sys.modules.get("bitsandbytes.nn")
        return bnb is not None and isinstance(module, bnb.Linear4bit) and runs_as(module, bnb.Linear4bit)

    def decode(self, module: Layer) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        data, state = unpacked(module)
        return data if state is None else dequantize_4bit(data, state).to(self.model_dtype(module))

    def compute_dtype(self, module: Layer) -> torch.dtype:
        return module.compute_dtype or self.model_dtype(module)

    def model_dtype(self, module: Layer) -> torch.dtype:
        state = _state(module)
        if state is None:
            return module.weight.dtype
        return state.original_dtype if getattr(state, "packing_format_for_cpu", False) else state.dtype

    def run(self, module: Layer, *args: Any, **kwargs: Any) -> Any:
        """The library's forward, which may repack: what that loses is remembered first, and undone for a backward."""
        state = _state(module) if self.claims(module) else None
        if state is not None:
            trains = torch.is_grad_enabled() and (module.training or any(_needs_grad(a) for a in args))
            if not _is_plain(state) and (trains or not state.packing_format_for_cpu):
                self._unpack(module)
            state = _state(module)
            if state is not None and not trains and _is_plain(state) and state.absmax.device.type == "cpu":
                state.before_packing = copy.copy(state)
        return module(*args, **kwargs)

    def trainable(self, module: Layer) -> None:
        """Plain, and never packed again: the packed kernel has no backward, not even towards the input."""
        self._unpack(module)
        module.support_avx512bf16_for_cpu = False

    def _unpack(self, module: Layer) -> None:
        data, state = unpacked(module)
        if state is not None and state is not _state(module):
            module.weight.data, module.weight.quant_state, module.quant_state = data, state, state

    def encode(self, original: Layer, merged: nn.Linear) -> nn.Module:
        import bitsandbytes.nn as bnb

        weight = original.weight
        coded = bnb.Linear4bit(
            merged.in_features,
            merged.out_features,
            bias=merged.bias is not None,
            compute_dtype=original.compute_dtype,
            device="meta",
        )
        coded.bias = merged.bias
        coded.weight = bnb.Params4bit(
            merged.weight.data,
            requires_grad=False,
            blocksize=weight.blocksize,
            compress_statistics=weight.compress_statistics,
            quant_type=weight.quant_type,
            quant_storage=weight.quant_storage,
            module=coded,
        )
        return coded.to(merged.weight.device)


def _state(module: Layer) -> State | None:
    """FSDP takes attributes off parameters; the layer has the state, too."""
    state: State | None = getattr(module.weight, "quant_state", None)
    return state if state is not None else module.quant_state


def _needs_grad(x: object) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _is_plain(state: State) -> bool:
    """Whether the state was never packed; the library's way back leaves the attribute, and absmax changed."""
    return not hasattr(state, "packing_format_for_cpu")


def unpacked(module: Layer) -> tuple[Tensor, State | None]:
    """(codes, state) in the form that the library's dequantisation reads, whatever form the layer is in."""
    data, state = module.weight.data, _state(module)
    if state is None or _is_plain(state):
        return data, state
    known = getattr(state, "before_packing", None)
    state = copy.copy(state)
    if state.packing_format_for_cpu:
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        state.original_nested = False  # absmax itself is kept: coding it again would lose more
        data, state = _convert_weight_packed_for_cpu_inverse(data, state)  # type: ignore[assignment]
    if known is not None:
        return data, known
    if state.absmax.dim() == 2:  # [K / block, N] -> per row, per block
        state.absmax = state.absmax.T.reshape(-1).float()
    del state.packing_format_for_cpu
    return data, state


kinds = [FourBit()]
