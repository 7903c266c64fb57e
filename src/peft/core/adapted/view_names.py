"""Which names of upstream's layer a method holds, and where: attributes for tensors, settings, modules of its own."""

from __future__ import annotations

from torch import Tensor

from ...contract.method import Method

LEAVES = ("weight", "bias")  # what upstream keeps in a module of its own


def leaves(method: Method, name: str) -> dict[str, str]:
    """What upstream's `name` holds of a method: leaf of the module -> attribute, or "" -> attribute for a bare tensor."""
    if name in method.table.modules:
        return {"weight": name}
    found = {}
    for attr, key in method.table.own.items():
        head, _, leaf = key.partition(".")
        if head == name and leaf in ("", *LEAVES) and tensor(method, attr) is not None:
            found[leaf] = attr
    return found


def upstream_name(method: Method, attr: str, key: str, adapter: str) -> str:
    """The name that an attribute has in the state dict of upstream's layer: the adapter's name comes before the leaf."""
    tree, _, rest = attr.partition(".")
    if rest and not hasattr(method._modules.get(tree), "nested"):  # a copy of a whole module
        return f"{tree}.{adapter}.{rest}"
    head, _, leaf = key.rpartition(".")
    if head and leaf in LEAVES:
        return f"{head}.{adapter}.{leaf}"
    return f"{key}.{adapter}.weight" if attr in method.table.modules else f"{key}.{adapter}"


def tensor(method: Method, attr: str) -> Tensor | None:
    """A parameter or buffer of the method's own."""
    return method._parameters.get(attr, method._buffers.get(attr))


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
    )


def shows(method: Method, name: str) -> bool:
    """Whether upstream's layer has this name for such a method, be it held here or not."""
    return name in method.table.layer_names() or name in method.shown.names or holds(method, name)
