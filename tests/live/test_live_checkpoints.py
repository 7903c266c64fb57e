"""Checkpoints both ways with huggingface/peft 0.21.2: saved by one library, loaded by the other, in processes of their own.

The cases are in `live_cases.py`. Expected values are what the library that saved the adapter computed with it.
"""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file

from peft import registry
from tests.live.live_cases import CASES, HERE, UPSTREAM, build, folder_of, inputs, output
from tests.live.live_exchange import GUIDE, HEADING, table

WAYS = [
    pytest.param(case, maker, reader, id=f"{case.name}-{maker} to {reader}")
    for case in CASES.values()
    for maker, reader in case.ways
    if not case.apart
]
# what upstream says when it drops fields of a config, or does not find tensors that it looks for in a file
DROPPED = "Unexpected keyword|missing adapter keys"


@pytest.mark.slow
@pytest.mark.parametrize(("case", "maker", "reader"), WAYS)
def test_the_reader_computes_what_the_maker_computed(exchange, case, maker, reader):
    made, found = exchange.made[maker][case.name], exchange.read[reader][case.name, maker]
    assert made["error"] is None
    if reader in case.refused:
        assert re.search(case.refused[reader], found["error"] or ""), found["error"]
        return
    assert found["error"] is None
    assert exchange.difference(case, maker, reader) <= 1e-5
    expected = ["default"] if case.merged else [case.selected] if case.selected else list(case.adapters)
    assert list(found["outputs"]) == expected
    said = found["warnings"] if reader == HERE else [w for w in found["warnings"] if re.search(DROPPED, w)]
    allowed = case.warns.get(reader)
    assert not [w for w in said if allowed is None or not re.search(allowed, w)]
    assert allowed is None or said


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_the_adapter_acts_and_the_bases_are_the_same(exchange, case):
    makers = {maker for maker, _ in case.ways}
    made = {side: exchange.made[side][case.name] for side in makers}
    bases = {int(m["outputs"]["digest"]) for m in made.values()}
    assert len(bases) == 1, "the two sides built different base models"
    for side in makers:
        base = made[side]["outputs"]["base"]
        for name in [case.selected] if case.selected else case.adapters:
            out = made[side]["outputs"].get(name)
            if out is not None and out.shape == base.shape:
                assert (out - base).abs().max() > 5e-3


def test_every_method_that_both_have_is_exchanged(exchange):
    both = set(exchange.made[UPSTREAM]["methods"]) & set(registry.methods())
    ours = {m.config_class.__name__: name for name, m in registry.methods().items()}
    assert len(both) >= 15
    for way in ((UPSTREAM, HERE), (HERE, UPSTREAM)):
        exchanged = {ours[c.config] for c in CASES.values() if way in c.ways and way[1] not in c.refused}
        assert both <= exchanged


def test_an_exception_has_its_derivation():
    for case in CASES.values():
        special = case.apart or (
            case.merged
            or case.refused
            or (case.alter is not None and set(case.ways) == {(UPSTREAM, HERE), (HERE, UPSTREAM)})
        )
        assert not special or len(case.why) > 80, case.name


# -- exceptions, with the weights written out ---------------------------------------------------------------------------------------
def tensors_of(exchange, maker, case):
    """The tensors of an adapter as its reader on our side found them, without the root of their keys."""
    folder = folder_of(str(exchange.root), maker, case) + ("" if case.alter is None else f" for {HERE}")
    return {k.removeprefix("base_model.model."): v for k, v in load_file(f"{folder}/adapter_model.safetensors").items()}


@torch.no_grad()
def run(model, case):
    return output(model(**inputs(case.base)))


@pytest.mark.parametrize(("maker", "reader"), [(UPSTREAM, HERE), (HERE, UPSTREAM)])
def test_upstream_adds_the_delta_of_an_attentions_output_twice(exchange, maker, reader):
    case = CASES["lora attention, not moved"]
    tensors, s = tensors_of(exchange, maker, case), case.fields["lora_alpha"] / case.fields["r"]

    def explicit(times: int):
        model = build(case.base)
        for weight, stem in ((model.site.in_proj_weight, ""), (model.site.out_proj.weight, "base_layer.out_proj.")):
            delta = s * tensors[f"site.{stem}lora_B.weight"] @ tensors[f"site.{stem}lora_A.weight"]
            weight.data += delta * (times if stem else 1)
        return run(model, case)

    for side, times in ((HERE, 1), (UPSTREAM, 2)):
        found = exchange.made[side][case.name] if side == maker else exchange.read[side][case.name, maker]
        assert (found["outputs"]["default"] - explicit(times)).abs().max() < 1e-5
    assert exchange.difference(case, maker, reader) > 0.1


@pytest.mark.parametrize("name", ["old mixtral", "old mixtral, rslora"])
def test_separate_experts_keep_their_delta(exchange, name):
    case = CASES[name]
    tensors = tensors_of(exchange, UPSTREAM, case)
    r, alpha = case.fields["r"], case.fields["lora_alpha"]
    s = alpha / (r**0.5 if case.fields.get("use_rslora") else r)
    model = build(case.base)

    def delta(path):
        return s * tensors[f"{path}.lora_B.weight"] @ tensors[f"{path}.lora_A.weight"]

    for i, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj.weight.data += delta(f"model.layers.{i}.self_attn.q_proj")
        layer.mlp.gate.weight.data += delta(f"model.layers.{i}.block_sparse_moe.gate")
        for e in range(len(layer.mlp.experts.down_proj)):
            w1, w2, w3 = (delta(f"model.layers.{i}.block_sparse_moe.experts.{e}.w{n}") for n in (1, 2, 3))
            layer.mlp.experts.gate_up_proj.data[e] += torch.cat([w1, w3])
            layer.mlp.experts.down_proj.data[e] += w2
    explicit = run(model, case)
    found = {side: exchange.read[side][case.name, UPSTREAM]["outputs"]["default"] for side in (HERE, UPSTREAM)}
    assert (found[HERE] - explicit).abs().max() < 1e-5
    assert ((found[UPSTREAM] - explicit).abs().max() > 0.1) == case.apart


def test_the_guide_shows_what_is_measured(exchange):
    """The guide's table has a row for every method, and none says much less than what is measured now."""
    shown = GUIDE.read_text().partition(HEADING)[2]
    rows = {
        r.split("|")[1].strip(): re.findall(r"\d\.\de[-+]\d\d", r) for r in shown.splitlines() if r.startswith("| ")
    }
    for line in table(exchange).splitlines()[2:]:
        name, numbers = line.split("|")[1].strip(), re.findall(r"\d\.\de[-+]\d\d", line)
        assert name in rows, "run python -m tests.live.live_exchange"
        assert all(float(now) <= 10 * float(said) + 2e-6 for now, said in zip(numbers, rows[name], strict=True)), line
