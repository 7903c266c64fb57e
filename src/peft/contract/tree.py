"""The base model's tree with adapters in it: wrappers, containers, composites, and walks that see through them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .cheap_modules import CheapModule, Uncalled
from .method import Method


@dataclass
class Part:
    """One weight of a composite: the module that computes with it hangs at `parent.attr`."""

    parent: nn.Module
    attr: str
    disk_path: str  # the part's path below the composite, as upstream writes it to disk; "" is the composite's own


# what others call the module that they wrap: FSDP 1, torch.compile, activation checkpointing
WRAPPED = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")
_MARK = re.compile(rf"(?:(?<=\.)|^)(?:{'|'.join(WRAPPED)})(?:\.|$)")


def wraps_as(module: nn.Module) -> str:
    """The name under which a module of torch holds the one that it runs in its own way; "" where it is none of those."""
    held = module._modules
    if len(held) == 1:
        (name,) = held
        if name in WRAPPED or (name == "module" and isinstance(module, (nn.DataParallel, DistributedDataParallel))):
            return name
    return ""


def without_wrappers(name: str) -> str:
    """A dotted name without the steps that those wrappers add."""
    return _MARK.sub("", name).removesuffix(".") if "_mod" in name else name


class Wrapper(CheapModule):
    """What this library hangs in the place of a module of the base model."""

    base_layer: nn.Module


class AdapterContainer(Uncalled):
    """The container whose children are `<adapter>`, and `%<part>`: a container of the companions of that sort."""

    def put(self, name: str, method: nn.Module) -> None:
        self.__dict__["_modules"] = {**self._modules, name: method}  # replaced: another thread may be walking it

    def __setattr__(self, name: str, value: Any) -> None:
        """Something puts a stand-in around what hangs here (FSDP's units): from now on it is what is called."""
        held = self.__dict__.get("_modules", {}).get(name)
        super().__setattr__(name, value)
        if held is not None and isinstance(value, nn.Module) and value is not held:
            held.__dict__["gathered"] = True
            self.replaced(held, value)

    def replaced(self, held: nn.Module, value: nn.Module) -> None:
        """Tell who calls what hangs here."""
        layer = self.__dict__.get("layer")
        if layer is not None:
            layer.methods = {n: tuple(value if m is held else m for m in ms) for n, ms in layer.methods.items()}

    def drop(self, name: str) -> None:
        self.__dict__["_modules"] = {n: m for n, m in self._modules.items() if n != name}


def tree(module: nn.Module, wrappers: bool = False) -> Iterator[nn.Module]:
    """The base model's modules at and below `module`, in order: past what adapters hold, so that none makes it longer.

    wrappers: yield them, too, instead of looking through them.
    """
    seen: set[int] = set()
    left = [module]
    while left:
        m = left.pop()
        if id(m) in seen:
            continue
        seen.add(id(m))
        if wrappers or not isinstance(m, Wrapper):
            yield m
        if m._modules:
            left += [c for c in reversed(m._modules.values()) if c is not None and not isinstance(c, AdapterContainer)]


class Composite(Wrapper):
    """A stand-in for a module made of several weights (attention's projections, experts), each a layer of its own."""

    def parts(self) -> dict[str, Part]:
        """Path below the composite -> where the part hangs."""
        raise NotImplementedError(f"{type(self).__name__}.parts")

    def to_disk(self, state: dict[str, Tensor], methods: dict[str, Method]) -> dict[str, Tensor]:
        """The parts' tensors (keys below the composite's disk path) in upstream's layout; and back.

        methods: the adapter's method at each part, by the part's disk path.
        """
        return state

    def from_disk(self, state: dict[str, Tensor], methods: dict[str, Method]) -> dict[str, Tensor]:
        return state

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


def base_layer_of(module: nn.Module) -> nn.Module:
    """What a wrapper of this library stands for."""
    while isinstance(module, Wrapper):
        module = module.base_layer
    return module


def named(
    module: nn.Module, table: str, name: str = "", held: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, str, Tensor]]:
    """(name in the base model, name as it hangs now, tensor) of all parameters or persistent buffers.

    The two names differ where adapters wrapped something inside `module`; their own tensors do not appear.
    """
    seen = set() if seen is None else seen
    while isinstance(module, Wrapper):
        module, held = module.base_layer, f"{held}base_layer."
    for leaf, t in getattr(module, table).items():
        if (
            t is not None
            and id(t) not in seen
            and not (table == "_buffers" and leaf in module._non_persistent_buffers_set)
        ):
            seen.add(id(t))
            yield name + leaf, held + leaf, t
    for step, child in module._modules.items():
        if child is not None:
            yield from named(child, table, f"{name}{step}.", f"{held}{step}.", seen)
