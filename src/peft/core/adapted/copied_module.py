"""A trained copy of a whole module, as the module that upstream has for it."""

from __future__ import annotations

from torch import nn

from ...contract.tree import base_layer_of


def module_of(base: nn.Module, tree: nn.Module) -> nn.Module:
    """A module like `base` whose tensors are those of `tree`, which mirrors its paths.

    It is of the base's class, is called and read as the base is, and shares the tables of the tree: a parameter assigned
    to it is the one that the next forward reads. What the tree holds no copy of is the base's own.
    """
    base = base_layer_of(base)
    made = type(base).__new__(type(base))
    made.__dict__.update(base.__dict__)
    for name, p in base._parameters.items():
        if p is None:
            tree._parameters.setdefault(name, None)
    whole = base._parameters.keys() <= tree._parameters.keys()
    made.__dict__["_parameters"] = tree._parameters if whole else {**base._parameters, **tree._parameters}
    made.__dict__["_buffers"] = {**base._buffers, **tree._buffers}
    made.__dict__["_modules"] = {
        name: child if child is None or (below := tree._modules.get(name)) is None else module_of(child, below)
        for name, child in base._modules.items()
    }
    return made
