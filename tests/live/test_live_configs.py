"""Configs both ways with huggingface/peft 0.21.2: the same fields, the same defaults, JSON that either side reads, and
every field takes effect. What each field is set to is in `live_configs.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import json

import pytest
import torch
from safetensors.torch import save_file

import peft
from peft import get_peft_model, get_peft_model_state_dict, registry
from tests.live.live_cases import HERE, TASKS, UPSTREAM, build, inputs, output
from tests.live.live_configs import OFF, SILENT, START, defaults, off, plain, values, variants

CONFIGS = {m.config_class.__name__: m.config_class for m in registry.methods().values()}
UNBUILT = [(c, f.name) for c in START for f in dataclasses.fields(CONFIGS[c]) if "unavailable" in f.metadata]
EFFECTS = [(c, name) for c, fields in OFF.items() for name in fields]
both_ways = pytest.mark.parametrize("side", [HERE, UPSTREAM])


# -- the same fields ------------------------------------------------------------------------------------------------------------
def test_upstreams_fields_exist_with_its_defaults(exchange):
    theirs = exchange.made[UPSTREAM]["methods"]
    shared = sorted(set(theirs) & set(registry.methods()))
    assert {theirs[n]["class"] for n in shared} == set(START)
    for name in shared:
        assert registry.methods()[name].config_class.__name__ == theirs[name]["class"]
        ours = defaults(registry.methods()[name].config_class)
        # what __post_init__ makes of a default is compared below, through objects
        for field, value in theirs[name]["fields"].items():
            assert field in ours, f"{name}.{field}"
            if field != "peft_type":
                assert ours[field] == value, f"{name}.{field}"


def test_further_fields_are_written_only_when_they_are_used(exchange):
    for cls, start in START.items():
        theirs = next(m["fields"] for m in exchange.made[UPSTREAM]["methods"].values() if m["class"] == cls)
        written = CONFIGS[cls](**start).to_json_dict()
        assert set(written) == set(theirs) - {"runtime_config"}, cls


@both_ways
def test_json_of_one_side_is_read_by_the_other(exchange, side):
    other = {HERE: UPSTREAM, UPSTREAM: HERE}[side]
    for name, (cls, _) in variants().items():
        made, read = exchange.made[side]["config", name], exchange.read[other]["config", name]
        if made["error"]:
            continue
        assert read["error"] is None, (name, read["error"])
        assert read["outputs"]["class"] == cls
        assert not [w for w in read["warnings"] if "nexpected" in w or "know" in w], name
        common = {k: v for k, v in read["outputs"]["values"].items() if k in made["outputs"]["values"]}
        common.pop("runtime_config", None)
        assert common == {k: made["outputs"]["values"][k] for k in common}, name


def test_either_side_makes_the_same_config_of_the_same_arguments(exchange):
    failed = []
    for name in variants():
        ours, theirs = (exchange.made[s]["config", name] for s in (HERE, UPSTREAM))
        assert ours["error"] is None, name
        if theirs["error"]:
            failed.append(name)
            continue
        there = theirs["outputs"]["values"]
        here = {k: v for k, v in ours["outputs"]["values"].items() if k in there}
        assert here | {"peft_version": None} == there | {"peft_version": None}, name
    assert not failed


def test_a_file_with_fields_of_another_version(tmp_path):
    """Promise 24: known but unavailable is accepted at its default and refused by name otherwise; unknown warns or raises."""
    path = tmp_path / "adapter_config.json"

    def write(**more):
        path.write_text(json.dumps({"peft_type": "LORA", "r": 3, "target_modules": ["q_proj"], **more}))

    write(eva_config=None, loftq_config={})
    assert peft.PeftConfig.from_pretrained(tmp_path).r == 3
    write(eva_config={"rho": 2.0})
    with pytest.raises(ValueError, match="eva_config"):
        peft.PeftConfig.from_pretrained(tmp_path)
    write(of_tomorrow=1)
    with pytest.warns(UserWarning, match="of_tomorrow"):
        assert peft.PeftConfig.from_pretrained(tmp_path).r == 3
    with pytest.raises(ValueError, match="of_tomorrow"):
        peft.PeftConfig.from_pretrained(tmp_path, strict=True)


# -- every field has its meaning --------------------------------------------------------------------------------------------------
def test_every_field_is_accounted_for(exchange):
    """Each of upstream's fields takes effect, or is refused off its default, or is listed with the reason."""
    for method in exchange.made[UPSTREAM]["methods"].values():
        cls = method["class"]
        if cls not in START:
            continue
        unavailable = {f for c, f in UNBUILT if c == cls}
        for name in method["fields"]:
            silent = name in SILENT or f"{cls}.{name}" in SILENT
            assert (name in OFF[cls]) + (name in unavailable) + silent == 1, f"{cls}.{name}"


@pytest.mark.parametrize(("cls", "name"), UNBUILT)
def test_what_is_not_built_is_refused_by_name(cls, name):
    default = defaults(CONFIGS[cls])[name]
    CONFIGS[cls](**{**START[cls], name: default})
    for value in (True, {"some": 1}, [1]):
        if value != default:
            with pytest.raises(ValueError, match=rf"{name}="):
                CONFIGS[cls](**{**START[cls], name: value})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two tokenizers and two source prompts, by the names that stand in the configs."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("files")
    for folder, words in (("tokenizer", "a b c"), ("tokenizer/second", "c a b")):
        backend = Tokenizer(models.WordLevel({w: i + 5 for i, w in enumerate(words.split())}, unk_token="a"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(root / folder)
    for i, name in enumerate(("source", "source two")):
        shapes = {"prompt_embeddings": (3, 16), "prefix_task_cols": (2, 3, 1), "prefix_task_rows": (2, 1, 16)}
        rng = torch.Generator().manual_seed(i)
        save_file({k: torch.randn(s, generator=rng) for k, s in shapes.items()}, root / f"{name}.safetensors")
    return {
        "<tokenizer>": str(root / "tokenizer"),
        "<tokenizer>/second": str(root / "tokenizer" / "second"),
        "<source>": str(root / "source.safetensors"),
        "<source two>": str(root / "source two.safetensors"),
    }


def fingerprint(cls: str, fields: dict, base: str) -> list:
    """All that a config decides: the class, what trains, its start, outputs, gradients' steps, and the file."""
    tasks = {"task_ids": torch.tensor([0, 0])} if "num_tasks" in defaults(CONFIGS[cls]) else {}
    torch.manual_seed(0)
    try:
        model = get_peft_model(build(base), CONFIGS[cls](**fields))
    except ValueError as e:
        return ["refused", str(e)]
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    seen = [type(model).__name__, {n: tuple(p.shape) for n, p in trained.items()}]
    every = [p for p in model.adapter_parameters("default")]
    seen.append([float(p.detach().double().sum()) for p in every])
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in every:
            p.add_(0.2 * torch.randn(p.shape, generator=rng))
        seen.append(output(model.eval()(**inputs(base), **tasks)))
    if trained:
        model.train()
        optimiser = torch.optim.SGD(trained.values(), 0.01)
        torch.manual_seed(2)
        for step in range(1, 6):
            given = {**inputs(base), **tasks}
            out = model(**given, labels=given["input_ids"]) if TASKS.get(base) == "CAUSAL_LM" else model(**given)
            loss = getattr(out, "loss", None)
            loss = output(out).square().mean() if loss is None else loss
            loss.backward()
            optimiser.step()
            if hasattr(model.base_model, "update_and_allocate"):
                model.base_model.update_and_allocate(step)
            optimiser.zero_grad()
        seen.append([p.detach().clone() for p in every])
    seen.append({k: tuple(v.shape) for k, v in get_peft_model_state_dict(model).items()})
    return seen


@functools.cache
def plainly(cls: str, fields: str, base: str) -> list:
    """What a config decides that is compared with others, computed twice to see that it can be compared."""
    first = fingerprint(cls, json.loads(fields), base)
    assert first[0] != "refused"
    assert same(first, fingerprint(cls, json.loads(fields), base)), "the comparison is not repeatable"
    return first


def same(a, b) -> bool:
    if torch.is_tensor(a) and torch.is_tensor(b):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize(("cls", "name"), EFFECTS)
def test_the_field_takes_effect(cls, name, files):
    o = off(cls, name)
    base = o.base or "llama"

    def resolved(fields: dict) -> dict:
        return {k: files.get(v, v) if isinstance(v, str) else v for k, v in fields.items()}

    start = resolved({**START[cls], **o.beside})
    value = files.get(o.value, o.value) if isinstance(o.value, str) else o.value
    assert plain(value) != values(CONFIGS[cls](**start))[name]
    changed = fingerprint(cls, {**start, **o.along, name: value}, base)
    assert not same(plainly(cls, json.dumps(start, sort_keys=True), base), changed)
