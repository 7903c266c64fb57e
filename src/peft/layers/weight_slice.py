"""A slice of another module's parameter, as a layer: W = P[index][rows], y = x Wᵀ + b.

Modules that keep several matrices in one parameter (attention's fused projections, stacks of experts) read it raw, so
there is nothing to wrap. A `WeightSlice` stands for one of those matrices: it computes with the owner's parameter,
holds none of its own, and appears in no state dict. A composite hangs its slices under itself and calls them.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F


class WeightSlice(nn.Module):
    """One matrix inside `owner.<weight_name>`, seen as `[out, in]`.

    index: position(s) on the leading axes (the expert in `[E, ..., ...]`). rows: a slice of the output channels (the
    query rows of a fused projection). transposed: the parameter keeps `[in, out]`. bias_name: a parameter of the
    owner with the same leading axes and the outputs last; its slice is the bias. bias_rows, bias_size: where that
    slice and the whole bias differ from the weight's (attention's query, key and value share one bias).

    The owner is referenced, not registered: it must stand elsewhere in the model's tree.
    """

    owner: nn.Module

    def __init__(
        self,
        owner: nn.Module,
        weight_name: str,
        bias_name: str | None = None,
        index: int | tuple[int, ...] | None = None,
        rows: slice | None = None,
        transposed: bool = False,
        bias_rows: slice | None = None,
        bias_size: int | None = None,
    ) -> None:
        super().__init__()
        object.__setattr__(self, "owner", owner)  # past nn.Module, which would register a child
        self.weight_name, self.bias_name = weight_name, bias_name
        self.index, self.rows, self.transposed = index, rows, transposed
        self.bias_rows = rows if bias_rows is None else bias_rows
        whole = getattr(owner, weight_name)
        self.bias_size = bias_size or whole.shape[-1 if transposed else -2]
        self.out_features, self.in_features = self.of_weight(whole).shape
        self.training = owner.training

    def of_weight(self, parameter: Tensor) -> Tensor:
        """This slice of the owner's weight, `[out, in]`: a view."""
        t = parameter if self.index is None else parameter[self.index]
        t = t.T if self.transposed else t
        return t if self.rows is None else t[self.rows]

    def of_bias(self, parameter: Tensor) -> Tensor:
        t = parameter if self.index is None else parameter[self.index]
        return t if self.bias_rows is None else t[self.bias_rows]

    @property
    def weight(self) -> Tensor:
        return self.of_weight(getattr(self.owner, self.weight_name))

    @property
    def bias(self) -> Tensor | None:
        whole = None if self.bias_name is None else getattr(self.owner, self.bias_name)
        return None if whole is None else self.of_bias(whole)

    def place(self, name: str) -> tuple[str, Callable[[Tensor], Tensor]]:
        """(the owner's parameter, the function that takes this slice of it) for "weight" and "bias"."""
        if name == "weight":
            return self.weight_name, self.of_weight
        if self.bias_name is None:
            raise ValueError(f"{type(self.owner).__name__}.{self.weight_name} has no bias that could be changed.")
        return self.bias_name, self.of_bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        where = "".join(f"[{i}]" for i in (self.index, self.rows) if i is not None)
        return f"{type(self.owner).__name__}.{self.weight_name}{where}, {self.in_features} -> {self.out_features}"
