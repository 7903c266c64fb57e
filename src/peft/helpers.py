"""Small conveniences around a PeftModel."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .config import CONFIG_NAME
from .core.acting.on_model import roster_of
from .core.adapted.layer import adapted_layers
from .core.model.peft_model import PeftModel
from .remote import find_file


def update_forward_signature(model: PeftModel) -> None:
    """Let `inspect.signature(model.forward)` show the base model's arguments."""
    _show(model, "forward")


def update_generate_signature(model: PeftModel) -> None:
    """Let `inspect.signature(model.generate)` show the base model's arguments."""
    _show(model, "generate")


def update_signature(model: PeftModel, method: str = "all") -> None:
    """Both, or one of `forward` and `generate`."""
    if method not in ("all", "forward", "generate"):
        raise ValueError(f"method {method!r} is not supported; expected 'forward', 'generate' or 'all'.")
    for name in ("forward", "generate") if method == "all" else (method,):
        _show(model, name)


def _show(model: PeftModel, name: str) -> None:
    shown, own = getattr(model.get_base_model(), name), getattr(type(model), name)

    @functools.wraps(shown)
    def call(*args: object, **kwargs: object) -> object:
        return own(model, *args, **kwargs)

    model.__dict__[name] = call


def check_if_peft_model(model_name_or_path: str | os.PathLike[str]) -> bool:
    """Whether a folder or repository holds an adapter."""
    try:
        return find_file(os.fspath(model_name_or_path), CONFIG_NAME, None, {}) is not None
    except ValueError:
        return False


def set_exact_adapter_math(model: nn.Module, exact: bool = True) -> None:
    """Let adapters on a half-precision base compute in the dtype of their own parameters, fp32 by default.

    By default an adapter's products run in the layer's compute dtype, with parameters and gradients in fp32. The exact
    mode casts each input up and the result down, as huggingface/peft does, which takes more time and memory
    (docs/precision.md shows both on a real run).
    """
    roster = roster_of(model)
    if roster is None or not roster.adapters:
        raise ValueError("set_exact_adapter_math: this model has no adapters.")
    roster.exact = bool(exact)


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Within, the active adapters' strength times `multiplier`; restored afterwards, in whatever order several end.

    Strengths are the adapters' own, so this holds for all threads.
    """
    if not isinstance(multiplier, (int, float)) or isinstance(multiplier, bool):
        raise TypeError(f"multiplier should be of type float, got {type(multiplier)}")
    roster = roster_of(model)
    if roster is None or not roster.adapters:
        raise ValueError("This model has no adapters to rescale.")
    methods = [m for n in roster.chosen for _, m in roster.adapters[n].methods]
    mine = object()
    with roster.gate.change():
        for m in methods:
            at_rest, factors = m.__dict__.setdefault("_rescaled", (m.multiplier, {}))
            factors[mine] = multiplier
            m.multiplier = math.prod(factors.values(), start=at_rest)
    try:
        yield
    finally:
        with roster.gate.change():
            for m in methods:
                at_rest, factors = m.__dict__["_rescaled"]
                del factors[mine]
                m.multiplier = math.prod(factors.values(), start=at_rest)
                if not factors:
                    del m.__dict__["_rescaled"]


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Within, adapted layers leave their inputs' dtype alone, which they always do: adapters compute in the layer's.

    Kept for diffusers' layerwise casting, which asks for it.
    """
    if active and next(adapted_layers(model), None) is None:
        raise ValueError("This model has no adapted layers.")
    yield


class DoraCaching:
    """Kept for callers, as a context and as `DoraCaching()(enabled=True)`: DoRA's norms are computed as ever, results are
    the same."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def __call__(self, enabled: bool = True) -> DoraCaching:
        self.enabled = enabled
        return self

    def __enter__(self) -> DoraCaching:
        return self

    def __exit__(self, *raised: object) -> None:
        pass
