"""The places of a base model: paths that adapters do not change, parts of composites, and the kind of each module."""

from __future__ import annotations

from torch import nn

from peft import LoraConfig, get_peft_model
from peft.core.anatomy.walk import kind_of, walk


def net() -> nn.Module:
    made = nn.Module()
    made.attn, made.out = nn.MultiheadAttention(4, 2), nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    return made


def test_a_module_of_several_weights_is_followed_by_its_parts():
    places = {p.path: p for p in walk(net())}
    assert list(places) == ["attn", "attn.in_proj", "attn.out_proj", "out", "out.0", "out.1"]
    part = places["attn.out_proj"]
    assert part.owner is places["attn"] or part.owner.path == "attn"
    assert part.composite is not None and places["out.0"].owner is None
    assert part.disk_path == "attn.base_layer.out_proj" and places["attn.in_proj"].disk_path == "attn"


def test_paths_and_modules_are_the_bases_with_adapters_in_it():
    plain = [(p.path, p.disk_path) for p in walk(net())]
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["attn", "0"])).get_base_model()
    places = list(walk(model))
    assert [(p.path, p.disk_path) for p in places] == plain
    linear = next(p for p in places if p.path == "out.0")
    assert type(linear.module) is nn.Linear and linear.adapted is linear.held is not linear.module
    assert next(p for p in places if p.path == "out.1").adapted is None


def test_the_most_specific_kind_claims_a_module():
    assert kind_of(nn.Linear(2, 2)).name == "linear"
    assert kind_of(nn.Conv2d(2, 2, 1)).name == "conv2d"
    assert kind_of(nn.Embedding(2, 2, max_norm=1.0)) is not kind_of(nn.Embedding(2, 2))
    assert kind_of(nn.ReLU()).geometry(nn.ReLU()).weightless
