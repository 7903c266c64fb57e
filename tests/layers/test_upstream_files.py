"""Adapters and outputs that upstream made for each kind of layer (golden/layer_kinds, see make.py there)."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from peft import PeftModel
from peft.errors import CheckpointError
from tests.helpers.layer_kind_cases import CASES, Holder
from tests.layers.holding import close

GOLDEN = Path(__file__).parents[1] / "golden" / "layer_kinds"

SAME_AS_UPSTREAM = ["embedding", "embedding_dora", "scaled", "conv1d", "conv2d", "conv2d_dora", "conv3d", "gpt2_conv1d"]


def golden(name):
    case = load_file(GOLDEN / name / "case.safetensors")
    net = Holder(CASES[name.removesuffix("_dora")][0]()).eval()
    net.load_state_dict({k: v for k, v in case.items() if k.startswith("site.")})
    return net, case["x"], case["y"]


@pytest.mark.parametrize("name", SAME_AS_UPSTREAM)
def test_upstreams_adapter_gives_upstreams_output_and_is_written_back_alike(name, tmp_path):
    net, x, y = golden(name)
    with torch.no_grad():
        plain = net(x)
        model = PeftModel.from_pretrained(net, GOLDEN / name).eval()
        assert close(model(x), y)
        assert not close(plain, y, 1e-2)
        assert close(copy.deepcopy(model).merge_and_unload()(x), y)
    model.save_pretrained(tmp_path)
    theirs = load_file(GOLDEN / name / "adapter_model.safetensors")
    ours = load_file(tmp_path / "adapter_model.safetensors")
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert all(torch.equal(ours[k], v) for k, v in theirs.items())


def test_attentions_output_delta_is_added_once_where_upstream_adds_it_twice(tmp_path):
    # Let h be the heads' outputs joined, Δ = s·B A of out_proj. The module should give h (W + Δ)ᵀ + b.
    # Upstream's wrapper of the whole module writes Δ into out_proj's weight for the length of the call (and takes it
    # out afterwards), but what it writes into is a layer that already holds W + Δ by the same means: h (W + 2Δ)ᵀ + b.
    # So upstream's output is what a plain module gives with W_in + Δ_in and W + 2Δ, and ours with W_in + Δ_in and W + Δ.
    net, x, upstream = golden("attention")
    once, twice = copy.deepcopy(net), copy.deepcopy(net)
    model = PeftModel.from_pretrained(net, GOLDEN / "attention").eval()
    file = load_file(GOLDEN / "attention" / "adapter_model.safetensors")
    stem = "base_model.model.site."
    d_in = 2.0 * file[stem + "lora_B.weight"] @ file[stem + "lora_A.weight"]
    d_out = 2.0 * file[stem + "base_layer.out_proj.lora_B.weight"] @ file[stem + "base_layer.out_proj.lora_A.weight"]
    with torch.no_grad():
        for plain, times in ((once, 1), (twice, 2)):
            plain.site.in_proj_weight += d_in
            plain.site.out_proj.weight += times * d_out
        assert close(twice(x), upstream)
        assert not close(once(x), upstream, 1e-1)
        assert close(model(x), once(x))
    model.save_pretrained(tmp_path)
    ours = load_file(tmp_path / "adapter_model.safetensors")
    assert ours.keys() == file.keys() and all(torch.equal(ours[k], v) for k, v in file.items())


def test_upstreams_grouped_convolution_is_not_taken_for_a_change_of_the_weight():
    # Upstream's A reads all inputs and its B is grouped: outputs then depend on inputs of other groups, which no
    # grouped weight can express. Its file has other shapes and is refused; the model stays as it was.
    net, x, _ = golden("grouped")
    with torch.no_grad():
        before = net(x)
        with pytest.raises(CheckpointError, match="size mismatch"):
            PeftModel.from_pretrained(net, GOLDEN / "grouped")
        assert type(net.site) is nn.Conv2d and torch.equal(net(x), before)
