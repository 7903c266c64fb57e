"""The contract a method fulfils. A method is one file in `methods/`: a config, the maths, the checkpoint keys.

A method states ONE form, by defining the function of that name; the core does the rest on every kind of layer:

    delta()            ΔW as factors, the one next to x first        LoRA (A, s·B)      active ones add up
    weight(W)          W' = f(W)                                     DoRA, masks        f(W) − W add up
    before(x)          acts on the input's channels                  OFT, HRA           composed in activation order
    after(y, x)        acts on the output's channels                 IA3, bottleneck    composed in activation order
    replace(name, P)   P' for each parameter of any module           LayerNorm, BitFit  P' − P add up
    prompt methods     have the whole model as their site: `core/prompts`

Merging several gives what activating them gives: both go through the same composition (`core/adapted`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..errors import Refusal
from ..kernels.terms import Banks, Thin
from .cheap_modules import CheapModule
from .geometry import Geometry
from .site import Op, Site
from .tensors import Shown, Stored, TensorTable, fit_to_file

declared: list[type[Method]] = []  # every class of this process, in the order of their creation
listeners: list[Callable[[type[Method]], None]] = []  # told of each new one

FORMS = ("delta", "weight", "before", "after", "replace", "prompt")


class Method(CheapModule):
    """One adapter at one site. Parameters live here and are read only inside a call of this module."""

    peft_type: ClassVar[str] = ""  # the name on disk and in the registry
    config_class: ClassVar[type]
    summary: ClassVar[str] = ""  # one sentence
    formula: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    prefix: ClassVar[str] = ""  # the beginning of upstream's parameter names
    tensors: ClassVar[Mapping[str, Stored]] = {}  # what it keeps: attribute -> how it is made, stored, joined and shown
    table: TensorTable = TensorTable()  # the same by use; an instance may have one of its own
    identity: bool = True  # a fresh adapter leaves the model's output as it is
    shown: ClassVar[Shown] = Shown()  # how upstream's layer shows it: core/adapted/views.py
    form: str = ""  # an instance may choose its own
    plain_delta: ClassVar[bool] = False  # a delta that is added as this class does it
    replaced_names: tuple[str, ...] = ()  # for the form `replace`
    dropout: float = 0.0  # on the input of the added term, in training
    role: ClassVar[str] = "attention"  # what it targets when the config names nothing: see core/anatomy/roles.py
    examples: ClassVar[tuple[dict[str, Any], ...]] = ()  # config fields of the variants that the laws test
    config: Any
    geometry: Geometry
    device: torch.device
    multiplier: float

    if TYPE_CHECKING:  # a subclass states one, which is its form

        def delta(self) -> tuple[Tensor, ...]: ...
        def weight(self, W: Tensor) -> Tensor: ...
        def before(self, x: Tensor) -> Tensor: ...
        def after(self, y: Tensor, x: Any) -> Tensor: ...
        def replace(self, name: str, P: Tensor) -> Tensor: ...

    def __init__(self, config: Any, site: Site) -> None:
        super().__init__()
        self.set(
            config=config,
            geometry=site.geometry,
            device=site.device,  # where parameters of the meta device go when they get values
            multiplier=1.0,  # set_scale/scale_layer: a factor on the adapter's effect where it has one
        )
        if site.geometry.indexed:
            self.set(table=self.table.for_rows)

    def create(self, site: Site, given: Mapping[str, nn.Parameter] | None = None) -> None:
        """Make the tensors whose shapes the table states; those in `given` are taken instead."""
        for attr, shape, when in self.table.made:
            if given and attr in given:
                self._parameters[attr] = given[attr]
            elif when is None or when(self):
                self._parameters[attr] = site.empty(*shape(self))
            else:
                self.__dict__[attr] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stated = [f for f in FORMS if f in cls.__dict__]
        if stated and "form" not in cls.__dict__:
            cls.form = stated[0]
        cls.plain_delta = (
            cls.form == "delta" and cls.add is Method.add and cls.term is Method.term and cls.dropped is Method.dropped
        )
        if "tensors" in cls.__dict__ or "shown" in cls.__dict__:
            cls.table = TensorTable.of(cls.tensors, cls.shown.empty)
        declared.append(cls)
        for told in listeners:
            told(cls)

    # -- life ---------------------------------------------------------------------------------------------------------
    def nested(self) -> tuple[Method, ...]:
        """This method and, for a wrapper, what it wraps; the config's own method comes last."""
        return (self,)

    @classmethod
    def prepare(cls, config: Any, model: nn.Module) -> None:
        """Fill what the config leaves open from the base model (targets, sizes). May change `config`."""

    @classmethod
    def check(cls, config: Any, site: Site) -> None:
        """Raise `Refusal` when mathematics or the format rules this site out."""
        if cls.form in ("delta", "weight", "before") and site.geometry.weightless:
            why = site.opaque or "this module has no single weight matrix to change"
            raise Refusal(cls.peft_type, f"{site.path} ({site.layer})", why)

    @classmethod
    def shared_tensors(cls, config: Any, sites: list[Site], rng: torch.Generator) -> dict[str, nn.Parameter]:
        """Parameters that several sites share (VeRA's banks): created once per adapter, given as `site.shared`."""
        return {}

    def reset(self, rng: torch.Generator, site: Site) -> None:
        """Draw the initial values from `rng`, which is keyed by the site's name. Skipped when weights are loaded."""

    def resize(self, state: dict[str, Tensor]) -> None:
        """Adjust parameter shapes to a checkpoint's tensors (by attribute), along the axes that the table leaves open."""
        for attr, axis, more in self.table.flexible:
            fit_to_file(attrgetter(attr)(self), state.get(attr), axis, more)

    # -- the one door ---------------------------------------------------------------------------------------------------
    def forward(self, stage: str, *args: Any) -> Any:
        """All reads of parameters happen inside this call, so that FSDP and ZeRO-3 gather here and release after."""
        result = getattr(self, stage)(*args)
        return result if self.never_gathered else own_copies(result, self)

    @property
    def never_gathered(self) -> bool:
        """Whether the tensors are there outside calls, too: hooks (FSDP, ZeRO-3) may gather them for each call."""
        return not (self._forward_hooks or self._forward_pre_hooks or self.__dict__.get("gathered"))

    def tensor(self, name: str) -> Tensor:
        """The tensor of this name, found sooner than by attribute; FSDP 1 keeps it elsewhere than in the parameters."""
        found = self._parameters.get(name)
        return getattr(self, name) if found is None else found  # type: ignore[no-any-return]

    def dropped(self, x: Tensor, op: Op) -> Tensor:
        """The input of the added term: with dropout in training. Indices have none."""
        if self.dropout and self.training and not op.geometry.indexed:
            return torch.nn.functional.dropout(x, self.dropout)
        return x

    def term(self, x: Tensor, op: Op, dtype: torch.dtype) -> Tensor:
        """op(x, ΔW) of the form `delta`, factor by factor."""
        factors = [f.to(dtype) for f in self.delta()]
        if not op.geometry.factored:
            return op(x, product(factors))
        h = op(x, factors[0])
        for f in factors[1:]:
            h = op.pointwise(h, f)
        return h

    def fused_term(self, op: Op) -> Thin | Banks | None:
        """ΔW as what fused kernels run, where the term is just its product with the input: two thin matrices, or frozen
        matrices with trained vectors between and after them.

        None where it is more than that: another chain of factors, a term or a dropout of the method's own.
        """
        if not self.plain_delta:
            return None
        factors = self.delta()
        return Thin(*factors) if len(factors) == 2 else None

    def bias_change(self) -> Tensor | None:
        """What the forms `delta` and `weight` add to the bias, [out]."""
        return None

    def add(self, x: Tensor, y: Tensor, op: Op) -> Tensor:
        """y plus this method's term, for the forms `delta` and `weight`."""
        if self.form == "delta":
            y = y + self.term(self.dropped(x, op), op, y.dtype)
        else:
            W = op.read()
            W = W.to(torch.promote_types(W.dtype, torch.float32))  # in half precision W' − W would be rounding
            y = y + op(self.dropped(x, op), (self.weight(W) - W).to(y.dtype))
        bias = self.bias_change()
        return y if bias is None else op.shift(y, bias.to(y.dtype))

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The merged (W', b') of this method alone; the forms `before` and `after` override or inherit this.

        `before` is linear in its input, so its matrix M (row form: x M) is what it makes of the identity.
        """
        if self.form in ("delta", "weight"):
            change = self.bias_change()
            if change is not None:
                b = change.to(W.dtype) if b is None else b + change.to(W.dtype)
            return (W + self.dense().to(W.dtype) if self.form == "delta" else self.weight(W)), b
        if self.form == "before":
            eye = torch.eye(W.shape[1], device=W.device, dtype=W.dtype)
            return W @ self.before(eye).to(W.dtype).T, b
        raise Refusal(self.peft_type, "a merge", "its effect on the output is no change of the weights")

    def dense(self) -> Tensor:
        """ΔW[out, fan_in] of the form `delta`."""
        return product(self.delta())

    def replacements(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """For the form `replace`: the new value of each parameter this method changes."""
        return {name: self.replace(name, parameters[name]) for name in self.replaced_names}

    @property
    def shifts(self) -> bool:
        """Whether a part of its effect is a constant vector, which merges into a bias only."""
        return self.form in ("delta", "weight") and self.bias_change() is not None

    @property
    def mergeable(self) -> bool:
        """Whether the effect is a change of weights: an `after` needs a `fold`, and a single matrix to fold into."""
        if self.form == "after":
            return type(self).fold is not Method.fold and not self.geometry.weightless
        return self.form != "prompt"

    def stored(self, attr: str, tensor: Tensor) -> Tensor:
        """What the file holds of a tensor: all of it, unless the method leaves some out (pruned ranks)."""
        return tensor

    def rank(self) -> int | None:
        """The largest rank of the update of W, None when it is not a change of W."""
        return None

    def extra_repr(self) -> str:
        return f"{self.peft_type}, form={self.form}"


def product(factors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """The matrix of a chain of factors, the one next to x first: `(A, B) -> B @ A`."""
    matrix = factors[0]
    for f in factors[1:]:
        matrix = f @ matrix
    return matrix


def own_copies(result: Any, method: nn.Module) -> Any:
    """What a call gives, without the method's own tensors in it: those are gone after a call for which they were
    gathered."""
    mine = {t.untyped_storage().data_ptr() for t in (*method.parameters(), *method.buffers())}
    return tree_map_only(Tensor, lambda t: t.clone() if t.untyped_storage().data_ptr() in mine else t, result)
