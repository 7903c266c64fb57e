"""A method around any delta: a tiny one, which only says what it makes of the delta, is a whole method."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from peft import LoHaConfig, LoraConfig, PeftModel, registry
from peft.config_fields import own_field
from peft.contract.capabilities import Derives, Penalised
from peft.contract.geometry import plain_geometry
from peft.contract.method import Method
from peft.contract.site import Site
from peft.contract.tensors import Stored
from peft.core.forms.wrapped import Around
from tests.helpers.one_layer import adapted

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(9))


class RowGain(Around):
    """g ⊙ ΔW, a gain per output row that starts at 1."""

    def own_tensors(self) -> dict[str, Stored]:
        return {f"{self.prefix}gain": Stored(shape="out", join="rows")}

    @property
    def gain(self) -> Tensor:
        return self.tensor(f"{self.prefix}gain")

    def start(self, rng: torch.Generator, site: Site) -> None:
        self.gain.fill_(1.0)

    def delta(self) -> tuple[Tensor, ...]:
        *first, last = self.inner.delta()
        return (*first, self.gain[:, None] * last)


@dataclass
class GainedLora(LoraConfig):
    use_gain: bool = own_field(False)


@dataclass
class GainedLoHa(LoHaConfig):
    use_gain: bool = own_field(False)


CONFIGS = {
    "lora": lambda **more: GainedLora(r=2, lora_alpha=6, target_modules=["site"], **{"use_gain": True, **more}),
    "loha": lambda **more: GainedLoHa(r=2, alpha=6, target_modules=["site"], **{"use_gain": True, **more}),
}
DELTAS = {
    "lora": lambda m: 3.0 * m.lora_B_weight @ m.lora_A_weight,
    "loha": lambda m: 3.0 * (m.hada_w1_a_weight @ m.hada_w1_b_weight) * (m.hada_w2_a_weight @ m.hada_w2_b_weight),
}
KEYS = {
    "lora": {"lora_A.weight", "lora_B.weight", "lora_gain"},
    "loha": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_gain"},
}
every = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(autouse=True)
def wrapper() -> Iterator[type[Around]]:
    """Known by its field for as long as a test runs."""
    cls = type("Gain", (RowGain,), {"wraps": "use_gain"})
    assert registry.wrappers()["use_gain"] is cls
    yield cls
    del registry._WRAPPERS["use_gain"]


def changed(layer: nn.Module, *changes: Tensor) -> Tensor:
    """What the base layer with these changes of its weight makes of X."""
    return F.linear(X, layer.base_layer.weight + sum(changes), layer.base_layer.bias)


@every
@torch.no_grad()
def test_forward_is_the_base_and_what_the_wrapper_makes_of_the_delta(name, wrapper):
    model, method = adapted(CONFIGS[name]())
    layer = model.get_base_model().site
    change = method.gain[:, None] * DELTAS[name](method.inner)
    assert type(method) is wrapper and float((method.gain - 1).abs().max()) > 0.1
    assert torch.allclose(model(X), changed(layer, change), atol=1e-5)
    assert float((model(X) - changed(layer, DELTAS[name](method.inner))).abs().max()) > 1e-2


@every
@torch.no_grad()
def test_merged_is_what_forward_gave_and_unmerging_brings_the_bits_back(name):
    model, method = adapted(CONFIGS[name]())
    layer, expected = model.get_base_model().site, model(X)
    before, change = layer.base_layer.weight.clone(), method.gain[:, None] * DELTAS[name](method.inner)
    model.merge_adapter()
    assert torch.allclose(layer.base_layer.weight, before + change, atol=1e-6)
    assert torch.allclose(model(X), expected, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, before)
    assert torch.allclose(model.merge_and_unload()(X), expected, atol=1e-5)


@every
@torch.no_grad()
def test_a_fresh_one_starts_as_the_delta_alone_does(name):
    model, method = adapted(CONFIGS[name](seed=4), noise=0.0)
    _, alone = adapted(CONFIGS[name](seed=4, use_gain=False), noise=0.0)
    assert not isinstance(alone, Around) and torch.equal(method.gain, torch.ones(24))
    inner = dict(method.inner.named_parameters())
    assert inner.keys() == dict(alone.named_parameters()).keys()
    assert all(torch.equal(p, inner[n]) for n, p in alone.named_parameters())
    with model.disable_adapter():
        base = model(X)
    assert torch.equal(model(X), base)


@every
def test_gradients_reach_the_delta_and_what_is_around_it(name):
    """With L = Σ y: dL/dg = (ΔW Σx) row by row."""
    model, method = adapted(CONFIGS[name]())
    model.train()(X).sum().backward()
    assert torch.allclose(method.gain.grad, DELTAS[name](method.inner) @ X.sum(0), atol=1e-4)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in method.inner.parameters())


@every
@torch.no_grad()
def test_files_hold_the_deltas_own_keys_and_the_wrappers(name, tmp_path):
    model, _ = adapted(CONFIGS[name]())
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {k.removeprefix("base_model.model.site.") for k in stored} == KEYS[name]
    torch.manual_seed(0)
    base = nn.Sequential()
    base.site = nn.Linear(16, 24)
    again = PeftModel.from_pretrained(base, tmp_path, config=CONFIGS[name]()).eval()
    assert torch.equal(again(X), model(X))


@every
@torch.no_grad()
def test_adapters_with_and_without_it_act_side_by_side(name):
    model, method = adapted(CONFIGS[name]())
    model.add_adapter("plain", CONFIGS[name](use_gain=False))
    model.add_adapter("second", CONFIGS[name]())
    for p in (*model.adapter_parameters("plain"), *model.adapter_parameters("second")):
        p += 0.2 * torch.randn_like(p)
    layer = model.get_base_model().site
    (plain,), (second,) = layer.methods["plain"], layer.methods["second"]
    changes = {
        "default": method.gain[:, None] * DELTAS[name](method.inner),
        "plain": DELTAS[name](plain),
        "second": second.gain[:, None] * DELTAS[name](second.inner),
    }
    for names in (["plain"], ["second"], ["default", "plain"], ["default", "plain", "second"]):
        model.base_model.set_adapter(names)
        expected = changed(layer, *(changes[n] for n in names))
        assert torch.allclose(model(X), expected, atol=1e-5), names
        model.merge_adapter()
        assert torch.allclose(model(X), expected, atol=1e-5), names
        model.unmerge_adapter()
    names = ["second", "__base__", "default", "plain", "second"]
    found = model(X, adapter_names=names)
    for i, n in enumerate(names):
        expected = changed(layer, changes.get(n, torch.zeros(24, 16)))
        assert torch.allclose(found[i], expected[i], atol=1e-5), n


@torch.no_grad()
def test_a_factor_on_the_effect_reaches_the_delta():
    model, method = adapted(CONFIGS["lora"]())
    layer = model.get_base_model().site
    whole = method.gain[:, None] * DELTAS["lora"](method.inner)
    method.multiplier = 0.5
    assert method.inner.multiplier == 0.5
    assert torch.allclose(model(X), changed(layer, 0.5 * whole), atol=1e-5)


# -- what it does not state itself is the wrapped method's ----------------------------------------------------------------------
class Inner(Derives, Penalised, Method):
    """A delta that notes what it is asked."""

    prefix = "inner_"
    tensors = {"w": Stored("inner_w.weight", shape="out fan_in", shrinks=0)}
    dropout = 0.25

    def __init__(self, config: object, site: Site) -> None:
        super().__init__(config, site)
        self.create(site)
        self.set(asked=[])

    def delta(self) -> tuple[Tensor]:
        return (self.w,)

    def reset(self, rng: torch.Generator, site: Site) -> None:
        self.asked.append("reset")
        nn.init.zeros_(self.w)

    def derive(self, rng: torch.Generator, site: Site) -> None:
        self.asked.append("derive")

    def penalty(self) -> Tensor:
        return torch.tensor(7.0)

    def bias_change(self) -> Tensor:
        return torch.arange(4.0)

    def rank(self) -> int:
        return 3

    def stored(self, attr: str, tensor: Tensor) -> Tensor:
        return tensor[:1] if attr == "w" else tensor


def site() -> Site:
    cpu = torch.device("cpu")
    return Site("site", plain_geometry(4, 6), lambda: torch.zeros(4, 6), dict, dict, cpu, torch.float32)


def around(inner: Method) -> RowGain:
    return RowGain(None, site(), inner)


def test_what_it_does_not_state_is_asked_of_the_delta_however_deep_it_lies():
    inner = Inner(None, site())
    for method in (around(inner), around(around(inner))):
        assert method.nested()[-1] is inner and method.nested()[0] is method
        assert method.penalty().item() == 7.0 and method.rank() == 3 and method.dropout == 0.25
        assert torch.equal(method.bias_change(), torch.arange(4.0))
        assert method.derives and method.prefix == "inner_"
        inner.asked.clear()
        method.derive(torch.Generator(), site())
        method.reset(torch.Generator(), site())
        assert inner.asked == ["derive", "reset"] and torch.equal(method.gain, torch.ones(4))


def test_a_delta_that_neither_derives_nor_is_penalised_stays_so():
    class Plain(Method):
        tensors = {"w": Stored(shape="out fan_in")}

        def delta(self) -> tuple[Tensor]:
            return (self.w,)

    method = around(Plain(None, site()))
    assert not method.derives and method.penalty() is None
    method.derive(torch.Generator(), site())


def test_a_file_sizes_the_delta_and_gets_what_the_delta_leaves_of_it():
    method = around(Inner(None, site()))
    method.resize({"inner.w": torch.zeros(2, 6), "inner_gain": torch.zeros(9)})
    assert tuple(method.inner.w.shape) == (2, 6) and tuple(method.gain.shape) == (4,)
    assert method.stored("inner.w", torch.zeros(2, 6)).shape == (1, 6)
    assert method.stored("w", torch.zeros(2, 6)).shape == (2, 6)  # its own tensor of the same name
    assert method.table.keys == {"inner.w": "inner_w.weight", "inner_gain": "inner_gain"}
