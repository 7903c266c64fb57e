"""Whose forward a module runs, and that forward run with other tensors in the place of its parameters.

A subclass of a known layer is that layer only as long as it computes as the layer does. What overrides `forward` may
scale, normalise, group or round, so that only its own forward says what a changed weight means.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .managed import present
from .swapped import called_with


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """The function that calling the module runs: its class's, or what stands on the instance; past accelerate's hooks and
    diffusers'."""
    own = module.__dict__.get("forward")
    if own is None:
        return type(module).forward
    if "_hf_hook" in module.__dict__:
        own = module.__dict__.get("_old_forward", own)
    registry = module.__dict__.get("_diffusers_hook")
    first = next(iter(getattr(registry, "_fn_refs", ())), None)
    own = getattr(first, "original_forward", None) or getattr(first, "forward", None) or own
    return getattr(own, "__func__", own)  # type: ignore[no-any-return]


def runs_as(module: nn.Module, cls: type[nn.Module], *parts: str) -> bool:
    """Whether it runs the forward of `cls`; parts: methods of the class that this forward is made of."""
    if type(module) is not cls and any(getattr(type(module), n) is not getattr(cls, n) for n in parts):
        return False
    return forward_of(module) is cls.forward


def written_as(module: nn.Module, cls: type[nn.Module], *references: type[nn.Module]) -> type[nn.Module] | None:
    """Which of the references, subclasses of `cls`, has the forward that the module runs, instruction for instruction.

    What a forward calls as `super()` is then the forward of `cls`, too.
    """
    forward = forward_of(module)
    code = getattr(forward, "__code__", None)
    holders = [c for c in type(module).__mro__ if "forward" in c.__dict__]
    if code is None or holders[0].__dict__["forward"] is not forward or cls not in holders or holders[1] is not cls:
        return None
    return next((r for r in references if _words(r.forward.__code__) == _words(code)), None)


@functools.lru_cache(maxsize=1024)
def _words(code: types.CodeType) -> list[object]:
    """The instructions, whatever the arguments are called."""
    local = {*dis.haslocal, *dis.hasjrel, *dis.hasjabs}
    return [(i.opname, i.arg if i.opcode in local else i.argval) for i in dis.get_instructions(code)]


def computed(module: nn.Module) -> bool:
    """Whether its weight is computed from other tensors: parametrizations, or hooks that do so before each call (weight
    and spectral norm, pruning)."""
    return "parametrizations" in module._modules or bool(module._forward_pre_hooks and weight_hooks(module))


def weight_hooks(module: nn.Module) -> dict[int, Any]:
    """torch's hooks that compute a tensor of the module, by their ids."""
    return {
        i: h for i, h in module._forward_pre_hooks.items() if hasattr(h, "compute_weight") or hasattr(h, "apply_mask")
    }


def holds(module: nn.Module, shape: Sequence[int]) -> bool:
    """Whether the module's weight is a floating parameter of this shape, which a change can be added to."""
    weight = module._parameters.get("weight")
    wide = weight is not None and (weight.is_floating_point() or weight.is_complex()) and weight.element_size() > 1
    bias = module._parameters.get("bias")
    return wide and tuple(weight.shape) == tuple(shape) and (bias is None or bias.dim() == 1)  # type: ignore[union-attr]


def run_with(module: nn.Module, values: Mapping[str, Tensor | None], args: Any, kwargs: Any) -> Any:
    """The module's own call with `values` in the place of its parameters of these names.

    A twin runs it, which shares everything else with the module: other threads, which run the module, see its weights.
    """
    own = module.__dict__.get("forward")
    hooked = "_hf_hook" in module.__dict__ or "_diffusers_hook" in module.__dict__
    bound = own is None or hooked or getattr(own, "__self__", None) is module
    given = {n: v for n, v in values.items() if n in module._parameters}
    if torch.compiler.is_compiling() or not bound:
        return called_with(module, {n: v for n, v in given.items() if v is not None}, args, kwargs)
    with present(module):
        twin: nn.Module = object.__new__(type(module))
        before = {
            k: v for k, v in module.__dict__.items() if k not in given and k not in ("_compiled_call_impl", "forward")
        }
        before["_parameters"] = {**module._parameters, **given}
        twin.__dict__.update(before)
        if own is not None:
            twin.__dict__["forward"] = types.MethodType(forward_of(module), twin)
        out = twin(*args, **kwargs)
    for name, value in twin.__dict__.items():  # what a forward notes on itself stays noted
        if name != "forward" and before.get(name) is not value:
            module.__dict__[name] = value
    return out
