"""Code that reads an adapted layer's weight instead of calling the layer: does it ask for the values, or for the parameter?

The values are W + ΔW, composed at each reading. Most code wants something else by the same expression: a dtype, a device,
a shape, whether there is a weight at all, the parameter to tie, to move or to write into. That is told from the reading
code itself, by the instructions next to the reading and by the module it belongs to; where neither says so, it gets the
values. Compilers see no frames: in a graph a reading gives the values, and what is not used of them is not computed.
"""

from __future__ import annotations

import dis
import functools
import sys
from types import CodeType, FrameType

import torch
from torch import Tensor

# what a weight and its change have in common, and what only a parameter has
OF_BOTH = frozenset(
    "device dtype shape ndim size dim numel nelement stride is_cuda is_cpu is_mps is_meta is_sparse is_quantized layout itemsize "
    "nbytes element_size is_floating_point is_complex get_device".split()
)
OF_PARAMETER = frozenset(["grad", "data_ptr", "__dict__", "__class__"])
ABOUT = frozenset(["isinstance", "hasattr", "type", "id"])  # functions that ask about an object
# modules that keep books of parameters: they tie, move, count, load and save them
BOOKS = ("torch.nn.modules.module", "torch.nn.utils.stateless", "transformers.modeling_utils", "transformers.core_model_loading", "accelerate.", "diffusers.models.modeling_utils")  # fmt: skip


def asks_for_parameter(depth: int = 1) -> bool:
    """Whether the code that reads, `depth` frames above the caller, needs no values."""
    if torch.compiler.is_compiling():
        return False
    frame = sys._getframe(depth + 1)
    if str(frame.f_globals.get("__name__", "")).startswith(BOOKS):
        return True
    return _instructions_say(frame.f_code, frame.f_lasti)


def reader(depth: int = 1) -> str:
    """The code that reads, for messages."""
    if torch.compiler.is_compiling():
        return "the model's code"
    frame: FrameType = sys._getframe(depth + 1)
    code = frame.f_code
    return f"{getattr(code, 'co_qualname', code.co_name)} ({frame.f_globals.get('__name__')}:{frame.f_lineno})"


@functools.lru_cache(maxsize=4096)
def _instructions_say(code: CodeType, at: int) -> bool:
    steps = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "EXTENDED_ARG", "NOP")]
    here = next((n for n, i in enumerate(steps) if i.offset == at), None)
    if here is None:
        return False
    chain: list[str] = []  # the attributes taken of what was read
    after = here + 1
    while after < len(steps) and steps[after].opname in ("LOAD_ATTR", "LOAD_METHOD"):
        chain.append(str(steps[after].argval))
        after += 1
    first = next((name for name in chain if name != "data"), None)
    if first is not None and (first in OF_BOTH or first in OF_PARAMETER or not hasattr(Tensor, first)):
        return True
    if chain and _writes(chain[-1]):
        return True
    following = steps[after] if after < len(steps) else None
    if following is None:
        return False
    if following.opname == "STORE_ATTR":
        return True
    if not chain and following.opname.startswith("POP_JUMP") and following.opname.endswith("NONE"):
        return True
    return _goes_into(steps, after) or _passed_to_writer(steps, here)


def _writes(name: str) -> bool:
    """Whether a function of this name changes its argument, by torch's convention."""
    return name.endswith("_") and not name.endswith("__")


def _goes_into(steps: list[dis.Instruction], after: int) -> bool:
    """`layer.weight[...] = value` and `layer.weight is other`: more is loaded, and then stored into or compared."""
    while after < len(steps) and steps[after].opname.startswith(("LOAD_", "BUILD_")):
        after += 1
    return after < len(steps) and steps[after].opname in ("STORE_SUBSCR", "STORE_SLICE", "IS_OP")


def _passed_to_writer(steps: list[dis.Instruction], here: int) -> bool:
    """`isinstance(layer.weight, …)`, `init.normal_(layer.weight)`: the first argument of such a function."""
    start, left = here, 0
    while left < 1 and start > 0:  # back to where the expression that gives the layer begins
        start -= 1
        step = steps[start]
        left += dis.stack_effect(step.opcode, step.arg if step.opcode >= dis.HAVE_ARGUMENT else None, jump=False)
    called = start - 1
    while called >= 0 and steps[called].opname == "PUSH_NULL":
        called -= 1
    if left != 1 or called < 0 or not steps[called].opname.startswith("LOAD_"):
        return False
    name = steps[called].argval
    return isinstance(name, str) and (name in ABOUT or _writes(name))
