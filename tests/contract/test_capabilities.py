"""What methods can do besides the contract: who claims it states it, and who states it claims it."""

from __future__ import annotations

import inspect

import pytest
import torch

from peft import registry
from peft.contract import capabilities
from peft.contract.capabilities import Blends, Companion, Derives, Penalised, Scheduled, TwoFactors
from peft.contract.method import Method

CAPABILITIES = {
    n: c for n, c in vars(capabilities).items() if inspect.isclass(c) and c.__module__ == capabilities.__name__
}
CLASSES = {**registry.methods(), **registry.companions(), **registry.wrappers()}


def function(value: object) -> object:
    """What a class holds under a name, without the classmethod or property around it."""
    return getattr(value, "__func__", getattr(value, "fget", value))


def asked(capability: type) -> list[str]:
    """The functions that a capability leaves to those who claim it."""
    return [
        name
        for name, value in vars(capability).items()
        if inspect.isfunction(f := function(value)) and "NotImplementedError" in f.__code__.co_names
    ]


def test_the_capabilities_are_found():
    assert asked(TwoFactors) == ["two_factors", "set_factors", "config_for_ranks", "join"]
    assert asked(Penalised) == ["penalty"] and asked(Derives) == ["derive"]  # the others have a default
    for name, c in CAPABILITIES.items():
        assert asked(c) or not [n for n in vars(c) if not n.startswith("__")], name  # else a mark and nothing else


CLAIMS = [(name, c) for name, cls in CLASSES.items() for c in CAPABILITIES if issubclass(cls, CAPABILITIES[c])]


@pytest.mark.parametrize(("name", "capability"), CLAIMS, ids=["-".join(c) for c in CLAIMS])
def test_who_claims_a_capability_states_its_functions(name, capability):
    cls, claimed = CLASSES[name], CAPABILITIES[capability]
    lacking = [f for f in asked(claimed) if function(inspect.getattr_static(cls, f)) is function(vars(claimed)[f])]
    assert not lacking, f"{cls.__name__} is a {capability} without {', '.join(lacking)}"


@pytest.mark.parametrize("name", registry.methods())
def test_who_states_a_capabilitys_function_claims_it(name):
    """It is asked for by `isinstance`, so that a function alone would never be called."""
    cls = registry.methods()[name]
    silent = [
        f"{capability}.{f}"
        for capability, c in CAPABILITIES.items()
        for f in asked(c)
        if hasattr(cls, f) and not hasattr(Method, f) and not issubclass(cls, c)
    ]
    assert not silent, silent


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_some_method_has_each_capability(capability):
    assert capability in {c for _, c in CLAIMS}


def test_a_function_that_nobody_stated_names_the_class_and_itself():
    class Half(TwoFactors, Scheduled, Blends):
        pass

    for call, name in [
        (lambda: Half().two_factors(), "two_factors"),
        (lambda: Half.after_step({}, None, 1), "after_step"),
        (lambda: Half().blend([], []), "blend"),
    ]:
        with pytest.raises(NotImplementedError, match=rf"^Half\.{name}$"):
            call()


def test_penalties_add_up_and_state_is_derived_unless_a_method_says_otherwise():
    total = Penalised.total_penalty([torch.tensor(1.5), torch.tensor(-0.25), torch.tensor(4.0)], None)
    assert total.shape == () and total.item() == 5.25
    assert Derives().derives


def test_a_companion_names_the_field_that_brings_it():
    for field, cls in registry.companions().items():
        assert issubclass(cls, Companion) and cls.companion == field
