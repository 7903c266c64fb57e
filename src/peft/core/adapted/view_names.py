"""Which names of upstream's layer a method holds, and where: attributes for tensors, settings, modules of its own."""

from __future__ import annotations

from torch import Tensor, nn

from ...contract.method import Method
from ...contract.tensors import COPY

LEAVES = ("weight", "bias")  # what upstream keeps in a module of its own
TURNED = ".T"  # an attribute path ends so where the transpose is what upstream has


def leaves(method: Method, name: str) -> dict[str, str]:
    """What upstream's `name` holds of a method: leaf of the module -> attribute, or "" -> attribute for a bare tensor."""
    table, found = method.table, {}
    for attr, key in (*table.own.items(), *table.shared_keys.items()):
        head, _, leaf = key.partition(".")
        below = leaf == name and leaf not in LEAVES  # `token_adapter.<name>`
        if (head == name and leaf in ("", *LEAVES) or below) and tensor(method, attr) is not None:
            found["weight" if attr in table.modules else "" if below else leaf] = attr
    seen_as: dict[str, str] = getattr(method, "seen_as", {})  # key -> key of the tensor whose transpose stands there
    for key in table.lent.values():  # of the other end of a tied weight, which may hold the transposes
        head, _, leaf = key.partition(".")
        if head == name and leaf in ("", *LEAVES):
            held = next(a for a, k in table.lent.items() if k == seen_as.get(key, key))
            found[leaf] = held + TURNED if seen_as else held
    return found


def upstream_name(method: Method, attr: str, key: str, adapter: str) -> str:
    """The name that an attribute has in the state dict of upstream's layer: the adapter's name comes before the leaf."""
    tree, _, rest = attr.partition(".")
    if rest and not hasattr(method._modules.get(tree), "nested"):  # a copy of a whole module
        return f"{tree.removesuffix(COPY)}.{adapter}.{rest}"
    head, _, leaf = key.rpartition(".")
    if head and leaf in LEAVES:
        return f"{head}.{adapter}.{leaf}"
    return f"{key}.{adapter}.weight" if attr in method.table.modules else f"{key}.{adapter}"


def tensor(method: Method, attr: str) -> Tensor | None:
    """A parameter or buffer of the method's own."""
    return method._parameters.get(attr, method._buffers.get(attr))


def copied(method: Method, name: str) -> nn.Module | None:
    """The tree of copies that upstream keeps as a whole module of this name."""
    return method._modules.get(name + COPY)


def sums(method: Method) -> bool:
    """Whether its effect is a sum with the weight, ΔW as a chain of factors."""
    return method.form == "delta"


def holds(method: Method, name: str) -> bool:
    """Whether an adapter has something of this name: tensors, a setting, a module."""
    if leaves(method, name):
        return True
    shown = method.shown
    keyed = name not in shown.settings and method.table.own.get(name, name).rpartition(".")[2] != name
    if keyed and name not in method._modules:
        return False
    return (
        name in shown.settings
        or (bool(name) and name == shown.dropout)
        or (tensor(method, name) is not None and not keyed)
        or method._modules.get(name) is not None
        or copied(method, name) is not None
    )


def shows(method: Method, name: str) -> bool:
    """Whether upstream's layer has this name for such a method, be it held here or not."""
    return name in method.table.layer_names() or name in method.shown.names or holds(method, name)
